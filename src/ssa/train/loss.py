"""One rank's share of a step's loss: the module that DDP and FSDP wrap.

The loss of a step is a mean over the whole step, whatever rows and ranks it is cut into: cross-entropy over all its targets, the
alignment losses over all its tokens. A micro-batch of a rank contributes its sum over the step's count, and shares add up to the loss:
that is why micro-batches and ranks of different numbers of targets give what one large batch gives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssa.config import TrainRecipe
from ssa.train.context_parallel import ContextParallel


def alignment_share(step: int, recipe: TrainRecipe) -> float:
    """What share of `model.alignment_weight` step `step` (0-based) has: a linear rise over the first `alignment_warmup` of the steps.

    It is 0 in the first step and 1 from the first step after the rise.
    """
    rising = math.ceil(recipe.alignment_warmup * recipe.steps)
    return step / rising if step < rising else 1.0


class StepLoss(nn.Module):
    """`SSAForCausalLM` with the loss of training around it."""

    alignment_share: float = 1.0
    """Of the alignment's weight, set before each step. No layer sees it: a compiled one would be compiled again for each value."""

    def __init__(self, model: Any, alignment_weight: float, parts: int, context: ContextParallel | None = None) -> None:
        """`parts`: equal shares of tokens that make up a step, micro-batches times ranks."""
        super().__init__()
        self.model, self.alignment_weight, self.parts, self.context = model, alignment_weight, parts, context
        self.selection_weight = float(model.model.selector.loss_weight)

    def forward(self, rows: dict[str, Tensor], stream: str | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(share of the loss, detached shares fp32 [4] of cross-entropy, sparsity, commitment and selectors' loss).

        Args:
            rows: `input_ids`, `position_ids` and `labels` of the micro-batch, int64 [B, T]; with context parallelism what
                `ContextParallel.part` made of them, within `ContextParallel.sharing`.
            stream: SSA: the stream that goes on.
            targets: int64 0-dim, tokens to predict in the whole step.
        """
        # with context parallelism `ContextParallel.sharing` knows the positions
        names = ("input_ids", "position_ids", "cu_seqlens") if self.context is None else ("input_ids",)
        inputs = {name: rows[name] for name in names if name in rows}
        output = self.model.model(**inputs, use_cache=False, stream=stream, carry_alignment=False)
        own = rows["targets"] if "targets" in rows else torch.where(is_target(rows), rows["labels"][:, 1:], -100)
        loss = self.model.summed_nll(output.last_hidden_state, own) / targets.clamp(min=1)
        shares = torch.cat([loss.detach().view(1), loss.new_zeros(3)])
        if output.alignment is not None:
            loss = loss + self.alignment_share * self.alignment_weight / self.parts * output.alignment.sum()
            shares[1:3] = output.alignment.detach() / self.parts
        if output.selection_loss is not None:
            loss = loss + self.selection_weight / self.parts * output.selection_loss
            shares[3] = output.selection_loss.detach() / self.parts
        return loss, shares

    def token_nll(self, **rows: Any) -> Tensor:
        """See `SSAForCausalLM.token_nll`: here so that FSDP gathers the weights for it."""
        return self.model.token_nll(**rows)


def is_target(rows: dict[str, Tensor]) -> Tensor:
    """bool [B, T-1]: the next token is to be predicted; a document's first token never is."""
    return (rows["labels"][:, 1:] != -100) & (rows["position_ids"][:, 1:] != 0)
