"""What a run directory says about itself: where it is, its recipe, its text."""

from __future__ import annotations

import re
from pathlib import Path

from ssa.config import Recipe, load_recipe
from ssa.errors import UserError
from ssa.train.checkpoint import LATEST
from ssa.train.run_directory import RECIPE, find_data

DEFAULT_CONTEXT = 2048
"""Of a model directory, which no run recorded a context for."""


def run_home(run: Path | str) -> Path:
    """The run directory that a checkpoint in it belongs to, whatever link leads there; any other directory is its own."""
    path = Path(run).absolute()
    if path.name == LATEST and (path.parent / "checkpoints").is_dir():
        return path.parent
    for place in (path, path.resolve()):
        if place.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", place.name):
            return place.parent.parent
    return Path(run)


def run_recipe(run: Path | str) -> Recipe | None:
    """The resolved recipe of a run; None for a model directory."""
    path = run_home(run) / RECIPE
    return load_recipe(str(path)) if path.is_file() else None


def run_context(run: Path | str) -> int:
    """Tokens of a row in training; `DEFAULT_CONTEXT` for a model directory."""
    recipe = run_recipe(run)
    return DEFAULT_CONTEXT if recipe is None else recipe.data.context


def run_data(run: Path | str) -> Path:
    """The prepared text that a run was trained on, wherever it lies now, see `ssa.train.run_directory.find_data`.

    Raises:
        UserError: It is not there any more, other data is in its place, or `run` is a model directory.
    """
    try:
        return find_data(run_home(run), run_recipe(run))
    except UserError as error:
        raise UserError(f"{error}; pass --data with a prepared directory, text files or builtin:python") from None
