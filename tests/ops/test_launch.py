"""Which way operations are called: past PyTorch's dispatcher, unless something looks at them."""

import inspect
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.budget import Selection
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
    index, _ = select_blocks(q, k, Selection(2, 4), impl="triton")
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
    index, _ = select_blocks(q, k, Selection(2, 4), impl="reference")
    out, _ = block_sparse_attention(q, k, v, index, block_size=4, impl="triton")
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), q)


class Binary:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("binary", grid, args))


class Kernel:
    """What `launch` uses of a Triton kernel: how it is called, and its parameters' names."""

    def __init__(self, *names):
        self.log, self.params = [], [type("Parameter", (), {"name": name}) for name in names]

    def __getitem__(self, grid):
        return lambda *args, **options: (self.log.append(("compiled", grid, args, options)), Binary(self.log))[1]


def test_a_launch_that_repeats_goes_to_its_binary(monkeypatch):
    from ssa.ops.triton import launch as module

    monkeypatch.setattr(module, "CompiledKernel", Binary)
    kernel, plan, x = Kernel("x", "n", "A", "B"), {}, torch.zeros(4)
    module.launch(plan, kernel, (2,), x, 3, B=2, A=1, num_warps=4)
    module.launch(plan, kernel, (5, 6), x, 3, B=2, A=1, num_warps=4)
    module.launch(plan, kernel, (2,), x, 3, B=2, A=7, num_warps=4)
    module.launch(None, kernel, (2,), x, 3, B=2, A=7, num_warps=4)
    ways = [entry[0] for entry in kernel.log]
    assert ways == ["compiled", "binary", "compiled", "compiled"]
    assert kernel.log[1][1:] == ((5, 6, 1), (x, 3, 1, 2))  # constants in the order of the kernel's parameters


def test_plans_are_for_one_layout():
    from ssa.ops.triton.launch import plan_of

    x = torch.zeros(6, 8)
    plan = plan_of(x, None, "forward")
    assert plan is plan_of(torch.ones(6, 8), None, "forward")
    others = [(x.T, None), (x.half(), None), (x[:, :4], None), (torch.zeros(6, 16)[:, :8], None), (x, x)]
    assert all(plan_of(*other, "forward") is not plan for other in others)
    assert plan_of(x, None, "backward") is not plan
    assert plan_of(x.flatten()[1:], None, "forward") is None  # binaries may count on multiples of 16 bytes


def test_plans_fix_what_binaries_depend_on(monkeypatch):
    """Calls that share a plan and their options differ in nothing else that Triton compiles for: types, and which integers are 1, multiples
    of 16 or long. Shapes and everything that decides how work is cut are varied."""
    import importlib

    modules = {
        n: importlib.import_module(f"ssa.ops.triton.{n}") for n in ("block_sparse", "key_side", "key_gradients", "reader_lists", "select", "decode", "span", "align")
    }  # fmt: skip
    seen, calls = {}, []

    def kind(x):
        if isinstance(x, torch.Tensor):
            return x.dtype
        return (x == 1, x % 16 == 0, abs(x) >= 2**31) if isinstance(x, int) else type(x)

    def record(plan, kernel, grid, *args, **options):
        if plan is None:
            return
        calls.append(kernel)
        names = list(inspect.signature(kernel.fn).parameters)
        free = (kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize) or ()
        kinds = tuple(kind(x) for name, x in zip(names, args, strict=False) if name not in free)
        plans.append(plan)  # alive, so that its id stays its own
        key = (id(plan), id(kernel), tuple(sorted(options.items())))
        assert seen.setdefault(key, kinds) == kinds, f"{kernel}: {seen[key]} and {kinds}"

    plans = []
    for module in modules.values():
        monkeypatch.setattr(module, "launch", record, raising=False)
    tuned = {
        "block_sparse": {"SEGMENT": 16, "PART_BYTES": 1}, "key_side": {"SPAN_BYTES": {"forward": 1, "backward": 1}, "SPAN_SCALE": 1, "SPAN_BLOCKS": 1, "SEGMENT_ROWS": 16, "BLOCK_BYTES": 0},
        "reader_lists": {"MAP_BYTES": 0}, "select": {"CHUNKS": ((1 << 31, 8),), "SCORE_BYTES": 1},
        "decode": {"PART_KEYS": 16}, "span": {"PROGRAMS": 1, "MOST_PARTS": 1, "PART_BYTES": 1},
    }  # fmt: skip
    settings = [(None, None, None), *((m, n, v) for m, names in tuned.items() for n, v in names.items())]
    for tokens, block in ((160, 4), (160, 16), (96, 16)):
        q, k, v = random_qkv(1, tokens, tokens, 2, 2, 16, dtype=torch.float16)
        for module, name, value in settings:
            with monkeypatch.context() as patch:
                if module:
                    patch.setattr(modules[module], name, value)
                index = torch.zeros(1, 2, tokens, 2, dtype=torch.int32)
                modules["select"].select_blocks(q.detach(), k.detach()[:, ::block].contiguous(), None, None, tokens, block, 2, "group", "softmax", "exact", 0.25)  # fmt: skip
                out, _ = modules["block_sparse"].block_sparse_attention(q, k, v, index, None, None, None, block, 0.25)
                torch.autograd.grad(out.sum(), (q, k, v))
                low = torch.zeros(1, tokens, dtype=torch.int32)
                out, _ = modules["span"].span_attention(q, k, v, low, low + 1, 0.25)
                torch.autograd.grad(out.sum(), (q, k, v))
                lengths = torch.tensor([tokens])
                one, means = q.detach()[:, :1], k.detach()[:, ::block].contiguous()
                modules["decode"].decode_attention(one, k.detach(), v.detach(), means, lengths, None, None, block, 2, "group", "softmax", "exact", 0.25)  # fmt: skip
                modules["decode"].decode_select(one, means, lengths, block, 2, "group", "softmax", "exact", 0.25)
                for slots in (None, index[:, :, :1]):
                    modules["decode"].decode_attend(
                        one, k.detach(), v.detach(), index[:, :, :1], lengths, None, None, slots, block, 0.25
                    )
                modules["block_sparse"].block_sparse_attention(q.detach(), k.detach(), v.detach(), index, torch.arange(tokens)[None], None, index, block, 0.25)  # fmt: skip
    assert len(set(map(id, calls))) >= 12
