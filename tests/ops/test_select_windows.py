"""Selection by windows of keys and by importance: the formulas row by row, documents, limits; the Triton kernels against the reference (on the
CPU by Triton's interpreter, or on the GPU named by SSA_TEST_DEVICE)."""

import pytest
import torch

from marks import needs_gpu, needs_triton, windows
from ssa.budget import COARSER, Selection
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, dense_attention, select_blocks
from ssa.ops.reference import select_windows as reference
from ssa.ops.windows import block_importance, window_means
from ssa.testing import LargestTensor, document_positions, poisoned_empty, random_qkv

INF = float("inf")


def complete(x, i, size, stride):
    """Means of the windows of x [S, ...] that end at or before token i, [W, ...]."""
    x = x[: i + 1]
    return x.unfold(0, size, stride).mean(-1) if len(x) >= size else x[:0]


def chosen_by_hand(q_HD, k_SKD, bias_SK, i, selection):
    """The blocks that query i of a document reads, a list for each selector: from the formulas, window by window and block by block."""
    size, stride, block = selection.mean_size, selection.mean_stride, selection.block_size
    heads, kv_heads, scale, own = len(q_HD), k_SKD.shape[1], q_HD.shape[1] ** -0.5, i // block
    means = complete(k_SKD, i, size, stride)
    normaliser = complete(k_SKD, i, COARSER * size, COARSER * stride) if selection.lse == "coarse" else means
    normaliser = normaliser if len(normaliser) else means
    votes = []
    for h in range(heads):
        logits, against = (x[:, h * kv_heads // heads] @ q_HD[h] * scale for x in (means, normaliser))
        votes.append(logits if selection.scoring == "logit" else (logits - against.logsumexp(0)).exp())
    votes_RW = torch.stack(votes)
    if selection.scope == "group":
        votes_RW = votes_RW.view(kv_heads, heads // kv_heads, len(means)).sum(1)
    worth_RW = complete(bias_SK, i, size, stride).T.repeat_interleave(len(votes_RW) // kv_heads, 0)

    def best(values, among, count):
        """Each block by the best of the windows that touch it; ties to the lower."""
        touched = {
            n: max(v for j, v in enumerate(values) if j * stride < (n + 1) * block and j * stride + size > n * block)
            for n in among
        }
        return sorted(among, key=lambda n: (-touched[n], n))[:count]

    forced = [
        n for n in range(own + 1) if n < selection.sink_blocks or n >= own - selection.local_blocks or i < selection.dense_length
    ]
    free = selection.num_selected_blocks - selection.sink_blocks - selection.local_blocks - 1
    by_query = free if selection.query_blocks is None else selection.query_blocks
    rows = []
    for votes_W, worth_W in zip(votes_RW.float().tolist(), worth_RW.float().tolist(), strict=True):
        left = [n for n in range(own + 1) if n not in forced]
        taken = best(votes_W, left, by_query)
        taken += best(worth_W, [n for n in left if n not in taken], free - by_query)
        rows.append(sorted(forced + taken))
    return rows


def listed(index, b, t):
    """The rows of block_indices of query t, without padding."""
    return [[n for n in row if n >= 0] for row in index[b, :, t].tolist()]


def tensors(batch, tokens, heads, kv_heads, size=8, *, keys=None, dtype=torch.float64, seed=0):
    q, k, v = (x.detach() for x in random_qkv(batch, tokens, keys or tokens, heads, kv_heads, size, seed=seed, dtype=dtype))
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    bias = torch.randn(*k.shape[:3], generator=generator, dtype=torch.float64, device="cpu")
    return q, k, v, bias.to(k.device, torch.promote_types(dtype, torch.float32))


SELECTIONS = {
    "windows": windows(5, 8, 4, 2),
    "windows and importance": windows(7, 8, 4, 2, 1, 2, 2),
    "importance alone": windows(6, 8, 4, 2, 1, 1, 0),
    "windows longer than a block": windows(6, 8, 16, 8, 1, 1, 1),
    "windows of a block, no more": windows(5, 8, 8, 8, 0, 0, 2),
    "many sinks": windows(7, 8, 8, 4, 3, 1, 1),
    "short blocks": windows(8, 4, 2, 1, 1, 2, 3),
    "dense at first": windows(5, 8, 4, 2, 1, 1, 1, dense_length=61),
    "coarse normaliser": windows(6, 8, 4, 2, 1, 1, 2, lse="coarse"),
    "logits": windows(5, 8, 4, 2, 1, 1, 1, scoring="logit"),
    "heads choose": windows(6, 8, 4, 2, 1, 1, 2, scope="head"),
    "heads choose by logits": windows(5, 8, 4, 2, scope="head", scoring="logit"),
}
DOCUMENTS = [7, 1, 33, 79]
ROWS = [0, 1, 3, 4, 7, 8, 15, 16, 40, 41, 60, 61, 62, 79, 80, 95, 96, 111, 118, 119]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_row_is_the_formulas(name, group):
    selection = SELECTIONS[name]
    q, k, _, bias = tensors(1, sum(DOCUMENTS), 2 * group, 2, seed=group)
    index, score = select_blocks(q, k, selection, bias=bias)
    positions = document_positions(DOCUMENTS)
    packed, _ = select_blocks(q, k, selection, bias=bias, positions=positions)
    assert index.dtype == torch.int32 and score.dtype == torch.float32 and index.shape[3] == selection.places == score.shape[3]
    q, k, bias, number = (x[0].cpu() for x in (q, k, bias, positions))
    for t in ROWS:
        assert listed(index, 0, t) == chosen_by_hand(q[t], k, bias, t, selection), t
        i = int(number[t])
        assert listed(packed, 0, t) == chosen_by_hand(q[t], k[t - i :], bias[t - i :], i, selection), f"{t} of packed documents"


@pytest.mark.parametrize("name", SELECTIONS)
def test_places_and_scores_of_forced_blocks_and_of_padding(name):
    selection = SELECTIONS[name]
    q, k, _, bias = tensors(1, 120, 4, 2)
    index, score = select_blocks(q, k, selection, bias=bias)
    position = torch.arange(120)[:, None]
    own, there = position // selection.block_size, index >= 0
    forced = (index < selection.sink_blocks) | (index >= own - selection.local_blocks) | (position < selection.dense_length)
    assert (score[there & forced] == INF).all() and (score[~there] == -INF).all() and torch.isfinite(score[there & ~forced]).all()
    assert (there[..., 1:] <= there[..., :-1]).all() and ((index[..., 1:] > index[..., :-1]) | ~there[..., 1:]).all()
    read = torch.where(position < selection.dense_length, own + 1, (own + 1).clamp(max=selection.num_selected_blocks))
    assert (there.sum(-1) == read.T).all()


@pytest.mark.parametrize("name", SELECTIONS)
def test_packed_equals_separate_documents(name):
    lengths = [1, 33, 7, 1, 80, 33]
    q, k, _, bias = tensors(2, sum(lengths), 4, 2)
    selection, start = SELECTIONS[name], 0
    index, score = select_blocks(q, k, selection, bias=bias, positions=document_positions(lengths, 2))
    for n in lengths:
        cut = slice(start, start + n)
        alone, alone_score = select_blocks(q[:, cut], k[:, cut], selection, bias=bias[:, cut])
        assert torch.equal(index[:, :, cut], alone)
        torch.testing.assert_close(score[:, :, cut], alone_score)
        start += n
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    by_starts, _ = select_blocks(q[:1], k[:1], selection, bias=bias[:1], cu_seqlens=cu_seqlens)
    assert torch.equal(by_starts, index[:1])


def kept_of(k, bias, selection):
    """What a cache keeps of plain rows: means, coarse means, importance."""
    size, stride, block = selection.mean_size, selection.mean_stride, selection.block_size
    importance = block_importance(window_means(bias[..., None], size, stride)[..., 0], block // stride, size // stride - 1)
    return {
        "block_keys": window_means(k, size, stride),
        "coarse_keys": window_means(k, COARSER * size, COARSER * stride),
        "importance": importance,
    }


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("chunk", [1, 17, 64])
def test_chunks_of_a_row_choose_as_the_whole(name, chunk):
    """Nothing that a later token brings changes what a query has chosen."""
    q, k, _, bias = tensors(2, 120, 4, 2)
    selection = SELECTIONS[name]
    whole, score = select_blocks(q, k, selection, bias=bias)
    for stop in {chunk, 64 + chunk % 64 // 2, 120}:
        cut = slice(max(0, stop - chunk), stop)
        for given in ({"bias": bias[:, :stop]}, kept_of(k[:, :stop], bias[:, :stop], selection)):
            late, late_score = select_blocks(q[:, cut], k[:, :stop], selection, **given)
            assert torch.equal(late, whole[:, :, cut])
            torch.testing.assert_close(late_score, score[:, :, cut])


@pytest.mark.parametrize("name", ["windows and importance", "coarse normaliser", "heads choose"])
@pytest.mark.parametrize("queries", [1, 40])
def test_left_padding_shifts_nothing(name, queries):
    q, k, _, bias = tensors(1, 70, 4, 2)
    selection = SELECTIONS[name]
    alone, _ = select_blocks(q[:, -queries:], k, selection, bias=bias)
    q, k, bias = (torch.cat([torch.full_like(x[:, :13], 7.0), x], 1) for x in (q, k, bias))
    positions = torch.cat([torch.zeros(13, dtype=torch.int64), torch.arange(70)])[None, -queries:]
    assert torch.equal(select_blocks(q[:, -queries:], k, selection, bias=bias, positions=positions)[0], alone)


@pytest.mark.parametrize("positions", [None, document_positions([50, 7, 33], 2)], ids=["plain", "packed"])
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("scoring", ["softmax", "logit"])
def test_means_are_windows_of_a_block(positions, scope, scoring):
    q, k, _, _ = tensors(2, 90, 4, 2)
    by_means = select_blocks(q, k, Selection(4, 8, scope, scoring), positions=positions)
    by_windows = select_blocks(q, k, windows(4, 8, 8, 8, 0, 0, scope=scope, scoring=scoring), positions=positions)
    assert torch.equal(by_means[0], by_windows[0])
    torch.testing.assert_close(by_means[1], by_windows[1])


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_ties_go_to_the_lower_block(impl):
    q, k, _, bias = tensors(1, 80, 2, 1, 16, dtype=torch.float32)
    last = slice(-1, None)
    equal = {"impl": impl, "bias": torch.ones_like(bias)}
    for selection, wanted in (
        (windows(5, 8, 4, 2), [0, 1, 2, 8, 9]),
        (windows(6, 8, 4, 2, 1, 1, 2), [0, 1, 2, 3, 8, 9]),
        (windows(6, 8, 4, 2, 0, 2, 1), [0, 1, 2, 7, 8, 9]),
    ):
        for scoring in ("softmax", "logit"):
            selection = Selection(**(vars(selection) | {"scoring": scoring}))
            assert select_blocks(q[:, last], torch.ones_like(k), selection, **equal)[0][0, 0, 0].tolist() == wanted
            zeros = torch.zeros_like(q[:, last])  # signed zeros must tie as well
            assert select_blocks(zeros, k, selection, **equal)[0][0, 0, 0].tolist() == wanted


def test_importance_ranks_what_no_query_can_change():
    """With no block by query the choice is the importance's: the same for all queries of a block, whatever they ask."""
    q, k, _, bias = tensors(1, 120, 4, 2)
    selection = SELECTIONS["importance alone"]
    index, _ = select_blocks(q, k, selection, bias=bias)
    other, _ = select_blocks(-3 * q.flip(1), k.flip(1), selection, bias=bias)
    assert torch.equal(index, other) and torch.equal(index[:, :, 112:113].expand(-1, -1, 8, -1), index[:, :, 112:])
    bias[0, 20, 0] = 100.0  # in block 2, for one kv head
    index, _ = select_blocks(q, k, selection, bias=bias)
    assert (index[0, 0, 60:] == 2).any(-1).all()


def test_a_window_across_two_blocks_counts_for_both():
    """Windows of 8 keys every 4, blocks of 8: the one from token 20 on touches blocks 2 and 3."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 80, 1, 4)
    q[..., 0], k[0, 20:28, 0, 0] = 10.0, 10.0
    index, score = select_blocks(q, k, windows(6, 8, 8, 4))
    assert index[0, 0, 0].tolist() == [0, 1, 2, 3, 8, 9] and score[0, 0, 0, 2] == score[0, 0, 0, 3] > score[0, 0, 0, 1]
    bias = torch.zeros(1, 80, 1)
    bias[0, 20:28] = 1.0
    index, score = select_blocks(torch.zeros_like(q), k, windows(5, 8, 8, 4, by_query=0), bias=bias)
    assert index[0, 0, 0].tolist() == [0, 2, 3, 8, 9] and score[0, 0, 0, 1:3].tolist() == [1.0, 1.0]


def test_coarse_normaliser_weighs_heads_otherwise():
    """It changes how much each head's vote counts, and with one head in a group nothing but the scale."""
    q, k, _, _ = tensors(1, 120, 8, 2)
    exact, coarse = (windows(5, 8, 4, 2, lse=lse) for lse in ("exact", "coarse"))
    a, b = (select_blocks(3 * q, k, selection)[0] for selection in (exact, coarse))
    same = (a == b).all(-1)
    assert same[:, :, :15].all(), "no coarse window is complete before token 15"
    assert 0.5 < same.double().mean() < 1.0
    a, b = (select_blocks(3 * q[:, :, :2], k, selection)[0] for selection in (exact, coarse))
    assert torch.equal(a, b)


def test_a_dense_length_is_by_position():
    q, k, v, bias = tensors(1, 120, 4, 2)
    sparse, dense = (windows(5, 8, 4, 2, 1, 1, 1, dense_length=n) for n in (0, 61))
    index, _ = select_blocks(q, k, dense, bias=bias)
    other, _ = select_blocks(q, k, sparse, bias=bias)
    assert dense.places == 8 and torch.equal(index[:, :, 61:, :5], other[:, :, 61:]) and (index[:, :, 61:, 5:] == -1).all()
    out, _ = block_sparse_attention(q, k, v, index, block_size=8, bias=bias)
    whole = dense_attention(q, k, v, bias=bias)
    torch.testing.assert_close(out[:, :61], whole[:, :61])
    assert not torch.allclose(out[:, 61:], whole[:, 61:])


@pytest.mark.parametrize("positions", [None, document_positions([50, 7, 33])], ids=["plain", "packed"])
@pytest.mark.parametrize("count", [12, 100, 10**9, 10**20])
def test_a_budget_beyond_the_row_reads_all_of_it_at_its_cost(count, positions):
    q, k, v, bias = tensors(1, 90, 4, 2)
    blocks, largest = [], []
    for n in (12, count):
        with LargestTensor() as seen:
            index, _ = select_blocks(q, k, windows(n, 8, 4, 2, 1, 1, 2), bias=bias, positions=positions)
        blocks.append(index), largest.append(seen.elements)
    assert blocks[1].shape[3] == 12 and torch.equal(*blocks) and largest[1] <= largest[0]
    out, _ = block_sparse_attention(q, k, v, blocks[1], block_size=8, bias=bias, positions=positions)
    torch.testing.assert_close(out, dense_attention(q, k, v, bias=bias, positions=positions))


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_fault_12_rows_shorter_than_a_window_or_the_budget(impl, tokens):
    q, k, _, bias = tensors(2, tokens, 6, 2, 16, dtype=torch.float32)
    for selection in (windows(9, 64, 32, 16, 1, 2, 1), windows(7, 2, 4, 2, 1, 1, 1), windows(7, 2, 2, 1, 1, 1, lse="coarse")):
        for positions in (None, torch.zeros(2, tokens, dtype=torch.int64)):
            index, _ = select_blocks(q, k, selection, bias=bias, positions=positions, impl=impl)
            for t in range(tokens):
                own = 0 if positions is not None else t // selection.block_size
                assert listed(index, 0, t) == listed(index, 1, t) == [list(range(own + 1))] * 2


def test_fault_13_a_window_counts_as_soon_as_it_is_complete():
    """The query in a window's last token is the first to see it: what normalises its scores is one window more."""
    q, k, _, _ = tensors(1, 60, 1, 1)
    k[0, 51] = 80 * q[0, 51, 0]  # of the windows that are complete by then, only the one from 44 on has it; it takes all mass
    _, score = select_blocks(q[:, 51:52].expand(1, 60, 1, 8), k, windows(4, 8, 8, 4))
    assert score[0, 0, 50, 1] > 1e-6 > score[0, 0, 51, 1] and score[0, 0, 49, 1] > 1e-6


def test_fault_11_numbers_of_blocks_are_options():
    """So many blocks go by query as the selection says, wherever it says so."""
    q, k, _, bias = tensors(1, 120, 4, 2)
    first, _ = select_blocks(q, k, windows(9, 8, 4, 2, by_query=0), bias=bias)
    base = set(listed(first, 0, 119)[0])
    for n in range(1, 7):
        index, _ = select_blocks(q, k, windows(9, 8, 4, 2, by_query=n), bias=bias)
        best = set(listed(select_blocks(q, k, windows(3 + n, 8, 4, 2))[0], 0, 119)[0])
        row = set(listed(index, 0, 119)[0])
        assert best <= row and len(row) == 9 and len(base - row) <= n


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_bounded_by_tokens_and_the_chunk(monkeypatch, packed):
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 1 << 15)
    q, k, _, bias = tensors(1, 2048, 2, 1, 8, dtype=torch.float32)
    positions = document_positions([1000, 1, 1047]) if packed else None
    with LargestTensor() as seen:
        select_blocks(q, k, windows(6, 8, 4, 2, by_query=1, lse="coarse"), bias=bias, positions=positions, impl="reference")
    assert seen.elements <= 1 << 16  # T * W would be 1 << 21


@pytest.mark.parametrize("limit", [1, 3000])
def test_query_chunks_change_nothing(monkeypatch, limit):
    q, k, _, bias = tensors(2, 70, 4, 2)
    selection = SELECTIONS["coarse normaliser"]
    whole = select_blocks(q, k, selection, bias=bias)
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", limit)
    for a, b in zip(select_blocks(q, k, selection, bias=bias), whole, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_flows_and_autocast_does_not_reach_in():
    q, k, _ = random_qkv(1, 60, 60, 4, 2, 8, dtype=torch.float32)
    bias = torch.randn(1, 60, 2, requires_grad=True)
    index, score = select_blocks(q, k, SELECTIONS["coarse normaliser"], bias=bias, impl="reference")
    assert not score.requires_grad
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        again = select_blocks(q, k, SELECTIONS["coarse normaliser"], bias=bias, impl="reference")
    assert torch.equal(index, again[0]) and torch.equal(score, again[1])


OK = dict(num_selected_blocks=9, block_size=16, mean_size=8, mean_stride=4, sink_blocks=1, local_blocks=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_size": -1}, "mean_size = -1 must not be negative"),
        ({"mean_stride": 0}, "mean_stride = 0 must divide"),
        ({"mean_stride": 3}, "mean_stride = 3 must divide mean_size = 8 and block_size = 16"),
        ({"mean_size": 6}, "mean_stride = 4 must divide mean_size = 6"),
        ({"block_size": 12}, "in 1, 2, 4, ... or 64 parts"),
        ({"block_size": 512}, "in 1, 2, 4, ... or 64 parts"),
        ({"mean_size": 24}, "mean_size = 24: a window that starts in a block may end in the next, not beyond it; at most 20"),
        ({"local_blocks": 0}, "local_blocks = 0: windows of 8 keys, one every 4, need at least 1"),
        ({"sink_blocks": -2}, "sink_blocks = -2 must not be negative"),
        ({"query_blocks": -1}, "query_blocks = -1 must not be negative"),
        ({"dense_length": -5}, "dense_length = -5 must not be negative"),
        ({"lse": "fine"}, "lse = 'fine' is not one of exact, coarse"),
        ({"rule": "released", "num_selected_blocks": 8}, "'released' knows no windows"),
        ({"num_selected_blocks": 3}, "budget 3x16 is less than what is always read: 1 sinks .* give at least 4x16"),
        ({"num_selected_blocks": 6, "query_blocks": 3}, r"\+ 3 by query .* give at least 7x16"),
        ({"mean_size": 0}, "need mean_size and mean_stride"),
        ({"mean_size": 0, "mean_stride": 0, "local_blocks": 0}, "need mean_size and mean_stride"),
    ],
)
def test_selections_that_cannot_be_made(change, message):
    Selection(**OK)
    with pytest.raises(UserError, match=message) as error:
        Selection(**(OK | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fits", [{"num_selected_blocks": 4}, {"num_selected_blocks": 7, "query_blocks": 3}, {"mean_size": 20}])
def test_the_least_that_can_be_made(fits):
    q, k, _, bias = tensors(1, 200, 2, 1)
    assert (select_blocks(q, k, Selection(**(OK | fits)), bias=bias)[0] >= 0).any(-1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "query_blocks choose the other blocks by importance: pass bias or importance"),
        ({"block_keys": torch.zeros(1, 13, 2, 8)}, r"block_keys \(1, 13, 2, 8\) .* each of 14 blocks or windows"),
        ({"coarse_keys": torch.zeros(1, 1, 2, 8)}, r"coarse_keys .* each of 2 blocks or windows"),
        ({"q": torch.zeros(1, 60, 3, 8)}, "do not fit"),
        ({"scale": 0.0}, "scale = 0.0 must be positive"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
    ],
)
def test_calls_that_do_not_fit(change, message):
    q, k, _, bias = tensors(1, 60, 4, 2)
    call = dict(q=q, k=k, selection=windows(7, 16, 8, 4, 1, 2, 1, lse="coarse"), bias=bias)
    select_blocks(**call)
    with pytest.raises(UserError, match=message) as error:
        select_blocks(**(call | change))
    assert "\n" not in str(error.value)


def check_kernels(q, k, selection, **options):
    expected, expected_score = select_blocks(q, k, selection, impl="reference", **options)
    with poisoned_empty():
        index, score = select_blocks(q, k, selection, impl="triton", **options)
    assert index.dtype == torch.int32 and index.shape[3] >= expected.shape[3]  # of many places, rounded up
    assert (index[..., expected.shape[3] :] == -1).all() and (score[..., expected.shape[3] :] == -INF).all()
    index, score = (x[..., : expected.shape[3]] for x in (index, score))
    assert torch.equal(index < 0, expected < 0) and torch.equal(score.isfinite(), expected_score.isfinite())
    same = (index == expected).all(-1)  # near-ties flip
    assert same.double().mean() > 0.98
    torch.testing.assert_close(score[same], expected_score[same], rtol=1e-4, atol=1e-5)
    if selection.query_blocks is None:  # where the query alone decides, what flipped is as good
        torch.testing.assert_close(score.sort(-1).values, expected_score.sort(-1).values, rtol=1e-4, atol=1e-5)


PACKED = document_positions([7, 1, 33, 19])
# batch, T, S, heads, kv heads, head size, selection, positions
KERNELS = {
    "windows": (1, 60, 60, 4, 2, 16, windows(5, 8, 4, 2), None),
    "late queries, odd group and head size": (2, 9, 70, 6, 2, 24, windows(7, 8, 4, 2, 1, 2, 2), None),
    "importance alone": (1, 8, 70, 2, 1, 16, windows(6, 8, 4, 2, 1, 1, 0), None),
    "windows longer than a block": (1, 20, 70, 2, 2, 16, windows(6, 8, 16, 8, 1, 1, 1), None),
    "windows of a block": (1, 10, 70, 3, 3, 16, windows(5, 8, 8, 8, 0, 0, 2), None),
    "dense at first": (1, 60, 60, 2, 1, 16, windows(4, 8, 4, 2, dense_length=37), None),
    "coarse normaliser": (1, 70, 70, 4, 1, 16, windows(5, 4, 2, 1, 1, 1, 1, lse="coarse"), None),
    "logits": (1, 10, 70, 4, 2, 16, windows(5, 8, 4, 2, scoring="logit"), None),
    "heads choose": (1, 10, 70, 4, 2, 16, windows(6, 8, 4, 2, 1, 1, 2, scope="head"), None),
    "documents": (1, 60, 60, 4, 2, 16, windows(6, 4, 4, 2, 1, 1, 1), PACKED),
    "documents, late queries": (1, 20, 60, 2, 1, 16, windows(5, 4, 4, 2, 1, 1, 1), PACKED[:, -20:]),
    "coarse normaliser, a tile of windows and their next": (
        1,
        5,
        262,
        2,
        1,
        16,
        windows(5, 4, 2, 1, 1, 1, 1, lse="coarse"),
        None,
    ),
    "documents, coarse normaliser": (1, 60, 60, 3, 1, 16, windows(5, 4, 2, 1, 1, 1, lse="coarse"), PACKED),
    "left padding": (2, 5, 70, 2, 1, 16, windows(5, 4, 4, 2, 1, 1, 1), torch.arange(65, 70) - torch.tensor([[0], [37]])),
    "many windows": (1, 3, 400, 2, 1, 16, windows(6, 2, 2, 1, 1, 1, 1), None),
    "more places than there are blocks": (1, 5, 70, 2, 1, 16, windows(40, 8, 4, 2, 1, 1, 1), None),
    "half precision": (1, 12, 70, 4, 2, 16, windows(6, 8, 4, 2, 1, 1, 2), None),
}


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_the_reference(name):
    batch, queries, keys, heads, kv_heads, size, selection, positions = KERNELS[name]
    dtype = torch.float16 if name == "half precision" else torch.float32
    q, k, _, bias = tensors(batch, queries, heads, kv_heads, size, keys=keys, dtype=dtype, seed=3)
    check_kernels(q, k, selection, bias=bias, positions=positions)


@needs_triton
@pytest.mark.parametrize("positions", [None, document_positions([50, 40])[:, -45:]], ids=["plain", "documents"])
def test_kernels_in_slabs(monkeypatch, positions):
    """A tile of queries at a time, 16 here."""
    from ssa.ops.triton import select_windows as kernels

    monkeypatch.setattr(kernels, "SCORE_BYTES", 1)
    q, k, _, bias = tensors(1, 45, 8, 1, 16, keys=90, dtype=torch.float32)
    check_kernels(q, k, windows(6, 4, 4, 2, 1, 1, 1, lse="coarse"), bias=bias, positions=positions)


@needs_triton
@pytest.mark.parametrize("sharpness", [40.0, 1e-3])
def test_kernels_with_extreme_logits(sharpness):
    q, k, _, _ = tensors(1, 8, 2, 1, 16, keys=70, dtype=torch.float32)
    index, _ = select_blocks(sharpness * q, k, windows(6, 4, 2, 1), impl="triton")
    every, score = select_blocks(sharpness * q, k, windows(30, 4, 2, 1), impl="reference")
    for t in range(8):  # what is chosen scores no less than what is not
        all_of = dict(zip(every[0, 0, t].tolist(), score[0, 0, t].tolist(), strict=True))
        picked = listed(index, 0, t)[0]
        others = [s for n, s in all_of.items() if n >= 0 and n not in picked]
        assert len(picked) == 6 and min(all_of[n] for n in picked) >= max(others) - 1e-5


@needs_triton
def test_kernels_read_importance_of_any_strides():
    q, k, _, bias = tensors(2, 6, 4, 2, 16, keys=70, dtype=torch.float32)
    selection = windows(6, 8, 4, 2, 1, 1, 1)
    kept = kept_of(k, bias, selection)
    expected, _ = select_blocks(q, k, selection, **kept, impl="triton")
    kept["importance"] = kept["importance"].transpose(1, 2).contiguous().transpose(1, 2)
    kept["block_keys"] = kept["block_keys"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(select_blocks(q, k, selection, **kept, impl="triton")[0], expected)


@needs_triton
@pytest.mark.parametrize("queries", [5, 6], ids=["by importance", "by ranks"])
@pytest.mark.parametrize("order", ["ties", "rising", "falling"])
def test_kernels_order_importance_exactly(monkeypatch, queries, order):
    """No query has a say, so nothing may flip: blocks that tie, also by signed zeros, those without a window, an order that makes the
    kernel's guess of a threshold useless."""
    from ssa.ops.triton import select_windows as kernels

    ranked = []
    monkeypatch.setattr(kernels, "_ranks", lambda *a, of=kernels._ranks: (ranked.append(of(*a)), ranked[-1])[1])
    q, k, _, bias = tensors(2, queries, 4, 2, 16, keys=400, dtype=torch.float32)
    selection = windows(12, 4, 2, 1, 1, 2, 0)
    kept = kept_of(k, bias, selection)
    drawn = torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-30])[torch.randint(5, kept["importance"].shape)]
    drawn[0, 6:] = -INF  # fewer than are to be taken
    rising = torch.arange(100.0)[:, None].expand_as(drawn) - 50
    kept["importance"] = {"ties": drawn, "rising": rising, "falling": -rising}[order]
    expected = select_blocks(q, k, selection, **kept, impl="reference")
    with poisoned_empty():
        found = select_blocks(q, k, selection, **kept, impl="triton")
    assert (ranked[0] is not None) == (queries == 6)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_triton
def test_nothing_to_select():
    for batch, tokens in ((0, 20), (1, 0)):
        q, k, _, bias = tensors(batch, tokens, 2, 1, 16, keys=20, dtype=torch.float32)
        index, score = select_blocks(q, k, windows(5, 4, 4, 2, 1, 1, 1), bias=bias, impl="triton")
        assert index.shape == score.shape == (batch, 1, tokens, 5)


@needs_triton
def test_the_operators_are_good_citizens_of_pytorch():
    from ssa.ops.triton.select_windows import select_windows_op

    q, k, _, bias = tensors(1, 2, 2, 1, 16, keys=40, dtype=torch.float32)
    means, coarse, importance = kept_of(k, bias, windows(5, 4, 4, 2, lse="coarse")).values()
    rest = (None, 40, 4, 5, 5, [4, 2, 1, 1, 1, 0], "group", "softmax", 0.25)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator in (select_windows_op, reference.select_windows_op):
        torch.library.opcheck(operator, (q, means, coarse, importance, None, None, *rest), test_utils=checks)


NOSA = windows(64, 64, 32, 16, 1, 16, 15)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "selection", [windows(64, 64, 32, 16, 1, 16), NOSA, windows(96, 64, 32, 16, 1, 32, lse="coarse", dense_length=8192)], ids=str
)
def test_long_rows_on_a_gpu(dtype, packed, selection, tokens=20_500):
    q, k, _, bias = tensors(1, tokens, 8, 2, 128, dtype=dtype)
    check_kernels(q, k, selection, bias=bias, positions=document_positions([7000, 1, 33, tokens - 7034]) if packed else None)


@needs_gpu
def test_offsets_beyond_31_bits():
    tokens, heads, size = 140_000, 128, 128
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU of 40 GB")
    q = torch.randn(1, tokens, heads, size, dtype=torch.bfloat16)
    k, bias = torch.randn(1, tokens, 8, size, dtype=torch.bfloat16), torch.randn(1, tokens, 8)
    assert q.numel() > 1 << 31
    index, _ = select_blocks(q, k, NOSA, bias=bias, impl="triton")
    last, _ = select_blocks(q[:, -64:], k, NOSA, bias=bias, impl="triton")
    assert torch.equal(index[:, :, -64:], last)
    expected, _ = select_blocks(q[:, -64:], k, NOSA, bias=bias, impl="reference")
    assert (last == expected).all(-1).double().mean() > 0.98
