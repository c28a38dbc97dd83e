"""Running the multiple-choice tasks of `ssa.eval.questions` at several budgets and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssa.budget import Reading
from ssa.errors import UserError
from ssa.eval.loglikelihood import encode_pairs
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather
from ssa.eval.model_under_test import provenance
from ssa.eval.questions import CHOICE_TASKS, LM_EVAL_VERSION, QuestionSet, is_right, read_questions
from ssa.eval.results import TASKS_FILE, read_results
from ssa.eval.scored import (
    base_setting,
    data_directory,
    figures_of,
    item_log,
    keep_entry,
    limited,
    metric,
    missing,
    new_entry,
    score_items,
    standard_error,
)
from ssa.eval.tasks import TaskRequest, shots

ONE_SEED_NOTE = "0 examples: seeds change nothing, one pass serves them all"
OWN_POOL_NOTE = "there is no training file: examples are drawn from the questions themselves, the one being asked left out"


def run(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """See `ssa.eval.tasks`."""
    read_results(request.directory / TASKS_FILE)  # a damaged file is better known now than after the work
    directory = data_directory(request)
    sets = {name: read_questions(CHOICE_TASKS[name], directory) for name in names}
    return {name: _run_task(questions, request) for name, questions in sets.items()}


def _run_task(questions: QuestionSet, request: TaskRequest) -> dict[str, Any]:
    task = questions.task
    num_fewshot, count = shots(request, task.name) or 0, limited(len(questions.questions), request.limit)
    if num_fewshot < 0:
        raise UserError(f"num_fewshot = {num_fewshot} must be 0 or more")
    setting = {
        **base_setting(request, task.name), "version": task.version, "lm_eval": LM_EVAL_VERSION, "data_sha256": questions.sha256,
        "num_fewshot": num_fewshot,
    }  # fmt: skip
    seeds: list[int | None] = list(request.seeds) if num_fewshot else [None]
    notes, source = [ONE_SEED_NOTE], None
    if num_fewshot:
        notes, source = ([OWN_POOL_NOTE], "the questions") if questions.is_own_pool else ([], "training file")
    entry = new_entry(request, {**setting, "seeds": seeds if num_fewshot else []}, count, notes, examples_from=source)
    efforts = {budget: {"scored": 0.0, "seconds": 0.0, "padding": 0.0} for budget in request.budgets}
    logs: dict[tuple[Reading, int | None], ItemLog] = {}
    for seed in seeds:
        before = questions.examples(num_fewshot, seed or 0, count)
        for budget in request.budgets:
            logs[budget, seed] = item_log(request, task.name, setting, budget, seed)
        lacking = {budget: missing(logs[budget, seed], count) for budget in request.budgets}
        encoded: dict[int, list[Any]] = {i: [] for i in sorted(set().union(*lacking.values()))}
        pairs = [(i, pair) for i in encoded for pair in questions.questions[i].pairs(before[i])]
        for (i, _), made in zip(pairs, encode_pairs(request.subject.tokenizer, [pair for _, pair in pairs]), strict=True):
            encoded[i].append(made)
        for budget, numbers in lacking.items():
            what = task.name if seed is None else f"{task.name}, seed {seed}"
            took = score_items(request, what, {i: encoded[i] for i in numbers}, logs[budget, seed], budget, setting["max_length"])
            for key, value in took.items():
                efforts[budget][key] = max(efforts[budget][key], value) if key == "padding" else efforts[budget][key] + value
    for budget in request.budgets:
        records = {seed: gather(logs[budget, seed], count) for seed in seeds}
        figures = _figures(questions, records)
        if figures is not None:
            new = {"metrics": figures, **efforts[budget], **provenance(request.subject)}
            entry["budgets"][str(budget)] = figures_of(request, entry, budget, new)
    return keep_entry(request, entry)


def _figures(questions: QuestionSet, records: dict[int | None, list[dict[str, Any]] | None]) -> dict[str, Any] | None:
    """{metric: figures}, None while a rank is not done."""
    figures = {}
    for name in questions.task.metrics:
        right: dict[int | None, list[float]] = {}
        for seed, of_seed in records.items():
            if of_seed is None:
                return None
            asked = questions.questions[: len(of_seed)]
            right[seed] = [
                float(is_right(question, record["log_likelihoods"], name))
                for question, record in zip(asked, of_seed, strict=True)
            ]
        figures[name] = metric(
            {seed: sum(values) / len(values) for seed, values in right.items()}, [standard_error(v) for v in right.values()]
        )
    return figures
