"""Decoding: a few queries of each row against its cache, in two kernels whose grids depend on shapes alone.

1. `_score_kernel`: per span of block means, every head's terms 2^(logit - peak), whose peak and sum it leaves for the others of its
   row. As soon as all have left theirs it knows the heads' normalisers and writes the span's scores. The terms stay in registers, and
   the means, the bulk of what decoding reads, are read once. Rows of more spans than may wait for each other take two launches,
   one that leaves the sums and one that reads the means again.
2. `_attend_kernel`: per query, the best M - 1 families of neighbouring blocks by the best block of each, the best M - 1 blocks in
   them, which are the best of all, and attention over these and the own block. Budgets of more than PART_KEYS keys are cut into
   parts, and `combine_kernel` adds them up.

`decode_select` is the first and the choice of the second, `decode_attend` its attention alone, by the same code: together they give what
both give in one.

Lengths are read on the device and programs past a row's end return at once, so a CUDA graph captured at one length serves all.
Nothing is added atomically: results are bitwise reproducible, and a row's do not depend on the rows beside it.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, R = K or H (who selects), G heads that share a kv head (in
`_attend_kernel` a selection), P those that select together (G or 1), D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.largest import NOTHING, ordered, take_largest
from ssa.ops.triton.launch import Plan, ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E, natural_log
from ssa.ops.triton.online_softmax import LOWEST, load_lse, softmax_end, softmax_step, store_lse
from ssa.ops.triton.operation import operation

PART_KEYS = 1024
"""Keys that one program attends to."""


@triton.jit(do_not_specialize=["N", "spans", "leaves", "writes", "coarse_spans"])
def _score_kernel(
    q, means, lengths, sums, coarse_sums, scores, tops, factor, N, spans, leaves, writes, coarse_spans, q_b, q_t, q_h, m_b, m_k,
    m_n: tl.constexpr, T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, QT: tl.constexpr, RT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, SPAN: tl.constexpr, FAMILY: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, LOCAL: tl.constexpr, TAIL: tl.constexpr, WINDOWS: tl.constexpr,
    COARSE: tl.constexpr, COARSE_SPAN: tl.constexpr,
):  # fmt: skip
    """A unit is a tile of QT queries of a kv head, and RT its rows: heads of queries. `factor` takes a product to its logit, in powers of
    two for the softmax. `leaves`: the span's sums are left for the others; `writes`: its scores are written.

    Means are of SIZE tokens, one every STRIDE; candidates start in the blocks of BS tokens before the last LOCAL. WINDOWS: a family is a block,
    whose best score is written, and as many places further the best of its last TAIL. COARSE: the normaliser comes from what coarser windows,
    4 times as large and as far apart, have left in `coarse_sums`, where there are any."""
    PER: tl.constexpr = BS // STRIDE
    TILES: tl.constexpr = (T + QT - 1) // QT
    unit = tl.program_id(0) // spans
    span = tl.program_id(0) % spans
    tile = unit % TILES
    kv = unit // TILES % K
    b = (unit // TILES // K).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    complete = tl.maximum(length - SIZE + STRIDE, 0) // STRIDE
    live = tl.minimum(tl.cdiv(complete, SPAN), spans)  # a length that the cache has no room for must not be waited for
    if span >= live:
        return
    i = tl.arange(0, RT)
    t = tile * QT + i // G
    head = kv * G + i % G
    real = (i < QT * G) & (t < T)
    d = tl.arange(0, DP)
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_I = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    first = span * SPAN
    n = tl.arange(0, SPAN)
    rows = means + b * m_b + kv.to(tl.int64) * m_k + first.to(tl.int64) * m_n + n[:, None] * m_n + d[None, :]
    mask = (n < N - first)[:, None] & (d < D)[None, :]
    # read once: what follows should find room in the cache
    keys = tl.load(rows, mask=mask, other=0.0, eviction_policy="evict_first")
    term = tl.dot(q_I, tl.trans(keys), input_precision=PRECISION)
    if (first + SPAN) * STRIDE + SIZE - STRIDE > length - T + 1:  # some query's complete blocks end here
        seen = first + n[None, :] < (tl.maximum(length - T + t + 1 - SIZE + STRIDE, 0) // STRIDE)[:, None]
        term = tl.where(seen, term, float("-inf") if SOFTMAX else 0.0)
    weight = tl.where(real, 1.0, 0.0)
    if SOFTMAX:
        peak = tl.maximum(tl.max(term, 1) * factor, -1e30)  # finite where a row sees nothing of the span: its terms are 0
        term = tl.exp2(term * factor - peak[:, None])
        left = sums + unit.to(tl.int64) * spans * RT
        if leaves != 0:
            tl.store(left + span * RT + i, _packed(peak, tl.sum(term, 1)))
        if writes == 0:
            return
        lse = _normaliser(left, live, RT, 32)
        if COARSE:
            wide = tl.maximum(length - 4 * (SIZE - STRIDE), 0) // (4 * STRIDE)
            live = tl.minimum(tl.cdiv(wide, COARSE_SPAN), coarse_spans)
            coarse = _normaliser(coarse_sums + unit.to(tl.int64) * coarse_spans * RT, live, RT, 32)
            lse = tl.where(coarse == float("-inf"), lse, coarse)
        weight = tl.exp2(tl.where(real, peak - lse, float("-inf")))
    else:
        term *= factor
    for s in range(0, QT * G // P):  # those who select
        its = weight if QT * G // P == 1 else tl.where(i // P == s, weight, 0.0)
        query = tile * QT + s * P // G
        row = (b * (K * G // P) + kv * (G // P) + s % (G // P)) * T + query
        score = tl.sum(term * its[:, None], 0)
        own = tl.maximum((length - T + query) // BS - LOCAL, 0) * PER
        if first + SPAN > own:  # the own block and those after it are no candidates
            score = tl.where(first + n < own, score, float("-inf"))
        family = tl.arange(0, SPAN // FAMILY)
        top = tl.max(tl.reshape(score, [SPAN // FAMILY, FAMILY]), 1)
        there = family < tl.where(query < T, SPAN, 0)
        if WINDOWS:
            pitch = spans * (SPAN // FAMILY)
            to = row.to(tl.int64) * (2 * pitch) + first // FAMILY + family
            tl.store(tops + to, top, mask=there)
            if TAIL > 0:
                last = tl.where(n % FAMILY >= FAMILY - TAIL, score, float("-inf"))
                tl.store(tops + to + pitch, tl.max(tl.reshape(last, [SPAN // FAMILY, FAMILY]), 1), mask=there)
        else:
            to = row * (spans * SPAN) + first
            tl.store(scores + to + n, score, mask=n < tl.where(query < T, SPAN, 0))
            tl.store(tops + to // FAMILY + family, top, mask=there)


@triton.jit
def _packed(peak, total):
    """Both as one integer, which is there whole or not at all. It is not 0: a total is 1 at least, or the peak is -1e30."""
    peak = tl.minimum(peak, 3e38)
    return (peak.to(tl.int32, bitcast=True).to(tl.int64) << 32) | total.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _arrived(left, start, live, RT: tl.constexpr, C: tl.constexpr):
    """(highest peak [RT], infinite as long as one is missing; peaks [C, RT]; totals)."""
    s = start + tl.arange(0, C)
    mask = (s < live)[:, None]
    pair = tl.load(left + s[:, None] * RT + tl.arange(0, RT)[None, :], mask=mask, other=0, volatile=True)
    peak = tl.where(pair == 0, float("inf"), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    peak = tl.where(mask, peak, -1e30)
    return tl.max(peak, 0), peak, pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _normaliser(left, live, RT: tl.constexpr, C: tl.constexpr):
    """Log-sum-exps in powers of two [RT] of what the row's `live` spans leave, as soon as all have. The values are their own flags: flags
    beside them would need fences."""
    top = tl.full([RT], -1e30, tl.float32)
    total = tl.zeros([RT], tl.float32)
    for start in range(0, live, C):
        higher, peak, part = _arrived(left, start, live, RT, C)
        while tl.max(higher, 0) == float("inf"):
            higher, peak, part = _arrived(left, start, live, RT, C)
        higher = tl.maximum(top, higher)
        total = total * tl.exp2(top - higher) + tl.sum(part * tl.exp2(peak - higher[None, :]), 0)
        top = higher
    return top + tl.log2(total)


@triton.jit
def _best(rank, block, own, hint, M, BS: tl.constexpr, RELEASED: tl.constexpr):
    """Flags the best M - 1 of the blocks before `own`. M: a constant, or one row's number. `hint`: a rank that so many of all reach, or NOTHING."""
    if RELEASED:
        # the best half of all earlier chunks of BS blocks and the best half, less the own block, of the query's chunk
        split = own // BS * BS
        early, _, _ = take_largest(tl.where(block < split, rank, NOTHING), tl.where(split > 0, M // 2, 0), NOTHING)
        late, _, _ = take_largest(tl.where(block < split, NOTHING, rank), tl.where(split > 0, M // 2, M) - 1, NOTHING)
        chosen = early | late
    else:
        chosen, _, _ = take_largest(rank, M - 1, hint)
    return chosen


@triton.jit(do_not_specialize=["pitch"])
def _attend_kernel(
    q, k, v, lengths, starts, bias, slots, row_blocks, scores, tops, families, indices, out, lse_out, scale, pitch,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, FAMILY: tl.constexpr, FAMILIES: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, CHOOSE: tl.constexpr, ATTEND: tl.constexpr, SELECT: tl.constexpr, RELEASED: tl.constexpr, STARTS: tl.constexpr,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, ROW_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHOOSE: the blocks are chosen, by their scores where SELECT says that there are any to choose from, and written to `indices`; else they
    stand there. ROW_BLOCKS: `row_blocks` of them in a row, M at most. ATTEND: attention follows. SLOTS: blocks lie where `slots` says."""
    query = tl.program_id(0)
    part = tl.program_id(1)
    t = query % T
    r = query // T % R
    b = (query // T // R).to(tl.int64)
    kv = (r // (R // K)).to(tl.int64)
    position = tl.load(lengths + b).to(tl.int32) - T + t
    own = tl.where(position < 0, -1, position // BS)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    head = r * G + g
    tile_mask = (g < G)[:, None] & (d < D)[None, :]
    if ATTEND:
        q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
        q_G = tl.load(q_rows[:, None] + d[None, :], mask=tile_mask, other=0.0)
    start = tl.load(starts + b).to(tl.int64) if STARTS else b * 0
    to = indices + query.to(tl.int64) * M
    count = 0
    if SELECT:
        if ROW_BLOCKS:
            most = tl.minimum(tl.maximum(tl.load(row_blocks + b), 1), M)
        # the best blocks lie in the families whose best are the best
        family = tl.arange(0, FAMILIES)
        row = query.to(tl.int64) * pitch
        before = family * FAMILY < tl.minimum(own, pitch)
        top = tl.where(before, ordered(tl.load(tops + row // FAMILY + family, mask=before, other=0.0)), NOTHING)
        chosen = _best(top, family * FAMILY, own, NOTHING, most if ROW_BLOCKS else M, BS, RELEASED)
        least = tl.min(tl.where(chosen, top, 2147483647), 0)
        places = families + query.to(tl.int64) * MP
        tl.store(places + tl.cumsum(chosen.to(tl.int32), 0) - 1, family, mask=chosen)
        count = tl.sum(chosen.to(tl.int32), 0)
        tl.debug_barrier()  # what is written here is read back by other threads
        c = tl.arange(0, MP * FAMILY)
        candidate = tl.load(places + c // FAMILY, mask=c // FAMILY < count, other=0) * FAMILY + c % FAMILY
        listed = (c // FAMILY < count) & (candidate < own)
        rank = tl.where(listed, ordered(tl.load(scores + row + candidate, mask=listed, other=0.0)), NOTHING)
        chosen = _best(rank, candidate, own, least, most if ROW_BLOCKS else M, BS, RELEASED)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(to + place, candidate, mask=chosen)  # every part writes the same
        count = tl.sum(chosen.to(tl.int32), 0)
    m = tl.arange(0, MP)
    if CHOOSE:
        tl.store(to + m, tl.where(m == count, own, -1), mask=(m >= count) & (m < M))
        tl.debug_barrier()
        count += 1
    else:
        count = tl.max(tl.where(tl.load(to + m, mask=m < M, other=-1) >= 0, m + 1, 0), 0)
    if ATTEND:
        k_row = k + b * k_b + kv * k_h
        v_row = v + b * v_b + kv * v_h
        peak = tl.full([GP], LOWEST, tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        for c in range(part * PART, tl.minimum(part * PART + PART, count * BS), BN):
            i = c + tl.arange(0, BN)
            block = tl.load(to + i // BS, mask=i // BS < M, other=-1)
            key = block * BS + i % BS
            seen = (block >= 0) & (key <= position)
            column = start + key
            if SLOTS:
                column = tl.load(slots + query.to(tl.int64) * M + i // BS, mask=i // BS < M, other=0).to(tl.int64) * BS + i % BS
            mask = seen[:, None] & (d < D)[None, :]
            keys = tl.load(k_row + (column * k_s)[:, None] + d[None, :], mask=mask, other=0.0)
            values = tl.load(v_row + (column * v_s)[:, None] + d[None, :], mask=mask, other=0.0)
            logits = tl.dot(q_G, tl.trans(keys), input_precision=PRECISION) * scale
            if BIAS:
                logits += tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=seen, other=0.0).to(tl.float32)[None, :]
            logits = tl.where(seen[None, :], logits, float("-inf"))
            peak, total, acc = softmax_step(logits, values, peak, total, acc, PRECISION)
        acc, log = softmax_end(total, acc)
        # without parts [B, T, H, D], with them [B, T, H, PARTS, D] for `combine_kernel`
        at = ((b * T + t) * (R * G) + head) * PARTS + part
        tl.store(out + (at * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
        store_lse(lse_out, at, peak, log, g < G, BIAS and PARTS > 1)


@triton.jit
def combine_kernel(
    part_out, part_lse, out, lse_out, PARTS: tl.constexpr, PP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PP)
    d = tl.arange(0, DP)
    peak, log = load_lse(part_lse, head * PARTS + part, part < PARTS, float("-inf"), BIAS)
    top = tl.maximum(tl.max(peak, 0), LOWEST)
    gap = peak - top
    if BIAS:
        gap += log
    weight = tl.exp2(gap * LOG2E)
    total = tl.sum(weight, 0)
    mask = (part < PARTS)[:, None] & (d < D)[None, :]
    each = tl.load(part_out + ((head * PARTS + part) * D)[:, None] + d[None, :], mask=mask, other=0.0)
    mixed = tl.sum(each * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse_out + head, tl.where(total == 0.0, float("-inf"), top + natural_log(total)))


def _run(
    q: Tensor, k: Tensor, v: Tensor, block_means: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None,
    block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float, row_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attention`."""
    q, k, v, block_means = (contiguous_rows(x) for x in (q, k, v, block_means))
    lengths, starts = lengths.contiguous(), None if starts is None else starts.contiguous()
    plan = plan_of(
        q, k, v, block_means, lengths, starts, bias, row_blocks, block_size, num_selected, scope, scoring, rule, PART_KEYS
    )  # fmt: skip
    indices = unfilled(q, k.shape[2], num_selected, scope)
    # the blocks that come before some query's own block are what there is to choose from
    choice = _score(
        plan, q, block_means, lengths, indices, (k.shape[1] - 1) // block_size, k.shape[1] // block_size, block_size, scoring, rule, scale,
        row_blocks,
    )  # fmt: skip
    out, lse = _attend(plan, q, k, v, lengths, starts, bias, None, choice, indices, block_size, scale)
    return out, lse, indices


def _run_select(
    q: Tensor, block_means: Tensor, lengths: Tensor, block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
    row_blocks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `ssa.ops.decode_select`."""
    q, block_means, lengths = contiguous_rows(q), contiguous_rows(block_means), lengths.contiguous()
    plan = plan_of(q, block_means, lengths, row_blocks, block_size, num_selected, scope, scoring, rule, "select")
    indices = unfilled(q, block_means.shape[2], num_selected, scope)
    blocks = block_means.shape[1]
    choice = _score(plan, q, block_means, lengths, indices, blocks, blocks, block_size, scoring, rule, scale, row_blocks)
    launch(
        plan, _attend_kernel, (indices.numel() // num_selected, 1),
        None, None, None, lengths, None, None, None, choice.row_blocks, choice.scores, choice.tops, choice.families, indices, None, None,
        scale, choice.pitch, *(0,) * 12, **_geometry(q, block_means.shape[2], indices, block_size, choice), BN=16, PART=PART_KEYS, PARTS=1, CHOOSE=True,
        ATTEND=False, STARTS=False, BIAS=False, SLOTS=False, num_warps=4, num_stages=2,
    )  # fmt: skip
    return indices


def run_attend(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None,
    slots: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attend`."""
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    lengths, starts = lengths.contiguous(), None if starts is None else starts.contiguous()
    block_indices, slots = block_indices.contiguous(), None if slots is None else slots.contiguous()
    plan = plan_of(q, k, v, block_indices, lengths, starts, bias, slots, block_size, PART_KEYS, "attend")
    return _attend(plan, q, k, v, lengths, starts, bias, slots, None, block_indices, block_size, scale)


def unfilled(q: Tensor, kv_heads: int, num_selected: int, scope: str) -> Tensor:
    """int32 [B, R, T, M]"""
    selectors = q.shape[2] if scope == "head" else kv_heads
    return torch.empty(q.shape[0], selectors, q.shape[1], num_selected, dtype=torch.int32, device=q.device)


class _Choice(NamedTuple):
    """What is there to choose from, for every query of a selector."""

    family: int = 1
    """Neighbouring blocks whose best score is kept, too."""
    pitch: int = 1
    scores: Tensor | None = None
    """[rows, pitch]; None where a query's own block is all that it can read."""
    tops: Tensor | None = None
    """[rows, pitch // family]"""
    families: Tensor | None = None
    """Room for the chosen ones."""
    released: bool = False
    row_blocks: Tensor | None = None
    """int32 [B], the most that each row reads; None = M."""


def _score(
    plan: Plan | None, q: Tensor, block_means: Tensor, lengths: Tensor, indices: Tensor, candidates: int, complete: int, block_size: int,
    scoring: str, rule: str, scale: float, row_blocks: Tensor | None,
) -> _Choice:  # fmt: skip
    """`candidates`: the most blocks that come before a query's own; `complete`: the most that a row completes."""
    batch, queries = q.shape[:2]
    selectors, num_selected = indices.shape[1], indices.shape[3]
    if num_selected == 1 or candidates < 1:
        return _Choice()
    rows = batch * selectors * queries
    places = power_of_two(num_selected)
    released = rule == "released" and num_selected > max(1, block_size // 2)
    scored = Scored.of(q, block_means, max(candidates, complete))
    # about as many families as blocks in those chosen; the released rule tells chunks of `block_size` blocks apart
    family = max(1, min(scored.span, power_of_two(math.isqrt(max(candidates, complete) // places) + 1) // 2))
    family = math.gcd(family, block_size) if released else family
    pitch = scored.spans * scored.span
    scores, tops = workspace(q, rows, pitch), workspace(q, rows, pitch // family)
    families = workspace(q, rows, places, dtype=torch.int32)
    scored.launch(plan, q, block_means, lengths, scores, tops, block_size, selectors, scoring, scale, family)
    return _Choice(family, pitch, scores, tops, families, released, None if row_blocks is None else row_blocks.contiguous())


class Scored(NamedTuple):
    """How the means of a cache are shared out among programs."""

    together: int
    """Queries of a program: a tile of 16 rows is what fits into few registers."""
    tile: int
    span: int
    spans: int
    warps: int

    @classmethod
    def of(cls, q: Tensor, means: Tensor, count: int, least: int = 16) -> Scored:
        """Of at most `count` means, `least` or more a program."""
        _, queries, heads, size = q.shape
        per_kv = heads // means.shape[2]
        together = max(1, min(queries, 16 // per_kv))
        tile = max(16, power_of_two(together * per_kv))
        span = max(16, least, min(_tile(size, q.dtype), 2**14 // tile))
        warps = 4 if tile * span <= 4096 else 8
        if tile == 16 and ceil_div(count, span) > _may_wait(q.device) > 1:
            span, warps = 2 * span, 8  # slower than twice as many programs, faster than a second reading
        return cls(together, tile, span, max(1, ceil_div(count, span)), warps)

    def launch(
        self, plan: Plan | None, q: Tensor, means: Tensor, lengths: Tensor, scores: Tensor | None, tops: Tensor, block_size: int,
        selectors: int, scoring: str, scale: float, family: int, windows: tuple[int, int, int] | None = None,
        coarse: tuple[Tensor, Scored] | None = None, sums_alone: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Writes scores unless it is for the heads' sums alone; returns those. `windows`: size, stride, local blocks."""
        batch, queries, heads, size = q.shape
        kv_heads = means.shape[2]
        units = batch * kv_heads * ceil_div(queries, self.together)
        softmax = scoring == "softmax"
        sums = torch.zeros(units, self.spans, self.tile, dtype=torch.int64, device=q.device) if softmax else None
        at_once = not softmax or self.spans <= _may_wait(q.device)
        length, stride, local = windows or (block_size, block_size, 0)
        for leaves, writes in [(1, 0)] if sums_alone else [(1, 1)] if at_once else [(1, 0), (0, 1)]:
            launch(
                plan, _score_kernel, (units * self.spans,),
                q, means, lengths, sums, None if coarse is None else coarse[0], scores, tops, scale * (LOG2E.value if softmax else 1.0),
                means.shape[1], self.spans, leaves, writes, 0 if coarse is None else coarse[1].spans, *q.stride()[:3], means.stride(0),
                means.stride(2), m_n=means.stride(1), T=queries, K=kv_heads, G=heads // kv_heads, P=heads // selectors, QT=self.together,
                RT=self.tile, D=size, DP=max(16, power_of_two(size)), BS=block_size, SPAN=self.span, FAMILY=family, SOFTMAX=softmax,
                PRECISION=precision_of(q), SIZE=length, STRIDE=stride, LOCAL=local, TAIL=length // stride - 1, WINDOWS=windows is not None,
                COARSE=coarse is not None, COARSE_SPAN=1 if coarse is None else coarse[1].span, num_warps=self.warps,
                **({"maxnreg": 80} if self.tile == 16 else {}),  # six programs of four warps a multiprocessor
            )  # fmt: skip
        return sums


def _attend(
    plan: Plan | None, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None, slots: Tensor | None,
    choice: _Choice | None, indices: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`choice` None: the blocks stand in `indices`."""
    batch, queries, heads, size = q.shape
    budget = indices.shape[3] * block_size
    columns = max(16, min(_tile(size, q.dtype), power_of_two(budget)))
    part = min(ceil_div(budget, columns) * columns, PART_KEYS)
    parts = ceil_div(budget, part)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = workspace(q, batch, queries, heads)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = workspace(q, batch, queries, heads, parts, size)
        part_lse = workspace(q, batch, queries, heads, parts, 1 if bias is None else 2)
    scored = _Choice() if choice is None else choice
    launch(
        plan, _attend_kernel, (batch * indices.shape[1] * queries, parts),
        q, k, v, lengths, starts, bias, slots, scored.row_blocks, scored.scores, scored.tops, scored.families, indices, part_out, part_lse,
        scale, scored.pitch, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if bias is None else bias.stride()),
        **_geometry(q, k.shape[2], indices, block_size, scored), BN=columns, PART=part, PARTS=parts, CHOOSE=choice is not None, ATTEND=True,
        STARTS=starts is not None, BIAS=bias is not None, SLOTS=slots is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        launch(
            plan, combine_kernel, (batch * queries * heads,), part_out, part_lse, out, lse, PARTS=parts, PP=power_of_two(parts),
            D=size, DP=max(16, power_of_two(size)), BIAS=bias is not None, num_warps=1,
        )  # fmt: skip
    return out, lse


def _geometry(q: Tensor, kv_heads: int, indices: Tensor, block_size: int, choice: _Choice) -> dict[str, Any]:
    selectors, num_selected = indices.shape[1], indices.shape[3]
    group, size = q.shape[2] // selectors, q.shape[3]
    return dict(
        T=q.shape[1], R=selectors, K=kv_heads, G=group, GP=max(16, power_of_two(group)), D=size, DP=max(16, power_of_two(size)),
        BS=block_size, M=num_selected, MP=power_of_two(num_selected), FAMILY=choice.family,
        FAMILIES=power_of_two(choice.pitch // choice.family), SELECT=choice.scores is not None, RELEASED=choice.released,
        ROW_BLOCKS=choice.row_blocks is not None, PRECISION=precision_of(q),
    )  # fmt: skip


def workspace(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def precision_of(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


@functools.cache
def _may_wait(device: torch.device) -> int:
    """Programs that may wait for each other. All must run at once, so they are one a multiprocessor, where at least three find room: the
    GPU starts programs in the order of their numbers, and three calls at once cannot take each other's places. In the interpreter, which
    runs one program after another, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile(size: int, dtype: torch.dtype) -> int:
    """Keys, or means, of one step: 32 KiB of them; of fp32, whose products take registers instead of tensor cores, 16."""
    keep = 2**14 if dtype == torch.float32 else 2**15
    return max(16, keep // (power_of_two(size) * dtype.itemsize))


decode_attention_op = torch.library.custom_op("ssa::decode_attention", _run, mutates_args=())
decode_select_op = torch.library.custom_op("ssa::decode_select", _run_select, mutates_args=())
decode_attend_op = torch.library.custom_op("ssa::decode_attend", run_attend, mutates_args=())


@decode_attention_op.register_fake
def _(q, k, v, block_means, lengths, starts, bias, block_size, num_selected, scope, scoring, rule, scale, row_blocks=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), unfilled(q, k.shape[2], num_selected, scope)


@decode_select_op.register_fake
def _(q, block_means, lengths, block_size, num_selected, scope, scoring, rule, scale, row_blocks=None):
    return unfilled(q, block_means.shape[2], num_selected, scope)


@decode_attend_op.register_fake
def _(q, k, v, block_indices, lengths, starts, bias, slots, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


decode_attention = operation(decode_attention_op, _run)
decode_select = operation(decode_select_op, _run_select)
decode_attend = operation(decode_attend_op, run_attend)
