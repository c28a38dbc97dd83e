"""Running a log-likelihood task: requests scored on this rank, logged as they finish, put together into an entry of tasks.json.

RUN/eval/tasks.json has the format of `ssa.eval.results`; an entry is one task in one setting, a budget's figures are

    {"metrics": {name: {"mean", "std", "stderr", "by_seed": {seed: value}}}, "items", "scored", "seconds", "padding", "device", ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssa.budget import Reading
from ssa.errors import UserError
from ssa.eval.loglikelihood import Effort, Request, Score, check_max_length, log_likelihoods
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather
from ssa.eval.model_under_test import attention, description, progress_bar, provenance
from ssa.eval.results import TASKS_FILE, add_results, read_results, result_key
from ssa.eval.tables import print_task
from ssa.eval.tasks import TaskRequest
from ssa.ranks import Shard

Records = dict[int | None, list[dict[str, Any]]]


def run_scored(
    request: TaskRequest, entry: dict[str, Any], setting: dict[str, Any], seeds: Sequence[int | None],
    requests: Callable[[list[int], int | None], dict[int, list[Request]]], figures: Callable[[Records], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Score what the logs lack of `entry`'s items at every budget, and keep and show the entry.

    Args:
        setting: What decides the score of an item, budget and seed aside.
        seeds: [None] where they decide nothing.
        requests: Numbers of items and a seed to each item's requests; asked once for all budgets.
        figures: The records of all items by seed to the metrics.
    """
    task, count = setting["task"], entry["items"]
    efforts = {budget: {"scored": 0.0, "seconds": 0.0, "padding": 0.0} for budget in request.budgets}
    logs = {(budget, seed): item_log(request, task, setting, budget, seed) for seed in seeds for budget in request.budgets}
    for seed in seeds:
        lacking = {budget: _missing(logs[budget, seed], count) for budget in request.budgets}
        encoded = requests(sorted(set().union(*lacking.values())), seed)
        for budget, numbers in lacking.items():
            what = task if seed is None else f"{task}, seed {seed}"
            took = score_items(request, what, {i: encoded[i] for i in numbers}, logs[budget, seed], budget, setting["max_length"])
            for key, value in took.items():
                efforts[budget][key] = max(efforts[budget][key], value) if key == "padding" else efforts[budget][key] + value
    known = read_results(request.directory / TASKS_FILE)["results"].get(result_key(entry["setting"]), entry)["budgets"]
    for budget in request.budgets:
        records = {seed: found for seed in seeds if (found := gather(logs[budget, seed], count)) is not None}
        if len(records) < len(seeds):  # a rank is not done
            continue
        new = {"metrics": figures(records), **efforts[budget], **provenance(request.subject)}
        entry["budgets"][str(budget)] = new if new["scored"] else known.get(str(budget), new)
    return keep_entry(request, entry)


def item_log(request: TaskRequest, task: str, setting: dict[str, Any], budget: Reading, seed: int | None) -> ItemLog:
    """Where the items of one pass are kept: `setting`, budget and seed decide every value in it."""
    key = result_key({**setting, "budget": str(budget), "seed": seed})
    name = f"{task}-{budget}" + ("" if seed is None else f"-seed{seed}")
    return ItemLog(request.directory / "items" / f"{name}-{key}", Shard.from_environment().rank)


def _missing(log: ItemLog, count: int) -> list[int]:
    """Numbers of this rank's items, of 0 .. count - 1, that the log lacks."""
    done = log.records()
    return [i for i in Shard.from_environment().share(count) if i not in done]


def score_items(
    request: TaskRequest, what: str, items: dict[int, Sequence[Request]], log: ItemLog, budget: Reading, max_length: int
) -> dict[str, float]:
    """Score the items (number -> its requests) and append each to `log` as soon as all its requests are done.

    A record is {"index": number, "log_likelihoods": [...], "greedy": [...]}.

    Returns:
        What it took: {"scored": requests, "seconds", "padding": share of the places that held no token}.
    """
    owners = [(number, place) for number, requests in items.items() for place in range(len(requests))]
    open_items: dict[int, dict[int, Score]] = {number: {} for number in items}
    if empty := [number for number, requests in items.items() if not requests]:
        log.append([{"index": number, "log_likelihoods": [], "greedy": []} for number in empty])
    effort = Effort()
    started = time.perf_counter()
    with progress_bar(request.console, f"{what}, {budget}", len(owners)) as progress:

        def deliver(done: list[tuple[int, Score]]) -> None:
            finished = []
            for number, place, score in ((*owners[i], score) for i, score in done):
                scores = open_items[number]
                scores[place] = score
                if len(scores) == len(items[number]):
                    in_order = [scores[i] for i in range(len(scores))]
                    finished.append(
                        {
                            "index": number,
                            "log_likelihoods": [s.log_likelihood for s in in_order],
                            "greedy": [s.is_greedy for s in in_order],
                        }
                    )
                    del open_items[number]
            if finished:
                log.append(finished)
            if progress is not None:
                progress(len(done))

        log_likelihoods(
            request.subject.model, [r for requests in items.values() for r in requests], max_length=max_length,
            batch_tokens=request.batch_tokens, deliver=deliver, effort=effort, **attention(budget),
        )  # fmt: skip
    return {
        "scored": len(owners),
        "seconds": time.perf_counter() - started,
        "padding": 1 - effort.tokens / effort.padded_tokens if effort.padded_tokens else 0.0,
    }


def metric(by_seed: dict[int | None, float], stderr: Sequence[float] | None = None) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds (0 where seeds decide nothing, null for one seed alone)."""
    values = list(by_seed.values())
    std = statistics.stdev(values) if len(values) > 1 else 0.0 if None in by_seed else None
    return {
        "mean": statistics.fmean(values), "std": std, "stderr": statistics.fmean(stderr) if stderr else None,
        "by_seed": {str(seed): value for seed, value in by_seed.items() if seed is not None},
    }  # fmt: skip


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over items, as lm-eval gives it."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def base_setting(request: TaskRequest, task: str) -> dict[str, Any]:
    """What decides the score of an item of any task, seed and budget aside; a smaller limit asks the first of the same items."""
    subject = request.subject
    max_length = check_max_length(subject.model.config, request.max_length)
    return {"task": task, "model_sha256": subject.sha256, "dtype": subject.dtype, "max_length": max_length}


def new_entry(request: TaskRequest, setting: dict[str, Any], items: int, notes: Sequence[str], **more: Any) -> dict[str, Any]:
    """An entry of tasks.json without figures."""
    return {
        "setting": {**setting, "limit": request.limit}, "model": description(request.subject), "items": items, **more,
        "notes": list(notes), "budgets": {},
    }  # fmt: skip


def keep_entry(request: TaskRequest, entry: dict[str, Any]) -> dict[str, Any]:
    """Add to tasks.json what the entry has, and show it; the entry with all that is on file about its setting."""
    if entry["budgets"]:
        entry = add_results(request.directory / TASKS_FILE, entry)
    if request.console is not None:
        print_task(request.console, entry, [str(budget) for budget in request.budgets])
    return entry


def data_directory(request: TaskRequest) -> Path:
    if request.data_dir is None or not request.data_dir.is_dir():
        raise UserError(f"no directory {request.data_dir}; --data-dir names the one with the tasks' files")
    return request.data_dir


def limited(count: int, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit} must be at least 1")
    return count if limit is None else min(count, limit)
