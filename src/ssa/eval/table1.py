"""Table 1 of the paper: methods x tasks under full and sparse inference, as Markdown and as LaTeX."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssa.budget import tokens_of
from ssa.errors import UserError
from ssa.eval.results import TASKS_FILE, read_results
from ssa.eval.tables import figure, markdown
from ssa.files import write_atomically
from ssa.methods import label

COLUMNS = {
    "piqa": ("PIQA", "acc_norm"), "hellaswag": ("HellaSwag", "acc_norm"), "arc_easy": ("ARC-e", "acc_norm"),
    "arc_challenge": ("ARC-c", "acc_norm"), "openbookqa": ("OBQA", "acc_norm"), "winogrande": ("WinoGrande", "acc"),
    "copa": ("COPA", "acc"), "wikitext": ("PPL", "word_perplexity"),
}  # fmt: skip
"""Task -> (heading, metric). Accuracies are normalised where lm-eval normalises them."""
AVERAGED = ("piqa", "hellaswag", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Row:
    budget: str
    method: str
    cells: Mapping[str, Mapping[str, Any]]
    """Heading -> {"mean", "std", ...} in the units of tasks.json."""

    @property
    def inference(self) -> str:
        return inference(self.budget)


def write_table1(entries: Mapping[str, Mapping[str, Any]], beside: Sequence[Path], directory: Path) -> list[Path]:
    """Write table1.md and table1.tex into `directory`.

    Args:
        entries: {task: entry} of the model just evaluated; tasks that Table 1 has no column for are left out.
        beside: Other evaluations' directories; their results in the same settings become rows.

    Returns:
        The files; none where no task has a column.

    Raises:
        UserError: A directory of `beside` has no results in these settings.
    """
    own = {task: entry for task, entry in entries.items() if task in COLUMNS and entry["budgets"]}
    if not own:
        return []
    models: list[Mapping[str, Mapping[str, Any]]] = [own, *(_same_settings(own, path) for path in beside)]
    rows = sorted((row for model in models for row in _rows(model)), key=lambda row: full_first(row.budget))
    notes = _notes(own)
    files = {"table1.md": to_markdown(rows, notes), "table1.tex": to_latex(rows, notes)}
    for name, text in files.items():
        write_atomically(directory / name, text)
    return [directory / name for name in files]


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    headings = _headings(rows)
    lines = [
        [row.inference, row.method, *(f"**{text}**" if best else text for text, best in _cells(row, rows, headings))]
        for row in rows
    ]
    return markdown(["inference", "method", *headings], lines, words=2) + "\n" + "".join(f"{note}\n" for note in notes)


def to_latex(rows: Sequence[Row], notes: Sequence[str]) -> str:
    r"""A `tabular` with booktabs rules; a \midrule between ways of inference."""
    headings = _headings(rows)
    lines = [f"% {note}" for note in notes]
    lines += [
        rf"\begin{{tabular}}{{ll{'r' * len(headings)}}}",
        r"\toprule",
        " & ".join(["Inference", "Method", *headings]) + r" \\",
    ]
    before = None
    for row in rows:
        if row.inference != before:
            lines.append(r"\midrule")
        cells = []
        for text, best in _cells(row, rows, headings):
            text = re.sub(" ± (.*)", r" {\\scriptsize $\\pm$ \1}", text)
            cells.append(rf"\textbf{{{text}}}" if best else text)
        first = row.inference.replace("x", r"$\times$") if row.inference != before else ""
        lines.append(" & ".join([first, row.method, *cells]) + r" \\")
        before = row.inference
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def inference(budget: str) -> str:
    """ "16x16" -> "sparse 256 (16x16)", "full" -> "full"."""
    return budget if budget == "full" else f"sparse {tokens_of(budget)} ({budget})"


def full_first(budget: str) -> tuple[bool, float]:
    """A key to sort by: full attention, then the smallest budget."""
    return budget != "full", tokens_of(budget)


def _rows(entries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    budgets = list(dict.fromkeys(name for entry in entries.values() for name in entry["budgets"]))
    method = next(iter(entries.values()))["model"]["method"]
    rows = []
    for name in budgets:
        figures = {
            task: entry["budgets"][name]["metrics"][COLUMNS[task][1]]
            for task, entry in entries.items()
            if name in entry["budgets"]
        }
        cells = {COLUMNS[task][0]: figures[task] for task in COLUMNS if task in figures and task != "wikitext"}
        if all(task in figures for task in AVERAGED):
            cells["avg"] = _average([figures[task] for task in AVERAGED])
        if "wikitext" in figures:
            cells["PPL"] = figures["wikitext"]
        rows.append(Row(name, label(method), cells))
    return rows


def _average(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over tasks; its deviation over the seeds that all of them have."""
    shared = set.intersection(*(set(f["by_seed"]) for f in figures))
    by_seed = {seed: statistics.fmean(f["by_seed"][seed] for f in figures) for seed in shared}
    std = statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None
    return {"mean": statistics.fmean(f["mean"] for f in figures), "std": std, "by_seed": by_seed}


def _same_settings(own: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """{task: entry} of another evaluation: the newest with the same setting, weights and precision aside."""
    results = list(read_results(path / TASKS_FILE)["results"].values())
    found = {}
    for task, entry in own.items():
        same = [other for other in results if _comparable(other) == _comparable(entry) and other["budgets"]]
        if same:
            found[task] = max(same, key=lambda other: max(f["measured"] for f in other["budgets"].values()))
    if not found:
        raise UserError(f"{path} has no results in the same settings; run the same ssa eval --tasks there first")
    return found


def _comparable(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry["setting"].items() if k not in ("model_sha256", "dtype")}


def _headings(rows: Sequence[Row]) -> list[str]:
    order = [heading for heading, _ in COLUMNS.values() if heading != "PPL"]
    order.insert(len(AVERAGED), "avg")
    return [heading for heading in [*order, "PPL"] if any(heading in row.cells for row in rows)]


def _cells(row: Row, rows: Sequence[Row], headings: Sequence[str]) -> list[tuple[str, bool]]:
    """(text, whether it is the best among the methods of one way of inference, where there are several)."""
    cells = []
    for heading in headings:
        known = [r.cells[heading]["mean"] for r in rows if r.inference == row.inference and heading in r.cells]
        if heading not in row.cells:
            cells.append(("-", False))
            continue
        best = (min if heading == "PPL" else max)(known)
        text = figure("word_perplexity" if heading == "PPL" else "acc", dict(row.cells[heading]))
        cells.append((text, len(known) > 1 and row.cells[heading]["mean"] == best))
    return cells


def _notes(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How each figure was measured, a line for each kind of task."""
    notes = [
        "Accuracies in per cent (normalised by the length of the choice where lm-eval does), mean ± standard deviation over seeds."
    ]
    for task, entry in entries.items():
        setting, heading = entry["setting"], COLUMNS[task][0]
        if task == "wikitext":
            notes.append(
                f"{heading}: WikiText word perplexity, windows of {setting['max_length']} tokens, {entry['items']} pages."
            )
            continue
        shots = f"{heading}: {setting['num_fewshot']}-shot, {entry['items']:,} items"
        source = f", examples from {entry['examples_from']}" if entry["examples_from"] else ""
        seeds = f", seeds {', '.join(map(str, setting['seeds']))}" if setting["seeds"] else ""
        notes.append(shots + source + seeds + ".")
    return notes
