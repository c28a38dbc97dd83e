import gzip
import io
import json
import lzma
import tracemalloc

import pytest

from ssa.data import lines
from ssa.data.lines import chunks, line_blocks, read_objects, read_text
from ssa.errors import UserError


def objects_in(tmp_path, content, name="a.jsonl"):
    (tmp_path / name).write_bytes(content)
    return list(read_objects(tmp_path / name, lambda record: record, "{file}:{line} is nothing"))


def test_a_line_is_a_json_object_whatever_its_strings_hold(tmp_path):
    texts = [
        "tab\t",
        "zero \0 byte",
        "U+2028 \u2028 and \u2029",
        "next line \x85",
        "form feed \f and \x1c",
        "\ufeff inside",
        "漢",
    ]
    raw = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
    assert [record["text"] for record in objects_in(tmp_path, raw)] == texts
    escaped = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert [record["text"] for record in objects_in(tmp_path, escaped)] == texts


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n\n  \n',
        b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n',  # two files joined
        b'\n\t\n{"a": 1}\n\xef\xbb\xbf\n {"a": 2} \n',
    ],
)
def test_byte_order_marks_carriage_returns_and_blank_lines_are_no_content(tmp_path, content):
    assert objects_in(tmp_path, content) == [{"a": 1}, {"a": 2}]


def test_broken_escapes_become_the_replacement_character(tmp_path):
    content = rb'{"a\udc80": ["\ud83d\ude00", {"b": "\ud800x"}], "n": 1}'
    assert objects_in(tmp_path, content) == [{"a\ufffd": ["\U0001f600", {"b": "\ufffdx"}], "n": 1}]


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"text": "caf\xe9"}', "is not UTF-8 at byte 13 of the line"),
        (b"[1]", "is not a JSON object"),
        (b'"text"', "is not a JSON object"),
        (b'{"text": "a"', "is not JSON"),
        (b'{"a": 1} {"a": 2}', "is not JSON: Extra data"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"is not readable JSON: Exceeds the limit \(4300 digits\)[^;]*$"),
        (b'{"n":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not readable JSON: nested too deeply"),
        (('{"n":"é","m":' + "[" * 700 + "]" * 700 + "}").encode(), "is not readable JSON: nested too deeply"),
        ('{"text": "a"}'.encode("utf-16"), "is not UTF-8 at byte 0"),
    ],
    ids=range(9),
)
def test_any_other_line_is_an_error_that_names_it(tmp_path, line, why):
    with pytest.raises(UserError, match=rf"a\.jsonl:3 is nothing: it {why}") as error:
        objects_in(tmp_path, b'{"a": 1}\n\n' + line + b"\n")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Is a directory"):
        (tmp_path / "a.jsonl").mkdir()
        list(read_objects(tmp_path / "a.jsonl", lambda record: record, ""))
    with pytest.raises(UserError, match=r"none\.txt cannot be read: No such file"):
        read_text(tmp_path / "none.txt")


def test_whole_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc2\x85")
    assert read_text(path) == "one\r\ntwo \x85"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + b"one\ntwo\ncaf\xe9\n")
        with pytest.raises(UserError, match=rf"a\.txt:3 is not UTF-8 at byte {len(mark) + 11} of the file"):
            read_text(path)


def compressed(suffix):
    """Two parts and their content, 300 kB in all."""
    parts = [b"".join(b"%d %d\n" % (i, i * i % 977) for i in range(start, start + 15_000)) for start in (0, 10**6)]
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        made = [
            zstandard.ZstdCompressor(level=1, write_checksum=check).compress(p)
            for p, check in zip(parts, (True, False), strict=True)
        ]
    else:
        made = [{".gz": gzip.compress, ".xz": lzma.compress}[suffix](part) for part in parts]
    return made, b"".join(parts)


