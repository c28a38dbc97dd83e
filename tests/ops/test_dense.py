"""dense_attention against its literal definition."""

import pytest
import torch

from ssa.errors import UserError
from ssa.ops import dense, dense_attention
from ssa.ops.documents import cu_seqlens_from_positions
from ssa.testing import attention_oracle, document_positions, random_qkv

LAYOUTS = {
    "plain": (40, 40, None),
    "last": (1, 40, None),
    "chunk": (13, 40, None),
    "packed": (40, 40, document_positions([1, 9, 30], 2)),
    "left padded": (40, 40, torch.cat([torch.zeros(2, 7, dtype=torch.int64), torch.arange(33).expand(2, 33)], 1)),
    "left padded decode": (1, 40, torch.tensor([[39], [32]])),
}


PARTS = {
    "goes on, ends, begins": torch.tensor([[*range(20, 29), 0, *range(3)], [*range(13)]]),
    "begins, one of one token at the end": torch.tensor([[*range(12), 0], [*range(27, 40)]]),
    "more documents than 16": torch.zeros(2, 13, dtype=torch.int64),
}
"""The last 13 of 40 tokens."""


@pytest.mark.parametrize("layout", ["chunk", "packed", "left padded", *PARTS])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("given", [False, True])
def test_variable_length_attention_is_masked_attention(varlen_calls, monkeypatch, layout, window, given):
    queries, keys, positions = LAYOUTS.get(layout) or (13, 40, PARTS[layout])
    q, k, v = random_qkv(2, queries, keys, 4, 2, 8)
    cu_seqlens = cu_seqlens_from_positions(positions, keys) if given and positions is not None else None
    out = dense_attention(q, k, v, positions=positions, cu_seqlens=cu_seqlens, window=window)
    assert len(varlen_calls) == 1
    monkeypatch.setattr(dense, "_has_varlen", lambda q: False)
    expected = dense_attention(q, k, v, positions=positions, cu_seqlens=cu_seqlens, window=window)
    assert len(varlen_calls) == 1
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_one_query_and_plain_rows_need_no_variable_length(varlen_calls):
    dense_attention(*random_qkv(2, 1, 40, 4, 2, 8), positions=torch.tensor([[39], [32]]))
    dense_attention(*random_qkv(2, 40, 40, 4, 2, 8))
    assert not varlen_calls


def test_bounds_of_queries_and_keys():
    """Row 0 goes on with a document that began 2 keys before it, row 1 begins one; each has earlier keys that nobody reads."""
    bounds = cu_seqlens_from_positions(torch.tensor([[2, 3, 0], [0, 1, 2]]), 7)
    assert bounds.dtype == torch.int32 and bounds.shape == (2, 17)
    assert bounds[:, :6].tolist() == [[0, 0, 2, 3, 3, 6], [0, 2, 6, 7, 11, 14]]
    assert bounds[:, 6:].unique(dim=1).tolist() == [[6], [14]]


def test_positions_that_lie_stay_within_their_row():
    bounds = cu_seqlens_from_positions(torch.tensor([[0, 1, 2], [9, 10, 11]]), 7)
    assert bounds[:, :5].tolist() == [[0, 0, 3, 3, 6], [0, 4, 7, 7, 14]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("small_chunks", [False, True])
def test_dense_attention(monkeypatch, layout, window, small_chunks):
    queries, keys, positions = LAYOUTS[layout]
    if small_chunks:
        monkeypatch.setattr(dense, "MASK_ELEMENTS", 300)
    q, k, v = random_qkv(2, queries, keys, 4, 2, 8)
    out = dense_attention(q, k, v, positions=positions, window=window)
    _, _, weights = attention_oracle(q, k, v, positions=positions)
    if window is not None:
        column = torch.arange(keys)
        near = column > (column[keys - queries :, None] - window)
        weights = weights * near
        weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_window_is_cut_in_chunks_of_keys(monkeypatch):
    seen = []
    real = dense.scaled_dot_product_attention
    monkeypatch.setattr(dense, "scaled_dot_product_attention", lambda *a, **kw: seen.append(a[1].shape[2]) or real(*a, **kw))
    q, k, v = random_qkv(1, 1500, 1500, 2, 1, 4, dtype=torch.float32)
    dense_attention(q, k, v, window=100)
    assert max(seen) <= 256 + 100


def test_wrong_window_is_one_line():
    with pytest.raises(UserError, match="window = 0"):
        dense_attention(*random_qkv(1, 4, 4, 2, 1, 4), window=0)


def test_bounds_that_do_not_fit_are_one_line():
    bounds = cu_seqlens_from_positions(torch.arange(3)[None], 4)
    with pytest.raises(UserError, match="two go beside positions"):
        dense_attention(*random_qkv(1, 3, 4, 2, 1, 4), cu_seqlens=bounds)
    with pytest.raises(UserError, match="one dimension is for T = S"):
        dense_attention(*random_qkv(1, 3, 4, 2, 1, 4), cu_seqlens=bounds[0], positions=torch.arange(3)[None])
