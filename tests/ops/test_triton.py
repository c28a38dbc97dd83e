"""The Triton kernels against the reference, on the CPU by Triton's interpreter, or on the GPU named by SSA_TEST_DEVICE."""

import os

import pytest
import torch

from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, select_blocks
from ssa.testing import RMS_RATIO, assert_rounded, attention_oracle, document_positions, poisoned_empty, random_qkv, rms_ratio

pytest.importorskip("triton")
on_gpu = os.environ.get("SSA_TEST_DEVICE", "cpu").startswith("cuda")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not on_gpu, reason="with a GPU at hand the kernels are tested there: SSA_TEST_DEVICE=cuda"
)

PACKED = document_positions([7, 1, 22])
# B, T, S, H, K, D, block size, k, scope, scoring, positions
SELECTIONS = {
    "plain": (1, 40, 40, 4, 2, 16, 2, 3, "group", "softmax", None),
    "padded group and head size": (1, 12, 30, 6, 2, 24, 4, 5, "group", "softmax", None),
    "batch, one key a block": (2, 6, 20, 3, 3, 16, 1, 4, "group", "softmax", None),
    "heads choose by logits": (1, 14, 30, 4, 2, 16, 2, 2, "head", "logit", None),
    "documents": (1, 30, 30, 4, 1, 16, 4, 3, "group", "softmax", PACKED),
    "own block only": (1, 9, 9, 2, 1, 16, 4, 1, "group", "softmax", None),
    "fewer keys than a block": (1, 5, 5, 2, 1, 16, 16, 2, "group", "softmax", None),
    # long enough for the unmasked sweeps over 64 blocks and for choosing chunks first
    "many blocks": (1, 6, 300, 2, 1, 16, 1, 3, "group", "softmax", None),
    "many blocks, heads choose": (2, 3, 200, 4, 2, 16, 1, 2, "head", "logit", None),
    "many blocks, left padding": (
        2,
        5,
        150,
        2,
        1,
        16,
        1,
        3,
        "group",
        "softmax",
        torch.arange(145, 150) - torch.tensor([[0], [37]]),
    ),
}


def check_selection(q, k, selection, **options):
    expected, expected_score = select_blocks(q, k, selection, impl="reference", **options)
    with poisoned_empty():
        index, score = select_blocks(q, k, selection, impl="triton", **options)
    assert index.dtype == torch.int32 and index.shape == expected.shape
    # scores, not indices: near-ties flip
    torch.testing.assert_close(score.sort(-1).values, expected_score.sort(-1).values, rtol=1e-4, atol=1e-5)
    assert (index == expected).all(-1).double().mean() > 0.98
    finite = torch.isfinite(expected_score)
    assert torch.equal(finite, torch.isfinite(score)) and torch.equal(index < 0, expected < 0)


@pytest.fixture
def chunks(request, monkeypatch):
    """The same selection from chunks of so many blocks."""
    from ssa.ops.triton import select

    monkeypatch.setattr(select, "CHUNKS", ((1 << 31, request.param),))


MANY = [case for case in SELECTIONS if "many" in case]


@pytest.mark.parametrize(
    ("case", "chunks"),
    [*((case, 1) for case in SELECTIONS), *((case, n) for case in [*MANY, "documents"] for n in (4, 8))],
    indirect=["chunks"],
)
def test_selection(case, chunks):
    batch, queries, keys, heads, kv_heads, size, block_size, count, scope, scoring, positions = SELECTIONS[case]
    q, k, _ = (x.detach() for x in random_qkv(batch, queries, keys, heads, kv_heads, size, dtype=torch.float32))
    check_selection(q, k, Selection(count, block_size, scope=scope, scoring=scoring), positions=positions)


@pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])
def test_selection_by_the_released_rule(positions):
    q, k, _ = (x.detach() for x in random_qkv(1, 30, 30, 2, 1, 16, dtype=torch.float32))
    check_selection(q, k, Selection(2, 2, rule="released"), positions=positions)


@pytest.mark.parametrize("chunks", [1, 4], indirect=True)
@pytest.mark.parametrize(("queries", "keys", "block_size", "count"), [(8, 160, 4, 4), (3, 645, 16, 16)])
def test_released_rule_with_chunks_and_a_tail(queries, keys, block_size, count, chunks):
    q, k, _ = (x.detach() for x in random_qkv(1, queries, keys, 2, 1, 16, dtype=torch.float32))
    check_selection(q, k, Selection(count, block_size, rule="released"))


