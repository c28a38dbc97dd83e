"""The tables of docs/results.md, in Markdown, from what `benchmarks/evidence.py` measured.

python benchmarks/evidence_tables.py benchmarks/results/h200/evidence
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from evidence import BUDGETS, LONG, RUNS

from ssa import methods

LABELS = {
    "ssa-no-alignment": "SSA, no alignment", "ssa-ratio-0.25": "SSA, FullRatio 0.25", "ssa-ratio-0.75": "SSA, FullRatio 0.75",
    "ssa-ratio-1": "SSA, FullRatio 1", "ssa-alpha-5": "SSA, α = 5", "ssa-alpha-20": "SSA, α = 20",
    "ssa-align-ungated": "SSA, aligned before the gate", "ssa-head-scope": "SSA, blocks chosen by head",
}  # fmt: skip
FIGURES = {  # name: digits
    "validation, full": 3, "validation, sparse": 3, "WikiText-2, full": 3, "WikiText-2, sparse": 3, "kept mass": 3, "entropy, bits": 2,
    "sink mass": 4, "KL full, sparse": 3, "output error": 2, "books, full 4k": 3, "books, full 16k": 3, "books, sparse 4k": 3,
    "books, sparse 16k": 3, "needle, log p full": 1,
}  # fmt: skip


def label(name: str) -> str:
    base, _, seed = name.partition("-seed-")
    return LABELS.get(base, methods.label(base)) + (f", seed {seed}" if seed else "")


def nats(figures: dict[str, Any], text: str, budget: str) -> float:
    return figures[text]["perplexity"]["budgets"][budget]["nats_per_token"]


def row(run: dict[str, Any]) -> dict[str, float]:
    """The figures of `FIGURES`; kept mass, entropy, sinks and error under full inference, beyond the receptive field."""
    figures, own = run["figures"], "16x16"
    analysis = figures["analysis"]
    beyond = analysis["inference"]["full"]["beyond_receptive_field"]
    values = {
        "validation, full": run["validation"]["full"], "validation, sparse": run["validation"]["sparse"],
        "WikiText-2, full": nats(figures, "wikitext", "full"), "WikiText-2, sparse": nats(figures, "wikitext", own),
        "kept mass": beyond["kept_mass"], "entropy, bits": beyond["entropy_bits"], "sink mass": beyond["sink_mass_first_4"],
        "KL full, sparse": analysis["predictions"]["beyond_receptive_field"]["kl_nats"], "output error": beyond["output_error"],
        "needle, log p full": figures["needle"]["needle"]["budgets"]["full"]["log_probability"],
    }  # fmt: skip
    for budget, how in (("full", "full"), (own, "sparse")):
        for context, size in ((run["recipe"]["data"]["context"], "4k"), (LONG, "16k")):
            values[f"books, {how} {size}"] = nats(figures, f"books-{context}", budget)
    return values


def table(columns: list[str], lines: dict[str, list[str]]) -> str:
    text = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(text + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines.items()])


def with_spread(values: list[float], digits: int) -> str:
    """Mean, and ± half the distance between the smallest and the largest where there are several seeds."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    runs = {name: json.loads(path.read_text()) for name in RUNS if (path := args.directory / f"{name}.json").exists()}
    rows = {name: row(run) for name, run in runs.items()}
    tokens = {
        r["recipe"]["train"]["steps"] * r["recipe"]["train"]["batch_size"] * r["recipe"]["train"]["accumulation"] * r["recipe"]["data"]["context"]
        for r in runs.values()
    }  # fmt: skip
    print(f"Tokens a run: {', '.join(f'{n / 1e6:.0f}M' for n in sorted(tokens))}. Losses in nats a token.\n")
    groups: dict[str, list[str]] = {}
    for name in runs:
        groups.setdefault(name.partition("-seed-")[0], []).append(name)
    both = {
        methods.label(base): [with_spread([rows[n][f] for n in names], FIGURES[f]) for f in FIGURES]
        for base, names in groups.items()
    }
    print(table(list(FIGURES), both), "\n")
    print("Every run:\n")
    print(table(list(FIGURES), {label(n): [f"{r[f]:.{d}f}" for f, d in FIGURES.items()] for n, r in rows.items()}), "\n")
    print("WikiText-2 test by budget:\n")
    budgets = BUDGETS.split(",")
    print(table(budgets, {label(n): [f"{nats(r['figures'], 'wikitext', b):.3f}" for b in budgets] for n, r in runs.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
