"""Checkpoints in and out: the authors' released ones, any Llama (also mistral, qwen2, GGUF), NOSA, MiniCPM4 and our own.

A Llama becomes a gated model without changing its function: g_proj = 0 makes every gate sigmoid(0) = 1/2, and o_proj doubled
takes that back. Halving and doubling are exact in floating point, so are the way there and back.
"""

from __future__ import annotations

import functools
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
from ssa.methods import resolve_alias, selector_named
from ssa.model.card import CARD, is_foreign, write_card
from ssa.model.configuration import SSAConfig
from ssa.model.layouts import RELEASED, Choices, Layout, exported_json, llama_json, read_layout
from ssa.model.modeling import SSAForCausalLM
from ssa.model.openbmb import MINICPM, NOSA, nosa_name, own_name
from ssa.model.sources import open_source
from ssa.model.stored import SELECTOR, check_layers, fresh_selector, fresh_selector_note, parameter_shapes
from ssa.model.weights import TensorInfo, Weights, write_json, write_weights

Target = Literal["ssa", "llama", "llama-nsa", "nosa", "minicpm"]
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
    selector: str | None = None,
    to: Target = "ssa",
    block_size: int | None = None,
    num_selected_blocks: int | None = None,
    selection_rule: Rule | None = None,
    gate: bool | None = None,
    dtype: DTypeName | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Write the checkpoint `source` as the model directory `out`, tokenizer and generation settings included.

    Args:
        source: a run, a checkpoint, a transformers model directory, a .gguf file, or the name of a model on the hub.
        out: a directory that appears only when it is complete.
        method: how the result attends; a Llama becomes "ssa" unless told otherwise, our own models keep theirs, and released
            ones must be told where neither their configuration nor their hub name says it. NOSA and MiniCPM4 become "moba".
        selector: how the result's blocks are chosen; the source's, or means. One that is new to the source starts with fresh weights.
        to: "ssa" for this package, "llama" for any Llama loader (only where the gate is constant), "llama-nsa", "nosa" and "minicpm"
            for their authors' code.
        block_size, num_selected_blocks: the default budget of the result; the source's, or 16 blocks of 16 keys (64 of 64 with windows).
        selection_rule: "exact" for a Llama; "released" for released checkpoints where their kernel's rule exists at the budget.
        gate: with `to="ssa"`, whether the result has one; yes, unless the source is NOSA or MiniCPM4. False needs a gate that is
            absent or constant.
        dtype: of the result's weights; the source's. A selector's are float32.
        overwrite: replace `out` if it is a model directory.

    Raises:
        UserError: what cannot be read, expressed exactly, or written; nothing is left at `out`.
    """
    for name, value, known in (("to", to, Target), ("dtype", dtype, DTypeName)):
        if value is not None and value not in get_args(known):
            raise UserError(f"{name} = {value!r} is not one of {', '.join(get_args(known))}")
    if method is not None:
        meant, over = resolve_alias(method, selector)
        method, selector = meant, over if selector or meant != method else None
    opened, out = open_source(source), Path(out)
    check_out(out, opened.path, overwrite)
    weights = functools.cache(opened.weights)
    layout = read_layout(
        opened.config, Choices(method, selector, block_size, num_selected_blocks, selection_rule), str(source),
        lambda: weights().tensors,
    )  # fmt: skip
    config = layout.config
    gated = to == RELEASED
    if to == "ssa":
        gated = layout.model_type not in (NOSA, MINICPM) if gate is None else gate
    if not gated and config.attends.branches and (to != "ssa" or layout.gates != "none"):
        raise UserError(f"method {config.method} sums gated branches; no model without them computes the same")
    if to == "llama" and config.selector != "means":
        chooses: Any = selector_named(config.selector).load()
        if chooses.adds_bias:
            raise UserError(f"the selector {config.selector} adds a bias to the logits, which a Llama has not; convert to ssa")
        config.selector, config.selector_options = "means", None
    tensors = _Tensors(layout, weights(), gated, to, getattr(torch, dtype) if dtype else None)
    config.attention_gate = gated
    config.dtype = getattr(torch, dtype) if dtype else config.dtype or tensors.dtype
    values, notes = _configuration(layout, to)
    with appearing(out) as scratch:
        named = nosa_name if to == NOSA else str
        write_weights(scratch, {named(n): info for n, info in tensors.infos.items()}, lambda n: tensors.make(own_name(n)))
        write_json(scratch / "config.json", values)
        notes += tensors.notes()
        notes += opened.carry(scratch)
        if to == "ssa":
            if is_foreign(out / CARD):  # of the directory that is replaced
                shutil.copy(out / CARD, scratch)
            write_card(scratch, config)
    return ConversionReport(
        str(source), layout.model_type, out, to, config.attention_name, str(config.budget),
        sum(info.numel for info in tensors.infos.values()), str(tensors.dtype).removeprefix("torch."), (*layout.notes, *notes),
    )  # fmt: skip


def _configuration(layout: Layout, to: Target) -> tuple[dict[str, Any], list[str]]:
    """(config.json of the result, notes)."""
    config = layout.config
    if to == "llama":
        return llama_json(config), [] if config.attends.streams == "full" else [
            "a Llama attends to everything: only full mode is kept"
        ]
    if to != "ssa":
        values, notes = exported_json(config, to)
        if config.layer_budgets:
            config.layer_budgets = None
            notes.append(f"budgets for each layer are not kept: {to} knows one, {config.budget}")
        return values, notes
    config.architectures = [SSAForCausalLM.__name__]
    notes = []
    if layout.dense and config.attention_mode == "sparse":
        notes.append("attention_mode is sparse; attention_mode='full' computes what the source computes")
    return config.to_dict(), notes


class _Tensors:
    """The result's tensors by name, and how each is made of the source's; checks that source and configuration agree."""

    def __init__(self, layout: Layout, weights: Weights, gated: bool, to: Target, dtype: torch.dtype | None) -> None:
        if layout.model_type == NOSA:
            weights = _renamed(weights)
        self._layout, self._weights, self._wide = layout, weights, to == RELEASED
        self._there = weights.tensors
        self._fresh: dict[str, Tensor] = {}
        self._rounded: set[str] = set()
        check_layers(layout.config, weights)
        had_gate = layout.gates != "none"
        self._factor = {(False, True): 2.0, (True, False): 0.5}.get((had_gate, gated), 1.0)
        self.infos: dict[str, TensorInfo] = {}
        wanted: set[str] = set()
        heads, width = layout.config.num_attention_heads, layout.config.hidden_size
        for name, shape in _shapes(layout.config, gated or had_gate).items():
            gate = name.endswith(".g_proj.weight")
            if SELECTOR in name and layout.new_selector:
                if not self._fresh:
                    self._fresh = fresh_selector(layout.config)
                self.infos[name] = TensorInfo(shape, torch.float32)
                continue
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
            if SELECTOR in name:
                self.infos[name] = TensorInfo(shape, self._selector_dtype(name, to, dtype))
        self.dtype = self.infos["model.embed_tokens.weight"].dtype
        self._check_rest(wanted)

    def make(self, name: str) -> Tensor:
        info = self.infos[name]
        if name in self._fresh:
            return self._fresh[name].to(info.dtype)
        if name.endswith(".g_proj.weight"):
            return self._gate(name, info)
        if name not in self._there:  # o_proj.bias of a model that has none
            return torch.zeros(info.shape, dtype=info.dtype)
        factor = self._layout.factors.get(".".join(name.split(".")[-2:]), 1.0)
        if factor != 1.0:
            return self._scaled(name, factor * (self._factor if name.endswith(".o_proj.weight") else 1.0), info.dtype)
        tensor = self._weights.read(name).to(info.dtype)
        if not name.endswith(".o_proj.weight") or self._factor == 1.0:
            return tensor
        scaled = tensor * self._factor
        if not torch.equal(scaled / self._factor, tensor):
            raise UserError(f"{name} times {self._factor} is not exact in {info.dtype}; convert with --dtype float32")
        return scaled

    def _scaled(self, name: str, factor: float, dtype: torch.dtype) -> Tensor:
        """The source's tensor times a factor that its configuration has, rounded once."""
        tensor = self._weights.read(name)
        scaled = torch.empty(tensor.shape, dtype=dtype)
        step = 1 << 24  # numbers in double precision at a time
        for source, target in zip(tensor.flatten().split(step), scaled.view(-1).split(step), strict=True):
            exact = source.double() * factor
            target.copy_(exact)
            if bool((source.isfinite() & ~target.isfinite()).any()):
                raise UserError(f"{name} times {factor:g} is beyond {dtype}; convert with --dtype float32")
            if not torch.equal(target.double(), exact):
                self._rounded.add(name.split(".")[-2])
        return scaled

    def notes(self) -> list[str]:
        """What there is to say once all tensors are made."""
        notes = [fresh_selector_note(self._layout.config)] if self._fresh else []
        if self._rounded:
            notes.append(
                f"the scales in the weights of {', '.join(sorted(self._rounded))} are rounded once to {str(self.dtype).removeprefix('torch.')}, "
                "not exact" + ("" if self.dtype == torch.float32 else "; convert with --dtype float32 to keep more")
            )
        return notes

    def _selector_dtype(self, name: str, to: Target, dtype: torch.dtype | None) -> torch.dtype:
        """float32 with us; elsewhere that of the other weights, if it holds the values."""
        if to == "ssa":
            return torch.float32
        tensor, other = self._weights.read(name), dtype or self._there["model.embed_tokens.weight"].dtype
        return other if torch.equal(tensor.to(other).to(tensor.dtype), tensor) else torch.float32

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
            raise UserError(f"the source has no tensor {self._layout.source_name(name)!r}, which its config.json asks for")
        if self._there[name].shape != shape:
            raise UserError(
                f"tensor {self._layout.source_name(name)!r} has shape {list(self._there[name].shape)}; its config.json asks for {list(shape)}"
            )

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
                name, kind = self._layout.source_name(name), self._layout.model_type
                hint = f" with the selector {self._layout.config.selector}" if SELECTOR in name else ""
                raise UserError(f"the source has a tensor {name!r}, for which a {kind}{hint} has no place")


def _renamed(weights: Weights) -> Weights:
    """NOSA's, under our names."""
    theirs = {own_name(name): name for name in weights.tensors}
    if len(theirs) < len(weights.tensors):
        raise UserError("the source has A and delta under NOSA's names and under ours; keep one")
    return Weights(
        {ours: weights.tensors[name] for ours, name in theirs.items()}, lambda n: weights.read(theirs[n]), weights.files
    )


def _shapes(config: SSAConfig, gated: bool) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` with or without a gate."""
    asked = config.attention_gate
    config.attention_gate = gated
    try:
        return parameter_shapes(config)
    finally:
        config.attention_gate = asked


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Raises `UserError` where a model directory made of `source` cannot become `out`."""
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
def appearing(out: Path) -> Iterator[Path]:
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
