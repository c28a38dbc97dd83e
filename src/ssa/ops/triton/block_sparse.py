"""Block-sparse attention: forward and dq walk a query's blocks, dk and dv walk a block's queries.

The lists of queries that read each block come from one stable sort of the (block, query) pairs. Blocks that many queries read are
cut into segments of SEGMENT pairs, one program each; their partial sums are added in a fixed order, so every gradient is bitwise
reproducible.

The GPU has 2^x, not e^x. Logits stay natural until their reference point is subtracted: the product with log2(e) then rounds a small
number instead of a large one.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), G = H / R, D head size, M selected
blocks, N key blocks of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
SEGMENT = 256


@triton.jit
def _forward_kernel(
    q, k, v, indices, positions, bias, out, lse_out, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // R).to(tl.int64)
    r = row % R
    kv = r // (R // K)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    j = tl.arange(0, BN)
    if PLAIN:
        position = S - T + t
        start = 0
    else:
        position = tl.load(positions + b * T + t).to(tl.int32)
        start = S - T + t - position
    tile_mask = (g < G)[:, None] & (d < D)[None, :]
    q_G = tl.load(
        q + b * q_b + t.to(tl.int64) * q_t + ((r * G + g).to(tl.int64) * q_h)[:, None] + d[None, :], mask=tile_mask, other=0.0
    )
    query = (b * R + r) * T + t
    peak = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for c in range(0, M * BS, BN):
        slot = (c + j) // BS
        block = tl.load(indices + query * M + slot, mask=slot < M, other=-1)
        key = block * BS + (c + j) % BS
        seen = (block >= 0) & (key <= position)
        column = (start + tl.where(seen, key, 0)).to(tl.int64)
        keys = tl.load(
            k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0
        )
        values = tl.load(
            v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0
        )
        logits = tl.dot(q_G, keys, input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s).to(tl.float32)[None, :]
        logits = tl.where(seen[None, :], logits, -1e30)
        higher = tl.maximum(peak, tl.max(logits, 1))
        p = tl.where(seen[None, :], tl.exp2((logits - higher[:, None]) * LOG2E), 0.0)
        shrink = tl.exp2((peak - higher) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        peak = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), peak + tl.log2(total) * 0.6931471805599453)
    head = (b * T + t) * (R * G) + r * G + g
    tl.store(out + (head * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    tl.store(lse_out + head, lse, mask=g < G)


@triton.jit
def _dq_kernel(
    q, k, v, indices, positions, bias, out, lse_in, d_out, d_lse, shift_out, d_q, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, BIAS: tl.constexpr, D_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // R).to(tl.int64)
    r = row % R
    kv = r // (R // K)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    j = tl.arange(0, BN)
    if PLAIN:
        position = S - T + t
        start = 0
    else:
        position = tl.load(positions + b * T + t).to(tl.int32)
        start = S - T + t - position
    tile_mask = (g < G)[:, None] & (d < D)[None, :]
    q_G = tl.load(
        q + b * q_b + t.to(tl.int64) * q_t + ((r * G + g).to(tl.int64) * q_h)[:, None] + d[None, :], mask=tile_mask, other=0.0
    )
    head = (b * T + t) * (R * G) + r * G + g
    d_out_G = tl.load(d_out + (head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
    out_G = tl.load(out + (head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
    # d logits = p * (d_out . v - shift)
    shift = tl.sum(d_out_G.to(tl.float32) * out_G.to(tl.float32), 1)
    if D_LSE:
        shift -= tl.load(d_lse + head, mask=g < G, other=0.0)
    tl.store(shift_out + head, shift, mask=g < G)
    lse = tl.load(lse_in + head, mask=g < G, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    query = (b * R + r) * T + t
    acc = tl.zeros([GP, DP], tl.float32)
    for c in range(0, M * BS, BN):
        slot = (c + j) // BS
        block = tl.load(indices + query * M + slot, mask=slot < M, other=-1)
        key = block * BS + (c + j) % BS
        seen = (block >= 0) & (key <= position)
        column = (start + tl.where(seen, key, 0)).to(tl.int64)
        keys = tl.load(
            k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0
        )
        values = tl.load(
            v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0
        )
        logits = tl.dot(q_G, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s).to(tl.float32)[None, :]
        p = tl.where(seen[None, :], tl.exp2((logits - lse[:, None]) * LOG2E), 0.0)
        d_logits = p * (tl.dot(d_out_G, values, input_precision=PRECISION) - shift[:, None])
        acc += tl.dot(d_logits.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(d_q + (head * D)[:, None] + d[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=tile_mask)


@triton.jit
def _dkv_kernel(
    q, k, v, d_out, lse_in, shift_in, bias, pair_order, block_start, item_end, part_end, item_block, d_k, d_v, d_b, part_k, part_v,
    part_b, scale, T, S, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h, num_blocks, row_blocks, unit,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BSP: tl.constexpr, BP: tl.constexpr, SEGMENT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    block = tl.load(item_block + item)
    if block >= num_blocks:
        return
    start = tl.load(block_start + block)
    stop = tl.load(block_start + block + 1)
    segments = tl.cdiv(stop - start, SEGMENT)
    part = item - (tl.load(item_end + block) - segments)
    low = start + part * SEGMENT
    high = tl.minimum(low + SEGMENT, stop)
    row = block // row_blocks
    first = (block % row_blocks) * unit
    b = (row // R).to(tl.int64)
    r = row % R
    kv = r // (R // K)
    i = tl.arange(0, BSP)
    d = tl.arange(0, DP)
    rows = tl.arange(0, BP * GP)
    inside = (i < BS) & (first + i < S)
    column = (first + i).to(tl.int64)
    key_mask = inside[:, None] & (d < D)[None, :]
    keys = tl.load(k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    values = tl.load(v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[:, None] + d[None, :], mask=key_mask, other=0.0)
    if BIAS:
        key_bias = tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=inside, other=0.0).to(tl.float32)
    sum_b = tl.zeros([BSP], tl.float32)
    sum_k = tl.zeros([BSP, DP], tl.float32)
    sum_v = tl.zeros([BSP, DP], tl.float32)
    g = rows % GP
    for c in range(low, high, BP):
        e = c + rows // GP
        pair = tl.load(pair_order + e, mask=e < high, other=0)
        t = (pair // M % T).to(tl.int32)
        real = (e < high) & (g < G)
        mask = real[:, None] & (d < D)[None, :]
        q_P = tl.load(
            q + b * q_b + (t.to(tl.int64) * q_t + (r * G + g).to(tl.int64) * q_h)[:, None] + d[None, :], mask=mask, other=0.0
        )
        head = (b * T + t) * (R * G) + r * G + g
        d_out_P = tl.load(d_out + (head * D)[:, None] + d[None, :], mask=mask, other=0.0)
        lse = tl.load(lse_in + head, mask=real, other=0.0)
        shift = tl.load(shift_in + head, mask=real, other=0.0)
        logits = tl.dot(keys, tl.trans(q_P), input_precision=PRECISION) * scale
        if BIAS:
            logits += key_bias[:, None]
        # causal by columns: the query stands at column S - T + t, and a block never leaves its query's document
        seen = real[None, :] & inside[:, None] & ((first + i)[:, None] <= (S - T + t)[None, :])
        p = tl.where(seen, tl.exp2((logits - lse[None, :]) * LOG2E), 0.0)
        sum_v += tl.dot(p.to(d_out_P.dtype), d_out_P, input_precision=PRECISION)
        d_logits = p * (tl.dot(values, tl.trans(d_out_P), input_precision=PRECISION) - shift[None, :])
        if BIAS:
            sum_b += tl.sum(d_logits, 1)
        sum_k += tl.dot(d_logits.to(q_P.dtype), q_P, input_precision=PRECISION)
    # Blocks of one document that is cut short by the next share columns with it on paper only: nobody's query reads them there.
    if segments == 1:
        to = (((b * S + column) * R + r) * D)[:, None] + d[None, :]
        alive = key_mask & (column <= S - T + _last_query(pair_order, stop, M, T))[:, None]
        tl.store(d_k + to, (sum_k * scale).to(d_k.dtype.element_ty), mask=alive)
        tl.store(d_v + to, sum_v.to(d_v.dtype.element_ty), mask=alive)
        if BIAS:
            tl.store(d_b + (b * S + column) * R + r, sum_b, mask=inside & (column <= S - T + _last_query(pair_order, stop, M, T)))
    else:
        slot = tl.load(part_end + block) - segments + part
        to = (slot.to(tl.int64) * BS + i)[:, None] * D + d[None, :]
        tl.store(part_k + to, sum_k * scale, mask=(i < BS)[:, None] & (d < D)[None, :])
        tl.store(part_v + to, sum_v, mask=(i < BS)[:, None] & (d < D)[None, :])
        if BIAS:
            tl.store(part_b + slot.to(tl.int64) * BS + i, sum_b, mask=i < BS)


@triton.jit
def _last_query(pair_order, stop, M: tl.constexpr, T):
    """The last query that reads a block; pairs of a block are in the order of their queries."""
    return (tl.load(pair_order + stop - 1) // M % T).to(tl.int32)


@triton.jit
def _add_parts_kernel(
    pair_order, block_start, part_end, item_block, item_end, d_k, d_v, d_b, part_k, part_v, part_b, T, S, num_blocks, row_blocks,
    unit, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, BSP: tl.constexpr,
    SEGMENT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = tl.load(block_start + block)
    stop = tl.load(block_start + block + 1)
    segments = tl.cdiv(stop - start, SEGMENT)
    if segments < 2:
        return
    row = block // row_blocks
    first = (block % row_blocks) * unit
    b = (row // R).to(tl.int64)
    r = row % R
    i = tl.arange(0, BSP)
    d = tl.arange(0, DP)
    mask = (i < BS)[:, None] & (d < D)[None, :]
    sum_k = tl.zeros([BSP, DP], tl.float32)
    sum_v = tl.zeros([BSP, DP], tl.float32)
    sum_b = tl.zeros([BSP], tl.float32)
    begin = tl.load(part_end + block) - segments
    for slot in range(begin, begin + segments):
        at = (slot * BS + i).to(tl.int64)
        sum_k += tl.load(part_k + (at * D)[:, None] + d[None, :], mask=mask, other=0.0)
        sum_v += tl.load(part_v + (at * D)[:, None] + d[None, :], mask=mask, other=0.0)
        if BIAS:
            sum_b += tl.load(part_b + at, mask=i < BS, other=0.0)
    column = (first + i).to(tl.int64)
    alive = (i < BS) & (column <= S - T + _last_query(pair_order, stop, M, T))
    to = (((b * S + column) * R + r) * D)[:, None] + d[None, :]
    tl.store(d_k + to, sum_k.to(d_k.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :])
    tl.store(d_v + to, sum_v.to(d_v.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :])
    if BIAS:
        tl.store(d_b + (b * S + column) * R + r, sum_b, mask=alive)


def _geometry(q: Tensor, k: Tensor, block_indices: Tensor) -> dict[str, Any]:
    heads, size = q.shape[2:]
    selectors = block_indices.shape[1]
    group = heads // selectors
    return dict(
        R=selectors, K=k.shape[2], G=group, GP=max(16, triton.next_power_of_2(group)), D=size, M=block_indices.shape[3],
        DP=max(16, triton.next_power_of_2(size)), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()


@torch.library.custom_op("ssa::block_sparse_forward", mutates_args=())
def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] contiguous in q's dtype, lse [B, T, H] fp32."""
    batch, queries, heads, _ = q.shape
    q, k, v, block_indices = _rows(q), _rows(k), _rows(v), block_indices.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    shape = _geometry(q, k, block_indices)
    columns = _columns(shape, block_size)
    _forward_kernel[(queries, batch * shape["R"])](
        q, k, v, block_indices, positions, bias, out, lse, scale, queries, k.shape[1], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *_bias_strides(bias), BS=block_size, BN=columns, PLAIN=positions is None, BIAS=bias is not None,
        num_warps=1, num_stages=3, **shape,
    )  # fmt: skip
    return out, lse


