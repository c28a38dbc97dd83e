"""Perplexity and needle grids over a text: their batches are the items of `ssa.eval.engine`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssa.budget import Budget, Reading
from ssa.data.shards import is_prepared
from ssa.eval.documents import document_texts, fingerprint, read_documents
from ssa.eval.engine import Entry, Record, new_entry, run_jobs
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import chunks, run_items
from ssa.eval.model_under_test import attention
from ssa.eval.needle import Haystack, NeedleBatches, score
from ssa.eval.perplexity import Perplexity, WindowBatches, check_windows
from ssa.eval.tables import print_needles, print_perplexity
from ssa.eval.tasks import TaskRequest, is_complete
from ssa.ranks import Shard

LOGGED_AT_ONCE = 8
"""Batches between two writes to the log; an interruption loses them."""


def run_perplexity(
    request: TaskRequest, source: str | Path, split: str, *, context: int, stride: int, max_tokens: int | None = None,
    batch_size: int | None = None,
) -> Entry:  # fmt: skip
    """The entry of perplexity.json, see `run_jobs`.

    Args:
        source: A prepared directory, or what `read_texts` reads.
        split: Of a prepared directory.
        context, stride, max_tokens, batch_size: See `ssa.eval.evaluate.evaluate`.

    Raises:
        UserError: Impossible windows, no text, a damaged results file, or a loss that is not finite.
    """
    check_windows(context, stride)
    model = request.subject.model
    documents, cut = read_documents(source, split, request.subject.tokenizer, max_tokens)
    batches = WindowBatches(documents, context, stride, batch_size)
    total = sum(max(0, len(d.tokens) - 1) for d in documents)
    setting = {
        **_setting(request, source, split),
        "text_sha256": fingerprint(documents), "context": context, "stride": stride, "max_tokens": max_tokens,
    }  # fmt: skip
    entry = new_entry(
        request, setting, documents=len(documents), tokens=total, bytes=sum(d.num_bytes for d in documents),
        words=sum(d.num_words for d in documents),
    )  # fmt: skip
    entry["notes"] += _idle(request, context)
    if cut:
        entry["notes"].append(f"the data is longer: the first {total} tokens of it are scored (max_tokens)")

    def compute(number: int, budget: Reading) -> Record:
        return {"nats": batches.nats(model, number, **attention(budget))}

    def figures(records: list[list[Record]], seconds: float) -> dict[str, Any]:
        return _perplexity_figures(batches.total(record["nats"] for record in records[0]), seconds)

    entry = run_jobs(request, "perplexity", entry, [_Batches(setting, batches.rows, len(batches), compute)], figures, _with_gaps)
    if request.console is not None and is_complete(entry, request.budgets):
        print_perplexity(request.console, entry, [str(b) for b in request.budgets])
    return entry


def run_needles(
    request: TaskRequest, source: str | Path, split: str, *, lengths: Sequence[int], depths: Sequence[float], cases: int, seed: int,
    batch_tokens: int,
) -> Entry:  # fmt: skip
    """The entry of needle.json; see `run_perplexity`, and `needle_grid` for the arguments.

    Raises:
        UserError: An impossible grid, no text, a damaged results file, or an output that is not finite.
    """
    tokenizer, model = request.subject.tokenizer, request.subject.model
    haystack = Haystack(document_texts(source, split, tokenizer), tokenizer, max(lengths))
    batches = NeedleBatches(tokenizer, haystack, lengths, depths, cases, seed, batch_tokens)
    setting = {
        **_setting(request, source, split), "text_sha256": hashlib.sha256(haystack.tokens.tobytes()).hexdigest(),
        "task": "niah_single_2", "lengths": list(lengths), "depths": list(depths), "cases": cases, "seed": seed,
    }  # fmt: skip
    entry = new_entry(request, setting)
    entry["notes"] += _idle(request, max(lengths))

    def compute(number: int, budget: Reading) -> Record:
        found, log_p = score(model, batches.cases(number), **attention(budget))
        return {"found": found.tolist(), "log_probability": log_p.tolist()}

    def figures(records: list[list[Record]], seconds: float) -> dict[str, Any]:
        grid = [asdict(cell) for cell in batches.cells((r["found"], r["log_probability"]) for r in records[0])]
        means = {name: sum(cell[name] for cell in grid) / len(grid) for name in ("accuracy", "log_probability")}
        return {**means, "grid": grid, "seconds": seconds}

    entry = run_jobs(request, "needle", entry, [_Batches(setting, batch_tokens, len(batches), compute)], figures)
    if request.console is not None and is_complete(entry, request.budgets):
        for budget in request.budgets:
            print_needles(request.console, entry, str(budget))
    return entry


class _Batches:
    """Batches as the items of a `Job`; those of another size, `batch`, are other items."""

    def __init__(self, setting: dict[str, Any], batch: int, count: int, compute: Callable[[int, Reading], Record]) -> None:
        self.setting, self._count, self._compute = {**setting, "batch": batch}, count, compute

    def __len__(self) -> int:
        return self._count

    def compute(self, budget: Reading, log: ItemLog, shard: Shard, progress: Callable[[int], None] | None) -> bool:
        def records(numbers: Sequence[int]) -> list[Record]:
            return [{"index": number, **self._compute(number, budget)} for number in numbers]

        return run_items(len(self), chunks(LOGGED_AT_ONCE), records, log, shard, progress)


def _setting(request: TaskRequest, source: str | Path, split: str) -> dict[str, Any]:
    return {
        "data": str(source), "split": split if is_prepared(source) else None,
        "model_sha256": request.subject.sha256, "dtype": request.subject.dtype,
    }  # fmt: skip


def _idle(request: TaskRequest, length: int) -> list[str]:
    """A note about the budgets that leave nothing out."""
    rule = request.subject.model.config.selection_rule
    idle = [str(b) for b in request.budgets if isinstance(b, Budget) and b.tokens >= length and rule == "exact"]
    return [f"{', '.join(idle)} reads everything there is in {length} tokens: selection drops nothing"] if idle else []


def _perplexity_figures(measured: Perplexity, seconds: float) -> dict[str, Any]:
    return {
        "nats_per_token": measured.nats_per_token, "gap_to_full": None, "perplexity": measured.perplexity,
        "word_perplexity": measured.word_perplexity, "byte_perplexity": measured.byte_perplexity,
        "bits_per_byte": measured.bits_per_byte, "tokens": measured.tokens, "seconds": seconds,
        "tokens_per_second": measured.tokens / seconds,
    }  # fmt: skip


def _with_gaps(budgets: dict[str, Any]) -> dict[str, Any]:
    """With every budget's distance in nats per token to full attention, once that is known."""
    full = budgets.get("full")
    if not full:
        return budgets
    return {n: {**f, "gap_to_full": f["nats_per_token"] - full["nats_per_token"]} for n, f in budgets.items()}
