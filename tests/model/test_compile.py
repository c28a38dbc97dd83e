"""The whole model, and the operations in it, as one graph for any batch and length: torch.compile(fullgraph, dynamic) and torch.export."""

import pytest
import torch
from torch.export import Dim, export

from ssa.budget import Selection
from ssa.ops import block_sparse_attention, select_blocks
from ssa.ops.cross_entropy import linear_cross_entropy
from ssa.ops.reference import block_sparse, select
from ssa.testing import random_qkv, tiny_model


@pytest.fixture(autouse=True)
def forgotten_graphs():
    torch._dynamo.reset()


def inputs(batch, length, pads):
    ids, mask = torch.randint(0, 256, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    mask[0, :pads] = 0
    return ids, mask


class Scored(torch.nn.Module):
    """(loss, logits) of padded rows."""

    def __init__(self, model, mode):
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, labels=ids, use_cache=False, attention_mode=self.mode)[:2]


CASES = [("ssa", "sparse"), ("ssa", "full"), ("nsa", "sparse")]


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_exported_for_any_size(method, mode):
    model = Scored(tiny_model(method, num_hidden_layers=1), mode)
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=8, max=4096)}
    exported = export(model, inputs(2, 40, 3), dynamic_shapes=(sizes, sizes)).module()
    for other in (inputs(3, 57, 9), inputs(4, 8, 1)):
        for found, wanted in zip(exported(*other), model(*other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_compiled_once_for_any_size_with_gradients(method, mode):
    model = Scored(tiny_model(method, num_hidden_layers=1), mode)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (inputs(2, 40, 3), inputs(3, 57, 9)):
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            loss, logits = run(*rows)
            loss.backward()
            grads.append([loss.detach(), logits.detach(), *(p.grad.clone() for p in model.parameters())])
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("biased", [False, True])
def test_sparse_attention_and_its_gradients_are_those_of_eager_mode_in_any_number_of_chunks(monkeypatch, biased):
    monkeypatch.setattr(block_sparse, "LOGIT_ELEMENTS", 2 * 4 * 3 * 4 * 7)  # 7 queries
    monkeypatch.setattr(select, "SCORE_ELEMENTS", 2 * 4 * 9 * 5)

    def attend(q, k, v, bias):
        indices, scores = select_blocks(q, k, Selection(3, 4))
        out, lse = block_sparse_attention(q, k, v, indices, block_size=4, bias=bias)
        return out, lse, scores

    q, k, v = random_qkv(2, 30, 33, 4, 2, 8, dtype=torch.float32)
    bias = torch.randn(2, 33, 2, requires_grad=True) if biased else None
    leaves = [q, k, v] + [bias] * biased
    found = []
    for run in (torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager"), attend):
        out, lse, scores = run(q, k, v, bias)
        found.append([out, lse, scores, *torch.autograd.grad([(out * lse[..., None].cos()).sum()], leaves)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_the_loss_and_its_gradients_are_those_of_eager_mode(wanted):
    hidden, weight = (torch.randn(n, 8).requires_grad_(want) for n, want in zip((11, 30), wanted, strict=True))
    targets = torch.randint(0, 30, (11,)).masked_fill(torch.arange(11) == 4, -100)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    found, eager = compiled(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(found, eager)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    for a, b in zip(*(torch.autograd.grad(3 * x, leaves) if leaves else () for x in (found, eager)), strict=True):
        torch.testing.assert_close(a, b)
