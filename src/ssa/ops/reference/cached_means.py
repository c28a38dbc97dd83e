"""Means of a cache's windows in plain PyTorch.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_means(
    x_BSKD: Tensor, y_BSKD: Tensor | None, x_means_BWKD: Tensor, y_means_BWKD: Tensor | None, importance_BNK: Tensor | None, end: Tensor,
    starts_B: Tensor, new: int, size: int, stride: int, block_size: int,
) -> None:  # fmt: skip
    """See `ssa.ops.cached_means.extend_means`."""
    tokens_B, room, device = end - starts_B, x_BSKD.shape[1], end.device
    begun_B, done_B = (_complete(tokens_B - tokens, size, stride) for tokens in (new, 0))
    pairs = [(x_BSKD, x_means_BWKD)]
    if y_BSKD is not None and y_means_BWKD is not None:
        pairs.append((y_BSKD, y_means_BWKD))
    if not x_means_BWKD.shape[1]:
        return
    rows_B1 = torch.arange(len(starts_B), device=device)[:, None]
    # Rows complete different numbers of windows: where one has no more, its last one is written again, or what is there.
    window_BW = torch.minimum(begun_B[:, None] + torch.arange(new // stride + 1, device=device), done_B[:, None] - 1).clamp(min=0)
    some_B111 = (begun_B < done_B)[:, None, None, None]
    column_BWs = (starts_B[:, None, None] + window_BW[..., None] * stride + torch.arange(size, device=device)).clamp(0, room - 1)
    for x, means in pairs:
        mean = x[rows_B1[..., None], column_BWs].sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) / size
        means[rows_B1, window_BW] = torch.where(some_B111, mean.to(means.dtype), means[rows_B1, window_BW])
    if importance_BNK is None:
        return
    per_block, before = block_size // stride, size // stride - 1
    last_B1 = torch.minimum((done_B * stride + size - stride - 1) // block_size, torch.tensor(importance_BNK.shape[1] - 1))[
        :, None
    ]
    block_BN = torch.minimum(
        begun_B[:, None] * stride // block_size + torch.arange(new // block_size + 3, device=device), last_B1
    ).clamp(min=0)
    touching_BNW = block_BN[..., None] * per_block + torch.arange(-before, per_block, device=device)
    counts_BNW = (touching_BNW >= 0) & (touching_BNW < done_B[:, None, None])
    found = x_means_BWKD[rows_B1[..., None], touching_BNW.clamp(0, x_means_BWKD.shape[1] - 1), :, 0]
    best_BNK = found.masked_fill(~counts_BNW[..., None], float("-inf")).amax(2)
    importance_BNK[rows_B1, block_BN] = torch.where(some_B111[..., 0], best_BNK, importance_BNK[rows_B1, block_BN])


def _complete(tokens_B: Tensor, size: int, stride: int) -> Tensor:
    """Windows that end within so many tokens."""
    return (tokens_B - size + stride).clamp(min=0) // stride
