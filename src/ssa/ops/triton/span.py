"""Attention of every query to one span of keys: flash attention whose rows carry their own first and last key.

NSA's compression branch reads the complete blocks before a query and its window the last keys, each a span that moves forward with
the query. A tile holds some tokens times all query heads of one kv head, and walks from its lowest first key to its highest last
key. The backward pass has one kernel per side; tiles of keys with many readers split them, and the parts are added in a fixed
order, so every gradient is bitwise reproducible.

The GPU has 2^x, not e^x. Logits stay natural until their reference point is subtracted: the product with log2(e) then rounds a small
number instead of a large one.

Legend: B batch, T queries, H query heads, K kv heads, G = H / K, GP = G padded to a power of two, D head size, N keys or pooled
blocks, R = tokens * GP rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E
from ssa.ops.triton.online_softmax import LOWEST, softmax_end, softmax_step
from ssa.ops.triton.operation import operation

PROGRAMS = 512  # of the key side, where splitting the readers helps: a few for every multiprocessor
MOST_PARTS = 32
PART_BYTES = 1 << 26  # of them that serve precision


@triton.jit
def _queries(
    q, low, high, T, N, q_b, q_t, q_h, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """This program's tile of queries: (batch row, kv head, columns, rows that exist, their mask, their places in [B, T, H], the spans of
    keys that they read, q [rows, DP])."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles read the most: start them first
    b = (tl.program_id(1) // K).to(tl.int64)
    kv = tl.program_id(1) % K
    row = tl.arange(0, BT * GP)
    t = tile * BT + row // GP
    h = kv * G + row % GP
    real = (t < T) & (row % GP < G)
    d = tl.arange(0, DP)
    mask = real[:, None] & (d < D)[None, :]
    start = tl.load(low + b * T + t, mask=t < T, other=N)
    stop = tl.load(high + b * T + t, mask=t < T, other=0)
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h
    q_R = tl.load(q_rows[:, None] + d[None, :], mask=mask, other=0.0)
    return b, kv, d, real, mask, (b * T + t) * (K * G) + h, start, stop, q_R


@triton.jit
def _forward_kernel(
    q, k, v, low, high, out, lse_out, scale, T, N, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, kv, d, real, mask, own, start, stop, q_R = _queries(q, low, high, T, N, q_b, q_t, q_h, K, G, GP, D, DP, BT)
    k_base = k + b * k_b + kv.to(tl.int64) * k_h
    v_base = v + b * v_b + kv.to(tl.int64) * v_h
    peak = tl.full([BT * GP], LOWEST, tl.float32)
    total = tl.zeros([BT * GP], tl.float32)
    acc = tl.zeros([BT * GP, DP], tl.float32)
    for c in range(tl.min(start), tl.max(stop), BN):
        n = c + tl.arange(0, BN)
        near = (n < N)[:, None] & (d < D)[None, :]
        keys = tl.load(k_base + n.to(tl.int64)[:, None] * k_n + d[None, :], mask=near, other=0.0)
        values = tl.load(v_base + n.to(tl.int64)[:, None] * v_n + d[None, :], mask=near, other=0.0)
        seen = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
        logits = tl.dot(q_R, tl.trans(keys), input_precision=PRECISION) * scale
        logits = tl.where(seen, logits, float("-inf"))
        peak, total, acc = softmax_step(logits, values, peak, total, acc, PRECISION)
    acc, log = softmax_end(total, acc)
    tl.store(out + (own * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse_out + own, peak + log, mask=real)


@triton.jit
def _dq_kernel(
    q, k, v, low, high, out, lse_in, d_out, d_lse, shift_out, d_q, scale, T, N, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    D_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, kv, d, real, mask, own, start, stop, q_R = _queries(q, low, high, T, N, q_b, q_t, q_h, K, G, GP, D, DP, BT)
    d_out_R = tl.load(d_out + (own * D)[:, None] + d[None, :], mask=mask, other=0.0)
    out_R = tl.load(out + (own * D)[:, None] + d[None, :], mask=mask, other=0.0)
    # d logits = p * (d_out . v - shift)
    shift = tl.sum(d_out_R.to(tl.float32) * out_R.to(tl.float32), 1)
    if D_LSE:
        shift -= tl.load(d_lse + own, mask=real, other=0.0)
    tl.store(shift_out + own, shift, mask=real)
    lse = tl.load(lse_in + own, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    k_base = k + b * k_b + kv.to(tl.int64) * k_h
    v_base = v + b * v_b + kv.to(tl.int64) * v_h
    acc = tl.zeros([BT * GP, DP], tl.float32)
    for c in range(tl.min(start), tl.max(stop), BN):
        n = c + tl.arange(0, BN)
        near = (n < N)[:, None] & (d < D)[None, :]
        keys = tl.load(k_base + n.to(tl.int64)[:, None] * k_n + d[None, :], mask=near, other=0.0)
        values = tl.load(v_base + n.to(tl.int64)[:, None] * v_n + d[None, :], mask=near, other=0.0)
        seen = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
        logits = tl.dot(q_R, tl.trans(keys), input_precision=PRECISION) * scale
        p = tl.exp2((tl.where(seen, logits, float("-inf")) - lse[:, None]) * LOG2E)
        d_logits = p * (tl.dot(d_out_R, tl.trans(values), input_precision=PRECISION) - shift[:, None])
        acc += tl.dot(d_logits.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(d_q + (own * D)[:, None] + d[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_kernel(
    q, k, v, low, high, lse_in, shift_in, d_out, first_reader, last_reader, d_k, d_v, scale, T, N,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    b = (tl.program_id(2) // K).to(tl.int64)
    kv = tl.program_id(2) % K
    n = tile * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    near = (n < N)[:, None] & (d < D)[None, :]
    k_rows = k + b * k_b + kv.to(tl.int64) * k_h + n.to(tl.int64) * k_n
    v_rows = v + b * v_b + kv.to(tl.int64) * v_h + n.to(tl.int64) * v_n
    keys = tl.load(k_rows[:, None] + d[None, :], mask=near, other=0.0)
    values = tl.load(v_rows[:, None] + d[None, :], mask=near, other=0.0)
    begin = tl.load(first_reader + b * tl.num_programs(0) + tile)
    end = tl.load(last_reader + b * tl.num_programs(0) + tile)
    share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), BT) * BT
    begin += part * share
    end = tl.minimum(begin + share, end)
    row = tl.arange(0, BT * GP)
    h = kv * G + row % GP
    sum_k = tl.zeros([BN, DP], tl.float32)
    sum_v = tl.zeros([BN, DP], tl.float32)
    for c in range(begin, end, BT):
        t = c + row // GP
        real = (t < end) & (row % GP < G)
        mask = real[:, None] & (d < D)[None, :]
        start = tl.load(low + b * T + t, mask=real, other=0)
        stop = tl.load(high + b * T + t, mask=real, other=0)
        own = (b * T + t) * (K * G) + h
        q_rows = q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h
        q_R = tl.load(q_rows[:, None] + d[None, :], mask=mask, other=0.0)
        d_out_R = tl.load(d_out + (own * D)[:, None] + d[None, :], mask=mask, other=0.0)
        lse = tl.load(lse_in + own, mask=real, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        shift = tl.load(shift_in + own, mask=real, other=0.0)
        seen = (n[:, None] >= start[None, :]) & (n[:, None] < stop[None, :])
        logits = tl.dot(keys, tl.trans(q_R), input_precision=PRECISION) * scale
        p = tl.exp2((tl.where(seen, logits, float("-inf")) - lse[None, :]) * LOG2E)
        sum_v += tl.dot(p.to(d_out_R.dtype), d_out_R, input_precision=PRECISION)
        d_logits = p * (tl.dot(values, tl.trans(d_out_R), input_precision=PRECISION) - shift[None, :])
        sum_k += tl.dot(d_logits.to(q_R.dtype), q_R, input_precision=PRECISION)
    batch = tl.num_programs(2) // K
    to = ((((part * batch + b) * N + n) * K + kv) * D)[:, None] + d[None, :]
    tl.store(d_k + to, (sum_k * scale).to(d_k.dtype.element_ty), mask=near)
    tl.store(d_v + to, sum_v.to(d_v.dtype.element_ty), mask=near)


def _geometry(q: Tensor, k: Tensor, by_queries: bool) -> dict[str, Any]:
    """Shape constants and the tile of the kernels that go by queries, or by keys: 64 rows by 64 keys where a row of q takes 256 bytes,
    fewer where it takes more, so that no kernel needs 100 KiB of shared memory, and for IEEE fp32, which multiplies in registers."""
    heads, size = q.shape[2:]
    group = heads // k.shape[2]
    padded = max(16, power_of_two(size))
    wide = power_of_two(group)
    weight = padded * q.element_size() * (2 if q.dtype == torch.float32 else 1)
    side = max(16, min(64, 64 * 256 // weight))
    rows = 128 if by_queries and weight <= 128 else side
    return dict(
        K=k.shape[2], G=group, GP=wide, D=size, DP=padded, BT=max(1, rows // wide), BN=side,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4 if padded <= 64 else 8, num_stages=2,
    )  # fmt: skip


def _run_forward(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] contiguous in q's dtype, lse [B, T, H] fp32; low, high int32 [B, T]."""
    batch, queries, heads, _ = q.shape
    q, k, v, low, high = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), low.contiguous(), high.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    shape = _geometry(q, k, True)
    plan = plan_of(q, k, v, low, high, "forward")
    launch(
        plan, _forward_kernel, (ceil_div(queries, shape["BT"]), batch * shape["K"]), q, k, v, low, high, out, lse, scale,
        queries, k.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **shape,
    )  # fmt: skip
    return out, lse


span_forward = torch.library.custom_op("ssa::span_attention", _run_forward, mutates_args=())


@span_forward.register_fake
def _(q, k, v, low, high, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v."""
    batch, queries, _, _ = q.shape
    keys = k.shape[1]
    q, k, v, low, high, d_out = (
        contiguous_rows(q),
        contiguous_rows(k),
        contiguous_rows(v),
        low.contiguous(),
        high.contiguous(),
        d_out.contiguous(),
    )
    d_lse = None if d_lse is None else d_lse.contiguous()
    plan = plan_of(q, k, v, low, high, out, lse, d_out, d_lse, "backward", PROGRAMS, MOST_PARTS, PART_BYTES)
    shape = _geometry(q, k, True)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shift = torch.empty_like(lse)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        plan, _dq_kernel, (ceil_div(queries, shape["BT"]), batch * shape["K"]),
        q, k, v, low, high, out, lse, d_out, d_lse, shift, d_q, scale, queries, keys,
        *strides, D_LSE=d_lse is not None, **shape,
    )  # fmt: skip

    shape = _geometry(q, k, False)
    tiles = ceil_div(keys, shape["BN"])
    first_key = torch.arange(0, keys, shape["BN"], dtype=torch.int32, device=q.device).expand(batch, tiles).contiguous()
    # spans move forward, so the readers of a tile are neighbours
    first_reader = torch.searchsorted(high, first_key, right=True, out_int32=True)
    last_reader = torch.searchsorted(low, first_key + shape["BN"], out_int32=True)
    parts = max(1, PROGRAMS // (tiles * batch * shape["K"]))
    if q.dtype == torch.float32:  # long chains of sums lose the last bits of fp32
        parts = max(parts, min(ceil_div(queries, shape["BT"]), PART_BYTES // (4 * k.numel())))
    parts = min(MOST_PARTS, parts)
    d_k, d_v = (torch.empty(parts, *k.shape, dtype=k.dtype if parts == 1 else torch.float32, device=q.device) for _ in range(2))
    launch(
        plan, _dkv_kernel, (tiles, parts, batch * shape["K"]), q, k, v, low, high, lse, shift, d_out, first_reader, last_reader,
        d_k, d_v, scale, queries, keys, *strides, **shape,
    )  # fmt: skip
    if parts == 1:
        return d_q, d_k[0], d_v[0]
    return d_q, d_k.sum(0).to(k.dtype), d_v.sum(0).to(v.dtype)


span_backward = torch.library.custom_op("ssa::span_attention_backward", _run_backward, mutates_args=())


@span_backward.register_fake
def _(q, k, v, low, high, out, lse, d_out, d_lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low, high, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, low, high, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, low, high, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    return *_differentiate(q, k, v, low, high, out, lse, d_out, d_lse, ctx.scale), None, None, None


_attend = operation(span_forward, _run_forward, _setup_context, _backward)
_differentiate = operation(span_backward, _run_backward)


def span_attention(
    q_BTHD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, low_BT: Tensor, high_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Query t of row b attends to the keys low[b, t] <= n < high[b, t] of N; both must not fall from one query to the next.

    Returns out [B, T, H, D] in q's dtype and lse [B, T, H], fp32; zero and -inf where that is no key.
    """
    return _attend(q_BTHD, k_BNKD, v_BNKD, low_BT.to(torch.int32), high_BT.to(torch.int32), scale)
