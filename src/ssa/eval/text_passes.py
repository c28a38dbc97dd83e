"""Perplexity and needle grids over a text at several budgets: batches shared by the ranks, logged as they finish, added to RUN/eval.

What every rank scored is on disk, and the sums do not depend on who scored what: any number of ranks gives the figures of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ssa.budget import FULL, Budget, Reading
from ssa.data.shards import is_prepared
from ssa.eval.documents import document_texts, fingerprint, read_documents
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather, run_items
from ssa.eval.model_under_test import ModelUnderTest, attention, description, progress_bar, provenance
from ssa.eval.needle import Haystack, NeedleBatches, score
from ssa.eval.perplexity import Perplexity, WindowBatches, check_windows
from ssa.eval.results import add_results, read_results, result_key
from ssa.eval.tables import print_needles, print_perplexity
from ssa.ranks import Shard

LOGGED_AT_ONCE = 8
"""Batches between two writes to the log; an interruption loses them."""


@dataclass(frozen=True)
class TextRequest:
    """What is measured on which text."""

    subject: ModelUnderTest
    source: str | Path
    """A prepared directory, or what `read_texts` reads."""
    split: str
    budgets: Sequence[Reading]
    directory: Path
    """For the results."""
    console: Console | None = None


Entry = dict[str, Any]


def run_perplexity(
    request: TextRequest, *, context: int, stride: int, max_tokens: int | None = None, batch_size: int | None = None
) -> Entry:
    """The entry of perplexity.json. Under torchrun it lacks what other ranks had not done yet; the last rank has all of it.

    Raises:
        UserError: Impossible windows, no text, a damaged results file, or a loss that is not finite.
    """
    check_windows(context, stride)
    path = request.directory / "perplexity.json"
    read_results(path)  # a damaged file is better known now than after the work
    subject = request.subject
    documents, cut = read_documents(request.source, request.split, subject.tokenizer, max_tokens)
    batches = WindowBatches(documents, context, stride, batch_size)
    total = sum(max(0, len(d.tokens) - 1) for d in documents)
    entry: Entry = {
        "setting": {
            **_setting(request),
            "text_sha256": fingerprint(documents), "context": context, "stride": stride, "max_tokens": max_tokens,
        },
        "model": description(subject),
        "documents": len(documents), "tokens": total,
        "bytes": sum(d.num_bytes for d in documents), "words": sum(d.num_words for d in documents),
        "notes": _notes(request, context),
        "budgets": {},
    }  # fmt: skip
    if cut:
        entry["notes"].append(f"the data is longer: the first {total} tokens of it are scored (max_tokens)")

    def compute(number: int, budget: Reading) -> dict[str, Any]:
        return {"nats": batches.nats(subject.model, number, **attention(budget))}

    def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
        return _perplexity_figures(batches.total(record["nats"] for record in records), _seconds(records))

    work = _Work(request, path, entry, len(batches), batches.rows, compute, figures, _with_gaps)
    entry = work.run()
    if request.console is not None and work.is_done(entry):
        print_perplexity(request.console, entry, [str(b) for b in request.budgets])
    return entry


def run_needles(
    request: TextRequest, *, lengths: Sequence[int], depths: Sequence[float], cases: int, seed: int, batch_tokens: int
) -> Entry:
    """The entry of needle.json; see `run_perplexity`, and `needle_grid` for the arguments.

    Raises:
        UserError: An impossible grid, no text, a damaged results file, or an output that is not finite.
    """
    path = request.directory / "needle.json"
    read_results(path)
    subject = request.subject
    haystack = Haystack(document_texts(request.source, request.split, subject.tokenizer), subject.tokenizer, max(lengths))
    batches = NeedleBatches(subject.tokenizer, haystack, lengths, depths, cases, seed, batch_tokens)
    entry: Entry = {
        "setting": {
            **_setting(request),
            "text_sha256": hashlib.sha256(haystack.tokens.tobytes()).hexdigest(),
            "task": "niah_single_2", "lengths": list(lengths), "depths": list(depths), "cases": cases, "seed": seed,
        },
        "model": description(subject),
        "notes": _notes(request, max(lengths)),
        "budgets": {},
    }  # fmt: skip

    def compute(number: int, budget: Reading) -> dict[str, Any]:
        found, log_p = score(subject.model, batches.cases(number), **attention(budget))
        return {"found": found.tolist(), "log_probability": log_p.tolist()}

    def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
        grid = [asdict(cell) for cell in batches.cells((r["found"], r["log_probability"]) for r in records)]
        means = {name: sum(cell[name] for cell in grid) / len(grid) for name in ("accuracy", "log_probability")}
        return {**means, "grid": grid, "seconds": _seconds(records)}

    work = _Work(request, path, entry, len(batches), batch_tokens, compute, figures, add_results)
    entry = work.run()
    if request.console is not None and work.is_done(entry):
        for budget in request.budgets:
            print_needles(request.console, entry, str(budget))
    return entry


@dataclass(frozen=True)
class _Work:
    """Batches 0 .. count - 1 at every budget of the request."""

    request: TextRequest
    path: Path
    entry: Entry
    count: int
    batch: int
    """How large the batches are: those of another size are other batches."""
    compute: Callable[[int, Reading], dict[str, Any]]
    figures: Callable[[list[dict[str, Any]]], dict[str, Any]]
    add: Callable[[Path, Entry], Entry]

    def run(self) -> Entry:
        """Score this rank's batches that are not logged; the entry with every budget that is complete then."""
        shard, console = Shard.from_environment(), self.request.console
        fresh = set()
        for budget in self.request.budgets:
            what = f"{self.path.stem}, {budget}"
            with progress_bar(None if shard.rank else console, what, len(shard.share(self.count))) as progress:
                if self._share(budget, shard, progress):
                    fresh.add(budget)
            self._put_together([budget], fresh)
        # A rank that was slower than this one with an earlier budget may be done with it now.
        entry = self._put_together(self.request.budgets, fresh)
        if not self.is_done(entry) and console is not None:
            console.print(f"rank {shard.rank} is done; the rank that finishes last writes {self.path}", highlight=False)
        return entry

    def is_done(self, entry: Entry) -> bool:
        return all(str(budget) in entry["budgets"] for budget in self.request.budgets)

    def _log(self, budget: Reading) -> ItemLog:
        key = result_key({**self.entry["setting"], "batch": self.batch, "attention": str(budget)})
        return ItemLog(self.request.directory / "items" / self.path.stem / key, Shard.from_environment().rank)

    def _share(self, budget: Reading, shard: Shard, progress: Callable[[int], None] | None) -> bool:
        """Whether there was anything left to do."""
        log = self._log(budget)
        before = log.records().keys()
        run_items(
            self.count,
            lambda pending: [pending[at : at + LOGGED_AT_ONCE] for at in range(0, len(pending), LOGGED_AT_ONCE)],
            lambda numbers: [{"index": number, **self.compute(number, budget)} for number in numbers],
            log,
            shard,
            progress,
        )
        return any(number not in before for number in shard.share(self.count))

    def _put_together(self, budgets: Sequence[Reading], fresh: set[Reading]) -> Entry:
        """The entry with those of the budgets that every rank is done with; figures that are on file and had nothing to add stay."""
        known = read_results(self.path)["results"].get(result_key(self.entry["setting"]), self.entry)["budgets"]
        found = {}
        for budget in budgets:
            name = str(budget)
            if name in known and budget not in fresh:
                found[name] = known[name]
            elif (records := gather(self._log(budget), self.count)) is not None:
                found[name] = {**self.figures(records), **provenance(self.request.subject)}
        return self.add(self.path, {**self.entry, "budgets": found}) if found else self.entry


