"""The gradients of block-sparse attention from the key side (`key_side`): those of keys and values always, those of queries where the
outputs came from there.

Legend: as in `key_side`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton import key_side
from ssa.ops.triton.key_side import block_place, pair_is_there, pair_place, queries_of_span, work_item
from ssa.ops.triton.launch import Plan, capability, ceil_div, launch, power_of_two
from ssa.ops.triton.numerics import LOG2E
from ssa.ops.triton.online_softmax import load_lse
from ssa.ops.triton.reader_lists import ReaderLists


@triton.jit
def _alive(pair_order, start, stop, column, inside, T, S, J: tl.constexpr, M: tl.constexpr, PLAIN: tl.constexpr):
    """Which of a block's columns are its own. A document cut short by the next shares columns with it on paper only: no query of the
    list reads them."""
    if not PLAIN:
        if J == 1:  # pairs are in the order of their queries
            last = tl.load(pair_order + stop - 1) // M % T
        else:
            last = start * 0
            for c in range(start, stop, 1024):
                e = c + tl.arange(0, 1024)
                last = tl.maximum(last, tl.max(tl.load(pair_order + e, mask=e < stop, other=0) // M % T, 0))
        inside = inside & (column <= S - T + last)
    return inside


@triton.jit
def _leave(
    d_k, d_v, d_b, sum_k, sum_v, sum_b, local, b, kv, column, alive, d, S, K: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Stores a block's gradients at its keys' places in [B, S, K]. ADD: onto what earlier spans left; those of keys and values then
    are in [rows of the span, S]."""
    at = (b * S + column) * K + kv
    to = local.to(tl.int64) * S + column if ADD else at
    to = (to * D)[:, None] + d[None, :]
    there = alive[:, None] & (d < D)[None, :]
    if ADD:
        sum_k += tl.load(d_k + to, mask=there, other=0.0).to(tl.float32)
        sum_v += tl.load(d_v + to, mask=there, other=0.0).to(tl.float32)
    tl.store(d_k + to, sum_k.to(d_k.dtype.element_ty), mask=there)
    tl.store(d_v + to, sum_v.to(d_v.dtype.element_ty), mask=there)
    if BIAS:
        if ADD:
            sum_b += tl.load(d_b + at, mask=alive, other=0.0)
        tl.store(d_b + at, sum_b, mask=alive)


@triton.jit
def _binary(log):
    """The log of a total, to be subtracted in a power of two; -inf, where a bias masks all keys, as 0: their logits are -inf, too."""
    return tl.maximum(log, 0.0) * LOG2E


@triton.jit
def _terms(term):
    """(peak, `_binary` log, shift, first column that is not seen) [rows] of `term` [rows, 4], as `_terms_kernel` leaves them.

    They travel together, as 16 bytes a row: a load of one number a row would be made once for every thread that needs it.
    """
    even, odd = tl.split(tl.reshape(term, [term.shape[0], 2, 2]))
    peak, limit = tl.split(even)
    shift, log = tl.split(odd)
    return peak, log, shift, limit.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["span", "first_query", "first_row"])
