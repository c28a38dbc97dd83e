"""Perplexity by context length over whole books, as PG-19 is measured: each window scores its last `stride` tokens.

One pass serves every length: attention is causal in every mode and blocks are anchored at the window's first token, so the
window of 4096 tokens from some place is the beginning of the window of 32768 tokens from there, and so is all that is computed for it.
Windows with different first tokens share nothing: each layer's keys hold what their tokens read, back to the window's start.

Legend: B batch, T tokens of a window, A scored tokens of it, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ssa.budget import Reading
from ssa.errors import UserError
from ssa.eval.documents import fingerprint
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import chunks, run_items
from ssa.eval.model_under_test import attention
from ssa.eval.perplexity import Document
from ssa.ranks import Shard

STRIDE, SAMPLES, SEED = 256, 1000, 42
"""The paper's."""
LOGIT_ELEMENTS = 1 << 24
"""Vocabulary logits held at once in fp32: 64 MiB."""
Scored = Literal["last", "half"]
"""last: the last `stride` tokens of each window, the exact measure. half: all of its second half, so that a window gives more
tokens, but with half a window of context or more instead of a whole one: another, slightly larger figure under another name."""


@dataclass(frozen=True)
class Place:
    """Where a window starts."""

    document: int
    start: int


class BookWindows:
    """Windows of several lengths from the same places of long documents."""

    def __init__(
        self, documents: Sequence[Document], lengths: Sequence[int], *, stride: int = STRIDE, samples: int = SAMPLES,
        seed: int = SEED, scored: Scored = "last",
    ) -> None:  # fmt: skip
        """Places are drawn from all multiples of `stride` from which the longest window fits into its document; fewer than
        `samples` where there are no more.

        Raises:
            UserError: Impossible lengths, or documents shorter than the longest.
        """
        if not lengths:
            raise UserError("no length given; e.g. 4096,8192")
        if stride < 1 or min(lengths) <= stride:
            raise UserError(f"stride = {stride} must be at least 1 and below the shortest length, {min(lengths)}")
        if samples < 1 or seed < 0:
            raise UserError(f"samples = {samples} and seed = {seed} must be at least 1 and 0")
        if scored not in get_args(Scored):
            raise UserError(f"scored = {scored!r} is not one of {', '.join(get_args(Scored))}")
        self.documents, self.lengths = documents, sorted(set(lengths))
        self.stride, self.scored = stride, scored
        longest = self.lengths[-1]
        places = [
            Place(number, start)
            for number, document in enumerate(documents)
            for start in range(0, len(document.tokens) - longest + 1, stride)
        ]
        if not places:
            have = max((len(document.tokens) for document in documents), default=0)
            raise UserError(f"no document has {longest} tokens: the longest has {have}; give longer texts or shorter lengths")
        order = np.random.default_rng(seed).permutation(len(places))[:samples]
        self.places = [places[i] for i in order]
        self.setting: dict[str, Any] = {
            "text_sha256": fingerprint(documents), "lengths": self.lengths, "stride": stride, "seed": seed, "scored": scored,
        }  # fmt: skip

    def targets(self, length: int) -> range:
        """Which tokens of a window of `length` tokens are scored."""
        return range(length - self.stride if self.scored == "last" else length - length // 2, length)

    def measure(
        self, model: Any, budget: Reading, log: ItemLog, shard: Shard, *, tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> bool:  # fmt: skip
        """Compute and log this rank's windows that the log lacks, about `tokens` tokens at a time; whether there were any."""
        rows = chunks(max(1, tokens // self.lengths[-1]))
        return run_items(len(self.places), rows, lambda batch: self._compute(model, budget, batch), log, shard, progress)

    def _compute(self, model: Any, budget: Reading, batch: Sequence[int]) -> list[dict[str, Any]]:
        longest = self.lengths[-1]
        rows = [self.documents[p.document].tokens[p.start : p.start + longest] for p in (self.places[i] for i in batch)]
        input_BT = torch.from_numpy(np.stack(rows).astype(np.int64)).to(model.device)
        wanted = sorted(set().union(*(self.targets(length) for length in self.lengths)))
        with torch.no_grad():
            nll_BA = target_nll(model, input_BT, torch.tensor(wanted, device=model.device), budget).cpu().double().numpy()
        if not np.isfinite(nll_BA).all():
            raise UserError(
                "the loss is not finite (NaN or infinity): the weights are damaged or the precision is too low; try --dtype float32"
            )
        column = {target: a for a, target in enumerate(wanted)}
        spans = {length: slice(column[t[0]], column[t[-1]] + 1) for length in self.lengths for t in [self.targets(length)]}
        return [
            {"index": index, "document": self.places[index].document, "start": self.places[index].start,
             "nats": {str(length): float(nll_BA[row, span].sum()) for length, span in spans.items()}}
            for row, index in enumerate(batch)
        ]  # fmt: skip


def target_nll(model: Any, input_BT: Tensor, target_A: Tensor, budget: Reading) -> Tensor:
    """-log p(token t | tokens < t) in nats for the tokens at `target_A` (1 .. T-1), fp32 [B, A].

    Vocabulary logits are computed for these only, and exist in fp32 for a few of them at a time.
    """
    hidden_BTC = model.model(input_ids=input_BT, use_cache=False, **attention(budget)).last_hidden_state
    step = max(1, LOGIT_ELEMENTS // (model.config.vocab_size * len(input_BT)))
    parts = []
    for at in range(0, len(target_A), step):
        chosen = target_A[at : at + step]
        logits_BAV = model.lm_head(hidden_BTC[:, chosen - 1]).float()
        parts.append(
            cross_entropy(logits_BAV.flatten(0, 1), input_BT[:, chosen].flatten(), reduction="none").view(len(input_BT), -1)
        )
    return torch.cat(parts, 1)


def perplexity_or_none(nats_per_token: float) -> float | None:
    """exp of it; None where that is too large for a float."""
    return math.exp(nats_per_token) if nats_per_token < 700 else None
