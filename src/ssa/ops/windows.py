"""Means of overlapping windows of keys, and what a block makes of them.

Windows of `size` keys start every `stride` keys of a document; a block has r = block_size / stride of them, and size / stride - 1 more start
before it and end in it.

Legend: B batch, S keys, K kv heads, D head size, W windows, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.budget import Selection, num_windows
from ssa.ops.documents import BlockGrid
from ssa.ops.reference.select_windows import best_of_blocks, window_scores


def window_means(x: Tensor, size: int, stride: int) -> Tensor:
    """Means of the complete windows of plain rows, in x's dtype, summed in fp32 (fp64 for fp64).

    x [B, S, K, D] -> [B, W, K, D], W = `num_windows` of S. Every key is read once.
    """
    batch, keys, heads, dim = x.shape
    ratio, wide = size // stride, torch.promote_types(x.dtype, torch.float32)
    windows = num_windows(keys, size, stride)
    if not windows:
        return x.new_empty(batch, 0, heads, dim)
    pieces = windows + ratio - 1
    sums = x[:, : pieces * stride].reshape(batch, pieces, stride, heads, dim).sum(2, dtype=wide)
    total = sums[:, :windows]
    for i in range(1, ratio):
        total = total + sums[:, i : i + windows]
    return (total / size).to(x.dtype)


def grid_window_means(x: Tensor, grid: BlockGrid, size: int, stride: int) -> Tensor:
    """The same for the blocks of a grid: [B, S, K, D] -> [B, N * r, K, D]; those that are not complete hold anything."""
    own = grid.block_size
    gathered = grid.gather(x, own + size - stride)  # [B, N, keys, K, D]
    batch, blocks, keys, heads, dim = gathered.shape
    means = window_means(gathered.reshape(batch * blocks, keys, heads, dim), size, stride)
    return means.reshape(batch, -1, heads, dim)


def block_importance(window_means_BWK: Tensor, per_block: int, before: int) -> Tensor:
    """What a key's bias says of its block: the largest of the means that touch it (InfLLM-V2's pooling, for NOSA's scores).

    [B, W, K], -inf for a window that does not count -> [B, N, K], N = ceil(W / r): windows n * r - before ... n * r + r - 1 of block n.
    """
    return best_of_blocks(window_means_BWK.transpose(1, 2), per_block, before).transpose(1, 2)


def key_importance(bias: Tensor, grid: BlockGrid | None, block_size: int, size: int, stride: int) -> Tensor:
    """`block_importance` of a bias [B, S, K] of plain rows, or of the blocks of a grid; blocks without a complete window have -inf."""
    per_block, before = block_size // stride, size // stride - 1
    x = bias[..., None]
    if grid is None:
        return block_importance(window_means(x, size, stride)[..., 0], per_block, before)
    means = grid_window_means(x, grid, size, stride)[..., 0].unflatten(1, (-1, per_block))  # [B, N, r, K]
    assert grid.windows_BN is not None and grid.opens_document_BN is not None  # a grid of windows
    complete = torch.arange(per_block, device=bias.device) < grid.windows_BN[..., None]
    means = means.masked_fill(~complete[..., None], float("-inf"))
    own = means.amax(2)
    if not before:
        return own
    # the last windows of the block before, which ends in this one if it is of the same document
    tail = torch.nn.functional.pad(means[:, :-1, per_block - before :].amax(2), (0, 0, 1, 0), value=float("-inf"))
    return torch.where(grid.opens_document_BN[..., None], own, torch.maximum(own, tail))


def block_scores(q_BQHD: Tensor, means_BWKD: Tensor, first_BQ: Tensor, position_BQ: Tensor, selection: Selection) -> Tensor:
    """By which blocks are chosen, of a few queries: [B, K, Q, N] in fp32, N = ceil(W / r), `first_BQ` the row block where a query's document begins. -inf where
    no window is complete; the mean over query heads where each chooses for itself."""
    per_block, kv_heads = selection.windows_per_block, means_BWKD.shape[2]
    score = window_scores(
        q_BQHD, means_BWKD, None, first_BQ * per_block, first_BQ, position_BQ, selection.mean_size, selection.mean_stride, selection.scope,
        "softmax", q_BQHD.shape[-1] ** -0.5,
    )  # fmt: skip
    return best_of_blocks(score.unflatten(1, (kv_heads, -1)).mean(2), per_block, selection.windows_before)
