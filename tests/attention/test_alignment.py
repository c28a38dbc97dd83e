"""SSA's alignment: each term's gradient reaches one side, and dropped keys learn only through it."""

import pytest
import torch

from ssa.attention import AttentionCall
from ssa.attention.alignment import alignment_losses
from ssa.attention.ssa import SSA
from ssa.config import Budget
from ssa.ops import select_blocks
from ssa.testing import random_qkv


def streams():
    return (torch.randn(2, 5, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_each_term_reaches_one_side_only(loss):
    full, sparse = streams()
    terms = alignment_losses(full, sparse, loss)
    d_full, d_sparse = torch.autograd.grad(terms[0], (full, sparse), retain_graph=True)
    assert (d_sparse == 0).all() and (d_full != 0).all(), "sparsity loss moves the full stream alone"
    d_full, d_sparse = torch.autograd.grad(terms[1], (full, sparse))
    assert (d_full == 0).all() and (d_sparse != 0).all(), "commitment loss moves the sparse stream alone"


def test_smooth_l1_has_equal_values_and_opposite_clamped_gradients():
    full, sparse = streams()
    with torch.no_grad():
        full *= 3  # differences on both sides of beta = 1
    terms = alignment_losses(full, sparse)
    assert terms[0] == terms[1]
    difference = (full - sparse).detach()
    assert (difference.abs() > 1).any() and (difference.abs() < 1).any()
    small = difference.abs() < 1
    expected = torch.where(small, difference.square() / 2, difference.abs() - 0.5).mean()
    torch.testing.assert_close(terms[0], expected.float())
    d_full, d_sparse = torch.autograd.grad(terms.sum(), (full, sparse))
    torch.testing.assert_close(d_full, difference.clamp(-1, 1) / difference.numel(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(d_sparse, -d_full)


def test_l2_is_the_mean_square():
    full, sparse = streams()
    terms = alignment_losses(full, sparse, "l2")
    torch.testing.assert_close(terms[0], (full - sparse).square().mean().float().detach())


def test_padding_is_left_out():
    full, sparse = streams()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    kept = alignment_losses(full[:, :3], sparse[:, :3]) * 6 + alignment_losses(full[1:, 3:], sparse[1:, 3:]) * 2
    torch.testing.assert_close(alignment_losses(full, sparse, padding_BT=padding), kept / 8)


def run(mode, align, num_selected=2):
    q, k, v = random_qkv(1, 32, 32, 4, 2, 8)
    torch.manual_seed(0)
    gates = torch.rand(1, 32, 4, 1, dtype=torch.float64)
    call = AttentionCall(mode, Budget(num_selected, 4), align)
    index, _ = select_blocks(q, k, block_size=4, num_selected_blocks=num_selected)
    return (q, k, v), gates, SSA()(q, k, v, gates, call), index


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
    method = SSA(align_gated=gated)
    outs = [SSA()(q, k, v, None, AttentionCall(mode, Budget(2, 4))).out_BTHD for mode in ("full", "sparse")]
    if gated:
        outs = [x * gates for x in outs]
    alignment = method(q, k, v, gates, AttentionCall("full", Budget(2, 4), True)).alignment
    torch.testing.assert_close(alignment, alignment_losses(*outs))
