"""Recipes: what a run is, as frozen dataclasses, TOML files and command-line overrides. Imports no torch.

A recipe file has three tables, `[model]`, `[data]` and `[train]`; every key is a field below, everything left out keeps its
default, and an unknown key is an error. `ssa train tiny --train.steps 100` overrides single fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ssa.arguments import parse_arguments
from ssa.budget import Rule, Scope, Scoring, Selection, released_rule_check
from ssa.checked_json import parse_json, read_bytes, typed
from ssa.errors import UserError
from ssa.methods import checked_options, method_named, resolve_alias, selector_named

AlignmentLoss = Literal["smooth_l1", "l2", "none"]


@dataclass(frozen=True)
class ModelRecipe:
    """A new model (or, with `init_from`, a checkpoint to go on from). Field names are those of `SSAConfig`."""

    method: str = "ssa"
    """Which streams are trained: full, moba, nsa, ssa, or one that another package registers."""
    method_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What a method of another package can be told."""
    selector: str = "means"
    """How blocks are chosen: means, or one that another package registers."""
    selector_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What such a selector can be told."""
    init_from: str = ""
    """Checkpoint or run to start from; its architecture wins, the method's fields below still apply."""
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 32
    vocab_size: int = 0
    """0 = as large as the data's tokenizer."""
    max_position_embeddings: int = 131072
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    """Llama-3 RoPE scaling for contexts beyond the original length; 1 = none (Table A1 uses 4)."""
    rope_original_max_position: int = 8192
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    block_size: int = 16
    num_selected_blocks: int = 16
    selection_scope: Scope = "group"
    selection_scoring: Scoring = "softmax"
    selection_rule: Rule = "exact"
    attention_gate: bool = True
    window_size: int = 128
    """Sliding window of NSA, in keys."""
    full_ratio: float = 0.5
    """SSA: share of steps whose main stream is full attention."""
    alignment_weight: float = 10.0
    """SSA: alpha."""
    alignment_loss: AlignmentLoss = "smooth_l1"
    align_gated: bool = True
    """SSA: align outputs after the gate (released code) rather than before it (Algorithm 1)."""


@dataclass(frozen=True)
class DataRecipe:
    """What the model reads."""

    path: str = "builtin:python"
    """A directory made by `ssa prepare`, or text to prepare on first use: files, or builtin:python (the embedded corpus)."""
    tokenizer: str = "byte"
    """Only where `path` is not prepared yet: "byte", a tokenizer.json or a tokenizer directory."""
    context: int = 512
    """Tokens in a packed row."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Prepared directories to train on with their shares of the rows, {"data/books" = 0.7, "data/web:recent" = 0.3}, the latter a split.
    `path`, which has the validation split, must be prepared too, with the same tokenizer. Empty = train on `path`."""


@dataclass(frozen=True)
class TrainRecipe:
    """How it learns (defaults: the paper's optimizer)."""

    steps: int = 300
    batch_size: int = 8
    """Rows in a micro-batch of one rank (of one group of ranks with `context_parallel`)."""
    accumulation: int = 1
    """Micro-batches in a step. Tokens of a step: batch_size * accumulation * context * ranks / context_parallel."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon = Muon for the layers' matrices, AdamW for the rest; both with `lr`, Muon's updates being scaled to AdamW's size."""
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises to `lr`; the rest is a cosine to `min_lr`."""
    alignment_warmup: float = 0.0
    """SSA: share of the steps over which the weight of the alignment rises from 0 to `model.alignment_weight`; 0 = constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    seed: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 autocast where the device computes in it, else float32."""
    device: str = "auto"
    deterministic: bool = False
    """On a GPU: deterministic algorithms alone, so that a run repeats itself bit for bit; dense attention is then flash's, which is slower."""
    activation_checkpointing: bool = False
    """Hold less for the backward pass and compute it again there."""
    recompute: Literal["selective", "full"] = "selective"
    """What activation checkpointing computes again: selective = what is cheap, keeping matrix products, attention and selection;
    full = the whole layer."""
    compile: bool = False
    """Compile every decoder layer."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several ranks share the model: ddp = a copy each; fsdp = parts of weights, gradients and optimizer; hsdp = fsdp within groups of
    `shard_ranks`, copies across them; auto = ddp where a copy takes less than a tenth of a device, else fsdp."""
    shard_ranks: int = 0
    """hsdp: ranks in a group; 0 = those of one node."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: drop a layer's gathered weights after its forward pass and gather them again in the backward pass."""
    reduce_every_micro_batch: bool = False
    """fsdp, hsdp: keep only the own part of the gradients between micro-batches: less memory, more traffic."""
    context_parallel: int = 1
    """Ranks that share each row: keys and values are gathered from all of them."""
    skip_nonfinite: int = 0
    """Steps in a row that are skipped where loss or gradient norm is not finite, before the run stops."""
    skip_spikes: float = 0.0
    """Skip steps whose loss or gradient norm lies so many standard deviations above the last 128; 0 = never."""
    log_every: int = 10
    eval_every: int = 0
    """Steps between validation losses; 0 = only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 = only at the end."""
    probe_every: int = 0
    """Steps between measurements of the attention mass that the selected blocks keep, on a fixed batch of validation text; 0 = never."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl."""
    verify_data: bool = False
    """Check the hash of every shard before the first step."""
    keep_last: int = 2
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""


