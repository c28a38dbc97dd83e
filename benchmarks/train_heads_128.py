"""Training with heads of 128: tokens a second of FullAttn, MoBA and SSA in turns, what `train.deterministic` costs, and whether it keeps its word.

    python benchmarks/train_heads_128.py --out benchmarks/results/h200/train-heads-128.json

The 1b recipe with 32 query and 8 key/value heads of 128 and 8 blocks of 128 keys, compiled, random tokens: two rows of 8k, one of 32k with
selective checkpointing, as `ssa bench train` measures them. Every round measures each variant once; `speeds` has the medians over the rounds.

The check trains a slice of the model on this package's sources, by `ssa train` itself: twice alike, and once from the checkpoint half-way. Every
tensor of the last checkpoint, optimizer included, must be the same in every bit. Without `deterministic` the same is done for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import ssa
from ssa.bench.report import Bar, Deadline, Report, environment
from ssa.bench.rows import Layout
from ssa.bench.train import Plan, attempt, described, release
from ssa.collectives import Ranks
from ssa.config import Recipe, load_recipe
from ssa.data.prepare import prepare
from ssa.device import resolve_device
from ssa.errors import UserError
from ssa.model.streams import draw_stream
from ssa.train.trainer import train

K = 1024
Case = tuple[str, Layout, bool]
"""Variant, rows, deterministic."""
CASES: dict[int, tuple[Case, ...]] = {
    8 * K: (
        ("full", "plain", False), ("moba", "plain", False), ("ssa", "plain", False), ("ssa", "plain", True),
        ("ssa", "packed", False), ("ssa", "packed", True),
    ),
    32 * K: (("full", "plain", False), ("moba", "plain", False), ("ssa", "plain", False)),
}  # fmt: skip
BARS = ((8 * K, "ssa", 0.78), (8 * K, "moba", 1.05), (32 * K, "ssa", 0.88), (32 * K, "moba", 2.0))
"""Context, method, its tokens a second over FullAttn's."""
STEPS, HALF, SEED = 6, 3, 2
"""Of the check. With this seed both streams occur in either half."""


def recipe(context: int, tiny: bool) -> Recipe:
    """The 1b recipe with heads of 128; `tiny`: its shape in small, for the CPU."""
    base = load_recipe("1b")
    model = dataclasses.replace(base.model, num_key_value_heads=8, head_dim=128, block_size=128, num_selected_blocks=8)
    t = dataclasses.replace(
        base.train, compile=True, activation_checkpointing=context > 8 * K, batch_size=1 if context > 8 * K else 2
    )
    if tiny:
        context //= 128
        model = dataclasses.replace(
            model, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=300, block_size=8, num_selected_blocks=2,
        )  # fmt: skip
        t = dataclasses.replace(t, compile=False, device="cpu")
    return Recipe(model, dataclasses.replace(base.data, context=context), t)


def speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if "tokens_per_second" in row:
            key = (row["context"], row["variant"], row["rows"], row["deterministic"])
            found.setdefault(key, []).append(row["tokens_per_second"])
    names = ("context", "variant", "rows", "deterministic")
    return [
        dict(zip(names, key, strict=True)) | {"tokens_per_second": statistics.median(values), "rounds": len(values)}
        for key, values in found.items()
    ]


def bars(rows: list[dict[str, Any]], scale: int) -> list[Bar]:
    """Each with None where it was not measured. `scale`: what contexts are divided by."""
    median = {(s["context"] * scale, s["variant"], s["rows"], s["deterministic"]): s["tokens_per_second"] for s in speeds(rows)}

    def ratio(over: tuple[Any, ...], under: tuple[Any, ...]) -> float | None:
        return median[over] / median[under] if over in median and under in median else None

    result = [
        Bar(f"32/8 heads of 128, 8x128, {context // K}k: {method}'s tokens/s / full's", bar,
            ratio((context, method, "plain", False), (context, "full", "plain", False)))
        for context, method, bar in BARS
    ]  # fmt: skip
    for layout in ("plain", "packed"):
        case = (8 * K, "ssa", layout)
        name = f"ssa, 8k, {layout} rows: tokens/s with train.deterministic / without"
        result.append(Bar(name, 0.0, ratio((*case, True), (*case, False))))
    return result


