"""A batch of prompts in tokens, each row ending by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Reading
from ssa.infer.decoder import PREFILL_CHUNK, Attention, Draw, decoded_tokens
from ssa.infer.speculate import Speculation, speculated_tokens
from ssa.infer.transcript import Transcript
from ssa.model import SSAForCausalLM


def generate_batch(
    model: SSAForCausalLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    transcripts: Sequence[Transcript],
    limits: Sequence[int],
    *,
    pad_id: int,
    attention_mode: AttentionMode | None = None,
    budget: Reading | None = None,
    prefill_mode: AttentionMode | None = None,
    sparse_from: float | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    draw: Draw | None = None,
    speculation: Speculation | None = None,
    show: Callable[[int, str], None] | None = None,
) -> float:
    """Continue every prompt until its transcript has ended or holds its limit of tokens; the transcripts are finished then.

    Args:
        prompts: Token ids, one or more each.
        transcripts: One for each prompt, new; they receive the generated tokens and know ends and stop texts.
        limits: Most tokens for each prompt.
        pad_id: Any token: the mask hides it.
        attention_mode, budget: None = the model's own.
        prefill_mode: The prompts' attention, where it is another; its sparse budget is `budget`.
        sparse_from: Read everything before so many cached tokens and chosen blocks from then on.
        prefill_chunk: Tokens of a prompt computed at once.
        speculation: How tokens are drafted where attention is full; None = they are not.
        draw: How tokens are chosen, None = greedily. Settings saved with the model play no part.
        show: Called with (row, text) as text becomes known.

    Returns:
        When the first tokens were there, by `time.perf_counter`.

    Raises:
        UserError: The model's logits are NaN or infinite, or it cannot be speculated with.
    """
    first_at = None
    how: dict[str, Any] = {
        "pad_id": pad_id, "attention": Attention(attention_mode, budget, prefill_mode, sparse_from), "draw": draw or Draw(), "prefill_chunk": prefill_chunk,
    }  # fmt: skip
    rounds: Iterator[list[list[int]]]
    if speculation is None:
        rounds = ([[token] for token in tokens] for tokens in decoded_tokens(model, prompts, max(limits), **how))
    else:
        rounds = speculated_tokens(model, prompts, max(limits), speculation=speculation, **how)
    for new in rounds:
        first_at = first_at or time.perf_counter()
        for row, (transcript, limit, tokens) in enumerate(zip(transcripts, limits, new, strict=True)):
            for token in tokens:
                if len(transcript.token_ids) < limit:
                    text = transcript.push(token)
                    if show is not None:
                        show(row, text)
        if all(t.reason is not None or len(t.token_ids) >= limit for t, limit in zip(transcripts, limits, strict=True)):
            break
    for row, transcript in enumerate(transcripts):
        text = transcript.finish()
        if show is not None:
            show(row, text)
    return first_at or time.perf_counter()


def end_ids_of(model: Any, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Every token that the tokenizer, the model or its saved generation settings call an end."""
    saved = model.generation_config.eos_token_id if model.generation_config is not None else None
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, model.config.eos_token_id, saved):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


def pad_id_of(tokenizer: PreTrainedTokenizerFast, end_ids: frozenset[int]) -> int:
    """The tokenizer's, else an end token, else 0."""
    return next((i for i in (tokenizer.pad_token_id, *sorted(end_ids)) if i is not None), 0)
