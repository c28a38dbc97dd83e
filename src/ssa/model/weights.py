"""Tensors of a checkpoint directory: safetensors files (one, or shards with an index) read one tensor at a time, and written.

Nothing is unpickled: a directory that has only pickled weights is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssa.checked_json import read_json
from ssa.errors import UserError, one_line
from ssa.files import is_plain_name, sync
from ssa.model.safetensors_file import write_safetensors

MAX_SHARD_BYTES = 2 * 1024**3
"""Largest file that is written, and about what writing holds in memory."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Weights:
    """What there is, by name, and how to read one tensor of it."""

    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    files: int


def open_weights(directory: Path) -> Weights:
    """The weights of a model directory; only headers are read now.

    Raises:
        UserError: pickled or missing weights, an index that leaves the directory or names what is not there, a damaged file, or
            a tensor that is not floating point of 16 bits or more.
    """
    if (directory / _SINGLE).is_file():
        places = dict.fromkeys(_header(directory / _SINGLE), _SINGLE)
    elif (directory / _INDEX).is_file():
        places = _read_index(directory)
    else:
        if pickles := sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern)):
            raise UserError(
                f"{directory} has its weights pickled ({pickles[0]}), which could run code; on a machine you trust, load and save_pretrained them as safetensors"
            )
        raise UserError(f"{directory} has no weights: neither {_SINGLE} nor {_INDEX}")
    headers = {name: _header(directory / name) for name in sorted(set(places.values()))}
    if astray := [name for name, file in places.items() if name not in headers[file]]:
        raise UserError(f"{directory / _INDEX} places {astray[0]!r} in {places[astray[0]]}, which has no such tensor")

    def read(name: str) -> Tensor:
        path = directory / places[name]
        with readable(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return Weights({name: headers[file][name] for name, file in places.items()}, read, len(headers))


def write_weights(directory: Path, tensors: Mapping[str, TensorInfo], make: Callable[[str], Tensor]) -> None:
    """`make(name)` for every name of `tensors`, as model.safetensors, or as shards of at most `MAX_SHARD_BYTES` with an index.

    One file's tensors are in memory at a time. Files are synced, the directory is not.
    """
    shapes = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(directory / file, {name: make(name) for name in names}, {"format": "pt"})
    if split.is_sharded:
        write_json(directory / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def link_weights(directory: Path, to: Path) -> None:
    """The files of the weights in `directory`, in `to`: the same ones under other names, or copies where the file system links none."""
    names = [_SINGLE] if (directory / _SINGLE).is_file() else [_INDEX, *sorted(set(_read_index(directory).values()))]
    for name in names:
        source = (directory / name).resolve()
        try:
            os.link(source, to / name)
        except OSError:
            shutil.copyfile(source, to / name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)


def _read_index(directory: Path) -> dict[str, str]:
    places = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{directory / _INDEX} has no weight_map")
    for file in places.values():
        # A name with a directory in it could point anywhere on the machine.
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise UserError(f"{directory / _INDEX} names the file {file!r}; only *.safetensors beside the index are read")
        if not (directory / file).is_file():
            raise UserError(f"{directory} is incomplete: {file} is missing")
    return places


def _header(path: Path) -> dict[str, TensorInfo]:
    found = {}
    with readable(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise UserError(f"{path}: tensor {name!r} is {part.get_dtype()}; quantised weights must be dequantised first")
            found[name] = TensorInfo(tuple(part.get_shape()), _FLOATS[part.get_dtype()])
    return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A safetensors file is opened or read: what goes wrong is a `UserError` that names it."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or incomplete ({one_line(error)}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