def read(content, suffix, size=1 << 16):
    return b"".join(chunks(io.BytesIO(content), f"a.jsonl{suffix}", size))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_data_is_read_to_its_end(suffix):
    (first, second), content = compressed(suffix)
    between = {
        ".gz": [b"", b"\0" * 5],
        ".xz": [b"", b"\0" * 4, b"\0" * (lines._READ_BYTES + 4 - len(first) % 4)],
        ".zst": [b"", b"\x5f\x2a\x4d\x18\x03\0\0\0abc", b"\x50\x2a\x4d\x18\0\0\0\0"],  # frames that decoders skip
    }
    for gap in between[suffix]:
        for end in (b"", gap):
            assert read(first + gap + second + end, suffix) == content
    assert [len(chunk) for chunk in chunks(io.BytesIO(first + second), f"a{suffix}", 50_000)][:-1] == [50_000] * (
        len(content) // 50_000
    )


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_data_that_is_cut_off_damaged_or_followed_by_something_fails(suffix):
    (first, second), content = compressed(suffix)
    whole = first + second
    ends = {0, 1, 3, 4, 5, 9, 12, len(first) - 1, len(first) + 1, len(first) + 3, len(first) + 9, len(whole) - 1, len(whole) - 5}
    for end in sorted(ends):
        with pytest.raises(UserError, match=r"^a\.jsonl\S+ is damaged: "):
            read(whole[:end], suffix)
    assert read(first, suffix) == content[: len(content) - len(read(second, suffix))]
    for more in (b"more", b"{}\n", b"\0\0\0more"):
        with pytest.raises(UserError, match="is damaged: "):
            read(whole + more, suffix)
    if suffix == ".xz":
        with pytest.raises(UserError, match="3 zero bytes between or behind its streams are no padding"):
            read(first + b"\0" * 3 + second, suffix)
    flipped = bytearray(whole)
    flipped[len(first) // 2] ^= 0x40
    with pytest.raises(UserError, match="is damaged: "):
        read(bytes(flipped), suffix)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_what_expands_a_thousandfold_is_read_in_little_memory(suffix):
    bomb = b"\n" * (64 << 20)
    made = pytest.importorskip("zstandard").compress(bomb, 19) if suffix == ".zst" else compress_fast(suffix, bomb)
    assert len(made) < len(bomb) / 200
    tracemalloc.start()
    try:
        total = sum(map(len, chunks(io.BytesIO(made), f"a{suffix}", 1 << 20)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == len(bomb) and peak < 6 << 20


def compress_fast(suffix, content):
    return gzip.compress(content, 1) if suffix == ".gz" else lzma.compress(content, preset=0)


def test_windows_that_would_have_to_be_held_are_capped(monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(lines, "MAX_WINDOW_BYTES", 4 << 20)
    parameters = zstandard.ZstdCompressionParameters(window_log=23)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wide = {".zst": stream.compress(b"text\n" * 9) + stream.flush(), ".xz": lzma.compress(b"text\n" * 9, preset=6)}
    for suffix, content in wide.items():
        with pytest.raises(UserError, match=r"^a\.jsonl\S+ was compressed with a window of more than 4 MiB"):
            read(content, suffix)
    monkeypatch.undo()
    for suffix, content in wide.items():
        assert read(content, suffix) == b"text\n" * 9


def test_blocks_are_whole_lines_and_a_line_has_a_longest_length():
    content = b"a" * 25 + b"\n\nbb\n" + b"c" * 60 + b"\n" + b"d" * 9
    for size in (1, 7, 26, 1000):
        blocks = list(line_blocks(io.BytesIO(content), "a.jsonl", size, 60))
        assert b"".join(block for block, _ in blocks) == content
        assert [first for _, first in blocks] == [1 + b"".join(b for b, _ in blocks[:i]).count(b"\n") for i in range(len(blocks))]
        assert all(block.endswith(b"\n") for block, _ in blocks[:-1])
    for size in (1, 7, 26):
        with pytest.raises(UserError, match=r"^a\.jsonl:4 is longer than 59 bytes: .*--max-line-bytes"):
            list(line_blocks(io.BytesIO(content), "a.jsonl", size, 59))
        with pytest.raises(UserError, match=r"^a\.jsonl:5 is longer than 60 bytes"):
            list(line_blocks(io.BytesIO(content + b"d" * 52), "a.jsonl", size, 60))
