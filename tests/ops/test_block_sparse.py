"""block_sparse_attention against the literal masked softmax in fp64."""

import itertools

import pytest
import torch

from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, compressed_attention, dense_attention, select_blocks
from ssa.ops.reference import block_sparse as reference
from ssa.testing import (
    LargestTensor,
    assert_near_exact,
    attention_oracle,
    document_positions,
    poisoned_empty,
    random_qkv,
)

# (B, T, S, H, K, D, block size, k): every value of the architecture's table appears, in combinations that stay small
SHAPES = [
    (1, 1, 1, 1, 1, 64, 16, 1),
    (3, 15, 15, 2, 2, 64, 16, 4),
    (1, 16, 16, 4, 2, 96, 16, 16),
    (1, 17, 17, 6, 2, 64, 16, 1),
    (3, 63, 63, 4, 1, 64, 16, 4),
    (1, 111, 111, 8, 1, 128, 32, 4),
    (1, 128, 128, 16, 1, 64, 64, 1),
    (1, 300, 300, 2, 1, 64, 128, 16),
    (1, 1000, 1000, 3, 3, 64, 16, 4),
    (3, 1, 111, 16, 2, 64, 16, 4),
    (1, 17, 128, 6, 2, 96, 32, 16),
    (1, 5, 1000, 3, 1, 64, 64, 4),
]
LONG = [(1, 4096, 4096, 4, 1, 64, 16, 16), (1, 4096, 4096, 4, 2, 64, 64, 4)]


def chosen(q, k, block_size, num_selected, scope="group", **kwargs):
    return select_blocks(q.detach(), k.detach(), Selection(num_selected, block_size, scope=scope), **kwargs)[0]


def check(shape, dtype, positions=None, scope="group", bias=False):
    batch, queries, keys, heads, kv_heads, size, block_size, num_selected = shape
    exact_in = random_qkv(batch, queries, keys, heads, kv_heads, size, seed=sum(shape))
    per_key = torch.randn(batch, keys, kv_heads, dtype=torch.float64, requires_grad=True) if bias else None
    low_in = [x.detach().to(dtype).requires_grad_() for x in exact_in]
    # the yardstick starts from the rounded inputs: rounding them is not the operation's error
    exact_in = [x.detach().double().requires_grad_() for x in low_in]
    index = chosen(low_in[0], low_in[1], block_size, num_selected, positions=positions, scope=scope)
    weight = torch.randn(exact_in[0].shape, dtype=torch.float64)

    def grads(out, inputs):
        leaves = [*inputs, per_key] if bias else inputs
        return torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)

    exact, exact_lse, _ = attention_oracle(*exact_in, index, block_size=block_size, positions=positions, bias=per_key)
    eager, _, _ = attention_oracle(*low_in, index, block_size=block_size, positions=positions, bias=per_key)
    with poisoned_empty():
        out, lse = block_sparse_attention(*low_in, index, block_size=block_size, positions=positions, bias=per_key)
        actual_grads = grads(out, low_in)
    assert_near_exact(out, eager, exact, 2, "out")
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for name, actual, low, high in zip(
        ("dq", "dk", "dv", "dbias"), actual_grads, grads(eager, low_in), grads(exact, exact_in), strict=False
    ):
        assert_near_exact(actual, low, high, 3, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype):
    check(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_forward_and_gradients_long(shape):
    check(shape, torch.float32)


@pytest.mark.parametrize("scope", ["group", "head"])
def test_documents_bias_and_scope(scope):
    lengths = [1, 1, 17, 64, 3, 25]
    check((2, 111, 111, 6, 2, 64, 16, 2), torch.float64, document_positions(lengths, 2), scope, bias=True)


def test_gradcheck_through_out_and_lse():
    q, k, v = random_qkv(1, 9, 13, 4, 2, 4)
    bias = torch.randn(1, 13, 2, dtype=torch.float64, requires_grad=True)
    index = chosen(q, k, 4, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: block_sparse_attention(q, k, v, index, block_size=4, bias=bias), (q, k, v, bias)
    )


@pytest.mark.parametrize("positions", [None, document_positions([5, 1, 40, 18])], ids=["plain", "packed"])
def test_every_block_selected_equals_dense(positions):
    q, k, v = random_qkv(1, 64, 64, 4, 2, 16)
    index = chosen(q, k, 8, 8, positions=positions)
    out, _ = block_sparse_attention(q, k, v, index, block_size=8, positions=positions)
    torch.testing.assert_close(out, dense_attention(q, k, v, positions=positions))


def test_packed_equals_separate_documents():
    lengths = [1, 33, 16, 50]
    q, k, v = random_qkv(1, 100, 100, 4, 2, 16)
    cu_seqlens = torch.tensor([0, 1, 34, 50, 100], dtype=torch.int32)
    index = chosen(q, k, 8, 2, cu_seqlens=cu_seqlens)
    packed, lse = block_sparse_attention(q, k, v, index, block_size=8, cu_seqlens=cu_seqlens)
    for (a, b), n in zip(itertools.pairwise(cu_seqlens), lengths, strict=True):
        alone_index = chosen(q[:, a:b], k[:, a:b], 8, 2)
        assert torch.equal(index[:, :, a:b], alone_index)
        alone, alone_lse = block_sparse_attention(q[:, a:b], k[:, a:b], v[:, a:b], alone_index, block_size=8)
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, a:b], alone_lse, rtol=1e-12, atol=1e-12)
        assert n == b - a


