"""The model under evaluation, and what every result says about it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from ssa.budget import FULL, LayerBudgets, Reading
from ssa.device import device_name
from ssa.files import sha256_of_file
from ssa.infer.load import load_model
from ssa.model import SSAForCausalLM
from ssa.runs.checkpoints import METADATA, read_metadata, resolve_checkpoint
from ssa.runs.home import run_home
from ssa.runs.provenance import versions


@dataclass(frozen=True)
class ModelUnderTest:
    """The model under evaluation and where it came from."""

    model: SSAForCausalLM
    tokenizer: PreTrainedTokenizerFast
    path: Path
    run: Path | None
    """The run directory, where the model is a run's checkpoint."""
    step: int | None
    sha256: str
    """Of the configuration and the weights."""

    @property
    def directory(self) -> Path:
        """Where results go unless told otherwise."""
        return (self.run or self.path) / "eval"

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def evaluation_directory(run: Path | str) -> Path:
    """Where the results of `run`, a run, a checkpoint or a model directory, are kept."""
    path = resolve_checkpoint(run)
    return (_run_of(path) or path) / "eval"


def _run_of(path: Path) -> Path | None:
    """The run directory that a checkpoint belongs to."""
    home = run_home(path)
    return home if home != path and (home / "recipe.json").is_file() else None


def load_model_under_test(run: Path | str, device: str, dtype: str) -> ModelUnderTest:
    """The model of `run`, a run, a checkpoint or a model directory; see `ssa.infer.load.load_model`."""
    path = resolve_checkpoint(run)
    model, tokenizer = load_model(path, device, dtype)
    metadata = read_metadata(path) if (path / METADATA).exists() else None
    step = None if metadata is None else metadata["step"]
    known = {} if metadata is None else metadata["files"]  # checked a moment ago
    digest = hashlib.sha256()
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        if file.name not in ("optimizer.safetensors", "rng.safetensors"):
            hashed = known[file.name]["sha256"] if file.name in known else sha256_of_file(file)
            digest.update(bytes.fromhex(hashed))
    return ModelUnderTest(model, tokenizer, path, _run_of(path), step, digest.hexdigest())


def description(subject: ModelUnderTest) -> dict[str, Any]:
    """The "model" of a result."""
    config = subject.model.config
    return {
        "path": str(subject.path), "step": subject.step, "method": config.attention_name, "own_budget": str(config.budget),
        "own_mode": config.attention_mode, "parameters": subject.model.num_parameters(),
    }  # fmt: skip


def provenance(subject: ModelUnderTest) -> dict[str, Any]:
    """Device, versions and time of a measurement."""
    return {
        "device": device_name(subject.model.device),
        "versions": versions(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def attention(budget: Reading) -> dict[str, Any]:
    """The arguments of a model's call that make it attend so, whatever it does by itself. `LayerBudgets` are the model's own."""
    if isinstance(budget, LayerBudgets):
        return {"attention_mode": "sparse"}
    return {"budget": FULL} if budget is FULL else {"attention_mode": "sparse", "budget": budget}


@contextlib.contextmanager
def progress_bar(console: Console | None, what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, None elsewhere; call it with the number of things done since the last call."""
    if console is None or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
