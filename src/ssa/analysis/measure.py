"""All figures of one model over packed rows of text, as a JSON-ready dictionary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssa.analysis.attention_stats import SparsityMeter, mean_figures, selection_of
from ssa.analysis.decode import decode_overlap
from ssa.analysis.divergence import DivergenceSums, token_divergence
from ssa.analysis.selection import receptive_field
from ssa.budget import Budget, LayerBudgets
from ssa.collectives import gather, meet
from ssa.model import SSAForCausalLM
from ssa.ranks import Shard

ROW_TOKENS = 4096  # tokens of several rows in one pass


@torch.no_grad()
def measure_model(
    model: SSAForCausalLM, input_ids: Tensor, position_ids: Tensor, budget: Budget | LayerBudgets, *, points: int = 200, seed: int = 0,
    decode_steps: int = 0, progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run every row under full and under sparse attention and compare. The ranks that torchrun started share the rows.

    Args:
        input_ids, position_ids: int64 [rows, T] on any device; positions restart at 0 at each document.
        points: sampled (delta, error, bound) triples a layer and mode.
        decode_steps: tokens to generate after the longest document, for `decode_overlap`; 0 = leave that out.
        progress: called with the number of rows done in each step; they add up to `own_rows`.

    Returns:
        `predictions`: {"all_tokens", "beyond_receptive_field"} of `DivergenceSums.means`, and `by_position`; `inference`: for the
        modes "sparse" and "full" the mean figures over layers and heads under the same two names' queries, and `layers`, each a
        `LayerFigures`; `decode`: see `decode_overlap`, on rank 0 alone.
    """
    meet()
    device, beyond = model.device, receptive_field(model.config, budget)
    meters = {mode: SparsityMeter(selection_of(model), points=points, seed=seed, beyond=beyond) for mode in ("sparse", "full")}
    divergence = DivergenceSums()
    rows, context = input_ids.shape
    step = max(1, ROW_TOKENS // context)
    shard = Shard.from_environment()
    own = own_rows(rows)
    for meter in meters.values():
        meter.skip(own.start)
    for i in own[::step]:
        ids, positions = (x[i : min(i + step, own.stop)].to(device) for x in (input_ids, position_ids))
        hidden = {
            mode: model.model(
                input_ids=ids, position_ids=positions, use_cache=False, attention_mode=mode, budget=budget, observer=meter
            ).last_hidden_state
            for mode, meter in meters.items()
        }
        each = token_divergence(hidden["full"], hidden["sparse"], model.lm_head, ids, positions)
        divergence.add(each, positions, beyond)
        if progress is not None:
            progress(len(ids))
    for rank, others in enumerate(gather(({mode: meter.sums for mode, meter in meters.items()}, divergence))):
        if rank != shard.rank:
            divergence.join(others[1])
            for mode, meter in meters.items():
                meter.add(others[0][mode])
    inference = {}
    for mode, meter in meters.items():
        layers = meter.layers()
        inference[mode] = {
            "all_queries": mean_figures(layers, beyond=False),
            "beyond_receptive_field": mean_figures(layers, beyond=True),
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
    return {
        "predictions": {"all_tokens": divergence.means(False), "beyond_receptive_field": divergence.means(True), "by_position": divergence.by_position()},
        "inference": inference,
        "decode": None if shard.rank else decode_overlap(model, _longest_document(input_ids, position_ids), budget, decode_steps),
    }  # fmt: skip


def own_rows(rows: int) -> range:
    """Those of `rows` rows that this rank reads; all of them where there is one rank."""
    shard = Shard.from_environment()
    return range(rows * shard.rank // shard.world, rows * (shard.rank + 1) // shard.world)


def _longest_document(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Of the documents in the rows, the longest, int64 [T]."""
    row, column = divmod(int(position_ids.argmax()), position_ids.shape[1])
    return input_ids[row, column - int(position_ids[row, column]) : column + 1]
