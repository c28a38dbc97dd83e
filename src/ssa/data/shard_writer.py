"""Appending documents to the shards of one split so that a killed writer continues where it last said it was.

An open shard is two `.partial` files that only grow. `commit()` makes them durable and returns a small state; a writer made from that
state cuts the files back to it and removes whatever came later. A shard gets its final header and name when it is full.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TypedDict

import numpy as np

from ssa.data.shards import DOCUMENT_COLUMNS, ShardInfo, docs_path, tokens_path
from ssa.errors import UserError
from ssa.files import open_new, sha256_of_file

_HEADER_BYTES = 128  # what NumPy writes for these shapes at any length


class WriterState(TypedDict):
    """What `.progress.json` keeps of a writer."""

    shards: list[ShardInfo]
    open: tuple[int, int, int, int]
    """Tokens, documents, bytes and words of the open shard."""


class ShardWriter:
    """Writes ``{split}-00000.tokens.npy`` and ``.docs.npy``, and the next number once a shard holds ``shard_tokens`` tokens.

    Documents stay whole: a shard closes before the document that would overfill it, and a longer document gets a shard alone.
    """

    def __init__(self, out: Path, split: str, dtype: np.dtype, shard_tokens: int, state: WriterState | None = None) -> None:
        self._out, self._split, self._dtype, self._shard_tokens = out, split, dtype, shard_tokens
        state = state or {"shards": [], "open": (0, 0, 0, 0)}
        self.shards = list(state["shards"])
        self._tokens, self._documents, self._bytes, self._words = state["open"]
        self._files: tuple[IO[bytes], IO[bytes]] | None = None
        self._discard_uncommitted()
        if self._documents:
            self._open()

    def append(self, tokens: np.ndarray, docs: np.ndarray) -> None:
        """Append documents: their tokens in a row, and int64 [n, 3] of (end offset in ``tokens``, bytes, words)."""
        done = 0
        while done < len(docs):
            start = int(docs[done - 1, 0]) if done else 0
            fitting = start + self._shard_tokens - self._tokens
            stop = int(np.searchsorted(docs[:, 0].copy(), fitting, side="right"))
            if stop == done:  # the next document does not fit
                if self._documents:
                    self._close_shard()
                    continue
                stop = done + 1
            end = int(docs[stop - 1, 0])
            self._write(tokens[start:end], docs[done:stop] - np.array([start, 0, 0]))
            done = stop

    def commit(self) -> WriterState:
        """Make everything appended so far durable; the returned state restores exactly this."""
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())
        return {"shards": list(self.shards), "open": (self._tokens, self._documents, self._bytes, self._words)}

    def finish(self) -> list[ShardInfo]:
        """Close the last shard and return all of them."""
        if self._documents:
            self._close_shard()
        return self.shards

    def abandon(self) -> None:
        """Let go of the files without finishing them."""
        for file in self._files or ():
            file.close()
        self._files = None

    @property
    def _paths(self) -> tuple[Path, Path]:
        name = f"{self._split}-{len(self.shards):05d}"
        return tokens_path(self._out, name), docs_path(self._out, name)

    def _write(self, tokens: np.ndarray, docs: np.ndarray) -> None:
        if self._files is None:
            self._open()
        assert self._files is not None
        self._files[0].write(tokens.tobytes())
        self._files[1].write((docs + np.array([self._tokens, 0, 0])).tobytes())
        self._tokens += len(tokens)
        self._documents += len(docs)
        self._bytes += int(docs[:, 1].sum())
        self._words += int(docs[:, 2].sum())

    def _open(self) -> None:
        partial = map(_partial, self._paths)
        tokens, docs = (path.open("r+b") if self._documents else open_new(path, "w+b") for path in partial)
        self._files = tokens, docs
        if not self._documents:
            self._write_headers()
        for file in self._files:
            file.seek(0, os.SEEK_END)

    def _write_headers(self) -> None:
        assert self._files is not None
        _write_header(self._files[0], self._dtype, (self._tokens,))
        _write_header(self._files[1], np.dtype(np.int64), (self._documents, len(DOCUMENT_COLUMNS)))

    def _close_shard(self) -> None:
        assert self._files is not None
        self._write_headers()
        hashes = []
        for file, path in zip(self._files, self._paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            hashes.append(sha256_of_file(_partial(path)))
        for path in self._paths:
            _partial(path).rename(path)
        name = f"{self._split}-{len(self.shards):05d}"
        self.shards.append(ShardInfo(name, self._tokens, self._documents, self._bytes, self._words, *hashes))
        self._tokens = self._documents = self._bytes = self._words = 0
        self._files = None

    def _discard_uncommitted(self) -> None:
        """Bring the directory back to the state's point: the open shard cut to its length, nothing after it."""
        committed = {
            path for shard in self.shards for path in (tokens_path(self._out, shard.name), docs_path(self._out, shard.name))
        }
        lengths = dict(
            zip(self._paths, (self._tokens * self._dtype.itemsize, self._documents * 8 * len(DOCUMENT_COLUMNS)), strict=True)
        )
        if self._documents:
            for path, length in lengths.items():
                if path.exists():  # the shard was closed after the last commit
                    path.rename(_partial(path))
                if not _partial(path).is_file() or _partial(path).stat().st_size < _HEADER_BYTES + length:
                    raise UserError(f"{_partial(path)} is missing or too short to go on from: prepare again with overwrite")
                if _partial(path).is_symlink():
                    raise UserError(f"{_partial(path)} is a link, which no shard is: prepare again with overwrite")
                os.truncate(_partial(path), _HEADER_BYTES + length)
        for path in [*self._out.glob(f"{self._split}-*.npy"), *self._out.glob(f"{self._split}-*.npy.partial")]:
            keep = path in committed or (self._documents and path in map(_partial, lengths))
            if not keep:
                path.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    assert file.tell() == _HEADER_BYTES
