"""The run directory: who may write to it, what it may be resumed with, and what it records.

RUN/recipe.json        the resolved recipe            RUN/environment.json   versions, device, git state, data, place, one entry a start
RUN/metrics.jsonl      see `ssa.train.metrics`        RUN/checkpoints/       see `ssa.runs.checkpoints`
RUN/data/              shards, if `data.path` was not prepared before

How a run is found and read again, wherever it lies, is in `ssa.runs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch

from ssa.checked_json import typed
from ssa.collectives import Ranks
from ssa.config import Recipe, load_recipe
from ssa.data.mixture import Data
from ssa.device import device_name
from ssa.errors import UserError
from ssa.files import LOCK, sole_writer, write_atomically
from ssa.runs.home import ENVIRONMENT, RECIPE, read_starts
from ssa.runs.provenance import git_state, versions

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


def start_record(
    recipe: Recipe, data: Data, ranks: Ranks, parallel: str, dtype: torch.dtype, num_parameters: int
) -> dict[str, Any]:
    """What one start of a run is recorded with, ready for JSON.

    Args:
        parallel: How the ranks really share the model, see `ssa.train.parallel.resolve_parallel`.
        dtype: That of autocast.
    """
    return {
        "versions": versions(),
        "device": device_name(ranks.device),
        "ranks": ranks.world,
        "parallel": parallel,
        "context_parallel": ranks.context_ranks,
        "tokens_per_step": rows_per_step(recipe, ranks) * recipe.data.context,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": recipe.train.seed,
        "parameters": num_parameters,
        "git": git_state(),
        "data": {
            "path": str(data.path), "fingerprint": data.fingerprint, "index": data.index, "train_tokens": data.train.num_tokens,
        },
    }  # fmt: skip
