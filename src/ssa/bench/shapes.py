"""The shapes of attention that are measured: heads, a budget and who chooses, written "32/2/64:16x16" or "32/2/64:16x16@head"."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ssa.budget import Budget, Scope, Selection
from ssa.errors import UserError

PAPER_HEADS = "32/2/64"


@dataclass(frozen=True)
class Shape:
    """Query heads, kv heads, head size, what a query may read, and whether every query head chooses it or those of a kv head together."""

    heads: int
    kv_heads: int
    head_dim: int
    budget: Budget
    scope: Scope = "group"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "32/8/128:16x64", "16x16" alone for the paper's heads, 32/2/64; with "@head" every query head chooses.

        Raises:
            UserError: anything else, or query heads that are no multiple of the kv heads.
        """
        whole, _, scope = text.strip().partition("@")
        heads, colon, budget = whole.rpartition(":")
        found = re.fullmatch(r"(\d+)/(\d+)/(\d+)", heads if colon else PAPER_HEADS)
        if not found:
            raise UserError(
                f"shape {text!r} is not HEADS/KV_HEADS/SIZE:BLOCKSxSIZE; write e.g. 32/8/128:16x64, or 16x16 for 32/2/64"
            )
        if "@" in text and scope != "head" and scope != "group":
            raise UserError(f"shape {text!r}: who chooses is {scope!r}; write @head, @group or nothing, which is @group")
        shape = cls(int(found[1]), int(found[2]), int(found[3]), Budget.parse(budget), "head" if scope == "head" else "group")
        if not shape.kv_heads or not shape.head_dim or shape.heads % shape.kv_heads or not shape.heads:
            raise UserError(f"shape {text!r}: the query heads must be a multiple of the kv heads, and none of the three 0")
        return shape

    @property
    def dense(self) -> tuple[int, int, int]:
        """What dense attention sees of it."""
        return self.heads, self.kv_heads, self.head_dim

    @property
    def selection(self) -> Selection:
        """How many blocks are chosen, and by whom."""
        return Selection(self.budget.num_selected_blocks, self.budget.block_size, scope=self.scope)

    def __str__(self) -> str:
        chooser = "@head" if self.scope == "head" else ""
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}:{self.budget}{chooser}"


def parse_list(text: str, flag: str) -> list[str]:
    """The parts of a comma-separated list; none at all is an error."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{flag} {text!r} names nothing")
    return parts


def parse_tokens(text: str) -> list[int]:
    """ "8192,32k" -> [8192, 32768], ascending."""
    lengths = []
    for part in parse_list(text, "--tokens"):
        found = re.fullmatch(r"(\d+)([kK]?)", part)
        if not found or not int(found[1]):
            raise UserError(f"--tokens {part!r} is not a length; write e.g. 8192 or 32k")
        lengths.append(int(found[1]) * (1024 if found[2] else 1))
    return sorted(set(lengths))


def draw(
    shape: Shape, tokens: int, device: str | torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded normal q [1, T, H, D], k and v [1, T, K, D] that require gradients."""
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(heads: int) -> torch.Tensor:
        x = torch.randn(1, tokens, heads, shape.head_dim, generator=generator, device=device, dtype=torch.float32)
        return x.to(dtype).requires_grad_()

    return normal(shape.heads), normal(shape.kv_heads), normal(shape.kv_heads)
