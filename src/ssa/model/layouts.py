"""Configurations of other checkpoints as ours, and ours as theirs.

llama, mistral, qwen2: transformers' models whose blocks are ours without the gate. llama-nsa: the layout in which the method's
authors published SSA, MoBA, NSA and FullAttn; always three gates a head, whichever the method uses. nosa, minicpm: see
`ssa.model.openbmb`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import LlamaConfig, MistralConfig, Qwen2Config

from ssa.budget import Budget, released_rule_check
from ssa.config import SIZE_LIMITS
from ssa.errors import UserError, one_line
from ssa.methods import method_named
from ssa.model import openbmb
from ssa.model.configuration import SSAConfig
from ssa.model.openbmb import MINICPM, NOSA
from ssa.model.stored import make_config, own_fields

Gates = Literal["none", "own", "three"]
"""g_proj of a checkpoint: absent; as `SSAForCausalLM` has it; or three rows a head, (compression, selection, window)."""

RELEASED = "llama-nsa"
PUBLISHED = {"zen-E/SSA-1B": "ssa", "zen-E/MoBA-1B": "moba", "zen-E/NSA-1B": "nsa", "zen-E/FullAttn-1B": "full"}
"""The authors' checkpoints, whose configurations do not all say which method they are."""

_CLASSES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    RELEASED: LlamaConfig,
    MINICPM: LlamaConfig,
    "ssa": SSAConfig,
}
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias", "dtype",
)  # fmt: skip
_READ = {
    *_SHARED,
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
_DIFFERS = {
    "qwen3": "normalises queries and keys", "olmo2": "normalises queries and keys, and norms after the blocks",
    "phi3": "fuses its projections", "gemma": "scales its embeddings and norms", "gemma2": "scales, caps and slides",
    "gemma3_text": "scales, normalises and slides", "granite": "scales its embeddings, residuals and logits",
    "minicpm3": "compresses its keys and values", "minicpm_sala": "has layers of linear attention",
    "cohere": "has parallel blocks and a logit scale", "smollm3": "has layers without RoPE", "mixtral": "is a mixture of experts",
}  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What the caller asks of the result; None = as the source has it, or the default."""

    method: str | None = None
    selector: str | None = None
    block_size: int | None = None
    num_selected_blocks: int | None = None
    selection_rule: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Layout:
    """A checkpoint's configuration, read."""

    model_type: str
    config: SSAConfig
    gates: Gates
    missing_o_bias: bool
    """Biases on q, k and v but none on o: ours has all four or none, so o gets zeros."""
    notes: tuple[str, ...] = ()
    dense: bool = False
    """The source attends to everything."""
    new_selector: bool = False
    """The result's selector is not the source's, so that its weights start fresh."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """By the last two parts of a tensor's name: what it is multiplied by."""

    def source_name(self, name: str) -> str:
        """What the source calls a tensor of ours."""
        return openbmb.nosa_name(name) if self.model_type == NOSA else name


def read_layout(raw: Mapping[str, Any], choices: Choices, origin: str, names: Callable[[], Iterable[str]]) -> Layout:
    """`raw`, a config.json, as ours with `choices` applied; `origin` is the hub name or path it came from.

    names: those of the source's tensors, asked only where config.json does not tell.

    Raises:
        UserError: an architecture that ours cannot express (the difference is named), values that make no sense, or a method
            that neither the configuration nor the caller tells.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"config.json: model_type {model_type!r} names no architecture; convert reads {', '.join(_CLASSES)}")
    if model_type not in _CLASSES:
        differs = _DIFFERS.get(model_type, "is not Llama's architecture")
        raise UserError(f"model_type {model_type!r} {differs}; convert reads {', '.join(_CLASSES)}")
    if raw.get("quantization_config"):
        raise UserError(f"{origin} is quantised (quantization_config in config.json); dequantise it first")
    for name, most in {**SIZE_LIMITS, "block_counts": SIZE_LIMITS["num_selected_blocks"]}.items():
        value = raw.get(name)
        if name != "window_size" and value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"config.json: {name} = {value!r} is not a positive integer of at most {most}")
    if model_type == "ssa":
        return _read_own(raw, choices)
    known = {k: v for k, v in raw.items() if k in _READ}
    if model_type == MINICPM:
        # their class ties where config.json is silent, unlike Llama's
        known = {"tie_word_embeddings": True} | known | {"rope_scaling": openbmb.minicpm_rope(raw.get("rope_scaling"))}
    theirs = _parse(model_type, known)
    fields = {name: getattr(theirs, name) for name in _SHARED if hasattr(theirs, name)}
    if model_type == RELEASED:
        return _read_released(raw, fields, choices, origin)
    _check_window(model_type, theirs)
    if choices.method and (branches := method_named(choices.method).branches):
        raise UserError(
            f"method {choices.method} adds a {' and a '.join(branches)}, so it cannot start as the same function as a Llama; use ssa, moba or full"
        )
    if model_type == "qwen2":
        fields["attention_bias"] = True
    notes = ["attention dropout in training is not kept"] if fields.get("attention_dropout") else []
    factors: dict[str, float] = {}
    dense = True
    attends: dict[str, Any] = {"method": "ssa"}
    if model_type == MINICPM:
        attends, more = openbmb.read_minicpm(raw)
        factors, dense = openbmb.minicpm_factors(raw, theirs), raw.get("sparse_config") is None
        notes += more
    elif model_type == "llama" and openbmb.is_nosa(raw, names()):
        model_type, dense, attends = NOSA, False, openbmb.read_nosa(raw, names())
        if choices.selector not in (None, "eviction"):
            raise UserError(f"NOSA's A and delta belong to the selector eviction; {choices.selector} has no place for them")
    elif choices.selector in ("windows", "eviction"):
        attends |= {"block_size": openbmb.NOSA_BUDGET.block_size, "num_selected_blocks": openbmb.NOSA_BUDGET.num_selected_blocks}
    if choices.method not in (None, attends["method"]):
        attends.pop("attention_mode", None)
    fresh = choices.selector not in (None, attends.get("selector", "means"))
    if fresh:
        attends.pop("selector_options", None)
        notes = [note for note in notes if not note.startswith("dense_len")]
    config = make_config(fields | attends | choices.given | {"attention_gate": False})
    return Layout(model_type, config, "none", model_type == "qwen2", tuple(notes), dense, fresh, factors)


def _read_own(raw: Mapping[str, Any], choices: Choices) -> Layout:
    fields = {name: value for name, value in own_fields(raw).items() if name != "transformers_version"}
    had = _parse("ssa", dict(fields))
    if choices.method not in (None, had.method):
        if method_named(choices.method).branches != had.attends.branches:
            raise UserError(
                f"method {had.method} cannot become {choices.method}: one has branches and gates that the other has not"
            )
        fields["attention_mode"] = None
    fresh = choices.selector not in (None, had.selector)
    if fresh:
        fields["selector_options"] = None
    notes = []
    if had.layer_budgets and (fresh or choices.block_size or choices.num_selected_blocks or choices.selection_rule):
        fields["layer_budgets"] = None
        notes.append("the source's budgets for each layer are not kept: they were tuned for another budget, selector or rule")
    config = make_config(fields | choices.given)
    return Layout("ssa", config, "own" if had.attention_gate else "none", False, tuple(notes), new_selector=fresh)


def _read_released(raw: Mapping[str, Any], fields: dict[str, Any], choices: Choices, origin: str) -> Layout:
    if raw.get("entmax_alpha") is not None:
        raise UserError(f"entmax_alpha = {raw['entmax_alpha']!r}: attention by entmax instead of softmax is not supported")
    window = raw.get("window_size")
    if window is not None and (type(window) is not int or not 0 <= window < 2**31):
        raise UserError(f"config.json: window_size = {window!r} is not a whole number of keys")
    notes = []
    method = choices.method or raw.get("method") or PUBLISHED.get(origin)
    if method is None and window:
        method = "nsa"
        notes.append(f"method nsa, because window_size = {window}")
    if method is None:
        raise UserError(f"{origin} does not say which method it was trained with; add --method ssa, moba, full or nsa")
    windowed = bool(method_named(method).branches)
    if not windowed and window:
        notes.append(f"window_size = {window} ignored: method {method} has no window branch")
    if windowed and not window:
        raise UserError(f"method nsa needs a sliding window, but {origin} has window_size = {window!r}; use ssa, moba or full")
    # block_size and block_counts: 64 and 16 where absent, their class's defaults
    budget = Budget(
        choices.num_selected_blocks if choices.num_selected_blocks is not None else raw.get("block_counts") or 16,
        choices.block_size if choices.block_size is not None else raw.get("block_size") or 64,
    )
    rule = choices.selection_rule or raw.get("selection_rule")
    if rule is None:
        try:
            released_rule_check(budget.num_selected_blocks, budget.block_size)
            rule = "released"
            if budget.num_selected_blocks * 2 > budget.block_size:
                notes.append("their kernel's selection rule kept (selection_rule released); exact is the true top-k")
        except UserError:
            rule = "exact"
            notes.append(f"selection rule exact: their kernel's rule does not exist at {budget}")
    fields |= {
        "method": method, "selection_rule": rule, "block_size": budget.block_size, "num_selected_blocks": budget.num_selected_blocks,
    }  # fmt: skip
    if windowed:
        fields["window_size"] = window
    if choices.selector is not None:
        fields["selector"] = choices.selector
    if not windowed and method_named(method).streams != "full" and raw.get("inference_mode") is not None:
        fields["attention_mode"] = raw["inference_mode"]
    return Layout(
        RELEASED, make_config(fields), "three", False, tuple(notes), new_selector=choices.selector not in (None, "means")
    )


def llama_json(config: SSAConfig) -> dict[str, Any]:
    """config.json of the Llama that `config` is without its gate, readable by transformers 4 and 5."""
    values = LlamaConfig(**_shared(config), architectures=["LlamaForCausalLM"]).to_dict()
    return values | _names_of_transformers_4(config)


def exported_json(config: SSAConfig, to: str) -> tuple[dict[str, Any], list[str]]:
    """(config.json in the layout `to` of a method's authors, notes).

    Raises:
        UserError: A selection that their code does not have.
    """
    selector = {RELEASED: "means", NOSA: "eviction", MINICPM: "windows"}[to]
    if config.selector != selector:
        raise UserError(
            f"the selector {config.selector} cannot be exported to {to}, which knows {selector} alone; convert to ssa"
        )
    if config.attends.streams != "full" and (config.selection_scope, config.selection_scoring) != ("group", "softmax"):
        raise UserError(
            f"selection by {config.selection_scope} and {config.selection_scoring} cannot be exported: {to}'s kernel knows group and softmax alone"
        )
    if to == RELEASED:
        return _released_json(config)
    return (openbmb.nosa_json if to == NOSA else openbmb.minicpm_json)(llama_json(config), config)


def _released_json(config: SSAConfig) -> tuple[dict[str, Any], list[str]]:
    """`method` and `selection_rule` are ours: theirs ignores them."""
    notes = [
        "transformers loads it only with the authors' LlamaNSAConfig and LlamaNSAForCausalLM, which are not part of this package"
    ]
    if config.selection_rule == "exact" and 2 * config.num_selected_blocks > config.block_size:
        notes.append(
            f"their kernel is not an exact top-k at {config.uniform_budget}: sparse results differ from this model's (rule exact)"
        )
    values = LlamaConfig(**_shared(config), architectures=["LlamaNSAForCausalLM"]).to_dict()
    for name in ("rope_parameters", "dtype"):
        values.pop(name, None)
    return values | _names_of_transformers_4(config) | {
        "model_type": RELEASED,
        "block_size": config.block_size,
        "block_counts": config.num_selected_blocks,
        "window_size": config.window_size if config.attends.branches else 0,
        "inference_mode": config.attention_mode,
        "method": config.method,
        "selection_rule": config.selection_rule,
    }, notes  # fmt: skip


def _shared(config: SSAConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHARED}


def _names_of_transformers_4(config: SSAConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
    }


def _check_window(model_type: str, theirs: Any) -> None:
    """Windowed attention is exact only where no window is shorter than the context."""
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or []
    slides = model_type != "qwen2" or any(kind != "full_attention" for kind in types)
    if window is not None and slides and window < theirs.max_position_embeddings:
        raise UserError(
            f"{model_type} with sliding_window = {window} under {theirs.max_position_embeddings} positions attends in a window, which ours does not"
        )


def _parse(model_type: str, values: dict[str, Any]) -> Any:
    try:
        return _CLASSES[model_type].from_dict(values)
    except UserError:
        raise
    except Exception as error:  # transformers validates with several classes of its own
        raise UserError(f"config.json does not make a {model_type} configuration: {one_line(error)}") from None
