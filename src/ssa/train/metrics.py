"""What a run reports: RUN/metrics.jsonl (a JSON object a line), perhaps a tracker (`ssa.train.trackers`), and a progress line.

"train", a line a step: step, stream, loss, cross_entropy, sparsity_loss, commitment_loss (nats; null where the method has none), grad_norm
(before clipping), lr, tokens (read so far); tokens_per_second, mfu (see `ssa.train.flops`; null where it is not known) and peak_memory_gb (10^9
bytes allocated on this rank's device since the start; null on the CPU) of the steps since the last report; data_wait (seconds that the step waited
for its batch); loss_spike.
"valid", a line a validation: step, full, sparse (nats a token). "probe", a line a probe: step and what `ssa.train.probe.probe` returns.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssa.checked_json import parse_json
from ssa.errors import UserError
from ssa.files import write_atomically
from ssa.terminal import console, say
from ssa.train.trackers import Tracker, numbers, open_tracker

DEVICE_VALUES = ("loss", "cross_entropy", "sparsity_loss", "commitment_loss", "selection_loss", "grad_norm")


class _Known(TypedDict):
    kind: str
    step: int


class _Line(_Known, total=False):
    """A line of metrics.jsonl, as far as a resumed run reads it."""

    stream: str | None
    cross_entropy: float
    full: float
    sparse: float


class Metrics:
    """Collects steps without waiting for the device; `fetch` brings them over in one copy, checks, writes and shows them.

    Of several ranks, rank 0 alone has one.
    """

    def __init__(
        self, run_dir: Path, start_step: int, total_steps: int, aligned: bool, *, distils: bool = False, track: str = "none",
        peak_flops: float | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            start_step: more than 0 continues a run: lines of later steps, from work that was lost, are cut off.
            aligned: the method has alignment losses.
            distils: the selector has a loss of its own.
            track: see `ssa.train.trackers.open_tracker`.
            peak_flops: of all devices of the run together; None = not known, and no MFU.
            device: whose memory is reported.
        """
        self.path = run_dir / "metrics.jsonl"
        self.aligned, self.distils, self.peak_flops, self.device = aligned, distils, peak_flops, device
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._pending_tokens = 0
        self._pending_flops: float | None = 0.0
        self._clock = time.perf_counter()
        kept = [(text, line) for text, line in self._complete_lines() if line["step"] <= start_step]
        write_atomically(self.path, "".join(text + "\n" for text, _ in kept))
        self._spikes = SpikeDetector()
        for _, line in kept:
            if line["kind"] == "train" and "cross_entropy" in line:
                self._spikes.is_spike(line.get("stream"), line["cross_entropy"])
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers: list[Tracker] = []
        if (tracker := open_tracker(track, run_dir, start_step)) is not None:
            self._trackers.append(tracker)
        self._display = Display(start_step, total_steps)

    def _complete_lines(self) -> Iterator[tuple[str, _Line]]:
        """(text, content); a kill can leave the last line cut in two."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        for number, text in enumerate(lines, start=1):
            try:
                line: _Line = parse_json(text, f"{self.path}, line {number},", _Line, largest=None)
            except UserError as error:
                raise UserError(f"{error}; remove the line to go on without it") from None
            yield text.decode(), line

    def validation_at(self, step: int) -> dict[str, float] | None:
        """The validation losses written for `step`, if any."""
        for _, line in self._complete_lines():
            if line["kind"] == "valid" and line["step"] == step and "full" in line and "sparse" in line:
                return {"full": line["full"], "sparse": line["sparse"]}
        return None

    def add(
        self, values: torch.Tensor, *, step: int, stream: str | None, lr: float, tokens: int, new_tokens: int,
        flops: float | None = None, data_wait: float | None = None,
    ) -> None:  # fmt: skip
        """One step; nothing waits for the device.

        Args:
            values: fp32 [6] in the order of `DEVICE_VALUES`.
            tokens, new_tokens: read so far and in this step, by all ranks.
            flops: what this step computed on all ranks; None = not counted.
            data_wait: seconds that it waited for its batch.
        """
        line = {"kind": "train", "step": step, "stream": stream, "lr": lr, "tokens": tokens, "data_wait": data_wait}
        self._pending.append((line, values))
        self._pending_tokens += new_tokens
        self._pending_flops = None if flops is None or self._pending_flops is None else self._pending_flops + flops

    def fetch(self) -> None:
        """Write and show what `add` collected. A non-finite loss or gradient norm is a `UserError` that names its step."""
        if not self._pending:
            return
        rows = torch.stack([values for _, values in self._pending]).tolist()
        shared = self._shared_figures(max(time.perf_counter() - self._clock, 1e-9))
        lines: list[dict[str, Any]] = []
        for (known, _), row in zip(self._pending, rows, strict=True):
            line = known | dict(zip(DEVICE_VALUES, row, strict=True)) | shared
            if not self.aligned:
                line["sparsity_loss"] = line["commitment_loss"] = None
            if not self.distils:
                del line["selection_loss"]
            if problem := non_finite(line):
                self._write(lines)
                raise UserError(problem)
            usual = self._spikes.usual(line["stream"])
            line["loss_spike"] = self._spikes.is_spike(line["stream"], line["cross_entropy"])
            if line["loss_spike"]:
                self.say(f"step {line['step']}: loss spike, cross-entropy {line['cross_entropy']:.4f} where {usual:.4f} is usual")
            lines.append(line)
        self._write(lines)
        self._display.step(lines[-1])
        self._pending, self._pending_tokens, self._pending_flops = [], 0, 0.0
        self._clock = time.perf_counter()

    def _shared_figures(self, seconds: float) -> dict[str, float | None]:
        """Of all pending steps together."""
        mfu = memory = None
        if self.peak_flops is not None and self._pending_flops is not None:
            mfu = round(self._pending_flops / seconds / self.peak_flops, 4)
        if self.device is not None and self.device.type == "cuda":
            memory = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        return {"tokens_per_second": round(self._pending_tokens / seconds, 1), "mfu": mfu, "peak_memory_gb": memory}

    def valid(self, step: int, losses: dict[str, float]) -> None:
        """A validation; the time it took does not count as training time."""
        self._write([{"kind": "valid", "step": step} | losses])
        self._display.say(f"step {step}: validation loss " + ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items()))
        self.restart_clock()

    def probe(self, step: int, figures: dict[str, Any]) -> None:
        """What `ssa.train.probe.probe` found; the time it took does not count as training time."""
        self._write([{"kind": "probe", "step": step} | figures])
        kept = ", ".join(f"{mode} {figures[f'kept_mass_{mode}']:.4f}" for mode in ("full", "sparse"))
        self._display.say(f"step {step}: kept mass {kept}")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last fetch (a validation, a checkpoint)."""
        self._clock = time.perf_counter()

    def say(self, text: str) -> None:
        self._display.say(text)

    def close(self) -> None:
        self._display.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
            for tracker in self._trackers:
                tracker.write(line["step"], numbers(line))
        self._file.flush()


