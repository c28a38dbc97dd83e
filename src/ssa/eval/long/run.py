"""The runners behind `ssa eval --tasks ruler,longbench,longeval,books`; see `ssa.eval.tasks`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from ssa.budget import Reading
from ssa.errors import UserError
from ssa.eval.documents import document_texts, read_documents
from ssa.eval.long import longbench, longeval, ruler
from ssa.eval.long.books import BookWindows, perplexity_or_none
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.items import GenerationTask
from ssa.eval.long.measure import Mean, batch_tokens, generate_items
from ssa.eval.long.suite import check_length, local_folder, run_suite, title
from ssa.eval.needle import Haystack
from ssa.eval.tables import markdown
from ssa.eval.tasks import TaskRequest
from ssa.ranks import Shard

DEFAULT_LENGTHS = (4096, 8192, 16384, 32768)
"""Those of them that the model has positions for."""
DEFAULT_CASES = 500
DEFAULT_HAYSTACK = "builtin:python"
LONGEVAL_TASKS = ("longeval_lines", "longeval_topics")
BOOK_TASKS = {"books": "last", "books_half": "half"}


class _Generated:
    """A generation task as a job of a suite."""

    def __init__(self, task: GenerationTask, label: dict[str, Any], request: TaskRequest) -> None:
        self.setting = _with_prompts(task.setting, request)
        self._task, self._label, self._request = task, label, request

    def __len__(self) -> int:
        return len(self._task)

    def compute(self, budget: Reading, log: ItemLog, shard: Shard, progress: Callable[[int], None] | None) -> bool:
        subject = self._request.subject
        tokens = batch_tokens(subject.model.device, self._request.batch_tokens)
        return generate_items(
            self._task, subject.model, subject.tokenizer, budget, log, shard, tokens=tokens, prefill_mode=self._request.prefill_mode,
            progress=progress,
        )  # fmt: skip

    def cells(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mean = Mean.of([record["score"] for record in records])
        return [{**self._label, "score": mean.value, "standard_error": mean.standard_error, "items": mean.items}]


def _with_prompts(setting: dict[str, Any], request: TaskRequest) -> dict[str, Any]:
    """What was measured, where prompts are read in a mode of their own."""
    return setting if request.prefill_mode is None else {**setting, "prefill_mode": request.prefill_mode}


class _Windows:
    """Book windows as a job of a suite."""

    def __init__(self, windows: BookWindows, task: str, request: TaskRequest) -> None:
        self.setting, self._windows, self._task, self._request = windows.setting, windows, task, request

    def __len__(self) -> int:
        return len(self._windows.places)

    def compute(self, budget: Reading, log: ItemLog, shard: Shard, progress: Callable[[int], None] | None) -> bool:
        model = self._request.subject.model
        tokens = batch_tokens(model.device, self._request.batch_tokens)
        return self._windows.measure(model, budget, log, shard, tokens=tokens, progress=progress)

    def cells(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        cells = []
        for length in self._windows.lengths:
            scored = len(self._windows.targets(length))
            mean = Mean.of([record["nats"][str(length)] / scored for record in records])
            cells.append(
                {"task": self._task, "length": length, "nats_per_token": mean.value, "standard_error": mean.standard_error,
                 "perplexity": perplexity_or_none(mean.value), "windows": mean.items, "tokens": mean.items * scored}
            )  # fmt: skip
        return cells


def run_ruler(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """RULER. `request.lengths` by task, `limit` cases each, `seeds[0]`; the haystack is `request.haystack`."""
    tasks = [name for name in ruler.TASKS if "ruler" in names or name in names]
    lengths = _lengths(request)
    seed, cases = _one_seed(request), request.limit or DEFAULT_CASES
    source = request.haystack or DEFAULT_HAYSTACK
    tokenizer, haystack, text = request.subject.tokenizer, None, None
    if any(ruler.TASKS[task].needs_text for task in tasks):
        pieces = (re.sub(r"\s+", " ", piece) for piece in document_texts(source, "valid", tokenizer))
        haystack = Haystack(pieces, tokenizer, max(lengths))
        text = hashlib.sha256(haystack.tokens.tobytes()).hexdigest()
    jobs = []
    for task in tasks:
        for length in lengths:
            made = ruler.RulerTask(task, length, cases, seed, tokenizer, haystack)
            if ruler.TASKS[task].needs_text:
                made.setting["haystack_sha256"] = text
            made.item(0)  # a length without room shows now
            jobs.append(_Generated(made, {"task": task, "length": length}, request))
    setting = {"tasks": tasks, "lengths": lengths, "cases": cases, "seed": seed, "haystack": str(source), "haystack_sha256": text}
    entry = run_suite(
        "ruler", jobs, _with_prompts(setting, request), request, _by_length("RULER, percent of the answers written"), _averages
    )
    return {name: entry for name in names}


def run_longbench(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """LongBench's English tasks from `request.data_dir` or the hub; with `lengths`, at each of them."""
    tasks = [name for name in longbench.TASKS if "longbench" in names or f"longbench_{name}" in names]
    lengths = _lengths(request, (request.max_length or min(request.subject.model.config.max_position_embeddings, 32768),))
    jobs = []
    for task in tasks:
        records = longbench.read_records(task, request.data_dir)
        for length in lengths:
            made = longbench.LongBenchTask(task, records, length, request.subject.tokenizer, request.limit)
            jobs.append(_Generated(made, {"task": task, "length": length}, request))
    setting = {
        "tasks": tasks, "lengths": lengths, "limit": request.limit, "data": [job.setting["items_sha256"] for job in jobs],
    }  # fmt: skip
    entry = run_suite(
        "longbench", jobs, _with_prompts(setting, request), request, _by_length("LongBench, English tasks"), _averages
    )
    return {name: entry for name in names}


