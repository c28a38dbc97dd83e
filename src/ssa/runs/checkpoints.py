"""Checkpoints that are either complete or not there: RUN/checkpoints/step-00000300/.

Each is a transformers model directory (config.json, model.safetensors or numbered parts with an index, tokenizer files) plus
`optimizer*.safetensors`, `rng.safetensors`, `trainer.json` and, written last, `checkpoint.json`: the size and SHA-256 of every other
file, and its own. It is written beside its final name, synced, then renamed; nothing is pickled. RUN/latest links to the newest one, where
the file system has links. A run directory has one writer at a time (`ssa.train.run_directory` locks it), whose ranks share the file system.
`ssa.train.saver` writes them, `ssa.train.checkpoint` says what is in them.

Whoever loads a model goes through `open_checkpoint`, which checks every hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ssa.checked_json import parse_json, read_bytes, read_json
from ssa.errors import UserError
from ssa.terminal import tell
from ssa.files import is_plain_name, sha256_of_file

if TYPE_CHECKING:
    from ssa.collectives import Ranks

FORMAT = 1
METADATA = "checkpoint.json"
LATEST = "latest"
"""The link in a run directory to its newest checkpoint."""
SAID_BYTES = 8 << 30
"""So much is hashed without a word: more takes many seconds."""
_NAME = re.compile(r"step-(\d{8,})")
_SCRATCH = re.compile(r"\.step-\d{8,}\.tmp-\d+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoredFile(TypedDict):
    """What `checkpoint.json` says of a file."""

    bytes: int
    sha256: str


class _Metadata(TypedDict):
    format: int
    step: int
    versions: dict[str, str]
    files: dict[str, StoredFile]


class Metadata(_Metadata, total=False):
    """`checkpoint.json`."""

    sha256: str
    """Of the file itself, as it is with "" here; checkpoints of old have none."""


def checkpoint_path(run_dir: Path | str, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def scratch_path(run_dir: Path | str, step: int, writer: int) -> Path:
    """Where the checkpoint of `step` is written before it gets its name; `writer` is a process number."""
    return Path(run_dir) / "checkpoints" / f".step-{step:08d}.tmp-{writer}"


def metadata_text(metadata: Metadata) -> str:
    """The text of `checkpoint.json`, its own hash put in."""
    empty = json.dumps({**metadata, "sha256": ""}, indent=2) + "\n"
    return json.dumps({**metadata, "sha256": hashlib.sha256(empty.encode()).hexdigest()}, indent=2) + "\n"


def read_metadata(path: Path) -> Metadata:
    """The `checkpoint.json` of the checkpoint `path`.

    Raises:
        UserError: It is missing, damaged, of another format, or names files that do not lie in the checkpoint.
    """
    file = path / METADATA
    if not os.path.lexists(file):
        raise UserError(f"checkpoint {path} is incomplete: {METADATA} is missing")
    try:
        text = read_bytes(file)
        found = parse_json(text, str(file))
        if found.get("format") != FORMAT:
            raise UserError(f"{file} has format {found.get('format')!r}; this version reads format {FORMAT}")
        metadata: Metadata = parse_json(text, str(file), Metadata)
        if stray := sorted(metadata.keys() - Metadata.__annotations__.keys() - _Metadata.__annotations__.keys()):
            raise UserError(f"{file} is damaged: {stray[0]!r} is no key of it")
        own = metadata.get("sha256")
        if own is not None and hashlib.sha256(text.replace(own.encode(), b"")).hexdigest() != own:
            raise UserError(f"{file} is damaged: it does not match its own hash")
        for name, stored in metadata["files"].items():
            if not is_plain_name(name) or name == METADATA or not _DIGEST.fullmatch(stored["sha256"]):
                raise UserError(f"{file} is damaged: {name!r} is no file of a checkpoint with its SHA-256")
    except UserError as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged: {error}") from None
    return metadata


def read_complete(path: Path) -> Metadata:
    """The metadata of a checkpoint all of whose files are there and have the recorded sizes, else a `UserError` that says what is wrong."""
    metadata = read_metadata(path)
    for name, stored in metadata["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint is damaged: {file} is missing")
        if (size := file.stat().st_size) != stored["bytes"]:
            raise UserError(f"checkpoint is damaged: {file} has {size} bytes instead of {stored['bytes']}")
    return metadata


def is_complete(path: Path) -> bool:
    try:
        read_complete(path)
    except UserError:
        return False
    return True


def verify_checkpoint(path: Path | str, rank: int = 0, world: int = 1) -> Metadata:
    """The metadata of a checkpoint whose files all have the recorded size and hash.

    Several files are hashed at a time; files that this process has found whole are not read again while they stay as they are.
    `world` ranks share the hashing: each looks at its part of the files.

    Raises:
        UserError: It names the file that is damaged or missing, and what to do.
    """
    path = Path(path)
    try:
        metadata = read_complete(path)
        _check_content(path, metadata["files"], rank, world)
    except UserError as error:
        raise UserError(f"{error}; {_remedy(path)}") from None
    return metadata


def _check_content(path: Path, files: dict[str, StoredFile], rank: int, world: int) -> None:
    mine = [path / name for i, name in enumerate(files) if i % world == rank]
    states = [(str(file.absolute()), files[file.name]["sha256"], *_state(file)) for file in mine]
    unread = [file for file, state in zip(mine, states, strict=True) if state not in _found_whole]
    began = time.time_ns()
    total = sum(files[file.name]["bytes"] for file in unread)
    if total > SAID_BYTES:
        _say(f"checking the hashes of {total / 1e9:.1f} GB in {path}")
    with ThreadPoolExecutor(max(1, min(8, len(unread), os.cpu_count() or 1))) as pool:
        for file, digest in zip(unread, pool.map(_digest, unread), strict=True):
            if digest != files[file.name]["sha256"]:
                raise UserError(f"checkpoint is damaged: {file} does not match its hash")
    # A file written a moment ago could change once more without its time telling.
    _found_whole.update(state for state in states if began - state[-1] > 2_000_000_000)


def _digest(file: Path) -> str:
    try:
        return sha256_of_file(file)
    except OSError as error:
        raise UserError(f"checkpoint is damaged: {file} cannot be read: {error.strerror or error}") from None


_found_whole: set[tuple[str, str, int, int, int]] = set()
"""(path, SHA-256, inode, bytes, time of the last change) of files that were hashed."""


def _state(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


def _remedy(path: Path) -> str:
    if path.parent.name == "checkpoints":
        return f"restore it, or delete {path} to go on from the one before"
    return f"copy it again; if the change is yours, delete {path / METADATA}, and nothing is compared any more"


def find_checkpoints(run_dir: Path | str) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Complete: metadata is there and every file has its size."""
    return [path for path in numbered_checkpoints(Path(run_dir)) if is_complete(path)]


