"""RULER's other synthetic tasks: variable tracking, common words, frequent words."""

from __future__ import annotations

import math

import numpy as np

from ssa.errors import UserError
from ssa.eval.long.fill import Made, Maker, encode, exact_prompt, largest
from ssa.eval.long.ruler_needles import NOISE
from ssa.eval.long.words import words
from ssa.infer.engine import first_ids

NUM_HOPS = 4
EXAMPLE_TOKENS = 500
"""Most tokens of the worked example of variable tracking, where its least noise takes no more."""
VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_TAIL = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
)

NUM_COMMON = 10
CWE_HEAD = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
CWE_TAIL = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"

WORD_LENGTH = 6
FWE_HEAD = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
FWE_TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in "
    "the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)


def variable_tracking(maker: Maker) -> Made:
    """vt: one chain of five variables between lines of noise, after a worked example with another chain."""
    rng, tokenizer = maker.rng, maker.tokenizer
    example = _Chain(rng, 3)

    def solved(n: int) -> str:
        return VT_HEAD + example.hidden(n) + example.question + " " + " ".join(example.variables) + "\n\n"

    least = NUM_HOPS + 1
    shown = largest(lambda n: len(encode(tokenizer, solved(n))), EXAMPLE_TOKENS, least, least) or least
    chain = _Chain(rng, 5)
    opened = solved(shown) + VT_HEAD

    def before(n: int) -> str:
        return opened + chain.hidden(n)

    fixed = len(first_ids(tokenizer)) + len(encode(tokenizer, chain.question))
    count = largest(lambda n: fixed + len(encode(tokenizer, before(n))), maker.room, least, maker.guess)
    if count is None:
        needed = maker.length - maker.room + fixed + len(encode(tokenizer, before(least)))
        raise UserError(f"length {maker.length} is too short for vt, which takes about {needed} tokens or more")
    maker.guess = count
    prompt = exact_prompt(tokenizer, before(count), lambda k: f"\n{NOISE}" * (k // 18 + 1), chain.question, maker.room, "vt")
    return prompt, chain.variables, {"value": chain.value}


class _Chain:
    """VAR A = 12345, VAR B = VAR A, ..."""

    def __init__(self, rng: np.random.Generator, letters: int) -> None:
        self.variables: list[str] = []
        while len(self.variables) < NUM_HOPS + 1:
            name = "".join(chr(65 + letter) for letter in rng.integers(26, size=letters))
            if name not in self.variables:
                self.variables.append(name)
        self.value = str(rng.integers(10000, 99999))
        links = zip(self.variables[1:], self.variables, strict=False)
        # the space at a link's end is RULER's
        self._lines = [f"VAR {self.variables[0]} = {self.value}", *(f"VAR {new} = VAR {old} " for new, old in links)]
        self.question = VT_TAIL.format(value=self.value, count=len(self.variables))
        self._draws = rng.random(len(self._lines))

    def hidden(self, n: int) -> str:
        """The chain's lines, in order, each before a line of its own of `n` lines of noise."""
        # five places in order, no two the same
        places = np.sort((self._draws * (n - len(self._lines) + 1)).astype(int)) + np.arange(len(self._lines))
        lines = [NOISE] * n
        for moved, (place, line) in enumerate(zip(places, self._lines, strict=True)):
            lines.insert(int(place) + moved, line)
        return "\n".join(lines)


def common_words(maker: Maker) -> Made:
    """cwe: the ten words of a list that appear 30 times, where others appear 3 times (6 and 1 below 4096 tokens)."""
    rng, tokenizer = maker.rng, maker.tokenizer
    common_repeats, repeats = (30, 3) if maker.length >= 4096 else (6, 1)
    example_words, example_common, example_repeats = (40, 10, 3) if maker.length >= 4096 else (20, 3, 1)
    order = rng.permutation(len(words()))
    shown = [words()[i] for i in rng.choice(len(words()), example_words, replace=False)]
    listed = _repeated(shown, example_common, example_repeats, rng)
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(shown[:NUM_COMMON], start=1))
    opened = f"{CWE_HEAD}{_numbered(listed)}{CWE_TAIL} {answer}\n{CWE_HEAD}"
    seed = int(rng.integers(2**63))

    def listing(n: int) -> list[str]:
        return _repeated([words()[i] for i in order[:n]], common_repeats, repeats, np.random.default_rng(seed))

    def before(n: int) -> str:
        return opened + _numbered(listing(n))

    fixed = len(first_ids(tokenizer)) + len(encode(tokenizer, CWE_TAIL))
    least, most = NUM_COMMON + 1, len(order)

    def tokens(n: int) -> int:
        return fixed + len(encode(tokenizer, before(n))) if n <= most else n * maker.room

    count = largest(tokens, maker.room, least, min(maker.guess, most))
    if count is None:
        needed = maker.length - maker.room + fixed + len(encode(tokenizer, before(least)))
        raise UserError(f"length {maker.length} is too short for cwe, which takes about {needed} tokens or more")
    if count == most:
        raise UserError(f"length {maker.length} is too long for cwe: it takes more than the {most} words there are")
    maker.guess = count
    taken = len(listing(count))

    def rest(k: int) -> str:
        # What is left has no room for another word's three repetitions: a few uncommon words once more change no answer.
        return "".join(f" {taken + i}. {words()[order[-i]]}" for i in range(1, k + 1))

    prompt = exact_prompt(tokenizer, before(count), rest, CWE_TAIL, maker.room, "cwe")
    return prompt, [words()[i] for i in order[:NUM_COMMON]], {}


def _repeated(chosen: list[str], common_repeats: int, repeats: int, rng: np.random.Generator) -> list[str]:
    """The first ten words `common_repeats` times, the others `repeats` times, shuffled."""
    listed = chosen[:NUM_COMMON] * common_repeats + chosen[NUM_COMMON:] * repeats
    return [listed[i] for i in rng.permutation(len(listed))]


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))


def frequent_words(maker: Maker) -> Made:
    """fwe: the three most frequent words of a coded text whose word frequencies follow a zeta law with exponent 2.

    The most frequent of all is noise, "...", which the question says to ignore.
    """
    rng, tokenizer = maker.rng, maker.tokenizer
    size = max(8, maker.room // 50)
    vocabulary: list[str] = []
    taken: set[str] = set()
    while len(vocabulary) < size:
        word = "".join(chr(97 + letter) for letter in rng.integers(26, size=WORD_LENGTH))
        if word not in taken:
            taken.add(word)
            vocabulary.append(word)
    vocabulary[0] = "..."
    seed = int(rng.integers(2**63))
    share = np.arange(1, size + 1, dtype=np.float64) ** -2 / (math.pi**2 / 6)  # zeta(2)

    def before(n: int) -> str:
        counts = (n * share).astype(int)
        text = np.repeat(np.arange(size), counts)
        return FWE_HEAD + " ".join(vocabulary[i] for i in np.random.default_rng(seed).permutation(text))

    fixed = len(first_ids(tokenizer)) + len(encode(tokenizer, FWE_TAIL))
    count = largest(lambda n: fixed + len(encode(tokenizer, before(n))), maker.room, 1, max(maker.guess, maker.room // 8))
    if count is None or int(count * share[3]) <= int(count * share[4]):
        raise UserError(f"length {maker.length} is too short for fwe: the third word would not be more frequent than the fourth")
    maker.guess = count
    prompt = exact_prompt(tokenizer, before(count), lambda k: " ..." * k, FWE_TAIL, maker.room, "fwe")
    return prompt, vocabulary[1:4], {}
