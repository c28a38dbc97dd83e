"""Writing checkpoints: by all ranks together, at once or in the background.

A save is: gather the state (all ranks, while training waits), write the files (each rank its own; in a thread if `background`), then
commit: rank 0 adds the metadata and gives the directory its name. Threads communicate nothing: the commit happens at the end of a later step,
as soon as no rank is still writing. What a kill leaves, at any moment, is a directory without its name, which the next save removes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssa.checked_json import read_json
from ssa.collectives import Ranks
from ssa.errors import UserError
from ssa.files import sha256_of_file, sync
from ssa.model.card import write_card
from ssa.model.safetensors_file import write_safetensors
from ssa.runs.checkpoints import (
    FORMAT,
    METADATA,
    Metadata,
    StoredFile,
    checkpoint_path,
    find_checkpoints,
    is_complete,
    metadata_text,
    point_latest,
    remove,
    remove_scratch,
    scratch_path,
)
from ssa.runs.provenance import versions
from ssa.train.checkpoint import collect, file_names, model_tensors, optimizer_tensors, rng_state


class Saver:
    """The checkpoints of a run, as they are written. Every rank has one and calls the same methods."""

    def __init__(
        self, run_dir: Path | str, ranks: Ranks, tokenizer: Any = None, keep_last: int = 2, background: bool = False
    ) -> None:
        """
        Args:
            run_dir: The run; checkpoints go to its `checkpoints/`, which all ranks must see.
            tokenizer: Anything with `save_pretrained`, or None.
            keep_last: Complete checkpoints to keep, at least 1: the one just written is never deleted.
            background: `save` returns as soon as the state is copied.
        """
        self.run_dir, self.ranks, self.tokenizer = Path(run_dir), ranks, tokenizer
        self.keep_last, self.background = max(1, keep_last), background
        self.newest: Path | None = None
        """The last checkpoint that was completed."""
        self.pending: int | None = None
        """Step of the checkpoint that is being written; the same on all ranks."""
        self._scratch = Path()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank still has files to write."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, step: int, model: Any, optimizer: Any, extra: dict[str, Any], figures: Mapping[str, str] | None = None
    ) -> None:  # fmt: skip
        """Write the state after `step` optimizer steps; an earlier save that is not complete is waited for.

        Args:
            model: A `PreTrainedModel`; its parameters may be distributed.
            optimizer: Its per-parameter state is stored under the parameters' names; or None.
            extra: JSON values to get back from `load_checkpoint`.
            figures: What the model's card says of its training (`ssa.model.card`).

        Raises:
            UserError: The disk is full or read-only, or a complete checkpoint of this step exists. Earlier checkpoints are untouched.
        """
        self.finish()
        self.pending, self._error = step, None
        self._scratch = scratch_path(self.run_dir, step, self.ranks.number(os.getpid()))
        try:
            with self.ranks.raise_on_all():
                if self.ranks.main:
                    self._make_scratch()
        except UserError:
            self.pending = None
            raise
        world = self.ranks.world
        states = {"model": model_tensors(model)}
        if optimizer is not None:
            states["optimizer"] = optimizer_tensors(model, optimizer)
        names = {stem: file_names(stem, tensors, world) for stem, tensors in states.items()}
        files: dict[str, dict[str, torch.Tensor]] = {}
        for stem, tensors in states.items():
            files |= collect(tensors, names[stem], self.ranks, copy=self.background)
        texts = {}
        if self.ranks.main:
            files["rng.safetensors"], generators = rng_state()
            texts["trainer.json"] = json.dumps({"step": step, "extra": extra, "rng": generators})
            if len(set(names["model"].values())) > 1:
                texts["model.safetensors.index.json"] = _index(states["model"], names["model"])
        arguments = (files, texts, model if self.ranks.main else None, figures)
        if self.background:
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(*arguments)
            self.finish()

    def finish(self) -> None:
        """Wait for the files of all ranks and complete the checkpoint, if one is being written; raises as `save` does."""
        if self.pending is None:
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            with self.ranks.raise_on_all():
                if self._error is not None:
                    raise self._failure(self._error)
            with self.ranks.raise_on_all():
                if self.ranks.main:
                    self._commit()
        except UserError:
            if self.ranks.main:
                shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            step, self.pending = self.pending, None
        self.newest = checkpoint_path(self.run_dir, step)

    def _make_scratch(self) -> None:
        assert self.pending is not None
        final = checkpoint_path(self.run_dir, self.pending)
        if is_complete(final):
            raise UserError(f"checkpoint {final} exists already; resume from it, or move it away")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_scratch(final.parent)
            self._scratch.mkdir()
        except OSError as error:
            raise self._failure(error) from error

    def _write(
        self, files: dict[str, dict[str, torch.Tensor]], texts: dict[str, str], model: Any, figures: Mapping[str, str] | None
    ) -> None:  # fmt: skip
        """This rank's files, and their sizes and hashes; `model` where the model's other files are this rank's, too."""
        try:
            if not self._scratch.is_dir():
                raise FileNotFoundError(f"{self._scratch} is not there: all ranks must share the run directory")
            written = {}
            for name, tensors in files.items():
                size, digest = write_safetensors(self._scratch / name, tensors, {"format": "pt"})
                written[name] = {"bytes": size, "sha256": digest}
            if model is not None:
                _write_model_files(self._scratch, model, self.tokenizer, figures)
                for name, text in texts.items():
                    (self._scratch / name).write_text(text, encoding="utf-8")
                for path in sorted(p for p in self._scratch.iterdir() if p.suffix != ".safetensors" and p.name[0] != "."):
                    sync(path)
                    written[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            (self._scratch / f".files-{self.ranks.rank}.json").write_text(json.dumps(written), encoding="utf-8")
        except BaseException as error:  # raised again where all ranks can hear of it
            self._error = error

    def _commit(self) -> None:
        assert self.pending is not None
        final, step = checkpoint_path(self.run_dir, self.pending), self.pending
        try:
            files: dict[str, StoredFile] = {}
            for rank in range(self.ranks.world):
                part = self._scratch / f".files-{rank}.json"
                files |= read_json(part, dict[str, StoredFile])
                part.unlink()
            metadata: Metadata = {"format": FORMAT, "step": step, "versions": versions(), "files": dict(sorted(files.items()))}
            (self._scratch / METADATA).write_bytes(metadata_text(metadata).encode())
            sync(self._scratch / METADATA)
            sync(self._scratch)
            if final.exists():  # what is left of an incomplete one
                shutil.rmtree(final)
            os.rename(self._scratch, final)
            sync(final.parent)
        except OSError as error:
            raise self._failure(error) from error
        point_latest(self.run_dir, final)
        for old in find_checkpoints(self.run_dir)[: -self.keep_last]:
            if old != final:
                remove(old)

    def _failure(self, error: BaseException) -> UserError:
        """One line for an error of the file system; any other is a bug and raised as it is."""
        if not isinstance(error, OSError):
            raise error
        parent = self.run_dir / "checkpoints"
        reason = error.strerror or str(error)
        return UserError(
            f"checkpoint of step {self.pending} cannot be written to {parent}: {reason}; earlier checkpoints are intact"
        )


def _index(tensors: dict[str, torch.Tensor], files: dict[str, str]) -> str:
    """transformers' index of a model in several files."""
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"


def _write_model_files(directory: Path, model: Any, tokenizer: Any, figures: Mapping[str, str] | None) -> None:
    """What makes the directory a transformers model beside its weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(directory)
    write_card(directory, config, figures)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
