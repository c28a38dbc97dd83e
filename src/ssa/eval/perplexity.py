"""Perplexity by sliding window, as PG-19 is measured: documents apart, every token scored once, with as much context as asked.

Legend: B batch, T tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ssa.budget import AttentionMode, Reading
from ssa.errors import UserError
from ssa.model import SSAForCausalLM

WINDOW_TOKENS = 16384
"""Tokens in a batch of windows, about, where the caller does not say how many windows."""


class Document(NamedTuple):
    """One text to score. The end-of-document token is no part of it."""

    tokens: np.ndarray
    """Token ids, 1-D, any integer type."""
    num_bytes: int
    """Of the text in UTF-8."""
    num_words: int
    """Of the text, separated by white space."""


class Window(NamedTuple):
    """Read tokens `start .. stop - 1` of a document and score those from `first` on."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Perplexity:
    """The summed negative log-likelihood of some documents, and what it is divided by."""

    nats: float
    tokens: int
    """Scored, that is all but the first of each document."""
    documents: int
    num_bytes: int
    num_words: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        """Per token; None where it is too large for a float."""
        return _exp(self.nats, self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        return _exp(self.nats, self.num_words)

    @property
    def byte_perplexity(self) -> float | None:
        return _exp(self.nats, self.num_bytes)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / self.num_bytes / math.log(2) if self.num_bytes else None


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `num_tokens` tokens.

    Each predicts up to `context` tokens from those before them and scores the last `stride` of these; the first scores all. Every
    token but the document's first is scored exactly once, and from the second window on with at least `context - stride` tokens
    of context before the one that predicts it. `stride == context` makes windows that share nothing (but the token that is both the
    last target and the next input).
    """
    begin = scored = 0  # `begin` counts inputs, `scored` targets: target t has index t + 1 in the document
    targets = num_tokens - 1
    while scored < targets:
        end = min(begin + context, targets)
        yield Window(begin, scored + 1, end + 1)
        begin, scored = begin + stride, end


def check_windows(context: int, stride: int) -> None:
    if context < 1:
        raise UserError(f"context = {context} must be at least 1 token")
    if not 1 <= stride <= context:
        raise UserError(f"stride = {stride} must lie in 1..context = {context}, or tokens would be left out")


class WindowBatches:
    """The windows over some documents in the batches that are computed together, each of which can be scored by another process."""

    def __init__(
        self, documents: Sequence[Document], context: int, stride: int | None = None, batch_size: int | None = None
    ) -> None:
        """See `perplexity`, also for the errors."""
        stride = context if stride is None else stride
        check_windows(context, stride)
        jobs = [(d, w) for d, document in enumerate(documents) for w in windows(len(document.tokens), context, stride)]
        if not jobs:
            raise UserError("nothing to score: no document has two tokens or more")
        # Alike lengths side by side waste the least padding; the largest batch comes first, so memory that does not suffice shows at once.
        jobs.sort(key=lambda job: job[1].start - job[1].stop)
        self.documents = documents
        self.rows = batch_size or max(1, WINDOW_TOKENS // (context + 1))
        self._batches = [jobs[at : at + self.rows] for at in range(0, len(jobs), self.rows)]

    def __len__(self) -> int:
        return len(self._batches)

    def tokens(self, number: int) -> int:
        """That batch `number` scores."""
        return sum(w.stop - w.first for _, w in self._batches[number])

    def nats(
        self, model: SSAForCausalLM, number: int, attention_mode: AttentionMode | None = None, budget: Reading | str | None = None
    ) -> float:
        """The summed negative log-likelihood of batch `number`."""
        batch = self._batches[number]
        width = batch[0][1].stop - batch[0][1].start
        # Padding on the right needs no mask: attention is causal in every mode, so no real token can see it.
        input_ids = np.zeros((len(batch), width), np.int64)
        labels = np.full((len(batch), width), -100, np.int64)
        for row, (d, w) in enumerate(batch):
            tokens = self.documents[d].tokens[w.start : w.stop]
            input_ids[row, : len(tokens)] = tokens
            labels[row, w.first - w.start : len(tokens)] = tokens[w.first - w.start :]
        with torch.no_grad():
            nll_BT = model.token_nll(
                torch.from_numpy(input_ids).to(model.device), labels=torch.from_numpy(labels).to(model.device),
                attention_mode=attention_mode, budget=budget,
            )  # fmt: skip
        nats = nll_BT.cpu().double().sum().item()
        if not math.isfinite(nats):
            raise UserError(
                "the loss is not finite (NaN or infinity): the weights are damaged or the precision is too low; try --dtype float32"
            )
        return nats

    def total(self, nats: Iterable[float]) -> Perplexity:
        """From the nats of all batches. Their sum is rounded once, so it does not depend on who computed which."""
        return Perplexity(
            nats=math.fsum(nats),
            tokens=sum(map(self.tokens, range(len(self)))),
            documents=len(self.documents),
            num_bytes=sum(d.num_bytes for d in self.documents),
            num_words=sum(d.num_words for d in self.documents),
        )


def perplexity(
    model: SSAForCausalLM,
    documents: Sequence[Document],
    *,
    context: int,
    stride: int | None = None,
    attention_mode: AttentionMode | None = None,
    budget: Reading | str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score `documents` with `model` under full or sparse attention.

    Args:
        context: Tokens that predictions may look back on, own position included.
        stride: New tokens per window, 1..context; `context` by default. Smaller = more context for each, and more work.
        batch_size: Windows computed at once; by default about `WINDOW_TOKENS` tokens.
        progress: Called with the number of tokens scored after each batch.

    Returns:
        `Perplexity`; the sum is taken in fp64.

    Raises:
        UserError: Impossible windows, nothing to score, or a loss that is not finite.
    """
    if model.training:
        raise UserError("the model is in training mode, where each pass draws its own stream; call model.eval() first")
    batches = WindowBatches(documents, context, stride, batch_size)
    nats = []
    for number in range(len(batches)):
        nats.append(batches.nats(model, number, attention_mode, budget))
        if progress is not None:
            progress(batches.tokens(number))
    return batches.total(nats)


def _exp(nats: float, count: int) -> float | None:
    return math.exp(nats / count) if count and nats / count < 700 else None
