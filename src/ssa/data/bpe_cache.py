"""A fast path for GPT-2-style byte-level BPE, exact to the id: find the pieces of a text here and look their ids up.

The Rust library splits and merges anew for every word it meets, at 1 to 2 MB/s a core. Most words of a corpus are repetitions, so a
table from piece to ids serves nearly all of them, and NumPy finds the pieces and reads the table for half a megabyte of text at
a time. That is exact because a byte-level BPE merges within a piece only, and because the cuts made here are those of the
tokenizer's own pattern. They are decided for ASCII, Latin-1 letters and common typographic marks; what touches any other character
goes to the library whole, from the space before one plain word to the space before the next, where every pattern cuts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SEPARATOR = b"\xff"  # ends a document in the buffer; no byte of UTF-8
_SLICE_BYTES = 512 << 10  # the arrays of a slice fit a core's cache
_KEY_BYTES = 16
_TABLE_BITS = 20  # 20 MB a process
_MAX_ENTRIES = 1 << (_TABLE_BITS - 1)  # frequent pieces come early
_MAX_CACHED_LENGTH = 64
_SURE_CUT = re.compile(rb"(?=\ [A-Za-z])|(?<=\xff)")  # where every pattern cuts, and between documents

# What a byte is to the splitting pattern.
_OTHER, _LETTER, _DIGIT, _SPACE, _BLANK, _FOREIGN, _END = range(7)
_CLASSES = bytes(
    _END if byte == _SEPARATOR[0]
    else _FOREIGN if byte >= 128 or byte == 0  # a zero byte would be lost in a key
    else _LETTER if chr(byte).isalpha()
    else _DIGIT if chr(byte).isdigit()
    else _SPACE if byte == 32
    else _BLANK if byte in b"\t\n\v\f\r"
    else _OTHER
    for byte in range(256)
)  # fmt: skip

# Byte-level BPE's stand-ins for the ASCII characters that do not stand for themselves.
_STAND_INS = {byte: 256 + i for i, byte in enumerate([*range(33), 127])} | {127: 256 + 33}

_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], np.uint64)


def _classes(text: np.ndarray) -> np.ndarray:
    """uint8 [n]: the class of each byte; the bytes of one character have the same."""
    classes = np.frombuffer(bytearray(text).translate(_CLASSES), np.uint8)
    high = np.flatnonzero(classes == _FOREIGN)
    if len(high) == 0:
        return classes
    first = high[text[high] == 0xC3]  # U+00C0..U+00FF: letters, but for the signs of multiplication and division
    first = first[(text[first + 1] != 0x97) & (text[first + 1] != 0xB7)]
    classes[first] = classes[first + 1] = _LETTER
    first = high[text[high] == 0xE2]
    first = first[text[first + 1] == 0x80]
    third = text[first + 2]  # U+2010..U+2027 and U+2030..U+203F: dashes, quotation marks, dots
    first = first[(third >= 0x90) & (third != 0xA8) & (third != 0xA9) & ((third <= 0xA7) | (third >= 0xB0))]
    classes[first] = classes[first + 1] = classes[first + 2] = _OTHER
    return classes


def piece_starts(text: np.ndarray, *, single_digits: bool) -> np.ndarray:
    """int64: where GPT-2's pattern (after isolating digits, if `single_digits`) starts a piece in uint8 `text`.

        's|'t|'re|'ve|'m|'ll|'d| ?letters| ?digits| ?others|blanks but the last before a word|blanks

    A stretch with foreign characters counts as one piece. `text` starts and ends at a sure cut.
    """
    classes = _classes(text)
    before, after = np.empty_like(classes), np.empty_like(classes)
    before[0] = after[-1] = _END
    before[1:], after[:-1] = classes[:-1], classes[1:]
    blank = (classes == _SPACE) | (classes == _BLANK)
    # The last blank before a word is left to it, or stands alone; an isolated digit takes none.
    left = after <= (_LETTER if single_digits else _DIGIT)
    blank_before = (before == _SPACE) | (before == _BLANK)
    starts = np.where(blank, ~blank_before | left, (classes != before) & (before != _SPACE))
    starts |= classes == _END
    if single_digits:
        starts |= classes == _DIGIT
    _keep_contractions(text, before, starts)
    foreign = np.flatnonzero(classes == _FOREIGN)
    if len(foreign):
        cuts = np.flatnonzero(((classes == _SPACE) & (after == _LETTER)) | (classes == _END) | (before == _END))
        touched = np.unique(np.searchsorted(cuts, foreign, side="right"))
        for start, stop in zip(cuts[touched - 1].tolist(), np.append(cuts, len(text))[touched].tolist(), strict=True):
            starts[start + 1 : stop] = False
    return np.flatnonzero(starts)


def _keep_contractions(text: np.ndarray, before: np.ndarray, starts: np.ndarray) -> None:
    """Where a quotation mark starts a piece and a contraction's letters follow, they are one piece and end there."""
    padded = np.concatenate([text, np.zeros(3, np.uint8)])
    quote = np.flatnonzero(text == ord("'"))
    quote = quote[(before[quote] != _SPACE) & (before[quote] != _OTHER)]
    one, two = padded[quote + 1], padded[quote + 2]
    short = quote[(one == ord("s")) | (one == ord("t")) | (one == ord("m")) | (one == ord("d"))]
    long = quote[(((one == ord("r")) | (one == ord("v"))) & (two == ord("e"))) | ((one == ord("l")) & (two == ord("l")))]
    for found, length in ((short, 2), (long, 3)):
        starts[found + 1] = False
        following = found + length
        starts[following[following < len(starts)]] = True


