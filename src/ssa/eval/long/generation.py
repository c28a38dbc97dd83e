"""Greedy generation for the items of a task, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from ssa.budget import Reading
from ssa.eval.long.items import Item
from ssa.eval.model_under_test import attention
from ssa.infer.batch import end_ids_of, generate_batch, pad_id_of
from ssa.infer.transcript import Transcript


def write(model: Any, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item], budget: Reading) -> list[str]:
    """What `model` writes after each prompt, greedily; prompts of different lengths are padded on the left.

    Args:
        model: An `SSAForCausalLM`, or anything with its `generate`, `device` and `config`.
        items: Each is cut off at its own `max_new_tokens` and stop texts.

    Returns:
        One text per item, without prompt, end token and stop text.
    """
    end_ids = end_ids_of(model, tokenizer)
    transcripts = [Transcript(tokenizer, end_ids, item.stop) for item in items]
    limits = [item.max_new_tokens for item in items]
    prompts = [item.prompt for item in items]
    generate_batch(model, prompts, transcripts, limits, pad_id=pad_id_of(tokenizer, end_ids), **attention(budget))
    return [transcript.text for transcript in transcripts]
