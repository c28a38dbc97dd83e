"""The pictures of docs/results.md from what `benchmarks/evidence.py` measured.

python benchmarks/evidence_plots.py benchmarks/results/h200/evidence --out docs/evidence.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RUNS = {  # file: label, colour, dashed
    "full": ("FullAttn", "#666666", False), "full-seed-2": ("", "#666666", True), "moba": ("MoBA", "#d97706", False),
    "moba-seed-2": ("", "#d97706", True), "nsa": ("NSA", "#2563eb", False),
    "nsa-seed-2": ("", "#2563eb", True), "ssa": ("SSA", "#059669", False),
    "ssa-seed-2": ("", "#059669", True), "ssa-no-alignment": ("SSA, no alignment", "#a21caf", False),
}  # fmt: skip

ABLATIONS = {"ssa-no-alignment"}
"""Drawn where they are; the main comparison is of the methods alone."""


def series(run: dict[str, Any]) -> dict[str, tuple[list[Any], list[float]]]:
    """(x, y) of each panel."""
    probes = [line for line in run["curve"] if line.get("kind") == "probe"]
    budgets = run["figures"]["wikitext"]["perplexity"]["budgets"]
    layers = run["figures"]["analysis"]["inference"]["full"]["layers"]
    beyond = [layer["beyond_receptive_field"] for layer in layers]
    step_tokens = run["recipe"]["train"]["batch_size"] * run["recipe"]["train"]["accumulation"] * run["recipe"]["data"]["context"]
    return {
        "Kept mass in training (16x16, full inference)": (
            [line["step"] * step_tokens / 1e6 for line in probes], [line["kept_mass_full"] for line in probes],
        ),
        "WikiText-2 test: loss (nats) by budget": (
            [str(16 * int(name.split("x")[0])) if name != "full" else name for name in budgets],
            [figures["nats_per_token"] for figures in budgets.values()],
        ),
        "Kept mass by layer, mean of heads (16x16, full inference)": ([layer["layer"] for layer in layers], [mean(x["kept_mass"]) for x in beyond]),
        "Entropy of attention by layer, mean of heads (bits)": ([layer["layer"] for layer in layers], [mean(x["entropy_bits"]) for x in beyond]),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "ssa"  # the same bytes each time
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    for name, (label, colour, dashed) in RUNS.items():
        path = args.directory / f"{name}.json"
        if not path.exists():
            if name not in ABLATIONS:
                print(f"{path} is not there: left out", file=sys.stderr)
            continue
        for axis, (title, (x, y)) in zip(axes.flat, series(json.loads(path.read_text())).items(), strict=True):
            axis.plot(x, y, color=colour, linestyle="--" if dashed else "-", marker=".", label=label or None)
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.25)
    for axis, label in zip(axes.flat, ("million tokens", "receptive field (tokens)", "layer", "layer"), strict=True):
        axis.set_xlabel(label)
    axes[1, 0].legend(fontsize=8)
    figure.text(0.99, 0.005, "dashed: second seed", ha="right", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
