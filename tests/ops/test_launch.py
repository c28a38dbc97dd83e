"""Which way operations are called: past PyTorch's dispatcher, unless something looks at them."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.ops import block_sparse_attention, select_blocks
from ssa.testing import random_qkv

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not os.environ.get("SSA_TEST_DEVICE", "cpu").startswith("cuda"),
    reason="with a GPU at hand the kernels are tested there",
)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.add(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def gradients(q, k, v):
    index, _ = select_blocks(q, k, block_size=4, num_selected_blocks=2, impl="triton")
    out, lse = block_sparse_attention(q, k, v, index, block_size=4, impl="triton")
    return [out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v))]


def test_modes_see_the_operators_and_both_ways_agree():
    qkv = random_qkv(1, 12, 12, 4, 2, 16, dtype=torch.float32)
    direct = gradients(*qkv)
    with Names() as names:
        seen = gradients(*qkv)
    assert {"ssa::select_blocks", "ssa::block_sparse_forward", "ssa::block_sparse_backward"} <= names.seen
    assert all(torch.equal(a, b) for a, b in zip(direct, seen, strict=True))


def test_eager_calls_go_past_the_dispatcher(monkeypatch):
    from ssa.ops.triton import block_sparse

    class Refused:
        def __call__(self, *args):
            raise AssertionError("the dispatcher was asked")

    qkv = random_qkv(1, 12, 12, 4, 2, 16, dtype=torch.float32)
    for cell in block_sparse._attend.__closure__:
        if cell.cell_contents is block_sparse.block_sparse_forward:
            monkeypatch.setattr(cell, "cell_contents", Refused())
    gradients(*qkv)
    with Names(), pytest.raises(AssertionError, match="dispatcher"):
        gradients(*qkv)


def test_gradients_of_gradients_are_refused():
    q, k, v = random_qkv(1, 12, 12, 4, 2, 16, dtype=torch.float32)
    index, _ = select_blocks(q, k, block_size=4, num_selected_blocks=2, impl="reference")
    out, _ = block_sparse_attention(q, k, v, index, block_size=4, impl="triton")
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), q)
