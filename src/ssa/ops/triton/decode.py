"""Decoding: a few queries of each row against its cache, in three kernels whose grids depend on shapes alone.

1. `_span_kernel`: per span of block means, every head's terms 2^(logit - peak of the span), their sum and the peak. The means, the
   bulk of what selection reads, are read once.
2. `_candidate_kernel`: per query and segment of spans, the heads' log-sum-exps from all sums, the blocks' scores, and the segment's
   best M - 1 blocks, which hold all of the row's best that lie in it.
3. `_attend_kernel`: per query, the best M - 1 candidates of all segments and the own block, then attention over them. Budgets of
   more than PART_KEYS keys are cut into parts, and `_combine_kernel` adds them up.

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

from ssa.ops.triton.largest import NOTHING, ordered, take_largest
from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E, natural_log
from ssa.ops.triton.online_softmax import softmax_end, softmax_step
from ssa.ops.triton.operation import operation

SEGMENT = 256
"""Blocks that one program ranks."""
RANKING_WARPS = 1  # reductions stay within a warp
PART_KEYS = 1024
"""Keys that one program attends to."""


@triton.jit(do_not_specialize=["N", "spans"])
def _span_kernel(
    q, means, lengths, peaks, totals, terms, factor, N, spans, q_b, q_t, q_h, m_b, m_n, m_k,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, RT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
    SPAN: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`factor` takes a product to its logit, in powers of two for the softmax."""
    TILES: tl.constexpr = (T * G + RT - 1) // RT
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES
    span = tl.program_id(1)
    b = (row // K).to(tl.int64)
    kv = row % K
    length = tl.load(lengths + b).to(tl.int32)
    first = span * SPAN
    if first >= length // BS:
        return
    i = tile * RT + tl.arange(0, RT)
    t = i // G
    head = kv * G + i % G
    real = i < T * G
    d = tl.arange(0, DP)
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_I = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    n = first + tl.arange(0, SPAN)
    key_rows = means + b * m_b + kv.to(tl.int64) * m_k + n.to(tl.int64) * m_n
    # means are read once; what is written here, soon again: it should find room in the cache
    keys = tl.load(
        key_rows[:, None] + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0, eviction_policy="evict_first"
    )
    term = tl.dot(q_I, tl.trans(keys), input_precision=PRECISION) * factor
    complete = tl.where(real, (length - T + t + 1) // BS, 0)
    seen = n[None, :] < complete[:, None]
    at = (b * T + t) * (K * G) + head
    if SOFTMAX:
        term = tl.where(seen, term, -1e30)
        peak = tl.max(term, 1)
        term = tl.where(seen, tl.exp2(term - peak[:, None]), 0.0)
        tl.store(peaks + at * spans + span, peak, mask=real)
        tl.store(totals + at * spans + span, tl.sum(term, 1), mask=real)
    pitch = spans.to(tl.int64) * SPAN
    tl.store(terms + (at * pitch)[:, None] + n[None, :], term, mask=real[:, None])


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


@triton.jit(do_not_specialize=["spans", "segments"])
def _candidate_kernel(
    terms, peaks, totals, lengths, ranks, blocks, spans, segments,
    T: tl.constexpr, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    SPANS: tl.constexpr, SPAN: tl.constexpr, J: tl.constexpr, SOFTMAX: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    segment = tl.program_id(1)
    t = query % T
    r = query // T % R
    b = (query // T // R).to(tl.int64)
    position = tl.load(lengths + b).to(tl.int32) - T + t
    own = position // BS
    first_span = segment * J
    if (position < 0) | (first_span * SPAN >= own):
        return
    g = tl.arange(0, GP)
    at = (b * T + t) * (R * G) + r * G + g
    j = first_span + tl.arange(0, J)
    n = j[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    cells = terms + (at * (spans.to(tl.int64) * SPAN))[:, None, None] + n[None, :, :]
    term = tl.load(cells, mask=(g < G)[:, None, None] & (n < own)[None, :, :], other=0.0)
    if SOFTMAX:
        live = tl.cdiv((position + 1) // BS, SPAN)
        s = tl.arange(0, SPANS)
        mask = (g < G)[:, None] & (s < live)[None, :]
        peak = tl.load(peaks + (at * spans)[:, None] + s[None, :], mask=mask, other=-1e30)
        total = tl.load(totals + (at * spans)[:, None] + s[None, :], mask=mask, other=0.0)
        top = tl.max(peak, 1)
        lse = top + tl.log2(tl.sum(total * tl.exp2(peak - top[:, None]), 1))
        mask = (g < G)[:, None] & (j < live)[None, :]
        weight = tl.exp2(tl.load(peaks + (at * spans)[:, None] + j[None, :], mask=mask, other=-1e30) - lse[:, None])
        term *= tl.where(mask, weight, 0.0)[:, :, None]
    score = tl.reshape(tl.sum(term, 0), [J * SPAN])
    n = tl.reshape(n, [J * SPAN])
    chosen = _best(tl.where(n < own, ordered(score), NOTHING), n, own, NOTHING, M, BS, RELEASED)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    out = (query.to(tl.int64) * segments + segment) * MP
    tl.store(ranks + out + place, ordered(score), mask=chosen)
    tl.store(blocks + out + place, n, mask=chosen)
    rest = tl.arange(0, MP)
    tl.store(ranks + out + rest, tl.full([MP], NOTHING, tl.int32), mask=rest >= tl.sum(chosen.to(tl.int32), 0))


@triton.jit(do_not_specialize=["segments"])
def _attend_kernel(
    q, k, v, lengths, starts, bias, ranks, blocks, indices, out, lse_out, scale, segments,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, SELECT: tl.constexpr, RELEASED: tl.constexpr, STARTS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    part = tl.program_id(1)
    t = query % T
    r = query // T % R
    b = (query // T // R).to(tl.int64)
    kv = (r // (R // K)).to(tl.int64)
    position = tl.load(lengths + b).to(tl.int32) - T + t
    own = tl.where(position < 0, -1, position // BS)
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
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    head = r * G + g
    tile_mask = (g < G)[:, None] & (d < D)[None, :]
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_G = tl.load(q_rows[:, None] + d[None, :], mask=tile_mask, other=0.0)
    start = tl.load(starts + b).to(tl.int64) if STARTS else b * 0
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
        RANKING_WARPS,
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
    if select:
        num_blocks = max(num_blocks, k.shape[1] // block_size)
        span = _tile(size, q.dtype)
        spans = ceil_div(num_blocks, span)
        per_segment = max(1, SEGMENT // span)
        segments = ceil_div(spans, per_segment)
        softmax = scoring == "softmax"
        peaks, totals = (workspace(batch, queries, heads, spans) if softmax else None for _ in range(2))
        terms = workspace(batch, queries, heads, spans * span)
        per_kv = heads // kv_heads
        tile = min(64, max(16, power_of_two(queries * per_kv)))
        launch(
            plan, _span_kernel, (batch * kv_heads * ceil_div(queries * per_kv, tile), spans),
            q, block_means, lengths, peaks, totals, terms, scale * (LOG2E.value if softmax else 1.0), block_means.shape[1], spans,
            *q.stride()[:3], *block_means.stride()[:3], T=queries, K=kv_heads, G=per_kv, RT=tile, D=size, DP=padded_size,
            BS=block_size, SPAN=span, SOFTMAX=softmax, PRECISION=precision, num_warps=4 if tile * span <= 8192 else 8,
        )  # fmt: skip
        ranks, blocks = (workspace(rows, segments, places, dtype=torch.int32) for _ in range(2))
        wide = power_of_two(group)
        launch(
            plan, _candidate_kernel, (rows, segments),
            terms, peaks, totals, lengths, ranks, blocks, spans, segments, T=queries, R=selectors, G=group, GP=wide, BS=block_size,
            M=num_selected, MP=places, SPANS=power_of_two(spans), SPAN=span, J=per_segment, SOFTMAX=softmax,
            RELEASED=released, num_warps=RANKING_WARPS if wide <= 16 else 2 * RANKING_WARPS,
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
        CP=power_of_two(segments) * places, WIDTH=per_segment * span if select else 1, BN=columns, PART=part, PARTS=parts,
        SELECT=select, RELEASED=released, STARTS=starts is not None, BIAS=bias is not None, PRECISION=precision,
        num_warps=4 if columns * padded_size <= 8192 else 8, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        launch(
            plan, _combine_kernel, (batch * queries * heads,), part_out, part_lse, out, lse, PARTS=parts, PP=power_of_two(parts),
            D=size, DP=padded_size, num_warps=1,
        )  # fmt: skip
    return out, lse, indices


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
