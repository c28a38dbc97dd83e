"""What a run reports: RUN/metrics.jsonl (a JSON object a line), TensorBoard where it is installed, and a progress line.

A "train" line per step: step, stream, loss, cross_entropy, sparsity_loss, commitment_loss (nats; null where the method has none),
grad_norm (before clipping), lr, tokens (read so far), tokens_per_second. A "valid" line per validation: step, full, sparse (nats a token).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.errors import UserError
from ssa.files import write_atomically

if TYPE_CHECKING:
    import torch

DEVICE_VALUES = ("loss", "cross_entropy", "sparsity_loss", "commitment_loss", "grad_norm")


class Metrics:
    """Collects steps without waiting for the device; `fetch` brings them over in one copy, checks, writes and shows them."""

    def __init__(self, run_dir: Path, start_step: int, total_steps: int, aligned: bool) -> None:
        """`start_step` > 0 continues a run: lines of later steps, from work that was lost, are cut off."""
        self.path = run_dir / "metrics.jsonl"
        self.aligned = aligned
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._pending_tokens = 0
        self._clock = time.perf_counter()
        kept = [line for line in self._complete_lines() if json.loads(line)["step"] <= start_step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir / "tensorboard", start_step)
        self._display = Display(start_step, total_steps)

    def _complete_lines(self) -> list[str]:
        """A kill can leave the last line cut in two."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def validation_at(self, step: int) -> dict[str, float] | None:
        """The validation losses written for `step`, if any."""
        for line in map(json.loads, self._complete_lines()):
            if line["kind"] == "valid" and line["step"] == step:
                return {mode: line[mode] for mode in ("full", "sparse")}
        return None

    def add(self, values: torch.Tensor, *, step: int, stream: str | None, lr: float, tokens: int, new_tokens: int) -> None:
        """One step: `values` is fp32 [5] on the device in the order of `DEVICE_VALUES`; nothing waits for it."""
        self._pending.append(({"kind": "train", "step": step, "stream": stream, "lr": lr, "tokens": tokens}, values))
        self._pending_tokens += new_tokens

    def fetch(self) -> None:
        """Write and show what `add` collected. A non-finite loss or gradient norm is a `UserError` that names its step."""
        if not self._pending:
            return
        import torch

        rows = torch.stack([values for _, values in self._pending]).tolist()
        seconds = time.perf_counter() - self._clock
        speed = round(self._pending_tokens / max(seconds, 1e-9), 1)
        lines: list[dict[str, Any]] = []
        for (known, _), row in zip(self._pending, rows, strict=True):
            line = known | dict(zip(DEVICE_VALUES, row, strict=True)) | {"tokens_per_second": speed}
            if not self.aligned:
                line["sparsity_loss"] = line["commitment_loss"] = None
            if problem := non_finite(line):
                self._write(lines)
                raise UserError(problem)
            lines.append(line)
        self._write(lines)
        self._display.step(lines[-1])
        self._pending, self._pending_tokens, self._clock = [], 0, time.perf_counter()

    def valid(self, step: int, losses: dict[str, float]) -> None:
        """A validation; the time it took does not count as training time."""
        self._write([{"kind": "valid", "step": step} | losses])
        self._display.say(f"step {step}: validation loss " + ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items()))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last fetch (a validation, a checkpoint)."""
        self._clock = time.perf_counter()

    def say(self, text: str) -> None:
        self._display.say(text)

    def close(self) -> None:
        self._display.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
            if self._board is not None:
                for name, value in line.items():
                    if isinstance(value, float):
                        self._board.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._file.flush()


def non_finite(line: dict[str, Any]) -> str | None:
    """One line about the first value of a step that is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(line[name]):
            return (
                f"{name} is {line[name]} at step {line['step']} (stream {line['stream']}): stopped before the weights moved; "
                "resume from the last checkpoint, or lower train.lr"
            )
    return None


class Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.total_steps = total_steps
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(None),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)
            self._bar.start()
        self._clock, self._start = time.perf_counter(), start_step

    def step(self, line: dict[str, Any]) -> None:
        text = f"loss {line['cross_entropy']:.4f}"
        if line["sparsity_loss"] is not None:
            text += f"  alignment {line['sparsity_loss'] + line['commitment_loss']:.2e}"
        text += f"  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], description=text)
            return
        per_step = (time.perf_counter() - self._clock) / max(1, line["step"] - self._start)
        eta = round(per_step * (self.total_steps - line["step"]))
        print(f"step {line['step']}/{self.total_steps}  {text}  eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _tensorboard(directory: Path, start_step: int) -> Any:
    """A SummaryWriter, or None where tensorboard is not installed: it is a convenience, metrics.jsonl has everything."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)
