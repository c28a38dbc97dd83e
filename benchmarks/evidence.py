"""The paper's comparison at a small scale, on real text: train each method and ablation alike, then measure all of them alike.

    ssa prepare TEXT... --out data/33m --train-bpe 16384
    python benchmarks/evidence.py data/33m --out runs/evidence --eval-tokens 200000 --wikitext wiki.jsonl --books long_books.jsonl

What is committed (benchmarks/results/h200/evidence) was measured so. With --out there, finished runs would be kept, not trained again.

One JSON for each run, with its recipe, environment, curve and every figure; finished ones are kept. Started again, it measures what was
only trained (RUN.trained.json) and goes on from checkpoints. On several GPUs, start it once for each, with the same --out and --work: each
process takes the next run of its --runs that no other has. A run that fails is tried again by those that are started afterwards.
`evidence_plots.py` and `evidence_tables.py` make what docs/results.md shows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssa.analysis.analyze import analyze
from ssa.config import Recipe, load_recipe, override
from ssa.data.shards import TokenShards
from ssa.data.sources import expand_inputs
from ssa.errors import UserError
from ssa.eval.documents import is_prepared
from ssa.eval.evaluate import evaluate
from ssa.files import sole_writer, write_atomically
from ssa.runs.checkpoints import checkpoint_path, find_checkpoints
from ssa.runs.home import read_starts
from ssa.train.trainer import train

RUNS: dict[str, list[str]] = {
    "ssa": [],
    "full": ["--model.method", "full"],
    "moba": ["--model.method", "moba"],
    "nsa": ["--model.method", "nsa"],
    "ssa-seed-2": ["--train.seed", "2"],
    "full-seed-2": ["--model.method", "full", "--train.seed", "2"],
    "moba-seed-2": ["--model.method", "moba", "--train.seed", "2"],
    "nsa-seed-2": ["--model.method", "nsa", "--train.seed", "2"],
    "ssa-no-alignment": ["--model.alignment-loss", "none"],
    "ssa-ratio-0.25": ["--model.full-ratio", "0.25"],
    "ssa-ratio-0.75": ["--model.full-ratio", "0.75"],
    "ssa-ratio-1": ["--model.full-ratio", "1"],
    "ssa-alpha-5": ["--model.alignment-weight", "5"],
    "ssa-alpha-20": ["--model.alignment-weight", "20"],
    "ssa-align-ungated": ["--model.no-align-gated"],
    "ssa-head-scope": ["--model.selection-scope", "head"],
}
"""Overrides on the recipe, in the order of their worth."""
COSTS = {"full": 1.0, "moba": 1.06, "nsa": 1.23, "ssa": 1.5, "ssa-no-alignment": 1.03}
"""Time of a step beside FullAttn's on an H200, by the run's name or the name's first word."""
OVERHEAD = 30.0
"""Seconds that a run takes beside its steps where its kernels were compiled before: starting, probes, validation, measuring."""
BUDGETS = "8x16,16x16,32x16,64x16,128x16,full"
LONG = 16384


def cost(name: str) -> float:
    return COSTS.get(name) or COSTS[name.split("-")[0]]


def steady_seconds(report: dict[str, Any]) -> float:
    """What the steps of a training take without compilers: its tokens at its median speed."""
    train, context = report["recipe"]["train"], report["recipe"]["data"]["context"]
    speed = statistics.median(line["tokens_per_second"] for line in report["curve"] if "loss" in line)
    return train["steps"] * train["batch_size"] * train["accumulation"] * context / speed


def failure_note(work: Path, path: Path) -> Path:
    """Where the processes that run now read that the run which `path` is to show has failed in one of them."""
    return work / ".claims" / f"{path.stem}.failed"