class SpikeDetector:
    """A loss is a spike where it lies more than `SIGMAS` above the median of the last `WINDOW` steps of its stream.

    The deviation is the median one, times 1.4826 as for a normal distribution, so that spikes do not raise the bar for the next ones; a level
    that lasts becomes the usual one after half a window.
    """

    SIGMAS, WINDOW, WARMUP = 6.0, 128, 32

    def __init__(self) -> None:
        self._last: defaultdict[str | None, deque[float]] = defaultdict(lambda: deque(maxlen=self.WINDOW))

    def usual(self, stream: str | None) -> float:
        """The median; NaN before the first step."""
        return median(self._last[stream]) if self._last[stream] else math.nan

    def is_spike(self, stream: str | None, loss: float) -> bool:
        """Judge a step, and remember it. Never true in the first `WARMUP` steps of a stream."""
        last = self._last[stream]
        spike = False
        if len(last) >= self.WARMUP:
            middle = median(last)
            deviation = 1.4826 * median(abs(x - middle) for x in last)
            # losses that do not move at all have no deviation; a thousandth of them is no spike
            spike = loss - middle > max(self.SIGMAS * deviation, 1e-3 * abs(middle))
        last.append(loss)
        return spike


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
            self._bar = Progress(*columns, console=console(file=sys.stdout))
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)
            self._bar.start()
        self._since: tuple[float, int] | None = None
        """When the first report came, and of which step."""

    def step(self, line: dict[str, Any]) -> None:
        text = f"loss {line['cross_entropy']:.4f}"
        if line["sparsity_loss"] is not None:
            text += f"  alignment {line['sparsity_loss'] + line['commitment_loss']:.2e}"
        text += f"  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        if line["mfu"] is not None:
            text += f"  MFU {line['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], description=text)
            return
        now = time.perf_counter()
        if self._since is None:  # the first step, which warms up and compiles, says nothing about the others
            self._since = (now, line["step"])
        else:
            eta = round((now - self._since[0]) / (line["step"] - self._since[1]) * (self.total_steps - line["step"]))
            text += f"  eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
        say(f"step {line['step']}/{self.total_steps}  {text}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
