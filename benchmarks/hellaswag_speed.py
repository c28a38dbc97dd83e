"""Seconds that `ssa eval --tasks hellaswag` takes, start to finish, with a preset's model of random weights; the score is chance.

python benchmarks/hellaswag_speed.py TOKENIZER DATA_DIR --recipe 60m --out hellaswag-speed.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ssa.config import load_recipe
from ssa.data.tokenizer import load_tokenizer, vocabulary_size
from ssa.eval.evaluate import evaluate
from ssa.files import write_atomically
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.runs.provenance import git_state, versions

LIMIT = 120.0  # seconds: the project's bar for one budget of the 60m model on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json or a tokenizer directory")
    parser.add_argument("data_dir", type=Path, help="holds hellaswag_val.jsonl")
    parser.add_argument("--recipe", default="60m")
    parser.add_argument("--budgets", default="full,16x16")
    parser.add_argument("--limit", type=int, help="items")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(1)
    tokenizer = load_tokenizer(args.tokenizer)
    recipe = load_recipe(args.recipe)
    model = SSAForCausalLM(SSAConfig.from_recipe(recipe.model, max(recipe.model.vocab_size, vocabulary_size(tokenizer))))
    cuda = args.device != "cpu" and torch.cuda.is_available()
    report = {
        "what": "ssa eval --tasks hellaswag, random weights: loading, tokenising, all passes, metrics",
        "command": " ".join(["python", *sys.argv]), "hardware": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": versions(), "git": git_state(), "recipe": args.recipe, "parameters": model.num_parameters(), "bar_seconds": LIMIT,
        "budgets": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        for budget in args.budgets.split(","):
            begin = time.perf_counter()
            entry = evaluate(
                directory, perplexity=False, tasks=["hellaswag"], data_dir=args.data_dir, limit=args.limit, budgets=budget,
                device=args.device, out=Path(scratch) / budget,
            )["tasks"]["hellaswag"]  # fmt: skip
            seconds = time.perf_counter() - begin
            found = next(iter(entry["budgets"].values()))
            report["budgets"][budget] = {
                "seconds": round(seconds, 1),
                "reached": None if args.limit else seconds < LIMIT,
                "metrics": found["metrics"],
            }
            print(budget, report["budgets"][budget], flush=True)
            write_atomically(args.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
