"""Training curves of an SSA model with the Triton kernels and with the reference: same data, weights, draws and seeds.

ssa prepare builtin:python --out data/python
python benchmarks/curves.py data/python --out tiny.json
python benchmarks/curves.py data/python --recipe 60m --context 1024 --batch-size 4 --devices cuda:0,cuda:1 --out 60m.json --train.lr 3e-4

Rounding alone parts two curves in time, since it decides now and then which block is selected. How far it does is what the controls tell:
the reference against itself with the rows of every batch in reverse, which is the same sum in another order, and in bfloat16 also against
itself in float32. An error of the kernels parts the curves further, or sooner, than its control does.

Each curve is a process of its own, on its own device where several are named.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssa.config import load_recipe
from ssa.data.loader import PackedLoader
from ssa.data.shards import TokenShards
from ssa.data.tokenizer import vocabulary_size
from ssa.errors import UserError
from ssa.files import write_atomically
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.streams import draw_stream
from ssa.runs.provenance import git_state, versions
from ssa.train.optim import build_optimizer, learning_rate
from ssa.train.parallel import gradient_norm

SEED = 1


class Way(NamedTuple):
    """How one curve is computed."""

    impl: str
    dtype: str
    reverse: bool = False
    """The rows of each batch the other way round."""


def ways(dtype: str) -> dict[str, Way]:
    """The first is what the others are compared with."""
    found = {
        "reference": Way("reference", dtype),
        "triton": Way("triton", dtype),
        "reversed": Way("reference", dtype, reverse=True),
    }
    return found if dtype == "float32" else found | {"float32": Way("reference", "float32")}


def curve(way: Way, device: str, args: argparse.Namespace) -> list[float]:
    """Cross-entropy of every step; fewer than `args.steps` where `args.seconds` end first."""
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    recipe = load_recipe(args.recipe, ["--train.steps", str(args.steps), "--train.warmup", "0.05", *args.overrides])
    data = TokenShards(args.data, "train")
    vocab_size = recipe.model.vocab_size or vocabulary_size(data.load_tokenizer())
    model = SSAForCausalLM(SSAConfig.from_recipe(recipe.model, vocab_size)).to(device).train()
    model.model.impl = way.impl
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=way.dtype == "bfloat16")
    optimizer = build_optimizer(model, recipe.train)
    loader = PackedLoader(data, args.context, args.batch_size, seed=SEED)
    losses: list[float] = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        rows = {name: (x.flip(0) if way.reverse else x).to(device) for name, x in loader.batch(step).items()}
        with autocast:
            output = model(**rows, stream=draw_stream(SEED, step, recipe.model.full_ratio))
        output.loss.backward()
        gradient_norm(list(model.parameters()), recipe.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.cross_entropy.item())
        if step % 20 == 0:
            print(f"{way}: step {step}, loss {losses[-1]:.4f}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        if args.seconds and time.perf_counter() - begin > args.seconds:
            break
    return losses


def apart(curves: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """How far each curve is from the first, nats: over the steps that both have, and by tenths of them."""
    first, *others = curves
    found = {}
    for name in others:
        distances = [abs(a - b) for a, b in zip(curves[first], curves[name], strict=False)]
        steps = len(distances)
        tenths = [distances[i * steps // 10 : (i + 1) * steps // 10] for i in range(10)]
        found[name] = {
            "steps": steps, "largest": max(distances), "mean": sum(distances) / steps,
            "mean_by_tenth": [sum(part) / len(part) for part in tenths if part],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step, at least 2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.0, help="compare the steps done by then; 0 = all")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="float32: without TF32; bfloat16: autocast"
    )
    parser.add_argument(
        "--devices", default="cuda:0", help="dealt out to the curves, in their order: reference, triton, controls"
    )
    args, args.overrides = parser.parse_known_args()  # what it does not know is for the recipe, e.g. --train.lr 3e-4
    try:
        load_recipe(args.recipe, args.overrides)
    except UserError as error:
        parser.error(str(error))
    if args.batch_size < 2:
        parser.error(
            f"--batch-size {args.batch_size}: the control adds up the rows of a batch in another order, which takes at least 2"
        )
    devices = args.devices.split(",")
    found = ways(args.dtype)
    with concurrent.futures.ProcessPoolExecutor(len(found), multiprocessing.get_context("spawn")) as pool:
        jobs = {name: pool.submit(curve, way, devices[i % len(devices)], args) for i, (name, way) in enumerate(found.items())}
        curves = {name: job.result() for name, job in jobs.items()}
    distances = apart(curves)
    report = {
        "command": " ".join(["python", *sys.argv]), "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(), "git": git_state(), "recipe": args.recipe, "overrides": args.overrides, "context": args.context, "batch_size": args.batch_size,
        "dtype": args.dtype, "ways": {name: way._asdict() for name, way in found.items()}, "apart": distances,
    }  # fmt: skip
    write_atomically(args.out, json.dumps(report | curves, indent=1) + "\n")
    for name, distance in distances.items():
        print(
            f"{name} from reference over {distance['steps']} steps: {distance['largest']:.2g} at most, {distance['mean']:.2g} on average"
        )


if __name__ == "__main__":
    main()
