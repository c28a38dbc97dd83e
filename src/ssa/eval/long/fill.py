"""Prompts of exactly so many tokens, under any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssa.data.tokenizer import encode_documents
from ssa.errors import UserError
from ssa.eval.needle import Haystack
from ssa.infer.engine import first_ids

Made = tuple[np.ndarray, list[str], dict[str, Any]]
"""A prompt of `Maker.room` tokens, the answers, and what to record about it."""


@dataclass
class Maker:
    """What a RULER task's generator works with."""

    tokenizer: PreTrainedTokenizerFast
    haystack: Haystack | None
    length: int
    """Prompt and answer."""
    room: int
    """Prompt."""
    rng: np.random.Generator
    guess: int
    """How many units of haystack the case before took; set by the generator. Speeds up, changes nothing."""


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Token ids, int64 [T], nothing put before or after."""
    return encode_documents(tokenizer, [text])[0][:-1].astype(np.int64)


def largest(tokens: Callable[[int], int], room: int, least: int, guess: int) -> int | None:
    """The largest n >= `least` with tokens(n) <= room, None where there is none; `tokens` grows with n, about in proportion.

    A bisection that aims: a good `guess` costs two or three calls, and changes nothing but that.
    """
    low, high, n = least - 1, None, max(least, guess)
    while high is None or high - low > 1:
        count = tokens(n)
        if count <= room:
            low = n
        else:
            high = n
        aim = n + round((room - count) * n / max(1, count))
        n = max(aim, low + 1) if high is None else min(max(aim, low + 1), high - 1)
    return low if low >= least else None


def exact_prompt(
    tokenizer: PreTrainedTokenizerFast, before: str, filler: Callable[[int], str], after: str, length: int, what: str
) -> np.ndarray:
    """Token ids, int64 [length]: what the tokenizer puts first, `before`, as much of the filler as there is room for, `after`.

    Args:
        filler: A number of tokens to a text of at least as many words, which may be cut off anywhere.

    Raises:
        UserError: `before` and `after` alone are longer than `length`.
    """
    first, closing = first_ids(tokenizer), encode(tokenizer, after)
    room = length - len(first) - len(closing)
    deficit = room - len(encode(tokenizer, before))
    if deficit < 0:
        raise UserError(f"length {length} is too short for {what}: its own text takes {length - deficit} tokens")
    ids = encode(tokenizer, before + filler(deficit + 1))
    assert len(ids) >= room, "the filler has fewer tokens than words"
    return np.concatenate([np.array(first, np.int64), ids[:room], closing])
