"""A fast path for GPT-2-style byte-level BPE, exact to the id: split English text into pieces here and look their ids up.

The Rust library splits and merges anew for every word it meets, at 1 to 2 MB/s a core. Most words of a corpus are repetitions, so a
dictionary from piece to ids serves nearly all of them, several times faster. That is exact because a byte-level BPE merges within a
piece only, and because the pattern below cuts at boundaries that the tokenizer's own pattern must also cut at. It decides from ASCII
characters alone: where another character touches a piece, the stretch up to the next sure boundary goes to the Rust library unsplit.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_CACHED_PIECES = 300_000  # about 60 MB a process; frequent pieces come early
_MAX_CACHED_LENGTH = 64
# Byte-level BPE's stand-ins for the ASCII characters that do not stand for themselves.
_STAND_INS = {byte: 256 + i for i, byte in enumerate([*range(33), 127])} | {127: 256 + 33}


def _pattern(*, single_digits: bool) -> re.Pattern[str]:
    """GPT-2's splitting rule (optionally after isolating digits) for pieces next to ASCII only, or else a stretch to leave alone.

    Quantifiers are possessive so that "a piece and no foreign character after it" cannot be met by giving up the piece's end.
    """
    foreign = r"[^\x00-\x7f]"
    number = "[0-9]" if single_digits else rf"\ ?+[0-9]++(?!{foreign})"
    # A run of spaces leaves its last one to the word that follows; an isolated digit takes none.
    word_follows = r"[^\s0-9]" if single_digits else r"\S"
    return re.compile(
        rf"""
        '(?:[stmd]|re|ve|ll)
        | \ ?+[A-Za-z]++(?!{foreign})
        | {number}
        | \ ?+[!-/:-@\[-`{{-~\x00-\x08\x0e-\x1f\x7f]++(?!{foreign})
        | (?!\s++{foreign})(?:\s+(?!{word_follows})|[\t-\r])
        | [\x00-\U0010ffff](?:(?!\ [A-Za-z])[\x00-\U0010ffff])*+
        """,
        re.ASCII | re.VERBOSE,
    )


class PieceEncoder(dict[str, bytes]):
    """Texts to ids through a dictionary, filled on the way, from piece to its ids' bytes. Make one with `for_backend`."""

    def __init__(self, backend: Tokenizer, dtype: np.dtype, pattern: re.Pattern[str]) -> None:
        self._backend = backend
        self._dtype = dtype
        self._model = backend.model
        self._split = pattern.findall

    @classmethod
    def for_backend(cls, backend: Tokenizer, dtype: np.dtype) -> PieceEncoder | None:
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
        return cls(backend, dtype, _pattern(single_digits=single_digits))

    def encode(self, text: str) -> bytes:
        """The ids of one text as the bytes of an array. Raises TypeError on a lone surrogate, as the library does."""
        return b"".join(map(self.__getitem__, self._split(text)))

    def __missing__(self, piece: str) -> bytes:
        if piece.isascii():  # one piece to the tokenizer too, so its model alone can merge it
            ids = [token.id for token in self._model.tokenize(piece.translate(_STAND_INS))]
        else:
            ids = self._backend.encode(piece, add_special_tokens=False).ids
        packed = np.array(ids, self._dtype).tobytes()
        if len(self) < _MAX_CACHED_PIECES and len(piece) <= _MAX_CACHED_LENGTH:
            self[piece] = packed
        return packed
