"""Parts of rows attend as whole rows do; communication is tested in test_distributed.py."""

import pytest
import torch

from ssa.attention import METHODS
from ssa.attention.base import AttentionCall
from ssa.config import Budget
from ssa.train.context_parallel import _Gathering


class Rank:
    """What `_Gathering` asks of a `ContextParallel`; keys and values of the row are at hand."""

    def __init__(self, rank, ranks, position_BT, plain, row):
        self.chunks, self.plain, self.row = (rank, 2 * ranks - 1 - rank), plain, row
        self.position_BT = self.own(position_BT)

    def own(self, x):
        pieces = x.chunk(4, 1)
        return torch.cat([pieces[i] for i in self.chunks], 1)

    def gather(self, own):
        assert torch.equal(own, self.own(self.row))
        return self.row


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
@pytest.mark.parametrize("documents", [(96,), (41, 55)])
def test_parts_attend_as_whole_rows_do(method, documents):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 96, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    kind = METHODS[method](window_size=24)
    gates = torch.rand(2, 96, 4, kind.num_gates, dtype=torch.float64)
    position_BT = torch.cat([torch.arange(n) for n in documents]).expand(2, 96)
    plain = len(documents) == 1
    call = AttentionCall("sparse" if method != "full" else "full", Budget(2, 8), align=method == "ssa", positions_BT=position_BT)
    whole = kind(q, k, v, gates, call)
    alignment = []
    for rank in range(2):
        context = Rank(rank, 2, position_BT, plain, torch.cat([k, v], -1))
        part = _Gathering(kind, context)(*(context.own(x) for x in (q, k, v, gates)), call)
        torch.testing.assert_close(part.out_BTHD, context.own(whole.out_BTHD))
        alignment.append(part.alignment)
    if method == "ssa":
        torch.testing.assert_close(sum(alignment) / 2, whole.alignment)


def test_rows_that_are_called_plain_are_taken_to_be_one_document():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 32, 1, 8) for _ in range(3))
    position_BT = torch.cat([torch.arange(20), torch.arange(12)])[None]
    outs = []
    for plain in (False, True):
        context = Rank(0, 2, position_BT, plain, torch.cat([k, v], -1))
        method = _Gathering(METHODS["full"](), context)
        outs.append(method(*(context.own(x) for x in (q, k, v)), None, AttentionCall("full", Budget(2, 8))).out_BTHD)
    assert not torch.equal(*outs)
