"""The model's configuration: Llama's shape plus the attention method."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from ssa.attention import AttentionMethod, HeadShape, Selector
from ssa.budget import Budget, LayerBudgets, Selection, released_rule_check
from ssa.config import SIZE_LIMITS, ModelRecipe
from ssa.errors import UserError
from ssa.methods import Method, checked_options, full_name, method_named, resolve_alias, selector_named
from ssa.model.card import AUTO_MAP, write_card

_CHOICES = {
    "attention_mode": ("sparse", "full"),
    "selection_scope": ("group", "head"),
    "selection_scoring": ("softmax", "logit"),
    "selection_rule": ("exact", "released"),
    "alignment_loss": ("smooth_l1", "l2", "none"),
}


@strict
class SSAConfig(LlamaConfig):
    """Configuration of `SSAForCausalLM`. Llama's fields keep their meaning; the others:

    method: One of `ssa.methods.methods()`: which streams are trained, and which branches are added. An alias is resolved.
    method_options, selector_options: what a method or selector of another package can be told, by name.
    selector: One of `ssa.methods.selectors()`: how blocks are chosen.
    attention_mode: "sparse" or "full", what inference does unless told otherwise; the method's own by default.
    block_size, num_selected_blocks: the budget, k blocks of s keys; can be changed at each call.
    layer_budgets: a budget for each layer, "kxs" or "full", as `ssa tune-budget` finds them: what sparse attention reads where a call
        names no budget. Not for training, see `SSAForCausalLM.forward`.
    selection_scope, selection_scoring, selection_rule: see `ssa.ops.select_blocks`.
    attention_gate: sigmoid(x W_g), one scalar per token and query head (nsa: three), on the attention output.
    window_size: NSA's sliding window, in keys.
    full_ratio, alignment_weight (alpha), alignment_loss, align_gated: SSA's training, see `ssa.attention.ssa`.
    stream_seed: seed of the per-step stream draw where the caller does not pass `stream`.
    """

    model_type = "ssa"
    # what `Trainer` leaves out of predictions: all but the logits (and hidden states where they are asked for)
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "cross_entropy",
        "sparsity_loss",
        "commitment_loss",
        "alignment",
        "selection_loss",
    ]
    base_model_tp_plan = {**(LlamaConfig.base_model_tp_plan or {}), "layers.*.self_attn.g_proj": "colwise"}
    base_model_pp_plan = None

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    method: str = "ssa"
    method_options: dict[str, Any] | None = None
    selector: str = "means"
    selector_options: dict[str, Any] | None = None
    attention_mode: str | None = None
    block_size: int = 16
    num_selected_blocks: int = 16
    layer_budgets: list[str] | None = None
    selection_scope: str = "group"
    selection_scoring: str = "softmax"
    selection_rule: str = "exact"
    attention_gate: bool = True
    window_size: int = 128
    full_ratio: float = 0.5
    alignment_weight: float = 10.0
    alignment_loss: str = "smooth_l1"
    align_gated: bool = True
    stream_seed: int = 0

    def __post_init__(self, **kwargs):
        self.method, self.selector = resolve_alias(self.method, self.selector)
        checked_options(self.attends, self.method_options, "method_options")
        checked_options(selector_named(self.selector), self.selector_options, "selector_options")
        if self.attention_mode is None:
            self.attention_mode = self.attends.training_mode
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name, most in SIZE_LIMITS.items():
            value = getattr(self, name)
            if value is None and name in ("num_key_value_heads", "head_dim"):  # filled in below
                continue
            if not isinstance(value, int):
                raise UserError(f"{name} = {value!r} is not a whole number")
            if name in ("block_size", "num_selected_blocks"):
                _ = self.uniform_budget  # complains where they are less than 1
            if not 1 <= value <= most:
                raise UserError(f"{name} = {value!r} is not in 1..{most}")
        if self.selection_rule == "released":
            released_rule_check(self.num_selected_blocks, self.block_size)
        self._check_layer_budgets()
        if self.attention_dropout:
            raise UserError(f"attention_dropout = {self.attention_dropout} is not supported; use 0")
        super().__post_init__(**kwargs)
        theta = (self.rope_parameters or {}).get("rope_theta")
        if not isinstance(theta, int | float) or theta <= 0:
            raise UserError(f"rope_theta = {theta!r} is not a positive number")
        assert self.num_key_value_heads is not None  # filled in above
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = {self.num_key_value_heads}"
            )

    def _check_layer_budgets(self) -> None:
        """The selector has its say when a model is built (`build_attention`)."""
        if self.layer_budgets is None:
            return
        if len(self.layer_budgets) != self.num_hidden_layers:
            raise UserError(
                f"layer_budgets names {len(self.layer_budgets)} layers, and num_hidden_layers = {self.num_hidden_layers}"
            )
        for budget in LayerBudgets.parse(self.layer_budgets).budgets:
            for name in ("num_selected_blocks", "block_size"):
                if getattr(budget, name) > SIZE_LIMITS[name]:
                    raise UserError(f"layer_budgets has {budget}, whose {name} is not in 1..{SIZE_LIMITS[name]}")
            self.selection(budget)  # complains where the rule does not exist there

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"auto_map": AUTO_MAP}

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """config.json, and beside it the model's card and the file that `auto_map` names (`ssa.model.card`)."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(Path(save_directory), self)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """transformers calls this where it loads through `auto_map`, and would save a copy of this file from then on."""

    @property
    def budget(self) -> Budget | LayerBudgets:
        """What sparse attention reads unless a call says otherwise."""
        return self.uniform_budget if self.layer_budgets is None else LayerBudgets.parse(self.layer_budgets)

    @property
    def uniform_budget(self) -> Budget:
        """That of `num_selected_blocks` and `block_size`, with which it was trained; what it reads where there are no `layer_budgets`."""
        return Budget(self.num_selected_blocks, self.block_size)

    def read(self, budget: Budget | LayerBudgets) -> None:
        """`budget` becomes its own."""
        if isinstance(budget, Budget):
            self.num_selected_blocks, self.block_size, self.layer_budgets = budget.num_selected_blocks, budget.block_size, None
        else:
            self.layer_budgets = [str(reading) for reading in budget]

    @property
    def attends(self) -> Method:
        """What is known of its method."""
        return method_named(self.method)

    @property
    def attention_name(self) -> str:
        """Its method, and its selector where that is not the usual one."""
        return full_name(self.method, self.selector)

    @property
    def aligns(self) -> bool:
        """Training compares two streams."""
        return self.attends.draws_stream and self.alignment_loss != "none"

    def selection(self, budget: Budget | None = None) -> Selection:
        """How blocks are chosen, at another budget than `uniform_budget` where one is given."""
        budget = budget or self.uniform_budget
        options: Any = {"scope": self.selection_scope, "scoring": self.selection_scoring, "rule": self.selection_rule}
        return Selection(budget.num_selected_blocks, budget.block_size, **options)

    @classmethod
    def from_recipe(cls, recipe: ModelRecipe, vocab_size: int, **kwargs) -> SSAConfig:
        """The configuration of a new model; kwargs (eos_token_id, ...) go to the configuration as they are."""
        rope: dict[str, object] = {"rope_type": "default", "rope_theta": recipe.rope_theta}
        if recipe.rope_factor > 1:
            rope |= {
                "rope_type": "llama3", "factor": recipe.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": recipe.rope_original_max_position,
            }  # fmt: skip
        same = ("method", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings", *METHOD_FIELDS)  # fmt: skip
        return cls(vocab_size=vocab_size, rope_parameters=rope, **{n: getattr(recipe, n) for n in same}, **kwargs)


def build_attention(config: SSAConfig) -> tuple[AttentionMethod, Selector]:
    """A layer's method and selector.

    Raises:
        UserError: One that holds tensors which would be neither trained nor saved, or two that do not go together.
    """
    kind = selector_named(config.selector)
    assert config.num_key_value_heads is not None  # filled in when the configuration was made
    shape = HeadShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    method = config.attends.load()(
        window_size=config.window_size, alignment_loss=config.alignment_loss, align_gated=config.align_gated,
        **checked_options(config.attends, config.method_options, "method_options"),
    )  # fmt: skip
    method.check_registered()
    selector = kind.load()(shape, **checked_options(kind, config.selector_options, "selector_options"))
    selector.check_registered()
    selector.check(config.selection())
    for budget in dict.fromkeys(LayerBudgets.parse(config.layer_budgets).budgets if config.layer_budgets else ()):
        selector.check(config.selection(budget))
    if selector.adds_bias and config.attends.branches:
        raise UserError(f"the selector {config.selector} adds a bias, which the branches of method {config.method} do not have")
    return method, selector


METHOD_FIELDS = (
    "selector", "selector_options", "method_options",
    "block_size", "num_selected_blocks", "selection_scope", "selection_scoring", "selection_rule", "attention_gate",
    "window_size", "full_ratio", "alignment_weight", "alignment_loss", "align_gated",
)  # fmt: skip
"""Fields of `ModelRecipe` that say how a model attends and is trained, not what its weights look like (but for the gate)."""
