"""`analyze`: measure one or several runs on the same text, keep the figures, print them side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ssa.analysis.measure import measure_model, own_rows
from ssa.analysis.results import FORMAT, AnalysisResult, RunResults, losses, read_results
from ssa.analysis.rows import Rows, packed_rows
from ssa.analysis.selection import receptive_field
from ssa.analysis.table import table_rows
from ssa.budget import Budget, LayerBudgets
from ssa.data.tokenizer import fingerprint, load_tokenizer
from ssa.device import device_name, local_device
from ssa.errors import UserError
from ssa.files import check_directory, write_atomically
from ssa.infer.load import check_budgets, load_model
from ssa.ranks import Shard
from ssa.runs.checkpoints import open_checkpoint
from ssa.runs.home import run_context, run_data, run_home
from ssa.runs.provenance import versions

MAX_TOKENS = 16384
DECODE_STEPS = 64


def analyze(
    runs: Sequence[Path | str], *, data: Path | str | None = None, split: str = "valid", budget: Budget | str | None = None,
    context: int | None = None, max_tokens: int | None = None, whole_documents: bool = False, decode_steps: int = DECODE_STEPS,
    seed: int = 0, device: str = "auto", dtype: str = "auto",
    out: Path | str | None = None, console: Console | None = None,
) -> AnalysisResult:  # fmt: skip
    """Measure what the selected blocks of every run keep, under sparse and under full inference, on the same rows of text.

    Writes RUN/analysis/analysis.json for each run; for several also their comparison, to `analysis/` beside the first run. With `out`,
    everything goes there and the runs are left as they are. Prints one table, and a line where the rows are shorter than asked. Under torchrun the ranks share the rows; rank 0 alone writes, prints and returns something.

    Args:
        runs: Runs, checkpoints or model directories.
        data: A prepared directory or a text file; the first run's corpus by default.
        split: Of the prepared directory.
        budget: `Budget` or "kxs"; each model's own by default.
        context: Tokens in a row; that of the first run's training by default.
        max_tokens: Read at most so many; 16384, or one row where that is longer, by default.
        whole_documents: Rows are the beginnings of documents of at least `context` tokens; see `packed_rows`.
        decode_steps: Tokens to generate after the longest document, to see how the selection changes from step to step.
        seed: Draws the rows and the sampled points.
        device, dtype: As for `ssa.infer.load.load_model`.
        out: Directory for everything.
        console: Where to print; standard output by default.

    Raises:
        UserError: no run, another tokenizer, unreadable text, `out` that cannot be written, figures that are not finite.
    """
    rank, device = Shard.from_environment().rank, local_device(device)
    console = Console(quiet=True) if rank else Console() if console is None else console
    if not runs:
        raise UserError("nothing to analyse: name at least one run")
    if decode_steps < 0:
        raise UserError(f"decode_steps = {decode_steps} must be 0 (none) or more")
    if out is not None:
        check_directory(Path(out))
    budget = None if budget is None else Budget.parse(budget)
    checkpoints = [open_checkpoint(run) for run in runs]
    tokenizers = [load_tokenizer(path) for path in checkpoints]
    for run, tokenizer in zip(runs, tokenizers, strict=True):
        if fingerprint(tokenizer) != fingerprint(tokenizers[0]):
            raise UserError(f"{run} has another tokenizer than {runs[0]}: figures per token do not compare; analyse them apart")
    context = run_context(runs[0]) if context is None else context
    max_tokens = max(MAX_TOKENS, context) if max_tokens is None else max_tokens
    rows = packed_rows(
        run_data(runs[0]) if data is None else data, tokenizers[0], split=split, context=context, max_tokens=max_tokens, seed=seed,
        whole_documents=whole_documents,
    )  # fmt: skip
    if (got := rows.about["context"]) < context:
        why = f"max_tokens = {max_tokens} allows no more" if got == max_tokens else "the text has no more tokens"
        console.print(f"context = {context} is shortened to {got}: {why}", highlight=False, soft_wrap=True)
    names = unique_names(runs)
    results: list[RunResults] = []
    files: list[Path] = []
    for run, checkpoint, name in zip(runs, checkpoints, names, strict=True):
        analysis = _measure_run(checkpoint, name, rows, budget, decode_steps, seed, device, dtype, console)
        if rank:
            continue
        results.append(read_results(run_home(run), analysis, name))
        if out is None:
            files.append(write_figures(run_home(run) / "analysis" / "analysis.json", analysis))
    if rank:
        return AnalysisResult([], [], [], None)
    directory = Path(out) if out is not None else run_home(runs[0]) / "analysis"
    if len(runs) > 1 and out is None:
        directory = run_home(runs[0]).resolve().parent / "analysis"
    if len(runs) > 1 or out is not None:
        content = {"format": FORMAT, "runs": [run.analysis for run in results]} if len(runs) > 1 else results[0].analysis
        files.append(write_figures(directory / ("comparison.json" if len(runs) > 1 else "analysis.json"), content))
    print_table(results, console)
    return AnalysisResult(results, files, [run_home(run) for run in runs], directory)


def unique_names(runs: Sequence[Path | str]) -> list[str]:
    """The last part of every path, with as much of the path before it as it takes to tell the runs apart."""
    parts = [run_home(run).resolve().parts for run in runs]
    # Checkpoints of one run share its directory.
    tails = [(*p, Path(run).name) if run_home(run) != Path(run) else p for p, run in zip(parts, runs, strict=True)]
    depth = [2 if len(tail) > len(p) else 1 for tail, p in zip(tails, parts, strict=True)]
    names = ["/".join(tail[-d:]) for tail, d in zip(tails, depth, strict=True)]
    for more in range(1, max(map(len, tails))):
        if len(set(names)) == len(names):
            break
        names = ["/".join(tail[-d - more :]) if names.count(n) > 1 else n for tail, d, n in zip(tails, depth, names, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def print_table(results: Sequence[RunResults], console: Console) -> None:
    """One column a run, the best of every row in bold."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in results:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    for heading, cells, best in table_rows(results):
        table.add_row(heading, *(Text(cell, style="bold" if i == best else "") for i, cell in enumerate(cells)))
    console.print(table)
    for note in table_notes(results):
        console.print(note, markup=False, highlight=False)


