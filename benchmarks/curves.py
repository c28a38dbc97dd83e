"""Training curves of an SSA model with the Triton kernels and with the reference: same data, weights, draws and seeds, fp32.

ssa prepare builtin:python --out data/python
python benchmarks/curves.py data/python --out tiny.json
python benchmarks/curves.py data/python --recipe 60m --context 1024 --batch-size 4 --devices cuda:0,cuda:1 --out 60m.json

Each implementation trains in a process of its own, on its own device where two are named.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from ssa.config import load_recipe
from ssa.data.loader import PackedLoader
from ssa.data.shards import TokenShards
from ssa.data.tokenizer import vocabulary_size
from ssa.files import write_atomically
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.environment import git_state, versions
from ssa.train.optim import build_optimizer, learning_rate
from ssa.train.parallel import gradient_norm
from ssa.train.streams import draw_stream

IMPLEMENTATIONS = ("reference", "triton")
SEED = 1


def curve(impl: str, device: str, args: argparse.Namespace) -> list[float]:
    """Cross-entropy of every step; fewer than `args.steps` where `args.seconds` end first."""
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    recipe = load_recipe(args.recipe, ["--train.steps", str(args.steps), "--train.warmup", "0.05"])
    data = TokenShards(args.data, "train")
    vocab_size = recipe.model.vocab_size or vocabulary_size(data.load_tokenizer())
    model = SSAForCausalLM(SSAConfig.from_recipe(recipe.model, vocab_size)).to(device).train()
    model.model.impl = impl
    optimizer = build_optimizer(model, recipe.train)
    loader = PackedLoader(data, args.context, args.batch_size, seed=SEED)
    losses: list[float] = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        rows = {name: x.to(device) for name, x in loader.batch(step).items()}
        output = model(**rows, stream=draw_stream(SEED, step, recipe.model.full_ratio))
        output.loss.backward()
        gradient_norm(list(model.parameters()), recipe.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.cross_entropy.item())
        if step % 20 == 0:
            print(f"{impl}: step {step}, loss {losses[-1]:.4f}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        if args.seconds and time.perf_counter() - begin > args.seconds:
            break
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.0, help="compare the steps done by then; 0 = all")
    parser.add_argument("--devices", default="cuda:0", help="one for both, or two, for the reference and for triton")
    args = parser.parse_args()
    devices = args.devices.split(",")
    with concurrent.futures.ProcessPoolExecutor(len(IMPLEMENTATIONS), multiprocessing.get_context("spawn")) as pool:
        jobs = {
            impl: pool.submit(curve, impl, devices[i % len(devices)], args) for i, impl in enumerate(IMPLEMENTATIONS)
        }  # fmt: skip
        curves = {impl: job.result() for impl, job in jobs.items()}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=False)]
    report = {
        "command": " ".join(["python", *sys.argv]), "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(), "git": git_state(), "recipe": args.recipe, "context": args.context, "batch_size": args.batch_size,
        "steps": len(apart), "largest": max(apart), "mean": sum(apart) / len(apart),
    }  # fmt: skip
    write_atomically(args.out, json.dumps(report | curves, indent=1) + "\n")
    print({name: report[name] for name in ("steps", "largest", "mean")})


if __name__ == "__main__":
    main()
