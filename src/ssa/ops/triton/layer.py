"""The parts of a decoder layer around its attention, fused for inference: of a few tokens, whose products are as fast as weights are read, and
of many, whose products PyTorch does best. No gradients.

Legend: R tokens, C features of the input, N features of the output, B batch, T queries, H query heads, K kv heads, D head size, F features
within the MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ssa.ops.triton.launch import ceil_div, launch, plan_of, power_of_two

FEW = 16
"""Tokens whose products are made here."""


@triton.jit
def _product(x, w, at, acc, mask, PRECISION: tl.constexpr):
    """acc + x w^T of one tile of the weight's rows, which are read once."""
    tile = tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")
    return tl.dot(x, tl.trans(tile), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["R"])
def _few_kernel(
    x, norm, gates, w0, w1, w2, w3, b0, b1, b2, residual, out, eps, R, x_r, out_r,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, C: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, BIASES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN features of one of up to four weights that share their input. NORM: of the input's RMS norm, whose factor is known when all of it has
    been read. GATE: of the input times its heads' gates, heads of GATE features. SWIGLU: silu of the first weight's times the second's.
    BIASES: so many of the first weights, three at most, have one."""
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = P0 if SWIGLU else P0 + (N1 + BN - 1) // BN
    P2: tl.constexpr = P1 + (N2 + BN - 1) // BN
    pid = tl.program_id(0)
    w = w0
    if P1 > P0:  # noqa: SIM102 - known when it is compiled
        if pid >= P0:
            w = w1
    if N2 > 0:  # noqa: SIM102 - known when it is compiled
        if pid >= P1:
            w = w2
    if N3 > 0:  # noqa: SIM102 - known when it is compiled
        if pid >= P2:
            w = w3
    count = tl.where(pid >= P2, N3, tl.where(pid >= P1, N2, tl.where(pid >= P0, N1, N0)))
    before = tl.where(pid >= P2, N0 + N1 + N2, tl.where(pid >= P1, N0 + N1, tl.where(pid >= P0, N0, 0)))
    first = (pid - tl.where(pid >= P2, P2, tl.where(pid >= P1, P1, tl.where(pid >= P0, P0, 0)))) * BN
    r = tl.arange(0, RP)
    n = first + tl.arange(0, BN)
    some = tl.arange(0, BC)
    acc = tl.zeros([RP, BN], tl.float32)
    up = tl.zeros([RP, BN], tl.float32)
    square = tl.zeros([RP], tl.float32)
    for start in tl.range(0, C, BC, num_stages=STAGES):
        c = start + some
        there = (r < R)[:, None] & (c < C)[None, :]
        tile = tl.load(x + r[:, None] * x_r + c[None, :], mask=there, other=0.0)
        if NORM:
            wide = tile.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            tile = (wide * tl.load(norm + c, mask=c < C, other=0.0).to(tl.float32)[None, :]).to(tile.dtype)
        if GATE > 0:
            gate = tl.load(gates + r[:, None] * (C // GATE) + (c // GATE)[None, :], mask=there, other=0.0)
            tile = (tile.to(tl.float32) * gate).to(tile.dtype)
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        mask = (n < count)[:, None] & (c < C)[None, :]
        acc = _product(tile, w, at, acc, mask, PRECISION)
        if SWIGLU:
            up = _product(tile, w1, at, up, mask, PRECISION)
    if NORM:
        factor = tl.rsqrt(square / C + eps)[:, None]
        acc *= factor
        up *= factor
    if BIASES > 0:
        bias = b0
        if BIASES > 1:  # noqa: SIM102 - known when it is compiled
            if pid >= P0:
                bias = b1
        if BIASES > 2:  # noqa: SIM102 - known when it is compiled
            if pid >= P1:
                bias = b2
        mine = pid < (P0 if BIASES == 1 else (P1 if BIASES == 2 else P2))
        acc += tl.load(bias + n, mask=(n < count) & mine, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        acc = acc * tl.sigmoid(acc) * up
    to = r[:, None] * out_r + before + n[None, :]
    mask = (r < R)[:, None] & (n < count)[None, :]
    if RESIDUAL:
        acc += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=mask)


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


def _few(
    x: Tensor, linears: Sequence[nn.Linear], *, norm: nn.Module | None = None, gates: Tensor | None = None, swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[R, C] of few tokens -> [R, N], the linears' results side by side."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    counts = [len(weight) for weight in weights]
    rows, features = x.shape
    width = counts[0] if swiglu else sum(counts)
    out = x.new_empty(rows, width)
    four = [*counts, 0, 0, 0][:4]
    columns, block, stages = _tile(width, features, x.dtype, x.device)
    given = [*weights, None, None, None][:4]
    biased = sum(bias is not None for bias in biases)
    assert biased <= 3 and all(bias is not None for bias in biases[:biased])
    plan = plan_of(
        x, None if norm is None else norm.weight, gates, *given, *(b for b in biases), residual, swiglu, columns, block, stages
    )  # fmt: skip
    programs = ceil_div(counts[0], columns) if swiglu else sum(ceil_div(count, columns) for count in counts)
    launch(
        plan, _few_kernel, (programs,), x, None if norm is None else norm.weight, gates, *given, *[*biases, None, None][:3], residual,
        out, 0.0 if norm is None else norm.variance_epsilon, rows, x.stride(0), out.stride(0), N0=four[0], N1=four[1],
        N2=four[2], N3=four[3], C=features, RP=max(16, power_of_two(rows)), BN=columns, BC=block, NORM=norm is not None,
        GATE=0 if gates is None else features // gates.shape[-1], SWIGLU=swiglu, RESIDUAL=residual is not None, BIASES=biased,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out


@functools.cache
def _tile(width: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """(features of the output, of the input, stages) of a program: enough programs for every multiprocessor, enough bytes under way."""
    columns = 16 if width < 32768 else 64
    block = min(512 if columns == 16 else 128, max(16, power_of_two(features))) // (dtype.itemsize // 2)
    return columns, max(16, block), 4


def project(x_RC: Tensor, norm: nn.Module, linears: Sequence[nn.Linear]) -> Tensor:
    """The linears of the normed input, side by side, [R, N]."""
    if len(x_RC) <= FEW:
        return _few(x_RC, linears, norm=norm)
    return _side_by_side(normed(x_RC, norm), linears)


def project_back(attended_RC: Tensor, gates_RH: Tensor | None, linear: nn.Linear, x_RC: Tensor) -> Tensor:
    """x + linear(gated heads), [R, C]; gates only of few tokens."""
    if len(x_RC) <= FEW:
        return _few(attended_RC, [linear], gates=gates_RH, residual=x_RC)
    out = torch.addmm(x_RC, attended_RC, linear.weight.t())
    return out if linear.bias is None else out.add_(linear.bias)


def mlp(x_RC: Tensor, norm: nn.Module, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """x + down(silu(gate) * up) of the normed input, [R, C]."""
    if len(x_RC) <= FEW:
        return _few(_few(x_RC, [gate, up], norm=norm, swiglu=True), [down], residual=x_RC)
    both = _side_by_side(normed(x_RC, norm), [gate, up])
    features = both.shape[1] // 2
    hidden = both.new_empty(len(both), features)
    block = min(1024, power_of_two(features))
    launch(
        plan_of(both), _swiglu_kernel, (len(both), ceil_div(features, block)), both, hidden, F=features, BF=block, num_warps=4
    )  # fmt: skip
    return torch.addmm(x_RC, hidden, down.weight.t())


def _side_by_side(x_RC: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    out = x_RC.new_empty(len(x_RC), sum(len(linear.weight) for linear in linears))
    for linear, part in zip(linears, out.split([len(linear.weight) for linear in linears], 1), strict=True):
        if linear.bias is None:
            torch.mm(x_RC, linear.weight.t(), out=part)
        else:
            torch.addmm(linear.bias, x_RC, linear.weight.t(), out=part)
    return out


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
