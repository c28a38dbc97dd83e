"""Running means in plain PyTorch.

Legend: B batch, S cache columns, K kv heads, D head size, W windows, N blocks, R = size / stride.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_means(
    x_BSKD: Tensor, y_BSKD: Tensor | None, x_means_BWKD: Tensor, y_means_BWKD: Tensor | None, x_sums_BKRD: Tensor,
    y_sums_BKRD: Tensor | None, importance_BNK: Tensor | None, end: Tensor, starts_B: Tensor, size: int, stride: int, block_size: int,
) -> None:  # fmt: skip
    """See `ssa.ops.running_means.extend_means`."""
    ratio = size // stride
    place_B = (end - 1 - starts_B).clamp(min=0)
    stretch_B, opens_B = place_B // stride, place_B % stride == 0
    slot_B, window_B = stretch_B % ratio, stretch_B - ratio + 1
    rows = torch.arange(len(place_B), device=end.device)
    pairs = [(x_BSKD, x_means_BWKD, x_sums_BKRD)]
    if y_BSKD is not None and y_means_BWKD is not None and y_sums_BKRD is not None:
        pairs.append((y_BSKD, y_means_BWKD, y_sums_BKRD))
    for x, means, sums in pairs:
        before = sums[rows, :, slot_B].masked_fill(opens_B[:, None, None], 0.0)
        sums[rows, :, slot_B] = before + x.index_select(1, end[None] - 1).squeeze(1)
        mean_BKD = sums.sum(2) / size
        means[rows, torch.where(window_B < 0, means.shape[1] - 1, window_B)] = mean_BKD.to(means.dtype)
    if importance_BNK is None:
        return
    done_B = (window_B >= 0) & ((place_B + 1) % stride == 0)
    found_BK = mean_BKD[..., 0].masked_fill(~done_B[:, None], float("-inf"))
    first_B = window_B.clamp(min=0) * stride
    for block_B in (first_B // block_size, (first_B + size - 1).minimum(place_B) // block_size):
        importance_BNK[rows, block_B] = torch.maximum(importance_BNK[rows, block_B], found_BK)
