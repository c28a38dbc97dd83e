"""The figures that stand for a run in a table, the same on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssa.analysis.results import Losses, RunResults, losses

_Best = Callable[[list[float]], float] | None

ROWS: tuple[tuple[str, str, str, _Best], ...] = (
    ("loss_full", "loss, full attention (nats)", ".4f", None),
    ("loss_sparse", "loss, sparse attention (nats)", ".4f", None),
    ("gap", "gap, sparse − full (nats)", "+.4f", lambda gaps: min(gaps, key=abs)),
    ("kl", "KL(full ‖ sparse) (nats)", ".4f", min),
    ("agreement", "same most likely token", ".3f", max),
    ("kept_sparse", "kept mass, sparse inference", ".3f", max),
    ("kept_full", "kept mass, full inference", ".3f", max),
    ("entropy", "entropy of attention (bits)", ".2f", None),
    ("sink", "mass on the first token", ".3f", None),
)
"""(key of `table_values`, heading, format, which of several runs' values is the best)."""


def table_values(run: RunResults, loss: Losses) -> dict[str, float]:
    """The figures of a run, `loss` from `ssa.analysis.results.losses`."""
    sparse, full, predictions = run.means("sparse"), run.means("full"), run.predictions
    return {
        "loss_full": loss.full, "loss_sparse": loss.sparse, "gap": loss.gap,
        "kept_sparse": sparse["kept_mass"], "kept_full": full["kept_mass"], "entropy": full["entropy_bits"],
        "kl": predictions["kl_nats"], "agreement": predictions["top1_agreement"], "sink": full["sink_mass_first"],
    }  # fmt: skip


def table_rows(results: Sequence[RunResults]) -> list[tuple[str, list[str], int | None]]:
    """(heading, a cell a run, the run with the best value) of the method, the budget and every figure."""
    rows: list[tuple[str, list[str], int | None]] = [
        ("method", [run.method for run in results], None),
        ("budget (blocks x size)", [str(run.analysis["budget"]) for run in results], None),
    ]
    all_values = [table_values(run, loss) for run, loss in zip(results, losses(results)[0], strict=True)]
    for key, heading, form, best in ROWS:
        values = [each[key] for each in all_values]
        winner = values.index(best(values)) if best is not None and len(set(values)) > 1 else None
        rows.append((heading, [format(x, form) for x in values], winner))
    return rows
