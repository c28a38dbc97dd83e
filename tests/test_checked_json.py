"""JSON that anybody may have written."""

import json
import os
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from ssa import checked_json
from ssa.checked_json import parse_json, read_json, typed
from ssa.errors import UserError


class Needed(TypedDict):
    bytes: int


class Stored(Needed, total=False):
    note: str


@dataclass(frozen=True)
class Shard:
    name: str
    span: tuple[int, int] = (0, 0)


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (3, int, 3),
        (3, float, 3.0),
        (None, int | None, None),
        ("a", Literal["a", "b"], "a"),
        ([1, 2], list[int], [1, 2]),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ({"x": {"bytes": 3, "more": [1]}}, dict[str, Stored], {"x": {"bytes": 3, "more": [1]}}),
        ({"name": "s", "span": [1, 2]}, Shard, Shard("s", (1, 2))),
        ({"name": "s"}, Shard | None, Shard("s")),
        ([{}, 3, None], list[Any], [{}, 3, None]),
    ],
)
def test_what_is_of_the_type_comes_back(value, hint, expected):
    found = typed(value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, hint, message",
    [
        (True, int, "it = True is not int"),
        (3.0, int, "it = 3.0 is not int"),
        ("3", float, "it = '3' is not float"),
        (1, Literal["a", "b"], "it = 1 is not 'a' or 'b'"),
        (True, Literal[1], "it = True is not 1"),
        ([1, "x"], list[int], "it[1] = 'x' is not int"),
        ([1], tuple[int, int], "it = [1] is not tuple"),
        ({"x": {"bytes": {}}}, dict[str, Stored], "it.x.bytes = {} is not int"),
        ({"x": {}}, dict[str, Stored], "it.x.bytes is missing"),
        ({"bytes": 1, "note": 2}, Stored, "it.note = 2 is not str"),
        ({"name": "s", "odd": 1}, Shard, "it.odd is not known"),
        ({"odd": 1}, Shard | None, "it.odd is not known"),
        (3, Stored, "it = 3 is not an object"),
        ({"a\nb\x1b": "x"}, dict[str, int], r"it.'a\nb\x1b' = 'x' is not int"),
        ("x" * 999, int, "it = '" + "x" * 79 + " is not int"),
    ],
)
def test_what_is_not_is_named(value, hint, message):
    with pytest.raises(UserError) as caught:
        typed(value, hint, "it")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        ('{"a": NaN}', "a number is not finite, or too large"),
        ('{"a": [{"b": -Infinity}]}', "a number is not finite, or too large"),
        ('{"a": 1e999}', "a number is not finite, or too large"),
        ('{"a": ' + "9" * 400 + "}", "a number is not finite, or too large"),
        ('{"a":' * 70 + "1" + "}" * 70, "more than 64 levels"),
        ("[1]", "is not an object"),
    ],
)
def test_what_is_beyond_the_bounds_is_one_line_with_the_files_name(tmp_path, text, why):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=why) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_numbers_may_be_bounded_more_or_less():
    assert parse_json('{"a": 1e308, "b": ' + "9" * 300 + "}", "it")["a"] == 1e308
    assert parse_json('{"a": [NaN, Infinity]}', "it", largest=None)["a"][1] == float("inf")
    for text in ('{"a": -1e101}', '{"a": NaN}', '{"a": ' + "9" * 102 + "}"):
        with pytest.raises(UserError, match="it cannot be read: a number"):
            parse_json(text, "it", largest=1e100)


def test_only_regular_files_of_a_size_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("pipe", "no regular file"), ("none", "No such file"), (".", "no regular file")):
        with pytest.raises(UserError, match=why):
            read_json(tmp_path / name)
    (tmp_path / "long.json").write_text(json.dumps({"a": "x" * 100}))
    assert len(read_json(tmp_path / "long.json")["a"]) == 100
    monkeypatch.setattr(checked_json, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="109 bytes, more than"):
        read_json(tmp_path / "long.json")
    with pytest.raises(UserError, match="it is longer"):
        parse_json(" " * 101, "it")
