"""From which context on sparse decoding is no slower than full, by measurement: `mode = "auto"` reads everything up to there and the chosen blocks
beyond. What the package ships was measured on an H200; `ssa bench decode --model ... --save` writes this device's beside it. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssa.errors import UserError, one_line
from ssa.files import write_atomically

SHIPPED = Path(__file__).with_name("crossovers.json")


@dataclass(frozen=True)
class Crossover:
    """Of one device, shape of a layer's heads, budget and number of rows."""

    device: str
    heads: int
    kv_heads: int
    head_dim: int
    budget: str
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
    wanted = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, str(config.budget))

    def distance(one: Crossover) -> tuple[int, int]:
        shape = (one.heads, one.kv_heads, one.head_dim, one.budget)
        return sum(a != b for a, b in zip(shape, wanted, strict=True)), abs(one.batch.bit_length() - batch.bit_length())

    mine = [one for one in _read(cache_file()) if one.device == device]
    known = mine or _read(SHIPPED)
    best = min(known, key=distance)
    here = "" if best.device == device else f"; measured on {best.device}, `ssa bench decode --model --save` measures this device"
    shape = "" if not distance(best)[0] else f" for {best.heads}/{best.kv_heads} heads of {best.head_dim}, {best.budget}"
    if best.tokens is None:
        return Auto(float("inf"), f"auto: full{shape}{here}")
    return Auto(best.tokens, f"auto: sparse from {best.tokens} tokens on{shape}{here}")


def _key(one: Crossover) -> tuple[Any, ...]:
    return (one.device, one.heads, one.kv_heads, one.head_dim, one.budget, one.batch)


def _read(path: Path) -> list[Crossover]:
    if not path.exists():
        return []
    try:
        return [Crossover(**one) for one in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no measurements ({one_line(error)}): delete it, or measure anew") from None
