"""The key side of block-sparse attention: programs that hold one key block and walk the queries that read it.

The gradients of keys and values always come from here (`key_gradients`). Where a block's keys and values are many bytes beside its
readers' queries (few query heads a kv head, large blocks), the outputs and the gradients of queries do too: every (query, block)
pair writes a partial result, and a second kernel adds up a query's. That is done by spans, some queries of some rows, so that partial
results stay small. Lists longer than `segment` pairs are cut into segments whose sums are added in a fixed order: results are
bitwise reproducible.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), G = H / R, J = R / K (who selects and shares a
kv head), D head size, M selected blocks. A row of a span is one kv head of one batch row, a row of a tile one (pair, head of the group).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton import reader_lists
from ssa.ops.triton.launch import Plan, capability, ceil_div, launch, power_of_two
from ssa.ops.triton.numerics import LOG2E, natural_log
from ssa.ops.triton.online_softmax import LOWEST, load_lse, softmax_end, store_lse
from ssa.ops.triton.reader_lists import LIST_BYTES, ReaderLists

SPAN_BYTES = {"forward": 1 << 28, "backward": 1 << 28}
"""Partial results held at once, for queries of up to SPAN_SCALE bytes; more in proportion where they are larger. See `_room`."""
SPAN_SCALE = 1 << 28
DENSE_SHARE = 0.65
"""What attention with heads of 128 may take, beyond its inputs, of what dense attention takes. With half of it the backward pass of 32k tokens
takes a quarter longer (measured: more spans, each with work for few multiprocessors)."""
SPAN_BLOCKS = 256
"""As many blocks in a span as keep the GPU busy."""
SEGMENT_ROWS = 2048
"""Rows of a work item of the backward pass: its sums are written once for so many rows read."""
BLOCK_BYTES = 1 << 15
"""Keys of a block up to which tiles of many rows fit beside keys and values."""


@triton.jit
def work_item(table, counts, item_list, span, num_blocks, span_items, SEGMENT: tl.constexpr):
    """(block or -1, list, segment of it, segments, first and last pair) of this program."""
    item = tl.program_id(0)
    alive = item < (tl.load(counts + span) & 0xFFFFFFFF)
    item = tl.load(item_list + span.to(tl.int64) * span_items + item, mask=alive, other=0)
    which = (item & 0xFFFFFFFF).to(tl.int32)
    part = (item >> 32).to(tl.int32)
    start = tl.load(table + which * 3)
    stop = tl.load(table + which * 3 + 1)
    segments = tl.cdiv(stop - start, SEGMENT)
    low = start + part * SEGMENT
    high = tl.minimum(low + SEGMENT, stop)
    return tl.where(alive, which - span * num_blocks, -1), which, part, segments, low, high


@triton.jit
def block_place(block, first_row, row_blocks, unit, K: tl.constexpr):
    """(row of the span, row, batch row, kv head, first column) of a block's name."""
    local = block // row_blocks
    row = first_row + local
    return local, row, (row // K).to(tl.int64), row % K, (block % row_blocks) * unit


@triton.jit
def pair_place(pair, local, span_length, first_query, T, J: tl.constexpr, M: tl.constexpr):
    """(which of the heads that choose for a row, query, place among the pairs of the span) of a row's pairs, counted from its first."""
    t = pair // M
    if J == 1:
        j = 0
        slot = pair + (local * span_length - first_query) * M
    else:
        j = tl.zeros_like(t)
        for i in tl.static_range(1, J):  # cheaper than dividing by T
            j += (t >= i * T).to(tl.int32)
        t -= j * T
        slot = ((local * J + j) * span_length + t - first_query) * M + pair % M
    return j, t.to(tl.int64), slot.to(tl.int64)


@triton.jit(do_not_specialize=["span", "first_query", "first_row"])
def _partial_kernel(
    q, k, v, bias, pair_order, table, counts, item_list, part_o, part_lse, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h, span, first_query, first_row, span_length, num_blocks, row_blocks, unit, span_items,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BSP: tl.constexpr, BP: tl.constexpr, SEGMENT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalised output and lse (`store_lse`) of every pair of a block, [pairs of the span, G, D] and [pairs of the span, G]."""
    block, _, _, _, low, high = work_item(table, counts, item_list, span, num_blocks, span_items, SEGMENT)
    if block < 0:
        return
    local, row, b, kv, first = block_place(block, first_row, row_blocks, unit, K)
    J: tl.constexpr = R // K
    i = tl.arange(0, BSP)
    d = tl.arange(0, DP)
    rows = tl.arange(0, BP * GP)
    g = rows % GP
    inside = (i < BS) & (first + i < S)
    column = (first + i).to(tl.int64)
    key_mask = inside[:, None] & (d < D)[None, :]
    keys = tl.load(k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    values = tl.load(v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    if BIAS:
        key_bias = tl.load(bias + b * b_b + kv.to(tl.int64) * b_h + column * b_s, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(i < BS, first + i, S)
    q += b * q_b + (kv * J * G).to(tl.int64) * q_h
    first_pair = row * J * T * M
    e = low + rows // GP
    coming = tl.load(pair_order + e, mask=e < high, other=0)
    for c in range(low, high, BP):
        e = c + rows // GP
        pair = coming  # pairs come a step ahead, so that a tile's rows have whole steps to arrive
        coming = tl.load(pair_order + e + BP, mask=e + BP < high, other=0)
        j, t, slot = pair_place(pair - first_pair, local, span_length, first_query, T, J, M)
        real = (e < high) & (g < G)
        mask = real[:, None] & (d < D)[None, :]
        q_P = tl.load(q + (t * q_t + (j * G + g).to(tl.int64) * q_h)[:, None] + d[None, :], mask=mask, other=0.0)
        pair = tl.load(pair_order + e, mask=e < high, other=0)
        j, t, slot = pair_place(pair - first_pair, local, span_length, first_query, T, J, M)
        logits = tl.dot(q_P, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            logits += key_bias[None, :]
        # causal by columns: the query stands at column S - T + t, and a block never leaves its query's document
        last_seen = S - T + t.to(tl.int32)
        logits = tl.where(key[None, :] <= last_seen[:, None], logits, float("-inf"))
        peak = tl.max(logits, 1)
        if BIAS:  # which may mask all keys
            peak = tl.maximum(peak, LOWEST)
        p = tl.exp2((logits - peak[:, None]) * LOG2E)
        total = tl.sum(p, 1)
        out = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        if BIAS:
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
        # in half precision a reciprocal does: a division for each number takes 2 to 8 % of the kernel (measured)
        out = out / total[:, None] if part_o.dtype.element_ty == tl.float32 else out * (1.0 / total)[:, None]
        slot = slot * G + g
        tl.store(part_o + (slot * D)[:, None] + d[None, :], out.to(part_o.dtype.element_ty), mask=mask)
        log = natural_log(total)
        if BIAS:
            log = tl.where(empty, float("-inf"), log)
        store_lse(part_lse, slot, peak, log, real, BIAS)


@triton.jit
def queries_of_span(
    first_query, first_row, span_length, T, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """This program's rows, each a head of a query: (heads of the group, columns, rows that exist, their mask, their queries' first pair in
    the span and in all, their places in [B, T, H])."""
    row = first_row + tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BT * GP)
    g = rows % GP
    d = tl.arange(0, DP)
    local = tl.program_id(0) * BT + rows // GP
    t = first_query + local
    real = (local < span_length) & (t < T) & (g < G)
    head = (row // R * T + t) * (R * G) + row % R * G + g
    return (
        g,
        d,
        real,
        real[:, None] & (d < D)[None, :],
        (tl.program_id(1).to(tl.int64) * span_length + local) * M,
        (row * T + t) * M,
        head,
    )


@triton.jit(do_not_specialize=["first_query", "first_row"])
def _combine_kernel(
    indices, part_o, part_lse, out, lse_out, T, first_query, first_row, span_length,
    R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BT: tl.constexpr,
    MP: tl.constexpr, AT_ONCE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A query's partial outputs, weighted by exp(lse of the pair - lse). The peak is known before them, so that no load waits for another."""
    g, d, real, mask, slot, query, head = queries_of_span(first_query, first_row, span_length, T, R, G, GP, D, DP, M, BT)
    m = tl.arange(0, MP)
    there = real[:, None] & (m < M)[None, :]
    there &= tl.load(indices + query[:, None] + m[None, :], mask=there, other=-1) >= 0
    parts, logs = load_lse(part_lse, (slot[:, None] + m[None, :]) * G + g[:, None], there, float("-inf"), BIAS)
    peak = tl.maximum(tl.max(parts, 1), LOWEST)
    total = tl.sum(_weight(parts, logs, peak[:, None], BIAS), 1)
    acc = tl.zeros([BT * GP, DP], tl.float32)
    for c in range(0, M, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            near = pair_is_there(indices, query, c + i, real, M)
            at = (slot + c + i) * G + g
            part, log = load_lse(part_lse, at, near, float("-inf"), BIAS)
            piece = tl.load(part_o + (at * D)[:, None] + d[None, :], mask=near[:, None] & (d < D)[None, :], other=0.0)
            acc += piece.to(tl.float32) * _weight(part, log, peak, BIAS)[:, None]
    acc, end = softmax_end(total, acc)
    tl.store(out + (head * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    store_lse(lse_out, head, peak, end, real, BIAS)


@triton.jit
def _weight(part, log, peak, BIAS: tl.constexpr):
    gap = part - peak
    if BIAS:
        gap += log
    return tl.exp2(gap * LOG2E)


@triton.jit
def pair_is_there(indices, query, m, real, M: tl.constexpr):
    """Whether the query's m-th block exists; `query` as of `queries_of_span`."""
    inside = real & (m < M)
    return inside & (tl.load(indices + query + m, mask=inside, other=-1) >= 0)


def limits() -> tuple[float, ...]:
    """What decides, beside the arguments, how the work is cut."""
    return *SPAN_BYTES.values(), SPAN_SCALE, DENSE_SHARE, SPAN_BLOCKS, SEGMENT_ROWS, BLOCK_BYTES, reader_lists.MAP_BYTES


def of_128(shape: dict[str, Any], itemsize: int) -> bool:
    """Heads of 128 in half precision, which the settings were measured with."""
    return shape["DP"] == 128 and itemsize == 2


def span_of(
    way: str, batch: int, queries: int, keys: int, block_size: int, plain: bool, shape: dict[str, Any], itemsize: int
) -> tuple[int, int]:
    """Queries, a multiple of 64, and rows of a span: all where their partial results fit, otherwise fewer rows, down to SPAN_BLOCKS
    blocks between them, and then fewer queries; more, where the table of lists (one for each block of a row and span; with documents,
    not `plain`, each column begins one) would outgrow the partial results.

    Spans of fewer queries add up the gradients of keys in fp32. The backward pass then holds fewer partial results beside those.
    """
    rows = batch * shape["K"]
    row_blocks = ceil_div(keys, block_size)
    row_bytes = shape["R"] // shape["K"] * shape["M"] * shape["G"] * shape["D"] * itemsize
    room = _room(way, batch, queries, keys, block_size, shape, itemsize, 0)
    while rows % 2 == 0 and rows * row_bytes * queries > room and rows // 2 * row_blocks >= SPAN_BLOCKS:
        rows //= 2
    if way == "backward" and rows * row_bytes * queries > room:
        room = _room(way, batch, queries, keys, block_size, shape, itemsize, rows)
    per_query = rows * row_bytes
    # the table if spans had one query
    one_query_each = queries * batch * shape["K"] * (row_blocks if plain else keys) * LIST_BYTES
    length = max(64, room // per_query // 64 * 64, math.isqrt(one_query_each // per_query) // 64 * 64)
    if length >= queries:
        return queries, rows
    even = ceil_div(queries, ceil_div(queries, length))  # a short span at the end would keep few programs busy
    return ceil_div(even, 64) * 64, rows


def _room(
    way: str, batch: int, queries: int, keys: int, block_size: int, shape: dict[str, Any], itemsize: int, summed: int
) -> int:
    """Bytes of partial results held at once; `summed` rows of keys' gradients are held beside them in fp32.

    Dense attention takes, beyond its inputs, the output, the gradients, that of queries again in fp32, and where query heads share keys,
    the gradients of keys and values once for each query head (cuDNN 9.19: measured to the percent). Ours take DENSE_SHARE of that:
    partial results get what is left beside the outputs, the gradients, the lists of pairs and the numbers of each query and head.
    - Forward, where gradients are not there yet, that is more than SPAN_BYTES from about 16k tokens on; below, no more is taken than that.
    - Backward it is less. Below SPAN_SCALE, where keeping the GPU busy matters more, and where even the results alone are beyond the
      share (every query head with keys of its own), it is SPAN_BYTES.
    """
    row = batch * shape["R"] * shape["G"] * queries
    q_bytes = row * shape["D"] * itemsize
    larger = max(1, q_bytes // SPAN_SCALE)
    room = SPAN_BYTES[way] * larger
    if summed:
        room = SPAN_BYTES[way] // 2 * max(1, larger // 2)
    if not of_128(shape, itemsize):
        return room
    k_bytes = batch * keys * shape["K"] * shape["D"] * itemsize
    shared = shape["R"] * shape["G"] > shape["K"]
    dense = (6 if shared else 4) * q_bytes + 2 * k_bytes
    pairs = 8 * batch * shape["R"] * queries * shape["M"]  # the indices and the order of pairs
    if way == "forward":
        left = DENSE_SHARE * dense - q_bytes - 4 * row - pairs
        return max(room, int(left / (1 + 4 / (shape["D"] * itemsize))))  # with a log-sum-exp each
    left = DENSE_SHARE * dense - 2 * (q_bytes + k_bytes) - 20 * row - pairs  # a log-sum-exp, and what `_terms_kernel` leaves
    if q_bytes < SPAN_SCALE or left <= 0:
        return room
    left -= 8 * summed * keys * shape["D"]
    segments = 16 * block_size / (SEGMENT_ROWS * itemsize)  # partial sums of segments, for each byte of partial results
    return max(q_bytes // 8, int(left / (1 + segments)))


def narrow(shape: dict[str, Any]) -> dict[str, Any]:
    """The tile geometry of this side: a group is padded to a power of two only."""
    return shape | {"GP": power_of_two(shape["G"])}


def of_a_query(shape: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Queries of a tile that adds up partial results, and the rest of its geometry."""
    return max(1, 16 // shape["GP"]), {n: shape[n] for n in ("R", "G", "GP", "D", "DP", "M")}


def parts_at_once(shape: dict[str, Any], itemsize: int) -> int:
    """Partial results of a query that are loaded together, as registers allow."""
    return min(shape["M"], 8 if shape["DP"] * itemsize <= 256 else 2)


def forward(
    plan: Plan | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, bias: Tensor | None, lists: ReaderLists, out: Tensor, lse: Tensor,
    scale: float, strides: tuple[int, ...], shape: dict[str, Any], block_size: int,
) -> None:  # fmt: skip
    queries = q.shape[1]
    shape = narrow(shape)
    rows = 64 if 2 * block_size * shape["DP"] * q.element_size() >= BLOCK_BYTES else 128
    slots = lists.rows * lists.length * shape["M"] * (q.shape[2] // k.shape[2])
    part_o = torch.empty(slots, shape["D"], dtype=q.dtype, device=q.device)
    part_lse = torch.empty(slots if bias is None else 2 * slots, dtype=torch.float32, device=q.device)
    # a single warp: more would hand the weights of a part to each other through shared memory, and its loads would wait for that
    few, small = max(1, 4 // shape["GP"]), of_a_query(shape)[1]
    # one stage, on compute capability 9.0: what it leaves of shared memory is worth more than tiles that come ahead (measured)
    stages = 1 if of_128(shape, q.element_size()) and capability(q.get_device()) // 10 == 9 else 2
    for span in range(lists.spans):
        first = span // lists.groups * lists.length, span % lists.groups * lists.rows
        choosing = shape["R"] // shape["K"] * lists.rows
        launch(
            plan, _partial_kernel, (lists.span_items,),
            q, k, v, bias, lists.pair_order, lists.table, lists.counts, lists.item_list, part_o, part_lse, scale, queries,
            k.shape[1], *strides, span, *first, lists.length, lists.num_blocks, lists.row_blocks, lists.unit, lists.span_items, BS=block_size,
            BSP=max(16, power_of_two(block_size)), BP=max(1, rows // shape["GP"]), SEGMENT=lists.segment,
            BIAS=bias is not None, num_warps=4, num_stages=stages, **shape,
        )  # fmt: skip
        launch(
            plan, _combine_kernel, (ceil_div(lists.length, few), choosing), block_indices, part_o, part_lse, out, lse,
            queries, first[0], span % lists.groups * choosing, lists.length, BT=few, MP=power_of_two(shape["M"]),
            AT_ONCE=parts_at_once(shape, q.element_size()), BIAS=bias is not None, num_warps=1, **small,
        )  # fmt: skip
