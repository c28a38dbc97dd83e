"""What every measurement by numbered items shares: the ranks share the items, each of which is logged by its setting as it is done.

Each rank waits for nobody: the one that finishes last finds all items and writes the results. The sums do not depend on who computed
what, so any number of ranks gives the figures of one process. DIRECTORY/NAME.json is as `ssa.eval.results` says;
DIRECTORY/items/NAME/KEY/ holds the items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ssa.budget import FULL, Reading
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather
from ssa.eval.model_under_test import description, progress_bar, provenance
from ssa.eval.results import add_results, read_results, result_key
from ssa.eval.tasks import TaskRequest, is_complete
from ssa.ranks import Shard

Entry = dict[str, Any]
"""Of a results file."""
Record = dict[str, Any]
"""Of a finished item."""


class Job(Protocol):
    """Items that are logged together."""

    setting: dict[str, Any]
    """What decides every item, the model and the budget aside."""

    def __len__(self) -> int: ...

    def compute(self, budget: Reading, log: ItemLog, shard: Shard, progress: Callable[[int], None] | None) -> bool:
        """Log this rank's items that the log lacks; whether there were any."""
        ...


def new_entry(request: TaskRequest, setting: dict[str, Any], **more: Any) -> Entry:
    """An entry without figures, in `setting` and of this model in its precision."""
    subject = request.subject
    return {
        "setting": {**setting, **_same(request)}, "model": description(subject), **more,
        "notes": subject.model.config.attends.full_notes if FULL in request.budgets else [], "budgets": {},
    }  # fmt: skip


def run_jobs(
    request: TaskRequest, name: str, entry: Entry, jobs: Sequence[Job], figures: Callable[[list[list[Record]], float], dict[str, Any]],
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Entry:  # fmt: skip
    """Compute what is missing, and add `entry` to NAME.json, each budget as soon as every rank is done with it.

    Args:
        figures: The records of every job and the seconds of all of them, added up over ranks, to a budget's figures. Those that are on
            file and had nothing to add stay as they are.
        finish: See `add_results`.

    Returns:
        The entry with all that is on file of its setting. It lacks what other ranks had not done yet; the last rank has all of it.
    """
    shard, path, fresh = Shard.from_environment(), request.directory / f"{name}.json", set[Reading]()

    def log(job: Job, budget: Reading) -> ItemLog:
        key = result_key({**job.setting, **_same(request), "attention": str(budget)})
        return ItemLog(request.directory / "items" / name / key, shard.rank)

    def put_together(budgets: Sequence[Reading]) -> Entry:
        known = read_results(path)["results"].get(result_key(entry["setting"]), entry)["budgets"]
        found = {}
        for budget in budgets:
            if str(budget) in known and budget not in fresh:
                found[str(budget)] = known[str(budget)]
                continue
            records = [of_job for job in jobs if (of_job := gather(log(job, budget), len(job))) is not None]
            if len(records) == len(jobs):
                seconds = sum(record["seconds"] for of_job in records for record in of_job)
                found[str(budget)] = {**figures(records, seconds), **provenance(request.subject)}
        return add_results(path, {**entry, "budgets": found}, finish) if found else entry

    read_results(path)  # a damaged file is better known now than after the work
    for budget in request.budgets:
        total = sum(len(shard.share(len(job))) for job in jobs)
        with progress_bar(None if shard.rank else request.console, f"{name}, {budget}", total) as progress:
            if any([job.compute(budget, log(job, budget), shard, progress) for job in jobs]):
                fresh.add(budget)
        put_together([budget])
    # A rank that was slower than this one with an earlier budget may be done with it now.
    entry = put_together(request.budgets)
    if not is_complete(entry, request.budgets) and request.console is not None:
        request.console.print(f"rank {shard.rank} is done; the rank that finishes last writes {path}", highlight=False)
    return entry


def _same(request: TaskRequest) -> dict[str, Any]:
    return {"model_sha256": request.subject.sha256, "dtype": request.subject.dtype}
