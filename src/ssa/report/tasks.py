"""Tables of tasks in the paper's layout (Tables 1 and 2): one part for each way of inference, a row a run, a column a task or a length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ssa.eval.table1 import AVERAGED, COLUMNS, full_first, inference
from ssa.report.charts import heat_figure, line_figure, marked
from ssa.report.page import Cell, Section, table
from ssa.report.scores import Column, Figure, Group, merged, scores_of
from ssa.report.svg import tokens

Scores = dict[tuple[str, int], dict[Column, Figure]]
"""(budget, number of the group) -> its scores."""
_TITLES = {
    "tasks": "Tasks",
    "ruler": "RULER",
    "longbench": "LongBench",
    "longeval": "LongEval",
    "books": "Perplexity of books by length",
}


def task_section(file: str, together: Sequence[Group]) -> Section | None:
    """RUN/eval/FILE.json of all runs; None where it has no scores.

    Where tasks have lengths, the table has a column a length (the mean over the tasks), and the tasks are in heat maps below.
    """
    scores, notes = _read(file, together)
    if not scores:
        return None
    title = _TITLES.get(file, file.replace("_", " ").capitalize())
    columns = list(dict.fromkeys(c for row in scores.values() for c in row))
    lengths = sorted({c.length for c in columns if c.length is not None})
    note = (
        "One part for each way of inference; sparse: tokens that a query reads (blocks x size). Scores in %, ± the standard deviation over seeds where there are several, else the standard "
        "error over items. The best of a part is tinted. " + " ".join(f"{n[:1].upper()}{n[1:]}." for n in notes)
    )
    if not lengths:
        return Section(title, "", [_table(title, note, scores, together, columns)])
    by_length = {key: _by_length(row) for key, row in scores.items()}
    columns = sorted({c for row in by_length.values() for c in row}, key=lambda c: (c.metric, c.length or 0))
    tables = [_table(title, "Mean over the tasks of each length. " + note, by_length, together, columns)]
    pictures = [p for p in (_curve(title, by_length, together),) if p]
    return Section(title, "", tables, pictures + _maps(scores, together, lengths))


def _read(file: str, together: Sequence[Group]) -> tuple[Scores, list[str]]:
    """The latest score of every column, merged over the runs of a group; and the notes of the evaluations."""
    scores: Scores = {}
    notes: list[str] = []
    for g, group in enumerate(together):
        each: dict[str, dict[Column, list[Figure]]] = {}
        for run in group.runs:
            latest: dict[str, dict[Column, Figure]] = {}
            entries = run.evaluations.get(file, [])
            current = [e for e in entries if e["setting"].get("model_sha256") == entries[-1]["setting"].get("model_sha256")]
            if len(current) < len(entries):
                notes.append(f"results of other checkpoints of {run.name} are left out")
            for entry in current:
                notes += [str(note) for note in entry.get("notes", [])]
                for budget, figures in entry["budgets"].items():
                    latest.setdefault(budget, {}).update(scores_of(file, entry["setting"], figures))
            for budget, row in latest.items():
                for column, value in row.items():
                    each.setdefault(budget, {}).setdefault(column, []).append(value)
        for budget, columns in each.items():
            scores[budget, g] = {column: merged(values) for column, values in columns.items()}
    return {key: row for key, row in scores.items() if row}, list(dict.fromkeys(notes))


def _table(title: str, note: str, scores: Scores, together: Sequence[Group], columns: Sequence[Column]) -> str:
    order = list(COLUMNS)
    known = sorted(
        columns, key=lambda c: order.index(c.task) if c.task in order else len(order)
    )  # stable: others keep their order
    shares, others = [c for c in known if c.is_share], [c for c in known if not c.is_share]
    averaged = [c for c in shares if c.task in AVERAGED]
    if len(averaged) < len(AVERAGED):
        averaged = shares if len(shares) > 1 else []
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    parts = []
    for budget in sorted({b for b, _ in scores}, key=full_first):
        parts.append(len(rows))
        part = {g: scores[budget, g] for g in range(len(together)) if (budget, g) in scores}
        complete = {g: row for g, row in part.items() if averaged and all(c in row for c in averaged)}
        means = {g: statistics.fmean(row[c].mean for c in averaged) for g, row in complete.items()}
        for g, row in part.items():
            cells: list[Cell | str] = [Cell(together[g].name, kind="text")]
            cells += [_score(c, row, list(part.values())) for c in shares]
            if averaged:
                best = g in means and len(set(means.values())) > 1 and means[g] == max(means.values())
                cells.append(Cell(f"{100 * means[g]:.2f}" if g in means else "–", best))
            cells += [_score(c, row, list(part.values())) for c in others]
            rows.append((inference(budget), cells))
    average = "average" if len(averaged) == len(shares) else "average of " + ", ".join(COLUMNS[c.task][0] for c in averaged)
    head = ["inference", "run", *map(_heading, shares), *([average] if averaged else []), *map(_heading, others)]
    return table(title, note, head, rows, parts)


def _score(column: Column, row: dict[Column, Figure], part: Sequence[dict[Column, Figure]]) -> Cell:
    if column not in row:
        return Cell("–")
    known = [other[column].mean for other in part if column in other]
    best = len(set(known)) > 1 and row[column].mean == (max if column.is_share else min)(known)
    return Cell(row[column].text(100 if column.is_share else 1, 2), best)


def _heading(column: Column) -> str:
    if column.length is None:
        name = COLUMNS.get(column.task, (column.task,))[0]
        return name if name == "PPL" else f"{name} ({column.metric.replace('_', ' ')})"
    return tokens(column.length) + ("" if column.is_share else f" ({column.metric.replace('_', ' ')})")


def _by_length(row: dict[Column, Figure]) -> dict[Column, Figure]:
    """Means over the tasks of each length; the spread is that of the mean of independent scores."""
    gathered: dict[Column, list[Figure]] = {}
    for column, value in row.items():
        gathered.setdefault(Column("", column.length, column.metric), []).append(value)
    result = {}
    for column, values in gathered.items():
        known = [f.spread for f in values if f.spread is not None]
        spread = sum(s * s for s in known) ** 0.5 / len(values) if len(known) == len(values) else None
        result[column] = Figure(statistics.fmean(f.mean for f in values), spread)
    return result


def _curve(title: str, by_length: Scores, together: Sequence[Group]) -> str | None:
    """Score by length: solid for the smallest sparse budget, dashed for full attention."""
    lengths = sorted({c.length for row in by_length.values() for c in row if c.length is not None})
    if len(lengths) < 2:
        return None
    share = all(c.is_share for row in by_length.values() for c in row)
    sparse = sorted({b for b, _ in by_length if b != "full"}, key=full_first)[:1]
    series, shown = [], []
    for (budget, g), row in by_length.items():
        if budget != "full" and budget not in sparse:
            continue
        values = sorted((lengths.index(c.length), f) for c, f in row.items() if c.length is not None)
        scale = 100 if share else 1
        y, spread = [scale * f.mean for _, f in values], [scale * (f.spread or 0.0) for _, f in values]
        group = together[g]
        at = [i for i, _ in values]
        series.append(marked(f"{group.name}, {budget}", group.method, group.colour, at, y, spread, dashed=budget == "full"))
        shown.append((group.name, group.colour))
    label = "score (%)" if share else next(c.metric for row in by_length.values() for c in row).replace("_", " ")
    what = f"Solid: budget {sparse[0]}; dashed: full attention." if sparse else "Full attention."
    return line_figure(
        series, title, what, legend=shown, heading=f"{title} by length", xlabel="context (tokens)", ylabel=label,
        categories=[tokens(n) for n in lengths], range_y=(0.0, 100.0) if share else (None, None),
    )  # fmt: skip


def _maps(scores: Scores, together: Sequence[Group], lengths: Sequence[int]) -> list[str]:
    """Tasks x lengths for every run and budget, where there are several tasks."""
    pictures = []
    for (budget, g), row in scores.items():
        at = {(c.task, c.length): f.mean for c, f in row.items() if c.is_share and c.length is not None}
        names = list(dict.fromkeys(task for task, _ in at))
        if len(names) < 2:
            continue
        heading = f"{together[g].name}, {'full attention' if budget == 'full' else budget}"
        picture = heat_figure(
            [[at.get((name, n)) for n in lengths] for name in names], heading, row_names=names,
            column_names=[tokens(n) for n in lengths], row_label="task", column_label="context (tokens)", low=0.0, high=1.0,
        )  # fmt: skip
        pictures.append(picture)
    return pictures
