"""What `prepare` reads: files, directories, globs, the embedded corpus and Hugging Face datasets, as a fixed sequence of blocks.

A block is a few megabytes of documents, small enough to travel to a worker. The sequence of blocks depends on the inputs alone, so
(source number, block number) is a place to resume from. Reading and decompressing happen here, in one process; parsing and encoding,
which cost far more, happen in the workers.
"""

from __future__ import annotations

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ssa.data.corpus import python_corpus
from ssa.data.lines import MAX_LINE_BYTES, NotAnObjectError, line_blocks, not_utf8, parse_line, too_long
from ssa.errors import UserError, one_line
from ssa.terminal import warn

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


def expand_inputs(inputs: Iterable[str | os.PathLike[str]], tell: bool = False) -> list[Source]:
    """Sources in the order given; directories and globs in sorted order, each file once. Raises `UserError` for what cannot be read.

    `tell`: say on stderr what of a directory is left out, and why.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for given in (os.fspath(one) for one in inputs):
        if not given:
            raise UserError(
                "an input is '' (a shell variable that is not set?): name files, directories, builtin:python or hf:NAME"
            )
        if given == BUILTIN:
            sources.append(Source("builtin", name=given))
        elif given.startswith("builtin:"):
            raise UserError(f"unknown corpus {given}: the embedded one is {BUILTIN}")
        elif given.startswith(HUGGING_FACE):
            sources.append(Source("hf", name=given))
        else:
            for path in _files(given, tell):
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    _add_file(sources, path)
    if not sources:
        raise UserError(f"nothing to prepare: name files, directories, {BUILTIN} or hf:NAME")
    return sources


@dataclass(frozen=True)
class Reading:
    """How sources are read."""

    text_field: str = "text"
    document_bytes: int = sys.maxsize
    """Longer text files are cut into documents at line ends."""
    max_line_bytes: int = MAX_LINE_BYTES
    """A longer line of JSON, or a longer row of a table, is an error."""


def read_blocks(sources: list[Source], how: Reading, start: tuple[int, int] = (0, 0)) -> Iterator[Block]:
    """All blocks from ``start`` = (source, block in it) on."""
    for number in range(start[0], len(sources)):
        source = sources[number]
        for count, block in enumerate(_read_source(source, how)):
            if number > start[0] or count >= start[1]:
                yield replace(block, source=number, number=count)


def read_texts(source: Source, how: Reading, limit_bytes: int) -> Iterator[str]:
    """The texts of a source until ``limit_bytes`` of UTF-8 have been read; what a BPE is trained on."""
    for block in _read_source(source, how):
        for text, _ in block_texts(block, how.text_field):
            yield text
            limit_bytes -= len(text.encode("utf-8", "surrogatepass"))
            if limit_bytes <= 0:
                return


def _files(given: str, tell: bool) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found, left_out = _walk(path)
        if not found:
            why = f" ({left_out})" if left_out else ""
            raise UserError(f"no {' '.join(SUFFIXES)} file in {given}{why}")
        if left_out and tell:
            warn(f"left out of {given}: {left_out}")
        return found
    found = [path] if path.is_file() else sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.is_file())
    if not found:
        raise UserError(f"no such file or directory: {given}")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"unknown kind of file {file}: can read {' '.join(SUFFIXES)}")
    return found


def _walk(directory: Path) -> tuple[list[Path], str]:
    """(files to read, in order, what was left out and why)."""
    found: list[Path] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)

    def leave(why: str, path: Path | str) -> None:
        left_out[why].append(str(path))

    for home, folders, names in os.walk(directory, onerror=lambda e: leave(e.strerror or one_line(e), e.filename)):
        for name in [folder for folder in folders if folder.startswith(".")]:
            folders.remove(name)  # not entered
            leave("hidden", Path(home, name))
        for name in folders:
            if Path(home, name).is_symlink():  # not entered either
                leave("link to a directory", Path(home, name))
        for name in names:
            path = Path(home, name)
            if not name.endswith(SUFFIXES):
                leave("of another kind", path)
            elif name.startswith("."):
                leave("hidden", path)
            elif not path.is_file():
                leave("no file, or a link to none", path)
            elif not path.stat().st_size:
                leave("empty", path)
                found.append(path)  # to be counted with the documents that hold nothing
            else:
                found.append(path)
    parts = []
    for why, paths in left_out.items():
        more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
        parts.append(f"{', '.join(sorted(paths)[:3])}{more} ({why})")
    return sorted(found), "; ".join(parts)


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


def block_texts(block: Block, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The texts of a block, each with the JSON object that it comes from (empty for other kinds of source).

    Raises:
        UserError: A line is no JSON object with a text in the field; file and line are named.
    """
    if block.texts is not None:
        yield from ((text, {}) for text in block.texts)
        return
    for number, line in enumerate(block.lines.split(b"\n") if block.lines.strip() else (), start=block.first_line):
        place = f"{block.name}:{number}"
        try:
            record = parse_line(line)
        except NotAnObjectError as error:
            raise UserError(f"{place} {error}") from None
        if record is not None:
            yield _text_of(record, text_field, place, "field"), record


