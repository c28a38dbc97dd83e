"""JSON that anybody may have written: bounded in size, depth and numbers, and of the type that the reader needs. Imports no torch."""

from __future__ import annotations

import functools
import json
import stat
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ssa.errors import UserError, one_line

MAX_BYTES = 64 << 20
"""A larger file is no configuration, index or result of ours."""
MAX_DEPTH = 64
"""Lists and objects inside each other."""
_MAX_FLOAT = sys.float_info.max


def read_json(path: Path, hint: Any = dict[str, Any]) -> Any:
    """The value in the file `path`, which `typed` takes for a `hint`; by default an object with whatever is in it.

    Raises:
        UserError: One line that names the file: no regular file, more than `MAX_BYTES`, no JSON, nested deeper than `MAX_DEPTH`, a number
            that is not finite or too large for a float, or another type.
    """
    return parse_json(read_bytes(path), str(path), hint)


def read_bytes(path: Path) -> bytes:
    """All of a file of at most `MAX_BYTES`. Raises `UserError` as `read_json` does."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device may have no end
            raise UserError(f"{path} cannot be read: it is no regular file")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{path} cannot be read: it has {status.st_size:,} bytes, more than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def parse_json(text: str | bytes, source: str, hint: Any = dict[str, Any], largest: float | None = _MAX_FLOAT) -> Any:
    """The value that `text` is, checked as `read_json` does.

    Args:
        source: What to call it in errors.
        largest: The largest number, whatever its sign. None also admits NaN and the infinities, which Python writes and JSON does not know.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source} cannot be read: it is longer than {MAX_BYTES >> 20} MiB")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read: it is not JSON ({one_line(error)})") from None
    if wrong := _beyond(value, largest):
        raise UserError(f"{source} cannot be read: {wrong}")
    try:
        return typed(value, hint)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _beyond(value: Any, largest: float | None) -> str:
    """Which bound `value` exceeds; "" for none."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for x in level:
            if isinstance(x, dict):
                below += x.values()
            elif isinstance(x, list):
                below += x
            elif isinstance(x, float) and largest is None:
                continue
            elif isinstance(x, int | float) and not abs(x) <= (
                _MAX_FLOAT if largest is None else largest
            ):  # NaN is not <= anything
                return "a number is not finite, or too large"
        if not below:
            return ""
        level = below
    return f"it has more than {MAX_DEPTH} levels of nesting"


def typed(value: Any, hint: Any, name: str = "") -> Any:
    """`value`, as JSON or TOML gave it, as a `hint`.

    Args:
        hint: int, float (from whole numbers, too), bool, str, None, Any, a `Literal`, a union, list[X], tuple[X, Y], tuple[X, ...],
            dict[str, X], a `TypedDict` (further keys are left as they are) or a dataclass (further keys are an error).
        name: What to call the value, e.g. "train.steps".

    Raises:
        UserError: It is none; the message names the part that is not.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (hint in (None, NoneType) and value is None) or (hint in (int, float, bool, str) and type(value) is hint):
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} is an integer too large for a float") from None
    if origin in (Union, UnionType):
        for choice in arguments:
            try:
                return typed(value, choice, name)
            except UserError as error:
                # of an object that lacks something, what it lacks says more than what it is not
                if isinstance(value, dict) and (is_typeddict(choice) or is_dataclass(choice)):
                    raise error
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if isinstance(value, list):
        if origin is list:
            return [typed(x, arguments[0], f"{name}[{i}]") for i, x in enumerate(value)]
        if origin is tuple and arguments[-1] is ...:
            return tuple(typed(x, arguments[0], f"{name}[{i}]") for i, x in enumerate(value))
        if origin is tuple and len(arguments) == len(value):
            return tuple(typed(x, kind, f"{name}[{i}]") for i, (x, kind) in enumerate(zip(value, arguments, strict=True)))
    if isinstance(value, dict):
        if origin is dict:
            return {key: typed(x, arguments[1], _joined(name, key)) for key, x in value.items()}
        if is_typeddict(hint) or is_dataclass(hint):
            return _record(value, hint, name)
    wanted = " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    if is_typeddict(hint) or is_dataclass(hint) or hint == dict[str, Any]:
        wanted = "an object"
    raise UserError(f"{f'{name} = ' if name else 'its content '}{one_line(repr(value))[:80]} is not {wanted}")


def _record(value: dict[str, Any], hint: Any, name: str) -> Any:
    hints = _hints(hint)
    make: Any = hint if is_dataclass(hint) else dict
    if is_dataclass(hint):
        needed = {f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING}
        if stray := [key for key in value if key not in hints]:
            raise UserError(f"{_joined(name, stray[0])} is not known")
    else:
        needed = hint.__required_keys__
    if missing := sorted(needed - value.keys()):
        raise UserError(f"{_joined(name, missing[0])} is missing")
    return make(**{key: typed(x, hints[key], _joined(name, key)) if key in hints else x for key, x in value.items()})


@functools.cache
def _hints(hint: Any) -> dict[str, Any]:
    return get_type_hints(hint)


def _joined(name: str, key: str) -> str:
    key = one_line(key)[:60] if key.isprintable() else one_line(repr(key))[:60]
    return f"{name}.{key}" if name else key
