"""Files of lines: plain or compressed, read to their real end in bounded memory, a JSON object a line.

Whatever reads somebody's text goes through here: `ssa prepare`, the tasks' files, the text of an evaluation. A line ends at a line feed and
nowhere else, so U+2028, U+0085 or a carriage return inside a string stay in it. Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ssa.errors import UserError, one_line

MAX_LINE_BYTES = 16 << 20
"""A longer line is an error: its document would be encoded whole, which takes up to 300 bytes of memory a byte."""
MAX_WINDOW_BYTES = 128 << 20
"""The longest way back that compressed data may refer to, which has to be held in memory; what `zstd` itself allows by default."""
_READ_BYTES = 64 << 10
T = TypeVar("T")
_DEEP = "is not readable JSON: nested too deeply"
_BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(strict=False)  # tabs and zero bytes in a string are unambiguous


def read_objects(path: Path, make: Callable[[dict[str, Any]], T], refusal: str) -> Iterator[T]:
    """What `make` makes of the object in each line that is not blank; lone surrogates in its texts are U+FFFD.

    Args:
        make: Raises `UserError`, saying what is wrong, for an object of another shape.
        refusal: What to say of such a line, "{file}:{line} is no question of piqa"; the reason is put behind it.

    Raises:
        UserError: The file cannot be read or is damaged, or a line is too long or refused.
    """
    try:
        with path.open("rb") as raw:
            yield from objects(raw, str(path), make, refusal)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error


def objects(raw: BinaryIO, name: str, make: Callable[[dict[str, Any]], T], refusal: str) -> Iterator[T]:
    """`read_objects` for an open file; the ending of `name` says how it is compressed."""
    for lines, first_line in line_blocks(raw, name, 1 << 20, MAX_LINE_BYTES):
        for number, line in enumerate(lines.split(b"\n"), start=first_line):
            try:
                record = parse_line(line)
                made = None if record is None else make(without_surrogates(record))
            except (NotAnObjectError, UserError, RecursionError) as error:
                reason = (
                    str(error) if isinstance(error, UserError) else f"it {_DEEP if isinstance(error, RecursionError) else error}"
                )
                raise UserError(f"{refusal.format(file=name, line=number)}: {reason}") from None
            if made is not None:
                yield made


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark. Raises `UserError` where it cannot be read or is not UTF-8."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError as error:
        start = error.start + (len(_BOM) if content.startswith(_BOM) else 0)  # the codec counts from behind it
        raise UserError(not_utf8(path, start)) from error


def not_utf8(path: Path, offset: int) -> str:
    """What to say about a text file whose byte at `offset` begins no character."""
    line, left = 1, offset
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, _READ_BYTES))):
            line, left = line + chunk.count(b"\n"), left - len(chunk)
    return f"{path}:{line} is not UTF-8 at byte {offset} of the file: convert it (iconv -t utf-8)"


def line_blocks(raw: BinaryIO, name: str, chunk_bytes: int, max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(whole lines, number of the first) as chunks of `chunk_bytes` complete them; only the last line may lack its line feed.

    Raises:
        UserError: The compressed data is damaged, or what is behind the last chunk's last line feed grows beyond `max_line_bytes`.
    """
    rest: list[bytes] = []  # of a line that has begun
    held, first_line = 0, 1
    for chunk in chunks(raw, name, chunk_bytes):
        cut = chunk.rfind(b"\n") + 1
        if held + (chunk.find(b"\n") if cut else len(chunk)) > max_line_bytes:
            raise UserError(too_long(f"{name}:{first_line}", max_line_bytes))
        if not cut:
            rest.append(chunk)
            held += len(chunk)
            continue
        lines = b"".join([*rest, chunk[:cut]]) if rest else chunk[:cut]
        rest, held = [chunk[cut:]], len(chunk) - cut
        yield lines, first_line
        first_line += lines.count(b"\n")
    if held:
        yield b"".join(rest), first_line


def too_long(place: str, max_line_bytes: int) -> str:
    return f"{place} is longer than {max_line_bytes:,} bytes: cut it into documents, or let ssa prepare read it with --max-line-bytes"


