"""Block-sparse attention: forward and dq walk a query's blocks, dk and dv walk a block's readers (`key_side`).

With few query heads a kv head and large blocks everything walks the block's readers. Which side is taken depends on shapes alone.

The GPU has 2^x, not e^x. Logits stay natural until their reference point is subtracted: the product with log2(e) then rounds a small
number instead of a large one.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), G = H / R, D head size, M selected
blocks, N key blocks of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton import key_gradients, key_side
from ssa.ops.triton.launch import contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E
from ssa.ops.triton.online_softmax import LOWEST, load_lse, softmax_end, softmax_step, store_lse
from ssa.ops.triton.operation import operation
from ssa.ops.triton.reader_lists import reader_lists

SEGMENT = 256
"""Pairs of a work item."""
PART_BYTES = 1 << 26
"""Partial sums of keys' gradients, and of values', held at once."""


@triton.jit
def _query(
    q, positions, T, S, q_b, q_t, q_h, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """This program's query: (batch row, who selects, query, heads, columns, their mask, q [GP, DP], position and start of its document)."""
    t = tl.program_id(0)
    b = (tl.program_id(1) // R).to(tl.int64)
    r = tl.program_id(1) % R
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    if PLAIN:
        position = S - T + t
        start = 0
    else:
        position = tl.load(positions + b * T + t).to(tl.int32)
        start = S - T + t - position
    mask = (g < G)[:, None] & (d < D)[None, :]
    rows = q + b * q_b + t.to(tl.int64) * q_t + ((r * G + g).to(tl.int64) * q_h)[:, None]
    return b, r, t, g, d, mask, tl.load(rows + d[None, :], mask=mask, other=0.0), position, start


@triton.jit
def _keys_of_step(
    indices, slots, query, c, position, start, M: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Of the keys c ... c + BN - 1 of a query's selection: which it sees, their columns, and which columns are safe to read. SLOTS: blocks
    lie where `slots` says."""
    j = tl.arange(0, BN)
    if BS % BN == 0:  # of one block: addresses are one base and steps known in advance
        block = tl.load(indices + query * M + c // BS)
        key = tl.maximum(block, 0) * BS + c % BS + j
        seen = key <= tl.where(block < 0, -1, position)
        safe = seen
        column = tl.load(slots + query * M + c // BS).to(tl.int64) * BS + c % BS + j if SLOTS else start + key
    else:
        slot = (c + j) // BS
        block = tl.load(indices + query * M + slot, mask=slot < M, other=-1)
        key = block * BS + (c + j) % BS
        seen = (block >= 0) & (key <= position)
        if SLOTS:
            safe = seen
            column = tl.load(slots + query * M + slot, mask=slot < M, other=0).to(tl.int64) * BS + (c + j) % BS
        else:
            safe = tl.full([BN], 1, tl.int1)
            column = start + tl.where(seen, key, 0)
    return seen, column.to(tl.int64), safe


@triton.jit
def _forward_kernel(
    q, k, v, indices, positions, bias, slots, out, lse_out, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, BIAS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, r, t, g, d, tile_mask, q_G, position, start = _query(q, positions, T, S, q_b, q_t, q_h, R, G, GP, D, DP, PLAIN)
    kv = r // (R // K)
    query = (b * R + r) * T + t
    peak = tl.full([GP], LOWEST, tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for c in range(0, M * BS, BN):
        seen, column, safe = _keys_of_step(indices, slots, query, c, position, start, M, BS, BN, SLOTS)
        keys = tl.load(
            k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[None, :] + d[:, None],
            mask=safe[None, :] & (d < D)[:, None],
            other=0.0,
        )
        values = tl.load(
            v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[:, None] + d[None, :],
            mask=safe[:, None] & (d < D)[None, :],
            other=0.0,
        )
        logits = tl.dot(q_G, keys, input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=safe, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        peak, total, acc = softmax_step(logits, values, peak, total, acc, PRECISION)
    acc, log = softmax_end(total, acc)
    head = (b * T + t) * (R * G) + r * G + g
    tl.store(out + (head * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    store_lse(lse_out, head, peak, log, g < G, BIAS)


@triton.jit
def _dq_kernel(
    q, k, v, indices, positions, bias, out, lse_in, d_out, d_lse, shift_out, d_q, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, BIAS: tl.constexpr, D_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, r, t, g, d, tile_mask, q_G, position, start = _query(q, positions, T, S, q_b, q_t, q_h, R, G, GP, D, DP, PLAIN)
    kv = r // (R // K)
    head = (b * T + t) * (R * G) + r * G + g
    d_out_G = tl.load(d_out + (head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
    out_G = tl.load(out + (head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
    # d logits = p * (d_out . v - shift)
    shift = tl.sum(d_out_G.to(tl.float32) * out_G.to(tl.float32), 1)
    if D_LSE:
        shift -= tl.load(d_lse + head, mask=g < G, other=0.0)
    tl.store(shift_out + head, shift, mask=g < G)
    peak, log = load_lse(lse_in, head, g < G, 0.0, BIAS)
    if BIAS:
        log = tl.maximum(log, 0.0)  # -inf where all keys are masked: their logits are -inf, too
    query = (b * R + r) * T + t
    acc = tl.zeros([GP, DP], tl.float32)
    for c in range(0, M * BS, BN):
        seen, column, safe = _keys_of_step(indices, None, query, c, position, start, M, BS, BN, False)
        keys = tl.load(
            k + b * k_b + kv.to(tl.int64) * k_h + (column * k_s)[:, None] + d[None, :],
            mask=safe[:, None] & (d < D)[None, :],
            other=0.0,
        )
        values = tl.load(
            v + b * v_b + kv.to(tl.int64) * v_h + (column * v_s)[None, :] + d[:, None],
            mask=safe[None, :] & (d < D)[:, None],
            other=0.0,
        )
        logits = tl.dot(q_G, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=safe, other=0.0).to(tl.float32)[None, :]
        p = tl.where(seen[None, :], tl.exp2((logits - peak[:, None] - log[:, None]) * LOG2E), 0.0)
        d_logits = p * (tl.dot(d_out_G, values, input_precision=PRECISION) - shift[:, None])
        acc += tl.dot(d_logits.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(d_q + (head * D)[:, None] + d[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=tile_mask)


def _geometry(q: Tensor, k: Tensor, block_indices: Tensor) -> dict[str, Any]:
    heads, size = q.shape[2:]
    selectors = block_indices.shape[1]
    group = heads // selectors
    return dict(
        R=selectors, K=k.shape[2], G=group, GP=max(16, power_of_two(group)), D=size, M=block_indices.shape[3],
        DP=max(16, power_of_two(size)), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def _lse_shape(q: Tensor, bias: Tensor | None) -> torch.Size | tuple[int, ...]:
    return q.shape[:3] if bias is None else (*q.shape[:3], 2)


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] contiguous in q's dtype, lse fp32 [B, T, H]; with a bias [B, T, H, 2], two numbers whose sum it is (`store_lse`)."""
    batch, queries = q.shape[:2]
    q, k, v, block_indices = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), block_indices.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q, bias), dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    shape = _geometry(q, k, block_indices)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_bias_strides(bias))
    plan = plan_of(q, k, v, block_indices, positions, bias, slots, block_size, "forward", SEGMENT, *key_side.limits())
    if slots is None and _from_the_key_side(q, shape, block_size, k.shape[1]):
        span = _span("forward", q, k, positions, shape, block_size)
        lists = reader_lists(plan, block_indices, positions, k.shape[1], block_size, span, SEGMENT, k.shape[2])
        key_side.forward(plan, q, k, v, block_indices, bias, lists, out, lse, scale, strides, shape, block_size)
        return out, lse
    columns = _columns(shape, block_size)
    launch(
        plan, _forward_kernel, (queries, batch * shape["R"]),
        q, k, v, block_indices, positions, bias, slots, out, lse, scale, queries, k.shape[1], *strides, BS=block_size, BN=columns,
        PLAIN=positions is None, BIAS=bias is not None, SLOTS=slots is not None, num_warps=1, num_stages=3, **shape,
    )  # fmt: skip
    return out, lse