class PieceEncoder:
    """Texts to ids through a table, filled on the way, from piece to its ids. Make one with `for_backend`."""

    def __init__(self, backend: Tokenizer, dtype: np.dtype, end_id: int, single_digits: bool) -> None:
        self._backend, self._dtype, self._single_digits = backend, dtype, single_digits
        self._model = backend.model
        self._ids = _IdLists(dtype)
        self._table = _Table()
        self._others: dict[bytes, int] = {}  # pieces that are no key of the table
        self._ids.extend([[end_id]])
        self._table.insert(np.array([_SEPARATOR[0]], np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.int32))

    @classmethod
    def for_backend(cls, backend: Tokenizer, dtype: np.dtype, end_id: int) -> PieceEncoder | None:
        """An encoder equal to ``backend.encode(text, add_special_tokens=False)``; None for tokenizers of another kind."""
        description = json.loads(backend.to_str())
        match description["pre_tokenizer"]:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                single_digits = False
            case {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            }:
                single_digits = True
            case _:
                return None
        model = description["model"]
        plain_model = model["type"] == "BPE" and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        )
        specials_only = backend.encode_special_tokens and all(token["special"] for token in description["added_tokens"])
        if not (plain_model and specials_only and description["normalizer"] is None):
            return None
        return cls(backend, dtype, end_id, single_digits)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, each followed by the end token. Raises UnicodeEncodeError on a lone surrogate."""
        if not texts:
            return []
        encoded = b"".join([part for text in texts for part in (text.encode(), _SEPARATOR)])
        ids, ends, done = [], [], 0
        for piece in _slices(encoded):
            slice_ids, slice_ends = self._encode_slice(piece)
            ids.append(slice_ids)
            ends.append(slice_ends + done)
            done += len(slice_ids)
        return np.split(np.concatenate(ids), np.concatenate(ends)[:-1])

    def _encode_slice(self, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets in them where documents end)."""
        text = np.frombuffer(encoded, np.uint8)
        starts = piece_starts(text, single_digits=self._single_digits)
        low, high = _keys(encoded, starts, np.append(starts[1:], len(text)))
        entries = self._table.look_up(low, high)
        missing = np.flatnonzero(entries < 0)
        kept = len(self._ids)
        if len(missing):
            stops = np.append(starts, len(text))[missing + 1]
            pieces = [encoded[start:stop] for start, stop in zip(starts[missing].tolist(), stops.tolist(), strict=True)]
            entries[missing], kept = self._add(pieces, low[missing], high[missing])
        ids, counts = self._ids.gather(entries)
        self._ids.truncate(kept)
        return ids, np.cumsum(counts)[text[starts] == _SEPARATOR[0]]

    def _add(self, pieces: list[bytes], low: np.ndarray, high: np.ndarray) -> tuple[list[int], int]:
        """Entries of pieces that the table does not know, given with their keys, and how many entries are to be kept."""
        first: dict[bytes, int] = {}
        for place, piece in enumerate(pieces):
            if piece not in self._others:
                first.setdefault(piece, place)
        before = len(self._ids)
        kept = [piece for piece in first if len(piece) <= _MAX_CACHED_LENGTH][: max(0, _MAX_ENTRIES - before)]
        entry = {piece: number for number, piece in enumerate(dict.fromkeys([*kept, *first]), start=before)}
        self._ids.extend([self._ids_of(piece) for piece in entry])
        keyed = [piece for piece in kept if low[first[piece]]]
        place_of = [first[piece] for piece in keyed]
        self._table.insert(low[place_of], high[place_of], np.array([entry[piece] for piece in keyed], np.int32))
        self._others |= {piece: entry[piece] for piece in kept if not low[first[piece]]}
        return [entry[piece] if piece in entry else self._others[piece] for piece in pieces], before + len(kept)

    def _ids_of(self, piece: bytes) -> list[int]:
        if piece.isascii() and 0 not in piece:  # one piece to the tokenizer too, so its model alone can merge it
            return [token.id for token in self._model.tokenize(piece.decode().translate(_STAND_INS))]
        return self._backend.encode(piece.decode(), add_special_tokens=False).ids


