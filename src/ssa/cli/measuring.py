"""The verbs that measure models. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from ssa.budget import Budget, parse_readings
from ssa.cli.metavars import BUDGET, BUDGETS, DATA, DEVICE, DIRECTORY, DTYPE, FILE, NAME, NAMES, NUMBERS, PATH, RUN, SHOTS
from ssa.errors import UserError
from ssa.ranks import Shard
from ssa.terminal import console, say, tell


def evaluate(
    run: RUN,
    /,
    data: DATA = "",
    split: NAME = "valid",
    budgets: BUDGETS = "",
    context: int = 0,
    stride: int = 0,
    max_tokens: int = 0,
    batch_size: int = 0,
    perplexity: bool = True,
    tasks: NAMES = "",
    data_dir: DIRECTORY = "",
    seeds: NUMBERS = "0",
    shots: SHOTS = "",
    limit: int = 0,
    lengths: NUMBERS = "",
    max_length: int = 0,
    batch_tokens: int = 0,
    beside: tuple[RUN, ...] = (),
    prefill_mode: Literal["", "sparse", "full"] = "",
    haystack: FILE = "",
    rope_factor: float = 0,
    needle_lengths: NUMBERS = "",
    needle_depths: NUMBERS = "0,0.25,0.5,0.75,1",
    needle_cases: int = 20,
    seed: int = 0,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    out: DIRECTORY = "",
) -> None:
    """Measure perplexity, tasks, and needles in a haystack, under full and sparse inference at any budget.

    Args:
        run: A run, one of its checkpoints, or a model directory.
        data: A prepared directory, or text to read; the run's own data if left out.
        split: Split of a prepared directory.
        budgets: Comma-separated: kxs for k blocks of s keys, full for full attention; the model's own and full if left out.
        context: Tokens of a window; the recipe's if 0.
        stride: Tokens that each window scores; the context if 0.
        max_tokens: Stop after so many scored tokens; 0 = all.
        batch_size: Windows at a time; 0 = a size that fits.
        perplexity: Measure perplexity, unless tasks are named.
        tasks: Comma-separated, e.g. piqa,hellaswag,arc_easy,arc_challenge,wikitext.
        data_dir: Directory of the tasks' files; without one, lm-evaluation-harness fetches its own.
        seeds: Comma-separated; figures are means and standard deviations over them.
        shots: Examples before each question: a number, piqa=3,hellaswag=10, or paper; each task's own if left out (mostly 0).
        limit: Items of each task; 0 = all.
        lengths: Comma-separated context lengths in tokens, for tasks that have them.
        max_length: Longest input of a task in tokens; 0 = the model's positions.
        batch_tokens: Tokens of a task computed at once; 0 = a size that fits.
        beside: Other runs, evaluated in the same settings before, for the rows of one table.
        prefill_mode: How RULER, LongBench and LongEval read their prompts, sparse or full, whatever the budget that they go on with; as the budget says if left out.
        haystack: Text that RULER's needles are hidden in; builtin:python if left out.
        rope_factor: Scale RoPE by this, to read beyond the context that the model was trained on; 0 = as it is.
        needle_lengths: Comma-separated haystack lengths in tokens; none if left out.
        needle_depths: Where the needle lies, 0 = start, 1 = end.
        needle_cases: Cases for each length and depth.
        seed: Seed of the needles.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32 or bfloat16.
        out: Directory for the results; RUN/eval if left out.
    """
    needle_at = _numbers(needle_lengths, int, "--needle-lengths")
    depths = _numbers(needle_depths, float, "--needle-depths")
    if budgets:
        parse_readings(budgets)  # before anything slow
    from ssa.eval.tasks import parse_shots, parse_tasks

    names = parse_tasks(tasks, data_dir or None) if tasks else []
    num_fewshot = parse_shots(shots) if shots else None
    from ssa.eval.evaluate import evaluate as measure

    measure(
        run, data=data or None, split=split, budgets=budgets or None, context=context or None, stride=stride or None,
        max_tokens=max_tokens or None, batch_size=batch_size or None, perplexity=perplexity and not names, tasks=names,
        data_dir=data_dir or None, seeds=_numbers(seeds, int, "--seeds"), num_fewshot=num_fewshot, limit=limit or None,
        lengths=_numbers(lengths, int, "--lengths"), max_length=max_length or None, batch_tokens=batch_tokens or None, prefill_mode=prefill_mode or None, beside=beside,
        haystack=haystack or None, rope_factor=rope_factor or None,
        needle_lengths=needle_at,
        needle_depths=depths, needle_cases=needle_cases, seed=seed, device=device, dtype=dtype, out=out or None, console=console(),
    )  # fmt: skip


def analyze(
    runs: tuple[RUN, ...],
    /,
    data: DATA = "",
    split: NAME = "valid",
    budget: BUDGET = "",
    context: int = 0,
    max_tokens: int = 0,
    whole_documents: bool = False,
    decode_steps: int = 64,
    seed: int = 0,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    out: DIRECTORY = "",
    html: bool = True,
) -> None:
    """Measure attention sparsity, entropy and their kin, and draw a report of one or several runs side by side.

    Args:
        runs: Runs, checkpoints or model directories.
        data: A prepared directory, or text to read; the first run's own data if left out.
        split: Split of a prepared directory.
        budget: kxs; the model's own if left out.
        context: Tokens of a row; the recipe's if 0.
        max_tokens: How much text to look at; 16384, or one row where that is longer, if 0.
        whole_documents: Read only the beginnings of documents of at least `context` tokens instead of packed rows.
        decode_steps: Tokens to generate, to see how the selection changes from step to step; 0 = none.
        seed: Seed of the sampled points.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32 or bfloat16.
        out: Directory for results and report; beside the runs if left out.
        html: Write the report; the JSON is always written.
    """
    if budget:
        Budget.parse(budget)
    if not runs:
        raise UserError("no run named; ssa analyze RUN [RUN ...]")
    from ssa.analysis.analyze import analyze as measure
    from ssa.report.report import write_analysis_report

    result = measure(
        list(runs), data=data or None, split=split, budget=budget or None, context=context or None, max_tokens=max_tokens or None,
        whole_documents=whole_documents, decode_steps=decode_steps, seed=seed, device=device, dtype=dtype, out=out or None, console=console(),
    )  # fmt: skip
    if html and (page := write_analysis_report(result)):
        say(f"report: {page}")


def tune_budget(
    run: RUN,
    /,
    target_kept_mass: float = 0.98,
    data: DATA = "",
    split: NAME = "valid",
    block_size: int = 0,
    context: int = 0,
    max_tokens: int = 0,
    whole_documents: bool = False,
    needle_lengths: NUMBERS = "",
    seed: int = 0,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    out: DIRECTORY = "",
    overwrite: bool = False,
) -> None:
    """Find the least budget of each layer that keeps a share of attention's mass, and write a model that reads by it.

    Args:
        run: A run, one of its checkpoints, or a model directory.
        target_kept_mass: Share of full attention's mass that each layer's selection is to keep, above 0 and at most 1.
        data: A prepared directory, or text to read; the run's own data if left out.
        split: Split of a prepared directory.
        block_size: Tokens of a block; the model's own if 0.
        context: Tokens of a row; the recipe's if 0.
        max_tokens: How much text to look at; 16384, or one row where that is longer, if 0.
        whole_documents: Read only the beginnings of documents of at least `context` tokens instead of packed rows.
        needle_lengths: Comma-separated haystack lengths in tokens, to look for needles with both budgets, too; none if left out.
        seed: Draws the rows, and the needles.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32 or bfloat16.
        out: Model directory to write; RUN-tuned beside the run if left out. It shares the weights' files with RUN where it can.
        overwrite: Replace the model that is in `out`.
    """
    if not 0 < target_kept_mass <= 1:
        raise UserError(f"--target-kept-mass {target_kept_mass} must lie in 0..1, 0 excluded: a share of full attention's mass")
    lengths = _numbers(needle_lengths, int, "--needle-lengths")
    from ssa.analysis.tune_budget import tune_budget as tune

    tune(
        run, target=target_kept_mass, data=data or None, split=split, block_size=block_size or None, context=context or None,
        max_tokens=max_tokens or None, whole_documents=whole_documents, needle_lengths=lengths, seed=seed, device=device, dtype=dtype,
        out=out or None, overwrite=overwrite, console=console(),
    )  # fmt: skip


def report(paths: tuple[PATH, ...], /, out: FILE = "report.html") -> None:
    """Put everything found under runs and directories on one page: evaluations, analyses, training curves, benchmarks.

    Under torchrun rank 0 writes it.

    Args:
        paths: Runs, directories of runs, directories with benchmark results, or result files.
        out: The page, one HTML file without scripts or external resources.
    """
    if not paths:
        raise UserError("nothing named; ssa report RUN [RUN ...]")
    if Shard.from_environment().rank:
        return
    from ssa.report.report import write_report

    evidence = write_report(paths, out)
    for file, why in evidence.problems:
        tell(f"not shown: {file}: {why}")
    say(f"report: {out} ({len(evidence.runs)} runs, {len(evidence.benchmarks)} benchmark files)")


def _numbers(text: str, kind: type, flag: str) -> tuple[Any, ...]:
    """ "0,0.5" -> (0.0, 0.5)."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a comma-separated list of numbers") from None
