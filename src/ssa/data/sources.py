"""What `prepare` reads: files, directories, globs, the embedded corpus and Hugging Face datasets, as a fixed sequence of blocks.

A block is a few megabytes of documents, small enough to travel to a worker. The sequence of blocks depends on the inputs alone, so
(source number, block number) is a place to resume from. Reading and decompressing happen here, in one process; parsing and encoding,
which cost far more, happen in the workers.
"""

from __future__ import annotations

import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ssa.errors import UserError

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
BUILTIN, HUGGING_FACE = "builtin:python", "hf:"
BLOCK_BYTES = 2 << 20
# Looked for a line end this far on where a long text file is cut.
_CUT_SEARCH_BYTES = 64 << 10


@dataclass(frozen=True)
class Source:
    """Something to read in order. ``kind``: "text" (a group of text files), "lines", "parquet", "builtin" or "hf"."""

    kind: str
    paths: tuple[Path, ...] = ()
    name: str = ""
    num_bytes: int = 0  # on disk; 0 where unknown


@dataclass(frozen=True)
class Block:
    """Documents on their way to a worker: whole texts, or raw JSON lines of which the first has number ``first_line``."""

    source: int
    number: int
    texts: list[str] | None = None
    lines: bytes = b""
    name: str = ""
    first_line: int = 1
    read_bytes: int = 0  # of the source on disk, up to and including this block


def expand_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Sources in the order given; directories and globs in sorted order, each file once. Raises `UserError` for what cannot be read."""
    sources: list[Source] = []
    seen: set[Path] = set()
    for given in (os.fspath(one) for one in inputs):
        if given == BUILTIN:
            sources.append(Source("builtin", name=given))
        elif given.startswith("builtin:"):
            raise UserError(f"unknown corpus {given}: the embedded one is {BUILTIN}")
        elif given.startswith(HUGGING_FACE):
            sources.append(Source("hf", name=given))
        else:
            for path in _files(given):
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    _add_file(sources, path)
    if not sources:
        raise UserError(f"nothing to prepare: name files, directories, {BUILTIN} or hf:NAME")
    return sources


def read_blocks(sources: list[Source], text_field: str, document_bytes: int, start: tuple[int, int] = (0, 0)) -> Iterator[Block]:
    """All blocks from ``start`` = (source, block in it) on. Text files over ``document_bytes`` are cut into documents at line ends."""
    for number in range(start[0], len(sources)):
        source = sources[number]
        for count, block in enumerate(_read_source(source, text_field, document_bytes)):
            if number > start[0] or count >= start[1]:
                yield replace(block, source=number, number=count)


def read_texts(source: Source, text_field: str, document_bytes: int, limit_bytes: int) -> Iterator[str]:
    """The texts of a source until ``limit_bytes`` of UTF-8 have been read; what a BPE is trained on."""
    from ssa.data.encode import block_texts

    for block in _read_source(source, text_field, document_bytes):
        for text in block_texts(block, text_field):
            yield text
            limit_bytes -= len(text.encode("utf-8", "surrogatepass"))
            if limit_bytes <= 0:
                return


def _files(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and not _hidden(p.relative_to(path))
        )
        if not found:
            raise UserError(f"no {' '.join(SUFFIXES)} file in {given}")
        return found
    found = [path] if path.is_file() else sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.is_file())
    if not found:
        raise UserError(f"no such file or directory: {given}")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"unknown kind of file {file}: can read {' '.join(SUFFIXES)}")
    return found


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _add_file(sources: list[Source], path: Path) -> None:
    num_bytes = path.stat().st_size
    if path.name.endswith(".parquet"):
        sources.append(Source("parquet", (path,), str(path), num_bytes))
    elif path.name.endswith(LINE_SUFFIXES):
        sources.append(Source("lines", (path,), str(path), num_bytes))
    elif sources and sources[-1].kind == "text" and sources[-1].num_bytes + num_bytes <= BLOCK_BYTES:
        # Small files travel together: a block each would cost more than encoding it.
        group = sources[-1]
        sources[-1] = replace(group, paths=(*group.paths, path), num_bytes=group.num_bytes + num_bytes)
    else:
        sources.append(Source("text", (path,), str(path), num_bytes))


def _read_source(source: Source, text_field: str, document_bytes: int) -> Iterator[Block]:
    match source.kind:
        case "text":
            yield from _text_blocks(_text_files(source.paths, document_bytes), source.name)
        case "lines":
            yield from _line_blocks(source.paths[0])
        case "parquet":
            yield from _text_blocks(_parquet(source.paths[0], text_field, source.num_bytes), source.name)
        case "builtin":
            from ssa.data.corpus import python_corpus

            yield from _text_blocks(((text, 0) for _, text in python_corpus()), source.name)
        case "hf":
            yield from _text_blocks(((text, 0) for text in _hugging_face(source.name, text_field)), source.name)
        case _:
            raise AssertionError(source.kind)


def _text_blocks(texts: Iterable[tuple[str, int]], name: str) -> Iterator[Block]:
    """Group ``(text, bytes read so far)`` into blocks."""
    group: list[str] = []
    size = read = 0
    for text, read_so_far in texts:
        group.append(text)
        size += len(text)
        read = max(read, read_so_far)
        if size >= BLOCK_BYTES:
            yield Block(0, 0, texts=group, name=name, read_bytes=read)
            group, size = [], 0
    if group:
        yield Block(0, 0, texts=group, name=name, read_bytes=read)


def _text_files(paths: tuple[Path, ...], document_bytes: int) -> Iterator[tuple[str, int]]:
    """Text files as documents of at most about ``document_bytes``, of equal size within a file, cut at line ends."""
    before = 0
    for path in paths:
        size = path.stat().st_size
        pieces = max(1, -(-size // document_bytes))
        start = 0
        with path.open("rb") as file:
            for number in range(1, pieces + 1):
                stop = size if number == pieces else _cut_near(file, size * number // pieces)
                if start < stop:
                    text = _decoded(file, path, start, stop)
                    yield text.removeprefix("\ufeff") if start == 0 else text, before + stop
                    start = stop
        before += size


def _decoded(file: BinaryIO, path: Path, start: int, stop: int) -> str:
    file.seek(start)
    try:
        return file.read(stop - start).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {start + error.start}: convert it (iconv -t utf-8)") from error


def _cut_near(file: BinaryIO, offset: int) -> int:
    """The next line's start at or after ``offset``, or where no line ends soon the next character's."""
    file.seek(offset)
    window = file.read(_CUT_SEARCH_BYTES)
    newline = window.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    continuation = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    return offset + continuation


def _line_blocks(path: Path) -> Iterator[Block]:
    """Raw blocks of whole lines."""
    rest, first_line = b"", 1
    with path.open("rb") as raw:
        for chunk in _decompressed(raw, path):
            chunk = rest + chunk if rest else chunk
            cut = chunk.rfind(b"\n") + 1
            rest = chunk[cut:]
            if cut:
                lines = chunk[:cut]
                yield Block(0, 0, lines=lines, name=str(path), first_line=first_line, read_bytes=raw.tell())
                first_line += lines.count(b"\n")
        if rest:
            yield Block(0, 0, lines=rest, name=str(path), first_line=first_line, read_bytes=raw.tell())


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Chunks of `BLOCK_BYTES` (the last may be shorter), whatever the compression."""
    if path.suffix == ".zst":
        yield from _zstd(raw, path)
        return
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, nullcontext)
    try:
        with opened(raw) as stream:
            while chunk := stream.read(BLOCK_BYTES):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {str(error) or 'it ends early'}") from error


