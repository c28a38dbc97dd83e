"""`ssa doctor RUN`: whether everything that a run or a model directory consists of is there, whole, and belongs together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ssa import terminal
from ssa.analysis.results import read_metrics
from ssa.config import load_recipe
from ssa.data.mixture import open_mixture
from ssa.data.shards import TokenShards, read_index
from ssa.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from ssa.errors import UserError
from ssa.runs.checkpoints import LATEST, METADATA, newest_checkpoint, numbered_checkpoints, resolve_checkpoint, verify_checkpoint
from ssa.runs.home import RECIPE, find_data, find_mixture, read_starts, run_home, run_recipe

Check = tuple[str, Callable[[], str]]
"""What is looked at, and a function that says what was found or raises `UserError`."""


def examine_run(run: Path | str) -> int:
    """Print a line for each part of `run`, a run, a checkpoint or a model directory; 0 if all are well, 1 if not.

    Raises:
        UserError: There is no such directory.
    """
    console = terminal.console(highlight=False, markup=False, soft_wrap=True)
    path, healthy = Path(run), True
    if not path.is_dir():
        raise UserError(f"{run} is not a directory: name a run, a checkpoint or a model directory")
    home = run_home(path)
    is_run = (home / "checkpoints").is_dir() or (home / RECIPE).is_file()
    whole = is_run and (home.absolute() == path.absolute() or path.name == LATEST)
    console.print(str(home if whole else path))
    for name, look in _run_checks(home) if whole else _model_checks(path):
        try:
            console.print(f"  {name}: {look()}")
        except UserError as error:
            healthy = False
            console.print(f"  {name}: FAILED: {error}")
    console.print("all well" if healthy else "something is wrong: see FAILED above")
    return 0 if healthy else 1


def _run_checks(home: Path) -> Iterator[Check]:
    yield RECIPE, lambda: _recipe(home)
    yield "environment.json", lambda: f"starts recorded: {len(read_starts(home))}"
    yield "metrics.jsonl", lambda: _metrics(home)
    for path in numbered_checkpoints(home):
        yield path.name, lambda path=path: _hashes(path)  # type: ignore[misc]
    if os.path.lexists(home / LATEST):
        yield LATEST, lambda: _latest(home)
    if numbered_checkpoints(home):
        yield "model", lambda: _model(resolve_checkpoint(home))
        yield "tokenizer", lambda: _tokenizer(resolve_checkpoint(home))
    else:
        yield "checkpoints", lambda: "none yet"
    yield "data", lambda: _data(home)


def _model_checks(path: Path) -> Iterator[Check]:
    if os.path.lexists(path / METADATA):
        yield "files", lambda: _hashes(path)
    else:
        yield "files", lambda: f"no {METADATA}, so there are no hashes to compare"
    yield "model", lambda: _model(path)
    yield "tokenizer", lambda: _tokenizer(path)


def _recipe(home: Path) -> str:
    recipe = load_recipe(str(home / RECIPE))
    return f"method {recipe.model.method}, {recipe.train.steps} steps"


def _metrics(home: Path) -> str:
    faults: list[str] = []
    lines = read_metrics(home / "metrics.jsonl", faults)
    if faults:
        raise UserError(f"{home / 'metrics.jsonl'}, {faults[0]}; {len(faults)} such lines")
    return f"lines: {len(lines)}"


def _hashes(path: Path) -> str:
    files = verify_checkpoint(path)["files"]
    return f"{len(files)} files, {sum(file['bytes'] for file in files.values()) / 1e6:,.1f} MB, every hash as recorded"


def _latest(home: Path) -> str:
    newest = newest_checkpoint(home)
    if newest is None or not (home / LATEST).is_dir() or (home / LATEST).resolve().name not in (newest.name, LATEST):
        raise UserError(
            f"{home / LATEST} leads to {os.path.realpath(home / LATEST)}, the newest checkpoint is {newest}; remove the link"
        )
    return f"leads to {newest.name}"


def _model(path: Path) -> str:
    from ssa.model.stored import check_weights, parameter_shapes, read_config

    config = read_config(path)
    check_weights(path, config)
    return f"method {config.method}, {len(parameter_shapes(config))} tensors as config.json asks for"


def _tokenizer(path: Path) -> str:
    from ssa.model.stored import read_config

    size, room = vocabulary_size(load_tokenizer(path)), read_config(path).vocab_size
    if size > room:
        raise UserError(f"{path / 'tokenizer.json'} has {size} ids, the model only {room}")
    return f"{size} ids for {room} rows of the embedding"


def _data(home: Path) -> str:
    recipe = run_recipe(home)
    path = find_data(home, recipe)
    shards = [TokenShards(path, split) for split in read_index(path)["splits"]]
    if recipe is not None and recipe.data.mixture:
        shards += open_mixture(find_mixture(home, recipe.data.mixture), path).sources
    for split in shards:
        split.verify()
    newest = newest_checkpoint(home)
    if newest is not None and shards[0].tokenizer_fingerprint != fingerprint(load_tokenizer(newest)):
        raise UserError(f"{path} was prepared with another tokenizer than that of {newest}")
    known = any("data" in start for start in read_starts(home))
    count = sum(len(split.shards) for split in shards)
    return f"{path}: shards: {count}, every hash as recorded; {'the index is the one of training' if known else 'training recorded no hash of the index'}"