@pytest.mark.parametrize(
    ("selection", "positions", "chunks"),
    [
        (Selection(3, 4), document_positions([90, 60])[:, -80:], 4),
        (Selection(4, 4, rule="released"), None, 4),
        (Selection(3, 4), None, 1),
    ],
    ids=["documents", "released", "batch"],
    indirect=["chunks"],
)
def test_selection_in_slabs(request, monkeypatch, chunks, selection, positions):
    """A tile of queries at a time, 64 here."""
    from ssa.ops.triton import select

    monkeypatch.setattr(select, "SCORE_BYTES", 1)
    q, k, _ = (
        x.detach() for x in random_qkv(2 if "batch" in request.node.callspec.id else 1, 80, 150, 2, 1, 16, dtype=torch.float32)
    )
    check_selection(q, k, selection, positions=positions)


def test_nothing_to_select_or_attend_to():
    for batch, tokens in ((0, 20), (1, 0)):
        q, k, v = random_qkv(batch, tokens, 20, 2, 1, 16, dtype=torch.float32)
        index, score = select_blocks(q, k, Selection(3, 4), impl="triton")
        assert index.shape == score.shape == (batch, 1, tokens, 3)
        out, lse = block_sparse_attention(q, k, v, index, block_size=4, impl="triton")
        gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, (q, k, v), strict=True))


