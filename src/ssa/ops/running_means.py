"""Block means of a cache, kept up token by token.

Legend: B batch, S cache columns, K kv heads, D head size, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.implementations import resolve
from ssa.ops.reference.running_means import extend_block_means as by_reference


def extend_block_means(
    k: Tensor, v: Tensor, means: list[Tensor], sums: list[Tensor], end: Tensor, starts: Tensor, block_size: int, impl: str = "auto"
) -> None:  # fmt: skip
    """Adds the token in column `end` - 1 of each row to the running block means, in place, in O(D) and without looking at `end`.

    The mean of a block that is still open is the sum so far over `block_size`; it is final with the block's last token.

    Args:
        k, v: [B, S, K, D], any strides: the cache.
        means: of keys and values, [B, N, K, D] each, N > (end - 1 - start) // block_size.
        sums: of keys and values, fp32 (fp64 for fp64) [B, K, D] each, contiguous: over the tokens of each row's last block so far.
        end: int64 scalar, filled columns. starts: int64 [B], first column of each row.
        impl: "auto", "reference" or "triton".
    """
    with torch.no_grad():
        if resolve(impl, k) == "triton":
            from ssa.ops.triton.running_means import extend_block_means as by_triton

            by_triton(k, v, means[0], means[1], sums[0], sums[1], end, starts, block_size)
        else:
            by_reference(k, v, means[0], means[1], sums[0], sums[1], end, starts, block_size)
