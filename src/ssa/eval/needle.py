"""Needle in a haystack, as RULER's niah_single_2: a seven-digit number hidden in prose, asked for at the end.

A case is scored in one pass over the prompt and the right answer: the model has found the needle where each token of the answer is its
most likely next one, which is what greedy generation would have written.

Legend: B batch, T tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Reading
from ssa.data.tokenizer import encoded
from ssa.errors import UserError
from ssa.infer.engine import first_ids

INTRODUCTION = "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n"
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
ANSWER = " {value}"

ADJECTIVES = (
    "amber", "ancient", "brave", "calm", "clever", "crimson", "curious", "dusty", "eager", "early", "fancy", "gentle", "golden", "grand",
    "hidden", "hollow", "humble", "icy", "jolly", "kind", "lively", "lonely", "lucky", "mellow", "misty", "noble", "odd", "pale",
    "plain", "proud", "quick", "quiet", "rapid", "rusty", "shiny", "silent", "sleepy", "steady", "sunny", "wild",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "barrel", "basket", "bridge", "candle", "canyon", "castle", "cloud", "compass", "desert", "falcon", "feather",
    "forest", "garden", "glacier", "hammer", "harbor", "island", "kettle", "ladder", "lantern", "meadow", "mirror", "mountain", "needle",
    "orchard", "pebble", "pillow", "planet", "river", "saddle", "shadow", "spoon", "teapot", "tunnel", "valley", "violin", "walnut",
    "window",
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n(?=\n)")
HAYSTACK_FACTOR = 8
"""Cases of a length start anywhere in the first so many times that length of the haystack's tokens."""


@dataclass(frozen=True)
class Case:
    """One prompt with its answer, `token_ids[-answer_length:]`."""

    token_ids: np.ndarray
    """int64, prompt and answer together; as long as the cell's length says, exactly."""
    answer_length: int
    value: str


@dataclass(frozen=True)
class Cell:
    """A length and a depth, over its cases."""

    length: int
    depth: float
    cases: int
    accuracy: float
    """Share of cases whose whole value greedy generation writes."""
    log_probability: float
    """Natural log of the probability of the whole value, mean over cases."""


