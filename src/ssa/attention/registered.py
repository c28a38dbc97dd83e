"""Tensors that a method or selector holds without anybody training or saving them."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ssa.errors import UserError


def check_registered(thing: Any, what: str) -> None:
    """Raises `UserError` for a tensor or module in an attribute of `thing`, a method or a selector, that is no registered part of a model."""
    known = set()
    if isinstance(thing, nn.Module):
        known = {id(x) for x in (*thing.parameters(), *thing.buffers(), *thing.modules())}
    for name, value in vars(thing).items():
        for x in _tensors_and_modules(value, {id(thing)}):
            if id(x) not in known:
                raise UserError(
                    f"the {what} {type(thing).__name__} holds a {type(x).__name__} in {name!r} that would be neither trained nor saved: "
                    f"derive the {what} from torch.nn.Module, too, and make it a parameter, buffer or submodule"
                )


def _tensors_and_modules(value: Any, seen: set[int]) -> Iterator[Tensor | nn.Module]:
    """Those in `value`, its items and its attributes, but for what is in objects of `seen` ids."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
    elif id(value) not in seen and not isinstance(value, (type, types.FunctionType, types.ModuleType)):
        seen.add(id(value))
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()
        for x in (*items, *getattr(value, "__dict__", {}).values()):
            yield from _tensors_and_modules(x, seen)
