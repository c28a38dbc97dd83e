"""A run's directory and what it records of itself: recipe, starts, and where its data lies now.

A path in the recipe is relative to where training was started. Each start records that directory and the run's own, so that the run's data is
found from anywhere, and where both were moved together; it is the run's data if the hash of its index is the recorded one.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TypedDict

from ssa.checked_json import read_json
from ssa.config import Recipe, load_recipe
from ssa.data.shards import INDEX
from ssa.errors import UserError
from ssa.files import sha256_of_file
from ssa.runs.checkpoints import LATEST

RECIPE, ENVIRONMENT = "recipe.json", "environment.json"
DEFAULT_CONTEXT = 2048
"""Of a model directory, which no run recorded a context for."""


class DataRecord(TypedDict, total=False):
    """What a start records of the run's data."""

    path: str
    fingerprint: str
    """See `ssa.train.build.Data`."""
    index: str
    """SHA-256 of the index in `path`; starts of old have none."""


class Start(TypedDict, total=False):
    """An entry of environment.json, as far as it is read again."""

    directory: str
    """Where training was started, absolute."""
    run: str
    """The run directory, absolute."""
    data: DataRecord


class _Environment(TypedDict):
    starts: list[Start]


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
    """The prepared text that a run was trained on, wherever it lies now, see `ssa.runs.home.find_data`.

    Raises:
        UserError: It is not there any more, other data is in its place, or `run` is a model directory.
    """
    try:
        return find_data(run_home(run), run_recipe(run))
    except UserError as error:
        raise UserError(f"{error}; pass --data with a prepared directory, text files or builtin:python") from None


def read_starts(run: Path) -> list[Start]:
    """The starts in RUN/environment.json, oldest first; none where there is no such file.

    Raises:
        UserError: It is damaged.
    """
    path = run / ENVIRONMENT
    if not os.path.lexists(path):
        return []
    try:
        return read_json(path, _Environment)["starts"]
    except UserError as error:
        raise UserError(f"{error}; restore it, or move it away to go on without it") from None


def places(run: Path, name: str) -> list[Path]:
    """Where `name`, a path in the recipe of `run`, may lie: from here, from where training was started, or moved together with the run."""
    found, here = [Path(name)], os.path.abspath(run)
    for start in reversed(read_starts(run)):
        if "directory" not in start or "run" not in start:
            continue
        then = os.path.normpath(os.path.join(start["directory"], name))
        found.append(Path(then))
        with contextlib.suppress(ValueError):  # on Windows the two may lie on two drives
            found.append(Path(os.path.normpath(os.path.join(here, os.path.relpath(then, start["run"])))))
    return list(dict.fromkeys(found))


def find_data(run: Path, recipe: Recipe | None) -> Path:
    """The prepared data that `run` was trained on: where `recipe.data.path` may lie, or what training prepared inside the run.

    Raises:
        UserError: It is not there any more, or what is there is other data; the message names the places.
    """
    data = next((start["data"] for start in reversed(read_starts(run)) if "data" in start), DataRecord())
    index = data.get("index", None if recipe is None or recipe.data.mixture else data.get("fingerprint"))
    tried = [*([] if recipe is None else places(run, recipe.data.path)), run / "data"]
    if recipe is not None and index is not None:  # for runs that did not record where: somewhere above it training was started
        tried += [parent / recipe.data.path for parent in Path(os.path.abspath(run)).parents]
    prepared = [place for place in tried if (place / INDEX).is_file()]
    for place in prepared:
        if index in (None, sha256_of_file(place / INDEX)):
            return place
    if prepared:
        raise UserError(f"the data in {prepared[0].absolute()} is not what {run} was trained on")
    if recipe is None:
        raise UserError(f"{run} has no data of its own, and no {RECIPE} that names it")
    named = dict.fromkeys(str(place.absolute()) for place in tried[:4])
    raise UserError(f"the data that {run} was trained on is not there any more (tried {', '.join(named)})")


def find_mixture(run: Path, mixture: dict[str, float]) -> dict[str, float]:
    """The recipe's mixture with its directories where they lie now."""

    def found(name: str) -> str:
        directory, colon, split = name.rpartition(":")
        for path, rest in ((name, ""), (directory, f":{split}")) if colon else ((name, ""),):
            for place in places(run, path):
                if (place / INDEX).is_file():
                    return f"{place}{rest}"
        return name

    return {found(name): weight for name, weight in mixture.items()}
