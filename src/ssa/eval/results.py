"""Evaluation results on disk: RUN/eval/perplexity.json, needle.json, tasks.json, ruler.json, ..., added to and never lost.

    {"format": 1, "latest": KEY, "results": {KEY: {"model": ..., "setting": {...}, ..., "budgets": {"full": {...}, "16x16": {...}}}}}

KEY is a hash of everything that two figures must share to be compared (text, context, checkpoint, precision, ...), all of it
under "setting". Budgets of one setting gather under one key, whenever they were measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

from ssa.checked_json import read_json
from ssa.errors import UserError
from ssa.files import write_atomically, writer_in_turn

TASKS_FILE = "tasks.json"
FORMAT = 1


class _Entry(TypedDict):
    budgets: dict[str, dict[str, Any]]


class _Results(TypedDict):
    format: Literal[1]
    latest: str | None
    results: dict[str, _Entry]


def result_key(setting: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def read_results(path: Path) -> dict[str, Any]:
    """The file's content, or that of an empty one where there is none.

    Raises:
        UserError: The file is damaged or of another format; it is left as it is.
    """
    if not path.exists():
        return {"format": FORMAT, "latest": None, "results": {}}
    try:
        return read_json(path, _Results)
    except UserError as error:
        raise UserError(f"{path} holds no evaluation results that this version reads ({error}); move it away") from None


def add_results(
    path: Path, entry: dict[str, Any], finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Put `entry` (with "setting" and "budgets") into the file and return it together with the budgets that were there.

    Ranks, or evaluations of one run that go on at the same time, wait for each other here. `finish`: what to make of all the
    entry's budgets before they are written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        turn = contextlib.ExitStack()
        turn.enter_context(writer_in_turn(path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    with turn:
        content = read_results(path)
        key = result_key(entry["setting"])
        before = content["results"].get(key, {"budgets": {}})
        budgets = {**before["budgets"], **entry["budgets"]}
        entry = {**entry, "budgets": finish(budgets) if finish else budgets}
        content["results"][key] = entry
        content["latest"] = key
        write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return entry