def test_spans_weigh_partial_results_against_lists():
    from ssa.ops.triton.key_side import SPAN_BYTES, SPAN_SCALE, span_of
    from ssa.ops.triton.reader_lists import LIST_BYTES

    shape = dict(R=8, K=8, M=16, G=4, D=64, DP=64)
    per_query = 16 * 4 * 64 * 2
    for queries, plain in ((65536, True), (262144, False), (1 << 21, False)):  # packed rows name every column
        names = queries // 64 if plain else queries
        length, rows = span_of("forward", 1, queries, queries, 64, plain, shape, 2)
        partial = length * rows * per_query
        table = -(-queries // length) * 8 * names * LIST_BYTES
        assert rows == 1 and length % 64 == 0
        room = SPAN_BYTES["forward"] * max(1, queries * 8 * 4 * 64 * 2 // SPAN_SCALE)  # larger inputs, larger spans
        assert partial <= room or partial <= 1.1 * table, "longer than lists ask for"
        assert table <= room or table <= 1.1 * partial + 8 * names * LIST_BYTES, "more lists than results"


def test_spans_of_the_backward_pass():
    from ssa.ops.triton.key_side import SPAN_BYTES, span_of

    shape = dict(R=8, K=8, M=8, G=4, D=64, DP=64)
    assert span_of("backward", 1, 65536, 65536, 256, True, shape, 2) == (65536, 1), "a row fits whole"
    length, rows = span_of("backward", 1, 65536, 65536, 256, True, shape | {"M": 16}, 2)
    assert rows == 1 and length * 16 * 4 * 64 * 2 == SPAN_BYTES["backward"] // 2, "fp32 sums take the other half"
    choosing = shape | {"R": 32, "G": 1}  # every query head for itself: those of a kv head stay together
    assert span_of("backward", 1, 65536, 65536, 256, True, choosing, 2) == (65536, 1)


SHAPES_OF_128 = {"32/8 8x128": (8, 8, 4, 8, 128), "32/8 16x64": (8, 8, 4, 16, 64), "heads choose": (32, 8, 1, 8, 128), "32/4": (4, 4, 8, 8, 128)}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES_OF_128)
@pytest.mark.parametrize("tokens", [32768, 131072])
def test_heads_of_128_take_their_share_of_what_dense_attention_does(name, tokens):
    """Counted as the two passes allocate: dense takes 1.753 and 7.013 GB for 32/8 (measured)."""
    from ssa.ops.triton.key_side import DENSE_SHARE, SEGMENT_ROWS, SPAN_BYTES, span_of

    choosing, kv_heads, group, selected, block = SHAPES_OF_128[name]
    shape = dict(R=choosing, K=kv_heads, M=selected, G=group, D=128, DP=128)
    q_bytes, k_bytes = tokens * choosing * group * 256, tokens * kv_heads * 256
    dense = 6 * q_bytes + 2 * k_bytes
    if kv_heads == 8:
        assert dense == pytest.approx(1.753e9 * tokens / 32768, rel=0.01)
    rows = tokens * choosing * group
    lists = 8 * tokens * choosing * selected
    length, together = span_of("forward", 1, tokens, tokens, block, True, shape, 2)
    results = length * together * choosing // kv_heads * selected * group
    assert results * 256 >= SPAN_BYTES["forward"]
    assert q_bytes + 4 * rows + lists + results * 260 <= DENSE_SHARE * dense
    length, together = span_of("backward", 1, tokens, tokens, block, True, shape, 2)
    pairs = length * together * choosing // kv_heads * selected
    sums = 0 if length == tokens else 8 * together * tokens * 128
    parts = 2 * pairs * group // SEGMENT_ROWS * block * 128 * 8
    assert 2 * (q_bytes + k_bytes) + 20 * rows + lists + pairs * group * 256 + sums + parts <= DENSE_SHARE * dense
    assert length >= 64 * 32


def test_short_rows_take_no_more_than_other_heads():
    from ssa.ops.triton.key_side import SPAN_BYTES, span_of

    shape = dict(R=8, K=8, M=16, G=4, D=128, DP=128)
    for way in ("forward", "backward"):
        length, rows = span_of(way, 1, 8192, 8192, 64, True, shape, 2)
        assert length * rows * 16 * 4 * 256 == SPAN_BYTES[way]


@pytest.mark.parametrize("sharpness", [30.0, 1e-3])
def test_selection_with_extreme_logits(sharpness):
    q, k, _ = (x.detach() for x in random_qkv(1, 24, 24, 2, 1, 16, dtype=torch.float32))
    q = q * sharpness
    index, _ = select_blocks(q, k, Selection(3, 2), impl="triton")
    _, expected_score = select_blocks(q, k, Selection(12, 2), impl="reference")
    for t in range(24):  # what is chosen scores no less than what is not
        own = t // 2
        every = dict(zip(range(own + 1), expected_score[0, 0, t, : own + 1].tolist(), strict=True))
        picked = [n for n in index[0, 0, t].tolist() if n >= 0]
        assert len(picked) == min(3, own + 1) and own in picked
        others = [every[n] for n in every if n not in picked]
        assert not others or min(every[n] for n in picked) >= max(others) - 1e-5


@pytest.mark.parametrize("chunks", [1, 4], indirect=True)
@pytest.mark.parametrize("scoring", ["softmax", "logit"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_not_even_a_broken_key_breaks_the_contract(chunks, scoring, value):
    q, k, _ = (x.detach() for x in random_qkv(1, 10, 60, 2, 1, 16, dtype=torch.float32))
    k[:, 9], q[:, 3] = value, value
    own = torch.arange(50, 60) // 4
    for impl in ("reference", "triton"):
        index, _ = select_blocks(q, k, Selection(4, 4, scoring=scoring), impl=impl)
        for row, last in zip(index[0, 0].tolist(), own.tolist(), strict=True):
            picked = [n for n in row if n >= 0]
            assert row == picked + [-1] * (4 - len(picked)) and picked == sorted(set(picked)) and picked[-1] == last


ATTENTIONS = {
    "plain": (1, 24, 24, 4, 2, 16, 4, 3, "group", None, False, 256),
    "late queries, bias, padding": (2, 7, 15, 6, 2, 24, 4, 2, "group", None, True, 256),
    "segments": (1, 30, 30, 3, 3, 16, 4, 3, "group", None, False, 8),
    "heads choose": (1, 16, 16, 4, 2, 16, 4, 2, "head", None, True, 8),
    "documents": (1, 30, 30, 4, 2, 16, 4, 3, "group", PACKED, True, 8),
    "steps within a block": (1, 40, 70, 16, 1, 16, 32, 2, "group", None, True, 256),
    "own block alone": (1, 20, 20, 2, 1, 16, 16, 1, "group", None, False, 256),
    # from here on the key side computes outputs and query gradients, too
    "key side": (1, 40, 40, 2, 2, 16, 16, 3, "group", None, False, 256),
    "key side, spans and segments": (1, 80, 80, 2, 2, 16, 16, 3, "group", None, True, 8),
    "key side, documents": (1, 30, 30, 3, 1, 24, 16, 3, "group", PACKED, True, 8),
    "key side, heads choose": (2, 36, 41, 4, 2, 16, 16, 3, "head", None, True, 256),
    "key side, heads choose, documents": (1, 30, 30, 4, 1, 16, 16, 3, "head", PACKED, True, 8),
    "key side, group of four, odd blocks": (1, 60, 60, 4, 1, 24, 24, 2, "group", None, True, 8),
    "key side, group of eight": (1, 70, 70, 8, 1, 16, 32, 2, "group", None, False, 256),
    "key side, heads choose, spans": (2, 70, 75, 4, 2, 16, 16, 3, "head", None, True, 256),
}


def gradients(attended, leaves, d_out, d_lse):
    """[out, and the gradients of (out * d_out + lse * d_lse).sum() in `leaves`] of `attended` = (out, lse, ...)."""
    out, lse = attended[:2]
    return [out, *torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), d_lse.to(lse.dtype)))]


