"""A model and its tokenizer from a run, a checkpoint or a model directory, on the device and in the precision asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Budget, released_rule_check
from ssa.data.tokenizer import load_tokenizer, vocabulary_size
from ssa.device import resolve_device, resolve_dtype
from ssa.errors import UserError
from ssa.model import SSAForCausalLM
from ssa.model.stored import load_pretrained, read_config
from ssa.runs.checkpoints import open_checkpoint


def load_model(
    run: Path | str,
    device: str = "auto",
    dtype: str = "auto",
    mode: AttentionMode | None = None,
    budget: Budget | str | None = None,
) -> tuple[SSAForCausalLM, PreTrainedTokenizerFast]:
    """The model of `run` in eval mode, and its tokenizer.

    Args:
        run: A run directory (its newest complete checkpoint), a checkpoint, or a model directory of this project's models.
        device: "cpu", "cuda", "cuda:1", "mps"; auto = cuda where there is one, else cpu.
        dtype: One of `DTYPES`; auto = bfloat16 on CUDA devices that compute in it, else float32.
        mode: "sparse" or "full": what the model does from now on unless a call says otherwise; None = as it was saved.
        budget: `Budget` or "kxs", likewise; "full" is another way to say mode "full".

    Raises:
        UserError: No model there, a damaged or foreign one, or a device, precision, mode or budget that does not exist.
    """
    mode, budget = attention_choice(mode, budget)
    the_device = resolve_device(device)
    the_dtype = resolve_dtype(dtype, the_device)

    path = open_checkpoint(run)
    model = load_pretrained(path, read_config(path), the_dtype)
    if mode is not None:
        model.config.attention_mode = mode
    if budget is not None:
        check_budgets(model.config, [budget])
        model.config.num_selected_blocks, model.config.block_size = budget.num_selected_blocks, budget.block_size
    tokenizer = load_tokenizer(path)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {vocabulary_size(tokenizer)} ids and the model only {model.config.vocab_size}: they do not belong together"
        )
    model.config.return_dict = True  # whoever saved it may prefer tuples; everything here reads fields by name
    return model.to(the_device).eval(), tokenizer


def attention_choice(mode: str | None, budget: Budget | str | None) -> tuple[AttentionMode | None, Budget | None]:
    """(mode, budget) as a user may write them: a budget alone means sparse attention, the budget "full" means full."""
    if mode not in (None, "sparse", "full"):
        raise UserError(f"mode {mode!r} is neither 'sparse' nor 'full'")
    if isinstance(budget, str) and budget.strip() == "full":
        if mode == "sparse":
            raise UserError("mode 'sparse' and budget 'full' contradict each other; drop one of them")
        return "full", None
    if mode == "full" and budget is not None:
        raise UserError(f"mode 'full' and budget {str(budget)!r} contradict each other; drop one of them")
    if budget is None:
        return mode, None  # type: ignore[return-value]
    return mode or "sparse", Budget.parse(budget)  # type: ignore[return-value]


def check_budgets(config: Any, budgets: Sequence[Budget | None]) -> None:
    """A `UserError` for the first budget that the model's selection rule cannot serve; None stands for full attention."""
    if config.selection_rule == "released":
        for budget in budgets:
            if budget is not None:
                released_rule_check(budget.num_selected_blocks, budget.block_size)
