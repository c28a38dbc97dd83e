"""The validation loss of a training run, in both attention modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

MAX_TOKENS = 16384
"""Validation reads at most this much of the split, from its start: the same tokens each time."""


def validation_losses(
    model: Any, shards: Any, context: int, batch_size: int, autocast: AbstractContextManager, max_tokens: int = MAX_TOKENS
) -> dict[str, float]:
    """Mean negative log-likelihood in nats a token under full attention and under sparse attention at the model's own budget.

    Args:
        model: An `SSAForCausalLM`; its training mode is put back.
        shards: `TokenShards` of the validation split.
        context: Tokens in a row; the last row may be shorter.
        batch_size: Rows at a time.
        autocast: Reusable context of the forward pass.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    totals = {"full": 0.0, "sparse": 0.0}
    targets = 0
    try:
        with torch.no_grad(), autocast:
            for input_ids, position_ids in _batches(shards, context, batch_size, max_tokens):
                targets += int((position_ids[:, 1:] != 0).sum())
                rows = {"input_ids": input_ids.to(device), "position_ids": position_ids.to(device)}
                for mode in totals:
                    totals[mode] += model.token_nll(**rows, attention_mode=mode).double().sum().item()
    finally:
        model.train(was_training)
    return {mode: total / max(1, targets) for mode, total in totals.items()}


def _batches(shards: Any, context: int, batch_size: int, max_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, position_ids), int64 [B, T] each: whole rows in batches, then the rest of the split as a row of its own."""
    available = min(shards.num_tokens, max_tokens)
    spans = [(start, min(start + context, available)) for start in range(0, available, context)]
    spans = [(start, stop) for start, stop in spans if stop - start >= 2]
    while spans:
        width = spans[0][1] - spans[0][0]
        batch = [span for span in spans[:batch_size] if span[1] - span[0] == width]
        spans = spans[len(batch) :]
        ids = np.stack([np.asarray(shards.read(*span)) for span in batch]).astype(np.int64)
        positions = np.stack([np.asarray(shards.positions(*span)) for span in batch]).astype(np.int64)
        yield torch.from_numpy(ids), torch.from_numpy(positions)
