"""RULER's needles in a haystack: of a repeated noise sentence, of prose, or of other needles."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np

from ssa.errors import UserError
from ssa.eval.long.fill import Made, Maker, encode, exact_prompt, largest
from ssa.eval.long.words import random_key
from ssa.infer.engine import first_ids

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
INTRODUCTION = {
    "one": "A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the {one} afterwards.\n",
    "many": "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n",
}
QUESTION = {
    "one": "\nWhat is the special magic {one} for {query} mentioned in the provided text? The special magic {one} for {query} mentioned in the provided text is",
    "many": "\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text are",
}
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
"""Percent of the haystack's sentences that may stand before a needle."""


def noise(maker: Maker) -> Made:
    """niah_single_1: one needle between lines of noise."""
    key, value = random_key(maker.rng), _value("numbers", maker.rng)
    needle = NEEDLE.format(kind="numbers", key=key, value=value)
    return _lines(maker, "numbers", key, value, needle, lambda n: [NOISE] * n)


def distractors(key_kind: str, value_kind: str) -> Callable[[Maker], Made]:
    """niah_multikey_2 and 3: the haystack is all needles, of other keys."""

    def make(maker: Maker) -> Made:
        key, value = _key(key_kind, maker.rng), _value(value_kind, maker.rng)
        lines: list[str] = []

        def haystack(n: int) -> list[str]:
            while len(lines) < n:
                other = _key(key_kind, maker.rng)
                if other != key:
                    lines.append(NEEDLE.format(kind=value_kind, key=other, value=_value(value_kind, maker.rng)))
            return lines[:n]

        return _lines(maker, value_kind, key, value, NEEDLE.format(kind=value_kind, key=key, value=value), haystack)

    return make


def _lines(maker: Maker, kind: str, key: str, value: str, needle: str, haystack: Callable[[int], list[str]]) -> Made:
    """As many lines as fit, the needle before a random one of them; what is left is filled with a line cut off."""
    introduction, question = _frame("one", kind, key)
    place = maker.rng.random()

    def before(n: int) -> str:
        lines = list(haystack(n))
        lines.insert(int(place * n), needle)
        return introduction + "\n".join(lines)

    fixed = len(first_ids(maker.tokenizer)) + len(encode(maker.tokenizer, question))
    count = largest(lambda n: fixed + len(encode(maker.tokenizer, before(n))), maker.room, 1, maker.guess)
    if count is None:
        raise UserError(f"length {maker.length} is too short for a needle, one line of haystack and the question")
    maker.guess = count
    # no line that is cut off may be taken for the needle, so it comes from the haystack: the line that did not fit, and more
    prompt = exact_prompt(
        maker.tokenizer,
        before(count),
        lambda k: "\n" + "\n".join(haystack(count + 1 + k // 8)[count:]),
        question,
        maker.room,
        "a needle",
    )
    return prompt, [value], {"depths": [round(int(place * count) / count, 4)]}


def essay(*, num_keys: int = 1, num_values: int = 1, num_queries: int = 1, values: str = "numbers") -> Callable[[Maker], Made]:
    """niah_single_2 and 3, multikey_1, multivalue, multiquery: needles between the sentences of a text."""

    def make(maker: Maker) -> Made:
        assert maker.haystack is not None
        rng, tokenizer = maker.rng, maker.tokenizer
        keys: list[str] = []
        while len(keys) < num_keys:
            if (key := random_key(rng)) not in keys:
                keys.append(key)
        hidden = {key: [_value(values, rng) for _ in range(num_values)] for key in keys}
        needles = [(key, value) for key in keys for value in hidden[key]]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = [keys[i] for i in rng.choice(num_keys, num_queries, replace=False)]
        number = "one" if num_queries * num_values == 1 else "many"
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        introduction, question = _frame(number, values, query)
        first = np.array(first_ids(tokenizer), np.int64)
        head, tail = np.concatenate([first, encode(tokenizer, introduction)]), encode(tokenizer, question)
        pieces = [encode(tokenizer, " " + NEEDLE.format(kind=values, key=key, value=value)) for key, value in needles]
        room = maker.room - len(head) - len(tail) - sum(map(len, pieces))
        if room < 1:
            raise UserError(
                f"length {maker.length} is too short for needles in prose, which take about {maker.length - room + 1} tokens or more"
            )
        hay, breaks = maker.haystack.cut(room, rng)
        # where a sentence may start, and the end of the text
        places = np.unique(np.concatenate([[0], breaks, [room]]))
        depths = np.sort(rng.choice(DEPTHS, len(needles), replace=False))
        at = [int(places[(len(places) - 1) * depth // 100]) for depth in depths]
        parts = [head]
        for begin, end, piece in zip([0, *at], [*at, room], [*pieces, tail], strict=True):
            parts += [hay[begin:end], piece]
        answers = [value for key in asked for value in hidden[key]]
        return np.concatenate(parts), answers, {"depths": [round(place / room, 4) for place in at]}

    return make


def _frame(number: str, kind: str, query: str) -> tuple[str, str]:
    one = kind.removesuffix("s")
    return INTRODUCTION[number].format(one=one, kind=kind), QUESTION[number].format(one=one, kind=kind, query=query)


def _key(kind: str, rng: np.random.Generator) -> str:
    return random_key(rng) if kind == "words" else _value(kind, rng)


def _value(kind: str, rng: np.random.Generator) -> str:
    """Seven digits, or a random UUID."""
    return str(rng.integers(10**6, 10**7)) if kind == "numbers" else str(uuid.UUID(bytes=rng.bytes(16), version=4))
