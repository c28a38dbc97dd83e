"""`ssa eval`: perplexity and needle grids of a run at several budgets, kept in RUN/eval and shown as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ssa.budget import FULL, AttentionMode, LayerBudgets, Reading, parse_reading, parse_readings
from ssa.collectives import meet
from ssa.device import local_device
from ssa.errors import UserError
from ssa.eval.long.rope import scaled
from ssa.eval.model_under_test import ModelUnderTest, evaluation_directory, load_model_under_test
from ssa.eval.needle import check_grid
from ssa.eval.perplexity import WINDOW_TOKENS
from ssa.eval.table1 import COLUMNS, write_table1
from ssa.eval.tasks import GENERATING, HARNESS, PAPER_SHOTS, TaskRequest, is_complete, run_tasks, runner_of
from ssa.eval.text_passes import run_needles, run_perplexity
from ssa.files import check_directory
from ssa.infer.load import check_budgets
from ssa.runs.home import run_context, run_data


def evaluate(
    run: Path | str,
    *,
    data: str | Path | None = None,
    split: str = "valid",
    budgets: str | Sequence[Reading | str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    perplexity: bool = True,
    tasks: Sequence[str] = (),
    data_dir: Path | str | None = None,
    seeds: Sequence[int] = (0,),
    num_fewshot: int | Mapping[str, int] | None = None,
    limit: int | None = None,
    lengths: Sequence[int] = (),
    max_length: int | None = None,
    batch_tokens: int | None = None,
    prefill_mode: AttentionMode | None = None,
    beside: Sequence[Path | str] = (),
    haystack: str | None = None,
    rope_factor: float | None = None,
    needle_lengths: Sequence[int] = (),
    needle_depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needle_cases: int = 20,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    out: Path | str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the model of `run` (a run, a checkpoint or a model directory).

    Args:
        data: A prepared directory, text files or "builtin:python"; by default the run's own data.
        split: Of a prepared directory.
        budgets: "4x16,16x16,full" or a list of such; "full" = full attention. By default the model's own budget and full.
        context: Window in tokens; by default the training context (at most `run_directory.DEFAULT_CONTEXT` for a model without a recipe).
        stride: New tokens per window; `context` by default.
        max_tokens: Score no more than so many tokens, from the beginning of the data.
        batch_size: Windows computed at once; by default about `WINDOW_TOKENS` tokens.
        perplexity: False = needles and tasks only.
        tasks: Names from `ssa.eval.tasks.TASKS`; without `data_dir` any task of lm-evaluation-harness too.
        data_dir: Directory of the tasks' local files.
        seeds: Of what a task draws (few-shot examples, synthetic cases).
        num_fewshot: Examples before each question, for all tasks or by name; None = as each task has it by itself.
        limit, lengths, max_length, batch_tokens, prefill_mode, haystack: See `ssa.eval.tasks.TaskRequest`.
        rope_factor: Scale the model's RoPE by this, to read beyond the context it was trained on (`ssa.eval.long.rope`).
        beside: Other runs whose results in the same settings go into the same Table 1 (see `ssa.eval.table1`).
        needle_lengths, needle_depths, needle_cases, seed: See `needle_grid`; no lengths = no needles.
        out: Directory of the result files; by default RUN/eval (DIRECTORY/eval for a model directory).
        console: Where the progress bar and the tables go; None = nowhere.

    Returns:
        {"perplexity": entry or None, "needle": entry or None, "tasks": {name: entry}, "files": [path, ...]}; entries are what
        the files hold under their latest key (see `ssa.eval.results`), budgets of the same setting measured earlier included.

    Raises:
        UserError: Anything a user can get wrong, before the first forward pass where it can be known then. An option of something that
            is not measured is an error too.
    """
    if not perplexity and not needle_lengths and not tasks:
        raise UserError("nothing to evaluate: perplexity is off and there are no needle lengths and no tasks")
    if not tasks:
        _refuse("tasks", data_dir=data_dir, shots=num_fewshot, limit=limit, lengths=lengths, max_length=max_length,
                batch_tokens=batch_tokens, prefill_mode=prefill_mode, beside=beside, haystack=haystack)  # fmt: skip
    if not perplexity:
        _refuse("perplexity", context=context, stride=stride, max_tokens=max_tokens)
    if isinstance(num_fewshot, Mapping) and num_fewshot != PAPER_SHOTS and (stray := sorted(set(num_fewshot) - set(tasks))):
        raise UserError(f"a number of shots is given for {stray[0]}, which is not among the tasks {', '.join(tasks)}")
    if not perplexity and not needle_lengths:
        _refuse("perplexity and needles", data=data, batch_size=batch_size)
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds {list(seeds)} must be one or more numbers from 0 on")
    if needle_lengths:
        check_grid(needle_lengths, needle_depths, needle_cases, seed)
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} must be at least 1")
    data_dir = None if data_dir is None else Path(data_dir)
    if prefill_mode not in (None, "sparse", "full"):
        raise UserError(f"--prefill-mode {prefill_mode!r} is neither 'sparse' nor 'full'")
    if prefill_mode is not None and not any(runner_of(name, data_dir) in GENERATING for name in tasks):
        raise UserError(
            f"--prefill-mode is for tasks that generate (RULER, LongBench, LongEval), and {', '.join(tasks)} does not"
        )
    if any(runner_of(name, data_dir) == HARNESS for name in tasks):
        meet()  # perplexity, which comes first, may take one rank much longer than another
    asked = None if budgets is None else _parsed(budgets)
    others = [evaluation_directory(other) for other in beside]
    subject = load_model_under_test(run, local_device(device), dtype)
    if rope_factor is not None:
        subject = scaled(subject, rope_factor)
    own = subject.model.config.budget
    chosen = list(dict.fromkeys([own, FULL] if asked is None else asked))
    if foreign := [budget for budget in chosen if isinstance(budget, LayerBudgets) and budget != own]:
        raise UserError(
            f"{foreign[0]}: budgets for each layer are evaluated where they are the model's own (layer_budgets); save such a model"
        )
    check_budgets(subject.model.config, chosen)
    directory = Path(out) if out is not None else subject.directory
    check_directory(directory)
    positions = subject.model.config.max_position_embeddings
    if needle_lengths and max(needle_lengths) > positions:
        raise UserError(f"needle length {max(needle_lengths)} exceeds the model's {positions} positions")
    result: dict[str, Any] = {"perplexity": None, "needle": None, "tasks": {}, "files": []}
    request = TaskRequest(
        subject, chosen, directory, data_dir=data_dir, seeds=tuple(dict.fromkeys(seeds)),
        num_fewshot=dict(num_fewshot) if isinstance(num_fewshot, Mapping) else num_fewshot, limit=limit, lengths=lengths,
        max_length=max_length, batch_tokens=batch_tokens, prefill_mode=prefill_mode, haystack=haystack, console=console,
    )  # fmt: skip
    if perplexity or needle_lengths:
        source = run_data(run) if data is None else data
    if perplexity:
        context = _context(subject, context)
        stride = context if stride is None else stride
        result["perplexity"] = run_perplexity(
            request, source, split, context=context, stride=stride, max_tokens=max_tokens, batch_size=batch_size
        )
    if needle_lengths:
        result["needle"] = run_needles(
            request, source, split, lengths=needle_lengths, depths=needle_depths, cases=needle_cases, seed=seed,
            batch_tokens=WINDOW_TOKENS if batch_size is None else batch_size * max(needle_lengths),
        )  # fmt: skip
    result["files"] = [directory / f"{name}.json" for name in ("perplexity", "needle") if (result[name] or {}).get("budgets")]
    if tasks:
        result["tasks"] = run_tasks(tasks, request)
        if all(is_complete(entry, chosen) for name, entry in result["tasks"].items() if name in COLUMNS):
            result["files"] += write_table1(result["tasks"], others, directory)
    return result


def _refuse(measurement: str, **options: object) -> None:
    """Options of a measurement that is not made would have no effect."""
    for name, value in options.items():
        if value is not None and value != () and value != []:
            raise UserError(f"{name} = {value} belongs to {measurement}, not measured here; leave it out")


def _context(subject: ModelUnderTest, context: int | None) -> int:
    limit = subject.model.config.max_position_embeddings
    if context is not None:
        if context > limit:
            raise UserError(f"context = {context} exceeds the model's {limit} positions")
        return context
    return min(run_context(subject.path), limit)


def _parsed(budgets: str | Sequence[Reading | str]) -> list[Reading]:
    if isinstance(budgets, str):
        return parse_readings(budgets)
    found = [b for item in budgets for b in (parse_readings(item) if isinstance(item, str) else [parse_reading(item)])]
    if not found:
        raise UserError("no budget given; write e.g. 16x16,full")
    return found
