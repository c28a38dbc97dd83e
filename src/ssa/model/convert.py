"""Checkpoints in and out: the authors' released ones, any Llama (also mistral, qwen2, GGUF) and our own.

A Llama becomes a gated model without changing its function: g_proj = 0 makes every gate sigmoid(0) = 1/2, and o_proj doubled
takes that back. Halving and doubling are exact in floating point, so are the way there and back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from ssa.errors import UserError, one_line
from ssa.files import sync
from ssa.model.card import CARD, is_foreign, write_card
from ssa.model.configuration import SSAConfig
from ssa.model.layouts import RELEASED, Choices, Layout, llama_json, read_layout, released_json
from ssa.model.modeling import SSAForCausalLM
from ssa.model.sources import open_source
from ssa.model.stored import check_layers, parameter_shapes
from ssa.model.weights import TensorInfo, Weights, write_json, write_weights

Target = Literal["ssa", "llama", "llama-nsa"]
Rule = Literal["exact", "released"]
DTypeName = Literal["float32", "bfloat16", "float16"]

_SELECTION = 1  # of the three gates (compression, selection, window), the one that SSA, MoBA and FullAttn use


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; `str()` is for people."""

    source: str
    source_type: str
    out: Path
    target: Target
    method: str
    budget: str
    parameters: int
    dtype: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        became = self.target if self.target == "llama" else f"{self.target}, method {self.method}, budget {self.budget}"
        lines = [
            f"read {self.source} ({self.source_type})",
            f"wrote {self.out} ({became}, {self.parameters:,} parameters, {self.dtype})",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    source: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    to: Target = "ssa",
    block_size: int | None = None,
    num_selected_blocks: int | None = None,
    selection_rule: Rule | None = None,
    gate: bool = True,
    dtype: DTypeName | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Write the checkpoint `source` as the model directory `out`, tokenizer and generation settings included.

    Args:
        source: a run, a checkpoint, a transformers model directory, a .gguf file, or the name of a model on the hub.
        out: a directory that appears only when it is complete.
        method: how the result attends; a Llama becomes "ssa" unless told otherwise, our own models keep theirs, and released
            ones must be told where neither their configuration nor their hub name says it.
        to: "ssa" for this package, "llama" for any Llama loader (only where the gate is constant), "llama-nsa" for the
            authors' code.
        block_size, num_selected_blocks: the default budget of the result; the source's, or 16 blocks of 16 keys.
        selection_rule: "exact" for a Llama; "released" for released checkpoints where their kernel's rule exists at the budget.
        gate: with `to="ssa"`, whether the result has one. False needs a gate that is absent or constant.
        dtype: of the result's weights; the source's.
        overwrite: replace `out` if it is a model directory.

    Raises:
        UserError: what cannot be read, expressed exactly, or written; nothing is left at `out`.
    """
    for name, value, known in (("to", to, Target), ("dtype", dtype, DTypeName)):
        if value is not None and value not in get_args(known):
            raise UserError(f"{name} = {value!r} is not one of {', '.join(get_args(known))}")
    opened, out = open_source(source), Path(out)
    _check_out(out, opened.path, overwrite)
    layout = read_layout(opened.config, Choices(method, block_size, num_selected_blocks, selection_rule), str(source))
    gated = gate if to == "ssa" else to == RELEASED
    if not gated and layout.config.attends.branches and (to == "llama" or layout.gates != "none"):
        raise UserError(f"method {layout.config.method} sums gated branches; no model without them computes the same")
    tensors = _Tensors(layout, opened.weights(), gated, to, getattr(torch, dtype) if dtype else None)
    layout.config.attention_gate = gated
    layout.config.dtype = getattr(torch, dtype) if dtype else layout.config.dtype or tensors.dtype
    values, notes = _configuration(layout, to)
    with _appearing(out) as scratch:
        write_weights(scratch, tensors.infos, tensors.make)
        write_json(scratch / "config.json", values)
        notes += opened.carry(scratch)
        if to == "ssa":
            if is_foreign(out / CARD):  # of the directory that is replaced
                shutil.copy(out / CARD, scratch)
            write_card(scratch, layout.config)
    return ConversionReport(
        str(source), layout.model_type, out, to, layout.config.method, str(layout.config.budget),
        sum(info.numel for info in tensors.infos.values()), str(tensors.dtype).removeprefix("torch."), (*layout.notes, *notes),
    )  # fmt: skip


def _configuration(layout: Layout, to: Target) -> tuple[dict[str, Any], list[str]]:
    """(config.json of the result, notes)."""
    config = layout.config
    if to != "ssa" and config.selector != "means":
        raise UserError(f"the selector {config.selector} cannot be exported: {to} knows none but block means; convert to ssa")
    if to == "llama":
        return llama_json(config), [] if config.attends.streams == "full" else [
            "a Llama attends to everything: only full mode is kept"
        ]
    if to == RELEASED:
        return released_json(config)
    config.architectures = [SSAForCausalLM.__name__]
    notes = []
    if layout.gates == "none" and layout.model_type != "ssa" and config.attention_mode == "sparse":
        notes.append("attention_mode is sparse; attention_mode='full' computes what the source computes")
    return config.to_dict(), notes


class _Tensors:
    """The result's tensors by name, and how each is made of the source's; checks that source and configuration agree."""

    def __init__(self, layout: Layout, weights: Weights, gated: bool, to: Target, dtype: torch.dtype | None) -> None:
        self._layout, self._weights, self._wide = layout, weights, to == RELEASED
        self._there = weights.tensors
        check_layers(layout.config, weights)
        had_gate = layout.gates != "none"
        self._factor = {(False, True): 2.0, (True, False): 0.5}.get((had_gate, gated), 1.0)
        self.infos: dict[str, TensorInfo] = {}
        wanted: set[str] = set()
        heads, width = layout.config.num_attention_heads, layout.config.hidden_size
        for name, shape in _shapes(layout.config, gated or had_gate).items():
            gate = name.endswith(".g_proj.weight")
            if not gate or had_gate:
                self._check(name, (3 * heads, width) if gate and layout.gates == "three" else shape)
                wanted.add(name)
            if gate and not gated:
                self._check_constant(name)
                continue
            like = (
                name
                if name in self._there
                else name.replace("g_proj.weight", "o_proj.weight").replace("o_proj.bias", "o_proj.weight")
            )
            shape = (3 * heads, width) if gate and self._wide else shape
            self.infos[name] = TensorInfo(shape, dtype or self._there[like].dtype)
        self.dtype = self.infos["model.embed_tokens.weight"].dtype
        self._check_rest(wanted)

    def make(self, name: str) -> Tensor:
        info = self.infos[name]
        if name.endswith(".g_proj.weight"):
            return self._gate(name, info)
        if name not in self._there:  # o_proj.bias of a model that has none
            return torch.zeros(info.shape, dtype=info.dtype)
        tensor = self._weights.read(name).to(info.dtype)
        if not name.endswith(".o_proj.weight") or self._factor == 1.0:
            return tensor
        scaled = tensor * self._factor
        if not torch.equal(scaled / self._factor, tensor):
            raise UserError(f"{name} times {self._factor} is not exact in {info.dtype}; convert with --dtype float32")
        return scaled

    def _gate(self, name: str, info: TensorInfo) -> Tensor:
        own = self._own_gate(name)
        if own is None:
            return torch.zeros(info.shape, dtype=info.dtype)
        own = own.to(info.dtype)
        if own.shape == info.shape:
            return own
        wide = own.new_zeros(own.shape[0], 3, own.shape[1])
        wide[:, _SELECTION] = own
        return wide.flatten(0, 1)

    def _own_gate(self, name: str) -> Tensor | None:
        """g_proj as our model has it, [heads * gates, C], or None where there is none."""
        if self._layout.gates == "none":
            return None
        rows = self._weights.read(name)
        one = self._layout.config.attends.num_gates == 1
        return rows[_SELECTION::3].contiguous() if one and self._layout.gates == "three" else rows

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._there:
            if self._layout.missing_o_bias and name.endswith(".o_proj.bias"):
                return
            raise UserError(f"the source has no tensor {name!r}, which its config.json asks for")
        if self._there[name].shape != shape:
            raise UserError(f"tensor {name!r} has shape {list(self._there[name].shape)}; its config.json asks for {list(shape)}")

    def _check_constant(self, name: str) -> None:
        gate = self._own_gate(name)
        if gate is not None and bool(gate.any()):
            raise UserError(f"the gate depends on the input ({name} is not 0), so no model without a gate computes the same")

    def _check_rest(self, wanted: set[str]) -> None:
        for name in sorted(set(self._there) - wanted):
            if name == "lm_head.weight":  # tied, or it would be wanted
                if not torch.equal(self._weights.read(name), self._weights.read("model.embed_tokens.weight")):
                    raise UserError(
                        "lm_head.weight is not the embedding though config.json ties them; set tie_word_embeddings to false"
                    )
            elif not name.endswith(".rotary_emb.inv_freq"):  # computed, but stored by old releases
                raise UserError(f"the source has a tensor {name!r}, for which a {self._layout.model_type} has no place")


def _shapes(config: SSAConfig, gated: bool) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` with or without a gate."""
    asked = config.attention_gate
    config.attention_gate = gated
    try:
        return parameter_shapes(config)
    finally:
        config.attention_gate = asked


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise UserError(f"out {out} is or holds the source; name another directory")
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out} exists; name another directory, or pass --overwrite to replace it")
    if out.is_symlink() or not (out / "config.json").is_file():
        raise UserError(f"{out} exists and is not a model directory, so it is not replaced")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block succeeds and vanishes when it does not."""
    scratch = out.parent / f".{out.name}.tmp-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        try:
            yield scratch
            for file in scratch.iterdir():
                sync(file)
            sync(scratch)
            if out.exists():
                os.rename(out, old)
            os.rename(scratch, out)
            sync(out.parent)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}") from error
