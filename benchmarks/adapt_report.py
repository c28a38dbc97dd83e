"""The table and the picture of docs/results.md about adaptation, from what `benchmarks/adapt.py` measured.

python benchmarks/adapt_report.py benchmarks/results/h200/adapt --out docs/adapt.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from adapt import BUDGETS
from evidence_tables import nats, table

matplotlib.use("agg")
import matplotlib.pyplot as plt

RUNS = {  # file: label, colour
    "before": ("as converted", "#666666"), "full": ("trained on as FullAttn", "#2563eb"), "moba": ("trained on sparse only (MoBA)", "#d97706"),
    "ssa": ("trained on as SSA", "#059669"),
}  # fmt: skip
TEXTS = {"valid": "validation text", "wikitext": "WikiText-2 test"}


def keys_read(budget: str) -> str:
    """ "8x16" -> "128"."""
    blocks, _, size = budget.partition("x")
    return str(int(blocks) * int(size)) if size else budget


def lines(runs: dict[str, dict[str, Any]], text: str) -> dict[str, list[str]]:
    result = {}
    for name, run in runs.items():
        beyond = run["figures"]["analysis"]["inference"]["full"]["beyond_receptive_field"]
        values = [nats(run["figures"], text, budget) for budget in BUDGETS.split(",")]
        gap = nats(run["figures"], text, "16x16") - values[-1]
        result[RUNS[name][0]] = [
            *(f"{v:.3f}" for v in values),
            f"{gap:+.3f}",
            f"{beyond['kept_mass']:.3f}",
            f"{beyond['entropy_bits']:.2f}",
        ]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    runs = {name: json.loads(path.read_text()) for name in RUNS if (path := args.directory / f"{name}.json").exists()}
    columns = [keys_read(budget) for budget in BUDGETS.split(",")]
    texts = {text: title for text, title in TEXTS.items() if all(text in run["figures"] for run in runs.values())}
    if not runs or not texts:
        print(f"{args.directory} has no measured run", file=sys.stderr)
        return 1
    for text, title in texts.items():
        print(f"Loss on {title} (nats a token) by keys that a query reads:\n")
        print(table([*columns, "gap, 256 − full", "kept mass", "entropy, bits"], lines(runs, text)), "\n")
    plt.rcParams["svg.hashsalt"] = "ssa"  # the same bytes each time
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.6), squeeze=False)
    for axis, (text, title) in zip(axes.flat, texts.items(), strict=True):
        for name, run in runs.items():
            label, colour = RUNS[name]
            axis.plot(columns, [nats(run["figures"], text, b) for b in BUDGETS.split(",")], color=colour, marker=".", label=label)
        axis.set_title(f"{title}: loss (nats) by keys read", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