class Haystack:
    """Tokens of prose and the places between its sentences."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, longest: int) -> None:
        """Reads as much of `texts` as prompts of `longest` tokens can use."""
        num_tokens = HAYSTACK_FACTOR * longest
        pieces, breaks, total = [], [np.zeros(1, np.int64)], 0
        for text in texts:
            found = encoded(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = np.array([end for _, end in found.offset_mapping], np.int64)
            at = np.array([match.end() for match in _SENTENCE_END.finditer(text)], np.int64)
            # the token that completes the sentence is the last before the break
            breaks.append(total + np.searchsorted(ends, at, side="right"))
            pieces.append(np.array(found.input_ids, np.int64))
            total += len(ends)
            if total >= num_tokens:
                break
        if not total:
            raise UserError("the haystack is empty; give a text with some prose")
        self.tokens = np.concatenate(pieces)
        self.breaks = np.unique(np.concatenate(breaks))
        self.breaks = self.breaks[self.breaks < total]

    def cut(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from the beginning of a random sentence, and the places between sentences in them; repeats if too short."""
        fits = self.breaks[self.breaks + length <= min(len(self.tokens), HAYSTACK_FACTOR * length)]
        start = int(rng.choice(fits)) if len(fits) else 0
        if len(self.tokens) >= start + length:
            inside = self.breaks[(self.breaks >= start) & (self.breaks <= start + length)] - start
            return self.tokens[start : start + length], inside
        times = -(-length // len(self.tokens))
        breaks = np.concatenate([self.breaks + i * len(self.tokens) for i in range(times)])
        return np.tile(self.tokens, times)[:length], breaks[breaks <= length]


def make_case(haystack: Haystack, tokenizer: PreTrainedTokenizerFast, length: int, depth: float, seed: Sequence[int]) -> Case:
    """A prompt and its answer of exactly `length` tokens, the needle at the sentence break nearest to `depth` (0 start .. 1 end).

    Raises:
        UserError: `length` leaves no room for a haystack.
    """
    rng = np.random.default_rng(seed)
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    value = str(rng.integers(1_000_000, 10_000_000))
    question, answer = QUESTION.format(key=key), ANSWER.format(value=value)
    closing = encoded(tokenizer, question + answer, add_special_tokens=False, return_offsets_mapping=True)
    answer_length = sum(end > len(question) for _, end in closing.offset_mapping)
    introduction = first_ids(tokenizer) + encoded(tokenizer, INTRODUCTION, add_special_tokens=False).input_ids
    needle = encoded(tokenizer, NEEDLE.format(key=key, value=value), add_special_tokens=False).input_ids
    room = length - len(introduction) - len(needle) - len(closing.input_ids)
    if room < 1:
        raise UserError(
            f"needle length {length} is too short: the task itself takes {length - room} tokens; use at least {length - room + 1}"
        )
    hay, breaks = haystack.cut(room, rng)
    wanted = depth * room
    at = int(breaks[np.abs(breaks - wanted).argmin()]) if len(breaks) else round(wanted)
    if depth >= 1:
        at = room
    parts = (introduction, hay[:at], needle, hay[at:], closing.input_ids)
    return Case(np.concatenate([np.asarray(part, np.int64) for part in parts]), answer_length, value)


def score(
    model: Any, cases: Sequence[Case], attention_mode: AttentionMode | None = None, budget: Reading | str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(found bool [cases], natural log-probability of the value fp64 [cases]); the cases have one length.

    `model` is an `SSAForCausalLM`, or anything with its call and `device`.

    Raises:
        UserError: The model's output is not finite.
    """
    input_BT = torch.from_numpy(np.stack([case.token_ids for case in cases])).to(model.device)
    keep = max(case.answer_length for case in cases) + 1
    with torch.no_grad():
        logits_BAV = model(
            input_ids=input_BT, use_cache=False, logits_to_keep=keep, attention_mode=attention_mode, budget=budget
        ).logits[:, :-1]
    targets_BA = input_BT[:, 1 - keep :]
    right_BA = logits_BAV.argmax(-1) == targets_BA
    log_p_BA = logits_BAV.float().log_softmax(-1).gather(-1, targets_BA[..., None])[..., 0].cpu().double()
    found = [bool(right_BA[row, -case.answer_length :].all()) for row, case in enumerate(cases)]
    log_p = np.array([log_p_BA[row, -case.answer_length :].sum().item() for row, case in enumerate(cases)])
    if not np.isfinite(log_p).all():
        raise UserError("the model's output is not finite (NaN or infinity): the weights are damaged or the precision is too low")
    return np.array(found), log_p


class NeedleBatches:
    """The cases of a grid in the batches that are computed together, each of which can be scored by another process.

    A case depends on (seed, length, depth, its number) alone: a larger grid contains the smaller one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, haystack: Haystack, lengths: Sequence[int], depths: Sequence[float], cases: int,
        seed: int, batch_tokens: int,
    ) -> None:  # fmt: skip
        """See `needle_grid`, also for the errors."""
        check_grid(lengths, depths, cases, seed)
        self._tokenizer, self._haystack, self._seed = tokenizer, haystack, seed
        self._batches: list[tuple[int, float, range]] = []
        for length, depth in itertools.product(lengths, depths):
            rows = max(1, batch_tokens // length)
            self._batches += [(length, depth, range(at, min(at + rows, cases))) for at in range(0, cases, rows)]

    def __len__(self) -> int:
        return len(self._batches)

    def cases(self, number: int) -> list[Case]:
        """Those of batch `number`."""
        length, depth, numbers = self._batches[number]
        seed = (self._seed, length, round(depth * 1000))
        return [make_case(self._haystack, self._tokenizer, length, depth, (*seed, i)) for i in numbers]

    def cells(self, results: Iterable[tuple[Sequence[bool], Sequence[float]]]) -> list[Cell]:
        """From (found, log-probability) of every batch's cases, as `score` has them."""
        found: dict[tuple[int, float], list[bool]] = {}
        log_p: dict[tuple[int, float], list[float]] = {}
        for (length, depth, _), (of_batch, values) in zip(self._batches, results, strict=True):
            found.setdefault((length, depth), []).extend(of_batch)
            log_p.setdefault((length, depth), []).extend(values)
        return [
            Cell(*at, len(of_cell), sum(of_cell) / len(of_cell), math.fsum(log_p[at]) / len(of_cell))
            for at, of_cell in found.items()
        ]


def needle_grid(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    cases: int,
    seed: int,
    attention_mode: AttentionMode | None = None,
    budget: Reading | str | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> list[Cell]:
    """Every length x depth.

    Args:
        lengths: Tokens of prompt and answer together.
        depths: 0 = right after the introduction, 1 = right before the question.
        cases: Per cell.
        batch_tokens: Cases are computed together up to about so many tokens.
        progress: Called with the number of cases done after each batch.

    Raises:
        UserError: An impossible grid, a length without room, or an output that is not finite.
    """
    batches = NeedleBatches(tokenizer, haystack, lengths, depths, cases, seed, batch_tokens)
    results = []
    for number in range(len(batches)):
        results.append(score(model, batches.cases(number), attention_mode, budget))
        if progress is not None:
            progress(len(results[-1][0]))
    return batches.cells((found.tolist(), log_p.tolist()) for found, log_p in results)


def check_grid(lengths: Sequence[int], depths: Sequence[float], cases: int, seed: int) -> None:
    if not lengths or not depths:
        raise UserError("the needle grid is empty; give at least one length and one depth")
    for depth in depths:
        if not (math.isfinite(depth) and 0 <= depth <= 1):
            raise UserError(f"needle depth {depth} must lie in 0 (start) .. 1 (end)")
    if min(lengths) < 1:
        raise UserError(f"needle length {min(lengths)} must be at least 1 token")
    if cases < 1:
        raise UserError(f"needle cases = {cases} must be at least 1")
    if seed < 0:
        raise UserError(f"seed = {seed} must be 0 or more")
