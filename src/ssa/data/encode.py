"""The workers' half of `prepare`: blocks of documents to token ids, in processes that import neither torch nor transformers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from ssa.data.sources import Block, block_texts
from ssa.data.tokenizer import DocumentEncoder
from ssa.errors import UserError

_HASH_RANGE = 1 << 64
_WHITESPACE = np.array([chr(code).isspace() for code in range(128)] + [False] * 128)
_OTHER_WHITESPACE = [chr(code) for code in range(128, 0x3001) if chr(code).isspace()]


@dataclass(frozen=True)
class EncoderSpec:
    """All a worker needs to know."""

    tokenizer: Path
    end_id: int
    text_field: str
    valid_below: int
    """Documents whose hash is below this go to ``splits[1]``, the others to ``splits[0]``."""
    splits: tuple[str, ...]


@dataclass
class EncodedBlock:
    """Per split: the tokens of its documents in a row, and int64 [n, 3] of (end offset, UTF-8 bytes, words)."""

    block: tuple[int, int]
    read_bytes: int
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    docs: dict[str, np.ndarray] = field(default_factory=dict)
    hashes: dict[str, np.ndarray] = field(default_factory=dict)
    """uint64 [n], per split: each document's `document_hash`."""
    skipped: int = 0


def valid_threshold(fraction: float) -> int:
    return round(fraction * _HASH_RANGE)


def document_hash(encoded: bytes) -> int:
    """Uniform over [0, 2**64), of the UTF-8 text alone: a document's split depends on nothing else, and duplicates stay together."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def count_words(text: str, encoded: bytes) -> int:
    """``len(text.split())`` without making the words; ``encoded`` is the text in UTF-8."""
    if not text.isascii() and any(character in text for character in _OTHER_WHITESPACE):
        return len(text.split())
    space = _WHITESPACE[np.frombuffer(encoded, np.uint8)]
    if len(space) == 0:
        return 0
    return int(np.count_nonzero(space[:-1] & ~space[1:])) + int(not space[0])


class BlockEncoder:
    """Encodes one block at a time; one a process."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        self._encoder = DocumentEncoder.from_directory(spec.tokenizer, spec.end_id)

    def __call__(self, block: Block) -> EncodedBlock:
        result = EncodedBlock((block.source, block.number), block.read_bytes)
        texts: dict[str, list[str]] = {split: [] for split in self._spec.splits}
        counts: dict[str, list[tuple[int, int]]] = {split: [] for split in self._spec.splits}
        hashes: dict[str, list[int]] = {split: [] for split in self._spec.splits}
        for text, _ in block_texts(block, self._spec.text_field):
            if not text or text.isspace():
                result.skipped += 1
                continue
            # "surrogatepass" gives broken text a hash and a length too; what is written has U+FFFD there, of equal length.
            encoded = text.encode("utf-8", "surrogatepass")
            value = document_hash(encoded)
            split = self._spec.splits[-1 if value < self._spec.valid_below else 0]
            texts[split].append(text)
            counts[split].append((len(encoded), count_words(text, encoded)))
            hashes[split].append(value)
        for split, chosen in texts.items():
            if chosen:
                documents = self._encoder.encode(chosen)
                docs = np.empty((len(documents), 3), np.int64)
                docs[:, 0] = np.cumsum([len(document) for document in documents])
                docs[:, 1:] = counts[split]
                result.tokens[split], result.docs[split] = np.concatenate(documents), docs
                result.hashes[split] = np.array(hashes[split], np.uint64)
        return result


def encode_blocks(blocks: Iterable[Block], spec: EncoderSpec, workers: int) -> Generator[EncodedBlock, None, None]:
    """Encode blocks in ``workers`` processes (1: in this one); results come in the blocks' order, a bounded number ahead."""
    if workers == 1:
        yield from map(BlockEncoder(spec), blocks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (spec,))
    waiting: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_encode_in_worker, block))
            if len(waiting) >= 2 * workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died (out of memory?): run again with fewer workers to go on") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(spec: EncoderSpec) -> None:
    # Ctrl-C is the parent's to handle, and a killed parent must not leave workers waiting for blocks for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core; threads on top would fight for them
    _worker["encode"] = BlockEncoder(spec)


def _encode_in_worker(block: Block) -> EncodedBlock:
    return _worker["encode"](block)