def _text_of(row: Mapping[str, Any], text_field: str, place: str, what: str) -> str:
    if text_field not in row:
        raise UserError(f'{place} has no {what} "{text_field}" (it has {", ".join(list(row)[:8])}): name it as text_field')
    text = row[text_field]
    if not isinstance(text, str | None):
        raise UserError(f'{place}: {what} "{text_field}" holds {type(text).__name__}, not text')
    return text or ""


def _read_source(source: Source, how: Reading) -> Iterator[Block]:
    match source.kind:
        case "text":
            yield from _text_blocks(_text_files(source.paths, how.document_bytes), source.name)
        case "lines":
            yield from _line_blocks(source.paths[0], how.max_line_bytes)
        case "parquet":
            yield from _text_blocks(_parquet(source.paths[0], how, source.num_bytes), source.name)
        case "builtin":
            yield from _text_blocks(((text, 0) for _, text in python_corpus()), source.name)
        case "hf":
            yield from _text_blocks(((text, 0) for text in _hugging_face(source.name, how)), source.name)
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
        raise UserError(not_utf8(path, start + error.start)) from error


def _cut_near(file: BinaryIO, offset: int) -> int:
    """The next line's start at or after ``offset``, or where no line ends soon the next character's."""
    file.seek(offset)
    window = file.read(_CUT_SEARCH_BYTES)
    newline = window.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    continuation = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    return offset + continuation


def _line_blocks(path: Path, max_line_bytes: int) -> Iterator[Block]:
    """Raw blocks of whole lines."""
    with path.open("rb") as raw:
        for lines, first_line in line_blocks(raw, str(path), BLOCK_BYTES, max_line_bytes):
            yield Block(0, 0, lines=lines, name=str(path), first_line=first_line, read_bytes=raw.tell())


def _parquet(path: Path, how: Reading, num_bytes: int) -> Iterator[tuple[str, int]]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise UserError(f'{path} needs pyarrow: pip install "sparse-sparse-attention[data]"') from None
    name = how.text_field
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if name not in schema.names:
                raise UserError(f'{path} has no column "{name}" (it has {", ".join(schema.names[:8])}): name it as text_field')
            kind = schema.field(name).type
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise UserError(f'{path}: column "{name}" holds {kind}, not text')
            done, rows = 0, file.metadata.num_rows
            for group in range(file.num_row_groups):
                batch_size = _rows_at_once(path, file.metadata.row_group(group), name, how.max_line_bytes)
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=[name]):
                    for value in batch.column(0):
                        done += 1
                        text = _cell(value, f"{path}, row {done}", how.max_line_bytes)
                        yield text, num_bytes * done // rows
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no Parquet file: {one_line(error)[:120]}") from error


def _rows_at_once(path: Path, group: Any, column: str, max_bytes: int) -> int:
    """How many rows of a row group can be held, where its texts are repeated by number; writers keep such dictionaries to a mebibyte."""
    about = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    if about.total_uncompressed_size > max_bytes * max(1, about.num_values):
        raise UserError(too_long(f"{path}: a row", max_bytes))
    if about.dictionary_page_offset is None:
        return 64
    with path.open("rb") as file:
        file.seek(about.dictionary_page_offset)
        header = file.read(
            16
        )  # fields 1 and 2 of a Thrift struct in compact form: the kind of page, and its size without compression
    size, shift, at = 0, 0, 3
    while at < len(header):
        size |= (header[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if header[at - 1] < 0x80:
            break
    return min(64, max(1, (64 << 20) // max(1, size >> 1)))  # a number's sign is its lowest bit


def _cell(value: Any, place: str, max_bytes: int) -> str:
    """The text of an Arrow scalar."""
    if not value.is_valid:
        return ""
    if value.as_buffer().size > max_bytes:
        raise UserError(too_long(place, max_bytes))
    try:
        return str(value.as_py())
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 at byte {error.start} of its text") from None


def _hugging_face(name: str, how: Reading) -> Iterator[str]:
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
        for row in datasets.load_dataset(dataset, config, split=split, streaming=True):
            text = _text_of(row, how.text_field, name, "field")
            if len(text) > how.max_line_bytes:
                raise UserError(too_long(f"{name}: a row", how.max_line_bytes))
            yield text
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and the hub raise for names, splits and networks
        raise UserError(f"{name} cannot be read: {one_line(error)[:200]}") from error
