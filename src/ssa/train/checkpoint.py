"""Checkpoints that are either complete or not there: RUN/checkpoints/step-00000300/.

Each is a transformers model directory (config.json, model.safetensors, tokenizer files) plus `optimizer.safetensors`,
`rng.safetensors`, `trainer.json` and, written last, `checkpoint.json`: the size and SHA-256 of every other file. It is written
beside its final name, synced, then renamed; nothing is pickled. A run directory has one writer at a time (`RunDirectory` locks it).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.errors import UserError

if TYPE_CHECKING:
    import torch

FORMAT = 1
METADATA = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_SCRATCH = re.compile(r"\.step-\d{8,}\.tmp-\d+")


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write the state after `step` optimizer steps and return its directory; then delete all but the last `keep_last` complete ones.

    Args:
        run_dir: The run; checkpoints go to its `checkpoints/`.
        step: Optimizer steps done.
        model: A `PreTrainedModel`.
        tokenizer: Anything with `save_pretrained`, or None.
        optimizer: Its per-parameter state is stored under the parameters' names.
        extra: JSON values to get back from `load_checkpoint`.
        keep_last: Complete checkpoints to keep, at least 1: the one just written is never deleted.

    Raises:
        UserError: The disk is full or read-only, or a complete checkpoint of this step exists. Earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError

    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step-{step:08d}"
    scratch = parent / f".step-{step:08d}.tmp-{os.getpid()}"
    if _is_complete(final):
        raise UserError(f"checkpoint {final} exists already; resume from it, or move it away")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_scratch(parent)
        scratch.mkdir()
        _write_state(scratch, step, model, tokenizer, optimizer, extra)
        if final.exists():  # what is left of an incomplete one
            shutil.rmtree(final)
        os.rename(scratch, final)
        _sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"checkpoint of step {step} cannot be written to {parent}: {reason}; earlier checkpoints are intact"
        ) from error
    for old in find_checkpoints(run_dir)[: -max(1, keep_last)]:
        if old != final:
            _remove(old)
    return final


def _write_state(
    directory: Path, step: int, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer | None, extra: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    from ssa.train.environment import versions

    with _no_progress_bar():
        model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if optimizer is not None:
        save_file(_optimizer_tensors(model, optimizer), directory / "optimizer.safetensors")
    rng_tensors, rng_values = _rng_state()
    save_file(rng_tensors, directory / "rng.safetensors")
    (directory / "trainer.json").write_text(json.dumps({"step": step, "extra": extra, "rng": rng_values}))
    files = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    metadata = {"format": FORMAT, "step": step, "versions": versions(), "files": files}
    (directory / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    _sync(directory / METADATA)
    _sync(directory)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for every save, across the training display."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_checkpoint(path: Path | str, model: Any, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random generators back; returns `extra` with `step` added.

    Every file's size and hash is checked first, so a damaged checkpoint changes nothing.

    Raises:
        UserError: A file is damaged or missing (named), or the checkpoint does not fit the model.
    """
    from safetensors.torch import load_file

    path = Path(path)
    verify_checkpoint(path)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= load_file(file)
    _load_weights(model, weights, path)
    if optimizer is not None:
        if not (path / "optimizer.safetensors").is_file():
            raise UserError(f"checkpoint {path} has no optimizer state, so training cannot go on from it; use model.init_from")
        _load_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"), path)
    state = json.loads((path / "trainer.json").read_text())
    _set_rng_state(load_file(path / "rng.safetensors"), state["rng"])
    return {**state["extra"], "step": state["step"]}


def verify_checkpoint(path: Path | str) -> dict[str, Any]:
    """The metadata of a checkpoint whose files all have the recorded size and hash, else a `UserError` naming the file."""
    path = Path(path)
    metadata = _metadata(path)
    if metadata is None:
        raise UserError(f"checkpoint {path} is incomplete: {METADATA} is missing or unreadable")
    if metadata["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {metadata['format']!r}; this version reads format {FORMAT}")
    for name, want in metadata["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint is damaged: {file} is missing; delete {path} to resume from the one before")
        size = file.stat().st_size
        if size != want["bytes"] or _sha256(file) != want["sha256"]:
            what = f"has {size} bytes instead of {want['bytes']}" if size != want["bytes"] else "does not match its hash"
            raise UserError(f"checkpoint is damaged: {file} {what}; delete {path} to resume from the one before")
    return metadata


def find_checkpoints(run_dir: Path | str) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Complete: metadata is there and every file has its size."""
    parent = Path(run_dir) / "checkpoints"
    if not parent.is_dir():
        return []
    found = [(int(m[1]), p) for p in parent.iterdir() if (m := _NAME.fullmatch(p.name)) and _is_complete(p)]
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
        if not _is_complete(path):
            raise UserError(f"checkpoint {path} is incomplete; name its run to get the newest complete one")
        return path
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model directory {path} has no *.safetensors weights; other formats are not read")
        return path
    raise UserError(f"no model at {path}: neither a run (checkpoints/) nor a model directory (config.json)")


def _metadata(path: Path) -> dict[str, Any] | None:
    """Parsed and shape-checked `checkpoint.json`; None where it is missing or not one of ours."""
    try:
        metadata = json.loads((path / METADATA).read_text())
        files = metadata["files"]
        names_ok = all(Path(name).name == name for name in files)
        sizes_ok = all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
        return metadata if names_ok and sizes_ok and "format" in metadata else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_complete(path: Path) -> bool:
    metadata = _metadata(path)
    if metadata is None:
        return False
    return all((path / n).is_file() and (path / n).stat().st_size == f["bytes"] for n, f in metadata["files"].items())


def _remove(path: Path) -> None:
    """Delete a checkpoint; the metadata goes first, so that a kill half-way leaves an incomplete one, not a broken one."""
    with contextlib.suppress(OSError):
        (path / METADATA).unlink()
        shutil.rmtree(path)


def _remove_scratch(parent: Path) -> None:
    for path in parent.iterdir():
        if _SCRATCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_weights(model: Any, weights: dict[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(f"checkpoint {path} does not fit the model: tensor {name!r} of shape {tuple(tensor.shape)}")
    # Tied parameters are stored once: a name that is missing must share its memory with one that is there.
    stored = {own[name].data_ptr() for name in weights}
    if missing := [name for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in stored]:
        raise UserError(f"checkpoint {path} does not fit the model: it has no tensor {missing[0]!r}")
    model.load_state_dict(weights, strict=False)


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """ "exp_avg/NAME" -> tensor for every state of every parameter."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    return tensors


def _load_optimizer(model: Any, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], path: Path) -> None:
    parameters = dict(model.named_parameters())
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for key_and_name, value in tensors.items():
        key, _, name = key_and_name.partition("/")
        if name not in parameters:
            raise UserError(f"checkpoint {path} does not fit the model: optimizer state of {name!r}")
        parameter = parameters[name]
        # Only fused optimizers keep the step count on the device.
        device = "cpu" if key == "step" and parameter not in fused else parameter.device
        optimizer.state[parameter][key] = value.to(device)


def _rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """PyTorch's and NumPy's generators. Python's is left out: lazily imported packages draw from it, and nothing here does."""
    import numpy as np
    import torch

    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    return tensors, {"numpy": [name, np.asarray(keys).tolist(), *rest]}


def _set_rng_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
