"""The tasks that `ssa eval --tasks` knows, by name, and who runs them.

To add a task, write a runner and put its names into `TASKS`. A runner is a function

    run(names, request) -> {name: entry}

that gets all the names of its that were asked for at once, measures each at every budget of `request`, keeps its entries in files
under `request.directory` (see `ssa.eval.results`) and prints its own tables to `request.console`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ssa.budget import AttentionMode, Reading
from ssa.errors import UserError
from ssa.eval import long
from ssa.eval.model_under_test import ModelUnderTest

CHOICE_TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "copa")


@dataclass(frozen=True)
class TaskRequest:
    """What `ssa eval` asks of a runner."""

    subject: ModelUnderTest
    budgets: Sequence[Reading]
    directory: Path
    """For the results."""
    data_dir: Path | None = None
    """Local files; None = the runner's own source, if it has one."""
    seeds: Sequence[int] = (0,)
    num_fewshot: int | dict[str, int] | None = None
    """Examples before each question, for all tasks or by task; None = as the task has it by itself."""
    limit: int | None = None
    """Items (or cases) of a task; None = all."""
    lengths: Sequence[int] = ()
    """Context lengths in tokens, for tasks that have them."""
    max_length: int | None = None
    """Longest input in tokens; None = the model's positions."""
    prefill_mode: AttentionMode | None = None
    """How tasks that generate read their prompts, where it is not as they go on; None = as they go on."""
    haystack: str | None = None
    """Text that synthetic tasks hide their needles in; None = the embedded corpus."""
    batch_tokens: int | None = None
    """Tokens computed at once; None = the runner's default."""
    console: Console | None = None
    """Where progress and tables go; None = nowhere."""


TaskRunner = Callable[[Sequence[str], TaskRequest], dict[str, dict[str, Any]]]

TASKS: dict[str, str] = {
    **dict.fromkeys(CHOICE_TASKS, "ssa.eval.choices:run"),
    "wikitext": "ssa.eval.wikitext:run",
    **long.RUNNERS,
}
"""Task -> "module:function" of its runner, imported when it is needed."""
GENERATING = frozenset(f"ssa.eval.long.run:run_{name}" for name in ("ruler", "longbench", "longeval"))
"""Runners that let the model write."""
HARNESS = "ssa.eval.harness_run:run"
"""Who runs what needs files while no data directory is given: lm-evaluation-harness, which fetches its own."""
NEEDS_FILES = frozenset({"ssa.eval.choices:run", "ssa.eval.wikitext:run"})
PAPER_SHOTS = {"piqa": 3, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 5}
"""Examples before each question in the paper's Table 1."""


def parse_tasks(text: str, data_dir: str | Path | None) -> list[str]:
    """ "piqa,hellaswag" -> ["piqa", "hellaswag"]; without a data directory any task of lm-evaluation-harness is a name too.

    Raises:
        UserError: A name that nobody knows; of lm-eval's that is found out later.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError(f"tasks {text!r} names none; there are {', '.join(TASKS)}")
    unknown = [name for name in names if name not in TASKS]
    if unknown and data_dir is not None:
        raise UserError(f"no task {unknown[0]!r} for local files; there are {', '.join(TASKS)}")
    return names


def parse_shots(text: str) -> int | dict[str, int]:
    """ "5" -> 5; "paper" -> `PAPER_SHOTS`; "piqa=3,hellaswag=10" -> a dictionary, where tasks left out have their own number."""
    if text.strip() == "paper":
        return dict(PAPER_SHOTS)
    try:
        pairs = [(name.strip(), int(count)) for name, _, count in (part.rpartition("=") for part in text.split(","))]
    except ValueError:
        pairs = []
    counts = dict(pairs)
    if not pairs or min(counts.values()) < 0 or len(counts) < len(pairs) or ("" in counts and len(counts) > 1):
        raise UserError(f"shots {text!r} is neither a number, nor like piqa=3,hellaswag=10, nor paper")
    return counts.get("", counts)


def shots(request: TaskRequest, name: str) -> int | None:
    """Examples before each question of the task; None = as the task has it by itself."""
    return request.num_fewshot.get(name) if isinstance(request.num_fewshot, dict) else request.num_fewshot


def is_complete(entry: dict[str, Any], budgets: Sequence[Reading]) -> bool:
    """Whether it has every budget: no other rank has any items of them left to do."""
    return all(str(budget) in entry["budgets"] for budget in budgets)


def runner_of(name: str, data_dir: Path | None) -> str:
    """ "module:function" of what runs the task."""
    target = TASKS.get(name, HARNESS)
    return HARNESS if data_dir is None and target in NEEDS_FILES else target


def run_tasks(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """{task: entry}, in the order of `names`; tasks of one runner are run together.

    Under torchrun a rank's entry lacks what other ranks had not done when it was made. Another pass over tasks of Table 1, which only puts
    logged items together, completes those of the rank that finishes last, so that it can write the table.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(runner_of(name, request.data_dir), []).append(name)
    entries: dict[str, dict[str, Any]] = {}
    of_table1: list[tuple[TaskRunner, list[str]]] = []
    for target, group in groups.items():
        module, _, function = target.partition(":")
        runner: TaskRunner = getattr(importlib.import_module(module), function)
        if target in NEEDS_FILES:
            of_table1.append((runner, group))
        entries |= runner(group, request)
    for runner, group in of_table1:
        if not all(is_complete(entries[name], request.budgets) for name in group):
            entries |= runner(group, request)
    return {name: entries[name] for name in names}
