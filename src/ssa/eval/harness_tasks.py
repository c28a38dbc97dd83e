"""lm-evaluation-harness's own tasks over local files: its templates, prompts and metrics, the items of `ssa eval --data-dir`.

    lm_eval --model hf --model_args pretrained=MODEL --include_path DIRECTORY --tasks local_piqa

Made to compare, and to run lm-eval where there is no network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssa.errors import UserError
from ssa.eval.questions import CHOICE_TASKS, LM_EVAL_VERSION, Question, read_questions
from ssa.eval.wikitext import RAW_FILES, raw_pages
from ssa.files import write_atomically

LETTERS = "ABCDEFGH"
DEFINITIONS = {
    "piqa": "piqa/piqa.yaml", "hellaswag": "hellaswag/hellaswag.yaml", "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "winogrande": "winogrande/default.yaml",
    "copa": "super_glue/copa/default.yaml", "wikitext": "wikitext/wikitext.yaml",
}  # fmt: skip
"""Where lm-eval has them, under its tasks."""


def write_tasks(names: Sequence[str], data_dir: Path, out: Path) -> list[str]:
    """Write a task "local_NAME" for each of `names` into `out`, to be given to lm-eval as its include path.

    Each includes lm-eval's own definition and changes where the data lies, and nothing else but for this: where there is no
    training file, examples are drawn from the questions themselves.

    Raises:
        UserError: A task or file that is not there.
    """
    from lm_eval import tasks

    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in DEFINITIONS:
            raise UserError(f"no local form of {name!r}; there are {', '.join(DEFINITIONS)}")
        definition = Path(tasks.__file__).parent / DEFINITIONS[name]
        if not definition.is_file():
            raise UserError(f"this lm-eval has no {DEFINITIONS[name]}; install lm-eval {LM_EVAL_VERSION}")
        changes = _wikitext(data_dir, out) if name == "wikitext" else _choices(name, data_dir, out)
        lines = [
            f"include: {json.dumps(str(definition))}",
            f"task: local_{name}",
            "dataset_path: json",
            "dataset_name: null",
        ]
        lines += [f"{key}: {json.dumps(value)}" for key, value in changes.items()]  # JSON is YAML
        write_atomically(out / f"local_{name}.yaml", "\n".join(lines) + "\n")
    return [f"local_{name}" for name in names]


def _choices(name: str, data_dir: Path, out: Path) -> dict[str, Any]:
    questions = read_questions(CHOICE_TASKS[name], data_dir)
    files = {"test": _write(out / f"{name}-test.jsonl", [_RECORDS[name](q) for q in questions.questions])}
    changes: dict[str, Any] = {"dataset_kwargs": {"data_files": files, "cache_dir": str(out / "cache")}, "process_docs": None}
    if questions.is_own_pool:
        # lm-eval leaves the question itself out where examples come from the test split
        return changes | {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    files["train"] = _write(out / f"{name}-train.jsonl", [_RECORDS[name](q) for q in questions.pool])
    if questions.task.spare_example:
        files["validation"] = files.pop("test")
    return changes


def _wikitext(data_dir: Path, out: Path) -> dict[str, Any]:
    raw = next((data_dir / name for name in RAW_FILES if (data_dir / name).is_file()), None)
    if raw is None:
        raise UserError(f"{data_dir} has no {RAW_FILES[0]}, the raw text of wikitext, which lm-eval detokenises itself")
    file = _write(out / "wikitext-test.jsonl", [{"page": page} for page in raw_pages(raw)])
    return {
        "dataset_kwargs": {"data_files": {"test": file}, "cache_dir": str(out / "cache")},
        "training_split": None, "validation_split": None,
    }  # fmt: skip


def _write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    return str(path.resolve())


def _lettered(question: Question) -> dict[str, Any]:
    letters = list(LETTERS[: question.num_choices])
    return {"choices": {"text": list(question.endings), "label": letters}, "answerKey": letters[question.gold]}


def _piqa(question: Question) -> dict[str, Any]:
    goal = question.contexts[0].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"goal": goal, "sol1": question.endings[0], "sol2": question.endings[1], "label": question.gold}


def _hellaswag(question: Question) -> dict[str, Any]:
    return {"query": question.contexts[0], "choices": list(question.endings), "label": str(question.gold)}


def _arc(question: Question) -> dict[str, Any]:
    return {"question": question.contexts[0].removeprefix("Question: ").removesuffix("\nAnswer:"), **_lettered(question)}


def _openbookqa(question: Question) -> dict[str, Any]:
    return {"question_stem": question.contexts[0], **_lettered(question)}


def _winogrande(question: Question) -> dict[str, Any]:
    one, other = question.contexts
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    common, first, second = one[:shared], one[shared:], other[shared:]
    return {
        "sentence": f"{common}_ {question.endings[0]}", "option1": first, "option2": second, "answer": str(question.gold + 1),
    }  # fmt: skip


def _copa(question: Question) -> dict[str, Any]:
    premise, _, connective = question.contexts[0].rpartition(" ")
    first, second = (ending.removeprefix(" ") for ending in question.endings)
    return {
        "premise": premise + ".", "question": "cause" if connective == "because" else "effect", "choice1": first,
        "choice2": second, "label": question.gold,
    }  # fmt: skip


_RECORDS: dict[str, Callable[[Question], dict[str, Any]]] = {
    "piqa": _piqa, "hellaswag": _hellaswag, "arc_easy": _arc, "arc_challenge": _arc, "openbookqa": _openbookqa,
    "winogrande": _winogrande, "copa": _copa,
}  # fmt: skip