def run_longeval(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """LongEval's files of lines and topics in `request.data_dir`; a cell's "length" is the mean number of prompt tokens."""
    jobs, data = [], []
    tasks = [task for task in LONGEVAL_TASKS if "longeval" in names or task in names]
    for task in tasks:
        for path in longeval.find_files(request.data_dir, task.removeprefix("longeval_")):
            made = longeval.LongEvalTask(path, request.subject.tokenizer, request.limit)
            sizes = [len(made.item(index).prompt) for index in range(len(made))]
            check_length(max(sizes) + made.max_new_tokens, request.subject)
            label = {"task": f"{made.size} {made.kind}", "length": round(sum(sizes) / len(sizes))}
            jobs.append(_Generated(made, label, request))
            data.append(made.setting["records_sha256"])
    setting = {"tasks": tasks, "limit": request.limit, "data": data}
    entry = run_suite("longeval", jobs, _with_prompts(setting, request), request, _show_longeval, _averages)
    return {name: entry for name in names}


def run_books(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """Perplexity by length over the texts of `request.data_dir`; `limit` windows, the paper's 1000 by default."""
    if request.data_dir is None:
        raise UserError("books are read from local files; name their directory with --data-dir")
    source = local_folder(request.data_dir, "books")
    assert source is not None
    documents, _ = read_documents(source, "valid", request.subject.tokenizer)
    lengths = _lengths(request)
    entries = {}
    for name in names:
        options: dict[str, Any] = {"scored": BOOK_TASKS[name]}
        if request.limit is not None:
            options["samples"] = request.limit
        windows = BookWindows(documents, lengths, **options)
        setting = {**windows.setting, "data": str(source), "documents": len(documents), "windows": len(windows.places)}
        entries[name] = run_suite(name, [_Windows(windows, name, request)], setting, request, _show_books)
    return entries


def _lengths(request: TaskRequest, default: Sequence[int] = ()) -> list[int]:
    limit = request.subject.model.config.max_position_embeddings
    lengths = sorted(set(request.lengths)) or list(default) or [n for n in DEFAULT_LENGTHS if n <= limit] or [limit]
    for length in lengths:
        check_length(length, request.subject)
    return lengths


def _one_seed(request: TaskRequest) -> int:
    if len(request.seeds) > 1:
        raise UserError(f"RULER draws its cases from one seed, not {', '.join(map(str, request.seeds))}; --limit sets how many")
    return request.seeds[0]


def _averages(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Unweighted means over tasks: of each length, and of all."""
    lengths = sorted({cell["length"] for cell in cells})
    return {
        "average_by_length": {str(n): Mean.of([c["score"] for c in cells if c["length"] == n]).value for n in lengths},
        "average": Mean.of([cell["score"] for cell in cells]).value,
    }


def _by_length(what: str) -> Callable[[dict[str, Any]], str]:
    """Attention and task by length, tasks' average below."""

    def show(entry: dict[str, Any]) -> str:
        setting = entry["setting"]
        rows = []
        for name, figures in entry["budgets"].items():
            scores = {(cell["task"], cell["length"]): cell["score"] for cell in figures["cells"]}
            for task in setting["tasks"]:
                rows.append([f"{name} {task}", *(_percent(scores[task, length]) for length in setting["lengths"])])
            if len(setting["tasks"]) > 1:
                average = figures["average_by_length"]
                rows.append([f"**{name} average**", *(f"**{_percent(average[str(n)])}**" for n in setting["lengths"])])
        return title(entry, what) + markdown(["attention, task", *(f"{n:,}" for n in setting["lengths"])], rows)

    return show


def _show_longeval(entry: dict[str, Any]) -> str:
    first = next(iter(entry["budgets"].values()))["cells"]
    headings = ["attention", *(f"{cell['task']} ({cell['length']:,})" for cell in first)]
    rows = [[name, *(_percent(cell["score"]) for cell in figures["cells"])] for name, figures in entry["budgets"].items()]
    return title(entry, "LongEval, percent right (tokens of a prompt)") + markdown(headings, rows)


def _show_books(entry: dict[str, Any]) -> str:
    setting = entry["setting"]
    what = f"last {setting['stride']} tokens" if setting["scored"] == "last" else "second half"
    rows = [
        [name, *(f"{cell['perplexity']:.3f}" if cell["perplexity"] is not None else "-" for cell in figures["cells"])]
        for name, figures in entry["budgets"].items()
    ]
    text = f"perplexity of the {what} of {setting['windows']} windows of {setting['documents']} books"
    return title(entry, text) + markdown(["attention", *(f"{n:,}" for n in setting["lengths"])], rows)


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"
