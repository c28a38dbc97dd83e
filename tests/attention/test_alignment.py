"""SSA's training layer: the drawn stream goes on, and dropped keys learn only through the alignment."""

import pytest
import torch

from ssa.attention import AttentionCall
from ssa.budget import Selection
from ssa.ops import gated_alignment, select_blocks
from ssa.testing import attend, random_qkv


def run(mode, align, num_selected=2):
    q, k, v = random_qkv(1, 32, 32, 4, 2, 8)
    torch.manual_seed(0)
    gates = torch.rand(1, 32, 4, 1, dtype=torch.float64)
    call = AttentionCall(mode, Selection(num_selected, 4), align)
    index, _ = select_blocks(q, k, Selection(num_selected, 4))
    return (q, k, v), gates, attend("ssa", q, k, v, gates, call), index


def test_dropped_keys_learn_under_ssa_but_not_from_sparse_attention():
    """Proposition 4.1: sparse attention alone gives a dropped key no gradient; the aligned full stream does."""
    leaves, _, result, index = run("sparse", align=True)
    read = torch.zeros(2, 32, dtype=torch.bool)
    for head in range(2):
        for block in index[0, head, -1].tolist():
            read[head, block * 4 : block * 4 + 4] = True
    dropped = ~read.T[None, :, :, None].expand(1, 32, 2, 8)
    d_k, d_v = torch.autograd.grad(result.out_BTHD[:, -1].square().sum(), leaves[1:], retain_graph=True)
    assert (d_k[dropped] == 0).all() and (d_v[dropped] == 0).all()
    d_k, d_v = torch.autograd.grad(result.alignment.sum(), leaves[1:])
    assert (d_k[dropped] != 0).all() and (d_v[dropped] != 0).all()


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_the_main_stream_is_the_drawn_one(mode):
    _, _, with_aux, _ = run(mode, align=True)
    _, _, alone, _ = run(mode, align=False)
    assert alone.alignment is None
    torch.testing.assert_close(with_aux.out_BTHD, alone.out_BTHD, rtol=0, atol=0)


def test_identical_streams_do_not_disagree():
    _, _, result, _ = run("sparse", align=True, num_selected=8)
    assert result.alignment.max() < 1e-12


@pytest.mark.parametrize("gated", [True, False])
def test_gated_or_ungated_outputs_are_aligned(gated):
    q, k, v = random_qkv(1, 32, 32, 4, 2, 8)
    gates = torch.rand(1, 32, 4, 1, dtype=torch.float64)
    outs = [attend("ssa", q, k, v, None, AttentionCall(mode, Selection(2, 4))).out_BTHD for mode in ("full", "sparse")]
    if gated:
        outs = [x * gates for x in outs]
    call = AttentionCall("full", Selection(2, 4), True)
    alignment = attend("ssa", q, k, v, gates, call, align_gated=gated).alignment
    torch.testing.assert_close(alignment, gated_alignment(*outs, main="full")[1])


def test_a_model_without_gates_is_aligned_too():
    q, k, v = random_qkv(1, 32, 32, 4, 2, 8)
    full, sparse = (attend("ssa", q, k, v, None, AttentionCall(mode, Selection(2, 4))).out_BTHD for mode in ("full", "sparse"))
    result = attend("ssa", q, k, v, None, AttentionCall("sparse", Selection(2, 4), True))
    assert torch.equal(result.out_BTHD, sparse) and torch.equal(result.ungated_BTHD, sparse)
    torch.testing.assert_close(result.alignment, torch.nn.functional.smooth_l1_loss(full, sparse).float().expand(2))
