"""Running a task: this rank's items in batches, each batch logged as soon as it is done, everybody's put together at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Reading
from ssa.errors import UserError
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.items import GenerationTask, Item
from ssa.eval.model_under_test import attention
from ssa.infer.batch import end_ids_of, generate_batch, pad_id_of
from ssa.infer.transcript import Transcript
from ssa.ranks import Shard

BATCH_TOKENS = {"cuda": 1 << 17, "cpu": 1 << 13}
"""Prompt tokens computed at once, about, by kind of device, where the caller does not say."""
MAX_ROWS = 64


@dataclass(frozen=True)
class Mean:
    """Of some items' figures."""

    value: float
    standard_error: float
    """Of the value, over items; 0 where there is one item."""
    items: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Mean:
        count, mean = len(figures), sum(figures) / len(figures)
        if count == 1:
            return cls(mean, 0.0, 1)
        variance = sum((figure - mean) ** 2 for figure in figures) / (count - 1)
        return cls(mean, (variance / count) ** 0.5, count)


def batch_tokens(device: torch.device, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UserError(f"batch_tokens = {asked} must be at least 1")
    return asked or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def generate_items(
    task: GenerationTask,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    budget: Reading,
    log: ItemLog,
    shard: Shard,
    *,
    tokens: int,
    prefill_mode: AttentionMode | None = None,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Compute and log the items of `task` that are this rank's and not in the log; whether there were any.

    Args:
        tokens: Prompts are computed together up to so many tokens, padding included.
        prefill_mode: How prompts are read; None = as `budget` says, too.
        progress: Called with the number of this rank's items done, those found in the log first.
    """

    def compute(batch: Sequence[tuple[int, Item]]) -> list[dict[str, Any]]:
        items = [item for _, item in batch]
        texts = write(model, tokenizer, items, budget, prefill_mode)
        return [
            {"index": index, "score": task.score(item, text), "prediction": text, "answers": list(item.answers),
             "tokens": len(item.prompt), **item.about}
            for (index, item), text in zip(batch, texts, strict=True)
        ]  # fmt: skip

    def batches(pending: Iterable[int]) -> Iterator[list[tuple[int, Item]]]:
        batch: list[tuple[int, Item]] = []
        widest = 0
        for index in pending:
            item = task.item(index)
            width = max(widest, len(item.prompt))
            if batch and ((len(batch) + 1) * width > tokens or len(batch) == MAX_ROWS):
                yield batch
                batch, width = [], len(item.prompt)
            batch.append((index, item))
            widest = width
        if batch:
            yield batch

    return run_items(len(task), batches, compute, log, shard, progress)


def run_items(
    count: int,
    batches: Callable[[list[int]], Iterable[Sequence[Any]]],
    compute: Callable[[Sequence[Any]], list[dict[str, Any]]],
    log: ItemLog,
    shard: Shard,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Bring the log up to date with this rank's share of the items 0 .. count - 1; whether there was anything to do.

    Args:
        batches: This rank's unfinished items, in order, to the batches that `compute` gets. The next batch is made while one is
            computed.
        compute: A batch to a record per item, with its "index"; "seconds", the item's share of the time, is added.
    """
    finished = log.records()
    mine = shard.share(count)
    pending = [index for index in mine if index not in finished]
    if progress is not None and len(pending) < len(mine):
        progress(len(mine) - len(pending))
    made = iter(batches(pending))
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(next, made, None)
        while (batch := waiting.result()) is not None:
            waiting = beside.submit(next, made, None)
            started = time.perf_counter()
            records = compute(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            log.append([{**record, "seconds": round(seconds, 6)} for record in records])
            if progress is not None:
                progress(len(batch))
    return bool(pending)


def chunks(size: int) -> Callable[[list[int]], list[list[int]]]:
    """`run_items`'s `batches` of `size` items each."""
    return lambda pending: [pending[at : at + size] for at in range(0, len(pending), size)]


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    budget: Reading,
    prefill_mode: AttentionMode | None = None,
) -> list[str]:
    """What `model` writes after each prompt, greedily; prompts of different lengths are padded on the left.

    Args:
        items: Each is cut off at its own `max_new_tokens` and stop texts.

    Returns:
        One text per item, without prompt, end token and stop text.
    """
    end_ids = end_ids_of(model, tokenizer)
    transcripts = [Transcript(tokenizer, end_ids, item.stop) for item in items]
    limits = [item.max_new_tokens for item in items]
    prompts = [item.prompt for item in items]
    generate_batch(
        model, prompts, transcripts, limits, pad_id=pad_id_of(tokenizer, end_ids), prefill_mode=prefill_mode, **attention(budget)
    )
    return [transcript.text for transcript in transcripts]


def gather(log: ItemLog, count: int) -> list[dict[str, Any]] | None:
    """The records of items 0 .. count - 1 of all ranks; None where some are still to come."""
    finished = log.records()
    return [finished[index] for index in range(count)] if all(index in finished for index in range(count)) else None
