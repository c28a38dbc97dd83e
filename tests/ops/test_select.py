"""select_blocks: the contract of block_indices, exactness, the released rule, documents and caches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.budget import Selection
from ssa.ops import block_means, block_sparse_attention, decode_attention, dense_attention, select_blocks
from ssa.ops.reference import select as reference
from ssa.testing import LargestTensor, document_positions, random_qkv


def naive_scores(q, k, block_size, scope, scoring):
    """Scores of all blocks of one plain document, in Python loops: [R, T, N] with -inf for no candidate."""
    _, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    blocks = -(-k.shape[1] // block_size)
    offset = k.shape[1] - queries
    means = torch.stack([k[0, n * block_size : (n + 1) * block_size].mean(0) for n in range(blocks)])  # [N, K, D]
    group = heads // kv_heads
    scores = torch.full((heads, queries, blocks), float("-inf"), dtype=torch.float64)
    for t in range(queries):
        position = offset + t
        complete, own = (position + 1) // block_size, position // block_size
        for h in range(heads):
            logits = means[:, h // group] @ q[0, t, h] * size**-0.5
            value = torch.zeros(blocks, dtype=torch.float64)
            if scoring == "softmax" and complete:
                value[:complete] = logits[:complete].softmax(0)
            elif scoring == "logit":
                value = logits
            scores[h, t, :own] = value[:own]
    return scores if scope == "head" else scores.view(kv_heads, group, queries, blocks).sum(1)


@settings(deadline=None, max_examples=60)
@given(
    queries=st.integers(1, 70), cached=st.integers(0, 40), heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    block_size=st.sampled_from([1, 4, 7, 16]), count=st.integers(1, 9), scope=st.sampled_from(["group", "head"]),
    scoring=st.sampled_from(["softmax", "logit"]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_contract_and_exactness(queries, cached, heads, block_size, count, scope, scoring, seed):
    q, k, _ = random_qkv(1, queries, queries + cached, *heads, 4, seed=seed)
    index, score = select_blocks(q, k, Selection(count, block_size, scope=scope, scoring=scoring))
    expected = naive_scores(q.detach(), k.detach(), block_size, scope, scoring)
    assert index.dtype == torch.int32 and score.dtype == torch.float32
    assert index.shape == score.shape == (1, heads[0] if scope == "head" else heads[1], queries, count)
    for r in range(index.shape[1]):
        for t in range(queries):
            own = (cached + t) // block_size
            row = index[0, r, t].tolist()
            picked = [n for n in row if n >= 0]
            assert row == picked + [-1] * (count - len(picked)), "left-packed, right-padded with -1"
            assert picked == sorted(set(picked)), "ascending and unique"
            assert own in picked and picked[-1] == own, "own block present, nothing after it"
            assert len(picked) == min(count, own + 1), "all visible blocks when there are fewer than k"
            others = [n for n in range(own) if n not in picked]
            kept = [expected[r, t, n] for n in picked if n != own]
            if others and kept:  # compare scores, not indices: near-ties flip
                assert min(kept) >= max(expected[r, t, others]) - 1e-6
            for j, n in enumerate(picked):
                assert score[0, r, t, j] == float("inf") if n == own else abs(score[0, r, t, j] - expected[r, t, n]) < 1e-6
            assert (score[0, r, t, len(picked) :] == float("-inf")).all()


def test_equal_scores_go_to_the_lower_block():
    q = torch.ones(1, 64, 2, 4)
    k = torch.ones(1, 64, 1, 4)
    index, _ = select_blocks(q, k, Selection(3, 8))
    assert index[0, 0, -1].tolist() == [0, 1, 7]
    q = torch.zeros(1, 64, 2, 4)  # signed zeros must tie as well
    index, _ = select_blocks(q, torch.randn(1, 64, 1, 4), Selection(3, 8, scoring="logit"))
    assert index[0, 0, -1].tolist() == [0, 1, 7]


def test_own_complete_block_weighs_in_the_normaliser_but_is_no_candidate():
    # Of two heads one puts nearly all its mass on its own block when the block completes: its vote among the others then fades.
    size, block = 2, 2
    k = torch.tensor([[8.0, 0], [8, 0], [0, 8], [0, 8], [0, 40], [0, 40]]).view(1, 6, 1, size)
    q = torch.zeros(1, 6, 2, size)
    q[0, :, 0] = torch.tensor([0.0, 1.0])  # prefers block 1, and its own block still more
    q[0, :, 1] = torch.tensor([0.01, 0.0])  # mildly prefers block 0
    index, _ = select_blocks(q, k, Selection(2, block))
    assert index[0, 0, 4].tolist() == [1, 2]  # own block incomplete: head 0 votes for block 1 with all its mass
    assert index[0, 0, 5].tolist() == [0, 2]  # own block complete: it takes head 0's mass, head 1 decides


def released_rule(scores, own, block_size, count):
    """The half-chunk rule in words of lists: [the best half of earlier chunks] + [the best half of the last chunk]."""
    chunk = own // block_size * block_size
    best = lambda blocks, n: sorted(blocks, key=lambda b: (-scores[b], b))[:n]  # noqa: E731
    if chunk == 0 or count <= block_size // 2:
        return sorted([*best(range(own), count - 1), own])
    return sorted([*best(range(chunk), count // 2), *best(range(chunk, own), count // 2 - 1), own])


@pytest.mark.parametrize(("block_size", "count"), [(4, 4), (8, 8), (8, 4), (8, 2), (2, 2), (4, 1)])
def test_released_rule(block_size, count):
    q, k, _ = random_qkv(1, 300, 300, 2, 1, 4, seed=count)
    index, _ = select_blocks(q, k, Selection(count, block_size, rule="released"))
    scores = naive_scores(q.detach(), k.detach(), block_size, "group", "softmax")[0]
    for t in range(300):
        picked = [n for n in index[0, 0, t].tolist() if n >= 0]
        assert picked == released_rule(scores[t].tolist(), t // block_size, block_size, count)
    exact, _ = select_blocks(q, k, Selection(count, block_size))
    same = (index == exact).all(-1)[0, 0]
    if count <= block_size // 2 or count == 1:
        assert same.all()
    else:
        assert same[: block_size * block_size].all() and not same.all()


def test_released_rule_fills_fourteen_and_a_quarter_blocks_of_sixteen():
    q, k, _ = random_qkv(1, 256, 4096, 2, 1, 4)  # the last whole chunk of 16 blocks of 16 keys
    index, _ = select_blocks(q, k, Selection(16, 16, rule="released"))
    assert (index >= 0).sum(-1).double().mean().item() == 14.25


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_packed_equals_separate_documents(rule):
    lengths = [1, 40, 3, 100, 64]
    q, k, _ = random_qkv(2, sum(lengths), sum(lengths), 4, 2, 8)
    index, score = select_blocks(q, k, Selection(4, 4, rule=rule), positions=document_positions(lengths, 2))
    start = 0
    for n in lengths:
        alone, alone_score = select_blocks(q[:, start : start + n], k[:, start : start + n], Selection(4, 4, rule=rule))  # fmt: skip
        assert torch.equal(index[:, :, start : start + n], alone)
        torch.testing.assert_close(score[:, :, start : start + n], alone_score)
        start += n


@pytest.mark.parametrize("queries", [1, 5, 33])
def test_late_queries_choose_as_in_one_pass(queries):
    q, k, _ = random_qkv(2, 90, 90, 4, 2, 8)
    whole, _ = select_blocks(q, k, Selection(4, 8))
    late, _ = select_blocks(q[:, -queries:], k, Selection(4, 8))
    cached, _ = select_blocks(q[:, -queries:], k, Selection(4, 8), block_keys=block_means(k, 8))
    assert torch.equal(whole[:, :, -queries:], late)
    assert torch.equal(late, cached)


@pytest.mark.parametrize("queries", [1, 7, 40])
def test_left_padding_shifts_nothing(queries):
    q, k, _ = random_qkv(1, 40, 40, 4, 2, 8)
    alone, _ = select_blocks(q[:, -queries:], k, Selection(3, 8))
    padded_q, padded_k = (torch.cat([torch.full_like(x[:, :13], 7.0), x], 1) for x in (q, k))
    positions = torch.cat([torch.zeros(13, dtype=torch.int64), torch.arange(40)])[None, -queries:]
    padded, _ = select_blocks(padded_q[:, -queries:], padded_k, Selection(3, 8), positions=positions)
    assert torch.equal(alone, padded)


@pytest.mark.parametrize("limit", [1, 3000])
def test_query_chunks_change_nothing(monkeypatch, limit):
    q, k, _ = random_qkv(2, 70, 70, 4, 2, 8)
    whole = select_blocks(q, k, Selection(4, 4))
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", limit)
    for a, b in zip(select_blocks(q, k, Selection(4, 4)), whole, strict=True):
        assert torch.equal(a, b)


HUGE = [(100_000, 16), (999_999_999, 16), (10**20, 1), (1, 999_999_999), (16, 100_000), (10**9, 10**9)]


@pytest.mark.parametrize("positions", [None, document_positions([50, 7, 33])], ids=["plain", "packed"])
@pytest.mark.parametrize(("count", "block_size"), HUGE)
def test_a_budget_beyond_the_row_reads_all_of_it_at_its_cost(count, block_size, positions):
    q, k, v = random_qkv(1, 90, 90, 4, 2, 8)

    def run(count, block_size):
        with LargestTensor() as seen:
            index, _ = select_blocks(q, k, Selection(count, block_size), positions=positions)
            out, _ = block_sparse_attention(q, k, v, index, block_size=block_size, positions=positions)
            gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        return [out, *gradients], index, seen.elements

    results, index, elements = run(count, block_size)
    blocks, longest = -(-90 // block_size), 90 if positions is None else 50
    assert index.shape == (1, 2, 90, blocks) and index.max() == (longest - 1) // block_size
    assert elements <= run(blocks, min(block_size, 1024))[2]
    dense = dense_attention(q, k, v, positions=positions)
    for a, b in zip(results, [dense, *torch.autograd.grad(dense.square().sum(), (q, k, v))], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("count", "rule"), [(100_000, "exact"), (1 << 20, "released")])
def test_kernels_take_a_budget_beyond_the_row(count, rule):
    pytest.importorskip("triton")
    if torch.cuda.is_available() and torch.get_default_device().type != "cuda":
        pytest.skip("with a GPU at hand the kernels are tested there: SSA_TEST_DEVICE=cuda")
    q, k, v = (x.detach() for x in random_qkv(1, 4, 90, 2, 1, 16, dtype=torch.float32))
    block_size = 16 if rule == "exact" else 1 << 20
    selection = Selection(count, block_size, rule=rule)
    index, _ = select_blocks(q, k, selection, impl="triton")
    assert index.shape[3] == (8 if rule == "exact" else 1)
    means = block_means(k, 16)
    outs = [
        block_sparse_attention(q, k, v, index, block_size=block_size, impl="triton")[0],
        decode_attention(q, k, v, means, torch.tensor([90]), selection, impl="triton")[0],
    ]
    for out in outs:
        torch.testing.assert_close(out, dense_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 1 << 15)
    q, k, _ = random_qkv(1, 2048, 2048, 2, 1, 8, dtype=torch.float32)
    with LargestTensor() as seen:
        select_blocks(q, k, Selection(4, 4), impl="reference")
    assert seen.elements <= 1 << 16  # T * N would be 1 << 20


def test_no_gradient_flows_through_selection():
    q, k, _ = random_qkv(1, 20, 20, 2, 1, 4)
    _, score = select_blocks(q, k, Selection(2, 4))
    assert not score.requires_grad


def test_block_means_are_means_of_complete_blocks_and_differentiable():
    _, k, _ = random_qkv(1, 11, 11, 2, 2, 4)
    means = block_means(k, 4)
    assert means.shape == (1, 2, 2, 4)
    torch.testing.assert_close(means[0, 1], k[0, 4:8].mean(0))
    (grad,) = torch.autograd.grad(means.sum(), k)
    assert (grad[0, :8] == 0.25).all() and (grad[0, 8:] == 0).all()
