"""Does it pay to go on with a pretrained model as SSA? Train a converted Llama on alike as SSA, sparse only and full only; measure all.

    ssa convert SmolLM2.gguf work/model --dtype float32
    ssa prepare TEXT... --tokenizer work/model --out work/data
    python benchmarks/adapt.py work/model work/data --out benchmarks/results/h200/adapt --wikitext wiki.jsonl

One JSON for each run, and one for the model as it was ("before"). Started again, it keeps what is finished, measures what was only trained,
and goes on from checkpoints. On several GPUs, start it once for each, with the same --out and --work: each process takes the next run of its
--runs that no other has. A run that fails is tried again by those that are started afterwards. Other arguments change the recipe,
the preset `adapt`. `adapt_report.py` makes what docs/results.md shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from evidence import check_texts, finish, run_each, trained

from ssa.analysis.analyze import analyze
from ssa.config import load_recipe, override
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.runs.checkpoints import resolve_checkpoint
from ssa.runs.provenance import git_state, versions

RUNS: dict[str, list[str]] = {
    "ssa": [],
    "moba": ["--model.method", "moba"],
    "full": ["--model.method", "full"],
    "before": [],
}
"""Overrides on the recipe; "before" is not trained."""
BUDGETS = "8x16,16x16,32x16,64x16,128x16,full"


def measure(run: Path, args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Perplexity by budget on validation text and WikiText-2; kept mass, entropy and KL of validation text."""
    figures: dict[str, Any] = {}
    for name, source in (("valid", args.data), ("wikitext", args.wikitext)):
        if source:
            figures[name] = evaluate(
                run, data=source, budgets=BUDGETS, context=context, max_tokens=args.eval_tokens, out=run / name
            )  # fmt: skip
    analysis = analyze([run], data=args.data, context=context, max_tokens=args.analysis_tokens, out=run / "measured")
    figures["analysis"] = json.loads(analysis.files[0].read_text())
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what `ssa convert` made")
    parser.add_argument("data", help="a directory prepared with the model's tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="run directories; OUT/runs if left out")
    parser.add_argument("--recipe", default="adapt")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--eval-tokens", type=int, default=300_000)
    parser.add_argument("--analysis-tokens", type=int, default=65_536)
    parser.add_argument("--wikitext")
    args, extra = parser.parse_known_args()
    names = args.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--runs {unknown[0]!r} is not one of {', '.join(RUNS)}")
    check_texts(args.data, args.wikitext)
    resolve_checkpoint(args.model)
    work = args.work or args.out / "runs"
    recipes = {}
    for name in names:
        recipe = override(load_recipe(args.recipe), [*RUNS[name], *extra])
        recipes[name] = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, path=args.data), model=dataclasses.replace(recipe.model, init_from=str(args.model))
        )  # fmt: skip

    def one(name: str, path: Path) -> str:
        recipe, run = recipes[name], work / name
        report: dict[str, Any]
        if name == "before":
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(args.model, run)
            report = {
                "name": name, "command": " ".join(["python", *sys.argv]), "seconds": {},
                "environment": {"versions": versions(), "git": git_state()},
            }  # fmt: skip
        else:
            report = trained(name, recipe, run, path.with_suffix(".trained.json"))
        measuring = finish(path, report, functools.partial(measure, run, args, recipe.data.context))
        return f"{report['seconds']['all']:.0f} s, of it {measuring:.0f} s measuring"

    return run_each(names, args.out, work, one)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
