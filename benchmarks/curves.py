"""Training curves with the Triton kernels and with the reference: the tiny SSA model, same data, seeds and draws, fp32, one GPU.

ssa prepare builtin:python --out data/python
python benchmarks/curves.py data/python --out curves.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ssa.config import TrainRecipe, load_recipe
from ssa.data.loader import PackedLoader
from ssa.data.shards import TokenShards
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.environment import versions
from ssa.train.optim import learning_rate
from ssa.train.streams import draw_stream

STEPS = 200


def curve(impl: str, data: Path) -> list[float]:
    torch.manual_seed(1)
    model = SSAForCausalLM(SSAConfig.from_recipe(load_recipe("tiny").model, vocab_size=258)).cuda().train()
    model.model.impl = impl
    recipe = TrainRecipe(steps=STEPS, lr=1e-3, warmup=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    loader = PackedLoader(TokenShards(data, "train"), 512, 4, seed=1)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = {name: x.cuda() for name, x in loader.batch(step).items()}
        output = model(**batch, stream=draw_stream(1, step, 0.5))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.cross_entropy)
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    curves = {impl: curve(impl, args.data) for impl in ("reference", "triton")}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    report = {
        "hardware": torch.cuda.get_device_name(),
        "versions": versions(),
        "largest": max(apart),
        "mean": sum(apart) / len(apart),
    }
    args.out.write_text(json.dumps(report | curves, indent=1) + "\n")
    print({name: report[name] for name in ("largest", "mean")})


if __name__ == "__main__":
    main()
