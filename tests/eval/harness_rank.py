"""One rank of tests/eval/test_harness.py's evaluations through lm-eval: `evaluate` over local task definitions, and generation.

    python harness_rank.py RUN TASKS_DIRECTORY REQUESTS SETTINGS

The last two are JSON: [[prompt, generation settings], ...] and the arguments of `evaluate`. Prints what this rank got.
"""

import json
import sys

import torch
from lm_eval import evaluator, tasks
from lm_eval.api.instance import Instance
from rich.console import Console

from ssa.eval import loglikelihood
from ssa.eval.evaluate import evaluate
from ssa.eval.harness import SSALM


def main(run, directory, requests, settings):
    torch.set_num_threads(1)
    loglikelihood.BATCH_TOKENS_CPU = 200  # or the few requests of a test make one batch
    evaluator.add_env_info = lambda results: None  # asks pip for all packages
    manager = tasks.TaskManager(include_path=directory, include_defaults=False)
    tasks.TaskManager = lambda: manager
    found = evaluate(run, console=Console(file=sys.stdout, width=200), **json.loads(settings))["tasks"]
    instances = [
        Instance("generate_until", {}, tuple(args), i, metadata=("task", i, 1)) for i, args in enumerate(json.loads(requests))
    ]
    torch.manual_seed(3)
    texts = SSALM(run, "full", batch_size=2, device="cpu").generate_until(instances)
    print("=" + json.dumps({"texts": texts, "budgets": {name: list(entry["budgets"]) for name, entry in found.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
