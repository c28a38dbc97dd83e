"""What a query reads: blocks within a budget, or everything; and by which rule the blocks are chosen. Imports no torch."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ssa.errors import UserError

AttentionMode = Literal["sparse", "full"]
Scope = Literal["group", "head"]
Scoring = Literal["softmax", "logit"]
Rule = Literal["exact", "released"]


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
Reading: TypeAlias = Budget | Full
"""What a pass reads, in all layers or in one."""


def parse_reading(text: str | Reading) -> Reading:
    """ "4x16" -> Budget(4, 16), "full" -> FULL."""
    if isinstance(text, Full):
        return text
    return FULL if isinstance(text, str) and text.strip() == "full" else Budget.parse(text)


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
    scoring: "softmax" of the scores over the blocks, or "logit", the scores as they are.
    rule: "exact", the true top k; "released", what the authors' kernel computes.
    """

    num_selected_blocks: int
    block_size: int
    scope: Scope = "group"
    scoring: Scoring = "softmax"
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.num_selected_blocks < 1:
            raise UserError(
                f"block_size = {self.block_size} and num_selected_blocks = {self.num_selected_blocks} must be at least 1"
            )
        for name, known in (("scope", ("group", "head")), ("scoring", ("softmax", "logit")), ("rule", ("exact", "released"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.rule == "released":
            released_rule_check(self.num_selected_blocks, self.block_size)

    @property
    def budget(self) -> Budget:
        return Budget(self.num_selected_blocks, self.block_size)


def released_rule_check(num_selected_blocks: int, block_size: int) -> None:
    """The authors' kernel sorts in chunks of `block_size` blocks: k must be a power of two and at most the block size."""
    k = num_selected_blocks
    if k & (k - 1) or k > block_size:
        raise UserError(
            f"selection rule 'released' with {k} blocks of {block_size} keys does not exist: it needs a power of two <= the block size; use rule 'exact'"
        )
