"""How much the selection changes between decode steps: the traffic that an offloaded key/value cache would see.

Legend: T prompt tokens, R selectors, M selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssa.analysis.selection import receptive_field, selection_overlap
from ssa.attention import AttentionRecord
from ssa.budget import Budget, LayerBudgets
from ssa.model import SSAForCausalLM


@torch.no_grad()
def decode_overlap(model: SSAForCausalLM, prompt: Tensor, budget: Budget | LayerBudgets, steps: int) -> dict[str, Any] | None:
    """Continue `prompt` greedily under sparse attention and compare each step's blocks with those of the step before.

    Args:
        prompt: int64 [T], one document from its start. Its end is left out where the model has no positions for `steps` more tokens.

    Returns:
        prompt_tokens, steps, and `gamma`: by layer (those that choose) and selector, the mean share of a step's blocks that the step before
        chose too; None where the prompt does not reach beyond the receptive field, or for less than two steps.
    """
    prompt = prompt[: max(0, model.config.max_position_embeddings - steps)]
    beyond = receptive_field(model.config, budget)
    if len(prompt) < beyond or steps < 2:
        return None
    chosen: list[list[Tensor]] = []

    def remember(layer: int, record: AttentionRecord) -> None:
        if record.block_indices is not None:
            chosen[-1].append(record.block_indices[:, :, -1:])

    ids, cache = prompt[None].to(model.device), None
    for step in range(steps + 1):
        chosen.append([])
        out = model(
            input_ids=ids, cache=cache, use_cache=True, attention_mode="sparse", budget=budget, logits_to_keep=1,
            observer=remember if step else None,
        )  # fmt: skip
        cache, ids = out.cache, out.logits[:, -1].argmax(-1, keepdim=True)
    positions = torch.arange(len(prompt), len(prompt) + steps, device=model.device)[None]
    gamma = []
    for by_step in zip(*chosen[1:], strict=True):
        width = max(index.shape[-1] for index in by_step)  # grows where a budget is beyond the row
        index = torch.cat([torch.nn.functional.pad(index, (0, width - index.shape[-1]), value=-1) for index in by_step], 2)
        sums, pairs = selection_overlap(index, positions, beyond, lags=(1,))
        gamma.append((sums[:, 0] / pairs[0]).tolist())
    return {"prompt_tokens": len(prompt), "steps": steps, "gamma": gamma}
