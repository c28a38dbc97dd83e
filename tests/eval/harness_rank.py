"""One rank of tests/eval/test_harness.py's evaluations through lm-eval: `evaluate` over local task definitions, and generation.

    python harness_rank.py RUN TASKS_DIRECTORY CACHE REQUESTS SETTINGS

The last two are JSON: [[prompt, generation settings], ...] and the arguments of `evaluate`. Generation, and log-likelihoods of the prompts,
go through lm-eval's cache CACHE_rankN.db. Prints what this rank got.
"""

import contextlib
import io
import json
import os
import sys

import torch
from lm_eval import evaluator, tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from rich.console import Console

from ssa.eval import loglikelihood
from ssa.eval.evaluate import evaluate
from ssa.eval.harness import SSALM


def main(run, directory, cache, requests, settings):
    torch.set_num_threads(1)
    loglikelihood.BATCH_TOKENS_CPU = 200  # or the few requests of a test make one batch
    evaluator.add_env_info = lambda results: None  # asks pip for all packages
    manager = tasks.TaskManager(include_path=directory, include_defaults=False)
    tasks.TaskManager = lambda: manager
    found = evaluate(run, console=Console(file=sys.stdout, width=200), **json.loads(settings))["tasks"]
    lm = CachingLM(SSALM(run, "full", batch_size=2, device="cpu"), f"{cache}_rank{os.environ['RANK']}.db")
    requests = [tuple(request) for request in json.loads(requests)]
    torch.manual_seed(3)
    with contextlib.redirect_stderr(io.StringIO()):  # the cache has progress bars of its own
        scored = lm.loglikelihood(instances("loglikelihood", [(prompt, ".") for prompt, _ in requests]))
        texts = lm.generate_until(instances("generate_until", requests))
    budgets = {name: list(entry["budgets"]) for name, entry in found.items()}
    print("=" + json.dumps({"scored": scored, "texts": texts, "budgets": budgets}))


def instances(kind, arguments):
    return [Instance(kind, {}, args, i, metadata=("task", i, 1)) for i, args in enumerate(arguments)]


if __name__ == "__main__":
    main(*sys.argv[1:])
