"""What a query reads: blocks within a budget, or everything; and by which rule the blocks are chosen. Imports no torch."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ssa.errors import UserError

AttentionMode = Literal["sparse", "full"]
Scope = Literal["group", "head"]
Scoring = Literal["softmax", "logit"]
Rule = Literal["exact", "released"]
Normaliser = Literal["exact", "coarse"]
COARSER = 4
"""With lse = "coarse" means of so many times the size, so many times as far apart, give the softmax its normaliser."""


@dataclass(frozen=True)
class Budget:
    """What one query may read: `num_selected_blocks` (k) blocks of `block_size` (s) keys, written "kxs", e.g. "4x16"."""

    num_selected_blocks: int
    block_size: int

    def __post_init__(self) -> None:
        if self.num_selected_blocks < 1 or self.block_size < 1:
            raise UserError(f"budget {self} needs at least 1 block of at least 1 key")

    @property
    def tokens(self) -> int:
        """The receptive field RF = k * s, in keys."""
        return self.num_selected_blocks * self.block_size

    def __str__(self) -> str:
        return f"{self.num_selected_blocks}x{self.block_size}"

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        if isinstance(text, Budget):
            return text
        found = isinstance(text, str) and re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
        if not found:
            raise UserError(f"budget {text!r} is not BLOCKSxSIZE; write e.g. 16x16 for 16 blocks of 16 keys")
        return cls(int(found[1]), int(found[2]))


class Full(enum.Enum):
    """Everything is read."""

    FULL = "full"

    @property
    def tokens(self) -> float:
        return math.inf

    def __str__(self) -> str:
        return self.value


FULL = Full.FULL
LayerReading: TypeAlias = Budget | Full
"""What a layer reads."""


def parse_layer_reading(text: str | LayerReading) -> LayerReading:
    """ "4x16" -> Budget(4, 16), "full" -> FULL."""
    if isinstance(text, Full):
        return text
    return FULL if isinstance(text, str) and text.strip() == "full" else Budget.parse(text)


@dataclass(frozen=True)
class LayerBudgets:
    """What sparse attention reads in each layer, where layers differ: a `Budget`, or `FULL`, for each of them.

    Written "tuned-11.3x16" after the mean over the layers that have a budget, "tuned-11.3x16+2full" where two others read everything,
    and "tuned-180.5" after the mean number of keys where block sizes differ. That names the budgets in tables and files and does not say
    them: those are in the model's configuration.
    """

    readings: tuple[LayerReading, ...]

    def __post_init__(self) -> None:
        if not self.readings:
            raise UserError("budgets for each layer name no layer; give one for each")

    @classmethod
    def parse(cls, readings: Sequence[str | LayerReading]) -> LayerBudgets:
        """["4x16", "full"] -> LayerBudgets((Budget(4, 16), FULL))."""
        return cls(tuple(parse_layer_reading(reading) for reading in readings))

    def __iter__(self) -> Iterator[LayerReading]:
        return iter(self.readings)

    def __len__(self) -> int:
        return len(self.readings)

    @property
    def budgets(self) -> list[Budget]:
        """Of the layers that have one."""
        return [reading for reading in self.readings if isinstance(reading, Budget)]

    @property
    def tokens(self) -> float:
        """The mean receptive field in keys, infinite where a layer reads everything."""
        return sum(reading.tokens for reading in self.readings) / len(self.readings)

    def __str__(self) -> str:
        budgets, sizes = self.budgets, {budget.block_size for budget in self.budgets}
        full = f"{len(self) - len(budgets)}full" if len(budgets) < len(self) else ""
        if not budgets:
            return f"tuned-{full}"
        unit, size = (next(iter(sizes)), f"x{next(iter(sizes))}") if len(sizes) == 1 else (1, "")
        mean = f"{sum(budget.tokens for budget in budgets) / len(budgets) / unit:.1f}".removesuffix(".0")
        return f"tuned-{mean}{size}" + (f"+{full}" if full else "")


def tokens_of(name: str) -> float:
    """The receptive field in keys of a reading by its name in tables and files: "4x16", "full", or that of a model's `LayerBudgets`."""
    found = re.fullmatch(r"tuned-(?:(\d+(?:\.\d)?)(?:x(\d+))?(?:\+(?=\d))?)?(\d+full)?(?<!-)", name)
    if not found:
        return parse_layer_reading(name).tokens
    return math.inf if found[3] else round(float(found[1]) * int(found[2] or 1), 1)


Reading: TypeAlias = LayerReading | LayerBudgets
"""What a pass reads."""


def parse_reading(text: str | Reading) -> Reading:
    """As `parse_layer_reading`; budgets for each layer stay what they are."""
    return text if isinstance(text, LayerBudgets) else parse_layer_reading(text)


def parse_readings(text: str) -> list[Reading]:
    """ "4x16,16x16,full" -> [Budget(4, 16), Budget(16, 16), FULL]."""
    readings = [parse_reading(part) for part in text.split(",") if part.strip()]
    if not readings:
        raise UserError(f"budgets {text!r} names none; write e.g. 4x16,16x16,full")
    return readings


