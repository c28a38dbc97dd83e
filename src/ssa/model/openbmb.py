"""Checkpoints of OpenBMB: NOSA and MiniCPM4 (InfLLM-V2). Their names, scales and selections as ours, and the way back.

NOSA-1B, 3B, 8B: a Llama whose layers have A and delta besides, a learned importance of keys that is added to the logits. Its
configuration says nothing of the selection: `NOSA_BUDGET` and `NOSA_OPTIONS` stand in its authors' code.
MiniCPM4: a Llama that multiplies embeddings by scale_emb, each residual branch by scale_depth / sqrt(layers), and divides by
hidden_size / dim_model_base before the head. Ours multiplies the weights instead. Its selection is config.json's sparse_config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ssa.budget import Budget
from ssa.errors import UserError
from ssa.methods import checked_options, selector_named
from ssa.model.configuration import SSAConfig

NOSA, MINICPM = "nosa", "minicpm"
NOSA_CLASS = "SparseLlamaForCausalLM"
NOSA_BUDGET = Budget(64, 64)
NOSA_OPTIONS: dict[str, Any] = {
    "mean_size": 32, "mean_stride": 16, "sink_blocks": 1, "local_blocks": 16, "query_blocks": 15, "lse": "exact", "dense_length": 0,
}  # fmt: skip
"""16 local blocks before the query's own: their comparison is inclusive, so 17 are forced. 15 of the rest go by query, 31 by importance."""

_SPARSE_CONFIG = {
    "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64, "dense_len": 8192,
}  # fmt: skip
"""What MiniCPM4's model card says to write into config.json."""


