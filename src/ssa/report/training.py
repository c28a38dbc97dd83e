"""How the runs were trained: a table of their ends, and every curve that metrics.jsonl holds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from ssa.analysis.results import curve
from ssa.report.charts import line_figure, marked
from ssa.report.collect import RunEvidence
from ssa.report.page import Cell, Section, colours, table
from ssa.report.svg import Series, number

POINTS = 240
"""A curve is drawn with so many points at most."""
_KNOWN = {
    "kind",
    "step",
    "stream",
    "tokens",
    "loss",
    "cross_entropy",
    "sparsity_loss",
    "commitment_loss",
    "selection_loss",
    "queries",
}

_CURVES: tuple[tuple[tuple[str, ...], str, str, bool, str], ...] = (
    (("cross_entropy",), "Training loss", "cross-entropy (nats / token)", False,
     "The thick line is a running mean of the thin one. Lower is better. SSA's steps alternate at random between full and sparse attention."),
    (("sparsity_loss", "commitment_loss"), "Alignment loss", "sparsity + commitment", True,
     "How far the outputs of full and sparse attention are apart at the same layer (logarithmic). Only SSA trains on it."),
    (("selection_loss",), "Selectors' loss", "nats", False,
     "How far the importance of blocks is from the attention that they get (eviction_loss_weight)."),
    (("tokens_per_second",), "Speed", "tokens / second", False, "Training throughput, validations and checkpoints left out."),
    (("mfu",), "Model FLOPs utilisation", "share of the peak", False, "Arithmetic the model needs over what the device could do."),
    (("peak_memory_gb",), "Peak memory", "GB", False, "Largest memory in use so far on one device."),
    (("data_wait",), "Waiting for data", "seconds a step", False, "How long steps waited for their batch; it should stay near zero."),
    (("grad_norm",), "Gradient norm", "norm before clipping", True, "Spikes are where training was close to diverging (logarithmic)."),
    (("lr",), "Learning rate", "learning rate", False, ""),
)  # fmt: skip


_BY_MODE = (
    ("valid", "{}", "Validation loss", "validation loss (nats / token)", "The closer the two lines of a run, the less it costs to go sparse."),
    ("probe", "kept_mass_{}", "Kept mass while training", "kept mass",
     "Share of the full-attention weight on the selected blocks, in probes on validation text."),
    ("probe", "entropy_bits_{}", "Entropy while training", "entropy (bits)", "Of full attention, in the same probes."),
    ("probe", "nll_{}", "Loss of the probes", "nats / token", "On the same text."),
)  # fmt: skip


def training(runs: Sequence[RunEvidence]) -> Section:
    """Curves by step of all runs together. Numbers of metrics.jsonl that have no caption of their own are drawn under their name."""
    trained = [run for run in runs if run.metrics]
    if not trained:
        return Section("Training")
    shades = dict(zip((id(run) for run in runs), colours([run.method for run in runs]), strict=True))
    named = [(run, shades[id(run)]) for run in trained]
    pictures = [p for p in (_curve(named, *spec) for spec in _CURVES) if p]
    pictures[1:1] = [p for p in (_by_mode(named, *spec) for spec in _BY_MODE) if p]
    drawn = _KNOWN | {name for names, *_ in _CURVES for name in names}
    drawn |= {name.format(mode) for _, name, *_ in _BY_MODE for mode in ("sparse", "full")}
    for name in sorted({key for run in trained for line in run.metrics for key, x in line.items() if _is_number(x)} - drawn):
        if picture := _curve(named, (name,), name.replace("_", " ").capitalize(), name, False, ""):
            pictures.append(picture)
    return Section("Training", "Everything in metrics.jsonl, all runs in one picture.", [_table(trained)], pictures)


def smooth(values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """(where, mean) of a running mean over a thirtieth of the curve, at both ends over what there is, at up to `points` places;
    `where` counts in places of `values`, from 0."""
    count = len(values)
    half = max(1, count // 60)
    sums = [0.0, *itertools.accumulate(values)]
    places = range(count) if count <= points else [round(i * (count - 1) / (points - 1)) for i in range(points)]
    spans = [(max(0, i - half), min(count, i + half + 1)) for i in places]
    return [float(i) for i in places], [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _curve(
    named: Sequence[tuple[RunEvidence, str]], names: tuple[str, ...], title: str, label: str, log: bool, caption: str
) -> str | None:
    series = []
    shown = []
    for run, colour in named:
        steps, values = curve(run.metrics, *names)
        if not steps and names == ("cross_entropy",):
            steps, values = curve(run.metrics, "loss")
        if log:
            pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
            steps, values = [s for s, _ in pairs], [v for _, v in pairs]
        if len(steps) < 2 or (names == ("mfu",) and not any(values)):
            continue
        shown.append((run.name, colour))
        where, means = smooth(values)
        at = [steps[0] + (steps[-1] - steps[0]) * w / (len(steps) - 1) for w in where]
        if names in (("cross_entropy",), ("grad_norm",)):
            stride = max(1, len(steps) // 300)
            series.append(Series(run.name, colour, steps[::stride], values[::stride], faint=True))
        series.append(marked(run.name, run.method, colour, at, means))
    return line_figure(series, title, caption, legend=shown, xlabel="step", ylabel=label, log_y=log)


def _by_mode(named: Sequence[tuple[RunEvidence, str]], kind: str, name: str, title: str, label: str, caption: str) -> str | None:
    """A figure of lines of `kind` that is given for both modes; `name` says what it is called, with {} for the mode."""
    series, shown = [], []
    for run, colour in named:
        lines = [line for line in run.metrics if line.get("kind") == kind]
        for mode in ("sparse", "full"):
            steps, values = curve(lines, name.format(mode))
            if len(steps) > 1:
                series.append(marked(f"{run.name}, {mode}", run.method, colour, steps, values, dashed=mode == "full"))
                shown.append((run.name, colour))
    how = f"Solid: sparse attention; dashed: full attention. {caption}"
    return line_figure(series, title, how, legend=shown, xlabel="step", ylabel=label)


def _table(runs: Sequence[RunEvidence]) -> str:
    columns: list[tuple[str, Callable[[RunEvidence], float | None]]] = [
        ("seed", lambda run: None if run.recipe is None else run.recipe["train"].get("seed")),
        ("steps", lambda run: _last(run, "train", "step")),
        ("tokens read", lambda run: _last(run, "train", "tokens")),
        ("last loss", lambda run: _tail(run, "cross_entropy")),
        ("valid, full", lambda run: _last(run, "valid", "full")),
        ("valid, sparse", lambda run: _last(run, "valid", "sparse")),
        ("tokens/s", lambda run: _median(run, "tokens_per_second")),
        ("MFU", lambda run: _median(run, "mfu")),
        ("peak GB", lambda run: _last(run, "train", "peak_memory_gb")),
        ("loss spikes", _spikes),
    ]
    values = [[value(run) for _, value in columns] for run in runs]
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in values)]
    losses = {"last loss", "valid, full", "valid, sparse"}
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    for run, row in zip(runs, values, strict=True):
        cells: list[Cell | str] = [Cell(run.method, kind="text")]
        for i in kept:
            x, name = row[i], columns[i][0]
            known = [y for r in values if (y := r[i]) is not None]
            best = name in losses and len(set(known)) > 1 and x == min(known)
            cells.append(Cell("–" if x is None else f"{x:.4f}" if name in losses else number(x), best))
        rows.append((run.name, cells))
    note = "Losses in nats per token, the last one a mean over the last twentieth of the steps; speed and MFU are medians."
    return table("Training", note, ["run", "method", *(columns[i][0] for i in kept)], rows)


def _is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _spikes(run: RunEvidence) -> float | None:
    found = [line["loss_spike"] for line in run.metrics if isinstance(line.get("loss_spike"), bool)]
    return sum(found) if found else None


def _last(run: RunEvidence, kind: str, name: str) -> float | None:
    found = [line[name] for line in run.metrics if line.get("kind") == kind and _is_number(line.get(name))]
    return found[-1] if found else None


def _tail(run: RunEvidence, name: str) -> float | None:
    _, values = curve(run.metrics, name)
    return statistics.fmean(values[-max(1, len(values) // 20) :]) if values else None


def _median(run: RunEvidence, name: str) -> float | None:
    _, values = curve(run.metrics, name)
    return statistics.median(values) if values else None
