"""The demo: the paper's comparison, small enough for a laptop.

Three models that differ in `method` alone learn the same text in the same order. Each is then run with full attention and with
attention over a few blocks. Every part is what an ordinary command does (`ssa prepare`, `train`, `eval`, `analyze`).
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ssa import terminal
from ssa.analysis.analyze import analyze
from ssa.analysis.plots import require_matplotlib, save_summary_picture
from ssa.analysis.results import RunResults
from ssa.config import Recipe, load_recipe
from ssa.data.prepare import prepare
from ssa.data.shards import INDEX
from ssa.demo_claims import judge_claims
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.files import write_atomically
from ssa.report.report import write_report
from ssa.runs.provenance import versions
from ssa.train.trainer import train

METHODS = ("full", "moba", "ssa")
BUDGETS = ("2x16", "4x16")
EVALUATED_TOKENS = 16_000
VALID_FRACTION = 0.04  # of a small corpus, more than the usual 1 %
ANALYSED_TOKENS = 6144


def run_demo(out: Path, steps: int | None = None, seed: int = 1, overwrite: bool = False) -> Path:
    """Train, evaluate and compare under `out`; returns the report's path. Runs that are complete are not trained again.

    Raises:
        UserError: `out` holds runs of another recipe, or matplotlib is missing.
    """
    require_matplotlib()
    console = terminal.console(highlight=False)
    began = time.monotonic()
    recipe = demo_recipe(out, steps, seed)
    data = out / "data"
    console.print("[bold]1/4 Text:[/bold] the documentation that comes with Python")
    if not (data / INDEX).is_file():
        console.print(
            str(prepare(["builtin:python"], data, tokenizer="byte", valid_fraction=VALID_FRACTION)), markup=False, soft_wrap=True
        )
    console.print(
        f"[bold]2/4 Training[/bold] {', '.join(METHODS)}: same weights at the start, same text, {recipe.train.steps} steps each",
        soft_wrap=True,
    )
    runs = []
    for method in METHODS:
        console.print(f"[bold]{method}[/bold]")
        own = replace(recipe, model=replace(recipe.model, method=method))  # type: ignore[arg-type]
        started = (out / method / "recipe.json").is_file() and not overwrite
        trained = train(own, out / method, resume=started, overwrite=overwrite)
        if trained.stopped_by == "SIGINT":
            raise KeyboardInterrupt
        if trained.stopped_by is not None:
            raise UserError(f"stopped by {trained.stopped_by}: run it again to go on")
        runs.append(trained.out)
    console.print("[bold]3/4 Evaluating[/bold] with full attention and with 2 and 4 blocks of 16 tokens")
    for run in runs:
        evaluate(run, budgets=[*BUDGETS, "full"], max_tokens=EVALUATED_TOKENS)
    console.print("[bold]4/4 Looking[/bold] at what their attention keeps")
    result = analyze(runs, max_tokens=ANALYSED_TOKENS, seed=seed, console=terminal.console(quiet=True))
    save_summary_picture(result.runs, out / "analysis" / "summary.png")
    figures = demo_figures(result.runs, recipe)
    write_atomically(out / "demo.json", json.dumps(figures, indent=2) + "\n")
    report = out / "report.html"
    write_report([out], report)
    console.print(demo_table(figures))
    console.print(claims_table(figures))
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    budgets = ",".join([*(f"{blocks}x16" for blocks in (1, 2, 4, 8, 16)), "full"])
    for line in (
        f"Took {minutes} min {seconds} s. Pictures and all figures, to open in a browser: {report}",
        f"Next, the ssa model at more budgets: {program()} eval {shlex.quote(str(runs[-1]))} --budgets {budgets} --max-tokens {EVALUATED_TOKENS}",
    ):
        console.print(line, markup=False, soft_wrap=True)
    return report


def program() -> str:
    """How this program was called, for a line that is to be copied."""
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "ssa" else "python -m ssa"


def demo_recipe(out: Path, steps: int | None, seed: int) -> Recipe:
    recipe = load_recipe("tiny")
    train = replace(recipe.train, seed=seed, steps=recipe.train.steps if steps is None else steps)
    return replace(recipe, data=replace(recipe.data, path=str(out / "data")), train=train)


def demo_figures(runs: Sequence[RunResults], recipe: Recipe) -> dict[str, Any]:
    """Everything that is shown, with what made it, for out/demo.json.

    Losses are the evaluation's, everything else is the analysis's at the budget of the training.
    """
    methods = {}
    for run in runs:
        sparse, full = run.means("sparse"), run.means("full")
        above, points = run.violations()
        methods[run.method] = {
            "loss_nats": {p.budget: p.nats for p in run.perplexity}, "perplexity": {p.budget: p.perplexity for p in run.perplexity},
            "kept_mass": sparse["kept_mass"], "kept_mass_full": full["kept_mass"], "entropy_bits": full["entropy_bits"],
            "output_error": sparse["output_error"], "points": points, "points_above_bound": above,
        }  # fmt: skip
    first = runs[0]
    return {
        "command": "ssa demo", "steps": recipe.train.steps, "seed": recipe.train.seed, "device": first.analysis["device"],
        "versions": versions(), "evaluated_tokens": first.perplexity_setting["tokens"], "analysed_tokens": first.analysis["measured"]["tokens"],
        "claims": [asdict(claim) for claim in judge_claims(methods, BUDGETS)], "methods": methods,
    }  # fmt: skip


def demo_rows(figures: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, a cell a method): loss and perplexity by budget, the gap that sparse attention opens, kept mass, entropy."""
    methods = figures["methods"].values()
    rows = []
    for budget in ("full", *reversed(BUDGETS)):
        cells = [f"{m['loss_nats'][budget]:.4f} ({m['perplexity'][budget]:.2f})" for m in methods]
        rows.append((f"loss (perplexity), {budget}", cells))
    for budget in reversed(BUDGETS):
        rows.append(
            (f"gap, sparse {budget} − full", [f"{m['loss_nats'][budget] - m['loss_nats']['full']:+.4f}" for m in methods])
        )
    rows.append((f"attention mass kept, {BUDGETS[-1]}", [f"{m['kept_mass']:.3f}" for m in methods]))
    rows.append(("attention entropy, bits", [f"{m['entropy_bits']:.2f}" for m in methods]))
    return rows


def demo_table(figures: dict[str, Any]) -> Table:
    """`demo_rows`, a column a method."""
    caption = f"losses: {figures['evaluated_tokens']:,} tokens; mass, entropy: {figures['analysed_tokens']:,}"
    table = Table(box=box.SIMPLE_HEAD, title="On validation text", caption=caption)
    table.add_column("trained as")
    for method in figures["methods"]:
        table.add_column(method, justify="right")
    for name, cells in demo_rows(figures):
        table.add_row(name, *cells)
    return table


def claims_table(figures: dict[str, Any]) -> Table:
    """The paper's claims, and what became of them here."""
    caption = "Toy models, one seed. A difference that another seed could turn round decides nothing."
    table = Table("in these runs", "the paper says", box=box.SIMPLE_HEAD, title="The paper's claims", caption=caption)
    for claim in figures["claims"]:
        table.add_row(claim["verdict"], f"{claim['claim']}\n[dim]{claim['here']}[/dim]")
    return table
