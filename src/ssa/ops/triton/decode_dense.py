"""Dense decoding: a few queries of each row against all that is cached, cut into parts that suit the row's own length.

Lengths are read on the device, so a CUDA graph captured at one length serves all. Nothing is added atomically.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, G heads that share a kv head, D head size.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.decode import combine_kernel, precision_of, workspace
from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.online_softmax import LOWEST, softmax_end, softmax_step, store_lse
from ssa.ops.triton.operation import operation


@triton.jit(do_not_specialize=["window"])
def _dense_kernel(
    q, k, v, lengths, starts, bias, out, lse_out, scale, window, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, b_b, b_s, b_h,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, PER: tl.constexpr, STARTS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A part of the keys of a kv head, for its T * G rows. A key stands for PER tokens, and is there with the last of them."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    b = (row // K).to(tl.int64)
    kv = row % K
    i = tl.arange(0, RP)
    t = i // G
    head = kv * G + i % G
    real = i < T * G
    length = tl.load(lengths + b).to(tl.int32)
    after = tl.maximum(length - T + t + 1, 0) // PER  # the first key that a row does not see
    last = tl.maximum(length, 0) // PER
    first = tl.maximum(tl.maximum(length - T + 1, 0) // PER - window, 0)
    each = tl.cdiv(tl.cdiv(last - first, PARTS), BN) * BN
    low = first + part * each
    high = tl.minimum(low + each, last)
    d = tl.arange(0, DP)
    tile_mask = real[:, None] & (d < D)[None, :]
    q_rows = q + b * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_I = tl.load(q_rows[:, None] + d[None, :], mask=tile_mask, other=0.0)
    start = tl.load(starts + b).to(tl.int64) if STARTS else b * 0
    k_row = k + b * k_b + kv.to(tl.int64) * k_h
    v_row = v + b * v_b + kv.to(tl.int64) * v_h
    peak = tl.full([RP], LOWEST, tl.float32)
    total = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, DP], tl.float32)
    for c in tl.range(low, high, BN, num_stages=STAGES):
        key = c + tl.arange(0, BN)
        inside = key < high
        column = start + key
        mask = inside[:, None] & (d < D)[None, :]
        keys = tl.load(k_row + (column * k_s)[:, None] + d[None, :], mask=mask, other=0.0)
        values = tl.load(v_row + (column * v_s)[:, None] + d[None, :], mask=mask, other=0.0)
        logits = tl.dot(q_I, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + b * b_b + kv * b_h + column * b_s, mask=inside, other=0.0).to(tl.float32)[None, :]
        seen = inside[None, :] & (key[None, :] < after[:, None]) & (key[None, :] >= (after - window)[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        peak, total, acc = softmax_step(logits, values, peak, total, acc, PRECISION)
    acc, log = softmax_end(total, acc)
    # without parts [B, T, H, D], with them [B, T, H, PARTS, D] for `combine_kernel`
    at = ((b * T + t) * (K * G) + head) * PARTS + part
    tl.store(out + (at * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    store_lse(lse_out, at, peak, log, real, BIAS and PARTS > 1)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    window: int,
    per: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.decode_dense`."""
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    lengths, starts = lengths.contiguous(), None if starts is None else starts.contiguous()
    batch, queries, heads, size = q.shape
    kv_heads, wide = k.shape[2], power_of_two(size)
    group = heads // kv_heads
    rows = max(16, power_of_two(queries * group))
    columns = max(16, min(128, 2**14 // max(16, wide) // q.dtype.itemsize, 2**14 // rows // (2 if wide > 128 else 1)))
    parts = max(1, min(ceil_div(_programs(q.device), batch * kv_heads), ceil_div(min(k.shape[1], window + queries), columns)))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = workspace(q, batch, queries, heads)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = workspace(q, batch, queries, heads, parts, size)
        part_lse = workspace(q, batch, queries, heads, parts, 1 if bias is None else 2)
    plan = plan_of(q, k, v, lengths, starts, bias, parts, per)
    launch(
        plan, _dense_kernel, (batch * kv_heads, parts), q, k, v, lengths, starts, bias, part_out, part_lse, scale, window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if bias is None else bias.stride()), T=queries, K=kv_heads,
        G=group, RP=rows, D=size, DP=max(16, wide), BN=columns, PARTS=parts, PER=per, STARTS=starts is not None, BIAS=bias is not None,
        PRECISION=precision_of(q), STAGES=3, num_warps=4 if rows <= 32 else 8,
    )  # fmt: skip
    if parts > 1:
        launch(
            plan, combine_kernel, (batch * queries * heads,), part_out, part_lse, out, lse, PARTS=parts, PP=power_of_two(parts),
            D=size, DP=max(16, wide), BIAS=bias is not None, num_warps=1,
        )  # fmt: skip
    return out, lse


@functools.cache
def _programs(device: torch.device) -> int:
    """That keep the device busy: four a multiprocessor; in the interpreter 4."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


decode_dense_op = torch.library.custom_op("ssa::decode_dense", _run, mutates_args=())


@decode_dense_op.register_fake
def _(q, k, v, lengths, starts, bias, window, per, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


decode_dense = operation(decode_dense_op, _run)