def _dkv_kernel(
    q, k, v, d_out, lse_in, terms, bias, pair_order, table, counts, item_list, d_k, d_v, d_b, part_k, part_v,
    part_b, part_q, scale, T, S, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h, span, first_query, first_row, span_length, num_blocks, row_blocks, unit, span_items,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BSP: tl.constexpr, BP: tl.constexpr, SEGMENT: tl.constexpr, BIAS: tl.constexpr, DQ: tl.constexpr,
    ADD: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block's gradients from one segment of its readers; with DQ also every pair's part of its query's gradient. ADD: onto
    what earlier spans left."""
    block, which, part, segments, low, high = work_item(table, counts, item_list, span, num_blocks, span_items, SEGMENT)
    if block < 0:
        return
    local, row, b, kv, first = block_place(block, first_row, row_blocks, unit, K)
    J: tl.constexpr = R // K
    i = tl.program_id(1) * BSP + tl.arange(0, BSP)  # keys of a block do not need each other: large ones are cut
    d = tl.arange(0, DP)
    rows = tl.arange(0, BP * GP)
    inside = (i < BS) & (first + i < S)
    column = (first + i).to(tl.int64)
    key = tl.where(i < BS, first + i, S)
    key_mask = inside[:, None] & (d < D)[None, :]
    keys = tl.load(k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    values = tl.load(v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    if BIAS:
        key_bias = tl.load(bias + b * b_b + kv.to(tl.int64) * b_h + column * b_s, mask=inside, other=0.0).to(tl.float32)
    # rows are added up by tensor cores, as those of the keys' gradients are, into 16 columns of the same: threads that hold the sums of four
    # products have no registers to do it themselves (compiled for 9.0: 24 accesses to spilled ones a tile, then none)
    BY_DOT: tl.constexpr = DQ and q.dtype.element_ty != tl.float32
    ones = tl.full([BP * GP, 16], 1.0, q.dtype.element_ty)
    sum_b = tl.zeros([BSP, 16], tl.float32) if BY_DOT else tl.zeros([BSP], tl.float32)
    sum_k = tl.zeros([BSP, DP], tl.float32)
    sum_v = tl.zeros([BSP, DP], tl.float32)
    g = rows % GP
    q += b * q_b + (kv * J * G).to(tl.int64) * q_h
    d_out += (b * T * R + kv * J) * (G * D)
    lse_in += (b * T * R + kv * J) * (2 * G if BIAS else G)
    terms += (b * T * R + kv * J) * (G * 4 if DQ else G)
    first_pair = row * J * T * M
    for c in range(low, high, BP):
        e = c + rows // GP
        pair = tl.load(pair_order + e, mask=e < high, other=0)
        j, t, slot = pair_place(pair - first_pair, local, span_length, first_query, T, J, M)
        h = j * G + g
        real = (e < high) & (g < G)
        mask = real[:, None] & (d < D)[None, :]
        q_P = tl.load(q + (t * q_t + h.to(tl.int64) * q_h)[:, None] + d[None, :], mask=mask, other=0.0)
        head = t * (R * G) + h
        d_out_P = tl.load(d_out + (head * D)[:, None] + d[None, :], mask=mask, other=0.0)
        if DQ:
            term = tl.load(terms + (head * 4)[:, None] + tl.arange(0, 4)[None, :], mask=real[:, None], other=0.0)
            logits = tl.dot(keys, tl.trans(q_P), input_precision=PRECISION) * scale
            peak, log, shift, limit = _terms(term)
        else:
            peak, log = load_lse(lse_in, head, real, 0.0, BIAS)
            log = _binary(log)
            shift = tl.load(terms + head, mask=real, other=0.0)
            logits = tl.dot(keys, tl.trans(q_P), input_precision=PRECISION) * scale
            limit = tl.where(real, S - T + t.to(tl.int32) + 1, 0)
        if BIAS:
            p = tl.exp2((logits + key_bias[:, None] - peak[None, :]) * LOG2E - log[None, :])
        else:
            p = tl.exp2((logits - peak[None, :]) * LOG2E)
        # causal by columns, and a block never leaves its query's document
        p = tl.where(key[:, None] < limit[None, :], p, 0.0)
        sum_v += tl.dot(p.to(d_out_P.dtype), d_out_P, input_precision=PRECISION)
        d_logits = p * (tl.dot(values, tl.trans(d_out_P), input_precision=PRECISION) - shift[None, :])
        rounded = d_logits.to(q_P.dtype)
        sum_k += tl.dot(rounded, q_P, input_precision=PRECISION)
        if BIAS:
            sum_b += tl.dot(rounded, ones, input_precision=PRECISION) if BY_DOT else tl.sum(d_logits, 1)
        if DQ:
            d_q = tl.dot(tl.trans(rounded), keys, input_precision=PRECISION)
            at = (slot * G + g) * D
            tl.store(part_q + at[:, None] + d[None, :], d_q.to(part_q.dtype.element_ty), mask=mask)
    d_bias = tl.max(sum_b, 1) if BY_DOT else sum_b
    if segments == 1:
        alive = _alive(pair_order, low, high, column, inside, T, S, J, M, PLAIN)
        _leave(d_k, d_v, d_b, sum_k * scale, sum_v, d_bias, local, b, kv, column, alive, d, S, K, D, BIAS, ADD)
    else:
        slot = tl.load(table + which * 3 + 2) + part
        to = (slot.to(tl.int64) * BS + i)[:, None] * D + d[None, :]
        tl.store(part_k + to, sum_k * scale, mask=(i < BS)[:, None] & (d < D)[None, :])
        tl.store(part_v + to, sum_v, mask=(i < BS)[:, None] & (d < D)[None, :])
        if BIAS:
            tl.store(part_b + slot.to(tl.int64) * BS + i, d_bias, mask=i < BS)


@triton.jit(do_not_specialize=["span", "first_row"])
def _add_parts_kernel(
    pair_order, table, d_k, d_v, d_b, part_k, part_v, part_b, T, S, span, first_row, num_blocks, row_blocks, unit,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, BSP: tl.constexpr,
    SEGMENT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    which = span * num_blocks + block
    start = tl.load(table + which * 3)
    stop = tl.load(table + which * 3 + 1)
    segments = tl.cdiv(stop - start, SEGMENT)
    if segments < 2:
        return
    local, _, b, kv, first = block_place(block, first_row, row_blocks, unit, K)
    i = tl.program_id(1) * BSP + tl.arange(0, BSP)
    d = tl.arange(0, DP)
    inside = (i < BS) & (first + i < S)
    mask = inside[:, None] & (d < D)[None, :]
    sum_k = tl.zeros([BSP, DP], tl.float32)
    sum_v = tl.zeros([BSP, DP], tl.float32)
    sum_b = tl.zeros([BSP], tl.float32)
    begin = tl.load(table + which * 3 + 2)
    for slot in range(begin, begin + segments):
        at = (slot * BS + i).to(tl.int64)
        sum_k += tl.load(part_k + (at * D)[:, None] + d[None, :], mask=mask, other=0.0)
        sum_v += tl.load(part_v + (at * D)[:, None] + d[None, :], mask=mask, other=0.0)
        if BIAS:
            sum_b += tl.load(part_b + at, mask=inside, other=0.0)
    column = (first + i).to(tl.int64)
    alive = _alive(pair_order, start, stop, column, inside, T, S, R // K, M, PLAIN)
    _leave(d_k, d_v, d_b, sum_k, sum_v, sum_b, local, b, kv, column, alive, d, S, K, D, BIAS, ADD)


@triton.jit
def _terms_kernel(
    out, d_out, lse_in, d_lse, terms, heads, T, S, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr,
    D_LSE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """d logits = p * (d_out . v - shift), shift = d_out . out - d_lse."""
    h = tl.program_id(0).to(tl.int64) * BH + tl.arange(0, BH)
    d = tl.arange(0, DP)
    mask = (h < heads)[:, None] & (d < D)[None, :]
    at = (h * D)[:, None] + d[None, :]
    product = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) * tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(product, 1)
    if D_LSE:
        shift -= tl.load(d_lse + h, mask=h < heads, other=0.0)
    peak, log = load_lse(lse_in, h, h < heads, 0.0, BIAS)
    # causal by columns: a query stands at column S - T + t
    limit = (S - T + h // H % T + 1).to(tl.int32)
    tl.store(terms + h * 4, peak, mask=h < heads)
    tl.store(terms + h * 4 + 1, shift, mask=h < heads)
    tl.store(terms + h * 4 + 2, limit.to(tl.float32, bitcast=True), mask=h < heads)
    tl.store(terms + h * 4 + 3, _binary(log), mask=h < heads)


@triton.jit(do_not_specialize=["first_query", "first_row"])
def _add_dq_kernel(
    indices, part_q, d_q, scale, T, first_query, first_row, span_length,
    R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    g, d, real, mask, slot, query, head = queries_of_span(first_query, first_row, span_length, T, R, G, GP, D, DP, M, BT)
    acc = tl.zeros([BT * GP, DP], tl.float32)
    for c in range(0, M, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = pair_is_there(indices, query, c + i, real, M)
            at = ((slot + c + i) * G + g) * D
            acc += tl.load(part_q + at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(d_q + (head * D)[:, None] + d[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=mask)


def _tile(q: Tensor, keys: int) -> tuple[int, int, int]:
    """Rows, warps and stages of the programs that also leave the gradients of queries; measured on compute capability 9.0.

    There two groups of four warps hold the sums of 128 keys, and tensor cores take tiles of 64. Rows are read through a list, so five stages
    are what lets them come two steps ahead. GPUs with less shared memory have smaller tiles; so has fp32, which multiplies in registers.
    """
    if q.dtype != torch.float32 and 90 <= capability(q.get_device()) < 120:
        return (max(16, min(64, 8192 // keys)), 8, 5) if keys >= 128 else (32, 4, 5)
    return (32, 8, 2) if keys >= 128 else (32, 4, 3)


def backward(
    plan: Plan | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, bias: Tensor | None, lists: ReaderLists, d_out: Tensor, lse: Tensor,
    terms: Tensor, d_q: Tensor | None, d_k: Tensor, d_v: Tensor, d_b: Tensor | None, scale: float, strides: tuple[int, ...],
    shape: dict[str, Any], block_size: int,
) -> None:  # fmt: skip
    """Fills d_k, d_v [B, S, K, D] and d_b [B, S, K], zero before, and d_q where it is given."""
    queries, size = q.shape[1], q.shape[3]
    keys, device = k.shape[1], q.device
    padded = max(16, power_of_two(block_size))
    part_k, part_v = (torch.empty(lists.span_parts, block_size, size, dtype=torch.float32, device=device) for _ in range(2))
    part_b = None if bias is None else torch.empty(lists.span_parts, block_size, dtype=torch.float32, device=device)
    part_q, tile = None, padded
    if d_q is not None:
        shape = key_side.narrow(shape)
        slots = lists.rows * lists.length * shape["M"] * (q.shape[2] // k.shape[2])
        part_q = torch.empty(slots, size, dtype=q.dtype, device=device)
        rows, warps, stages = _tile(q, padded)
    else:
        rows, warps, stages = 64, 4, 2
        tile = max(16, min(padded, key_side.BLOCK_BYTES // (shape["DP"] * q.element_size())))
        if size <= 64:
            rows, warps, stages = (128 if block_size <= 16 else 64), 2, 3
        elif shape["DP"] * q.element_size() > 256:  # by the shared memory of compute capabilities 8.9 and 10.0
            rows, tile = rows // 2, max(16, tile // 2)
    few, small = key_side.of_a_query(shape)
    choosing = shape["R"] // shape["K"] * lists.rows
    sum_k, sum_v, batches = d_k, d_v, lists.spans // lists.groups
    if batches > 1:  # spans of later queries add onto what earlier ones left, in fp32; the rows of a group at a time
        sum_k, sum_v = (torch.empty(lists.rows, keys, size, dtype=torch.float32, device=device) for _ in range(2))
    how = dict(ADD=batches > 1, PLAIN=lists.unit == block_size, BIAS=bias is not None, SEGMENT=lists.segment)
    for group, batch in itertools.product(range(lists.groups), range(batches)):
        span, first = batch * lists.groups + group, (batch * lists.length, group * lists.rows)
        if batches > 1 and batch == 0:
            sum_k.zero_()
            sum_v.zero_()
        launch(
            plan, _dkv_kernel, (lists.span_items, padded // tile),
            q, k, v, d_out, lse, terms, bias, lists.pair_order, lists.table, lists.counts, lists.item_list,
            sum_k, sum_v, d_b, part_k, part_v, part_b, part_q, scale, queries, keys, *strides, span, *first, lists.length, lists.num_blocks,
            lists.row_blocks, lists.unit, lists.span_items, BS=block_size, BSP=tile, BP=max(1, rows // shape["GP"]), DQ=part_q is not None,
            num_warps=warps, num_stages=stages, **how, **shape,
        )  # fmt: skip
        launch(
            plan, _add_parts_kernel, (lists.num_blocks, padded // 16),
            lists.pair_order, lists.table, sum_k, sum_v, d_b, part_k, part_v, part_b, queries, keys, span, first[1],
            lists.num_blocks, lists.row_blocks, lists.unit, R=shape["R"], K=shape["K"], D=size, DP=shape["DP"], M=shape["M"],
            BS=block_size, BSP=16, num_warps=2, **how,
        )  # fmt: skip
        if part_q is not None:
            launch(
                plan, _add_dq_kernel, (ceil_div(lists.length, few), choosing), block_indices, part_q, d_q, scale,
                queries, first[0], group * choosing, lists.length, BT=few, AT_ONCE=key_side.parts_at_once(shape, q.element_size()),
                num_warps=4, **small,
            )  # fmt: skip
        if batches > 1 and batch == batches - 1:
            for local, row in enumerate(range(first[1], first[1] + lists.rows)):
                d_k[row // shape["K"], :, row % shape["K"]] = sum_k[local]
                d_v[row // shape["K"], :, row % shape["K"]] = sum_v[local]


def terms_of(
    plan: Plan | None, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None, keys: int, biased: bool
) -> Tensor:  # fmt: skip
    """fp32 [B, T, H, 4], see `_terms`."""
    batch, queries, heads, size = out.shape
    rows = batch * queries * heads
    terms = torch.empty(batch, queries, heads, 4, dtype=torch.float32, device=out.device)
    launch(
        plan, _terms_kernel, (ceil_div(rows, 16),), out, d_out, lse, d_lse, terms, rows, queries, keys, H=heads, D=size,
        DP=power_of_two(size), BH=16, D_LSE=d_lse is not None, BIAS=biased, num_warps=2,
    )  # fmt: skip
    return terms
