"""What the evaluations say: the paper's Tables 1 and 2, perplexity by budget with error bars, needle grids."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ssa.analysis.results import SAME_TEXT, needle_grids, perplexities, perplexity_setting
from ssa.budget import tokens_of
from ssa.report.charts import heat_figure, line_figure, marked
from ssa.report.collect import RunEvidence
from ssa.report.page import Cell, Section, table
from ssa.report.scores import Figure, Group, groups
from ssa.report.svg import tokens
from ssa.report.tasks import task_section


def evaluation(runs: Sequence[RunEvidence]) -> list[Section]:
    """Sections from RUN/eval/*.json."""
    evaluated = [run for run in runs if run.evaluations]
    if not evaluated:
        return []
    together = groups(evaluated)
    files = sorted(
        {name for run in evaluated for name in run.evaluations if name not in run.perplexities} - {"needle"},
        key=lambda name: (name != "tasks", name),
    )
    tasks = [section for name in files if (section := task_section(name, together))]
    return [_perplexity(together), *tasks, _needles(evaluated)]


def _perplexity(together: Sequence[Group]) -> Section:
    """A table and a picture of each text."""
    tables: list[str] = []
    pictures: list[str] = []
    alarms: list[str] = []
    for name in dict.fromkeys(name for group in together for run in group.runs for name in run.perplexities):
        what = name.capitalize()
        found, settings = _by_budget(together, name)
        if not found:
            continue
        if len(contexts := {setting["context"] for setting in settings}) == 1 and name != "perplexity":
            what += f", context {contexts.pop()}"
        if any(s[key] != settings[0][key] for s in settings for key in SAME_TEXT):
            alarms.append(
                "The runs were evaluated on different texts or with different windows: these perplexities do not compare. Evaluate again with the "
                f"same settings ({name})."
            )
        tables.append(_perplexity_table(what, found))
        pictures += filter(None, [_perplexity_chart(what, found)])
    return Section("Perplexity by budget", " ".join(alarms), tables, pictures)


Found = list[tuple[Group, dict[str, list[float]]]]


def _by_budget(together: Sequence[Group], name: str) -> tuple[Found, list[dict]]:
    """Each group's perplexities of its runs by budget, from the latest entries of that name; and those entries' settings."""
    found: Found = []
    settings = []
    for group in together:
        by_budget: dict[str, list[float]] = {}
        for run in group.runs:
            for entry in run.evaluations.get(name, [])[-1:]:
                settings.append(perplexity_setting(entry))
                for p in perplexities(entry):
                    by_budget.setdefault(p.budget, []).append(p.perplexity)
        if by_budget:
            found.append((group, by_budget))
    return found, settings


def _budgets(found: Found) -> list[str]:
    return sorted({b for _, by_budget in found for b in by_budget}, key=lambda b: (tokens_of(b), b))


def _perplexity_table(what: str, found: Found) -> str:
    budgets = _budgets(found)
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    means = [{b: statistics.fmean(values) for b, values in by_budget.items()} for _, by_budget in found]
    known = {b: [m[b] for m in means if b in m] for b in budgets}
    for (group, by_budget), mean in zip(found, means, strict=True):
        cells: list[Cell | str] = [Cell(group.method, kind="text")]
        for b in budgets:
            text = "–" if b not in mean else Figure(mean[b], _std(by_budget[b])).text(1, 2)
            cells.append(Cell(text, b in mean and len(set(known[b])) > 1 and mean[b] == min(known[b])))
        rows.append((group.name, cells))
    note = "As the paper's Table A10: one model read at several budgets (blocks x block size), smallest first. Lower is better."
    if any(len(group.runs) > 1 for group, _ in found):
        note += " ± is the standard deviation over runs with different seeds."
    return table(what, note, ["run", "method", *budgets], rows)


def _perplexity_chart(what: str, found: Found) -> str | None:
    budgets = _budgets(found)
    if len(budgets) < 2:
        return None
    series = []
    for group, by_budget in found:
        at = [i for i, b in enumerate(budgets) if b in by_budget]
        y = [statistics.fmean(by_budget[budgets[i]]) for i in at]
        spread = [_std(by_budget[budgets[i]]) for i in at]
        series.append(marked(group.name, group.method, group.colour, at, y, spread))
    caption = (
        "Larger budgets to the right, full attention last. A good sparse model is flat, and never gets worse with more budget. "
        "Error bars: standard deviation over runs with different seeds, where there are several."
    )
    labels: dict[str, Any] = {"xlabel": "budget (blocks x size)", "ylabel": "perplexity"}
    return line_figure(series, f"{what} by budget", caption, categories=budgets, **labels)


def _needles(runs: Sequence[RunEvidence]) -> Section:
    pictures = []
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    for run in runs:
        for entry in run.evaluations.get("needle", [])[-1:]:
            for grid in needle_grids(entry):
                heading = f"{run.name}, {grid.budget}"
                depths = [f"{100 * d:.0f}%" for d in grid.depths]
                lengths = [tokens(n) for n in grid.lengths]
                names = {"row_names": depths, "column_names": lengths, "row_label": "depth", "column_label": "length (tokens)"}
                pictures.append(heat_figure(grid.accuracy, heading, low=0.0, high=1.0, **names))
                known = [x for row in grid.accuracy for x in row if x is not None]
                rows.append((run.name, [Cell(grid.budget, kind="text"), f"{100 * statistics.fmean(known):.1f}", str(len(known))]))
    tables = []
    if rows:
        tables = [table("Needles found", "Mean over the grid, in %.", ["run", "budget", "found (%)", "cells"], rows)]
    intro = "Share of needles found, by length of the haystack and depth of the needle (0 % is the start of the text)."
    return Section("Needle in a haystack", intro, tables, pictures)


def _std(values: Sequence[float]) -> float | None:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return spread if spread is None or math.isfinite(spread) else None
