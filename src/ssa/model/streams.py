"""Which attention drives a training step of SSA, and how a model learns what a step is where others train it.

SSA draws once per *step*: with probability `full_ratio` (the paper's FullRatio, 0.5) full attention's output goes on through the
network and sparse attention only serves the alignment, else the other way round. Every layer of that step follows the
same draw; drawing per layer gives NaN in the paper (its Table 3).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import has_length

from ssa.errors import UserError

Stream = Literal["full", "sparse"]


def draw_stream(seed: int, step: int, full_ratio: float) -> Stream:
    """The main stream of step `step` (0-based): a pure function of its arguments.

    It reads no global generator, so every rank, a recomputed forward pass and a resumed run see the same draw. `full_ratio` 0
    is always "sparse", 1 always "full".
    """
    uniform = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, step % 2**64], dtype=np.uint64))).random()
    return "full" if uniform < full_ratio else "sparse"


@dataclass
class TrainStep:
    """What a model knows of the optimizer step that its training passes belong to.

    transformers' Trainer and those built on it tell it (`StreamCallback`). A loop of your own that accumulates gradients sets
    `micro_batches`. `ssa train` says all of it in every call.
    """

    number: int = 0
    """0-based; the stream is drawn from it."""
    micro_batches: int | None = None
    """Passes that make up a step on this rank, each of which has 1/n of the alignment's weight. None = nobody has said."""
    count_ranks: int = 1
    """Ranks whose targets `num_items_in_batch` counts."""
    followed: bool = False
    """A trainer sets `number`; otherwise passes count it up."""
    passes: int = 0
    """Passes of step `number` so far, where they count."""

    def draw(self, seed: int, full_ratio: float) -> Stream:
        """The stream of a training pass."""
        stream = draw_stream(seed, self.number, full_ratio)
        if not self.followed:
            self.passes += 1
            if self.passes >= (self.micro_batches or 1):
                self.number, self.passes = self.number + 1, 0
        return stream


class _TrainerSteps(TrainerCallback):
    """Tells the model of a `Trainer` which step begins and how many passes it has; other models are left alone."""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        inner = _ssa_model(model)
        if inner is None:
            return
        if args.n_gpu > 1 and inner.config.attends.draws_stream:
            raise UserError(
                f"{args.n_gpu} GPUs in one process, which shares the alignment out wrongly: start one process per GPU "
                f"(torchrun --nproc-per-node {args.n_gpu}), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        step = inner.train_step
        step.number, step.followed = int(state.global_step), True
        step.micro_batches = _micro_batches(args.gradient_accumulation_steps, state.epoch, train_dataloader)
        step.count_ranks = args.world_size if args.average_tokens_across_devices else 1

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        inner = _ssa_model(model)
        if inner is not None:
            inner.train_step = TrainStep(inner.train_step.number)


class StreamCallback(_TrainerSteps):
    """For transformers' `Trainer`: ties the model's draws, and the weight of its alignment, to the optimizer step.

    All micro-batches of a step follow one draw, and a resumed run repeats its draws. A Trainer that is built around an
    `SSAForCausalLM` has such a callback without being told; naming it once more changes nothing.
    """

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if _ssa_model(model) is None:
            raise TypeError(f"StreamCallback needs an SSAForCausalLM, not a {type(model).__name__}")
        super().on_step_begin(args, state, control, model, train_dataloader, **kwargs)


def follow_trainers() -> None:
    """Gives every `Trainer` that is built from now on the callback; those of other models do nothing with it."""
    trainer = sys.modules.get("transformers.trainer")
    if trainer is not None and _TrainerSteps not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_TrainerSteps)


def _ssa_model(model: Any) -> Any:
    """The SSA model within wrappers (DDP, torch.compile, PEFT), or None."""
    return next((module for module in model.modules() if isinstance(vars(module).get("train_step"), TrainStep)), None)


def _micro_batches(accumulation: int, epoch: float, loader: Any) -> int:
    """Passes of the step that begins at `epoch`: the last step of an epoch has what is left of it."""
    if loader is None or not has_length(loader):
        return accumulation
    done = round(epoch % 1 * len(loader)) % len(loader)
    return min(accumulation, len(loader) - done)
