"""How the alignment gets into a loss that somebody else computes.

`SSAForCausalLM` adds the alignment to its own loss, which needs labels. Label smoothing, a loss function of one's own, TRL's trainers and
many a loop compute theirs from logits or hidden states and never ask for it. There the hidden states carry it: they are what they
were, and with the gradient that comes back through them the alignment gets its own (as Megatron-LM does with the losses of a router).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ssa.errors import UserError
from ssa.train.streams import TrainStep


def carry_alignment(hidden: Tensor, alignment: Tensor, weight: float, step: TrainStep, layers: nn.Module) -> Tensor:
    """`hidden`, whose backward pass gives each of the losses in `alignment` (fp32 [2]) the gradient `weight` / micro-batches of a step.

    The loss's own scale is not visible from here. So the number of micro-batches must be known, and float16, whose losses are
    scaled up, is refused.

    Args:
        layers: What the hidden states come from: where nobody has said how many micro-batches a step has, gradients that are there
            already say that it has several.

    Raises:
        UserError: float16, or, in the backward pass, several micro-batches of which nobody has told.
    """
    device = hidden.device.type
    if hidden.dtype is torch.float16 or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16):
        raise UserError(
            "float16 scales the loss, and here it is computed outside the model, which cannot weigh the alignment then: "
            "train in bfloat16, or pass labels and use the model's loss"
        )
    trained = [] if step.micro_batches else [p for p in layers.parameters() if p.requires_grad][:1]
    return _Carry.apply(hidden, alignment, weight / (step.micro_batches or 1), trained)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, alignment: Tensor, weight: float, trained: list[nn.Parameter]) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.trained, ctx.like = weight, trained, (alignment.shape, alignment.dtype)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        # What this backward pass adds comes later: the layers lie before the hidden states.
        if any(p.grad is not None and bool(p.grad.any()) for p in ctx.trained):
            raise UserError(
                "gradients of an earlier pass are there, and nobody has said how many passes make up a step, which the weight of the "
                "alignment depends on: set model.train_step.micro_batches, or clear the gradients before each backward pass"
            )
        shape, dtype = ctx.like
        return d_hidden, torch.full(shape, ctx.weight, dtype=dtype, device=d_hidden.device), None, None


def warn_of_eval_mode(hidden: Tensor) -> None:
    """Says so when a gradient comes back through the hidden states of a model that is not in training mode."""
    hidden.register_hook(_warn)


def _warn(gradient: Tensor) -> None:
    warnings.warn(
        "gradients of a model in eval mode have no alignment and one stream: call model.train() to train SSA", stacklevel=2
    )
