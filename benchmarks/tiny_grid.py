"""Many tiny models at once on a GPU: how the paper's ordering of full, moba and ssa depends on size, steps, learning rate and seed.

    ssa prepare builtin:python --out data/python --valid-fraction 0.05
    python benchmarks/tiny_grid.py data/python --out tiny-grid.jsonl

Each line of the output is one run: its settings, validation loss (nats a byte) with full attention and at three budgets, and kept mass
and entropy (bits) under full and sparse inference. docs/LOG.md discusses the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from ssa.analysis.measure import measure_model
from ssa.budget import FULL, Budget
from ssa.config import TrainRecipe
from ssa.data.loader import PackedLoader
from ssa.data.shards import TokenShards
from ssa.eval.model_under_test import attention
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.streams import draw_stream
from ssa.train.optim import learning_rate

BASE = {"context": 512, "k": 4, "bs": 16, "alpha": 10.0, "lr": 3e-3, "steps": 300, "batch": 8, "layers": 4, "full_ratio": 0.5}
VARIANTS: list[dict[str, Any]] = [
    {}, {"steps": 600}, {"lr": 6e-3}, {"bs": 8, "k": 8}, {"context": 1024, "batch": 4}, {"context": 1024, "batch": 4, "steps": 600},
    {"layers": 4, "steps": 250, "batch": 4}, {"layers": 3, "steps": 300, "batch": 4}, {"layers": 3, "steps": 400, "batch": 4},
    {"layers": 2, "steps": 500, "batch": 4},
]  # fmt: skip
SSA_VARIANTS: list[dict[str, Any]] = [{"alpha": 5.0}, {"alpha": 20.0}, {"full_ratio": 0.25}, {"full_ratio": 0.75}]


def grid() -> list[dict[str, Any]]:
    runs = [BASE | v | {"method": m, "seed": s} for v, m, s in itertools.product(VARIANTS, ("full", "moba", "ssa"), (1, 2))]
    runs += [BASE | v | {"method": "ssa", "seed": s} for v, s in itertools.product(SSA_VARIANTS, (1, 2))]
    return sorted(runs, key=lambda r: -r["steps"] * (3 if r["method"] == "ssa" else 2))  # long ones first: processes end together


def run(settings: dict[str, Any], data: Path) -> dict[str, Any]:
    s = settings
    torch.manual_seed(s["seed"])
    model = SSAForCausalLM(
        SSAConfig(
            vocab_size=258,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=s["layers"],
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            method=s["method"],
            block_size=s["bs"],
            num_selected_blocks=s["k"],
            alignment_weight=s["alpha"],
            full_ratio=s["full_ratio"],
        )
    ).cuda()
    recipe = TrainRecipe(steps=s["steps"], lr=s["lr"], warmup=0.05)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=s["lr"], betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    loader = PackedLoader(TokenShards(data, "train"), s["context"], s["batch"], s["seed"])
    model.train()
    for step in range(s["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = {name: x.cuda() for name, x in loader.batch(step).items()}
        model(**batch, stream=draw_stream(s["seed"], step, s["full_ratio"])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    held_out = PackedLoader(TokenShards(data, "valid"), s["context"], 8, 0)
    batches = [{n: x.cuda() for n, x in held_out.batch(i).items()} for i in range(min(12, held_out.steps_per_epoch))]
    result: dict[str, Any] = {}
    with torch.no_grad():
        for budget in (FULL, *(Budget(k, s["bs"]) for k in (s["k"] // 2, s["k"], 2 * s["k"]))):
            total = count = 0.0
            for batch in batches:
                total += (
                    model.token_nll(batch["input_ids"], position_ids=batch["position_ids"], **attention(budget))
                    .double()
                    .sum()
                    .item()
                )
                count += (batch["position_ids"][:, 1:] != 0).sum().item()
            result[str(budget)] = total / count
    figures = measure_model(
        model, batches[0]["input_ids"].cpu(), batches[0]["position_ids"].cpu(), Budget(s["k"], s["bs"]), seed=0
    )["inference"]
    for mode in ("full", "sparse"):
        beyond = figures[mode]["beyond_receptive_field"] or figures[mode]["all_queries"]
        result |= {f"kept_{mode}": beyond["kept_mass"], f"entropy_{mode}": beyond["entropy_bits"]}
    result["gap"] = result[f"{s['k']}x{s['bs']}"] - result["full"]
    return s | {k: round(v, 4) if math.isfinite(v) else None for k, v in result.items()}


def worker(index: int, count: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    for settings in grid()[index::count]:
        line = json.dumps(run(settings, data))
        with out.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=12)
    args = parser.parse_args()
    context = processes.get_context("spawn")
    workers = [context.Process(target=worker, args=(i, args.processes, args.data, args.out)) for i in range(args.processes)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()


if __name__ == "__main__":
    main()
