"""What the four benchmarks share: cells of tasks and lengths, one Markdown table.

DIRECTORY/ruler.json etc. are as `ssa.eval.results` says, with each budget's "cells"; DIRECTORY/ruler.md is the table;
DIRECTORY/items/ruler/KEY/ holds the items with what the model wrote, one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ssa.errors import UserError
from ssa.eval.engine import Entry, Job, Record, new_entry, run_jobs
from ssa.eval.model_under_test import ModelUnderTest
from ssa.eval.tasks import TaskRequest, is_complete
from ssa.files import write_atomically


class CellJob(Job, Protocol):
    """A job of a suite."""

    def cells(self, records: list[Record]) -> list[dict[str, Any]]:
        """Figures of the finished job, each with the "task" and "length" it is for."""
        ...


def check_length(length: int, subject: ModelUnderTest) -> None:
    """Raises `UserError` where the model has no such position."""
    limit = subject.model.config.max_position_embeddings
    if length > limit:
        raise UserError(
            f"length {length} exceeds the model's {limit} positions; --rope-factor {-(-length // limit)} makes it reach further"
        )


def run_suite(
    name: str, jobs: Sequence[CellJob], setting: dict[str, Any], request: TaskRequest, show: Callable[[Entry], str],
    average: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda cells: {},
) -> Entry:  # fmt: skip
    """Compute what is missing, and the entry of the results; its table too, where no other rank has anything left to do.

    Args:
        show: The entry to its Markdown table.
        average: The cells of a budget to the figures over them.
    """
    entry = new_entry(request, setting)

    def figures(records: list[list[Record]], seconds: float) -> dict[str, Any]:
        cells = [cell for job, of_job in zip(jobs, records, strict=True) for cell in job.cells(of_job)]
        return {"cells": cells, **average(cells), "seconds": seconds}

    entry = run_jobs(request, name, entry, jobs, figures)
    if is_complete(entry, request.budgets):
        table = show(entry)
        write_atomically(request.directory / f"{name}.md", table)
        if request.console is not None:
            request.console.print()
            request.console.print(table, markup=False, highlight=False, soft_wrap=True)
    return entry


def title(entry: dict[str, Any], text: str) -> str:
    model = entry["model"]
    who = model["method"] + (f" at step {model['step']}" if model["step"] is not None else "")
    if prompts := entry["setting"].get("prefill_mode"):
        text += f", prompts read by {prompts} attention"
    notes = "".join(f"\n{note}.\n" for note in entry["notes"])
    return f"{who}: {text}\n{notes}\n"


def local_folder(data_dir: Path | None, name: str) -> Path | None:
    """DATA_DIR/NAME where there is such a folder, else DATA_DIR."""
    if data_dir is None or not (data_dir / name).is_dir():
        return data_dir
    return data_dir / name
