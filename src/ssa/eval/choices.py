"""Running the multiple-choice tasks of `ssa.eval.questions` at several budgets and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ssa.errors import UserError
from ssa.eval.loglikelihood import Request, encode_pairs
from ssa.eval.questions import CHOICE_TASKS, LM_EVAL_VERSION, QuestionSet, is_right, read_questions
from ssa.eval.results import TASKS_FILE, read_results
from ssa.eval.scored import Records, base_setting, data_directory, limited, metric, new_entry, run_scored, standard_error
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

    def requests(numbers: list[int], seed: int | None) -> dict[int, list[Request]]:
        before = questions.examples(num_fewshot, seed or 0, count)
        pairs = [(i, pair) for i in numbers for pair in questions.questions[i].pairs(before[i])]
        encoded: dict[int, list[Request]] = {i: [] for i in numbers}
        for (i, _), made in zip(pairs, encode_pairs(request.subject.tokenizer, [pair for _, pair in pairs]), strict=True):
            encoded[i].append(made)
        return encoded

    return run_scored(request, entry, setting, seeds, requests, partial(_figures, questions))


def _figures(questions: QuestionSet, records: Records) -> dict[str, Any]:
    """{metric: figures}."""
    figures = {}
    for name in questions.task.metrics:
        right = {
            seed: [
                float(is_right(question, record["log_likelihoods"], name))
                for question, record in zip(questions.questions, of_seed, strict=False)
            ]
            for seed, of_seed in records.items()
        }
        figures[name] = metric(
            {seed: sum(values) / len(values) for seed, values in right.items()}, [standard_error(v) for v in right.values()]
        )
    return figures
