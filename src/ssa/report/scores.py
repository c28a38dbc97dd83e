"""Scores of tasks as an evaluation file has them, and runs that differ in their seed alone taken together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssa.report.collect import RunEvidence
from ssa.report.page import colours

LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "nats")
PREFERRED = ("acc_norm", "acc", "word_perplexity")
"""Of several metrics of a task, the one that the paper reports."""
_PLAIN = ("score", "accuracy", "perplexity", "nats_per_token")


@dataclass(frozen=True)
class Figure:
    """One number with what is known of its spread."""

    mean: float
    spread: float | None
    """Standard deviation over seeds or runs where there are several, else the standard error over items; None = unknown."""

    def text(self, scale: float, digits: int) -> str:
        return f"{scale * self.mean:.{digits}f}" + ("" if self.spread is None else f" ± {scale * self.spread:.{digits}f}")


@dataclass(frozen=True)
class Column:
    """What a score is of: a task's metric at a length (None where the task has none)."""

    task: str
    length: int | None
    metric: str

    @property
    def is_share(self) -> bool:
        """A score from 0 to 1; otherwise it has a unit of its own, and lower is better."""
        return not any(word in self.metric for word in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    method: str
    colour: str
    runs: list[RunEvidence]


def groups(runs: Sequence[RunEvidence]) -> list[Group]:
    """Runs that differ in their seed alone are one line with error bars; others are by themselves."""
    together: dict[str, list[RunEvidence]] = {}
    for run in runs:
        together.setdefault(run.seed_group, []).append(run)
    shades = colours([members[0].method for members in together.values()])
    result = []
    for members, colour in zip(together.values(), shades, strict=True):
        name = min((run.name for run in members), key=len) + (f", {len(members)} seeds" if len(members) > 1 else "")
        result.append(Group(name, members[0].method, colour, members))
    return result


def scores_of(file: str, setting: dict[str, Any], figures: dict[str, Any]) -> dict[Column, Figure]:
    """The scores in one budget's figures: of one task, or of a list of "cells" with a task and a length each. Of several metrics of a
    task, the preferred one."""
    if isinstance(cells := figures.get("cells"), list):
        found: dict[Column, Figure] = {}
        for cell in cells:
            found |= _of_task(str(cell.get("task", file)), cell.get("length"), cell)
        return found
    return _of_task(str(setting.get("task", file)), setting.get("length"), figures)


def _of_task(task: str, length: Any, figures: dict[str, Any]) -> dict[Column, Figure]:
    metrics: dict[str, Figure] = {}
    if isinstance(found := figures.get("metrics"), dict):
        for name, x in found.items():
            if isinstance(x, dict) and isinstance(x.get("mean"), int | float):
                spread = x.get("std") if len(x.get("by_seed") or {}) > 1 else x.get("stderr")
                metrics[name] = Figure(float(x["mean"]), None if spread is None else float(spread))
    else:
        for name in _PLAIN:
            if isinstance(value := figures.get(name), int | float):
                # a perplexity's error is given in nats, and is none of the perplexity itself
                error = figures.get("standard_error") if name != "perplexity" else None
                metrics[name] = Figure(float(value), None if error is None else float(error))
                break
    name = next((m for m in PREFERRED if m in metrics), next(iter(metrics), None))
    if name is None:
        return {}
    return {Column(task, length if isinstance(length, int) else None, name): metrics[name]}


def merged(figures: Sequence[Figure]) -> Figure:
    """Over runs with different seeds: the mean, and their standard deviation; one run's own figure otherwise."""
    if len(figures) == 1:
        return figures[0]
    means = [f.mean for f in figures]
    return Figure(statistics.fmean(means), statistics.stdev(means))
