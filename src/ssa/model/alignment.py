"""How the alignment gets into the loss, whoever computes that, and what it weighs there.

`SSAForCausalLM` adds the alignment to its own loss, which needs labels. Label smoothing, a loss function of one's own, TRL's trainers and
many a loop compute theirs from logits or hidden states and never ask for it. There the hidden states carry it: they are what they
were, and with the gradient that comes back through them the alignment gets its own (as Megatron-LM does with the losses of a router).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssa.errors import UserError
from ssa.model.streams import TrainStep

UNTOLD = "nobody has said how many passes make up a step, each of which has its part of the alignment's weight: set model.train_step.micro_batches"


def weight_in_loss(weight: float, step: TrainStep, count: Tensor, num_items: Tensor | int | None) -> float:
    """What the sum of both alignment losses weighs in the loss of a pass with `count` targets, of a step with `num_items`.

    Raises:
        UserError: The step has more targets, and nobody has said how many passes.
    """
    if num_items is None:
        return weight
    if step.micro_batches is None and bool(count != num_items):
        raise UserError(
            f"num_items_in_batch = {int(num_items)} counts targets of several passes, this one has {int(count)}, and {UNTOLD} "
            "(a transformers Trainer wants callbacks=[ssa.model.streams.StreamCallback()])"
        )
    return weight / ((step.micro_batches or 1) * step.count_ranks)


def carry(hidden: Tensor, alignment: Tensor, weight: float, step: TrainStep, trained: Iterable[nn.Parameter]) -> Tensor:
    """`hidden`, whose backward pass gives each of the losses in `alignment` (fp32 [2]) the gradient `weight` / passes of a step.

    The loss's own scale is not visible from here. So the number of passes must be known, and float16, whose losses are scaled up, is
    refused.

    Args:
        trained: Parameters that `hidden` comes from. Where nobody has said how many passes a step has, gradients that are there
            already say that it has several.

    Raises:
        UserError: float16; in the backward pass, several passes of which nobody has told.
    """
    device = hidden.device.type
    if hidden.dtype is torch.float16 or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16):
        raise UserError(
            "float16 scales the loss, and here it is computed outside the model, which cannot weigh the alignment then: "
            "train in bfloat16, or pass labels and use the model's loss"
        )
    watched = None if step.micro_batches else [p for p in trained if p.requires_grad][:1]
    return _Carry.apply(hidden, alignment, weight / (step.micro_batches or 1), watched)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, alignment: Tensor, weight: float, watched: list[nn.Parameter] | None) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.watched, ctx.like = weight, watched, (alignment.shape, alignment.dtype)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        # What this backward pass adds to them comes later: they lie before the hidden states.
        if ctx.watched is not None and all(p.grad is not None and bool(p.grad.any()) for p in ctx.watched):
            earlier = "gradients of an earlier pass are there" if ctx.watched else "no weight of the model is trained"
            raise UserError(f"{earlier}, and {UNTOLD} (1 where each pass is a step, whose gradients are cleared before it)")
        shape, dtype = ctx.like
        return d_hidden, torch.full(shape, ctx.weight, dtype=dtype, device=d_hidden.device), None, None


def warn_of_eval_mode(hidden: Tensor) -> None:
    """Says so when a gradient comes back through the hidden states of a model that is not in training mode."""
    hidden.register_hook(_warn)


def _warn(gradient: Tensor) -> None:
    warnings.warn(
        "gradients of a model in eval mode have one stream and neither an alignment nor a selector's loss: call model.train() to train",
        stacklevel=2,
    )


def warn_of_counted_starts(labels_BT: Tensor, count: Tensor) -> None:
    """Says so when labels that are no targets may stand in a trainer's count of them."""
    if starts := int((labels_BT[:, 1:] != -100).sum() - count):
        warnings.warn(
            f"{starts} labels are padding or the first token of a document, which num_items_in_batch may count and the loss leaves "
            "out, so that it comes out smaller by their share: set such labels to -100",
            stacklevel=3,
        )