@dataclass(frozen=True)
class Selection:
    """How blocks are chosen and how many; checked when it is made.

    num_selected_blocks, block_size: the budget.
    scope: "group" chooses for the query heads that share a kv head, "head" for each query head.
    scoring: "softmax" of the scores over the means, or "logit", the scores as they are.
    rule: "exact", the true top k; "released", what the authors' kernel computes.
    mean_size, mean_stride: a block scores the best of the means that touch it; means of `mean_size` keys start every `mean_stride` keys
        of a document. 0: each block has one mean, its own. Others are windows, as InfLLM-V2 has them.
    sink_blocks, local_blocks: the first blocks of a document, and those right before the query's own, which are read whatever they score.
    query_blocks: so many of the rest go by score, the others by importance (NOSA); None: all go by score.
    lse: "exact" normalises the softmax over the windows, "coarse" by means of 4 times the size, 4 times as far apart (InfLLM-V2).
    dense_length: queries at positions below it read everything.
    """

    num_selected_blocks: int
    block_size: int
    scope: Scope = "group"
    scoring: Scoring = "softmax"
    rule: Rule = "exact"
    mean_size: int = 0
    mean_stride: int = 0
    sink_blocks: int = 0
    local_blocks: int = 0
    query_blocks: int | None = None
    lse: Normaliser = "exact"
    dense_length: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.num_selected_blocks < 1:
            raise UserError(
                f"block_size = {self.block_size} and num_selected_blocks = {self.num_selected_blocks} must be at least 1"
            )
        for name, known in (
            ("scope", ("group", "head")), ("scoring", ("softmax", "logit")), ("rule", ("exact", "released")), ("lse", ("exact", "coarse")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("mean_size", "mean_stride", "sink_blocks", "local_blocks", "query_blocks", "dense_length"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} = {value} must not be negative")
        if self.rule == "released":
            released_rule_check(self.num_selected_blocks, self.block_size)
        if not self.mean_size:
            given = (self.mean_stride, self.sink_blocks, self.local_blocks, self.query_blocks, self.lse, self.dense_length)
            if given != (0, 0, 0, None, "exact", 0):
                raise UserError("sinks, local blocks and what else windows have need mean_size and mean_stride")
        else:
            self._check_windows()

    def _check_windows(self) -> None:
        size, stride, block = self.mean_size, self.mean_stride, self.block_size
        per_block = block // stride if stride else 0
        if not stride or block % stride or size % stride or per_block not in (1, 2, 4, 8, 16, 32, 64):
            raise UserError(
                f"mean_stride = {stride} must divide mean_size = {size} and block_size = {block}, the latter in 1, 2, 4, ... or 64 parts"
            )
        if size - stride > block:
            raise UserError(
                f"mean_size = {size}: a window that starts in a block may end in the next, not beyond it; at most {block + stride}"
            )
        if self.local_blocks * block < size - stride:
            raise UserError(f"local_blocks = {self.local_blocks}: windows of {size} keys, one every {stride}, need at least 1")
        if self.rule == "released":
            raise UserError("selection rule 'released' knows no windows; use rule 'exact'")
        if self.num_selected_blocks < self.least_blocks:
            by_query = f" + {self.query_blocks} by query" if self.query_blocks else ""
            raise UserError(
                f"budget {self.budget} is less than what is always read: {self.sink_blocks} sinks + {self.local_blocks} local{by_query} + the "
                f"query's own block; give at least {self.least_blocks}x{block}"
            )

    @property
    def budget(self) -> Budget:
        return Budget(self.num_selected_blocks, self.block_size)

    @property
    def windows_per_block(self) -> int:
        """Means that start in a block."""
        return self.block_size // self.mean_stride if self.mean_size else 1

    @property
    def windows_before(self) -> int:
        """Means that start before a block and touch it."""
        return self.mean_size // self.mean_stride - 1 if self.mean_size else 0

    @property
    def forced_blocks(self) -> int:
        """Read whatever they score, the query's own among them."""
        return self.sink_blocks + self.local_blocks + 1

    @property
    def least_blocks(self) -> int:
        """The smallest budget that holds what is always read."""
        return self.forced_blocks + (self.query_blocks or 0)

    @property
    def places(self) -> int:
        """The most blocks of a query: its budget, or what a query right before `dense_length` reads."""
        return max(self.num_selected_blocks, -(-self.dense_length // self.block_size))

    def num_windows(self, tokens: int, coarser: int = 1) -> int:
        """Complete means of a document's first `tokens` tokens, or of means `coarser` times as large."""
        return num_windows(tokens, coarser * (self.mean_size or self.block_size), coarser * (self.mean_stride or self.block_size))


def num_windows(tokens: int, size: int, stride: int) -> int:
    """Windows of `size` tokens, one every `stride`, that end within so many tokens."""
    return max(0, tokens - size + stride) // stride


def released_rule_check(num_selected_blocks: int, block_size: int) -> None:
    """The authors' kernel sorts in chunks of `block_size` blocks: k must be a power of two and at most the block size."""
    k = num_selected_blocks
    if k & (k - 1) or k > block_size:
        raise UserError(
            f"selection rule 'released' with {k} blocks of {block_size} keys does not exist: it needs a power of two <= the block size; use rule 'exact'"
        )
