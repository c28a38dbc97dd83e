"""A model and its tokenizer from a run, a checkpoint or a model directory, on the device and in the precision asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ssa.budget import FULL, AttentionMode, Budget, LayerBudgets, Reading, parse_reading
from ssa.data.tokenizer import load_tokenizer, vocabulary_size
from ssa.device import resolve_device, resolve_dtype
from ssa.errors import UserError
from ssa.model import SSAForCausalLM
from ssa.model.configuration import build_attention
from ssa.model.stored import load_pretrained, read_config
from ssa.runs.checkpoints import open_checkpoint


def load_model(
    run: Path | str,
    device: str = "auto",
    dtype: str = "auto",
    mode: AttentionMode | None = None,
    budget: Reading | str | None = None,
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
    mode, reading = attention_choice(mode, budget)
    the_device = resolve_device(device)
    the_dtype = resolve_dtype(dtype, the_device)

    path = open_checkpoint(run)
    model = load_pretrained(path, read_config(path), the_dtype)
    if mode is not None:
        model.config.attention_mode = mode
    if isinstance(reading, Budget | LayerBudgets):
        check_budgets(model.config, [reading])
        model.config.read(reading)
    tokenizer = load_tokenizer(path)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {vocabulary_size(tokenizer)} ids and the model only {model.config.vocab_size}: they do not belong together"
        )
    model.config.return_dict = True  # whoever saved it may prefer tuples; everything here reads fields by name
    return model.to(the_device).eval(), tokenizer


def attention_choice(mode: str | None, budget: Reading | str | None) -> tuple[AttentionMode | None, Reading | None]:
    """(mode, budget) as a user may write them, made to agree: a budget alone means sparse attention, and mode "full" is the budget FULL.

    None stays where the model's own is meant.
    """
    if mode not in (None, "sparse", "full"):
        raise UserError(f"mode {mode!r} is neither 'sparse' nor 'full'")
    if budget is None:
        return ("full", FULL) if mode == "full" else (mode, None)  # type: ignore[return-value]
    reading = parse_reading(budget)
    wanted: AttentionMode = "full" if reading is FULL else "sparse"
    if mode not in (None, wanted):
        raise UserError(f"mode {mode!r} and budget {str(reading)!r} contradict each other; drop one of them")
    return wanted, reading


def check_budgets(config: Any, budgets: Sequence[Reading | None]) -> None:
    """A `UserError` for the first budget that the model's selector cannot serve, by its rule or by what it always reads, and for budgets of
    another number of layers."""
    with torch.device("meta"):
        _, selector = build_attention(config)
    for budget in budgets:
        if isinstance(budget, LayerBudgets) and len(budget) != config.num_hidden_layers:
            raise UserError(f"budget names {len(budget)} layers, and the model has {config.num_hidden_layers}: name one for each")
        for one in budget.budgets if isinstance(budget, LayerBudgets) else [budget]:
            if isinstance(one, Budget):
                selector.check(config.selection(one))
