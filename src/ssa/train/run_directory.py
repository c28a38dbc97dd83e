"""The run directory: who may write to it, what it may be resumed with, and what it records.

RUN/recipe.json        the resolved recipe            RUN/environment.json   versions, device, git state, data, one entry a start
RUN/metrics.jsonl      see `ssa.train.metrics`        RUN/checkpoints/       see `ssa.train.checkpoint`
RUN/data/              shards, if `data.path` was not prepared before
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.config import Recipe, read_recipe
from ssa.errors import UserError
from ssa.files import LOCK, sole_writer, write_atomically

if TYPE_CHECKING:
    from ssa.train.build import Data
    from ssa.train.distributed import Ranks

RESUMABLE = frozenset({
    "steps", "log_every", "eval_every", "save_every", "keep_last", "async_save", "probe_every", "track", "verify_data",
    # how the work is cut, which leaves the rows of a step (checked apart) and so the run as it was, up to rounding
    "batch_size", "accumulation", "device", "activation_checkpointing", "recompute", "compile", "parallel", "shard_ranks",
    "reshard_after_forward", "reduce_every_micro_batch", "context_parallel",
})  # fmt: skip
"""Fields of `[train]` that a resumed run may change; any other would make it another run."""

_OWN = ("recipe.json", "environment.json", "metrics.jsonl", "checkpoints", "tensorboard", "wandb", "data", "eval", "analysis")


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
            is_run = "recipe.json" in names
            if not (resume or overwrite):
                hint = "pass --resume or --overwrite, or" if is_run else "it is no run;"
                raise UserError(f"{out} is not empty: {hint} name another directory with --out")
            if not is_run:
                raise UserError(f"{out} holds {sorted(names)[0]} but no recipe.json: it is no run, and nothing in it was touched")
            if overwrite:
                for name in _OWN:
                    path = out / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            else:
                check_resumable(read_recipe((out / "recipe.json").read_text(encoding="utf-8"), str(out / "recipe.json")), recipe)
        elif resume:
            what = "it holds nothing but prepared data" if names else "it is empty"
            raise UserError(f"there is no run to resume in {out}: {what}; leave --resume out to start one")
        yield


def is_own(out: Path, path: Path) -> bool:
    """Whether `path` is the run directory `out` or lies in what `overwrite` deletes of it."""
    path, home = path.resolve(), out.resolve()
    return path == home or any(path.is_relative_to(home / name) for name in _OWN)


def check_resumable(old: Recipe, new: Recipe) -> None:
    """Refuse, naming the field, a recipe that differs from the run's in more than the `RESUMABLE` fields."""
    before, after = old.to_dict(), new.to_dict()
    for table, values in before.items():
        for name, value in values.items():
            if value != after[table][name] and not (table == "train" and name in RESUMABLE):
                raise UserError(
                    f"{table}.{name} = {after[table][name]!r} differs from the run's {value!r}; "
                    f"a resumed run may change only train.{', train.'.join(sorted(RESUMABLE))}"
                )


def rows_per_step(recipe: Recipe, ranks: Ranks) -> int:
    """Rows that an optimizer step reads on all ranks together."""
    return recipe.train.batch_size * recipe.train.accumulation * ranks.data_world


def check_progress(extra: dict[str, Any], recipe: Recipe, data: Data, ranks: Ranks, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint with other data, other rows a step, or to a step that lies behind.

    Args:
        extra: What `load_checkpoint` gave back.
    """
    if extra["data"] != data.fingerprint:
        raise UserError(f"the data in {data.path} is not what {checkpoint} was trained on; restore it, or start a new run")
    t, step = recipe.train, extra["step"]
    if step > t.steps:
        raise UserError(f"train.steps = {t.steps} lies before the run's step {step}; ask for more steps")
    rows = rows_per_step(recipe, ranks)
    if (before := extra.get("rows_per_step", rows)) != rows:
        raise UserError(
            f"a step has {rows} rows (train.batch_size {t.batch_size} x train.accumulation {t.accumulation} x "
            f"{ranks.data_world} ranks) and had {before}; change train.accumulation so that it has as many"
        )


def record_start(out: Path, recipe: Recipe, environment: dict[str, Any]) -> None:
    """Write recipe.json and add `environment` to the starts in environment.json."""
    path = out / "environment.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    write_atomically(path, json.dumps({"starts": [*starts, environment]}, indent=2) + "\n")
    write_atomically(out / "recipe.json", recipe.to_json())