def _columns(shape: dict[str, Any], block_size: int) -> int:
    """Keys of one step. Small steps by single warps, many in flight, hide the latency of gathered keys best (measured)."""
    return max(16, min(32, triton.next_power_of_2(shape["M"] * block_size)))


@block_sparse_forward.register_fake
def _(q, k, v, block_indices, positions, bias, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("ssa::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    d_out: Tensor, d_lse: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v and d_bias (empty without a bias)."""
    batch, queries, _, size = q.shape
    keys = k.shape[1]
    q, k, v, block_indices, d_out = _rows(q), _rows(k), _rows(v), block_indices.contiguous(), d_out.contiguous()
    shape = _geometry(q, k, block_indices)
    selectors, selected = shape["R"], shape["M"]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_bias_strides(bias))
    shift = torch.empty_like(lse)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    columns = _columns(shape, block_size)
    _dq_kernel[(queries, batch * selectors)](
        q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse.contiguous() if d_lse is not None else None, shift, d_q, scale,
        queries, keys, *strides, BS=block_size, BN=columns, PLAIN=positions is None, BIAS=bias is not None,
        D_LSE=d_lse is not None, num_warps=1, num_stages=3, **shape,
    )  # fmt: skip

    lists = _reader_lists(block_indices, positions, keys, block_size)
    # query heads that choose for themselves share a kv head: their gradients are added afterwards
    own = selectors == k.shape[2]
    wide = k.dtype if own else torch.float32
    d_k, d_v = (torch.zeros(batch, keys, selectors, size, dtype=wide, device=q.device) for _ in range(2))
    parts = 2 * (block_indices.numel() // SEGMENT) + 1
    part_k, part_v = (torch.empty(parts, block_size, size, dtype=torch.float32, device=q.device) for _ in range(2))
    d_b = part_b = None
    if bias is not None:
        d_b = torch.zeros(batch, keys, selectors, dtype=torch.float32, device=q.device)
        part_b = torch.empty(parts, block_size, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(block_size))
    per_step = max(1, (128 if size <= 64 and block_size <= 16 else 64) // shape["GP"])
    _dkv_kernel[(len(lists.item_block),)](
        q, k, v, d_out, lse, shift, bias, lists.pair_order, lists.block_start, lists.item_end, lists.part_end, lists.item_block, d_k, d_v,
        d_b, part_k, part_v, part_b, scale, queries, keys, *strides, lists.num_blocks, lists.row_blocks, lists.unit, BS=block_size,
        BSP=padded, BP=per_step, SEGMENT=SEGMENT, BIAS=bias is not None, num_warps=2 if size <= 64 else 4, num_stages=3 if size <= 64 else 2,
        **shape,
    )  # fmt: skip
    _add_parts_kernel[(lists.num_blocks,)](
        lists.pair_order, lists.block_start, lists.part_end, lists.item_block, lists.item_end, d_k, d_v, d_b, part_k, part_v, part_b,
        queries, keys, lists.num_blocks, lists.row_blocks, lists.unit, R=selectors, D=size, DP=shape["DP"], M=selected, BS=block_size,
        BSP=padded, SEGMENT=SEGMENT, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    if not own:
        fold = (batch, keys, k.shape[2], selectors // k.shape[2])
        d_k, d_v = (x.view(*fold, size).sum(3).to(k.dtype) for x in (d_k, d_v))
        d_b = None if d_b is None else d_b.view(fold).sum(3)
    d_bias = q.new_empty(0) if bias is None or d_b is None else d_b.to(bias.dtype)
    return d_q, d_k, d_v, d_bias


@block_sparse_backward.register_fake
def _(q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse, block_size, scale):
    d_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


class _ReaderLists(NamedTuple):
    """For every key block the (query, slot) pairs that read it, as work items of at most SEGMENT pairs. No host sync."""

    pair_order: Tensor
    """Pairs, numbered as in block_indices [B, R, T, M], grouped by block, in the order of their queries."""
    block_start: Tensor
    """int32 [blocks + 1]: where each block's pairs begin."""
    item_end: Tensor
    """int32 [blocks]: running number of work items."""
    part_end: Tensor
    """int32 [blocks]: running number of items of blocks that need several."""
    item_block: Tensor
    """int32 [items]: the block of each item; `num_blocks` where there is no such item."""
    num_blocks: int
    row_blocks: int
    unit: int
    """Keys between the first columns of neighbouring block names."""


def _reader_lists(block_indices: Tensor, positions: Tensor | None, keys: int, block_size: int) -> _ReaderLists:
    batch, selectors, queries, _ = block_indices.shape
    device = block_indices.device
    rows = torch.arange(batch * selectors, dtype=torch.int32, device=device).view(batch, selectors, 1, 1)
    if positions is None:
        row_blocks, unit = -(-keys // block_size), block_size
        name = block_indices
    else:  # documents start anywhere: a block is named by its first column
        row_blocks, unit = keys, 1
        start = torch.arange(keys - queries, keys, device=device) - positions
        name = start.to(torch.int32)[:, None, :, None] + block_indices * block_size
    num_blocks = batch * selectors * row_blocks
    # keys of two bytes halve the passes of the radix sort
    dtype = torch.int16 if num_blocks < 2**15 else torch.int32
    name = torch.where(block_indices < 0, num_blocks, rows * row_blocks + name).to(dtype).flatten()
    name, pair_order = name.sort(stable=True)
    grid = torch.arange(num_blocks + 1, device=device, dtype=dtype)
    block_start = torch.searchsorted(name, grid, out_int32=True)
    segments = (block_start.diff() + (SEGMENT - 1)) // SEGMENT
    item_end = segments.cumsum(0, dtype=torch.int32)
    part_end = torch.where(segments > 1, segments, 0).cumsum(0, dtype=torch.int32)
    items = min(num_blocks, block_indices.numel()) + block_indices.numel() // SEGMENT
    item_block = torch.searchsorted(item_end, torch.arange(items, device=device, dtype=torch.int32), right=True, out_int32=True)
    return _ReaderLists(pair_order, block_start, item_end, part_end, item_block, num_blocks, row_blocks, unit)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, positions, bias, ctx.block_size, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, block_indices, positions, bias, out, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, block_indices, positions, bias, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_bias = block_sparse_backward(
        q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse, ctx.block_size, ctx.scale
    )
    return d_q, d_k, d_v, None, None, (None if bias is None else d_bias), None, None


block_sparse_forward.register_autograd(_backward, setup_context=_setup_context)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.block_sparse_attention`; `positions` None = plain rows."""
    positions = None if positions is None else positions.contiguous()
    return block_sparse_forward(q, k, v, block_indices, positions, bias, block_size, scale)