def magnitudes(q, k, v, weights, d_out, d_lse):
    """For `assert_rounded`, of out, dq, dk, dv and dbias, fp64: their formulas with the absolute value of everything. A weight, too, is off by a
    few units: by those of its logit, by how far that is below the log-sum-exp, and by four of 2^x (what vector libraries promise)."""
    scale, kv_heads = q.shape[-1] ** -0.5, k.shape[2]
    q, k, v, d_out, d_lse = (x.detach().double().abs() for x in (q, k, v, d_out, d_lse))
    k, v = (x.repeat_interleave(q.shape[2] // kv_heads, 2) for x in (k, v))
    below = -torch.where(weights > 0, weights, 1.0).log()
    units = weights * (4 + torch.einsum("bthd,bshd->bhts", q, k) * scale + below)
    d_weights = torch.einsum("bthd,bshd->bhts", d_out, v)
    d_logits = units * (d_weights + (weights * d_weights).sum(-1, keepdim=True) + d_lse.transpose(1, 2)[..., None])

    def by_kv_head(x_BSH):
        return x_BSH.unflatten(2, (kv_heads, -1)).sum(3)

    return [
        torch.einsum("bhts,bshd->bthd", units, v),
        torch.einsum("bhts,bshd->bthd", d_logits, k) * scale,
        by_kv_head(torch.einsum("bhts,bthd->bshd", d_logits, q)) * scale,
        by_kv_head(torch.einsum("bhts,bthd->bshd", units, d_out)),
        by_kv_head(d_logits.sum(2).transpose(1, 2)),
    ]


NAMES = ("out", "dq", "dk", "dv", "dbias")
LONG = "key side, heads choose, spans"  # a minute in the interpreter; spans alone and heads alone are tested quickly


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case == LONG else []) for case in ATTENTIONS])
def test_attention_and_gradients(monkeypatch, case):
    from ssa.ops.triton import block_sparse as kernels
    from ssa.ops.triton import key_side, reader_lists

    batch, queries, keys, heads, kv_heads, size, block_size, count, scope, positions, biased, segment = ATTENTIONS[case]
    monkeypatch.setattr(kernels, "SEGMENT", segment)
    monkeypatch.setattr(key_side, "SPAN_BYTES", {"forward": 1, "backward": 1})  # the shortest spans
    if segment == 8:
        monkeypatch.setattr(key_side, "SPAN_BLOCKS", 1)  # of single rows
    if case == "segments":  # longer segments where partial sums would fill the memory
        monkeypatch.setattr(kernels, "PART_BYTES", 1 << 14)
    used = []
    monkeypatch.setattr(key_side, "forward", lambda *a, run=key_side.forward: (used.append(True), run(*a))[1])
    low = random_qkv(batch, queries, keys, heads, kv_heads, size, dtype=torch.float32)
    bias = torch.randn(batch, keys, kv_heads, requires_grad=True) if biased else None
    leaves = [*low, *([bias] if biased else [])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = {"block_size": block_size, "positions": positions}
    index, _ = select_blocks(low[0], low[1], Selection(count, block_size, scope=scope), positions=positions, impl="reference")
    by = torch.randn(low[0].shape), torch.randn(low[0].shape[:3])
    with poisoned_empty():
        actual = gradients(block_sparse_attention(*low, index, bias=bias, impl="triton", **options), leaves, *by)
        monkeypatch.setattr(reader_lists, "MAP_BYTES", 0)  # the lists of readers by sorting
        again = gradients(block_sparse_attention(*low, index, bias=bias, impl="triton", **options), leaves, *by)
    oracle = attention_oracle(*exact[:3], index, bias=exact[3] if biased else None, **options)
    scales = magnitudes(*exact[:3], oracle[2].detach(), *by)
    for name, x, y, z, scale in zip(NAMES, actual, again, gradients(oracle, exact, *by), scales, strict=False):
        assert torch.equal(x, y), f"{name} differs from time to time, or from one way of listing readers to the other"
        assert_rounded(x, z, scale, 2, name)
    assert bool(used) == case.startswith("key side")


# B, T, S, H, K, D, block size, k, scope, positions, dtype, masked keys, how the last kv head masks them (the others by -inf)
LOWEST, INF = torch.finfo(torch.float32).min, float("inf")
MASKED = {
    "two blocks, so that early queries read nothing": (1, 24, 24, 4, 2, 16, 4, 3, "group", None, torch.float32, range(8), -1e38),
    "wide group and heads, half precision": (1, 12, 12, 16, 1, 128, 4, 2, "group", None, torch.float16, range(8), -INF),
    "heads choose, the last partial block": (2, 15, 15, 4, 2, 8, 4, 2, "head", None, torch.float32, range(12, 15), LOWEST),
    "documents, all of one and some of another": (1, 30, 30, 6, 2, 24, 4, 3, "group", PACKED, torch.float32, range(5, 14), -1e38),
    "all keys": (1, 9, 20, 2, 2, 16, 4, 2, "group", None, torch.float32, range(20), LOWEST),
    "key side, a block": (1, 40, 40, 2, 2, 16, 16, 3, "group", None, torch.float32, range(16), -1e38),
    "key side, all but a few, half precision": (1, 40, 40, 3, 1, 64, 16, 3, "group", None, torch.float16, range(38), -INF),
    "key side, documents": (1, 30, 30, 3, 1, 24, 16, 3, "group", PACKED, torch.float32, range(10), -INF),
    "key side, heads choose, the last partial block": (
        1,
        36,
        41,
        4,
        2,
        16,
        16,
        3,
        "head",
        None,
        torch.float32,
        range(32, 41),
        -1e38,
    ),
    "key side, all keys": (1, 40, 40, 2, 2, 16, 16, 3, "group", None, torch.float32, range(40), -1e30),
}


@pytest.mark.parametrize("case", MASKED)
def test_a_bias_may_mask_every_key_of_a_block_and_of_a_query(monkeypatch, case):
    """-inf masks a key. A finite bias, however low, only makes it rank behind others: where all keys have it, it changes nothing."""
    from ssa.ops.triton import block_sparse as kernels

    batch, queries, keys, heads, kv_heads, size, block_size, count, scope, positions, dtype, masked, value = MASKED[case]
    monkeypatch.setattr(kernels, "SEGMENT", 8)
    low = random_qkv(batch, queries, keys, heads, kv_heads, size, dtype=dtype)
    bias = torch.randn(batch, keys, kv_heads)
    bias[:, list(masked)] = -INF
    bias[:, list(masked), -1] = value
    leaves = [*low, bias.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = {"block_size": block_size, "positions": positions}
    index, _ = select_blocks(low[0], low[1], Selection(count, block_size, scope=scope), positions=positions, impl="reference")
    by = torch.randn(low[0].shape).to(dtype), torch.randn(low[0].shape[:3])
    with poisoned_empty():
        attended = block_sparse_attention(*low, index, bias=bias, impl="triton", **options)
        actual = gradients(attended, leaves, *by)
    oracle = attention_oracle(*exact[:3], index, bias=exact[3], **options)
    scales = magnitudes(*exact[:3], oracle[2].detach(), *by)
    for name, x, z, scale in zip(NAMES, actual, gradients(oracle, exact, *by), scales, strict=True):
        assert_rounded(x.to(dtype), z, scale, 2, name)  # where nothing enters, as at masked keys, exactly 0
    torch.testing.assert_close(attended[1].double(), oracle[1], rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.skipif(not on_gpu, reason="of a size for a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block_size"), [(32, 2, 64, 16), (32, 2, 128, 16), (8, 2, 128, 64)])
def test_masked_keys_in_long_rows(heads, kv_heads, size, block_size, keys=4096):
    low = random_qkv(1, keys, keys, heads, kv_heads, size, dtype=torch.bfloat16)
    bias = torch.randn(1, keys, kv_heads)
    bias[:, : 3 * block_size] = -INF  # all that the first queries see
    bias[:, keys // 4 : keys // 3] = -INF
    bias[:, keys // 2 : keys // 2 + 50, -1] = LOWEST
    leaves = [*low, bias.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    index, _ = select_blocks(low[0], low[1], Selection(16, block_size))
    by = torch.randn(low[0].shape).to(low[0].dtype), torch.randn(low[0].shape[:3])
    attended = [
        block_sparse_attention(*xs[:3], index, bias=xs[3], block_size=block_size, impl=impl)
        for xs, impl in ((leaves, "triton"), (exact, "reference"))
    ]
    assert torch.equal(attended[0][1] == -INF, attended[1][1] == -INF) and (attended[0][1][0, : 3 * block_size] == -INF).all()
    actual, gold = gradients(attended[0], leaves, *by), gradients(attended[1], exact, *by)
    for name, x, z in zip(NAMES, actual, gold, strict=True):
        assert torch.isfinite(x).all() and rms_ratio(x, z) <= RMS_RATIO[torch.bfloat16], name
    assert (actual[4][bias == -INF] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_logit_below_all_numbers_masks_its_key(impl):
    q, k, v = random_qkv(1, 8, 8, 1, 1, 16, dtype=torch.float32)
    with torch.no_grad():
        q.fill_(8.7e18), k.fill_(-8.7e18)  # logits of -3e38
        k[:, 5] = 0.0
    bias = torch.full((1, 8, 1), -3e38, requires_grad=True)
    index = (torch.arange(8) // 4).int().view(1, 1, 8, 1)
    out, lse = block_sparse_attention(q, k, v, index, block_size=4, bias=bias, impl=impl)
    assert (out[:, :5] == 0).all() and (lse[:, :5] == -INF).all()
    assert torch.equal(out[0, 5:, 0], v[0, 5].expand(3, 16)) and (lse[:, 5:] == -3e38).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum() + lse[:, 5:].sum(), (q, k, v, bias)))


def test_a_query_without_keys_gets_zero():
    q, k, v = random_qkv(1, 4, 4, 2, 1, 16, dtype=torch.float32)
    index = torch.tensor([0, -1, 0, 0], dtype=torch.int32).view(1, 1, 4, 1)
    out, lse = block_sparse_attention(q, k, v, index, block_size=4, impl="triton")
    assert (out[:, 1] == 0).all() and (lse[:, 1] == float("-inf")).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_operator_is_a_good_citizen_of_pytorch():
    from ssa.ops.triton.block_sparse import block_sparse_forward

    q, k, v = random_qkv(1, 6, 6, 2, 1, 16, dtype=torch.float32)
    index, _ = select_blocks(q, k, Selection(2, 4), impl="reference")
    arguments = (q, k, v, index, None, None, None, 4, 0.25)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(block_sparse_forward, arguments, test_utils=checks)
    torch.library.opcheck(block_sparse_forward, (*arguments[:5], torch.zeros(1, 6, 1), None, 4, 0.25), test_utils=checks)


def test_float64_is_refused_when_asked_for_and_avoided_when_not():
    q, k, v = random_qkv(1, 6, 6, 2, 1, 16)
    index, _ = select_blocks(q, k, Selection(2, 4))
    assert block_sparse_attention(q, k, v, index, block_size=4)[0].dtype == torch.float64
    with pytest.raises(UserError, match="float64"):
        block_sparse_attention(q, k, v, index, block_size=4, impl="triton")


def test_an_explicit_request_never_falls_back(monkeypatch):
    from ssa.ops import implementations

    monkeypatch.setattr(implementations, "_interpreting", lambda: False)
    monkeypatch.setattr(
        implementations, "_triton_missing", lambda kind: f"the Triton kernels need an NVIDIA GPU, not a {kind} device"
    )
    q, k, _ = random_qkv(1, 6, 6, 2, 1, 16, dtype=torch.float32)
    with pytest.raises(UserError, match="cannot run"):
        select_blocks(q, k, Selection(2, 4), impl="triton")
    select_blocks(q, k, Selection(2, 4))  # auto takes the reference