def settled(work: Path, path: Path, began: float) -> str | None:
    """Why nobody needs to begin the run that `path` is to show, if so.

    Args:
        began: When this process was started, in seconds since 1970: failures of before are worth another try.
    """
    if path.exists():
        return "kept"
    note = failure_note(work, path)
    try:
        failed = json.loads(note.read_text())["time"]
    except FileNotFoundError:
        return None
    return f"failed in another process, see {note}; start again to try again" if failed > began else None


@contextlib.contextmanager
def claimed(work: Path, path: Path, began: float) -> Iterator[str | None]:
    """Why the run that `path` is to show is none of this process's; None: it is, for now.

    A claim ends with the process that has it, however that ends. If that is by an exception, those that run now leave the run alone.
    """
    claim, note = work / ".claims" / path.stem, failure_note(work, path)
    with contextlib.ExitStack() as stack:
        reason = settled(work, path, began)
        if reason is None:
            claim.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(sole_writer(claim, "another process has it"))
                reason = settled(work, path, began)  # another may have come to its end in between
            except UserError as busy:
                reason = str(busy)
        if reason is None:
            note.unlink(missing_ok=True)
        try:
            yield reason
        except Exception:
            write_atomically(note, json.dumps({"time": time.time(), "error": traceback.format_exc()}) + "\n")
            raise


def check_texts(data: str, *texts: str | None) -> None:
    """Complain before a run is trained about what would be missed after it.

    Raises:
        UserError: `data` is no prepared directory with both splits, or a text is not there or of no kind that is read.
    """
    for split in ("train", "valid"):
        TokenShards(data, split)
    for text in filter(None, texts):
        if not is_prepared(text):
            expand_inputs([text])


def trained(name: str, recipe: Recipe, run: Path, path: Path) -> dict[str, Any]:
    """The report of a training, kept in `path`. A training that is complete in `run` is not repeated; one that has a checkpoint goes on."""
    started = time.perf_counter()
    if path.exists() and find_checkpoints(run)[-1:] == [checkpoint_path(run, recipe.train.steps)]:
        report = json.loads(path.read_text())
        if report["recipe"] == lean(recipe.to_dict()):
            return report
    resume = (run / "recipe.json").is_file()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    if recipe.train.compile:
        import torch

        torch.compiler.reset()  # what earlier runs of this process compiled counts against the compiler's limit for a layer
    result = train(recipe, run, resume=resume)
    if result.stopped_by:
        sys.exit(f"{name}: stopped by {result.stopped_by} after step {result.step}; start again to go on")
    report = {
        "name": name, "command": " ".join(["python", *sys.argv]), "recipe": recipe.to_dict(),
        "environment": {"starts": [{k: v for k, v in start.items() if k not in ("directory", "run")} for start in read_starts(run)]},
        "seconds": {"train": time.perf_counter() - started}, "validation": result.validation, "curve": curve(run),
        "data_wait": data_wait(run),
    }  # fmt: skip
    write_atomically(path, json.dumps(lean(report)) + "\n")  # the training is kept if a measurement fails
    return report


