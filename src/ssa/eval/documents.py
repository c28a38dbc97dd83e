"""The text of an evaluation: a prepared data directory, or anything that `ssa prepare` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssa.data.lines import without_surrogates
from ssa.data.shards import TokenShards, is_prepared
from ssa.data.sources import Reading, block_texts, expand_inputs, read_blocks
from ssa.data.tokenizer import encode_documents
from ssa.data.tokenizer import fingerprint as tokenizer_fingerprint
from ssa.errors import UserError
from ssa.eval.perplexity import Document


class Text(NamedTuple):
    text: str
    num_words: int


def read_documents(
    data: str | Path, split: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None
) -> tuple[list[Document], bool]:
    """(documents without their end token, whether `max_tokens` cut something off).

    Args:
        data: A directory made by `ssa prepare`; or text files (see `read_texts`), encoded with `tokenizer`.
        split: Of a prepared directory; text files have none.
        max_tokens: Stop where so many tokens would be scored. Bytes and words of the document cut there are those of its beginning.

    Raises:
        UserError: Nothing there, or shards of another tokenizer.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens} must be at least 1")
    documents: list[Document] = []
    left, cut = max_tokens, False
    for document in _prepared(Path(data), split, tokenizer) if is_prepared(data) else _encoded(read_texts(data), tokenizer):
        if left is not None and len(document.tokens) - 1 > left:
            cut = True
            if left:
                documents.append(_beginning(document, left + 1, tokenizer))
            break
        documents.append(document)
        if left is not None:
            left -= max(0, len(document.tokens) - 1)
    return documents, cut


def document_texts(data: str | Path, split: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """The same documents as text."""
    if not is_prepared(data):
        yield from (text for text, _ in read_texts(data))
        return
    for document in _prepared(Path(data), split, tokenizer):
        yield _decode(tokenizer, document.tokens)


def fingerprint(documents: Iterable[Document]) -> str:
    """sha256 over the tokens and where documents end."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.int64(len(document.tokens)).tobytes())
        digest.update(np.ascontiguousarray(document.tokens, dtype="<u4").tobytes())
    return digest.hexdigest()


def read_texts(data: str | Path) -> Iterator[Text]:
    """The documents of whatever `ssa prepare` reads: files, directories, patterns, "builtin:python", "hf:NAME".

    A JSON line holds its document in "text"; an integer "words" beside it overrides the count of white-space separated words, for
    texts that were detokenised (WikiText). A text file is one document.

    Raises:
        UserError: Nothing there, a line that is no such object, or no text in any document.
    """
    empty = True
    for block in read_blocks(expand_inputs([data], tell=True), Reading()):
        for text, record in block_texts(block, "text"):
            words = record.get("words")
            if type(words) is float or (type(words) is int and words < 0):
                raise UserError(f'{data}: "words" = {words} beside a text is no number of words: a whole number, 0 or more')
            text = without_surrogates(text)
            empty = empty and not text.strip()
            yield Text(text, words if type(words) is int else len(text.split()))
    if empty:
        raise UserError(f"{data} holds no text: every document is empty")


def _encoded(texts: Iterable[Text], tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    for text, num_words in texts:
        tokens = encode_documents(tokenizer, [text])[0][:-1]
        yield Document(tokens, len(text.encode()), num_words)


def _prepared(path: Path, split: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    shards = TokenShards(path, split)
    if shards.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise UserError(f"{path} was prepared with another tokenizer than the model's; give its text files instead")
    for tokens, num_bytes, num_words in shards.documents():
        yield Document(tokens[:-1], num_bytes, num_words)


def _beginning(document: Document, num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> Document:
    """The first tokens with their share of the bytes and words, by decoding both: exact where decoding gives the text back."""
    part, whole = (_decode(tokenizer, tokens) for tokens in (document.tokens[:num_tokens], document.tokens))

    def share(a: int, b: int, count: int) -> int:
        return round(count * a / b) if b else 0

    return Document(
        document.tokens[:num_tokens],
        share(len(part.encode()), len(whole.encode()), document.num_bytes),
        share(len(part.split()), len(whole.split()), document.num_words),
    )


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))
