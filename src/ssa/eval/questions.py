"""Multiple choice from local files: the prompts, few-shot examples and metrics of lm-evaluation-harness's tasks.

Prompts and rules are those of the task versions in `CHOICE_TASKS` as of lm-eval `LM_EVAL_VERSION`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_type_hints

import numpy as np

from ssa.checked_json import typed
from ssa.data.lines import read_objects
from ssa.errors import UserError

LM_EVAL_VERSION = "0.4.13"
DELIMITER = " "
"""Between question and answer."""
EXAMPLE_END = "\n\n"


class Question(NamedTuple):
    """One item of a task, as text."""

    contexts: tuple[str, ...]
    """What stands before each choice: once for all, or (WinoGrande) one for each."""
    endings: tuple[str, ...]
    """What is scored, without the delimiter before it: one for each choice, or (WinoGrande) once for all."""
    gold: int

    @property
    def num_choices(self) -> int:
        return max(len(self.contexts), len(self.endings))

    @property
    def example(self) -> str:
        """The question with its answer, as it stands before other questions."""
        context = self.contexts[self.gold if len(self.contexts) > 1 else 0]
        return context + DELIMITER + self.endings[self.gold if len(self.endings) > 1 else 0] + EXAMPLE_END

    def pairs(self, before: str) -> list[tuple[str, str]]:
        """(context, continuation) of each choice after the examples `before`."""
        count = self.num_choices
        contexts = self.contexts * (count if len(self.contexts) == 1 else 1)
        endings = self.endings * (count if len(self.endings) == 1 else 1)
        return [(before + context, DELIMITER + ending) for context, ending in zip(contexts, endings, strict=True)]


@dataclass(frozen=True)
class ChoiceTask:
    name: str
    files: tuple[str, ...]
    """Where the questions may lie under the data directory; the first that exists is read."""
    train_files: tuple[str, ...]
    """Likewise for the examples."""
    version: str
    """lm-eval's."""
    metrics: tuple[str, ...]
    read: Callable[[Any], Question]
    """From a line, an object of the `TypedDict` that the function takes."""
    spare_example: bool
    """lm-eval draws one example more than asked for and drops the question itself: where a task has no test split."""


class _Goal(TypedDict):
    goal: str
    choices: list[str]
    label: int


class _Asked(TypedDict):
    question: str
    choices: list[str]
    label: int


class _Labelled(TypedDict):
    query: str
    choices: list[str]
    label: int


class _Gold(TypedDict):
    query: str
    choices: list[str]
    gold: int


class _Options(TypedDict):
    context_options: list[str]
    continuation: str
    gold: int


def _piqa(doc: _Goal) -> Question:
    return Question((f"Question: {doc['goal']}\nAnswer:",), tuple(doc["choices"]), doc["label"])


def _hellaswag(doc: _Labelled) -> Question:
    return Question((doc["query"],), tuple(doc["choices"]), doc["label"])


def _arc(doc: _Asked) -> Question:
    return Question((f"Question: {doc['question']}\nAnswer:",), tuple(doc["choices"]), doc["label"])


def _openbookqa(doc: _Gold) -> Question:
    return Question((doc["query"],), tuple(doc["choices"]), doc["gold"])


def _winogrande(doc: _Options) -> Question:
    return Question(tuple(doc["context_options"]), (doc["continuation"],), doc["gold"])


def _copa(doc: _Gold) -> Question:
    # The files put a comma before the connective; lm-eval's prompt has none, and puts a second space before the choice.
    context = doc["query"]
    for connective in ("because", "therefore"):
        context = context.removesuffix(f", {connective}") + f" {connective}" if context.endswith(f", {connective}") else context
    return Question((context,), tuple(" " + choice for choice in doc["choices"]), doc["gold"])


