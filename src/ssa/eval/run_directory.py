"""What a run directory says about itself: where it is, its recipe, its text."""

from __future__ import annotations

import re
from pathlib import Path

from ssa.config import Recipe, read_recipe
from ssa.errors import UserError
from ssa.eval.documents import is_prepared

DEFAULT_CONTEXT = 2048
"""Of a model directory, which no run recorded a context for."""


def run_home(run: Path | str) -> Path:
    """The run directory that a checkpoint in it belongs to; any other directory is its own."""
    path = Path(run).absolute()
    inside = path.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", path.name)
    return path.parent.parent if inside else Path(run)


def run_recipe(run: Path | str) -> Recipe | None:
    """The resolved recipe of a run; None for a model directory."""
    path = run_home(run) / "recipe.json"
    return read_recipe(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def run_context(run: Path | str) -> int:
    """Tokens of a row in training; `DEFAULT_CONTEXT` for a model directory."""
    recipe = run_recipe(run)
    return DEFAULT_CONTEXT if recipe is None else recipe.data.context


def run_data(run: Path | str) -> Path:
    """The prepared text that a run was trained on: where its recipe says, else what training prepared inside the run.

    Raises:
        UserError: It is not there any more, or `run` is a model directory.
    """
    recipe = run_recipe(run)
    for place in ([Path(recipe.data.path)] if recipe is not None else []) + [run_home(run) / "data"]:
        if is_prepared(place):
            return place
    raise UserError(
        f"{run} has no data of its own, or not any more; pass --data with a prepared directory, text files or builtin:python"
    )
