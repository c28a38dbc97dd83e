"""Means of a cache's blocks or windows, kept up token by token.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks, r = size / stride.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.implementations import resolve
from ssa.ops.reference.running_means import extend_means as by_reference


def extend_means(
    x: list[Tensor], means: list[Tensor], sums: list[Tensor], end: Tensor, starts: Tensor, size: int, stride: int, *,
    importance: Tensor | None = None, block_size: int = 0, impl: str = "auto",
) -> None:  # fmt: skip
    """Adds the token in column `end` - 1 of each row to running means, in place, in O(D) and without looking at `end`.

    The mean of a window that is still open is the sum so far over `size`; it is final with the window's last token.

    Args:
        x: one or two tensors [B, S, K, D], any strides: keys (and values) of the cache, or the bias with D = 1.
        means: of each, [B, W, K, D]; the last place takes what belongs to no window.
        sums: of each, fp32 (fp64 for fp64) [B, K, r, D], contiguous: over the row's last stretches of `stride` tokens, stretch p at p % r.
        end: int64 scalar, filled columns. starts: int64 [B], first column of each row.
        size, stride: a window of `size` tokens starts every `stride` tokens of a row. Equal: blocks.
        importance: fp32 [B, N, K], with D = 1: the largest mean that touches a block of `block_size` tokens, kept up, too.
        impl: "auto", "reference" or "triton".
    """
    with torch.no_grad():
        arguments = (x[0], x[1] if len(x) > 1 else None, means[0], means[1] if len(x) > 1 else None, sums[0], sums[1] if len(x) > 1 else None,
                     importance, end, starts, size, stride, block_size)  # fmt: skip
        if resolve(impl, x[0]) == "triton":
            from ssa.ops.triton.running_means import extend_means as by_triton

            by_triton(*arguments)
        else:
            by_reference(*arguments)
