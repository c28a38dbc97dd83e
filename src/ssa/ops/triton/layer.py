"""The parts of a decoder layer around its attention, for inference: PyTorch's products, of weights that share an input side by side, and what stands
between them in one kernel each. No gradients.

Legend: R tokens, C features of the input, N features of the output, B batch, T queries, H query heads, K kv heads, D head size, F features
within the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ssa.ops.triton.launch import ceil_div, launch, plan_of, power_of_two

FEW = 16
"""Tokens whose heads are shared out finely: there are not many programs otherwise."""


@triton.jit
def _norm_kernel(x, weight, out, eps, x_r, C: tl.constexpr, CP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    wide = tl.load(x + row * x_r + c, mask=c < C, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / C + eps)
    scaled = wide * factor * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, scaled.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _swiglu_kernel(both, out, F: tl.constexpr, BF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    gate = tl.load(both + row * (2 * F) + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(both + row * (2 * F) + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=f < F)


@triton.jit
def _rope_kernel(
    y, cos, sin, end, q, k, v, k_cache, v_cache, gates, end_b, cos_b, kc_b, kc_h, kc_s, vc_b, vc_h, vc_s,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr, GP: tl.constexpr, HB: tl.constexpr,
    HALF: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """HB heads of a token: queries and keys turned, keys and values put into the cache's columns that end with `end`."""
    WIDTH: tl.constexpr = (H + 2 * K) * D + GATES
    row = tl.program_id(0)
    b = (row // T).to(tl.int64)
    t = row % T
    column = tl.load(end + b * end_b) - T + t
    token = row.to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, HALF)
    lower = (d < D // 2)[None, :]
    mask = (head < H + 2 * K)[:, None] & lower
    source = y + token * WIDTH + head[:, None] * D + d[None, :]
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + D // 2, mask=mask, other=0.0)
    angle = b * cos_b + t * D + d
    c = tl.load(cos + angle, mask=d < D // 2, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=d < D // 2, other=0.0)[None, :]
    wide, upper = low.to(tl.float32), high.to(tl.float32)
    turned = (wide * c - upper * s).to(y.dtype.element_ty)
    turned_high = (upper * c + wide * s).to(y.dtype.element_ty)
    to = q + (token * H + head[:, None]) * D + d[None, :]
    tl.store(to, turned, mask=(head < H)[:, None] & lower)
    tl.store(to + D // 2, turned_high, mask=(head < H)[:, None] & lower)
    kv = head - H
    is_key = ((kv >= 0) & (kv < K))[:, None] & lower
    to = k_cache + b * kc_b + kv[:, None] * kc_h + column * kc_s + d[None, :]
    tl.store(to, turned, mask=is_key)
    tl.store(to + D // 2, turned_high, mask=is_key)
    vh = kv - K
    is_value = ((vh >= 0) & (vh < K))[:, None] & lower
    to = v_cache + b * vc_b + vh[:, None] * vc_h + column * vc_s + d[None, :]
    tl.store(to, low, mask=is_value)
    tl.store(to + D // 2, high, mask=is_value)
    if KEEP:
        to = k + (token * K + kv[:, None]) * D + d[None, :]
        tl.store(to, turned, mask=is_key)
        tl.store(to + D // 2, turned_high, mask=is_key)
        to = v + (token * K + vh[:, None]) * D + d[None, :]
        tl.store(to, low, mask=is_value)
        tl.store(to + D // 2, high, mask=is_value)
    if GATES > 0:  # noqa: SIM102 - known when it is compiled
        if tl.program_id(1) == 0:
            g = tl.arange(0, GP)
            value = tl.load(y + token * WIDTH + (H + 2 * K) * D + g, mask=g < GATES, other=0.0).to(tl.float32)
            tl.store(gates + token * GATES + g, tl.sigmoid(value), mask=g < GATES)


def side_by_side(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights as one, [sum N, C], so that one product does for all. They are moved together the first time, and are what they were: each
    a part of that memory."""
    weights = [linear.weight for linear in linears]
    first, features = weights[0], weights[0].shape[1]
    rows, at = 0, first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != at + rows * features * first.itemsize or not weight.is_contiguous():
            break
        rows += len(weight)
    else:
        size = (rows, features)
        if first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize >= rows * features * first.itemsize:
            return first.detach().as_strided(size, (features, 1))
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes could never be trained again
        together = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return together


def project(x_RC: Tensor, norm: nn.Module, linears: Sequence[nn.Linear]) -> Tensor:
    """The linears of the normed input, side by side, [R, N]."""
    out = torch.mm(normed(x_RC, norm), side_by_side(linears).t())
    at = 0
    for linear in linears:
        if linear.bias is not None:
            out[:, at : at + linear.out_features].add_(linear.bias)
        at += linear.out_features
    return out


def project_back(attended_RC: Tensor, linear: nn.Linear, x_RC: Tensor) -> Tensor:
    """x + linear(attended), in x's place, [R, C]."""
    x_RC.addmm_(attended_RC, linear.weight.t())
    return x_RC if linear.bias is None else x_RC.add_(linear.bias)


def mlp(x_RC: Tensor, norm: nn.Module, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """x + down(silu(gate) * up) of the normed input, in x's place, [R, C]."""
    both = torch.mm(normed(x_RC, norm), side_by_side([gate, up]).t())
    features = both.shape[1] // 2
    hidden = both.new_empty(len(both), features)
    block = min(1024, power_of_two(features))
    launch(
        plan_of(both), _swiglu_kernel, (len(both), ceil_div(features, block)), both, hidden, F=features, BF=block, num_warps=4
    )  # fmt: skip
    return x_RC.addmm_(hidden, down.weight.t())


def normed(x_RC: Tensor, norm: nn.Module) -> Tensor:
    """RMS norm, computed in fp32 and rounded once."""
    out = torch.empty(x_RC.shape, dtype=x_RC.dtype, device=x_RC.device)
    features = x_RC.shape[1]
    launch(
        plan_of(x_RC, norm.weight), _norm_kernel, (len(x_RC),), x_RC, norm.weight, out, norm.variance_epsilon, x_RC.stride(0),
        C=features, CP=power_of_two(features), num_warps=4 if features <= 4096 else 8,
    )  # fmt: skip
    return out


def rope_and_append(
    y_RN: Tensor, rope: tuple[Tensor, Tensor], end: Tensor, buffers: Sequence[Tensor], shape: tuple[int, int, int, int], gates: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What attention takes, from the projections side by side.

    Args:
        y_RN: q, k, v and the gates' logits of B * T tokens.
        rope: cos and sin, fp32 [B or 1, T, D], the second half of each like the first.
        end: int64, columns of the cache filled with these tokens: a scalar, or [B] of rows that end apart.
        buffers: keys and values of the cache, [B, K, S, D], written in place.
        shape: (T, H, K, D). gates: logits a token. keep: keys and values are wanted beside the cache, too.

    Returns:
        q [B, T, H, D] after RoPE, the gates fp32 [R, gates] or None, k and v [B, T, K, D] or None.
    """
    cos, sin = rope
    queries, heads, kv_heads, size = shape
    batch = len(y_RN) // queries
    q = y_RN.new_empty(batch, queries, heads, size)
    k = v = gated = None
    if keep:
        k, v = (y_RN.new_empty(batch, queries, kv_heads, size) for _ in range(2))
    if gates:
        gated = torch.empty(len(y_RN), gates, dtype=torch.float32, device=y_RN.device)
    together = 4 if len(y_RN) <= FEW else 16
    k_cache, v_cache = buffers[:2]
    launch(
        plan_of(y_RN, cos, sin, end, k_cache, v_cache, queries, heads, kv_heads, gates, keep), _rope_kernel,
        (len(y_RN), ceil_div(heads + 2 * kv_heads, together)), y_RN, cos, sin, end, q, k, v, k_cache, v_cache, gated,
        end.stride(0) if end.ndim else 0, cos.stride(0) if len(cos) > 1 else 0, *k_cache.stride()[:3], *v_cache.stride()[:3], T=queries, H=heads, K=kv_heads, D=size,
        GATES=gates, GP=power_of_two(max(1, gates)), HB=together, HALF=power_of_two(max(1, size // 2)), KEEP=keep, num_warps=1 if together == 4 else 4,
    )  # fmt: skip
    return q, gated, k, v