def is_nosa(raw: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a config.json of model_type llama, beside tensors of these names, is NOSA's."""
    architectures = raw.get("architectures")
    return (isinstance(architectures, list) and NOSA_CLASS in architectures) or any(own_name(name) != name for name in names)


def own_name(name: str) -> str:
    """What we call a tensor of NOSA."""
    return re.sub(r"^(model\.layers\.\d+\.self_attn)\.(A|delta\.weight|delta\.bias)$", r"\1.selector.\2", name)


def nosa_name(name: str) -> str:
    """What NOSA calls a tensor of ours."""
    return name.replace(".self_attn.selector.", ".self_attn.")


def read_nosa(raw: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """How a NOSA checkpoint attends, as fields of `SSAConfig`. `nosa_json` writes what their code has built in, besides."""
    options = raw.get("selector_options", NOSA_OPTIONS)
    if not isinstance(options, dict):
        raise UserError(f"config.json: selector_options = {options!r} is not an object")
    if any(name.endswith(".self_attn.delta.bias") for name in names):
        options = options | {"delta_bias": True}
    return {
        "method": raw.get("method", "moba"), "selector": "eviction", "selector_options": options,
        "attention_mode": raw.get("attention_mode"), "block_size": raw.get("block_size", NOSA_BUDGET.block_size),
        "num_selected_blocks": raw.get("num_selected_blocks", NOSA_BUDGET.num_selected_blocks),
    }  # fmt: skip


def nosa_json(values: dict[str, Any], config: SSAConfig) -> tuple[dict[str, Any], list[str]]:
    """(config.json, notes), from `values`, the Llama's. What ours says of the selection is added: theirs ignores it."""
    options = checked_options(selector_named("eviction"), config.selector_options, "selector_options")
    notes = ["it is NOSA only to its authors' code, which is not part of this package: transformers' Llama drops A and delta"]
    differs = [f"{name} = {options[name]}" for name, value in NOSA_OPTIONS.items() if options[name] != value]
    if config.uniform_budget != NOSA_BUDGET:
        differs.insert(0, f"budget {config.uniform_budget}")
    if differs:
        notes.append(f"{', '.join(differs)}: their code has NOSA's released selection built in, so its sparse results differ")
    return values | {
        "architectures": [NOSA_CLASS], "method": config.method, "attention_mode": config.attention_mode,
        "block_size": config.block_size, "num_selected_blocks": config.num_selected_blocks,
        "selector_options": {name: value for name, value in (config.selector_options or {}).items() if name != "delta_bias"},
    }, notes  # fmt: skip


def read_minicpm(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(how a MiniCPM4 checkpoint attends, as fields of `SSAConfig`, notes)."""
    sparse: Any = raw.get("sparse_config")
    notes: list[str] = []
    if sparse is None:
        notes.append("no sparse_config: the source attends to everything; the selection is the one that MiniCPM4's card gives")
    elif not isinstance(sparse, dict):
        raise UserError(f"config.json: sparse_config = {sparse!r} is not an object")
    elif sparse.get("use_nope"):
        raise UserError("config.json: sparse_config.use_nope selects by keys without RoPE, which ours does not")
    read: dict[str, int] = {}
    for name, default in _SPARSE_CONFIG.items():
        value: Any = sparse.get(name, default) if sparse else default
        least = {"dense_len": -1, "init_blocks": 0}.get(name, 1)
        if type(value) is not int or value < least:
            raise UserError(f"config.json: sparse_config.{name} = {value!r} is not an integer of at least {least}")
        read[name] = value
    local, dense = read["window_size"] // read["block_size"], max(0, read["dense_len"])
    if dense:
        notes.append(
            f"dense_len = {dense}: queries at positions below it read everything; theirs does that for whole texts shorter than it"
        )
    options = {
        "mean_size": read["kernel_size"], "mean_stride": read["kernel_stride"], "sink_blocks": read["init_blocks"],
        "local_blocks": local, "dense_length": dense,
    }  # fmt: skip
    return {
        "method": "moba", "selector": "windows", "selector_options": options,
        "block_size": read["block_size"], "num_selected_blocks": read["topk"] + local,
    }, notes  # fmt: skip


def minicpm_factors(raw: Mapping[str, Any], config: Any) -> dict[str, float]:
    """By the last two parts of a tensor's name: what ours is multiplied by, so that the scales of `raw` can be left out.

    Tied embeddings stay tied: the last norm takes back what the head would see of scale_emb.
    """
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        value: Any = raw.get(name)
        if type(value) not in (int, float) or value <= 0:
            raise UserError(f"config.json: {name} = {value!r} is not a positive number")
    branch = raw["scale_depth"] / math.sqrt(config.num_hidden_layers)
    output = raw["dim_model_base"] / config.hidden_size
    return {
        "embed_tokens.weight": raw["scale_emb"], "norm.weight": output / raw["scale_emb"] if config.tie_word_embeddings else output,
        "o_proj.weight": branch, "o_proj.bias": branch, "down_proj.weight": branch, "down_proj.bias": branch,
    }  # fmt: skip


def minicpm_rope(rope: Any) -> Any:
    """Their longrope scales by the ratio of the context lengths, whatever else config.json says."""
    if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
        return {name: value for name, value in rope.items() if name not in ("factor", "attention_factor")}
    return rope


def minicpm_json(values: dict[str, Any], config: SSAConfig) -> tuple[dict[str, Any], list[str]]:
    """(config.json, notes), from `values`, the Llama's; the scales are neutral, because the weights have them.

    Raises:
        UserError: What their code has no place for.
    """
    options: Any = checked_options(selector_named("windows"), config.selector_options, "selector_options")
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if config.mlp_bias or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError("MiniCPM4 has no biases in its MLP and heads of hidden_size / num_attention_heads; convert to ssa")
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        theirs = math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))
        if not math.isclose(ROPE_INIT_FUNCTIONS[kind](config)[1], theirs):
            raise UserError(f"attention_factor of longrope: MiniCPM4 knows {theirs:g} alone, that of its lengths; convert to ssa")
    elif kind not in ("default", "linear"):
        raise UserError(f"rope_type {kind!r} cannot be exported: MiniCPM4 knows default, linear and longrope; convert to ssa")
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = minicpm_rope(values["rope_scaling"])
    for name in ("rope_parameters", "dtype", "mlp_bias"):
        values.pop(name, None)
    notes = ["transformers loads it only with its authors' MiniCPMForCausalLM, which is not part of this package"]
    if options["dense_length"]:
        notes.append("dense_len: theirs reads everything in whole texts shorter than it, ours at positions below it")
    if options["lse"] != "exact":
        notes.append(f"lse = {options['lse']} is not kept: their code has no name for it, and converting back gives exact")
    return values | {
        "model_type": MINICPM, "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 1, "scale_depth": math.sqrt(config.num_hidden_layers), "dim_model_base": config.hidden_size,
        "sparse_config": {
            "kernel_size": options["mean_size"], "kernel_stride": options["mean_stride"], "init_blocks": options["sink_blocks"],
            "block_size": config.block_size, "window_size": options["local_blocks"] * config.block_size,
            "topk": config.num_selected_blocks - options["local_blocks"], "use_nope": False,
            "dense_len": options["dense_length"] or -1,
        },
    }, notes  # fmt: skip