def measure(args: argparse.Namespace, report: Report, device: torch.device) -> None:
    """Rounds of all contexts, the variants taking turns."""
    ranks = Ranks(device)
    for turn in range(args.rounds):
        for context in args.contexts:
            for variant, layout, repeats in CASES[context]:
                what = f"{variant}, {context // K}k, {layout} rows, round {turn + 1}{', deterministic' if repeats else ''}"
                if report.out_of_time(what):
                    continue
                r = recipe(context, args.tiny)
                r = dataclasses.replace(r, train=dataclasses.replace(r.train, deterministic=repeats))
                start = time.monotonic()
                row = attempt(r, Plan((variant,), (layout,), args.seconds, None), variant, layout, ranks)
                release()
                report.add(row | {"round": turn, "deterministic": repeats, "seconds": round(time.monotonic() - start, 1)})
                report.data["speeds"] = speeds(report.data["rows"])
                report.write()
                print(f"{what}: {described(row)} ({report.data['rows'][-1]['seconds']} s)", flush=True)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, of model and optimizer."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            found |= {f"{file.name}/{name}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def trained(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """What a run leaves; its compiled code goes, since too many versions of a function would run uncompiled."""
    found = tensors(train(recipe, out, resume).checkpoint)
    release()
    return found


def check(args: argparse.Namespace, repeats: bool, device: torch.device) -> dict[str, Any]:
    """How many tensors of the last checkpoint differ between two runs alike, and between a whole run and one that was resumed."""
    r = recipe(8 * K, args.tiny)
    t = dataclasses.replace(
        r.train,
        steps=STEPS,
        save_every=HALF,
        seed=SEED,
        keep_last=9,
        accumulation=1,
        warmup=0.0,
        log_every=1,
        deterministic=repeats,
        eval_every=0,
    )
    r = Recipe(dataclasses.replace(r.model, num_hidden_layers=2, vocab_size=0), r.data, t)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        whole, again, resumed, data = (Path(scratch) / name for name in ("whole", "again", "resumed", "data"))
        texts = [path.read_text() for path in sorted(Path(ssa.__path__[0]).rglob("errors.py" if args.tiny else "*.py"))]
        pieces = [text[i : i + 1000] for text in texts for i in range(0, len(text), 1000)]
        (Path(scratch) / "text.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
        prepare([Path(scratch) / "text.jsonl"], data, workers=1, show_progress=False)
        r = dataclasses.replace(r, data=dataclasses.replace(r.data, path=str(data)))
        expected = trained(r, whole)
        twice = trained(r, again)
        shutil.rmtree(again)
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(f"step-{STEPS:08d}", "latest"), symlinks=True)
        continued = trained(r, resumed, resume=True)
    streams = [draw_stream(t.seed, step, r.model.full_ratio) for step in range(STEPS)]

    def differing(other: dict[str, torch.Tensor]) -> int:
        assert other.keys() == expected.keys()
        return sum(not torch.equal(x, other[name]) for name, x in expected.items())

    return {
        "deterministic": repeats, "steps": STEPS, "resumed_at": HALF, "streams": streams, "context": r.data.context,
        "layers": r.model.num_hidden_layers, "tensors": len(expected), "differ_between_runs": differing(twice),
        "differ_when_resumed": differing(continued), "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--contexts", default="8192,32768", help="of them; none leaves the check alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8, help="of measured steps, a variant and round")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison bit for bit")
    parser.add_argument("--budget-seconds", type=float, default=0, help="skip what is left after so many; 0 = measure all")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU, to try the script")
    args = parser.parse_args()
    args.contexts = [] if args.contexts == "none" else [int(part) for part in args.contexts.split(",")]
    if unknown := [context for context in args.contexts if context not in CASES]:
        raise UserError(f"--contexts {unknown[0]} is not one of {', '.join(map(str, CASES))}")
    device = resolve_device("cpu" if args.tiny else "cuda")
    report = Report(
        args.out, Deadline(args.budget_seconds), suite="train-heads-128", recipes={}, data="random tokens", checks=[], speeds=[],
        **environment("cpu" if args.tiny else "cuda:0"),
    )  # fmt: skip
    report.data["command"] = shlex.join(["python", "benchmarks/train_heads_128.py", *sys.argv[1:]])
    report.data["recipes"] = {str(context): recipe(context, args.tiny).to_dict() for context in args.contexts}
    for repeats in [] if args.no_check else [True, False]:  # the latter last: it is for comparison
        if not repeats:
            measure(args, report, device)
            if report.out_of_time("two runs without train.deterministic"):
                continue
        report.data["checks"].append(check(args, repeats, device))
        report.write()
        print(report.data["checks"][-1], flush=True)
    if args.no_check:
        measure(args, report, device)
    report.finish(bars(report.data["rows"], 128 if args.tiny else 1))
    kept = all(not c["differ_between_runs"] and not c["differ_when_resumed"] for c in report.data["checks"] if c["deterministic"])
    if not kept:
        print("train.deterministic did not keep its word", flush=True)
    return 0 if kept and not any("error" in row for row in report.data["rows"]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
