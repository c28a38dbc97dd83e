"""Tasks that lm-evaluation-harness runs by itself, with its own data, at several budgets and seeds."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

from ssa.budget import Reading
from ssa.collectives import gather
from ssa.errors import UserError
from ssa.eval.choices import ONE_SEED_NOTE
from ssa.eval.model_under_test import attention, provenance
from ssa.eval.results import TASKS_FILE, read_results
from ssa.eval.scored import base_setting, item_log, keep_entry, metric, new_entry
from ssa.eval.tasks import TaskRequest, shots
from ssa.ranks import Shard

Outcome = dict[str, Any]
"""What `lm_eval.simple_evaluate` returns, or `PARTS` of it."""
PARTS = ("results", "n-shot", "n-samples", "versions")
"""What is read here."""


def run(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """See `ssa.eval.tasks`.

    Log-likelihoods are logged as they are computed, so an interrupted evaluation goes on where it was; generated texts are not.
    Under torchrun the ranks share the batches; rank 0 keeps and shows the figures.

    Raises:
        UserError: lm-eval is not installed, has no such task, or cannot load its data.
    """
    try:
        import lm_eval.tasks

        from ssa.eval.harness import SSALM
    except ImportError as error:
        raise UserError(
            f'{", ".join(names)} without --data-dir needs lm-evaluation-harness ({error}): pip install "sparse-sparse-attention[eval]"'
        ) from None
    if max(request.seeds) >= 2**32:
        raise UserError(f"seeds {', '.join(map(str, request.seeds))}: lm-evaluation-harness takes seeds below 2**32")
    rank = Shard.from_environment().rank
    read_results(request.directory / TASKS_FILE)
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"lm-evaluation-harness has no task {name!r}; lm_eval ls tasks lists them")
    subject, common = request.subject, base_setting(request, "lm_eval")
    entries = {}
    for name in names:
        outcomes: dict[Reading, dict[int, Outcome]] = {}
        seconds: dict[Reading, float] = {}
        for budget in request.budgets:
            model = SSALM(subject.model, **attention(budget), max_length=common["max_length"], tokenizer=subject.tokenizer)
            model.log = item_log(request, "lm_eval", common, budget, None)
            started = time.perf_counter()
            outcomes[budget] = {}
            for seed in request.seeds:
                try:
                    # one progress bar is enough
                    with contextlib.redirect_stderr(io.StringIO() if rank else sys.stderr):
                        outcome = lm_eval.simple_evaluate(
                            model, tasks=[name], num_fewshot=shots(request, name), limit=request.limit, bootstrap_iters=100,
                            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                            task_manager=manager, log_samples=False,
                        )  # fmt: skip
                except (OSError, ConnectionError) as error:
                    raise UserError(
                        f"lm-evaluation-harness cannot load {name}: {' '.join(str(error).split())[:200]}; without network use --data-dir"
                    ) from error
                # the other ranks get nothing from lm-eval, and must go on as rank 0 does
                shared = gather({} if outcome is None else {part: outcome[part] for part in PARTS})[0]
                outcomes[budget][seed] = _of_task(shared, name)
                if not _num_fewshot(shared, name):
                    break  # nothing is drawn, further seeds would repeat the pass
            seconds[budget] = time.perf_counter() - started
        entries[name] = (
            {"budgets": {}} if rank else keep_entry(request, _entry(name, request, outcomes, seconds, lm_eval.__version__))
        )
    return entries


def _of_task(outcome: Outcome, name: str) -> Outcome:
    if not any(isinstance(value, float) for value in outcome["results"].get(name, {}).values()):
        members = ", ".join(sorted(outcome["results"]))
        raise UserError(f"{name} is a collection without a figure of its own; name its tasks: {members}")
    return outcome


def _num_fewshot(outcome: Outcome, name: str) -> int:
    return int(outcome["n-shot"].get(name) or 0)


def _entry(
    name: str, request: TaskRequest, outcomes: dict[Reading, dict[int, Outcome]], seconds: dict[Reading, float], version: str
) -> dict[str, Any]:  # fmt: skip
    first = next(iter(next(iter(outcomes.values())).values()))
    num_fewshot = _num_fewshot(first, name)
    items = int(first["n-samples"].get(name, {}).get("effective", 0))
    setting = {
        **base_setting(request, name), "version": str(first["versions"].get(name)), "lm_eval": version,
        "data_sha256": None, "num_fewshot": num_fewshot, "seeds": list(request.seeds) if num_fewshot else [],
    }  # fmt: skip
    notes, source = ([], "lm-eval") if num_fewshot else ([ONE_SEED_NOTE], None)
    entry = new_entry(request, setting, items, notes, examples_from=source)
    for budget, by_seed in outcomes.items():
        figures = {}
        for key in first["results"][name]:
            metric_name, _, filtered = key.partition(",")
            if not filtered or metric_name.endswith("_stderr"):
                continue
            values = {seed if num_fewshot else None: float(o["results"][name][key]) for seed, o in by_seed.items()}
            errors = [o["results"][name].get(f"{metric_name}_stderr,{filtered}") for o in by_seed.values()]
            known = [float(error) for error in errors if isinstance(error, float)]
            figures[metric_name if filtered == "none" else key] = metric(values, known)
        entry["budgets"][str(budget)] = {"metrics": figures, "seconds": seconds[budget], **provenance(request.subject)}
    return entry
