"""The bars of training, computed from the rows of `ssa bench train`. Imports no torch."""

from __future__ import annotations

from typing import Any

from ssa.bench.report import Bar

RATIOS = (("ssa", "full", 0.88), ("ssa", "moba", 0.92), ("full", "llama", 1.05))
"""Tokens a second of the first over the second's, on plain rows of one rank."""
TWO_RANKS = 1.85


def train_bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Every bar, with None for what was not measured; FSDP2's, at its faster setting, for each method that ran on two ranks."""
    speed: dict[tuple[str, str, int, str], float] = {}
    for row in rows:
        if "error" not in row and row.get("context_parallel", 1) == 1:
            key = (row["variant"], row["rows"], row["ranks"], row["parallel"])
            speed[key] = max(row["tokens_per_second"], speed.get(key, 0.0))

    def ratio(over: tuple[str, str, int, str], under: tuple[str, str, int, str]) -> float | None:
        return speed[over] / speed[under] if over in speed and under in speed else None

    bars = [
        Bar(f"{over}'s tokens/s / {under}'s, plain rows", bar, ratio((over, "plain", 1, "none"), (under, "plain", 1, "none")))
        for over, under, bar in RATIOS
    ]
    both = [(variant, layout) for variant, layout, ranks, parallel in speed if (ranks, parallel) == (2, "fsdp")]
    for variant, layout in both or [("ssa", "plain")]:
        value = ratio((variant, layout, 2, "fsdp"), (variant, layout, 1, "none"))
        bars.append(Bar(f"{variant}, {layout} rows, FSDP2 on two ranks: tokens/s / one rank's", TWO_RANKS, value))
    return bars