def _zstd(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path} needs zstandard: pip install "sparse-sparse-attention[data]"') from None
    # The stream reader ends silently inside a cut-off frame; frame by frame we know.
    chunk, out, frame = b"", bytearray(), None
    while chunk or (chunk := raw.read(64 << 10)):
        if frame is None:
            frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            out += frame.decompress(chunk)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        chunk = b""
        if frame.eof:
            chunk, frame = frame.unused_data, None
        while len(out) >= BLOCK_BYTES:
            yield bytes(out[:BLOCK_BYTES])
            del out[:BLOCK_BYTES]
    if frame is not None:
        raise UserError(f"{path} is damaged: it ends in the middle of its compressed data")
    if out:
        yield bytes(out)


def _parquet(path: Path, text_field: str, num_bytes: int) -> Iterator[tuple[str, int]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f'{path} needs pyarrow: pip install "sparse-sparse-attention[data]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise UserError(
                    f'{path} has no column "{text_field}" (it has {", ".join(schema.names[:8])}): name it as text_field'
                )
            kind, types = schema.field(text_field).type, pyarrow.types
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise UserError(f'{path}: column "{text_field}" holds {kind}, not text')
            done, rows = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=64, columns=[text_field]):
                done += batch.num_rows
                for text in batch.column(0).to_pylist():
                    yield text or "", num_bytes * done // rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no Parquet file: {' '.join(str(error).split())[:120]}") from error


def _hugging_face(name: str, text_field: str) -> Iterator[str]:
    """Stream ``hf:NAME[:CONFIG][:SPLIT]``; with one part after the name, the usual split names mean a split."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name} needs datasets: pip install "sparse-sparse-attention[data]"') from None
    dataset, *parts = name.removeprefix(HUGGING_FACE).split(":")
    if not dataset or len(parts) > 2 or not all(parts):
        raise UserError(f"{name}: write hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    config, split = None, "train"
    if len(parts) == 2:
        config, split = parts
    elif parts and parts[0] in ("train", "validation", "valid", "test"):
        split = parts[0]
    elif parts:
        config = parts[0]
    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for row in rows:
            if text_field not in row:
                raise UserError(f'{name} has no field "{text_field}" (it has {", ".join(list(row)[:8])}): name it as text_field')
            if row[text_field] is not None and not isinstance(row[text_field], str):
                raise UserError(f'{name}: field "{text_field}" holds {type(row[text_field]).__name__}, not text')
            yield row[text_field] or ""
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and the hub raise for names, splits and networks
        raise UserError(f"{name} cannot be read: {' '.join(str(error).split())[:200]}") from error