def table_notes(results: Sequence[RunResults]) -> list[str]:
    """What a reader of the table must know, a line each."""
    measured = results[0].analysis["measured"]
    notes = [
        f"{measured['tokens']} tokens of {measured['data']} in rows of {measured['context']}; KL over all of them. {losses(results)[1]}"
    ]
    if any(run.beyond for run in results):
        notes.append(
            "Kept mass, entropy and sink: over queries beyond the receptive field; entropy and sink under full inference."
        )
    else:
        notes.append(
            "No query stands beyond the receptive field, so nothing is left out: use a longer context or a smaller budget."
        )
    violations, checked = (sum(x) for x in zip(*(run.violations() for run in results), strict=True))
    notes.append(
        f"Theorem 1: {violations} of {checked} points above the bound" + ("; the numbers cannot be right." if violations else ".")
    )
    return notes


def _measure_run(
    checkpoint: Path, name: str, rows: Rows, asked: Budget | None, decode_steps: int, seed: int, device: str, dtype: str,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    model, _ = load_model(checkpoint, device=device, dtype=dtype)
    config = model.config
    budget = config.budget if asked is None else asked
    check_budgets(config, [budget])
    if rows.about["context"] > config.max_position_embeddings:
        raise UserError(f"context = {rows.about['context']} exceeds the {config.max_position_embeddings} positions of {name}")
    if decode_steps >= config.max_position_embeddings:
        raise UserError(f"decode_steps = {decode_steps} exceeds the {config.max_position_embeddings} positions of {name}")
    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name.replace("[", r"\["), total=len(own_rows(rows.about["rows"])))
        figures = measure_model(
            model, rows.input_ids, rows.position_ids, budget, seed=seed, decode_steps=decode_steps,
            progress=lambda done: bar.advance(task, done),
        )  # fmt: skip
    return {
        "format": FORMAT, "run": name, "method": config.attention_name, "step": int(step[1]) if step else None, "budget": str(budget),
        "block_size": (budget if isinstance(budget, Budget) else config.uniform_budget).block_size,
        "receptive_field": receptive_field(config, budget),
        **({"layer_budgets": [str(reading) for reading in budget]} if isinstance(budget, LayerBudgets) else {}),
        "selection": f"{config.selection_scope} / {config.selection_scoring} / {config.selection_rule}",
        "measured": rows.about, "device": device_name(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(), **figures,
    }  # fmt: skip


def write_figures(path: Path, content: dict[str, Any]) -> Path:
    """As JSON. Raises `UserError` where a figure is not finite, or the directory cannot be written."""
    try:
        text = json.dumps(content, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(f"the figures for {path} are not finite: the model's activations overflow; try --dtype float32") from None
    return write_atomically(path, text)
