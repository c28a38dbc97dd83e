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
from ssa.ops.triton.launch import Plan, ceil_div, launch, power_of_two
from ssa.ops.triton.numerics import LOG2E, natural_log
from ssa.ops.triton.online_softmax import LOWEST, load_lse, softmax_end, store_lse
from ssa.ops.triton.reader_lists import LIST_BYTES, ReaderLists

SPAN_BYTES = {"forward": 1 << 28, "backward": 1 << 28}
"""Partial results held at once, for queries of up to SPAN_SCALE bytes; more in proportion where they are larger."""
SPAN_SCALE = 1 << 28
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
            out, log = softmax_end(total, out)
        else:
            out = out / total[:, None]
        slot = slot * G + g
        tl.store(part_o + (slot * D)[:, None] + d[None, :], out.to(part_o.dtype.element_ty), mask=mask)
        if not BIAS:
            log = natural_log(total)
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
    BIAS: tl.constexpr,
):  # fmt: skip
    """A query's partial outputs, weighted by exp(lse of the pair - lse)."""
    g, d, real, mask, slot, query, head = queries_of_span(first_query, first_row, span_length, T, R, G, GP, D, DP, M, BT)
    peak = tl.full([BT * GP], LOWEST, tl.float32)
    total = tl.zeros([BT * GP], tl.float32)
    acc = tl.zeros([BT * GP, DP], tl.float32)
    for m in range(M):
        there = real & (tl.load(indices + query + m, mask=real, other=-1) >= 0)
        at = (slot + m) * G + g
        part, log = load_lse(part_lse, at, there, float("-inf"), BIAS)
        piece = tl.load(part_o + (at * D)[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        higher = tl.maximum(peak, part)
        shrink = tl.exp2((peak - higher) * LOG2E)
        gap = part - higher
        if BIAS:
            gap += log
        weight = tl.exp2(gap * LOG2E)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + piece.to(tl.float32) * weight[:, None]
        peak = higher
    acc, log = softmax_end(total, acc)
    tl.store(out + (head * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    store_lse(lse_out, head, peak, log, real, BIAS)


def limits() -> tuple[int, ...]:
    """What decides, beside the arguments, how the work is cut."""
    return *SPAN_BYTES.values(), SPAN_SCALE, SPAN_BLOCKS, SEGMENT_ROWS, BLOCK_BYTES, reader_lists.MAP_BYTES


def span_of(
    way: str, batch: int, queries: int, row_blocks: int, names: int, shape: dict[str, Any], itemsize: int
) -> tuple[int, int]:
    """Queries, a multiple of 64, and rows of a span: all where their partial results fit, otherwise fewer rows, down to SPAN_BLOCKS
    blocks between them, and then fewer queries; more, where the table of lists (one for each of `names` a row and span, which with
    documents are many) would outgrow the partial results.

    Spans of fewer queries add up the gradients of keys in fp32. The backward pass then holds fewer partial results beside those.
    """
    rows = batch * shape["K"]
    row_bytes = shape["R"] // shape["K"] * shape["M"] * shape["G"] * shape["D"] * itemsize
    larger = max(1, queries * rows * row_bytes // shape["M"] // SPAN_SCALE)
    room = SPAN_BYTES[way] * larger
    while rows % 2 == 0 and rows * row_bytes * queries > room and rows // 2 * row_blocks >= SPAN_BLOCKS:
        rows //= 2
    if way == "backward" and rows * row_bytes * queries > room:
        room = SPAN_BYTES[way] // 2 * max(1, larger // 2)
    per_query = rows * row_bytes
    one_query_each = queries * batch * shape["K"] * names * LIST_BYTES  # the table if spans had one query
    length = max(room // per_query, math.isqrt(one_query_each // per_query))
    return min(queries, max(64, length // 64 * 64)), rows


def narrow(shape: dict[str, Any]) -> dict[str, Any]:
    """The tile geometry of this side: a group is padded to a power of two only."""
    return shape | {"GP": power_of_two(shape["G"])}


def of_a_query(shape: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Queries of a tile that adds up partial results, and the rest of its geometry."""
    return max(1, 16 // shape["GP"]), {n: shape[n] for n in ("R", "G", "GP", "D", "DP", "M")}


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
    few, small = of_a_query(shape)
    for span in range(lists.spans):
        first = span // lists.groups * lists.length, span % lists.groups * lists.rows
        choosing = shape["R"] // shape["K"] * lists.rows
        launch(
            plan, _partial_kernel, (lists.span_items,),
            q, k, v, bias, lists.pair_order, lists.table, lists.counts, lists.item_list, part_o, part_lse, scale, queries,
            k.shape[1], *strides, span, *first, lists.length, lists.num_blocks, lists.row_blocks, lists.unit, lists.span_items, BS=block_size,
            BSP=max(16, power_of_two(block_size)), BP=max(1, rows // shape["GP"]), SEGMENT=lists.segment,
            BIAS=bias is not None, num_warps=4, num_stages=2, **shape,
        )  # fmt: skip
        launch(
            plan, _combine_kernel, (ceil_div(lists.length, few), choosing), block_indices, part_o, part_lse, out, lse,
            queries, first[0], span % lists.groups * choosing, lists.length, BT=few, BIAS=bias is not None, num_warps=4, num_stages=3, **small,
        )  # fmt: skip
