"""Means of a cache's blocks or windows, kept up as tokens come.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.implementations import resolve
from ssa.ops.reference.cached_means import extend_means as by_reference


def extend_means(
    x: list[Tensor], means: list[Tensor], end: Tensor, starts: Tensor, new: int, size: int, stride: int, *,
    importance: Tensor | None = None, block_size: int = 0, impl: str = "auto",
) -> None:  # fmt: skip
    """Writes the means of the windows that the last `new` tokens of each row complete, in place and without looking at `end`.

    A window is read when it is complete. So nothing is summed up from call to call, and a cache may be cut, or tokens be replaced, at will:
    whatever a later token completes is right again.

    Args:
        x: one or two tensors [B, S, K, D], any strides: keys (and values) of the cache, or the bias with D = 1.
        means: of each, [B, W, K, D], W at least the windows of S tokens. Places of windows that no row has completed stay as they are.
        end: int64, filled columns: a scalar, or [B] of rows that end apart. starts: int64 [B], first column of each row.
        new: tokens since the last call.
        size, stride: a window of `size` tokens starts every `stride` tokens of a row. Equal: blocks.
        importance: fp32 [B, N, K], with D = 1: the largest mean of complete windows that touch a block of `block_size` tokens, kept up, too.
        impl: "auto", "reference" or "triton".
    """
    with torch.no_grad():
        arguments = (x[0], x[1] if len(x) > 1 else None, means[0], means[1] if len(x) > 1 else None, importance, end, starts, new, size, stride,
                     block_size)  # fmt: skip
        if resolve(impl, x[0]) == "triton":
            from ssa.ops.triton.cached_means import extend_means as by_triton

            by_triton(*arguments)
        else:
            by_reference(*arguments)
