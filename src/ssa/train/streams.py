"""Which attention drives a training step of SSA.

SSA draws once per *step*: with probability `full_ratio` (the paper's FullRatio, 0.5) full attention's output goes on through the
network and sparse attention only serves the alignment, else the other way round. Every layer of that step follows the
same draw; drawing per layer gives NaN in the paper (its Table 3).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from transformers.trainer_callback import TrainerCallback

Stream = Literal["full", "sparse"]


def draw_stream(seed: int, step: int, full_ratio: float) -> Stream:
    """The main stream of step `step` (0-based): a pure function of its arguments.

    It reads no global generator, so every rank, a recomputed forward pass and a resumed run see the same draw. `full_ratio` 0
    is always "sparse", 1 always "full".
    """
    uniform = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, step % 2**64], dtype=np.uint64))).random()
    return "full" if uniform < full_ratio else "sparse"


class StreamCallback(TrainerCallback):
    """For transformers' `Trainer`: ties the model's own draws to the optimizer step.

    `SSAForCausalLM` counts its training forwards in `stream_step`. Under gradient accumulation a step has several forwards, and a
    resumed run starts counting at 0; setting the counter to `state.global_step` before each of them gives one draw per step
    and the same draws after a resume.
    """

    def _sync(self, state: Any, model: Any) -> None:
        # Wrappers (DDP, torch.compile) would keep the attribute for themselves.
        while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
            model = inner
        if not hasattr(model, "stream_step"):
            raise TypeError(f"StreamCallback needs an SSAForCausalLM, not a {type(model).__name__}")
        model.stream_step = int(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._sync(state, model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._sync(state, model)