def numbered_checkpoints(run_dir: Path) -> list[Path]:
    """What is called a checkpoint, in the order of steps."""
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return []
    found = [(int(m[1]), p) for p in parent.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run_dir: Path | str) -> Path | None:
    """The newest complete checkpoint of a run, None where none was written yet. That a newer one is passed over is said on stderr.

    Raises:
        UserError: There are checkpoints, and none is complete.
    """
    faults: list[str] = []
    for path in reversed(numbered_checkpoints(Path(run_dir))):
        try:
            read_complete(path)
        except UserError as error:
            faults.append(str(error))
            continue
        if faults:
            _say(f"warning: {faults[0]}; taking the checkpoint before it, {path}")
        return path
    if faults:
        raise UserError(f"run {run_dir} has no complete checkpoint: {faults[0]}")
    return None


@functools.cache
def _say(text: str) -> None:
    """Once a process, and on one rank of several."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"ssa: {text}")


def open_checkpoint(path: Path | str) -> Path:
    """`resolve_checkpoint`, and every hash of it checked; a model directory without `checkpoint.json` has none.

    Raises:
        UserError: Nothing usable is there, or a file is damaged.
    """
    path = resolve_checkpoint(path)
    check_hashes(path)
    return path


def check_hashes(directory: Path) -> None:
    """`verify_checkpoint` where the directory records hashes."""
    if os.path.lexists(directory / METADATA):
        verify_checkpoint(directory)


def resolve_checkpoint(path: Path | str) -> Path:
    """The model directory that `path` means: a run (its newest complete checkpoint), a checkpoint, or any transformers model directory.

    Raises:
        UserError: Nothing usable is there; the message says what is missing.
    """
    path = Path(path)
    if path.name == LATEST and (path.parent / "checkpoints").is_dir():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"no model at {path}: it is not a directory; name a run, a checkpoint or a model directory")
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"run {path} has no complete checkpoint yet")
        return newest
    if (_NAME.fullmatch(path.name) and path.parent.name == "checkpoints") or _SCRATCH.fullmatch(path.name):
        try:
            read_complete(path)
        except UserError as error:
            raise UserError(f"{error}; {_remedy(path)}; or name its run to get the newest complete one") from None
        return path
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model directory {path} has no *.safetensors weights; other formats are not read")
        return path
    raise UserError(f"no model at {path}: neither a run (checkpoints/) nor a model directory (config.json)")


def point_latest(run_dir: Path, checkpoint: Path) -> None:
    """RUN/latest -> `checkpoint`, relative, so that it goes where the run goes; readers see the old link or the new one.

    Where links cannot be made there is none; what else has that name is left alone.
    """
    link, scratch = run_dir / LATEST, run_dir / f".{LATEST}.tmp-{os.getpid()}"
    if os.path.lexists(link) and not link.is_symlink():
        return
    try:
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(checkpoint.relative_to(run_dir), target_is_directory=True)
        os.replace(scratch, link)
    except (OSError, NotImplementedError):
        with contextlib.suppress(OSError):
            scratch.unlink()


def remove(path: Path) -> None:
    """Delete a checkpoint; the metadata goes first, so that a kill half-way leaves an incomplete one, not a broken one."""
    with contextlib.suppress(OSError):
        (path / METADATA).unlink()
        shutil.rmtree(path)


def remove_scratch(parent: Path) -> None:
    for path in parent.iterdir():
        if _SCRATCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