def test_dropped_keys_get_exactly_zero_gradient():
    q, k, v = random_qkv(1, 64, 64, 2, 1, 16)
    index = chosen(q, k, 8, 2)
    last = index[0, 0, -1].tolist()
    out, _ = block_sparse_attention(q, k, v, index, block_size=8)
    d_k, d_v = torch.autograd.grad(out[:, -1].square().sum(), (k, v))
    read = torch.zeros(64, dtype=torch.bool)
    for block in last:
        read[block * 8 : block * 8 + 8] = True
    for grad in (d_k, d_v):
        assert (grad[0, ~read] == 0).all()
        assert (grad[0, read].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("limit", [1, 1000, 10000])
def test_query_chunks_change_nothing(monkeypatch, limit):
    q, k, v = random_qkv(2, 61, 61, 4, 2, 16)
    index = chosen(q, k, 8, 3)

    def run():
        out, lse = block_sparse_attention(q, k, v, index, block_size=8)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))

    whole = run()
    monkeypatch.setattr(reference, "LOGIT_ELEMENTS", limit)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_two_backward_passes_are_bitwise_equal():
    def run():
        q, k, v = random_qkv(2, 100, 100, 4, 2, 16, dtype=torch.float32)
        index = chosen(q, k, 8, 3)
        out, _ = block_sparse_attention(q, k, v, index, block_size=8)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_batch_invariance():
    q, k, v = random_qkv(3, 70, 70, 4, 2, 16, dtype=torch.float32)
    index = chosen(q, k, 8, 3)
    together, _ = block_sparse_attention(q, k, v, index, block_size=8)
    for b in range(3):
        row = slice(b, b + 1)
        alone, _ = block_sparse_attention(q[row], k[row], v[row], index[row], block_size=8)
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_memory_grows_with_the_budget_and_not_with_the_square_of_the_length():
    queries, heads, budget = 2048, 2, 32
    q, k, v = random_qkv(1, queries, queries, heads, 1, 8, dtype=torch.float32)
    index = chosen(q, k, 8, budget // 8)
    with LargestTensor() as seen:
        out, _ = block_sparse_attention(q, k, v, index, block_size=8)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert seen.elements <= 2 * queries * heads * budget  # logits, with tiles' padding; T * S would be 32 times as many


def test_a_query_without_keys_gets_zero_and_no_nan():
    q, k, v = random_qkv(1, 4, 4, 2, 1, 8)
    index = torch.tensor([0, -1, 0, 0], dtype=torch.int32).view(1, 1, 4, 1)
    out, lse = block_sparse_attention(q, k, v, index, block_size=4)
    assert (out[:, 1] == 0).all() and (lse[:, 1] == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


def test_reads_a_strided_cache_in_place():
    q, k, v = random_qkv(2, 1, 40, 4, 2, 8)
    index = chosen(q, k, 8, 2)
    wide_k, wide_v = (torch.zeros(2, 2, 100, 8, dtype=torch.float64) for _ in range(2))
    wide_k[:, :, :40], wide_v[:, :, :40] = k.detach().transpose(1, 2), v.detach().transpose(1, 2)
    strided = [x[:, :, :40].transpose(1, 2) for x in (wide_k, wide_v)]
    out, _ = block_sparse_attention(q.detach(), *strided, index, block_size=8)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, index, block_size=8)[0], rtol=0, atol=0)


def test_autocast_leaves_the_inside_of_the_operations_alone():
    q, k, v = (x.detach() for x in random_qkv(1, 64, 64, 4, 2, 16, dtype=torch.bfloat16))

    def run():
        index = chosen(q, k, 4, 3)
        return index, *block_sparse_attention(q, k, v, index, block_size=4), *compressed_attention(q, k, v, block_size=4)

    plain = run()
    with torch.autocast(q.device.type, torch.bfloat16):
        cast = run()
    assert cast[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_what_does_not_fit_is_one_line():
    q, k, v = random_qkv(1, 8, 8, 4, 2, 8)
    index = chosen(q, k, 4, 2)
    wrong = [
        ({"q": q[:, :, :3]}, "multiple of K"),
        ({"v": v[:, :7]}, "do not fit"),
        ({"block_indices": index[:, :, :7]}, "block_indices"),
        ({"block_indices": index[:, :1]}, "chooses for 1 heads"),
        ({"bias": torch.zeros(1, 8)}, "bias"),
        ({"block_size": 0}, "block_size"),
        ({"positions": torch.arange(8)}, "positions"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens"),
        ({"positions": torch.arange(8)[None], "cu_seqlens": torch.tensor([0, 8])}, "one of them"),
        ({"impl": "fast"}, "impl"),
        ({"q": torch.cat([q, q], 1)}, "block_indices"),
    ]
    for change, words in wrong:
        args = {"q": q, "k": k, "v": v, "block_indices": index, "block_size": 4} | change
        with pytest.raises(UserError, match=words) as error:
            block_sparse_attention(**args)
        assert "\n" not in str(error.value)
