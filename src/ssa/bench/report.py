"""The JSON of a benchmark: what ran, on what, every row as soon as it is there, and the bars at the end. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from ssa.errors import UserError
from ssa.files import check_directory, write_atomically
from ssa.runs.provenance import git_state, installed, versions


@dataclass(frozen=True)
class Bar:
    """One promise: `value` is to be at least (">=") or at most ("<=") `bar`; None = not measured."""

    name: str
    bar: float
    value: float | None
    sense: Literal[">=", "<="] = ">="
    value_graph: float | None = None
    """The same by CUDA-graph replay, where it was measured that way too."""

    def reached(self, value: float | None) -> bool | None:
        if value is None:
            return None
        return value >= self.bar if self.sense == ">=" else value <= self.bar

    def to_dict(self) -> dict[str, Any]:
        result = {
            "name": self.name,
            "bar": self.bar,
            "sense": self.sense,
            "value": self.value,
            "reached": self.reached(self.value),
        }
        if self.value_graph is not None:
            result |= {"value_graph": self.value_graph, "reached_graph": self.reached(self.value_graph)}
        return result

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured (bar {self.sense} {self.bar:g})"
        graph = "" if self.value_graph is None else f", by graph replay {self.value_graph:.2f}"
        verdict = "reached" if self.reached(self.value) else "missed"
        return f"{self.name}: {self.value:.2f}{graph} ({verdict}; bar {self.sense} {self.bar:g})"


class Deadline:
    """The seconds a whole run may take; 0 = as many as it needs."""

    def __init__(self, seconds: float) -> None:
        """
        Raises:
            UserError: less than 0 seconds.
        """
        if not seconds >= 0:
            raise UserError(f"budget_seconds = {seconds} must be 0 (no limit) or more")
        self.seconds, self._start = seconds, time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def passed(self) -> bool:
        return bool(self.seconds) and self.elapsed >= self.seconds


class Report:
    """Written after every row, so that a run that is cut off loses nothing it measured."""

    def __init__(self, path: Path | None, deadline: Deadline, **header: Any) -> None:
        """
        Raises:
            UserError: `path` cannot be written.
        """
        if path is not None:
            check_directory(path.parent)
            if path.is_dir():
                raise UserError(f"{path} cannot be written: it is a directory; name a file")
        self.path, self.deadline = path, deadline
        self.data: dict[str, Any] = {
            "command": _command(), "started": _now(), "finished": None,
            **header, "rows": [], "skipped": [], "bars": [],
        }  # fmt: skip

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        self.write()

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is used up; then `what` is named among what was skipped."""
        if not self.deadline.passed:
            return False
        self.data["skipped"].append(f"{what}: the budget of {self.deadline.seconds:g} s was used up")
        self.write()
        print(f"skipped {self.data['skipped'][-1]}", flush=True)
        return True

    def finish(self, bars: list[Bar]) -> None:
        self.data["bars"] = [bar.to_dict() for bar in bars]
        self.data |= {"finished": _now(), "seconds": round(self.deadline.elapsed, 1)}
        self.write()
        for bar in bars:
            print(bar, flush=True)

    def write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.data, indent=1) + "\n")


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and git state, for a report's header."""
    hardware: dict[str, Any] = {"device": device}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1), "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    return {"hardware": hardware, "versions": versions() | installed("fla-core", "flash-moba", "flash_moba"), "git": git_state()}


def _command() -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    words = ["ssa"] if ranks == "1" else ["torchrun", "--nproc-per-node", ranks, "-m", "ssa"]
    return shlex.join([*words, *sys.argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
