"""Where a conversion reads from: our runs, transformers model directories, GGUF files, the hub.

Only weights, JSON and tokenizer files are touched. `trust_remote_code` is never set.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ssa.checked_json import read_json
from ssa.errors import UserError, one_line
from ssa.model.weights import TensorInfo, Weights, open_weights, write_json
from ssa.runs.checkpoints import check_hashes, resolve_checkpoint

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    path: Path
    config: dict[str, Any]
    weights: Callable[[], Weights]
    carry: Callable[[Path], list[str]]
    """Puts tokenizer and generation settings into a directory; returns notes."""


def open_source(source: str | Path) -> Source:
    """A run, a checkpoint, a model directory, a .gguf file or a hub name; reads its config.json and no weights yet.

    Raises:
        UserError: nothing usable is there; the message says what is missing.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        path = _fetch(str(source))
    if path.is_dir():
        if (path / "checkpoints").is_dir() or path.name.startswith("step-"):
            path = resolve_checkpoint(path)
        check_hashes(path)
    if not path.is_dir():
        raise UserError(f"no model at {source}: name a run, a model directory, a .gguf file, or a hub model as owner/name")
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        raise UserError(f"{path} has no config.json" + (f"; name one of its files, e.g. {ggufs[0]}" if ggufs else ""))
    return Source(path, read_json(path / "config.json"), lambda: open_weights(path), lambda to: _carry_files(path, to))


def _carry_files(path: Path, to: Path) -> list[str]:
    notes = []
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, to / name)
    if (path / "tokenizer_config.json").is_file():
        settings = read_json(path / "tokenizer_config.json")
        if settings.pop("auto_map", None) is not None:  # would ask to run code that is not there
            write_json(to / "tokenizer_config.json", settings)
            notes.append("auto_map removed from tokenizer_config.json: no code is taken from checkpoints")
    if not (path / "tokenizer.json").is_file():
        notes.append("no tokenizer.json in the source: copy one into the result to generate text")
    if (path / "generation_config.json").is_file():
        write_json(to / "generation_config.json", read_json(path / "generation_config.json"))
    return notes


def _open_gguf(file: Path) -> Source:
    """transformers reads and dequantises it, to float32; the whole model is in memory once."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError('reading GGUF needs the package gguf: pip install "sparse-sparse-attention[gguf]"') from None

    def load(loader: Any, **kwargs: Any) -> Any:
        # Alone in a directory, so that no other file there has a say in how it is loaded.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / file.name).symlink_to(file.resolve())
            try:
                return loader.from_pretrained(alone, gguf_file=file.name, local_files_only=True, **kwargs)
            except Exception as error:  # the parsers raise whatever they meet
                raise UserError(f"{file} cannot be read as GGUF: {one_line(error)}") from None

    config = load(AutoConfig).to_dict()
    config.pop("quantization_config", None)  # says only that it was GGUF

    def weights() -> Weights:
        state = load(AutoModelForCausalLM, dtype=torch.float32).state_dict()
        return Weights({name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}, state.__getitem__, 1)

    def carry(to: Path) -> list[str]:
        load(AutoTokenizer).save_pretrained(to)
        special = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**special).save_pretrained(to)
        return []

    return Source(file, config | {"dtype": "float32"}, weights, carry)


def _fetch(name: str) -> Path:
    """Weights, configuration and tokenizer of a hub model, into the hub's cache; no code, nothing pickled."""
    wanted = ["*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *_TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # no network, no such model, no access: a class for each
        raise UserError(f"{name} is no directory here and cannot be fetched from the hub: {one_line(error)}") from None