def _setting(request: TextRequest) -> dict[str, Any]:
    return {
        "data": str(request.source), "split": request.split if is_prepared(request.source) else None,
        "model_sha256": request.subject.sha256, "dtype": request.subject.dtype,
    }  # fmt: skip


def _notes(request: TextRequest, length: int) -> list[str]:
    config = request.subject.model.config
    notes = config.attends.full_notes if FULL in request.budgets else []
    idle = [str(b) for b in request.budgets if isinstance(b, Budget) and b.tokens >= length and config.selection_rule == "exact"]
    if idle:
        notes.append(f"{', '.join(idle)} reads everything there is in {length} tokens: selection drops nothing")
    return notes


def _seconds(records: list[dict[str, Any]]) -> float:
    """Of computing, added up over ranks."""
    return sum(record["seconds"] for record in records)


def _perplexity_figures(measured: Perplexity, seconds: float) -> dict[str, Any]:
    return {
        "nats_per_token": measured.nats_per_token, "gap_to_full": None, "perplexity": measured.perplexity,
        "word_perplexity": measured.word_perplexity, "byte_perplexity": measured.byte_perplexity,
        "bits_per_byte": measured.bits_per_byte, "tokens": measured.tokens, "seconds": seconds,
        "tokens_per_second": measured.tokens / seconds,
    }  # fmt: skip


def _with_gaps(path: Path, entry: Entry) -> Entry:
    """Add the entry to the file, with every budget's distance in nats per token to full attention, once that is known."""

    def gaps(budgets: dict[str, Any]) -> dict[str, Any]:
        full = budgets.get("full")
        if not full:
            return budgets
        return {n: {**f, "gap_to_full": f["nats_per_token"] - full["nats_per_token"]} for n, f in budgets.items()}

    return add_results(path, entry, gaps)
