"""From which context on sparse decoding is no slower than full, by measurement: `mode = "auto"` reads everything up to there and the chosen blocks
beyond. What the package ships was measured on an H200; `ssa bench decode --model ... --save` writes this device's beside it. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssa.errors import UserError, one_line
from ssa.files import write_atomically

SHIPPED = Path(__file__).with_name("crossovers.json")


class Shape(NamedTuple):
    """A layer's heads and what a query reads."""

    heads: int
    kv_heads: int
    head_dim: int
    budget: str

    @classmethod
    def of(cls, config: Any) -> Shape:
        return cls(config.num_attention_heads, config.num_key_value_heads, config.head_dim, str(config.budget))


@dataclass(frozen=True)
class Crossover:
    """Of one device, shape and number of rows."""

    device: str
    shape: Shape
    batch: int
    tokens: int | None
    """The shortest measured context from which on sparse steps are no slower; None: they were slower in the longest, too."""


@dataclass(frozen=True)
class Auto:
    """What mode auto goes by."""

    tokens: float
    """Sparse from so many cached tokens on."""
    why: str
    """In words, for a summary."""


def cache_file() -> Path:
    """This user's measurements."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssa" / "crossovers.json"


def save_crossovers(found: Sequence[Crossover]) -> Path:
    """Adds them to this user's, in the place of older ones of the same; returns the file."""
    path = cache_file()
    fresh = {_key(one): one for one in [*_read(path), *found]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(one) for one in fresh.values()], indent=1) + "\n")
    return path


def auto_for(device: str, config: Any, batch: int) -> Auto:
    """The measurement that is nearest to a model of this configuration with `batch` rows: this user's of this device before the shipped one,
    the same heads and budget before others, then the nearest number of rows."""
    wanted = Shape.of(config)

    def distance(one: Crossover) -> tuple[int, int]:
        return sum(a != b for a, b in zip(one.shape, wanted, strict=True)), abs(one.batch.bit_length() - batch.bit_length())

    mine = [one for one in _read(cache_file()) if one.device == device]
    known = mine or _read(SHIPPED)
    best = min(known, key=distance)
    here = "" if best.device == device else f"; measured on {best.device}, `ssa bench decode --model --save` measures this device"
    shape = (
        ""
        if not distance(best)[0]
        else f" (of {best.shape.heads}/{best.shape.kv_heads} heads of {best.shape.head_dim}, {best.shape.budget})"
    )
    if best.tokens is None:
        return Auto(float("inf"), f"auto: full{shape}{here}")
    return Auto(best.tokens, f"auto: sparse from {best.tokens} tokens on{shape}{here}")


def _key(one: Crossover) -> tuple[Any, ...]:
    return one.device, one.shape, one.batch


def _read(path: Path) -> list[Crossover]:
    if not path.exists():
        return []
    try:
        return [
            Crossover(one["device"], Shape(*one["shape"]), one["batch"], one["tokens"]) for one in json.loads(path.read_text())
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no measurements ({one_line(error)}): delete it, or measure anew") from None
