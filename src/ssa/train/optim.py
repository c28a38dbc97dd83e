"""AdamW as the paper uses it, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ssa.config import TrainRecipe


def learning_rate(step: int, recipe: TrainRecipe) -> float:
    """Learning rate of step `step` (0-based): a linear rise over the first `warmup` share of the steps, then a cosine to `min_lr`.

    The rise reaches `lr` on its last step and the cosine would reach `min_lr` one step after the end, so no step is wasted at 0.
    """
    warmup_steps = math.ceil(recipe.warmup * recipe.steps)
    if step < warmup_steps:
        return recipe.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, recipe.steps - warmup_steps)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (embeddings included) decay, vectors (norm weights, biases) do not: the usual rule of nanoGPT and transformers' Trainer.

    Embeddings decay because they are tied to the output matrix by default. Tied parameters appear once.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused on devices that have the fused kernel (CPU and CUDA)."""
    import torch

    device = next(model.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=learning_rate(0, recipe),
        betas=recipe.betas,
        fused=device.type in ("cpu", "cuda"),
    )
