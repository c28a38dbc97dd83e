"""The run directory: who may write to it, what it may be resumed with, and what it records.

RUN/recipe.json        the resolved recipe            RUN/environment.json   versions, device, git state, data, place, one entry a start
RUN/metrics.jsonl      see `ssa.train.metrics`        RUN/checkpoints/       see `ssa.train.checkpoint`
RUN/data/              shards, if `data.path` was not prepared before

A path in the recipe is relative to where training was started. Each start records that directory and the run's own, so that the run's data is
found from anywhere, and where both were moved together; it is the run's data if the hash of its index is the recorded one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ssa.checked_json import read_json, typed
from ssa.config import Recipe, load_recipe
from ssa.data.shards import INDEX
from ssa.errors import UserError
from ssa.files import LOCK, sha256_of_file, sole_writer, write_atomically

if TYPE_CHECKING:
    from ssa.train.build import Data
    from ssa.train.distributed import Ranks

RESUMABLE = frozenset({
    "steps", "log_every", "eval_every", "save_every", "keep_last", "async_save", "probe_every", "track", "verify_data",
    # how the work is cut, which leaves the rows of a step (checked apart) and so the run as it was, up to rounding
    "batch_size", "accumulation", "device", "deterministic", "activation_checkpointing", "recompute", "compile", "parallel", "shard_ranks",
    "reshard_after_forward", "reduce_every_micro_batch", "context_parallel",
})  # fmt: skip
"""Fields of `[train]` that a resumed run may change; any other would make it another run."""

_OWN = (
    "recipe.json",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "latest",
    "tensorboard",
    "wandb",
    "data",
    "eval",
    "analysis",
)
RECIPE, ENVIRONMENT = "recipe.json", "environment.json"


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


class Progress(TypedDict, total=False):
    """The `extra` of a run's checkpoints, see `ssa.train.checkpoint.load_checkpoint`."""

    data: str
    """The data's fingerprint."""
    rows_per_step: int
    guard: list[list[float]]


@contextlib.contextmanager
def open_run(out: Path, recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Hold the directory `out` for one run: created, locked against a second writer, and checked.

    A directory that holds nothing but prepared data counts as empty. `overwrite` deletes what a run wrote, and only in a directory that is
    a run.

    Raises:
        UserError: `out` is in use, holds something else or nothing to resume, or was started with another recipe (the field is named).
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and not out.is_dir():
        raise UserError(f"there is no run to resume in {out}: no such directory; leave --resume out to start one")
    busy = f"another process is training in {out}; wait for it, or name another directory with --out"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(out, busy))
        except OSError as error:
            raise UserError(f"run directory {out} cannot be written: {error.strerror}") from None
        names = {p.name for p in out.iterdir()} - {LOCK}
        if names - {"data"}:
            is_run = RECIPE in names
            if not (resume or overwrite):
                hint = "pass --resume or --overwrite, or" if is_run else "it is no run;"
                raise UserError(f"{out} is not empty: {hint} name another directory with --out")
            if not is_run:
                raise UserError(f"{out} holds {sorted(names)[0]} but no recipe.json: it is no run, and nothing in it was touched")
            if overwrite:
                for name in _OWN:
                    path = out / name
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            else:
                check_resumable(load_recipe(str(out / RECIPE)), recipe)
        elif resume:
            what = "it holds nothing but prepared data" if names else "it is empty"
            raise UserError(f"there is no run to resume in {out}: {what}; leave --resume out to start one")
        yield


def is_own(out: Path, path: Path) -> bool:
    """Whether `path` is the run directory `out` or lies in what `overwrite` deletes of it."""
    path, home = path.resolve(), out.resolve()
    return path == home or any(path.is_relative_to(home / name) for name in _OWN)


def check_resumable(old: Recipe, new: Recipe) -> None:
    """Refuse, naming the field, a recipe that differs from the run's in more than the `RESUMABLE` fields and where its data lies.

    That the data itself is the same is checked when it is open.
    """
    before, after = old.to_dict(), new.to_dict()
    for table, values in before.items():
        free = {"train": RESUMABLE, "data": {"path", "mixture"}}.get(table, frozenset())
        for name, value in values.items():
            if value != after[table][name] and name not in free:
                raise UserError(
                    f"{table}.{name} = {after[table][name]!r} differs from the run's {value!r}; "
                    f"a resumed run may change only where its data lies and train.{', train.'.join(sorted(RESUMABLE))}"
                )


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


def rows_per_step(recipe: Recipe, ranks: Ranks) -> int:
    """Rows that an optimizer step reads on all ranks together."""
    return recipe.train.batch_size * recipe.train.accumulation * ranks.data_world


def check_progress(extra: dict[str, Any], recipe: Recipe, data: Data, ranks: Ranks, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint with other data, other rows a step, or to a step that lies behind.

    Args:
        extra: What `load_checkpoint` gave back.
    """
    known = typed(extra, Progress, f"{checkpoint}: extra")
    if known.get("data") != data.fingerprint:
        raise UserError(f"the data in {data.path} is not what {checkpoint} was trained on; restore it, or start a new run")
    t, step = recipe.train, extra["step"]
    if step > t.steps:
        raise UserError(f"train.steps = {t.steps} lies before the run's step {step}; ask for more steps")
    rows = rows_per_step(recipe, ranks)
    if (before := known.get("rows_per_step", rows)) != rows:
        raise UserError(
            f"a step has {rows} rows (train.batch_size {t.batch_size} x train.accumulation {t.accumulation} x "
            f"{ranks.data_world} ranks) and had {before}; change train.accumulation so that it has as many"
        )


def record_start(out: Path, recipe: Recipe, environment: dict[str, Any]) -> None:
    """Write recipe.json and add `environment`, with this place, to the starts in environment.json.

    Raises:
        UserError: An earlier start of this run had other data.
    """
    starts = read_starts(out)
    for start in starts[-1:]:
        if start.get("data", {}).get("fingerprint", environment["data"]["fingerprint"]) != environment["data"]["fingerprint"]:
            raise UserError(
                f"the data in {environment['data']['path']} is not what {out} began with; restore it, or start a new run"
            )
    place = {"directory": os.getcwd(), "run": os.path.abspath(out)}
    write_atomically(out / ENVIRONMENT, json.dumps({"starts": [*starts, environment | place]}, indent=2) + "\n")
    write_atomically(out / RECIPE, recipe.to_json())