def _from_the_key_side(q: Tensor, shape: dict[str, Any], block_size: int, keys: int) -> bool:
    """Whether outputs and query gradients come from the key side, too: where reading a block costs each query more bytes (twice
    block_size rows) than its part of the result does (three times G rows, written and read), with some margin, and a block
    has enough readers to share it. A block's keys must leave room in shared memory, too."""
    readers = q.shape[1] * shape["M"] * block_size / keys
    fits = block_size * shape["DP"] * q.element_size() <= key_side.BLOCK_BYTES
    return block_size >= 4 * shape["G"] and readers >= 32 and fits


def _span(way: str, q: Tensor, k: Tensor, positions: Tensor | None, shape: dict[str, Any], block_size: int) -> tuple[int, int]:
    return key_side.span_of(way, q.shape[0], q.shape[1], k.shape[1], block_size, positions is None, shape, q.element_size())


def _columns(shape: dict[str, Any], block_size: int) -> int:
    """Keys of one step. Small steps by single warps, many in flight, hide the latency of gathered keys best (measured)."""
    return max(16, min(32, power_of_two(shape["M"] * block_size)))


block_sparse_forward = torch.library.custom_op("ssa::block_sparse_forward", _run_forward, mutates_args=())


@block_sparse_forward.register_fake
def _(q, k, v, block_indices, positions, bias, slots, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q, bias), dtype=torch.float32)


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    d_out: Tensor, d_lse: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v and d_bias (empty without a bias)."""
    batch, queries, _, size = q.shape
    keys = k.shape[1]
    if not q.numel():
        return (
            torch.zeros_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            q.new_empty(0) if bias is None else torch.zeros_like(bias),
        )
    q, k, v, block_indices, d_out = (
        contiguous_rows(q),
        contiguous_rows(k),
        contiguous_rows(v),
        block_indices.contiguous(),
        d_out.contiguous(),
    )
    d_lse = None if d_lse is None else d_lse.contiguous()
    shape = _geometry(q, k, block_indices)
    selectors = shape["R"]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_bias_strides(bias))
    plan = plan_of(
        q,
        k,
        v,
        block_indices,
        positions,
        bias,
        out,
        lse,
        d_out,
        d_lse,
        block_size,
        "backward",
        SEGMENT,
        PART_BYTES,
        *key_side.limits(),
    )
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    all_from_keys = _from_the_key_side(q, shape, block_size, keys)
    if all_from_keys:
        terms = key_gradients.terms_of(plan, out, d_out, lse, d_lse, keys, bias is not None)
        span = _span("backward", q, k, positions, shape, block_size)
    else:
        terms = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        span = queries, batch * k.shape[2]
        launch(
            plan, _dq_kernel, (queries, batch * selectors),
            q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse, terms, d_q, scale, queries, keys, *strides, BS=block_size,
            BN=_columns(shape, block_size), PLAIN=positions is None, BIAS=bias is not None, D_LSE=d_lse is not None, num_warps=1,
            num_stages=3, **shape,
        )  # fmt: skip
    # sums of fp32 inputs keep their precision in short segments; long ones leave fewer partial sums in memory
    segment = min(max(1, 256 // shape["G"]), SEGMENT) if q.dtype == torch.float32 else SEGMENT
    if all_from_keys and q.dtype != torch.float32:
        segment = max(1, key_side.SEGMENT_ROWS // shape["G"])
    while 2 * span[0] * span[1] * (selectors // k.shape[2]) * shape["M"] // segment * block_size * size * 4 > PART_BYTES:
        segment *= 2
    lists = reader_lists(plan, block_indices, positions, keys, block_size, span, segment, k.shape[2])
    d_k, d_v = (torch.zeros(k.shape, dtype=k.dtype, device=q.device) for _ in range(2))
    d_b = None if bias is None else torch.zeros(batch, keys, k.shape[2], dtype=torch.float32, device=q.device)
    key_gradients.backward(
        plan, q, k, v, block_indices, bias, lists, d_out, lse, terms, d_q if all_from_keys else None, d_k, d_v, d_b, scale, strides,
        shape, block_size,
    )  # fmt: skip
    d_bias = q.new_empty(0) if bias is None or d_b is None else d_b.to(bias.dtype)
    return d_q, d_k, d_v, d_bias


block_sparse_backward = torch.library.custom_op("ssa::block_sparse_backward", _run_backward, mutates_args=())


@block_sparse_backward.register_fake
def _(q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse, block_size, scale):
    d_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, positions, bias, _, ctx.block_size, ctx.scale = inputs  # with slots nobody asks for gradients
    out, lse = output
    ctx.save_for_backward(q, k, v, block_indices, positions, bias, out, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, block_indices, positions, bias, out, lse = ctx.saved_tensors
    if d_lse is not None and bias is not None:
        d_lse = d_lse[..., 0]  # of a sum
    if d_out is None:
        d_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_bias = _differentiate(
        q, k, v, block_indices, positions, bias, out, lse, d_out, d_lse, ctx.block_size, ctx.scale
    )
    return d_q, d_k, d_v, None, None, (None if bias is None else d_bias), None, None, None


_attend = operation(block_sparse_forward, _run_forward, _setup_context, _backward)
_differentiate = operation(block_sparse_backward, _run_backward)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.block_sparse_attention`; `positions` None = plain rows."""
    positions = None if positions is None else positions.contiguous()
    slots = None if slots is None else slots.contiguous()
    out, lse = _attend(q, k, v, block_indices, positions, bias, slots, block_size, scale)
    return out, lse if bias is None else lse.sum(-1)
