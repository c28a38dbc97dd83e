"""Parts of rows attend as whole rows do; communication is tested in test_distributed.py."""

import pytest
import torch

from ssa.attention import AttentionCall
from ssa.attention.full import FullAttention
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.methods import methods
from ssa.ops import dense
from ssa.testing import attend, tiny_model
from ssa.train.context_parallel import ContextParallel, _Gathering


class Rank(ContextParallel):
    """One whose keys and values of the whole row are at hand."""

    def __init__(self, rank, ranks, position_BT, plain, row, bounds=False):
        self.ranks, self.chunks, self.row = ranks, (rank, 2 * ranks - 1 - rank), row
        self.position_BT, self.plain = self.own(position_BT), plain
        self.cu_seqlens = self.documents(self.position_BT) if bounds else None

    def own(self, x):
        return self._own(x)

    def gather(self, own):
        row = self.row if own.shape[-1] == self.row.shape[-1] else self.bias_row
        assert torch.equal(own, self.own(row))
        return row


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
@pytest.mark.parametrize("documents", [(96,), (41, 55)])
def test_parts_attend_as_whole_rows_do(method, documents):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 96, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    kind = methods()[method].load()(window_size=24)
    gates = torch.rand(2, 96, 4, methods()[method].num_gates, dtype=torch.float64)
    position_BT = torch.cat([torch.arange(n) for n in documents]).expand(2, 96)
    plain = len(documents) == 1
    call = AttentionCall(
        "sparse" if method != "full" else "full", Selection(2, 8), align=method == "ssa", positions_BT=position_BT
    )
    whole = attend(kind, q, k, v, gates, call)
    alignment = []
    for rank in range(2):
        context = Rank(rank, 2, position_BT, plain, torch.cat([k, v], -1))
        part = attend(_Gathering(kind, context), *(context.own(x) for x in (q, k, v, gates)), call)
        torch.testing.assert_close(part.out_BTHD, context.own(whole.out_BTHD))
        alignment.append(part.alignment)
    if method == "ssa":
        torch.testing.assert_close(sum(alignment) / 2, whole.alignment)


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_a_selectors_bias_reaches_all_parts(mode):
    torch.manual_seed(1)
    q, k, v, bias = (torch.randn(2, 96, *shape, dtype=torch.float64) for shape in ((4, 8), (2, 8), (2, 8), (2,)))
    position_BT = torch.cat([torch.arange(41), torch.arange(55)]).expand(2, 96)
    call = AttentionCall(mode, Selection(2, 8), positions_BT=position_BT)
    whole = attend(FullAttention(), q, k, v, None, call, bias=bias)
    assert not torch.allclose(whole.out_BTHD, attend(FullAttention(), q, k, v, None, call).out_BTHD)
    for rank in range(2):
        context = Rank(rank, 2, position_BT, False, torch.cat([k, v], -1))
        context.bias_row = bias[..., None]
        parts = attend(_Gathering(FullAttention(), context), *map(context.own, (q, k, v)), None, call, bias=context.own(bias))
        torch.testing.assert_close(parts.out_BTHD, context.own(whole.out_BTHD))


def test_a_method_with_weights_is_refused():
    model = tiny_model()
    model.model.layers[1].self_attn.method = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity, a method with weights of its own"):
        ContextParallel(model, None, 0, 2)


def test_rows_that_are_called_plain_are_taken_to_be_one_document():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 32, 1, 8) for _ in range(3))
    position_BT = torch.cat([torch.arange(20), torch.arange(12)])[None]
    outs = []
    for plain in (False, True):
        context = Rank(0, 2, position_BT, plain, torch.cat([k, v], -1))
        method = _Gathering(FullAttention(), context)
        outs.append(attend(method, *(context.own(x) for x in (q, k, v)), None, AttentionCall("full", Selection(2, 8))).out_BTHD)
    assert not torch.equal(*outs)


@pytest.mark.parametrize(("documents", "plain"), [((96,), True), ((96,), False), ((41, 55), False), ((1,) * 20 + (76,), False)])
def test_full_attention_of_parts_by_variable_length(varlen_calls, monkeypatch, documents, plain):
    """As on a GPU; bounds of both chunks have one shape, so that both are one compiled graph."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 96, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    position_BT = torch.cat([torch.arange(n) for n in documents]).expand(2, 96)
    call = AttentionCall("full", Selection(2, 8), positions_BT=position_BT)
    method = FullAttention()
    with monkeypatch.context() as patch:
        patch.setattr(dense, "_has_varlen", lambda q: False)
        whole = attend(method, q, k, v, None, call).out_BTHD
    searches = []
    monkeypatch.setattr(dense, "cu_seqlens_from_positions", lambda *a: searches.append(a))
    row = torch.cat([k, v], -1)
    parts = torch.zeros(())
    for rank in range(2):
        context = Rank(rank, 2, position_BT, plain, row, bounds=True)
        assert context.cu_seqlens.shape == (2, 2, 65 if len(documents) > 16 and rank == 0 else 17)
        out = attend(_Gathering(method, context), *(context.own(x) for x in (q, k, v)), None, call).out_BTHD
        torch.testing.assert_close(out, context.own(whole))
        parts = parts + out.square().sum()
    assert len(varlen_calls) == (3 if plain else 4) and not searches  # of plain rows, the first chunk is one causal call
    for a, b in zip(torch.autograd.grad(parts, (q, k, v)), torch.autograd.grad(whole.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_sharing_holds_bounds_no_longer_than_the_pass():
    context = Rank(0, 2, torch.arange(32)[None], False, None)
    bounds = context.documents(context.position_BT)
    with context.sharing(context.position_BT, bounds):
        assert context.cu_seqlens is bounds
    assert context.cu_seqlens is None and context.position_BT is None
