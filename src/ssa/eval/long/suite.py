"""What the four benchmarks share: logs by setting, results by budget, one Markdown table.

DIRECTORY/ruler.json etc. are as `ssa.eval.results` says, with each budget's "cells"; DIRECTORY/ruler.md is the table;
DIRECTORY/items/ruler/KEY/ holds the items with what the model wrote, one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ssa.budget import FULL, Reading
from ssa.errors import UserError
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather
from ssa.eval.model_under_test import ModelUnderTest, description, progress_bar, provenance
from ssa.eval.results import add_results, read_results, result_key
from ssa.eval.tasks import TaskRequest
from ssa.files import write_atomically
from ssa.ranks import Shard


class Job(Protocol):
    """Items that are logged together."""

    setting: dict[str, Any]

    def __len__(self) -> int: ...

    def compute(self, budget: Reading, log: ItemLog, shard: Shard, progress: Callable[[int], None] | None) -> None: ...

    def cells(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Figures of the finished job, each with the "task" and "length" it is for."""
        ...


@dataclass(frozen=True)
class Suite:
    """A benchmark's name and how its cells are shown."""

    name: str
    show: Callable[[dict[str, Any]], str]
    """An entry to its Markdown table."""
    average: Callable[[list[dict[str, Any]]], dict[str, Any]]
    """The cells of a budget to the figures over them."""


def check_length(length: int, subject: ModelUnderTest) -> None:
    """Raises `UserError` where the model has no such position."""
    limit = subject.model.config.max_position_embeddings
    if length > limit:
        raise UserError(
            f"length {length} exceeds the model's {limit} positions; --rope-factor {-(-length // limit)} makes it reach further"
        )


def run_suite(suite: Suite, jobs: Sequence[Job], setting: dict[str, Any], request: TaskRequest) -> dict[str, Any]:
    """Compute what is missing, and the entry of the results.

    The ranks of a group share the items. Each waits for nobody: the one that finishes last finds all of them and writes the results;
    for the others the entry lacks the budgets that are not complete.
    """
    subject, shard = request.subject, Shard.from_environment()
    path = request.directory / f"{suite.name}.json"
    read_results(path)  # a damaged file is better known now than after the work
    same = {"model_sha256": subject.sha256, "dtype": subject.dtype}
    entry: dict[str, Any] = {
        "setting": {**setting, **same},
        "model": description(subject),
        "notes": subject.model.config.attends.full_notes if FULL in request.budgets else [],
        "budgets": {},
    }

    def log(job: Job, budget: Reading) -> ItemLog:
        key = result_key({**job.setting, **same, "attention": str(budget)})
        return ItemLog(request.directory / "items" / suite.name / key, shard.rank)

    console = request.console if shard.rank == 0 else None
    for budget in request.budgets:
        total = sum(len(shard.share(len(job))) for job in jobs)
        with progress_bar(console, f"{suite.name}, {budget}", total) as progress:
            for job in jobs:
                job.compute(budget, log(job, budget), shard, progress)
    for budget in request.budgets:
        found = [gather(log(job, budget), len(job)) for job in jobs]
        if any(records is None for records in found):
            continue
        cells = [cell for job, records in zip(jobs, found, strict=True) for cell in job.cells(records or [])]
        entry["budgets"][str(budget)] = {
            "cells": cells, **suite.average(cells),
            "seconds": sum(record["seconds"] for records in found for record in records or []), **provenance(subject),
        }  # fmt: skip
    if len(entry["budgets"]) < len(request.budgets):
        if request.console is not None:
            request.console.print(f"rank {shard.rank} is done; the rank that finishes last writes {path}", highlight=False)
        return entry
    entry = add_results(path, entry)
    table = suite.show(entry)
    write_atomically(path.with_suffix(".md"), table)
    if request.console is not None:
        request.console.print()
        request.console.print(table, markup=False, highlight=False, soft_wrap=True)
    return entry


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def title(entry: dict[str, Any], text: str) -> str:
    model = entry["model"]
    who = model["method"] + (f" at step {model['step']}" if model["step"] is not None else "")
    notes = "".join(f"\n{note}.\n" for note in entry["notes"])
    return f"{who}: {text}\n{notes}\n"


def local_folder(data_dir: Path | None, name: str) -> Path | None:
    """DATA_DIR/NAME where there is such a folder, else DATA_DIR."""
    if data_dir is None or not (data_dir / name).is_dir():
        return data_dir
    return data_dir / name
