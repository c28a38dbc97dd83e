"""What the paper says of full, sparse-only and SSA training (its abstract, and of entropy its Table A15), judged from three toy runs.

A claim is judged by one number, a difference that is negative where the claim is true. Below the margin it decides nothing. Margins are
about what another seed changes at this size: benchmarks/results/h200/tiny-grid.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

HOLDS, FAILS, OPEN = "holds", "does not hold here", "cannot be judged at this size"

SAME_MODEL = 0.002
"""Nats: between two budgets of one model on the same text."""
OTHER_MODEL = 0.03
"""Nats: between models."""
MASS = 0.03
"""Of attention mass, and of the relative error of an output."""
BITS = 0.3
"""Of entropy."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, what the runs gave, and how that speaks to it."""

    claim: str
    here: str
    verdict: str


def judge_claims(figures: Mapping[str, Mapping[str, Any]], budgets: Sequence[str]) -> list[Claim]:
    """The claims; those that such runs cannot speak to come last.

    Args:
        figures: For "full", "moba" and "ssa" what `ssa.demo.demo_figures` lists.
        budgets: Smallest first; the last is what the sparse models were trained on.
    """
    full, moba, ssa = (figures[method] for method in ("full", "moba", "ssa"))
    trained = budgets[-1]
    loss = {method: each["loss_nats"] for method, each in figures.items()}

    def name(budget: str) -> str:
        return f"read {'full' if budget == 'full' else f'at {budget}'}"

    def of_all(form: str, key: str) -> str:
        return ", ".join(f"{method} {format(each[key], form)}" for method, each in figures.items())

    def losses_at(budget: str) -> str:
        return f"loss {name(budget)}: " + ", ".join(f"{method} {nats[budget]:.4f}" for method, nats in loss.items())

    def behind(budget: str) -> float:
        return loss["ssa"][budget] - min(loss["full"][budget], loss["moba"][budget])

    path = [*budgets, "full"]
    worst = max(loss["ssa"][more] - loss["ssa"][less] for less, more in pairwise(path))
    points, above = (sum(each[key] for each in figures.values()) for key in ("points", "points_above_bound"))
    return [
        Claim(
            "A model trained with full attention gets worse when it is read sparse (the attention gap).",
            "loss of full: " + ", ".join(f"{loss['full'][b]:.4f} {name(b)}" for b in reversed(path)),
            _judge(loss["full"]["full"] - loss["full"][trained], SAME_MODEL),
        ),
        Claim(
            "A model trained with sparse attention only, read full, stays behind one trained with full attention (the capability gap).",
            losses_at("full"),
            _judge(loss["full"]["full"] - loss["moba"]["full"], OTHER_MODEL),
        ),
        Claim(
            "Training with sparse attention only makes attention less sparse than full training does.",
            f"mass in the selected blocks, read full: {of_all('.3f', 'kept_mass_full')}",
            _judge(moba["kept_mass_full"] - full["kept_mass_full"], MASS),
        ),
        Claim(
            "The error of sparse attention is bounded by the attention mass that it drops (Theorem 1).",
            f"{above} of {points:,} outputs lie above the bound",
            FAILS if above else HOLDS,
        ),
        Claim(
            "SSA drops the least attention mass.",
            f"mass in the selected blocks, read sparse: {of_all('.3f', 'kept_mass')}",
            _judge(max(full["kept_mass"], moba["kept_mass"]) - ssa["kept_mass"], MASS),
        ),
        Claim(
            "SSA's sparse attention is the closest to its full attention.",
            f"relative difference of the outputs: {of_all('.2f', 'output_error')}",
            _judge(ssa["output_error"] - min(full["output_error"], moba["output_error"]), MASS),
        ),
        Claim(
            "SSA's attention is the narrowest.",
            f"entropy in bits, read full: {of_all('.2f', 'entropy_bits')}",
            _judge(ssa["entropy_bits"] - min(full["entropy_bits"], moba["entropy_bits"]), BITS),
        ),
        Claim("SSA is the best model when it is read full.", losses_at("full"), _judge(behind("full"), OTHER_MODEL)),
        *(
            Claim(f"SSA is the best model when it is read sparse ({b}).", losses_at(b), _judge(behind(b), OTHER_MODEL))
            for b in reversed(budgets)
        ),
        Claim(
            "SSA gets better with every block more that it may read, up to all.",
            "loss of ssa: " + ", ".join(f"{loss['ssa'][b]:.4f} {name(b)}" for b in path),
            FAILS if worst > SAME_MODEL else _judge(loss["ssa"]["full"] - loss["ssa"][budgets[0]], SAME_MODEL),
        ),
        Claim("SSA answers the questions of common benchmarks best.", "not asked: a model of 0.7M parameters that reads bytes", OPEN),
        Claim("SSA goes on best beyond the length it was trained on.", "not asked: trained on 512 bytes for minutes", OPEN),
    ]  # fmt: skip


def _judge(difference: float, margin: float) -> str:
    return OPEN if abs(difference) <= margin else HOLDS if difference < 0 else FAILS
