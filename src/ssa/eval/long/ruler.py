"""RULER (Hsieh et al. 2024, arXiv 2404.06654): its synthetic tasks, generated here for any tokenizer, length and haystack.

Prompts, parameters and scoring are those of NVIDIA's release; its question answering tasks need SQuAD and HotpotQA and are not here.
Lengths count everything: prompt and room for the answer take exactly `length` tokens. Differences are in docs/long-context.md.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssa.errors import UserError
from ssa.eval.long import ruler_lists, ruler_needles
from ssa.eval.long.fill import Made, Maker, encode
from ssa.eval.long.items import Item
from ssa.eval.long.words import words
from ssa.eval.needle import Haystack


@dataclass(frozen=True)
class Kind:
    """One RULER task."""

    make: Callable[[Maker], Made]
    tokens_to_generate: int
    """RULER's; more where a tokenizer needs more for the longest answer."""
    longest_answer: str
    needs_text: bool = False
    """Whether its haystack is prose, from a text."""


_NUMBERS, _UUID = ", 9999999" * 4, " 3f2504e0-4f89-41d3-9a0c-0305e82cf301"
_LONGEST_WORDS = " ".join(f"{i}. {w}" for i, w in enumerate(sorted(words(), key=lambda w: (-len(w), w))[:10], start=1))

TASKS: dict[str, Kind] = {
    "niah_single_1": Kind(ruler_needles.noise, 128, _NUMBERS[:9]),
    "niah_single_2": Kind(ruler_needles.essay(), 128, _NUMBERS[:9], needs_text=True),
    "niah_single_3": Kind(ruler_needles.essay(values="uuids"), 128, _UUID, needs_text=True),
    "niah_multikey_1": Kind(ruler_needles.essay(num_keys=4), 128, _NUMBERS[:9], needs_text=True),
    "niah_multikey_2": Kind(ruler_needles.distractors("words", "numbers"), 128, _NUMBERS[:9]),
    "niah_multikey_3": Kind(ruler_needles.distractors("uuids", "uuids"), 128, _UUID),
    "niah_multivalue": Kind(ruler_needles.essay(num_values=4), 128, _NUMBERS, needs_text=True),
    "niah_multiquery": Kind(ruler_needles.essay(num_keys=4, num_queries=4), 128, _NUMBERS, needs_text=True),
    "vt": Kind(ruler_lists.variable_tracking, 30, " QZXKV, JWQXZ, KQJVX, ZXQWJ, VKZQX"),
    "cwe": Kind(ruler_lists.common_words, 120, _LONGEST_WORDS),
    "fwe": Kind(ruler_lists.frequent_words, 50, " qzxkvj, wqxzjk, kqjvxz"),
}


class RulerTask:
    """`cases` cases of one task at one length; a `GenerationTask`. Case i depends on (seed, task, length, i) and the haystack alone."""

    def __init__(
        self, name: str, length: int, cases: int, seed: int, tokenizer: PreTrainedTokenizerFast, haystack: Haystack | None
    ) -> None:
        """Raises `UserError` for a task that does not exist or lacks its text."""
        if name not in TASKS:
            raise UserError(f"no RULER task {name!r}; there are {', '.join(TASKS)}")
        if length < 1 or cases < 1 or seed < 0:
            raise UserError(f"length = {length}, cases = {cases} and seed = {seed} must be at least 1, 1 and 0")
        self.name, self.length, self.cases, self.seed = name, length, cases, seed
        self._kind, self._tokenizer = TASKS[name], tokenizer
        if self._kind.needs_text and haystack is None:
            raise UserError(f"{name} hides its needles in prose; give a text for the haystack")
        self._haystack = haystack if self._kind.needs_text else None
        self.max_new_tokens = max(self._kind.tokens_to_generate, len(encode(tokenizer, self._kind.longest_answer)))
        self.setting: dict[str, Any] = {"task": name, "length": length, "seed": seed, "max_new_tokens": self.max_new_tokens}
        self._guess = 0

    def __len__(self) -> int:
        return self.cases

    def item(self, index: int) -> Item:
        room = self.length - self.max_new_tokens
        if room < 1:
            raise UserError(
                f"length {self.length} is too short for {self.name}: its answer alone may take {self.max_new_tokens} tokens"
            )
        rng = np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), self.length, index))
        maker = Maker(self._tokenizer, self._haystack, self.length, room, rng, self._guess)
        prompt, answers, about = self._kind.make(maker)
        self._guess = maker.guess
        assert len(prompt) == room
        return Item(prompt, self.max_new_tokens, answers, about=about)

    def score(self, item: Item, prediction: str) -> float:
        return string_match_all(prediction, item.answers)


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, in any case of letters."""
    said = _cleaned(prediction)
    return sum(answer.lower() in said for answer in answers) / len(answers)


def _cleaned(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
