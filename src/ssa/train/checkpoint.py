"""Checkpoints that are either complete or not there: RUN/checkpoints/step-00000300/.

Each is a transformers model directory (config.json, model.safetensors or numbered parts with an index, tokenizer files) plus
`optimizer*.safetensors`, `rng.safetensors`, `trainer.json` and, written last, `checkpoint.json`: the size and SHA-256 of every other
file. It is written beside its final name, synced, then renamed; nothing is pickled. A run directory has one writer at a time
(`ssa.train.run_directory` locks it), whose ranks share the file system. `ssa.train.saver` writes them,
`ssa.train.checkpoint_state` says what is in them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.errors import UserError
from ssa.files import sha256_of_file

if TYPE_CHECKING:
    from ssa.train.distributed import Ranks

FORMAT = 1
METADATA = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_SCRATCH = re.compile(r"\.step-\d{8,}\.tmp-\d+")


def checkpoint_path(run_dir: Path | str, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def scratch_path(run_dir: Path | str, step: int, writer: int) -> Path:
    """Where the checkpoint of `step` is written before it gets its name; `writer` is a process number."""
    return Path(run_dir) / "checkpoints" / f".step-{step:08d}.tmp-{writer}"


def load_checkpoint(path: Path | str, model: Any, optimizer: Any = None, ranks: Ranks | None = None) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random generators back; returns `extra` with `step` added.

    Every file's size and hash is checked first, so a damaged checkpoint changes nothing. The number of ranks, and how they share
    the model, may differ from those that wrote it; each of `ranks` must call this.

    Raises:
        UserError: A file is damaged or missing (named), or the checkpoint does not fit the model.
    """
    from ssa.train.checkpoint_state import StoredTensors, load_model, load_optimizer, set_rng_state

    path = Path(path)
    if ranks is None:
        import torch

        from ssa.train.distributed import Ranks

        ranks = Ranks(torch.device("cpu"))
    with ranks.together(path):
        verify_checkpoint(path, ranks.rank, ranks.world)
    with ranks.together(path):
        load_model(model, StoredTensors(path, "model"))
        if optimizer is not None:
            stored = StoredTensors(path, "optimizer")
            if not stored:
                raise UserError(
                    f"checkpoint {path} has no optimizer state, so training cannot go on from it; use model.init_from"
                )
            load_optimizer(model, optimizer, stored)
        state = json.loads((path / "trainer.json").read_text())
        set_rng_state(StoredTensors(path, "rng"), state["rng"])
    return {**state["extra"], "step": state["step"]}


def verify_checkpoint(path: Path | str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The metadata of a checkpoint whose files all have the recorded size and hash, else a `UserError` naming the file.

    `world` ranks share the hashing: each looks at its part of the files.
    """
    path = Path(path)
    metadata = read_metadata(path)
    if metadata is None:
        raise UserError(f"checkpoint {path} is incomplete: {METADATA} is missing or unreadable")
    if metadata["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {metadata['format']!r}; this version reads format {FORMAT}")
    for i, (name, want) in enumerate(metadata["files"].items()):
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint is damaged: {file} is missing; delete {path} to resume from the one before")
        size = file.stat().st_size
        if size != want["bytes"] or (i % world == rank and sha256_of_file(file) != want["sha256"]):
            what = f"has {size} bytes instead of {want['bytes']}" if size != want["bytes"] else "does not match its hash"
            raise UserError(f"checkpoint is damaged: {file} {what}; delete {path} to resume from the one before")
    return metadata


def find_checkpoints(run_dir: Path | str) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Complete: metadata is there and every file has its size."""
    parent = Path(run_dir) / "checkpoints"
    if not parent.is_dir():
        return []
    found = [(int(m[1]), p) for p in parent.iterdir() if (m := _NAME.fullmatch(p.name)) and is_complete(p)]
    return [p for _, p in sorted(found)]


def resolve_checkpoint(path: Path | str) -> Path:
    """The model directory that `path` means: a run (its newest complete checkpoint), a checkpoint, or any transformers model directory.

    Raises:
        UserError: Nothing usable is there; the message says what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no model at {path}: it is not a directory; name a run, a checkpoint or a model directory")
    if (path / "checkpoints").is_dir():
        found = find_checkpoints(path)
        if not found:
            raise UserError(f"run {path} has no complete checkpoint yet")
        return found[-1]
    if (_NAME.fullmatch(path.name) and path.parent.name == "checkpoints") or _SCRATCH.fullmatch(path.name):
        if not is_complete(path):
            raise UserError(f"checkpoint {path} is incomplete; name its run to get the newest complete one")
        return path
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model directory {path} has no *.safetensors weights; other formats are not read")
        return path
    raise UserError(f"no model at {path}: neither a run (checkpoints/) nor a model directory (config.json)")


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Parsed and shape-checked `checkpoint.json`; None where it is missing or not one of ours."""
    try:
        metadata = json.loads((path / METADATA).read_text())
        files = metadata["files"]
        names_ok = all(Path(name).name == name for name in files)
        sizes_ok = all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
        return metadata if names_ok and sizes_ok and "format" in metadata else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_complete(path: Path) -> bool:
    metadata = read_metadata(path)
    if metadata is None:
        return False
    return all((path / n).is_file() and (path / n).stat().st_size == f["bytes"] for n, f in metadata["files"].items())


def remove(path: Path) -> None:
    """Delete a checkpoint; the metadata goes first, so that a kill half-way leaves an incomplete one, not a broken one."""
    with contextlib.suppress(OSError):
        (path / METADATA).unlink()
        shutil.rmtree(path)


def remove_scratch(parent: Path) -> None:
    for path in parent.iterdir():
        if _SCRATCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
