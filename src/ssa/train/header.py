"""What a run says before its first step, so that nobody waits in front of a silent terminal."""

from __future__ import annotations

from pathlib import Path

import torch

from ssa.collectives import Ranks
from ssa.config import Recipe
from ssa.model import SSAForCausalLM
from ssa.train.build import Data
from ssa.train.run_directory import rows_per_step


def run_line(recipe: Recipe, out: Path, ranks: Ranks, device: str, dtype: torch.dtype) -> str:
    """What is known before text is prepared and the model is built.

    Args:
        device: Name of one rank's device.
        dtype: That of autocast.
    """
    m, tokens = recipe.model, rows_per_step(recipe, ranks) * recipe.data.context
    where = device if ranks.world == 1 else f"{ranks.world} x {device}"
    return (
        f"run {out}: method {m.method}, budget {m.num_selected_blocks}x{m.block_size}, {recipe.train.steps:,} steps x {tokens:,} tokens in rows "
        f"of {recipe.data.context:,}, {where}, {str(dtype).removeprefix('torch.')}"
    )


def model_line(model: SSAForCausalLM, data: Data) -> str:
    """The model that was built or loaded, and how much text there is for it."""
    c = model.config
    return (
        f"model: {model.num_parameters():,} parameters, {c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} key/value heads of {c.head_dim}, vocabulary {c.vocab_size:,}; {data.train.num_tokens:,} tokens to train on"
    )


def waiting_line(recipe: Recipe, device: torch.device) -> str | None:
    """Why the first step takes longer than the others; None where it does not."""
    if recipe.train.compile:
        return "compiling the model: the first steps may take minutes"
    return "compiling the kernels: the first steps take longer" if device.type == "cuda" else None
