"""AdamW as the paper uses it, Muon beside it, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ssa.attention import Selector
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
    bare = _of_selectors(model, lambda selector: not selector.weight_decay)
    decays = [p.ndim >= 2 and id(p) not in bare for p in trainable]
    groups = [
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, recipe: TrainRecipe) -> torch.optim.AdamW | MuonWithAdamW:
    """The recipe's optimizer. AdamW is fused on devices that have the fused kernel (CPU and CUDA)."""
    groups = parameter_groups(model, recipe.weight_decay)
    lr = learning_rate(0, recipe)
    matrices: list[torch.Tensor] = []
    if recipe.optimizer == "muon":
        other = _of_selectors(model, lambda selector: not selector.muon)
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in other)
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        taken = {id(p) for p in matrices}
        groups = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=recipe.betas, fused=fused)
    if not matrices:
        return adamw
    # Updates scaled to the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


def _of_selectors(model: torch.nn.Module, which: Callable[[Selector], bool]) -> set[int]:
    """Ids of the parameters of those selectors."""
    found = (module for module in model.modules() if isinstance(module, Selector) and which(module))
    return {id(p) for selector in found for p in selector.parameters()}


class MuonWithAdamW:
    """Muon for the layers' matrices beside AdamW for embeddings and vectors, as one optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        self.param_groups: list[dict[str, Any]] = [*muon.param_groups, *adamw.param_groups]
        self.state = _States(self.parts)

    def step(self) -> None:
        for optimizer in self.parts:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=set_to_none)


class _States(Mapping):
    """parameter -> its state, in whichever optimizer has it."""

    def __init__(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        self._owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}

    def __getitem__(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._owner[parameter].state[parameter]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)
