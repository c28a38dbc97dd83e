"""Running means in one launch.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks, R = size / stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import launch, plan_of, power_of_two
from ssa.ops.triton.operation import operation


@triton.jit
def _mean(
    x, means, sums, row, b, kv, column, place, last, x_b, x_s, x_h, m_b, m_n, m_h, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Adds the token and writes the mean of the window that ends where its stretch does; returns the mean."""
    R: tl.constexpr = SIZE // STRIDE
    d = tl.arange(0, DP)
    mask = d < D
    stretch = place // STRIDE
    going_on = place % STRIDE > 0  # else the sum is that of the stretch R before
    new = tl.load(x + b * x_b + column * x_s + kv * x_h + d, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([DP], tl.float32)
    for i in tl.static_range(R):
        to = sums + (row * R + i) * D + d
        part = tl.load(to, mask=mask, other=0.0)
        if stretch % R == i:
            part = tl.where(going_on, part, 0.0) + new
            tl.store(to, part, mask=mask)
        total += part
    mean = total / SIZE
    window = stretch - R + 1
    window = tl.where(window < 0, last, window)
    tl.store(means + b * m_b + window * m_n + kv * m_h + d, mean.to(means.dtype.element_ty), mask=mask)
    return mean


@triton.jit
def _add_token_kernel(
    x, y, x_means, y_means, x_sums, y_sums, importance, end, starts, last, x_b, x_s, x_h, y_b, y_s, y_h, xm_b, xm_n, xm_h, ym_b, ym_n, ym_h,
    i_b, i_n, i_h, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BS: tl.constexpr,
    TWO: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    kv = row % K
    column = tl.load(end) - 1
    place = tl.maximum(column - tl.load(starts + b), 0)
    mean = _mean(x, x_means, x_sums, row, b, kv, column, place, last, x_b, x_s, x_h, xm_b, xm_n, xm_h, D, DP, SIZE, STRIDE)
    if TWO:
        _mean(y, y_means, y_sums, row, b, kv, column, place, last, y_b, y_s, y_h, ym_b, ym_n, ym_h, D, DP, SIZE, STRIDE)
    if POOL:
        first = place + 1 - SIZE
        if (first >= 0) & ((place + 1) % STRIDE == 0):  # a window is complete, which touches its own block and maybe the next
            value = tl.max(tl.where(tl.arange(0, DP) < D, mean, float("-inf")), 0)
            here = importance + b * i_b + kv * i_h + first // BS * i_n
            tl.store(here, tl.maximum(tl.load(here), value))
            if place // BS > first // BS:
                here = importance + b * i_b + kv * i_h + place // BS * i_n
                tl.store(here, tl.maximum(tl.load(here), value))


def _run(
    x: Tensor, y: Tensor | None, x_means: Tensor, y_means: Tensor | None, x_sums: Tensor, y_sums: Tensor | None, importance: Tensor | None,
    end: Tensor, starts: Tensor, size: int, stride: int, block_size: int,
) -> None:  # fmt: skip
    """See `ssa.ops.running_means.extend_means`."""
    batch, _, heads, dim = x.shape
    none = (0, 0, 0)
    launch(
        plan_of(x, y, x_means, y_means, x_sums, y_sums, importance, end, starts, size, stride, block_size), _add_token_kernel,
        (batch * heads,), x, y, x_means, y_means, x_sums, y_sums, importance, end, starts, x_means.shape[1] - 1, *x.stride()[:3],
        *(none if y is None else y.stride()[:3]), *x_means.stride()[:3], *(none if y_means is None else y_means.stride()[:3]),
        *(none if importance is None else importance.stride()), K=heads, D=dim, DP=power_of_two(dim), SIZE=size, STRIDE=stride,
        BS=block_size or size, TWO=y is not None, POOL=importance is not None, num_warps=1,
    )  # fmt: skip


extend_means_op = torch.library.custom_op(
    "ssa::extend_means", _run, mutates_args=("x_means", "y_means", "x_sums", "y_sums", "importance")
)


@extend_means_op.register_fake
def _(x, y, x_means, y_means, x_sums, y_sums, importance, end, starts, size, stride, block_size):
    return None


extend_means = operation(extend_means_op, _run)
