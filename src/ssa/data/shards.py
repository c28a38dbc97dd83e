"""Token shards: the on-disk form of a prepared corpus, memory-mapped for reading.

    OUT/index.json               format, tokenizer fingerprint, splits -> shards with counts and sha256; written last
    OUT/tokenizer/               the tokenizer, as transformers saves it
    OUT/train-00000.tokens.npy   1-D uint16 (uint32 above 65,536 ids): documents one after another, each with its end token
    OUT/train-00000.docs.npy     int64 [documents, 3]: end offset in the shard, UTF-8 bytes of the text, whitespace-separated words

A document never spans two shards and starts where the previous one ends. Plain `.npy` without pickles: `np.load` reads them anywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from ssa.checked_json import read_json, typed
from ssa.data.packing import positions_from_document_ends
from ssa.errors import UserError
from ssa.files import is_plain_name, sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT, VERSION = "ssa-token-shards", 1
INDEX, PROGRESS, TOKENIZER = "index.json", ".progress.json", "tokenizer"
DOCUMENT_COLUMNS = ("end", "bytes", "words")


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the index records it."""

    name: str
    tokens: int
    documents: int
    bytes: int
    words: int
    sha256_tokens: str
    sha256_docs: str


def is_prepared(directory: Path | str) -> bool:
    return (Path(directory) / INDEX).is_file()


def is_begun(directory: Path) -> bool:
    """Whether it is prepared, wholly or half."""
    return is_prepared(directory) or (directory / PROGRESS).is_file()


def tokens_path(out: Path, shard: str) -> Path:
    return out / f"{shard}.tokens.npy"


def docs_path(out: Path, shard: str) -> Path:
    return out / f"{shard}.docs.npy"


class TokenizerRecord(TypedDict):
    """What an index says of its tokenizer."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    end_id: int
    fingerprint: str


class SplitRecord(TypedDict):
    """What an index says of a split."""

    shards: list[ShardInfo]


class Index(TypedDict):
    """`index.json`, as far as it is read."""

    format: str
    version: int
    tokenizer: TokenizerRecord
    splits: dict[str, SplitRecord]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a prepared corpus, as it was written.

    Raises:
        UserError: There is none, it is unfinished, damaged, or of another version, or it names shards that do not lie beside it.
    """
    return _read_index(path)[0]


def _read_index(path: Path) -> tuple[dict[str, Any], Index]:
    """(as it was written, checked)."""
    file = path / INDEX
    if not file.is_file():
        if (path / PROGRESS).is_file():
            raise UserError(f"{path} is half prepared: run the same `ssa prepare` again to finish it")
        raise UserError(f"{path} holds no prepared corpus ({INDEX} is missing): make one with `ssa prepare`")
    try:
        index = read_json(file)
        found = index.get("format"), index.get("version")
        if FORMAT in found and found != (FORMAT, VERSION):
            raise UserError(f"{file} has format {found[0]} version {found[1]}, this version reads {FORMAT} {VERSION}")
        checked: Index = typed(index, Index)
        for split in checked["splits"].values():
            for shard in split["shards"]:
                if not is_plain_name(shard.name):
                    raise UserError(f"the shard {shard.name!r} does not lie beside it")
                if min(shard.tokens, shard.documents, shard.bytes, shard.words) < 0 or shard.tokens >= 1 << 62:
                    raise UserError(f"the shard {shard.name!r} has counts that cannot be")
    except UserError as error:
        raise UserError(f"{file} is not an index of token shards ({error}): prepare the corpus again") from None
    return index, checked