SIZE_LIMITS = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 31, "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14, "head_dim": 1 << 14, "max_position_embeddings": 1 << 31, "block_size": 1 << 31,
    "num_selected_blocks": 1 << 31, "window_size": 1 << 31,
}  # fmt: skip
"""The largest sizes of a model that are taken for what somebody means; each is at least 1."""
MAX_LAYERS = 1 << 10
"""Of a model that is built; laying out many more takes minutes."""

TABLES: dict[str, type] = {"model": ModelRecipe, "data": DataRecipe, "train": TrainRecipe}
"""The tables of a recipe."""


@dataclass(frozen=True)
class Recipe:
    """One run."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        method, selector = resolve_alias(self.model.method, self.model.selector)
        if (method, selector) != (self.model.method, self.model.selector):
            object.__setattr__(self, "model", dataclasses.replace(self.model, method=method, selector=selector))
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _check(recipe: Recipe) -> None:
    """Every impossible value or combination, each told in one line."""
    m, d, t = recipe.model, recipe.data, recipe.train

    def need(ok: bool, name: str, value: object, fix: str) -> None:
        if not ok:
            raise UserError(f"{name} = {value!r} {fix}")

    for table in (m, d, t):
        prefix = type(table).__name__.removesuffix("Recipe").lower()
        for f in dataclasses.fields(table):
            value = getattr(table, f.name)
            if isinstance(value, float):
                need(value == value and abs(value) != float("inf"), f"{prefix}.{f.name}", value, "is not a finite number")
            if isinstance(value, int):
                need(value < 2**63, f"{prefix}.{f.name}", value, "must be below 2**63")
    need(m.vocab_size >= 0, "model.vocab_size", m.vocab_size, "must be 0 (the tokenizer's) or more")
    for name in (*SIZE_LIMITS, "rope_original_max_position"):
        value, most = getattr(m, name), SIZE_LIMITS.get(name, 1 << 31)
        need(value >= 1 or name == "vocab_size", f"model.{name}", value, "must be at least 1")
        need(value <= most, f"model.{name}", value, f"is beyond reason: {most} at most")
    need(
        m.num_hidden_layers <= MAX_LAYERS,
        "model.num_hidden_layers",
        m.num_hidden_layers,
        f"is beyond reason: {MAX_LAYERS} at most",
    )
    need(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "must be even: RoPE rotates pairs")
    need(m.num_attention_heads % m.num_key_value_heads == 0, "model.num_attention_heads", m.num_attention_heads,
         f"must be a multiple of model.num_key_value_heads = {m.num_key_value_heads}")  # fmt: skip
    need(m.hidden_size % m.num_attention_heads == 0, "model.hidden_size", m.hidden_size,
         f"must be a multiple of model.num_attention_heads = {m.num_attention_heads}")  # fmt: skip
    need(0 <= m.full_ratio <= 1, "model.full_ratio", m.full_ratio, "must lie in 0..1")
    need(m.alignment_weight >= 0, "model.alignment_weight", m.alignment_weight, "must be 0 or more")
    need(m.rope_factor >= 1, "model.rope_factor", m.rope_factor, "must be at least 1")
    need(m.rope_theta > 0, "model.rope_theta", m.rope_theta, "must be positive")
    method = method_named(m.method, "model.method")
    checked_options(method, m.method_options, "model.method_options")
    options = checked_options(selector_named(m.selector, "model.selector"), m.selector_options, "model.selector_options")
    if "mean_size" in options:  # of a selector by windows, whose options are fields of a selection
        chosen = {f.name: options[f.name] for f in dataclasses.fields(Selection) if f.name in options}
        rest: dict[str, Any] = {"scope": m.selection_scope, "scoring": m.selection_scoring, "rule": m.selection_rule}
        Selection(m.num_selected_blocks, m.block_size, **(rest | chosen))
    need(m.selection_scope in method.scopes, "model.selection_scope", m.selection_scope,
         f"does not go with method {m.method}; use {' or '.join(method.scopes)}")  # fmt: skip
    if m.selection_rule == "released":
        released_rule_check(m.num_selected_blocks, m.block_size)
    need(d.context >= 2, "data.context", d.context, "must be at least 2 tokens")
    need(d.context <= m.max_position_embeddings, "data.context", d.context,
         f"exceeds model.max_position_embeddings = {m.max_position_embeddings}")  # fmt: skip
    for source, weight in d.mixture.items():
        need(0 < weight < float("inf"), f"data.mixture.{source}", weight, "must be a positive number")
    need(bool(d.path), "data.path", d.path, "is empty; name a prepared directory or builtin:python")
    for name in ("steps", "batch_size", "accumulation", "log_every", "keep_last", "context_parallel"):
        need(getattr(t, name) >= 1, f"train.{name}", getattr(t, name), "must be at least 1")
    need(d.context % (2 * t.context_parallel) == 0 or t.context_parallel == 1, "data.context", d.context,
         f"must be a multiple of 2 * train.context_parallel = {2 * t.context_parallel}")  # fmt: skip
    for name in (
        "eval_every",
        "save_every",
        "weight_decay",
        "clip",
        "min_lr",
        "seed",
        "shard_ranks",
        "skip_nonfinite",
        "skip_spikes",
        "probe_every",
    ):
        need(getattr(t, name) >= 0, f"train.{name}", getattr(t, name), "must be 0 or more")
    need(not t.shard_ranks or t.parallel == "hsdp", "train.shard_ranks", t.shard_ranks,
         f"goes with train.parallel = 'hsdp' only, which is {t.parallel!r} here")  # fmt: skip
    need(t.lr > 0, "train.lr", t.lr, "must be positive")
    need(t.min_lr <= t.lr, "train.min_lr", t.min_lr, f"exceeds train.lr = {t.lr}")
    for name in ("warmup", "alignment_warmup"):
        need(0 <= getattr(t, name) <= 1, f"train.{name}", getattr(t, name), "is a share of the steps, which lies in 0..1")
    need(all(0 <= b < 1 for b in t.betas), "train.betas", t.betas, "must lie in 0..1, 1 excluded")


def check_seed(seed: int, name: str) -> None:
    """Raises `UserError` for a seed that PyTorch does not take."""
    if abs(seed) >= 2**63:
        raise UserError(f"{name} = {seed} is too large: it must be below 2**63")


def _coerce(cls: type, table: Any, where: str) -> Any:
    """A dataclass from a parsed TOML table; types are checked here because TOML knows only its own."""
    if not isinstance(table, dict):
        raise UserError(f"[{where}] must be a table, not {table!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown key {f'{where}.{key}'!r}; {hint}")
        values[key] = typed(value, _HINTS[cls][key], f"{where}.{key}")
    return cls(**values)


_HINTS = {cls: get_type_hints(cls) for cls in TABLES.values()}


def recipe_directories() -> list[Path]:
    """Where preset names are looked up: the installed package, then the source checkout."""
    here = Path(__file__).parent
    return [here / "configs", here.parent.parent / "configs"]


def find_recipe(name: str) -> Path:
    """A path, or the name of a preset ("tiny", "1b")."""
    with contextlib.suppress(OSError, ValueError):  # no file can have such a name
        if Path(name).is_file():
            return Path(name)
    presets = {path.stem: path for directory in reversed(recipe_directories()) for path in sorted(directory.glob("*.toml"))}
    if name in presets:
        return presets[name]
    if os.path.isfile(os.path.join(name, "recipe.json")):
        raise UserError(f"{name} is a run: go on with it by `ssa train --resume {name}`, or name {Path(name) / 'recipe.json'}")
    if os.path.isdir(name):
        raise UserError(f"no recipe {name!r}: the directory is no run, it has no recipe.json")
    raise UserError(f"no recipe {name!r}: neither a file nor one of the presets {', '.join(sorted(presets))}")


def read_recipe(text: str, source: str = "recipe") -> Recipe:
    """A recipe from TOML text (or JSON, as run directories keep it)."""
    try:
        data = parse_json(text, source, largest=None) if text.lstrip().startswith("{") else tomllib.loads(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
    if unknown := [k for k in data if k not in TABLES]:
        near = difflib.get_close_matches(unknown[0], TABLES, n=1)
        hint = f"did you mean [{near[0]}]?" if near else "a recipe has [model], [data] and [train]"
        raise UserError(f"{source}: unknown table or key {unknown[0]!r}; {hint}")
    try:
        return Recipe(**{k: _coerce(TABLES[k], v, k) for k, v in data.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe in file or preset `name`, with command-line `overrides` (`["--train.steps", "100"]`) on top."""
    path = find_recipe(name)
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    recipe = read_recipe(text, str(path))
    return override(recipe, overrides) if overrides else recipe


def override(recipe: Recipe, arguments: list[str], prog: str = "ssa train CONFIG") -> Recipe:
    """`recipe` with `--table.field value` arguments applied; `--help` prints the fields with their present values."""
    return parse_arguments(Recipe, arguments, prog, recipe_flags(), default=recipe)


def recipe_flags() -> dict[str, bool]:
    """Every `--table.field` that `override` knows, and whether a value follows it."""
    flags: dict[str, bool] = {}
    for table, cls in TABLES.items():
        for name, hint in _HINTS[cls].items():
            name = name.replace("_", "-")
            flags[f"--{table}.{name}"] = hint is not bool
            if hint is bool:
                flags[f"--{table}.no-{name}"] = False
    return flags
