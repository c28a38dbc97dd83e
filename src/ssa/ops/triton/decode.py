"""Decoding: a few queries of each row against its cache, in three kernels whose grids depend on shapes alone.

1. `_normaliser_kernel`, where blocks are chosen by probability: per span of block means and head the peak of the logits and the sum of
   2^(logit - peak).
2. `_candidate_kernel`: per segment of blocks the heads' log-sum-exps from all sums, the blocks' scores, and the segment's best M - 1
   blocks, which hold all of the row's best that lie in it. It reads the means again, the last ones first, which the first kernel
   left in the cache: that is cheaper than writing and reading every head's terms.
3. `_attend_kernel`: per query, the best M - 1 candidates of all segments and the own block, then attention over them. Budgets of
   more than PART_KEYS keys are cut into parts, and `_combine_kernel` adds them up.

Kernels 2 and 3 are launched before the one ahead has ended, where the GPU can, and wait for it when they need its results.

Lengths are read on the device and programs past a row's end return at once, so a CUDA graph captured at one length serves all.
Nothing is added atomically: results are bitwise reproducible, and a row's do not depend on the rows beside it.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, R = K or H (who selects), G heads that share a kv head or a
selection, D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssa.ops.triton.largest import NOTHING, ordered, take_largest
from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E, natural_log
from ssa.ops.triton.online_softmax import softmax_end, softmax_step
from ssa.ops.triton.operation import operation

SEGMENT = 256
"""Blocks that one program ranks."""
CANDIDATES = {"means": 64, "warps": 1, "stages": 3}  # by one warp, so that reductions stay within it
SPANS = tl.constexpr(32)
KEPT = 5  # the first eighth of the means that should stay in the cache
LAST = "evict_first"
PART_KEYS = 1024
"""Keys that one program attends to."""


@triton.jit
def _queries(
    q, lengths, q_b, q_t, q_h, T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """This program's queries, heads of one kv head together: (batch row, kv head, first query, the row's length, queries and heads of the
    rows, rows that exist, their places in [B, T, H], q [rows, DP])."""
    TILES: tl.constexpr = (T + BT - 1) // BT
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES
    b = (row // K).to(tl.int64)
    kv = row % K
    length = tl.load(lengths + b).to(tl.int32)
    i = tl.arange(0, BT * GP)
    t = tile * BT + i // GP
    head = kv * G + i % GP
    real = (t < T) & (i % GP < G)
    d = tl.arange(0, DP)
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_I = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    return b, kv, tile * BT, length, t, real, (b * T + t) * (K * G) + head, q_I


@triton.jit
def _means(means, b, kv, n, N, m_b, m_n, m_k, D: tl.constexpr, DP: tl.constexpr, POLICY: tl.constexpr):
    d = tl.arange(0, DP)
    rows = means + b * m_b + kv.to(tl.int64) * m_k + n.to(tl.int64) * m_n
    mask = (n < N)[:, None] & (d < D)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit(do_not_specialize=["N", "spans"])
def _normaliser_kernel(
    q, means, lengths, peaks, totals, factor, N, spans, q_b, q_t, q_h, m_b, m_n, m_k,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, SPAN: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`factor` takes a product to its logit, in powers of two."""
    if EARLY:
        gdc_launch_dependents()
    b, kv, _, length, t, real, at, q_I = _queries(q, lengths, q_b, q_t, q_h, T, K, G, GP, BT, D, DP)
    span = tl.program_id(1)
    if span * SPAN >= length // BS:
        return
    n = span * SPAN + tl.arange(0, SPAN)
    # the second kernel begins with the last spans: those should find room in the cache
    if span * 8 >= spans * KEPT:
        keys = _means(means, b, kv, n, N, m_b, m_n, m_k, D, DP, "evict_last")
    else:
        keys = _means(means, b, kv, n, N, m_b, m_n, m_k, D, DP, "evict_first")
    logit = tl.dot(q_I, tl.trans(keys), input_precision=PRECISION) * factor
    complete = tl.where(real, (length - T + t + 1) // BS, 0)
    seen = n[None, :] < complete[:, None]
    logit = tl.where(seen, logit, -1e30)
    peak = tl.max(logit, 1)
    total = tl.sum(tl.where(seen, tl.exp2(logit - peak[:, None]), 0.0), 1)
    tl.store(peaks + at * spans + span, peak, mask=real)
    tl.store(totals + at * spans + span, total, mask=real)


@triton.jit
def _best(rank, block, own, hint, M: tl.constexpr, BS: tl.constexpr, RELEASED: tl.constexpr):
    """Flags the best M - 1 of the blocks before `own`. `hint`: a rank that so many of all reach, or NOTHING."""
    if RELEASED:
        # the best half of all earlier chunks of BS blocks and the best half, less the own block, of the query's chunk
        split = own // BS * BS
        early, _, _ = take_largest(tl.where(block < split, rank, NOTHING), tl.where(split > 0, M // 2, 0), NOTHING)
        late, _, _ = take_largest(tl.where(block < split, NOTHING, rank), tl.where(split > 0, M // 2, M) - 1, NOTHING)
        chosen = early | late
    else:
        chosen, _, _ = take_largest(rank, M - 1, hint)
    return chosen


@triton.jit(do_not_specialize=["N", "spans", "segments"])
def _candidate_kernel(
    q, means, lengths, peaks, totals, scores, ranks, blocks, factor, N, spans, segments, q_b, q_t, q_h, m_b, m_n, m_k,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
    ALONE: tl.constexpr, SOFTMAX: tl.constexpr, RELEASED: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ALONE: every head chooses for itself. `scores` is room for this kernel's own use."""
    if EARLY:
        gdc_launch_dependents()
    b, kv, first_query, length, _, real, at, q_I = _queries(q, lengths, q_b, q_t, q_h, T, K, G, GP, BT, D, DP)
    segment = tl.num_programs(1) - 1 - tl.program_id(1)
    start = segment * WIDTH
    last_own = (length - T + tl.minimum(first_query + BT, T) - 1) // BS
    if (length <= 0) | (start >= last_own):
        return
    if EARLY:
        gdc_wait()
    if SOFTMAX:
        live = tl.cdiv(length // BS, SPAN)
        top = tl.full([BT * GP], -1e30, tl.float32)
        total = tl.zeros([BT * GP], tl.float32)
        for c in range(0, live, SPANS):
            s = c + tl.arange(0, SPANS)
            mask = real[:, None] & (s < live)[None, :]
            peak = tl.load(peaks + (at * spans)[:, None] + s[None, :], mask=mask, other=-1e30)
            part = tl.load(totals + (at * spans)[:, None] + s[None, :], mask=mask, other=0.0)
            higher = tl.maximum(top, tl.max(peak, 1))
            total = total * tl.exp2(top - higher) + tl.sum(part * tl.exp2(peak - higher[:, None]), 1)
            top = higher
        lse = top + tl.log2(total)
    R: tl.constexpr = K * G if ALONE else K
    CHOOSERS: tl.constexpr = BT * GP if ALONE else BT
    chooser = tl.arange(0, CHOOSERS)
    if ALONE:
        token = first_query + chooser // GP
        r = kv * G + chooser % GP
        there = (token < T) & (chooser % GP < G)
    else:
        token = first_query + chooser
        r = kv + chooser * 0
        there = token < T
    pitch = segments.to(tl.int64) * WIDTH
    rows = scores + ((b * R + r) * T + token) * pitch
    for c in range(start, tl.minimum(start + WIDTH, last_own), BN):
        n = c + tl.arange(0, BN)
        keys = _means(means, b, kv, n, N, m_b, m_n, m_k, D, DP, LAST)
        score = tl.dot(q_I, tl.trans(keys), input_precision=PRECISION) * factor
        if SOFTMAX:
            score = tl.exp2(score - lse[:, None])
        if not ALONE:
            score = tl.sum(tl.reshape(tl.where(real[:, None], score, 0.0), [BT, GP, BN]), 1)
        tl.store(rows[:, None] + n[None, :], score, mask=there[:, None])
    tl.debug_barrier()  # the scores are read back by other threads
    n = start + tl.arange(0, WIDTH)
    rest = tl.arange(0, MP)
    for i in range(CHOOSERS):
        t_i = first_query + (i // GP if ALONE else i)
        g_i = i % GP if ALONE else 0
        own = (length - T + t_i) // BS
        if (t_i < T) & (g_i < G) & (length - T + t_i >= 0) & (start < own):
            query = (b * R + (kv * G + g_i if ALONE else kv)) * T + t_i
            score = tl.load(scores + query * pitch + n, mask=n < own, other=0.0)
            chosen = _best(tl.where(n < own, ordered(score), NOTHING), n, own, NOTHING, M, BS, RELEASED)
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
            out = (query * segments + segment) * MP
            tl.store(ranks + out + place, ordered(score), mask=chosen)
            tl.store(blocks + out + place, n, mask=chosen)
            tl.store(ranks + out + rest, tl.full([MP], NOTHING, tl.int32), mask=rest >= tl.sum(chosen.to(tl.int32), 0))


@triton.jit(do_not_specialize=["segments"])
def _attend_kernel(
    q, k, v, lengths, starts, bias, ranks, blocks, indices, out, lse_out, scale, segments,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, SELECT: tl.constexpr, RELEASED: tl.constexpr, STARTS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
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
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_G = tl.load(q_rows[:, None] + d[None, :], mask=tile_mask, other=0.0)
    start = tl.load(starts + b).to(tl.int64) if STARTS else b * 0
    if EARLY:
        gdc_wait()
    to = indices + query.to(tl.int64) * M
    count = 0
    if SELECT:
        c = tl.arange(0, CP)
        # segments that hold a block before the own one; the others' places were never written
        live = c // MP < tl.minimum(tl.cdiv(own, WIDTH), segments)
        at = query.to(tl.int64) * segments * MP + c
        rank = tl.load(ranks + at, mask=live, other=NOTHING)
        candidate = tl.load(blocks + at, mask=live, other=0)
        # the weakest of a segment's M - 1 candidates
        weakest = tl.min(tl.where(tl.arange(0, MP)[None, :] < M - 1, tl.reshape(rank, [CP // MP, MP]), 2147483647), 1)
        chosen = _best(rank, candidate, own, tl.max(weakest, 0), M, BS, RELEASED)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(to + place, candidate, mask=chosen)  # every part writes the same
        count = tl.sum(chosen.to(tl.int32), 0)
    m = tl.arange(0, MP)
    tl.store(to + m, tl.where(m == count, own, -1), mask=(m >= count) & (m < M))
    tl.debug_barrier()  # the places written above are read back by other threads
    k_row = k + b * k_b + kv * k_h
    v_row = v + b * v_b + kv * v_h
    peak = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for c in range(part * PART, tl.minimum(part * PART + PART, (count + 1) * BS), BN):
        i = c + tl.arange(0, BN)
        block = tl.load(to + i // BS, mask=i // BS < M, other=-1)
        key = block * BS + i % BS
        seen = (block >= 0) & (key <= position)
        column = start + key
        mask = seen[:, None] & (d < D)[None, :]
        keys = tl.load(k_row + (column * k_s)[:, None] + d[None, :], mask=mask, other=0.0)
        values = tl.load(v_row + (column * v_s)[:, None] + d[None, :], mask=mask, other=0.0)
        logits = tl.dot(q_G, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=seen, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        peak, total, acc = softmax_step(logits, values, peak, total, acc, PRECISION)
    acc, lse = softmax_end(peak, total, acc)
    # without parts [B, T, H, D], with them [B, T, H, PARTS, D] for `_combine_kernel`
    at = ((b * T + t) * (R * G) + head) * PARTS + part
    tl.store(out + (at * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    tl.store(lse_out + at, lse, mask=g < G)


@triton.jit
def _combine_kernel(
    part_out, part_lse, out, lse_out, PARTS: tl.constexpr, PP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PP)
    d = tl.arange(0, DP)
    lse = tl.load(part_lse + head * PARTS + part, mask=part < PARTS, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((lse - top) * LOG2E)
    total = tl.sum(weight, 0)
    mask = (part < PARTS)[:, None] & (d < D)[None, :]
    each = tl.load(part_out + ((head * PARTS + part) * D)[:, None] + d[None, :], mask=mask, other=0.0)
    mixed = tl.sum(each * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse_out + head, tl.where(total == 0.0, float("-inf"), top + natural_log(total)))


def _run(
    q: Tensor, k: Tensor, v: Tensor, block_means: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None,
    block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attention`."""
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    selectors = heads if scope == "head" else kv_heads
    group = heads // selectors
    q, k, v, block_means = (contiguous_rows(x) for x in (q, k, v, block_means))
    lengths = lengths.contiguous()
    starts = None if starts is None else starts.contiguous()
    padded_size = max(16, power_of_two(size))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    rows = batch * selectors * queries
    plan = plan_of(
        q,
        k,
        v,
        block_means,
        lengths,
        starts,
        bias,
        block_size,
        num_selected,
        scope,
        scoring,
        rule,
        SEGMENT,
        PART_KEYS,
        *CANDIDATES.values(),
    )

    def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    indices = workspace(batch, selectors, queries, num_selected, dtype=torch.int32)
    budget = num_selected * block_size
    places = power_of_two(num_selected)
    # the blocks that come before some query's own block: what there is to choose from
    num_blocks = (k.shape[1] - 1) // block_size
    select = num_selected > 1 and num_blocks > 0
    released = rule == "released" and num_selected > max(1, block_size // 2)
    segments, ranks, blocks = 1, None, None
    early = select and launches_early(q)
    overlap = {"EARLY": early, "launch_pdl": True} if early else {"EARLY": False}
    if select:
        num_blocks = max(num_blocks, k.shape[1] // block_size)
        softmax = scoring == "softmax"
        span = _tile(size, q.dtype)
        spans, segments = ceil_div(num_blocks, span), ceil_div(num_blocks, SEGMENT)
        peaks, totals = (workspace(batch, queries, heads, spans) if softmax else None for _ in range(2))
        per_kv = heads // kv_heads
        wide = power_of_two(per_kv)
        tokens = max(16 // wide, min(power_of_two(queries), 64 // wide), 1)
        tiles = batch * kv_heads * ceil_div(queries, tokens)
        strides = (*q.stride()[:3], *block_means.stride()[:3])
        factor = scale * (LOG2E.value if softmax else 1.0)
        common = dict(
            T=queries,
            K=kv_heads,
            G=per_kv,
            GP=wide,
            BT=tokens,
            D=size,
            DP=padded_size,
            BS=block_size,
            SPAN=span,
            PRECISION=precision,
        )
        if softmax:
            launch(
                plan, _normaliser_kernel, (tiles, spans), q, block_means, lengths, peaks, totals, factor, block_means.shape[1], spans,
                *strides, KEPT=KEPT, EARLY=early, num_warps=4 if tokens * wide * span <= 8192 else 8, **common,
            )  # fmt: skip
        scores = workspace(rows, segments * SEGMENT)
        ranks, blocks = (workspace(rows, segments, places, dtype=torch.int32) for _ in range(2))
        step = min(SEGMENT, CANDIDATES["means"], _tile(size, q.dtype))
        launch(
            plan, _candidate_kernel, (tiles, segments),
            q, block_means, lengths, peaks, totals, scores, ranks, blocks, factor, block_means.shape[1], spans, segments, *strides,
            M=num_selected, MP=places, WIDTH=SEGMENT, BN=step, ALONE=scope == "head", SOFTMAX=softmax, RELEASED=released, LAST=LAST,
            num_warps=CANDIDATES["warps"] * (1 if tokens * wide <= 16 else 2 if tokens * wide <= 32 else 4),
            num_stages=CANDIDATES["stages"], **common, **overlap,
        )  # fmt: skip

    columns = max(16, min(_tile(size, q.dtype), power_of_two(budget)))
    part = min(ceil_div(budget, columns) * columns, PART_KEYS)
    parts = ceil_div(budget, part)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = workspace(batch, queries, heads)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out, part_lse = workspace(batch, queries, heads, parts, size), workspace(batch, queries, heads, parts)
    launch(
        plan, _attend_kernel, (rows, parts),
        q, k, v, lengths, starts, bias, ranks, blocks, indices, part_out, part_lse, scale, segments, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if bias is None else bias.stride()), T=queries, R=selectors, K=kv_heads,
        G=group, GP=max(16, power_of_two(group)), D=size, DP=padded_size, BS=block_size, M=num_selected, MP=places,
        CP=power_of_two(segments) * places, WIDTH=SEGMENT, BN=columns, PART=part, PARTS=parts,
        SELECT=select, RELEASED=released, STARTS=starts is not None, BIAS=bias is not None, PRECISION=precision,
        num_warps=4 if columns * padded_size <= 8192 else 8, num_stages=2, **overlap,
    )  # fmt: skip
    if parts > 1:
        launch(
            plan, _combine_kernel, (batch * queries * heads,), part_out, part_lse, out, lse, PARTS=parts, PP=power_of_two(parts),
            D=size, DP=padded_size, num_warps=1,
        )  # fmt: skip
    return out, lse, indices


def launches_early(x: Tensor) -> bool:
    """Whether the GPU can launch a kernel before the one ahead has ended (programmatic dependent launch)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def _tile(size: int, dtype: torch.dtype) -> int:
    """Keys, or means, of one step: 32 KiB of them; of fp32, whose products take registers instead of tensor cores, 16."""
    keep = 2**14 if dtype == torch.float32 else 2**15
    return max(16, keep // (power_of_two(size) * dtype.itemsize))


decode_attention_op = torch.library.custom_op("ssa::decode_attention", _run, mutates_args=())


@decode_attention_op.register_fake
def _(q, k, v, block_means, lengths, starts, bias, block_size, num_selected, scope, scoring, rule, scale):
    selectors = q.shape[2] if scope == "head" else k.shape[2]
    indices = q.new_empty(q.shape[0], selectors, q.shape[1], num_selected, dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), indices


decode_attention = operation(decode_attention_op, _run)
