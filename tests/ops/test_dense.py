"""dense_attention against its literal definition."""

import pytest
import torch

from ssa.errors import UserError
from ssa.ops import dense, dense_attention
from ssa.ops.documents import cu_seqlens_from_positions
from ssa.testing import assert_near_exact, attention_oracle, document_positions, random_qkv, readable_keys

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


def near_keys(q, k, positions, window):
    """bool [B, H, T, S]"""
    queries, keys = q.shape[1], k.shape[1]
    column = torch.arange(keys)
    near = column > column[keys - queries :, None] - (keys if window is None else window)
    return readable_keys(q, k, positions, None, 1).expand(-1, q.shape[2], -1, -1) & near


def masked_oracle(q, k, v, bias, positions, window):
    """The weights are 0 where all keys of a query are masked."""
    seen = near_keys(q, k, positions, window)
    group = q.shape[2] // k.shape[2]
    k, v, bias = (x.repeat_interleave(group, 2) for x in (k, v, bias))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5 + bias.permute(0, 2, 1)[:, :, None].to(q.dtype)
    logits = logits.masked_fill(~seen, float("-inf"))
    none = logits.detach().amax(-1, keepdim=True) == float("-inf")
    weights = logits.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("by_varlen", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("layout", [*LAYOUTS, *PARTS])
def test_a_bias_per_key(request, layout, window, by_varlen):
    if by_varlen:
        request.getfixturevalue("varlen_calls")
    queries, keys, positions = LAYOUTS.get(layout) or (13, 40, PARTS[layout])
    q, k, v = random_qkv(2, queries, keys, 4, 2, 12)
    bias = torch.randn(2, keys, 2)
    bias[0, -6:, 1] = bias[1, 3:9] = bias[0, 0] = float("-inf")
    bias.requires_grad_()
    expected = masked_oracle(q, k, v, bias, positions, window)
    if window is None:
        oracle, lse, _ = attention_oracle(q, k, v, positions=positions, bias=bias)
        torch.testing.assert_close(expected, oracle)
        if layout in ("plain", "packed"):
            assert (lse == float("-inf")).any()  # some query reads masked keys alone
    out = dense_attention(q, k, v, positions=positions, window=window, bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v, bias)) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (grads[0][3][bias == float("-inf")] == 0).all()


@pytest.mark.parametrize("size", [16, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_keeps_its_digits(dtype, size):
    low = random_qkv(2, 30, 37, 4, 2, size, dtype=dtype)
    bias = torch.randn(2, 37, 2) + (0.0 if dtype == torch.float32 else 30.0)  # of 30 bfloat16 keeps eighths
    bias[1, 5:30, 0] = float("-inf")
    bias.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in low]
    weight = torch.randn(low[0].shape).to(dtype)
    results = []
    for inputs, attend in (
        (low, lambda *xs: dense_attention(*xs, bias=bias)),
        (low, lambda *xs: attention_oracle(*xs, bias=bias)[0]),
        (exact, lambda *xs: attention_oracle(*xs, bias=bias)[0]),
    ):
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), (*inputs, bias))])
    for name, actual, eager, gold in zip(("out", "dq", "dk", "dv", "dbias"), *results, strict=True):
        actual, eager = actual.to(dtype), eager.to(dtype)
        assert_near_exact(actual, eager, gold.double(), 2 if name == "out" else 3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_may_be_large(dtype):
    """A row is shifted by 1e4 either way, and one key stands out."""
    q, k, v = random_qkv(2, 20, 20, 2, 1, 16, dtype=dtype)
    bias = torch.randn(2, 20, 1)
    expected = dense_attention(q, k, v, bias=bias)
    shifted = bias + torch.tensor([1e4 - 10, 10 - 1e4]).view(2, 1, 1)
    out = dense_attention(q, k, v, bias=shifted)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    bias[:, 3], bias[:, 4:] = 1e4, -1e4
    bias[:, 5] = float("-inf")
    out = dense_attention(q, k, v, bias=bias.requires_grad_())
    torch.testing.assert_close(out[:, 3:], v[:, 3:4].expand(-1, 17, 2, -1), rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v, bias)))


def test_a_bias_beside_cu_seqlens_and_under_autocast():
    q, k, v = random_qkv(1, 40, 40, 4, 2, 16, dtype=torch.float32)
    bias = torch.randn(1, 40, 2) + 30.0
    bias[0, 10:14] = float("-inf")
    positions = document_positions([1, 9, 30])
    out = dense_attention(q, k, v, positions=positions, bias=bias)
    assert (out[0, 10:14] == 0).all() and (out[0, 14:].abs().amax(-1) > 0).all()
    cu_seqlens = torch.tensor([0, 1, 10, 40, 40], dtype=torch.int32)
    assert torch.equal(dense_attention(q, k, v, cu_seqlens=cu_seqlens, bias=bias), out)
    with torch.autocast(q.device.type, torch.bfloat16):
        cast = dense_attention(q, k, v, positions=positions, bias=bias)
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    assert torch.equal(cast, dense_attention(*half, positions=positions, bias=bias))
    with pytest.raises(UserError, match="bias"):
        dense_attention(q, k, v, bias=bias[:, :39])