_BOTH = ("acc", "acc_norm")
CHOICE_TASKS: dict[str, ChoiceTask] = {
    task.name: task
    for task in (
        ChoiceTask("piqa", ("piqa_val.jsonl",), ("piqa_train.jsonl",), "1.0", _BOTH, _piqa, True),
        ChoiceTask("hellaswag", ("hellaswag_val.jsonl",), ("hellaswag_train.jsonl",), "1.0", _BOTH, _hellaswag, True),
        ChoiceTask("arc_easy", ("arc_easy_test.jsonl",), ("arc_easy_train.jsonl",), "1.0", _BOTH, _arc, False),
        ChoiceTask("arc_challenge", ("arc_challenge_test.jsonl",), ("arc_challenge_train.jsonl",), "1.0", _BOTH, _arc, False),
        ChoiceTask(
            "openbookqa", ("openbookqa_test.jsonl", "extra/openbookqa_test.jsonl"),
            ("openbookqa_train.jsonl", "extra/openbookqa_train.jsonl"), "1.0", _BOTH, _openbookqa, False,
        ),
        ChoiceTask(
            "winogrande", ("winogrande_val.jsonl", "extra/winogrande_val.jsonl"),
            ("winogrande_train.jsonl", "extra/winogrande_train.jsonl"), "1.0", ("acc",), _winogrande, True,
        ),
        ChoiceTask(
            "copa", ("copa.jsonl", "extra/copa.jsonl"), ("copa_train.jsonl", "extra/copa_train.jsonl"), "1.0", ("acc",), _copa, True
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a task and where its examples come from."""

    task: ChoiceTask
    questions: list[Question]
    pool: list[Question]
    """To draw examples from."""
    is_own_pool: bool
    """There is no training file: examples come from the questions themselves, the one being asked left out."""
    sha256: str
    """Of the files."""

    def examples(self, num_fewshot: int, seed: int, count: int) -> list[str]:
        """What stands before each of the first `count` questions.

        One generator goes through the questions in order, as lm-eval's does, so a smaller `count` gives the beginning of a larger.

        Raises:
            UserError: Fewer examples than `num_fewshot`.
        """
        if num_fewshot == 0:
            return [""] * count
        spare = self.is_own_pool or self.task.spare_example
        if num_fewshot + spare > len(self.pool):
            raise UserError(f"{self.task.name}: {num_fewshot} examples a question are more than the {len(self.pool)} there are")
        generator = random.Random(seed)
        texts = []
        for question in self.questions[:count]:
            drawn = generator.sample(self.pool, num_fewshot + spare)
            if spare:
                drawn = [other for other in drawn if other != question][:num_fewshot]
                if len(drawn) < num_fewshot:  # the question is there twice, and both were drawn
                    drawn = generator.sample([other for other in self.pool if other != question], num_fewshot)
            texts.append("".join(other.example for other in drawn))
        return texts


def read_questions(task: ChoiceTask, data_dir: Path) -> QuestionSet:
    """The task's files under `data_dir`.

    Raises:
        UserError: No file, or a line that is not of the task's format; it is named.
    """
    file = _first(task.files, data_dir)
    if file is None:
        raise UserError(f"{data_dir} has no {task.files[0]}, the questions of {task.name}")
    train = _first(task.train_files, data_dir)
    digest = hashlib.sha256()
    questions = _read(task, file, digest)
    return QuestionSet(
        task, questions, questions if train is None else _read(task, train, digest), train is None, digest.hexdigest()
    )


def is_right(question: Question, log_likelihoods: Sequence[float], metric: str) -> bool:
    """`acc`: the likeliest choice is the right one; `acc_norm`: the likeliest per character of the choice's text is. Ties go to the
    first. (Characters is what lm-eval's code counts; its documentation and many papers say bytes.)"""
    scores = np.asarray(log_likelihoods)
    if metric == "acc_norm":
        scores = scores / np.array([float(len(ending)) for ending in question.endings])
    return int(np.argmax(scores)) == question.gold


def _first(names: Sequence[str], directory: Path) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _read(task: ChoiceTask, file: Path, digest: Any) -> list[Question]:
    kind = get_type_hints(task.read)["doc"]

    def question(record: dict[str, Any]) -> Question:
        made = task.read(typed(record, kind))
        if made.num_choices < 2 or not all(made.endings):
            raise UserError("it needs two choices or more, none of them empty")
        if not 0 <= made.gold < made.num_choices:
            raise UserError(f"{made.gold} is not the number of a choice")
        return made

    questions = list(read_objects(file, question, f"{{file}}:{{line}} is no question of {task.name}"))
    if not questions:
        raise UserError(f"{file} holds no questions")
    with file.open("rb") as content:
        digest.update(content.read())
    return questions
