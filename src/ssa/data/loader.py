"""The training loader: a stateless map from step to batch, so that resuming needs a step number and nothing else."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ssa.data.shards import TokenShards
from ssa.errors import UserError

if TYPE_CHECKING:
    import torch


class PackedLoader:
    """Rows of ``context`` consecutive tokens, shuffled anew each epoch; ``batch(step)`` is a pure function of (seed, step).

    The global batch of a step is ``world_size * batch_size`` rows and depends on that product alone; rank r takes the r-th part. All
    ranks together read every row once an epoch, a step may finish one epoch and begin the next, and fewer than ``context`` tokens at
    the split's end are never read. Raises `UserError` where the split is shorter than one row.
    """

    def __init__(self, shards: TokenShards, context: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if context < 2:
            raise UserError(f"context of {context} tokens is too short: at least 2 are needed to predict one")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch size {batch_size} with rank {rank} of {world_size}: need batch size >= 1, 0 <= rank < ranks")
        self.shards, self.context, self.batch_size, self.seed = shards, context, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.num_rows = shards.num_tokens // context
        if self.num_rows == 0:
            raise UserError(
                f'split "{shards.split}" of {shards.path} has {shards.num_tokens} tokens, fewer than one row of context '
                f"{context}: prepare more text or shorten the context"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.world_size * self.context

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every row is read once; an epoch need not end at a step's end."""
        return self.num_rows / (self.batch_size * self.world_size)

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows this rank reads at ``step``; row i is tokens [i * context, (i + 1) * context)."""
        first = (step * self.world_size + self.rank) * self.batch_size
        slots = np.arange(first, first + self.batch_size)
        epochs, offsets = np.divmod(slots, self.num_rows)
        rows = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = _permutation(self.seed, int(epoch), self.num_rows)[offsets[epochs == epoch]]
        return rows

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """``input_ids``, ``position_ids`` and ``labels``, each int64 [batch_size, context] on the CPU.

        Positions restart at each document; labels equal input_ids (models shift inside and skip document starts).
        """
        import torch

        starts = self.rows(step) * self.context
        tokens = np.stack([self.shards.read(start, start + self.context) for start in starts.tolist()])
        positions = np.stack([self.shards.positions(start, start + self.context) for start in starts.tolist()])
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        return {"input_ids": input_ids, "position_ids": torch.from_numpy(positions), "labels": input_ids.clone()}


@lru_cache(maxsize=4)  # a step touches two epochs at most; training and evaluation may alternate
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """A shuffle of range(num_rows): 8 bytes a row, 12 MB for 100 billion tokens at a context of 65,536."""
    key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=16).digest()  # any int is a seed, and none is another's epoch
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.permutation(num_rows)
