"""Which blocks the queries choose: how far back they lie, and how much the choice changes from one query to the next.

Legend: B batch, T queries (C of a chunk), R = K or H (who selects), M selected blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssa.budget import Budget, LayerBudgets
from ssa.model import SSAConfig

LAGS = (1, 2, 4, 8, 16, 32, 64)
BINS = 64
PAIR_ELEMENTS = 1 << 24  # comparisons of block numbers held at once


def receptive_field(config: SSAConfig, budget: Budget | LayerBudgets) -> int:
    """The document position before which queries read everything in all layers, whatever they choose."""
    budgets = budget.budgets if isinstance(budget, LayerBudgets) else [budget]
    return min((one.tokens for one in budgets), default=config.max_position_embeddings)


def bit_length(x: Tensor) -> Tensor:
    """int64: bin 0 for 0, bin b for 2^(b-1) .. 2^b - 1, the bins of every histogram here. Exact below 2^53."""
    return torch.frexp(x.double()).exponent.to(torch.int64)


def distance_histogram(block_indices: Tensor, position_BT: Tensor, block_size: int) -> Tensor:
    """int64 [R, BINS]: selected blocks by the distance from the block's first token to the query, in the bins of `bit_length`."""
    selectors, queries, width = block_indices.shape[1:]
    total = torch.zeros(selectors * (BINS + 1), dtype=torch.int64, device=block_indices.device)
    row = torch.arange(selectors, device=block_indices.device)[:, None, None] * (BINS + 1)
    for cut in _chunks(queries, block_indices.shape[0] * selectors * width):
        index = block_indices[:, :, cut].to(torch.int64)
        distance = position_BT[:, None, cut, None] - index * block_size
        bins = torch.where(index < 0, BINS, bit_length(distance))
        total += torch.bincount((row + bins).flatten(), minlength=len(total))
    return total.view(selectors, BINS + 1)[:, :BINS]


def selection_overlap(
    block_indices: Tensor, position_BT: Tensor, beyond: int, lags: tuple[int, ...] = LAGS
) -> tuple[Tensor, Tensor]:
    """NOSA's locality: gamma(t) = |chosen(t) and chosen(t - lag)| / |chosen(t)|, for queries of one document.

    Args:
        block_indices: int [B, R, T, M], -1 padded.
        position_BT: document-relative query positions.
        beyond: the receptive field; both queries stand at this position at least (before it everything is chosen).

    Returns:
        Sums of gamma, fp64 [R, lags], and the number of pairs, int64 [lags] (the same for every selector).
    """
    selectors, queries, width = block_indices.shape[1:]
    sums = torch.zeros(selectors, len(lags), dtype=torch.float64, device=block_indices.device)
    pairs = torch.zeros(len(lags), dtype=torch.int64, device=block_indices.device)
    for i, lag in enumerate(lags):
        if not bool((position_BT >= beyond + lag).any()):
            continue
        for cut in _chunks(max(0, queries - lag), block_indices.shape[0] * selectors * width * width):
            now, before = block_indices[:, :, cut.start + lag : cut.stop + lag], block_indices[:, :, cut]
            real = now >= 0
            shared = ((now[..., None] == before[..., None, :]).any(-1) & real).sum(-1)
            position_BC = position_BT[:, cut.start + lag : cut.stop + lag]
            counts = position_BC - lag >= beyond  # so far back it is still the same document
            gamma = torch.where(counts[:, None], shared / real.sum(-1), 0)
            sums[:, i] += gamma.sum((0, 2), dtype=torch.float64)
            pairs[i] += counts.sum()
    return sums, pairs


def _chunks(queries: int, elements_per_query: int) -> Iterator[slice]:
    step = max(1, PAIR_ELEMENTS // max(1, elements_per_query))
    for t in range(0, queries, step):
        yield slice(t, min(t + step, queries))
