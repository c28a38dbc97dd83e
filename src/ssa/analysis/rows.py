"""The text that is analysed: whole rows of a prepared corpus or of text files, the same for every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ssa.data.packing import positions_from_document_ends
from ssa.data.shards import TokenShards, is_prepared
from ssa.data.tokenizer import encode_documents, fingerprint
from ssa.errors import UserError
from ssa.eval.documents import read_texts


@dataclass(frozen=True)
class Rows:
    """Packed rows; positions restart at 0 at each document and at the start of each row."""

    input_ids: torch.Tensor
    """int64 [rows, T]"""
    position_ids: torch.Tensor
    about: dict[str, Any]
    """data, split, context, rows, tokens, seed, whole_documents: what another analysis must share to be comparable."""


def packed_rows(
    data: Path | str, tokenizer: PreTrainedTokenizerFast, *, split: str, context: int, max_tokens: int, seed: int,
    whole_documents: bool = False,
) -> Rows:  # fmt: skip
    """At most `max_tokens` tokens as rows of `context`, drawn without replacement from the whole split, in its order.

    Args:
        data: A directory made by `ssa prepare`, or text as `ssa.eval.documents.read_texts` reads it (`split` does not apply).
        context: Tokens in a row; shorter where the text is.
        whole_documents: Take the first `context` tokens of each document that has so many, and nothing else: packed rows of short
            documents say little about long contexts.

    Raises:
        UserError: no such text, too little of it, no document that is long enough, or a corpus prepared with another tokenizer.
    """
    if context < 2:
        raise UserError(f"context = {context} must be at least 2 tokens")
    if seed < 0:
        raise UserError(f"seed = {seed} must be 0 or more")
    if max_tokens < 2:
        raise UserError(f"max_tokens = {max_tokens} must be at least 2")
    prepared = is_prepared(data)
    text = _Shards(Path(data), split, tokenizer) if prepared else _Texts(data, tokenizer)
    if text.num_tokens < 2:
        raise UserError(f"{data} has {text.num_tokens} tokens: too few to predict one")
    if whole_documents:
        if max_tokens < context:
            raise UserError(f"max_tokens = {max_tokens} is less than one row of {context} tokens; raise it, or lower context")
        starts = text.documents_of(context)
        if not len(starts):
            raise UserError(f"{data} has no document of {context} tokens: lower context, or leave whole documents out")
    else:
        context = min(context, text.num_tokens, max_tokens)
        starts = np.arange(text.num_tokens // context) * context
    starts = np.sort(np.random.default_rng(seed).permutation(starts)[: max_tokens // context])
    ids, positions = zip(*(text.row(int(start), context) for start in starts), strict=True)
    return Rows(
        torch.from_numpy(np.stack(ids).astype(np.int64)),
        torch.from_numpy(np.stack(positions).astype(np.int64)),
        {
            "data": Path(data).resolve().name,
            "split": split if prepared else None,
            "context": context,
            "rows": len(starts),
            "tokens": len(starts) * context,
            "seed": seed,
            "whole_documents": whole_documents,
        },
    )


class _Shards:
    """A split of a prepared corpus."""

    def __init__(self, path: Path, split: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.shards = TokenShards(path, split)
        if self.shards.tokenizer_fingerprint != fingerprint(tokenizer):
            raise UserError(f"{path} was prepared with another tokenizer than the run's: prepare the text again with that one")
        self.num_tokens = self.shards.num_tokens

    def row(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.shards.read(start, start + length), self.shards.positions(start, start + length)

    def documents_of(self, length: int) -> np.ndarray:
        return _long_enough(self.shards.document_ends(0, self.num_tokens), length)


class _Texts:
    """Text files, or the built-in corpus, packed as training packs documents."""

    def __init__(self, data: Path | str, tokenizer: PreTrainedTokenizerFast) -> None:
        documents = encode_documents(tokenizer, [text for text, _ in read_texts(data)])
        self.tokens = np.concatenate(documents)
        self.ends = np.cumsum([len(document) for document in documents])
        self.num_tokens = len(self.tokens)

    def row(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[start : start + length], positions_from_document_ends(self.ends - start, length)

    def documents_of(self, length: int) -> np.ndarray:
        return _long_enough(self.ends, length)


def _long_enough(ends: np.ndarray, length: int) -> np.ndarray:
    """Where the documents of at least `length` tokens start."""
    starts = np.concatenate([[0], ends[:-1]])
    return starts[ends - starts >= length]