def _slices(encoded: bytes) -> Iterator[bytes]:
    """`encoded` in parts of about `_SLICE_BYTES` between sure cuts."""
    start = 0
    while start < len(encoded):
        cut = _SURE_CUT.search(encoded, start + _SLICE_BYTES)
        stop = cut.start() if cut else len(encoded)
        yield encoded[start:stop]
        start = stop


class _IdLists:
    """Lists of ids under numbers 0, 1, ..., in one array."""

    def __init__(self, dtype: np.dtype) -> None:
        self._ids, self._offsets, self._count = np.empty(1024, dtype), np.zeros(1024, np.int64), 0

    def __len__(self) -> int:
        return self._count

    def extend(self, lists: list[list[int]]) -> None:
        ends = self._offsets[self._count] + np.cumsum([0, *map(len, lists)])
        self._offsets = _with_room(self._offsets, self._count + len(ends))
        self._offsets[self._count : self._count + len(ends)] = ends
        self._ids = _with_room(self._ids, int(ends[-1]))
        self._ids[ends[0] : ends[-1]] = np.fromiter(chain.from_iterable(lists), self._ids.dtype)
        self._count += len(lists)

    def truncate(self, count: int) -> None:
        self._count = count

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the lists under `numbers` one after another, the length of each)."""
        first = self._offsets[numbers]
        counts = self._offsets[numbers + 1] - first
        ends = np.cumsum(counts)
        return self._ids[np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)], counts


def _with_room(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a copy with room for `size` elements and as many again."""
    return array if len(array) >= size else np.concatenate([array, np.zeros(2 * size - len(array), array.dtype)])


def _keys(encoded: bytes, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each piece's bytes as two uint64 [n]; (0, 0) for those that do not fit or hold a zero byte."""
    padded = encoded + bytes(_KEY_BYTES)
    words = np.ndarray(len(padded) - 7, np.dtype("<u8"), padded, strides=(1,))  # the eight bytes from every byte on
    length = stops - starts
    low = words[starts] & _MASKS[np.minimum(length, 8)]
    high = np.zeros_like(low)
    more = np.flatnonzero(length > 8)
    high[more] = words[starts[more] + 8] & _MASKS[np.minimum(length[more] - 8, 8)]
    odd = length > _KEY_BYTES
    if 0 in encoded:
        zeros = np.flatnonzero(np.frombuffer(encoded, np.uint8) == 0)
        odd[np.searchsorted(starts, zeros, side="right") - 1] = True
    low[odd] = high[odd] = 0
    return low, high


class _Table:
    """A hash table from keys to numbers, open addressing, at most half full; looks up an array at a time."""

    def __init__(self) -> None:
        size = 1 << _TABLE_BITS
        self._low, self._high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._number = np.full(size, -1, np.int32)

    def look_up(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """int64 [n], -1 for what is not there."""
        slot = self._slots(low, high)
        number = self._number[slot].astype(np.int64)
        # An empty slot ends the search; a slot with another key sends it to the next one.
        pending = np.flatnonzero(((self._low[slot] != low) | (self._high[slot] != high)) & (number >= 0))
        slot = slot[pending]
        while len(pending):
            slot = (slot + 1) & (len(self._number) - 1)
            number[pending] = self._number[slot]
            on = ((self._low[slot] != low[pending]) | (self._high[slot] != high[pending])) & (self._number[slot] >= 0)
            pending, slot = pending[on], slot[on]
        return number

    def insert(self, low: np.ndarray, high: np.ndarray, number: np.ndarray) -> None:
        """New keys, no two alike and none of them (0, 0)."""
        slot = self._slots(low, high)
        pending = np.arange(len(slot))
        while len(pending):
            free = pending[self._number[slot[pending]] < 0]
            self._number[slot[free]] = number[free]  # of several for one slot, one stays
            pending = pending[self._number[slot[pending]] != number[pending]]
            slot[pending] = (slot[pending] + 1) & (len(self._number) - 1)
        self._low[slot], self._high[slot] = low, high

    @staticmethod
    def _slots(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = low * _MIX[0] + high * _MIX[1]
        mixed ^= mixed >> np.uint64(29)
        return ((mixed * _MIX[2]) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
