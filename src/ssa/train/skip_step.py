"""Which steps count: judged on the device, after the gradients and before the optimizer moves, so that no step waits for the host.

A step whose loss or gradient norm is not finite is skipped; after more than `skip_nonfinite` of them in a row the run is halted: that step
and all after it are skipped until the host looks. With `skip_spikes` = s, a step whose loss or gradient norm lies more than s standard
deviations above the mean of the last `WINDOW` steps is skipped too (OLMo-core's rule; spikes enter the statistics, so a new level is
accepted after a while). All ranks judge the same sums and come to the same verdict.
"""

from __future__ import annotations

import math

import torch

from ssa.errors import UserError

WINDOW = 128
WARMUP = 64
"""Finite steps that must have been seen before one can be a spike."""


class SkipStep:
    """The judge and what it remembers, all of it in device tensors."""

    def __init__(self, device: torch.device, skip_nonfinite: int = 0, skip_spikes: float = 0.0) -> None:
        self.skip_nonfinite, self.skip_spikes = skip_nonfinite, skip_spikes
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._last = torch.zeros(2, WINDOW, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """fp32 [2]: 1 where the step must not move the weights, 1 where the run must stop. `loss` and `norm` are 0-dim, of the whole step."""
        values = torch.stack([loss, norm]).float()
        finite = values.isfinite().all()
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        self._halted = self._halted | (self._in_a_row > self.skip_nonfinite)
        skip = ~finite | self._halted
        if self.skip_spikes:
            skip = skip | self._spike(values)
            slot = (self._seen % WINDOW).view(1)
            new = torch.where(finite, values[:, None], self._last.gather(1, slot.expand(2, 1)))
            self._last = self._last.scatter(1, slot.expand(2, 1), new)
            self._seen = self._seen + finite
        return torch.stack([skip, self._halted]).float()

    def _spike(self, values: torch.Tensor) -> torch.Tensor:
        known = torch.arange(WINDOW, device=values.device) < self._seen
        count = self._seen.clamp(min=1)
        mean = torch.where(known, self._last, 0).sum(1) / count
        deviation = torch.where(known, self._last - mean[:, None], 0).square().sum(1).div(count).sqrt()
        return (self._seen >= WARMUP) & (values - mean > self.skip_spikes * deviation).any()

    def state(self) -> list[list[float]]:
        """What a resumed run needs, as JSON; waits for the device."""
        return [[float(self._in_a_row), float(self._seen)], *self._last.tolist()]

    def restore(self, state: list[list[float]]) -> None:
        """Go on from a `state`. Raises `UserError` for what is none."""
        if [len(row) for row in state] != [2, WINDOW, WINDOW]:
            raise UserError(f"the checkpoint's guard state has no rows of 2, {WINDOW} and {WINDOW} numbers")
        in_a_row, seen = state[0]
        self._in_a_row.fill_(int(in_a_row))
        self._seen.fill_(int(seen))
        self._last.copy_(self._last.new_tensor(state[1:]))


def described(loss: float, norm: float) -> str:
    """What was wrong with a skipped step."""
    for name, value in (("loss", loss), ("grad_norm", norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return f"spike, loss {loss:.4f}, grad_norm {norm:.3g}"