class TokenShards:
    """One split of a prepared corpus as a single sequence of tokens, read lazily through memory maps.

    Offsets below are in the split's global token space, shard after shard. ``split_shards.read(0, split_shards.num_tokens)`` is
    everything. Cheap to open and safe to pickle: maps are opened at the first read, in whichever process reads.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        _, index = _read_index(self.path)
        if split not in index["splits"]:
            raise UserError(f'{path} has no split "{split}": it has {", ".join(sorted(index["splits"]))}')
        self.shards = index["splits"][split]["shards"]
        self.dtype = np.dtype(index["tokenizer"]["dtype"])
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.end_id: int = index["tokenizer"]["end_id"]
        self.tokenizer_fingerprint: str = index["tokenizer"]["fingerprint"]
        for shard in self.shards:  # so many rows as the index says would be shuffled before the first is read
            file = tokens_path(self.path, shard.name)
            if not file.is_file() or file.stat().st_size < shard.tokens * self.dtype.itemsize:
                raise UserError(f"{file} is missing or damaged (shorter than the index says): prepare the corpus again")
        self._starts = [0, *accumulate(shard.tokens for shard in self.shards)]
        self._maps: dict[str, np.ndarray] = {}

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' texts; end tokens count nothing."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_words(self) -> int:
        """Words of the documents' texts, as ``str.split()`` finds them."""
        return sum(shard.words for shard in self.shards)

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return f"TokenShards({str(self.path)!r}, {self.split!r}): {self.num_tokens:,} tokens, {self.num_documents:,} documents"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        from ssa.data.tokenizer import load_tokenizer

        return load_tokenizer(self.path / TOKENIZER)

    def documents(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """``(tokens, bytes, words)`` of each document in order; tokens is a read-only 1-D view that ends in the end token."""
        for shard in self.shards:
            tokens, docs = self._tokens(shard), self._docs(shard)
            start = 0
            for end, num_bytes, num_words in docs:
                yield tokens[start:end], int(num_bytes), int(num_words)
                start = end

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a new 1-D array of the split's dtype, across shard borders."""
        overlaps = list(self._overlaps(start, stop))  # checks the range
        out = np.empty(stop - start, self.dtype)
        for shard, shard_start, low, high in overlaps:
            out[shard_start + low - start : shard_start + high - start] = self._tokens(shard)[low:high]
        return out

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Global offsets, int64 ascending, of the document ends in (start, stop]; an end is where the next document starts."""
        ends = [
            self._docs(shard)[self._first_after(shard, low) : self._first_after(shard, high), 0] + shard_start
            for shard, shard_start, low, high in self._overlaps(start, stop)
        ]
        return np.concatenate(ends) if ends else np.empty(0, np.int64)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: 0 at ``start`` and at the first token of each document, counting up in between."""
        return positions_from_document_ends(self.document_ends(start, stop) - start, stop - start)

    def verify(self) -> None:
        """Read everything and raise `UserError` for the first shard that is missing, damaged or inconsistent."""
        for shard in self.shards:
            tokens, docs = self._tokens(shard), self._docs(shard)
            for path, expected in (
                (tokens_path(self.path, shard.name), shard.sha256_tokens),
                (docs_path(self.path, shard.name), shard.sha256_docs),
            ):
                if sha256_of_file(path) != expected:
                    raise UserError(f"{path} is damaged (its sha256 is not the index's): prepare the corpus again")
            lengths = np.diff(docs[:, 0], prepend=0)
            ended = (
                len(docs) and docs[-1, 0] == len(tokens) and lengths.min() > 0 and (tokens[docs[:, 0] - 1] == self.end_id).all()
            )
            totals = docs[:, 1:].sum(0).tolist() == [shard.bytes, shard.words]
            if not (ended and totals):
                raise UserError(
                    f"{docs_path(self.path, shard.name)} contradicts its tokens or the index: prepare the corpus again"
                )

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[ShardInfo, int, int, int]]:
        """``(shard, its global start, low, high)`` for the shards that hold [start, stop), low and high being offsets in the shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.num_tokens}")
        number = bisect_right(self._starts, start) - 1
        while number < len(self.shards) and self._starts[number] < stop:
            shard_start, shard_stop = self._starts[number], self._starts[number + 1]
            yield self.shards[number], shard_start, max(start, shard_start) - shard_start, min(stop, shard_stop) - shard_start
            number += 1

    def _first_after(self, shard: ShardInfo, offset: int) -> int:
        """The first document of a shard that ends after ``offset``."""
        # Not np.searchsorted, which would copy the strided column out of the map at every call.
        return bisect_right(self._docs(shard)[:, 0], offset)

    def _tokens(self, shard: ShardInfo) -> np.ndarray:
        return self._map(tokens_path(self.path, shard.name), (shard.tokens,), self.dtype)

    def _docs(self, shard: ShardInfo) -> np.ndarray:
        return self._map(docs_path(self.path, shard.name), (shard.documents, len(DOCUMENT_COLUMNS)), np.dtype(np.int64))

    def _map(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = self._maps.get(path.name)
        if array is None:
            try:
                # A plain ndarray view: every slice of an np.memmap costs an object with Python attributes.
                array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is missing or damaged ({error}): prepare the corpus again") from error
            if array.shape != shape or array.dtype != dtype:
                raise UserError(
                    f"{path} has {array.dtype} {array.shape}, the index says {dtype} {shape}: prepare the corpus again"
                )
            self._maps[path.name] = array
        return array
