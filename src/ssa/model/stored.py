"""Our model from a directory. What config.json and the headers of the weights say is checked before anything is built from it.

Nothing in the directory decides which code runs: of config.json only the fields of `SSAConfig` are taken, so no `auto_map` and no name of an
attention kernel, which transformers would fetch and run, gets further than this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.utils import logging

from ssa.checked_json import read_json, typed
from ssa.config import MAX_LAYERS
from ssa.errors import UserError, one_line
from ssa.model.configuration import SSAConfig, build_attention
from ssa.model.modeling import SSAForCausalLM
from ssa.model.weights import Weights, open_weights

SELECTOR = ".self_attn.selector."
"""In the names of a selector's tensors, and in no others."""
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_TAKEN = {field.name for field in fields(SSAConfig)} | {"rope_scaling", "rope_theta", "torch_dtype"}
_PLAIN = {int, float, bool, str, NoneType, list[int], list[str]}
_ANNOTATED = {**get_annotations(LlamaConfig), **get_annotations(SSAConfig, eval_str=True)}
_CHECKED = {name: hint for name, hint in _ANNOTATED.items() if {*(get_args(hint) or [hint])} <= _PLAIN}
"""Types of the fields whose types are those of JSON."""


def read_config(directory: Path) -> SSAConfig:
    """The configuration in `directory`/config.json.

    Raises:
        UserError: No JSON, another model's, quantised, or values of which no model can be made.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != SSAConfig.model_type:
        raise UserError(
            f"the model in {directory} is of type {raw.get('model_type')!r}, not 'ssa'; convert it first: ssa convert {directory} OUT"
        )
    if raw.get("quantization_config"):
        raise UserError(
            f"{path} asks for quantised weights (quantization_config), which are not read; dequantise the model first"
        )
    try:
        return make_config(own_fields(raw))
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json ')}") from None


def own_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json makes an `SSAConfig`. Raises `UserError` for a value of another type."""
    return {name: typed(value, _CHECKED.get(name, Any), name) for name, value in raw.items() if name in _TAKEN}


def make_config(values: dict[str, Any]) -> SSAConfig:
    """An `SSAConfig`, or a `UserError` of one line."""
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and str(value).removeprefix("torch.") not in _DTYPES:
            raise UserError(f"config.json: {name} = {value!r} is not one of {', '.join(_DTYPES)}")
    try:
        return SSAConfig(**values)
    except UserError:
        raise
    except Exception as error:  # transformers validates with several classes of its own
        raise UserError(f"config.json does not make an ssa configuration: {one_line(error)}") from None


def parameter_shapes(config: SSAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters; a tied lm_head is left out."""
    try:
        with torch.device("meta"):
            state = SSAForCausalLM(config).state_dict()
    except UserError:
        raise
    except Exception as error:  # an unknown activation or RoPE type, an overflowing size
        raise UserError(f"config.json makes no model: {type(error).__name__}: {one_line(error)}") from None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def check_layers(config: SSAConfig, weights: Weights) -> None:
    """Refuse, before a model of that many layers is laid out, more layers than there are tensors, or than make sense."""
    layers = config.num_hidden_layers
    if layers > len(weights.tensors):
        raise UserError(f"config.json says {layers} layers, but there are only {len(weights.tensors)} tensors")
    if layers > MAX_LAYERS:
        raise UserError(f"config.json says {layers} layers; {MAX_LAYERS} are the most")


def check_weights(directory: Path, config: SSAConfig, new_selector: bool = False) -> None:
    """Refuse weights that are damaged or are not those of `config`: what is missing would be random. Only headers are read.

    new_selector: the selector is not that of the directory's model, so its weights need not be there; all others must.

    Raises:
        UserError: It names the file or the tensor.
    """
    weights = open_weights(directory)
    check_layers(config, weights)
    wanted = parameter_shapes(config)
    for name, shape in wanted.items():
        if name not in weights.tensors:
            if new_selector and SELECTOR in name:
                continue
            raise UserError(f"missing tensor {name}")
        if weights.tensors[name].shape != shape:
            raise UserError(f"tensor {name} has shape {list(weights.tensors[name].shape)}; config.json asks for {list(shape)}")
    if stray := sorted(weights.tensors.keys() - wanted.keys() - {"lm_head.weight"}):  # a tied one may be there
        hint = f" with the selector {config.selector}" if SELECTOR in stray[0] else ""
        raise UserError(f"unexpected tensor {stray[0]!r}, for which config.json{hint} has no place")


def fresh_selector(config: SSAConfig) -> dict[str, Tensor]:
    """The selectors' tensors as their class makes them, by their names in the model; fp32."""
    return {
        f"model.layers.{layer}{SELECTOR}{name}": tensor
        for layer in range(config.num_hidden_layers)
        for name, tensor in build_attention(config)[1].state_dict().items()
    }


def fresh_selector_note(config: SSAConfig) -> str:
    """What people have to know of a model that got another selector; "" where that has no weights."""
    names = ", ".join(sorted(build_attention(config)[1].state_dict()))
    return names and f"new selector {config.selector}: its weights ({names}) start fresh in each layer"


def load_pretrained(directory: Path, config: SSAConfig, dtype: torch.dtype, new_selector: bool = False) -> SSAForCausalLM:
    """The model of `config` with the weights in `directory`, on the CPU (or the present default device).

    new_selector: the selector is not that of the directory's model; its weights are a new model's.

    Raises:
        UserError: Damaged weights, or others than `config` asks for; an adapter of another model.
    """
    if (directory / "adapter_config.json").is_file():  # would be applied or not, as packages are installed
        raise UserError(f"{directory} holds an adapter (adapter_config.json): merge it into its model and save that")
    try:
        if (directory / "generation_config.json").is_file():
            read_json(directory / "generation_config.json")
        check_weights(directory, config, new_selector)
        with _quiet(new_selector):
            model = SSAForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        if new_selector:
            model.load_state_dict(fresh_selector(config), strict=False)
        return model
    except UserError as error:
        raise UserError(f"the model in {directory} cannot be loaded: {error}") from None
    except Exception as error:  # what transformers and safetensors raise for damaged files has no common class
        raise UserError(f"the model in {directory} cannot be loaded: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet(new_selector: bool) -> Iterator[None]:
    """No progress bar, which transformers draws even for models that load in milliseconds, and no report of weights that are
    known to be missing."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if new_selector:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
