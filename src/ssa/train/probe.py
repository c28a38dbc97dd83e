"""The paper's key curve while a model trains: how much attention the selected blocks keep, on the same text each time.

Kept mass is the share of full attention's weight that falls on the keys of the selected blocks (AttnSparsity, section 5), entropy that of
the full-attention weights, both from the q and k of a model that runs in full mode (`_full`) or in sparse mode (`_sparse`). Means are over
layers, heads and the queries beyond the receptive field k * s; before it everything is selected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa.analysis.attention_stats import SparsityMeter, selection_of
from ssa.attention import AttentionRecord
from ssa.budget import Budget
from ssa.data.shards import TokenShards
from ssa.errors import UserError

PROBE_TOKENS = 8192
"""About so many tokens are read: the work grows with their number times the context."""
_SEARCHED_ROWS = 512


def probe_batch(shards: TokenShards, context: int, budget: Budget) -> dict[str, Tensor]:
    """Rows of the split with the most queries beyond the receptive field, of at most `PROBE_TOKENS` tokens or one row.

    Returns:
        `input_ids` and `position_ids`, int64 [rows, T] with T = `context`, or less where the split or `PROBE_TOKENS` is less.

    Raises:
        UserError: no query stands beyond the receptive field: nothing would ever be left out.
    """
    length = min(context, PROBE_TOKENS, shards.num_tokens)
    starts = [row * length for row in range(min(shards.num_tokens // length, _SEARCHED_ROWS))]
    beyond = [int((shards.positions(start, start + length) >= budget.tokens).sum()) for start in starts]
    best = sorted(range(len(starts)), key=lambda i: -beyond[i])[: max(1, PROBE_TOKENS // length)]
    best = [i for i in best if beyond[i]]
    if not best:
        raise UserError(
            f"train.probe_every measures what {budget} leaves out, but no document of {shards.path} ({shards.split}) reaches beyond "
            f"{budget.tokens} tokens in a row of {length}: set it to 0, or choose a longer data.context or a smaller budget"
        )
    spans = [(starts[i], starts[i] + length) for i in sorted(best)]
    ids = np.stack([shards.read(*span) for span in spans]).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.stack([shards.positions(*span) for span in spans])),
    }


def probe(model: Any, batch: dict[str, Tensor], budget: Budget, autocast: AbstractContextManager | None = None) -> dict[str, Any]:
    """Figures of a model at its present weights, ready for JSON.

    Args:
        model: An `SSAForCausalLM`, or the `StepLoss` around one, which FSDP needs; then every rank must call. The training mode is put back.
        batch: What `probe_batch` gave.
        budget: What the selection may read.
        autocast: Reusable context of the forward pass.

    Returns:
        `budget`, `queries` (their number), and for each mode "full" and "sparse" the means `kept_mass_MODE`, `entropy_bits_MODE`,
        `nll_MODE` (nats a token), with `kept_mass_MODE_by_layer` and `entropy_bits_MODE_by_layer`.
    """
    causal = model if hasattr(model, "lm_head") else model.model
    device = next(model.parameters()).device
    rows = {name: x.to(device) for name, x in batch.items()}
    targets = max(1, int((batch["position_ids"][:, 1:] != 0).sum()))
    result: dict[str, Any] = {"budget": str(budget), "queries": int((batch["position_ids"] >= budget.tokens).sum())}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast or contextlib.nullcontext():
            for mode in ("full", "sparse"):
                meter = SparsityMeter(selection_of(causal), points=0)
                nll = model.token_nll(**rows, attention_mode=mode, budget=budget, observer=_in_float32(meter))
                layers = [layer.beyond_receptive_field for layer in meter.layers()]
                for name in ("kept_mass", "entropy_bits"):
                    each = [fmean(getattr(means, name)) for means in layers]
                    result |= {f"{name}_{mode}": fmean(each), f"{name}_{mode}_by_layer": each}
                result[f"nll_{mode}"] = nll.double().sum().item() / targets
    finally:
        model.train(was_training)
    return result


def _in_float32(observer: Callable[[int, AttentionRecord], None]) -> Callable[[int, AttentionRecord], None]:
    """Figures are not autocast's."""

    def observe(layer: int, record: AttentionRecord) -> None:
        with torch.autocast(record.q_BTHD.device.type, enabled=False):
            observer(layer, record)

    return observe
