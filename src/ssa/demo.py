"""The demo: the paper's comparison, small enough for a laptop.

Three models that differ in `method` alone learn the same text in the same order. Each is then run with full attention and with
attention over a few blocks. Every part is what an ordinary command does (`ssa prepare`, `train`, `eval`, `analyze`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.config import Recipe, load_recipe
from ssa.errors import UserError
from ssa.files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

    from ssa.analysis.results import RunResults

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
    from rich.console import Console

    from ssa.analysis.analyze import analyze
    from ssa.analysis.plots import require_matplotlib, save_summary_picture
    from ssa.data.prepare import prepare
    from ssa.data.shards import INDEX
    from ssa.eval.evaluate import evaluate
    from ssa.train.trainer import train

    require_matplotlib()
    console = Console(highlight=False)
    began = time.monotonic()
    recipe = demo_recipe(out, steps, seed)
    data = out / "data"
    console.print("[bold]1/4 Text:[/bold] the documentation that comes with Python")
    if not (data / INDEX).is_file():
        console.print(str(prepare(["builtin:python"], data, tokenizer="byte", valid_fraction=VALID_FRACTION)), markup=False)
    console.print(
        f"[bold]2/4 Training[/bold] {', '.join(METHODS)}: same weights at the start, same text, {recipe.train.steps} steps each"
    )
    runs = []
    for method in METHODS:
        console.print(f"[bold]{method}[/bold]")
        own = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, method=method))  # type: ignore[arg-type]
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
    result = analyze(runs, max_tokens=ANALYSED_TOKENS, seed=seed, console=Console(quiet=True))
    save_summary_picture(result.runs, out / "analysis" / "summary.png")
    write_atomically(out / "demo.json", json.dumps(demo_figures(result.runs, recipe), indent=2) + "\n")
    console.print(demo_table(result.runs))
    for line in findings(result.runs):
        console.print(line, markup=False)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(
        f"\nTook {minutes} min {seconds} s. Try: ssa generate {runs[-1]} --prompt 'The module' --budget 2x16", soft_wrap=True
    )
    console.print(f"report: {result.report}", markup=False, soft_wrap=True)
    assert result.report is not None
    return result.report


def demo_recipe(out: Path, steps: int | None, seed: int) -> Recipe:
    recipe = load_recipe("tiny")
    train = dataclasses.replace(recipe.train, seed=seed, steps=recipe.train.steps if steps is None else steps)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(out / "data")), train=train)


def demo_figures(runs: Sequence[RunResults], recipe: Recipe) -> dict[str, Any]:
    """The table's figures with what made them, for out/demo.json."""
    from ssa.train.environment import versions

    return {
        "command": "ssa demo", "steps": recipe.train.steps, "seed": recipe.train.seed, "device": runs[0].analysis["device"],
        "versions": versions(),
        "methods": {
            run.method: {
                "loss_nats": {p.budget: p.nats for p in run.perplexity},
                "perplexity": {p.budget: p.perplexity for p in run.perplexity},
                "kept_mass": run.means("sparse")["kept_mass"],
                "entropy_bits": run.means("full")["entropy_bits"],
            }
            for run in runs
        },
    }  # fmt: skip


def demo_table(runs: Sequence[RunResults]) -> Table:
    """A column a method: loss and perplexity by budget, the gap that sparse attention opens, kept mass, entropy."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="On validation text")
    table.add_column("trained as")
    for run in runs:
        table.add_column(run.method, justify="right")
    losses = [{p.budget: p for p in run.perplexity} for run in runs]
    for budget in ("full", *reversed(BUDGETS)):
        name = "full" if budget == "full" else f"sparse {budget}"
        table.add_row(f"loss (ppl), {name}", *(f"{x[budget].nats:.4f} ({x[budget].perplexity:.2f})" for x in losses))
    for budget in reversed(BUDGETS):
        table.add_row(f"gap, sparse {budget} - full", *(f"{x[budget].nats - x['full'].nats:+.4f}" for x in losses))
    table.add_row(f"kept mass, {BUDGETS[-1]}", *(f"{run.means('sparse')['kept_mass']:.3f}" for run in runs))
    table.add_row("entropy, bits", *(f"{run.means('full')['entropy_bits']:.2f}" for run in runs))
    return table


def findings(runs: Sequence[RunResults]) -> list[str]:
    """What the paper says of the three methods, and whether it came out in these runs."""
    budget = BUDGETS[-1]
    by_method = {run.method: run for run in runs}

    def gap(run: RunResults) -> float:
        loss = {p.budget: p.nats for p in run.perplexity}
        return abs(loss[budget] - loss["full"])

    claims = [
        (f"smallest distance between full and sparse loss ({budget})", min(METHODS, key=lambda m: gap(by_method[m]))),
        ("highest kept mass", max(METHODS, key=lambda m: by_method[m].means("sparse")["kept_mass"])),
        ("lowest entropy", min(METHODS, key=lambda m: by_method[m].means("full")["entropy_bits"])),
    ]
    lines = ["The paper's claims for ssa, in these runs (one seed, a toy model):"]
    lines += [f"  {'holds' if best == 'ssa' else 'does not hold'}: {claim}: {best}" for claim, best in claims]
    return lines
