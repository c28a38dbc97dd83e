"""What a checkpoint holds, as whole tensors: gathered from the ranks that have parts of them, and cut again to any other number of ranks.

Every tensor lies whole in one file, whoever trained it how: files named and indexed as transformers does it, so that any checkpoint is a
model directory, and resharding is reading. (PyTorch's own distributed format keeps its index as a pickle, which nothing here may open.)
Large states are spread over the ranks, each of which collects, hashes and writes its own files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from ssa.checked_json import read_json
from ssa.collectives import Ranks
from ssa.errors import UserError, one_line
from ssa.model.weights import readable
from ssa.runs.checkpoints import verify_checkpoint

FILE_BYTES = 1 << 30
"""A state is spread over more files, one a rank, as soon as they are larger than this."""


class TrainerState(TypedDict):
    """`trainer.json`."""

    step: int
    extra: dict[str, Any]
    rng: dict[str, Any]


def load_checkpoint(path: Path | str, model: Any, optimizer: Any = None, ranks: Ranks | None = None) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random generators back; returns `extra` with `step` added.

    Every file's size and hash is checked first, so a damaged checkpoint changes nothing. The number of ranks, and how they share
    the model, may differ from those that wrote it; each of `ranks` must call this.

    Raises:
        UserError: A file is damaged or missing (named), or the checkpoint does not fit the model.
    """
    path = Path(path)
    if ranks is None:
        ranks = Ranks(torch.device("cpu"))
    with ranks.raise_on_all(path):
        verify_checkpoint(path, ranks.rank, ranks.world)
    with ranks.raise_on_all(path):
        load_model(model, StoredTensors(path, "model"))
        if optimizer is not None:
            stored = StoredTensors(path, "optimizer")
            if not stored:
                raise UserError(
                    f"checkpoint {path} has no optimizer state, so training cannot go on from it; use model.init_from"
                )
            load_optimizer(model, optimizer, stored)
        state = read_json(path / "trainer.json", TrainerState)
        set_rng_state(StoredTensors(path, "rng"), state["rng"])
    return {**state["extra"], "step": state["step"]}


def model_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters under their names; tied ones once, under the first name, as transformers stores them."""
    return dict(model.named_parameters())


def optimizer_tensors(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """ "exp_avg/NAME" -> tensor, for every state of every parameter."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def file_names(stem: str, tensors: Mapping[str, torch.Tensor], world: int) -> dict[str, str]:
    """The file of each tensor: "model.safetensors", or model-00001-of-00004.safetensors ..., in order and of about equal size.

    The n-th file is the n-th rank's to write.
    """
    sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    total = sum(sizes.values())
    count = max(1, min(world, len(sizes), -(-total // FILE_BYTES)))
    if count == 1:
        return dict.fromkeys(tensors, f"{stem}.safetensors")
    names, before = {}, 0
    for name, size in sizes.items():
        number = min(count - 1, (before + size // 2) * count // total)
        names[name] = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        before += size
    # a tensor larger than a share can leave a number unused; numbering must have no gaps
    used = {file: i for i, file in enumerate(dict.fromkeys(names.values()))}
    return {name: f"{stem}-{used[file] + 1:05d}-of-{len(used):05d}.safetensors" for name, file in names.items()}


def writer_of(file: str) -> int:
    """The rank that writes a file of `file_names`."""
    parts = file.removesuffix(".safetensors").rsplit("-", 3)
    return int(parts[1]) - 1 if len(parts) == 4 else 0


def collect(
    tensors: Mapping[str, torch.Tensor], files: Mapping[str, str], ranks: Ranks, copy: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """file -> name -> whole tensor on the CPU, for the files that this rank writes. All ranks must call it with the same tensors.

    `copy`: the results share no memory with `tensors`, and come from a GPU through page-locked memory, which is fast and kept for the next
    time.
    """
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, x in tensors.items():
        x = x.detach()
        if isinstance(x, DTensor):
            x = x.full_tensor()
        if writer_of(files[name]) != ranks.rank:
            continue
        if x.is_cuda and copy:
            x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        elif x.device.type != "cpu":
            x = x.cpu()
        elif copy:
            x = x.clone()
        result.setdefault(files[name], {})[name] = x
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return result


class StoredTensors:
    """The tensors of a checkpoint's files `stem`*.safetensors, read one at a time."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self._files = []
        for file in sorted(directory.glob(f"{stem}*.safetensors")):
            with readable(file):
                self._files.append(safe_open(file, "pt"))
        self._of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __bool__(self) -> bool:
        return bool(self._files)

    def names(self) -> Iterator[str]:
        return iter(self._of)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of[name].get_slice(name).get_shape())

    def like(self, name: str, other: torch.Tensor) -> torch.Tensor:
        """Tensor `name`, on the device of `other` and distributed as it is."""
        whole = self._of[name].get_tensor(name)
        if isinstance(other, DTensor):
            # every rank cuts its own part from the file: nothing is sent
            return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
        return whole.to(other.device)


def load_model(model: Any, stored: StoredTensors) -> None:
    """Put stored weights into the model's parameters.

    Raises:
        UserError: A tensor is missing, unknown or of another shape; nothing has changed then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in stored.names():
        if name not in parameters or tuple(parameters[name].shape) != stored.shape(name):
            raise UserError(
                f"checkpoint {stored.directory} does not fit the model: tensor {name!r} of shape {stored.shape(name)}"
            )
    held = {id(parameters[name]) for name in stored.names()}
    if missing := [name for name, parameter in parameters.items() if id(parameter) not in held]:
        raise UserError(f"checkpoint {stored.directory} does not fit the model: it has no tensor {missing[0]!r}")
    with torch.no_grad():
        for name in stored.names():
            parameters[name].copy_(stored.like(name, parameters[name]))


def load_optimizer(model: Any, optimizer: Any, stored: StoredTensors) -> None:
    """Put stored state into the optimizer, distributed as its parameters are."""
    parameters = dict(model.named_parameters())
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for key_and_name in stored.names():
        key, _, name = key_and_name.partition("/")
        if name not in parameters:
            raise UserError(f"checkpoint {stored.directory} does not fit the model: optimizer state of {name!r}")
        parameter = parameters[name]
        shape = stored.shape(key_and_name)
        if shape == tuple(parameter.shape):
            value = stored.like(key_and_name, parameter)
        else:  # a step count, which only fused optimizers keep on the device
            value = stored.like(key_and_name, torch.empty(0, device=parameter.device if parameter in fused else "cpu"))
        optimizer.state[parameter][key] = value


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """PyTorch's and NumPy's generators. Python's is left out: lazily imported packages draw from it, and nothing here does."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    return tensors, {"numpy": [name, np.asarray(keys).tolist(), *rest]}


def set_rng_state(tensors: StoredTensors, values: dict[str, Any]) -> None:
    """Put back what `rng_state` gave. Raises `UserError` for what is no state of these generators."""
    cpu = torch.empty(0)
    try:
        torch.set_rng_state(tensors.like("torch_cpu", cpu))
        if "torch_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors.like("torch_cuda", cpu))
        name, keys, *rest = values["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"checkpoint {tensors.directory} holds no state of the random generators: {one_line(error)}") from None
