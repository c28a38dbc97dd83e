"""How far `prepare` is: `.progress.json`, from which a killed run goes on, and what is removed where one begins anew."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssa.checked_json import read_json
from ssa.data.shard_writer import WriterState
from ssa.data.shards import INDEX, PROGRESS, TOKENIZER, TokenizerRecord, read_index
from ssa.errors import UserError
from ssa.files import LOCK, replace_file, sync

_OURS = re.compile(r"[a-z][a-z0-9_]*-\d{5,}\.(tokens|docs)\.npy(\.partial)?")


@dataclass
class Progress:
    """`.progress.json`: what is being done and how far it is."""

    plan: dict[str, Any]
    modified: str
    """Hash of the input files' sizes and times; not in the index, which is to be the same on every machine."""
    tokenizer: TokenizerRecord | None = None
    valid_below: int = 0
    position: tuple[int, int] = (0, 0)
    writers: dict[str, WriterState] = field(default_factory=dict)
    skipped: int = 0
    hashes: tuple[int, int] | None = None
    """Lowest and highest document hash so far."""
    lowest: list[list[int]] = field(default_factory=list)
    """State of `ssa.data.split_checks.LowestHashes`."""


def begin(out: Path, fresh: Progress, splits: tuple[str, ...], overwrite: bool, content: Callable[[], str]) -> Progress | None:
    """Where to go on from: ``fresh``, an interrupted run's progress, or None where all is done. Refuses what it must not touch.

    ``content``: gives the hash of the input files' bytes, which takes a while.
    """
    names = {path.name for path in out.iterdir()} - {f"{INDEX}.partial", f"{PROGRESS}.partial", LOCK}
    if names and not names & {INDEX, PROGRESS}:
        raise UserError(f"{out} holds something else than a prepared corpus: choose an empty or new directory")
    index = read_index(out) if INDEX in names else None
    others = {name: split for name, split in index["splits"].items() if name not in splits} if index else {}
    if index and len(others) < len(index["splits"]) and not overwrite:
        done = [index["splits"].get(name, {}).get("source", {}) for name in splits]
        if all(source.get("plan") == fresh.plan for source in done):
            if any(known != content() for source in done if (known := source.get("content"))):
                raise UserError(
                    f"{out} is already prepared, and the input has changed since (its size has not): choose another directory, or pass --overwrite"
                )
            (out / PROGRESS).unlink(missing_ok=True)
            return None
        raise UserError(f"{out} is already prepared from other inputs or options: choose another directory, or pass --overwrite")
    if PROGRESS in names and not overwrite:
        return _resume(out, fresh)
    if index and others:
        if index["tokenizer"]["fingerprint"] != fresh.plan["tokenizer"]:
            raise UserError(f"{out} holds {', '.join(others)} in another tokenizer: pass --tokenizer {out} to use the same")
        fresh.tokenizer = index["tokenizer"]
    save(out, fresh)  # first, so that an interrupted removal is known as ours
    remove(out, splits)
    return fresh


def _resume(out: Path, fresh: Progress) -> Progress:
    try:
        saved: Progress = read_json(out / PROGRESS, Progress)
    except UserError as error:
        raise UserError(f"{out / PROGRESS} is damaged ({error}): pass --overwrite to start anew") from None
    different = [name for name in {**saved.plan, **fresh.plan} if saved.plan.get(name) != fresh.plan.get(name)]
    if different or saved.modified != fresh.modified:
        changed = ", ".join(different) or "the times of the input files"
        raise UserError(
            f"{out} holds an interrupted run that differs in {changed}: repeat its call to finish it, or pass --overwrite"
        )
    return saved


def remove(out: Path, splits: tuple[str, ...]) -> None:
    """Remove ``splits``, finished or not; with the last split, all that `prepare` ever wrote except its progress."""
    index = read_index(out) if (out / INDEX).is_file() else None
    kept = {name: value for name, value in (index["splits"] if index else {}).items() if name not in splits}
    if index and kept:
        write_json(out / INDEX, index | {"splits": kept})
    else:
        (out / INDEX).unlink(missing_ok=True)
        for leftover in (out / TOKENIZER, out / f"{TOKENIZER}.partial"):
            remove_tree(leftover)
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name.rsplit("-", 1)[0] not in kept:
            path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory, or a link in its place without what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def save(out: Path, progress: Progress) -> None:
    write_json(out / PROGRESS, asdict(progress))


def write_json(path: Path, value: Any) -> None:
    replace_file(path, path.with_name(path.name + ".partial"), json.dumps(value, indent=1) + "\n")
    sync(path.parent)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
