"""Whether the splits of a corpus can do their work: enough text to validate on, and none of it in the training split, too."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ssa.data.encode import valid_threshold
from ssa.data.shards import TokenShards, read_index

LEAST_DOCUMENTS, LEAST_TOKENS = 20, 50_000
"""Of a validation split; figures from less are mostly noise."""
HELD_OUT = ("valid", "test")
_AT_ONCE = 1 << 20


class LowestHashes:
    """The documents that the smallest sufficient `valid_fraction` would set apart, whatever order documents come in."""

    def __init__(self, state: list[list[int]] | None = None) -> None:
        self._hashes = np.array([h for h, _ in state or ()], np.uint64)
        self._tokens = np.array([n for _, n in state or ()], np.int64)

    def add(self, hashes: np.ndarray, tokens: np.ndarray) -> None:
        """Documents by `document_hash`, uint64 [n], and their numbers of tokens, int64 [n]."""
        if self._suffice():
            low = hashes <= self._hashes[-1]
            hashes, tokens = hashes[low], tokens[low]
        if not len(hashes):
            return
        hashes, tokens = np.concatenate([self._hashes, hashes]), np.concatenate([self._tokens, tokens])
        order = np.argsort(hashes, kind="stable")
        hashes, tokens = hashes[order], tokens[order]
        enough = max(LEAST_DOCUMENTS, int(np.searchsorted(np.cumsum(tokens), LEAST_TOKENS)) + 1)
        if enough <= len(hashes):  # copies of the last one come along
            enough = int(np.searchsorted(hashes, hashes[enough - 1], side="right"))
        self._hashes, self._tokens = hashes[:enough], tokens[:enough]

    def _suffice(self) -> bool:
        return len(self._hashes) >= LEAST_DOCUMENTS and int(self._tokens.sum()) >= LEAST_TOKENS

    def state(self) -> list[list[int]]:
        """What a new object goes on from, as JSON."""
        return [list(pair) for pair in zip(self._hashes.tolist(), self._tokens.tolist(), strict=True)]

    def fraction(self) -> float | None:
        """Rounded up to two digits; None where all there is is not enough, or it would be most of it."""
        if not self._suffice():
            return None
        needed = int(self._hashes[-1]) + 1
        step = 10.0 ** (math.floor(math.log10(needed / 2**64)) - 1)
        times = math.ceil(needed / 2**64 / step)
        fraction = next(f for f in (float(f"{(times + more) * step:.2g}") for more in (0, 1)) if valid_threshold(f) >= needed)
        return fraction if fraction <= 0.5 else None


def findings(out: Path, written: tuple[str, ...], valid_fraction: float, lowest: LowestHashes) -> list[str]:
    """What is to be said about the splits that were just `written`, a sentence each."""
    splits = read_index(out)["splits"]
    found = []
    if "valid" in written:
        documents, tokens = splits["valid"]["documents"], splits["valid"]["tokens"]
        if documents < LEAST_DOCUMENTS or tokens < LEAST_TOKENS:
            cure = "give it more text"
            if valid_fraction and (fraction := lowest.fraction()) is not None:
                cure = (
                    f"--valid-fraction {fraction:g} sets at least {LEAST_DOCUMENTS} documents and {LEAST_TOKENS:,} tokens apart"
                )
            found.append(
                f"the split valid has {documents:,} documents and {tokens:,} tokens, too few for figures that mean much: {cure}"
            )
        if valid_fraction and valid_fraction < 0.5 and tokens > splits["train"]["tokens"]:
            found.append(f"most of the text is in the split valid: {tokens:,} tokens, and {splits['train']['tokens']:,} in train")
        numbers = np.concatenate(list(_digests(out, "valid")))
        _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        if 10 * (copies := documents - len(counts)) >= documents:
            most = int(first[counts.argmax()])
            found.append(
                f"{copies:,} of the {documents:,} documents in valid are copies of others there; {_texts(out, 'valid', [most])} is there "
                f"{counts.max():,} times"
            )
    for name in written:
        for other in splits.keys() - set(written):
            if {name, other} & set(HELD_OUT):
                kept, trained = (name, other) if name in HELD_OUT else (other, name)
                shared = _shared(out, kept, trained)
                if len(shared):
                    found.append(
                        f"{len(shared):,} of the {splits[kept]['documents']:,} documents in {kept} are in {trained}, too, for example "
                        f"{_texts(out, kept, shared[:3].tolist())}: leave them out of one"
                    )
    return found


def _shared(out: Path, one: str, other: str) -> np.ndarray:
    """int64: numbers of the documents in split `one` that are in `other`, too."""
    numbers = np.concatenate(list(_digests(out, one)))
    found = [np.empty(0, np.uint64), *(np.intersect1d(numbers, some) for some in _digests(out, other))]
    return np.flatnonzero(np.isin(numbers, np.concatenate(found)))


def _digests(out: Path, split: str) -> Iterator[np.ndarray]:
    """uint64: of each document's tokens, many documents at a time."""
    documents = TokenShards(out, split).documents()
    while some := [hashlib.blake2b(tokens.data, digest_size=8).digest() for tokens, _, _ in islice(documents, _AT_ONCE)]:
        yield np.frombuffer(b"".join(some), np.uint64)


def _texts(out: Path, split: str, numbers: list[int]) -> str:
    """How those documents begin, quoted."""
    shards = TokenShards(out, split)
    tokenizer = shards.load_tokenizer()
    starts = []
    for number, (tokens, _, _) in enumerate(islice(shards.documents(), max(numbers) + 1)):
        if number in numbers:
            text = " ".join(str(tokenizer.decode(tokens[:-1][:100].tolist(), clean_up_tokenization_spaces=False)).split())
            starts.append(repr(text if len(text) <= 40 else f"{text[:40]}..."))
    return ", ".join(starts)
