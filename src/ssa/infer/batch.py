"""A batch of prompts in tokens through `model.generate`: padded on the left, with the block cache, each row ending by itself.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)  # fmt: skip

from ssa.budget import AttentionMode, Reading
from ssa.errors import UserError
from ssa.infer.transcript import Transcript


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    transcripts: Sequence[Transcript],
    limits: Sequence[int],
    *,
    pad_id: int,
    attention_mode: AttentionMode | None = None,
    budget: Reading | None = None,
    sampling: Mapping[str, Any] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> float:
    """Continue every prompt until its transcript has ended or holds its limit of tokens; the transcripts are finished then.

    Args:
        model: An `SSAForCausalLM`, or anything with its `generate`, `generation_config` and `device`.
        prompts: Token ids, one or more each.
        transcripts: One for each prompt, new; they receive the generated tokens and know ends and stop texts.
        limits: Most tokens for each prompt.
        pad_id: Any token: the mask hides it.
        attention_mode, budget: None = the model's own.
        sampling: temperature, top_k, top_p of `GenerationConfig`; None = greedy. Settings saved with the model play no part.
        show: Called with (row, text) as text becomes known.

    Returns:
        When the first tokens were there, by `time.perf_counter`.

    Raises:
        UserError: The model's logits are NaN or infinite.
    """
    width = max(map(len, prompts))
    input_BT = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(input_BT)
    for row, ids in enumerate(prompts):
        input_BT[row, width - len(ids) :] = torch.as_tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    follower = _Follower(transcripts, limits, show)
    # `generate` fills what a configuration leaves open from the model's own, which is therefore put aside.
    saved = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max(limits), eos_token_id=sorted(set().union(*(t.end_ids for t in transcripts))) or None, pad_token_id=pad_id,
        do_sample=sampling is not None, use_cache=True, cache_implementation="static", **(sampling or {}),
    )  # fmt: skip
    try:
        model.generate(
            input_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([follower]),
            attention_mode=attention_mode,
            budget=None if budget is None else str(budget),
        )
    finally:
        model.generation_config = saved
    for row, transcript in enumerate(transcripts):
        text = transcript.finish()
        if show is not None:
            show(row, text)
    return time.perf_counter() if follower.first_token_at is None else follower.first_token_at


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


class _Finite(LogitsProcessor):
    """Ends generation where every choice would be arbitrary; sampling would fail, on a GPU in a way that ends the process."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise UserError(
                "the model's logits are nan or infinite, so no token can be chosen: its weights hold such values, or overflow in "
                "this precision; take another checkpoint, or dtype float32"
            )
        return scores


class _Follower(StoppingCriteria):
    """Sees the rows after every step: feeds the transcripts and tells which rows are done."""

    def __init__(self, transcripts: Sequence[Transcript], limits: Sequence[int], show: Callable[[int, str], None] | None) -> None:
        self._rows, self._show = list(zip(transcripts, limits, strict=True)), show
        self.first_token_at: float | None = None

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        self.first_token_at = self.first_token_at or time.perf_counter()
        for row, ((transcript, limit), token) in enumerate(zip(self._rows, tokens, strict=True)):
            if len(transcript.token_ids) < limit:
                text = transcript.push(token)
                if self._show is not None:
                    self._show(row, text)
        done = [t.reason is not None or len(t.token_ids) >= limit for t, limit in self._rows]
        return torch.tensor(done, device=input_ids.device)
