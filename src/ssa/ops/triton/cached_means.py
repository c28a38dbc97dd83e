"""Means of a cache's windows in one launch, and what blocks make of them in another.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import launch, plan_of, power_of_two
from ssa.ops.triton.operation import operation

AT_ONCE = 16
"""Tokens of a window that a program holds."""


@triton.jit
def _complete(tokens, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    return tl.maximum(tokens - SIZE + STRIDE, 0) // STRIDE


@triton.jit
def _write_mean(
    x, means, b, kv, first, window, x_b, x_s, x_h, m_b, m_n, m_h, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, CH: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, DP)
    i = tl.arange(0, CH)
    total = tl.zeros([DP], tl.float32)
    for c in range(0, SIZE, CH):
        rows = x + b * x_b + (first + c + i) * x_s + kv * x_h
        mask = (c + i < SIZE)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(means + b * m_b + window * m_n + kv * m_h + d, (total / SIZE).to(means.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["new"])
def _means_kernel(
    x, y, x_means, y_means, end, starts, new, end_b, x_b, x_s, x_h, y_b, y_s, y_h, xm_b, xm_n, xm_h, ym_b, ym_n, ym_h,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, CH: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    kv = row % K
    start = tl.load(starts + b)
    tokens = tl.load(end + b * end_b) - start
    window = _complete(tokens - new, SIZE, STRIDE) + tl.program_id(1)
    if window >= _complete(tokens, SIZE, STRIDE):
        return
    first = start + window * STRIDE
    _write_mean(x, x_means, b, kv, first, window, x_b, x_s, x_h, xm_b, xm_n, xm_h, D, DP, SIZE, CH)
    if TWO:
        _write_mean(y, y_means, b, kv, first, window, y_b, y_s, y_h, ym_b, ym_n, ym_h, D, DP, SIZE, CH)


@triton.jit(do_not_specialize=["new"])
def _importance_kernel(
    means, importance, end, starts, new, end_b, m_b, m_n, m_h, i_b, i_n, i_h, N, K: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BS: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """A block that the new windows touch: the largest of all complete ones that touch it."""
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    kv = row % K
    tokens = tl.load(end + b * end_b) - tl.load(starts + b)
    done = _complete(tokens, SIZE, STRIDE)
    begun = _complete(tokens - new, SIZE, STRIDE)
    block = begun * STRIDE // BS + tl.program_id(1)
    low = tl.maximum(block * (BS // STRIDE) - SIZE // STRIDE + 1, 0)
    high = tl.minimum((block + 1) * (BS // STRIDE), done)
    if (low >= high) | (block >= N):
        return
    window = low + tl.arange(0, WP)
    value = tl.load(means + b * m_b + window * m_n + kv * m_h, mask=window < high, other=float("-inf"))
    tl.store(importance + b * i_b + block * i_n + kv * i_h, tl.max(value, 0))


def _run(
    x: Tensor, y: Tensor | None, x_means: Tensor, y_means: Tensor | None, importance: Tensor | None, end: Tensor, starts: Tensor, new: int,
    size: int, stride: int, block_size: int,
) -> None:  # fmt: skip
    """See `ssa.ops.cached_means.extend_means`."""
    batch, _, heads, dim = x.shape
    none, end_b = (0, 0, 0), end.stride(0) if end.ndim else 0
    plan = plan_of(x, y, x_means, y_means, importance, end, starts, size, stride, block_size)
    launch(
        plan, _means_kernel, (batch * heads, new // stride + 1), x, y, x_means, y_means, end, starts, new, end_b,
        *x.stride()[:3], *(none if y is None else y.stride()[:3]), *x_means.stride()[:3], *(none if y_means is None else y_means.stride()[:3]),
        K=heads, D=dim, DP=power_of_two(dim), SIZE=size, STRIDE=stride, CH=min(AT_ONCE, power_of_two(size)), TWO=y is not None, num_warps=1,
    )  # fmt: skip
    if importance is not None:
        launch(
            plan, _importance_kernel, (batch * heads, new // block_size + 3), x_means, importance, end, starts, new, end_b,
            *x_means.stride()[:3], *importance.stride(), importance.shape[1], K=heads, SIZE=size, STRIDE=stride, BS=block_size,
            WP=power_of_two(block_size // stride + size // stride), num_warps=1,
        )  # fmt: skip


extend_means_op = torch.library.custom_op("ssa::extend_means", _run, mutates_args=("x_means", "y_means", "importance"))


@extend_means_op.register_fake
def _(x, y, x_means, y_means, importance, end, starts, new, size, stride, block_size):
    return None


extend_means = operation(extend_means_op, _run)
