"""What collators, trainers and other releases hand to `forward`, in the model's own words.

Legend: B batch, T queries.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ssa.errors import UserError
from ssa.model.cache import BlockCache
from ssa.ops.documents import positions_from_starts

IGNORED_KEYWORDS = frozenset({"cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"})
"""They say nothing that other keywords do not say."""


def refuse_typos(keywords: Iterable[str], forward: Callable) -> None:
    """Unknown keywords are those of other models and newer releases, and ignored; one that nearly is an own one was meant to be it."""
    for name in set(keywords) - IGNORED_KEYWORDS:
        if close := difflib.get_close_matches(name, inspect.signature(forward).parameters, n=1, cutoff=0.8):
            raise UserError(f"{name} is no keyword of the model: {close[0]}?")


def document_positions(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, seq_idx: Tensor | None, tokens: Tensor, cache: BlockCache | None
) -> Tensor | None:
    """`position_ids`, restarting also where a collator says otherwise that a document starts, int64 [B, T].

    Args:
        cu_seq_lens: int [documents + 1], where documents begin in a flattened batch (B = 1).
        seq_idx: int [B, T], each token's document.
        tokens: [B, T, ...].
    """
    if cu_seq_lens is None and seq_idx is None:
        return position_ids
    batch, queries = tokens.shape[:2]
    if cache is not None and cache.get_seq_length():
        raise UserError("cu_seq_lens_q and seq_idx describe whole rows: pass position_ids beside a cache")
    starts_BT = torch.zeros(batch, queries + 1, dtype=torch.bool, device=tokens.device)
    starts_BT[:, 0] = True
    if position_ids is not None:
        starts_BT[:, :-1] |= position_ids == 0
    if cu_seq_lens is not None:
        if batch != 1:
            raise UserError(f"cu_seq_lens_q describes one flattened row, not a batch of {batch}")
        starts_BT[0, cu_seq_lens.to(torch.int64).clamp(0, queries)] = True
    if seq_idx is not None:
        starts_BT[:, 1:-1] |= seq_idx[:, 1:] != seq_idx[:, :-1]
    return positions_from_starts(starts_BT[:, :-1])


def shifted_targets(labels_BT: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Labels at the position that predicts them, [B, T-1]; -100 for padding and where a document starts."""
    targets = labels_BT[:, 1:]
    if position_ids is not None:
        targets = torch.where(position_ids.expand(labels_BT.shape)[:, 1:] == 0, -100, targets)
    if attention_mask is not None:
        real_BT = attention_mask[:, -labels_BT.shape[1] :] != 0
        targets = torch.where(real_BT[:, 1:] & real_BT[:, :-1], targets, -100)
    return targets
