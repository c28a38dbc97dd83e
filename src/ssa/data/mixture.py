"""Several prepared corpora read in fixed proportions, as a pure function of the seed: nothing to save, nothing to restore.

The rows of a run are slots 0, 1, 2, ... In every stretch of `BLOCK_SLOTS` slots each source gets its share of them to within one, in an order
drawn from the seed and the stretch's number; the n-th slot of a source reads the n-th row of that source's own shuffled epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssa.data.shards import INDEX, TokenShards
from ssa.errors import UserError
from ssa.files import sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK_SLOTS = 4096
_MAX_SOURCES = 64  # so that the largest source has a slot to give up for the rounding of every other one


class Mixture:
    """Sources with weights. `PackedLoader` reads it as it reads one `TokenShards`.

    Raises:
        UserError: no source, more than 64, a weight that is not positive, or sources with different tokenizers.
    """

    def __init__(self, sources: Sequence[TokenShards], weights: Sequence[float]) -> None:
        if not 1 <= len(sources) <= _MAX_SOURCES:
            raise UserError(f"a mixture of {len(sources)} sources: give 1 to {_MAX_SOURCES}")
        for source, weight in zip(sources, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise UserError(f"weight {weight} of {source.path} is not a positive number: leave the source out, or weigh it")
            if source.tokenizer_fingerprint != sources[0].tokenizer_fingerprint:
                raise UserError(
                    f"{source.path} and {sources[0].path} were prepared with different tokenizers: prepare one with the other's directory "
                    "as its tokenizer"
                )
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.vocab_size, self.end_id = sources[0].vocab_size, sources[0].end_id
        self.tokenizer_fingerprint = sources[0].tokenizer_fingerprint

    @property
    def num_tokens(self) -> int:
        """Of all sources together, whatever their weights."""
        return sum(source.num_tokens for source in self.sources)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.sources[0].load_tokenizer()

    def verify(self) -> None:
        """See `TokenShards.verify`."""
        for source in self.sources:
            source.verify()

    def fingerprint(self) -> str:
        """sha256 over every source's index and split, and the shares."""
        total = sum(map(Fraction, self.weights))
        parts = [
            f"{sha256_of_file(source.path / INDEX)} {source.split} {Fraction(weight) / total}"
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_mixture(mixture: Mapping[str, float], path: str | Path) -> Mixture:
    """The mixture of a recipe: {"DIR": weight} for the split train of a prepared directory, {"DIR:SPLIT": weight} for another split.

    Raises:
        UserError: see `Mixture`; no such directory or split; or another tokenizer than that of `path`, which is the run's.
    """
    sources = []
    for name in mixture:
        directory, colon, split = name.rpartition(":")
        whole = not colon or (Path(name) / INDEX).is_file()
        sources.append(TokenShards(name) if whole else TokenShards(directory, split))
    result = Mixture(sources, list(mixture.values()))
    home = TokenShards(path, "valid")
    if home.tokenizer_fingerprint != result.tokenizer_fingerprint:
        raise UserError(
            f"the mixture's tokenizer is not that of data.path = {str(path)!r}: prepare the sources with --tokenizer {path}"
        )
    return result


class Recent:
    """A function that remembers its last `count` results; pickled, it forgets them."""

    def __init__(self, function: Callable[..., Any], count: int) -> None:
        self._function, self._count = function, count
        self._remembering = lru_cache(maxsize=count)(function)

    def __call__(self, *arguments: Hashable) -> Any:
        return self._remembering(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._function, self._count)


class Interleave:
    """Which source a slot reads, and how many slots before it read the same one."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self._largest = self._shares.index(max(self._shares))
        self._seed = seed
        self._block = Recent(self._drawn, 4)

    def places(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, slots of that source before this one), int64 [n] each, of slots int64 [n]."""
        sources, counts = np.empty_like(slots), np.empty_like(slots)
        blocks, offsets = np.divmod(slots, BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source, count = self._block(block)
            sources[here], counts[here] = source[offsets[here]], count[offsets[here]]
        return sources, counts

    def counts(self, slots: int) -> np.ndarray:
        """int64 [sources]: how many of the first `slots` slots read each source."""
        block, offset = divmod(slots, BLOCK_SLOTS)
        return self._before(block) + np.bincount(self._block(block)[0][:offset], minlength=len(self._shares))

    def _before(self, block: int) -> np.ndarray:
        """Slots of each source before a block: its share rounded down, and what is over to the largest."""
        slots = block * BLOCK_SLOTS
        counts = [int(slots * share) for share in self._shares]
        counts[self._largest] += slots - sum(counts)
        return np.array(counts, np.int64)

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before = self._before(block)
        order = np.repeat(np.arange(len(before)), self._before(block + 1) - before)
        order = generator(self._seed, "mixture", block).permutation(order)
        counts = np.empty_like(order)
        for source, first in enumerate(before.tolist()):
            here = np.flatnonzero(order == source)
            counts[here] = first + np.arange(len(here))
        return order, counts


def generator(seed: int, *place: int | str) -> np.random.Generator:
    """Random numbers of a place, whatever was drawn before; any int is a seed, and no place is another's."""
    key = hashlib.blake2b("/".join(map(str, (seed, *place))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


@dataclass(frozen=True)
class Data:
    """A prepared data directory, opened."""

    path: Path
    tokenizer: PreTrainedTokenizerFast
    train: TokenShards | Mixture
    valid: TokenShards
    index: str
    """SHA-256 of index.json, which holds the hash of every shard."""
    fingerprint: str
    """The same; with a mixture, SHA-256 of that and the mixture's fingerprint."""