class NotAnObjectError(Exception):
    """A line that is no JSON object; says what it is instead, beginning with a verb."""


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object; None for a blank line. Raises `NotAnObjectError`."""
    line = line.removeprefix(_BOM)  # anywhere, since files may have been joined
    if not line.strip():
        return None
    try:
        record = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise NotAnObjectError(f"is not UTF-8 at byte {error.start} of the line: convert it (iconv -t utf-8)") from None
    except json.JSONDecodeError as error:
        raise NotAnObjectError(f"is not JSON: {error}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise NotAnObjectError(f"is not readable JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise NotAnObjectError(_DEEP) from None
    if not isinstance(record, dict):
        raise NotAnObjectError("is not a JSON object: each line must be one, with a text in a field")
    return record


def without_surrogates(value: Any) -> Any:
    """A text, or the texts in lists and objects, with lone surrogates (broken JSON escapes, which UTF-8 cannot hold) replaced by U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(one) for key, one in value.items()}
    return value


def chunks(raw: BinaryIO, name: str, size: int) -> Iterator[bytes]:
    """The content in chunks of `size` bytes (the last may be shorter), decompressed as the ending of `name` says.

    Raises:
        UserError: The data is damaged, cut off or followed by something else, or refers further back than `MAX_WINDOW_BYTES`.
    """
    pieces = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}.get(Path(name).suffix, _plain)(raw)
    out = bytearray()
    try:
        for piece in pieces:
            out += piece
            while len(out) >= size:
                yield bytes(out[:size])
                del out[:size]
    except ModuleNotFoundError:
        raise UserError(f'{name} needs zstandard: pip install "sparse-sparse-attention[data]"') from None
    except _WindowError:
        raise UserError(
            f"{name} was compressed with a window of more than {MAX_WINDOW_BYTES >> 20} MiB, which would have to be held in memory: compress it "
            "again without --long or a large dictionary"
        ) from None
    except (EOFError, _DamagedError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{name} is damaged: {one_line(error)}") from error
    if out:
        yield bytes(out)


class _DamagedError(Exception):
    """Compressed data that is none."""


class _WindowError(Exception):
    """Compressed data that would need more memory than `MAX_WINDOW_BYTES`."""


def _plain(raw: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while piece := raw.read(_READ_BYTES):
        yield piece


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        yield from _plain(file)
    if not raw.tell():
        raise _DamagedError("it is empty")


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    """All streams, whatever padding is between them; the standard library takes padding for the end."""
    data = _exactly(raw, 1) + raw.read(_READ_BYTES)
    while data:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES + (1 << 20))
        while not stream.eof:
            if stream.needs_input:
                data = data or _exactly(raw, 1) + raw.read(_READ_BYTES)
            try:
                yield stream.decompress(data, _READ_BYTES)
            except lzma.LZMAError as error:
                if "limit" in str(error):
                    raise _WindowError from None
                raise
            data = b""
        data, padding = stream.unused_data or raw.read(_READ_BYTES), 0
        while data and not data.strip(b"\0"):
            padding += len(data)
            data = raw.read(_READ_BYTES)
        zeros = padding + len(data) - len(data.lstrip(b"\0"))
        if zeros % 4:
            raise _DamagedError(f"{zeros} zero bytes between or behind its streams are no padding")
        data = data.lstrip(b"\0")


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """All frames, block by block: a block makes 128 KiB at most, and a frame that is cut off does not go unnoticed."""
    import zstandard

    magic = _exactly(raw, 4)
    try:
        while magic:
            if magic[0] & 0xF0 == 0x50 and magic[1:] == b"\x2a\x4d\x18":  # a frame for somebody else
                left = int.from_bytes(_exactly(raw, 4), "little")
                while left:
                    left -= len(_exactly(raw, min(left, _READ_BYTES)))
            else:
                header = magic + _exactly(raw, 1)
                header += _exactly(raw, zstandard.frame_header_size(header) - len(header))
                about = zstandard.get_frame_parameters(header)
                if about.window_size > MAX_WINDOW_BYTES:
                    raise _WindowError
                frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
                frame.decompress(header)
                last = 0
                while not last:
                    block = _exactly(raw, 3)
                    number = int.from_bytes(block, "little")
                    last, kind, size = number & 1, number >> 1 & 3, number >> 3
                    yield frame.decompress(block + _exactly(raw, 1 if kind == 1 else size))  # 1: one byte, repeated
                if about.has_checksum:
                    frame.decompress(_exactly(raw, 4))
            magic = raw.read(4)
    except zstandard.ZstdError as error:
        raise _DamagedError(str(error)) from error


def _exactly(raw: BinaryIO, count: int) -> bytes:
    data = raw.read(count)
    if len(data) < count:
        raise EOFError("it ends in the middle of its compressed data" if raw.tell() else "it is empty")
    return data