def measure(run: Path, args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Everything that docs/results.md shows of a run."""
    figures: dict[str, Any] = {}
    for name, source in (("valid", args.data), ("wikitext", args.wikitext)):
        if source:
            figures[name] = evaluate(run, data=source, budgets=BUDGETS, max_tokens=args.eval_tokens, out=run / name)
    if args.books:
        for context in (recipe.data.context, LONG):
            factor = 1.0 if context == recipe.data.context else context / recipe.data.context
            figures[f"books-{context}"] = evaluate(
                run, data=args.books, budgets="16x16,64x16,full", context=context, max_tokens=args.eval_tokens, rope_factor=factor,
                out=run / f"books-{context}",
            )  # fmt: skip
    figures["needle"] = evaluate(
        run, data=args.data, budgets="16x16,full", perplexity=False, needle_lengths=(1024, recipe.data.context), needle_cases=40,
        needle_depths=(0.1, 0.5, 0.9), out=run / "needle",
    )  # fmt: skip
    analysis = analyze([run], data=args.data, max_tokens=65536, out=run / "measured")
    figures["analysis"] = json.loads(analysis.files[0].read_text())
    return figures


def data_wait(run: Path) -> dict[str, float]:
    """How long a step waited for its batch, in milliseconds, the mean and the largest of all steps, the first of each start among them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    waits = [1e3 * line["data_wait"] for line in lines if line["kind"] == "train"]
    return {"mean_ms": statistics.fmean(waits), "largest_ms": max(waits)}


def finish(path: Path, report: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> float:
    """Measures a trained run, writes its JSON in the place of what training alone left, and returns the seconds that measuring took."""
    begin = time.perf_counter()
    report["figures"] = measure()
    seconds = time.perf_counter() - begin
    report["seconds"]["all"] = report["seconds"].get("train", 0.0) + seconds
    write_atomically(path, json.dumps(lean(report)) + "\n")
    path.with_suffix(".trained.json").unlink(missing_ok=True)
    return seconds


def curve(run: Path, points: int = 250) -> list[dict[str, Any]]:
    """The run's metrics, thinned evenly; validations and probes are all kept."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    kept = (
        {id(steps[round(i * (len(steps) - 1) / (points - 1))]) for i in range(points)}
        if len(steps) > points
        else set(map(id, steps))
    )
    return [line for line in lines if id(line) in kept or "loss" not in line]


HEAVY = ("theorem_1", "all_queries", "by_position", "data_wait", "loss_spike", "tokens", "peak_memory_gb")
"""Figures of single layers or steps that the pages do not use."""


def lean(value: Any, inside: bool = False) -> Any:
    """What is committed: six digits, and of layers and steps only what the pages use."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, (list, tuple)):
        return [lean(item, True) for item in value]
    if isinstance(value, dict):
        return {key: lean(item, inside) for key, item in value.items() if not (inside and key in HEAVY)}
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def run_each(
    names: list[str], out: Path, work: Path, one: Callable[[str, Path], str], late: Callable[[str, Path], bool] = lambda *_: False
) -> int:
    """The runs that no other process has, one after another; 1 where one failed. The others are worth having all the same.

    Args:
        one: Makes a run's JSON, of the name and path given, and says how it went.
        late: There is no time left for it.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, failed = time.time(), False
    for name in names:
        path = out / f"{name}.json"
        if late(name, path):
            print(f"{name}: no time left", flush=True)
            continue
        try:
            with claimed(work, path, began) as reason:
                said = one(name, path) if reason is None else reason
        except Exception:
            failed = True
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            continue
        print(f"{name}: {said}", flush=True)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="run directories; OUT/runs if left out")
    parser.add_argument("--recipe", default="33m")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run that would end later than this")
    parser.add_argument("--eval-tokens", type=int, default=300_000)
    parser.add_argument("--wikitext")
    parser.add_argument("--books")
    args, extra = parser.parse_known_args()
    names = args.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--runs {unknown[0]!r} is not one of {', '.join(RUNS)}")
    check_texts(args.data, args.wikitext, args.books)
    work = args.work or args.out / "runs"
    recipes = {}
    for name in names:
        recipe = override(load_recipe(args.recipe), [*RUNS[name], *extra])
        if args.steps:
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=args.steps))
        recipes[name] = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=args.data))
    began, pace = time.time(), 0.0

    def late(name: str, path: Path) -> bool:
        over = time.time() - began + pace * cost(name) + (OVERHEAD if pace else 0.0) > args.seconds
        return over and settled(work, path, began) is None

    def one(name: str, path: Path) -> str:
        nonlocal pace
        recipe = recipes[name]
        report = trained(name, recipe, work / name, path.with_suffix(".trained.json"))
        measuring = finish(path, report, functools.partial(measure, work / name, args, recipe))
        pace = max(pace, steady_seconds(report) / cost(name))
        return f"trained in {report['seconds']['train']:.0f} s, measured in {measuring:.0f} s"

    return run_each(names, args.out, work, one, late)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
