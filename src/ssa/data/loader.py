"""The training loader: a stateless map from step to batch, so that resuming needs a step number and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from ssa.data.mixture import Interleave, Mixture, Recent, generator
from ssa.data.shards import TokenShards
from ssa.errors import UserError


class PackedLoader:
    """Rows of ``context`` consecutive tokens, shuffled anew each epoch; ``batch(step)`` is a pure function of (seed, step).

    The global batch of a step is ``world_size * batch_size`` rows and depends on that product alone; rank r takes the r-th part. All
    ranks together read every row once an epoch (of a mixture, every row of a source before any of its rows again), a step may finish one
    epoch and begin the next, and fewer than ``context`` tokens at the split's end are never read. It can be pickled, for workers of a
    DataLoader. Raises `UserError` where a split is shorter than one row.
    """

    def __init__(
        self, shards: TokenShards | Mixture, context: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if context < 2:
            raise UserError(f"context of {context} tokens is too short: at least 2 are needed to predict one")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch size {batch_size} with rank {rank} of {world_size}: need batch size >= 1, 0 <= rank < ranks")
        self.shards, self.context, self.batch_size, self.seed = shards, context, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._sources = shards.sources if isinstance(shards, Mixture) else (shards,)
        for source in self._sources:
            if source.num_tokens < context:
                raise UserError(
                    f'split "{source.split}" of {source.path} has {source.num_tokens} tokens, fewer than one row of context '
                    f"{context}: prepare more text or shorten the context"
                )
        self._first_row = np.cumsum([0, *(source.num_tokens // context for source in self._sources)])
        self._interleave = Interleave(shards.weights, seed) if isinstance(shards, Mixture) else None
        # A step touches two epochs of a source at most.
        self._permutation = Recent(_permutation, 2 * len(self._sources) + 2)

    @property
    def num_rows(self) -> int:
        """Of all sources together."""
        return int(self._first_row[-1])

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.world_size * self.context

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which so many rows are read as there are; an epoch need not end at a step's end."""
        return self.num_rows / (self.batch_size * self.world_size)

    def epochs(self, steps: int) -> list[float]:
        """How often `steps` steps read each source."""
        slots = steps * self.world_size * self.batch_size
        counts = np.array([slots]) if self._interleave is None else self._interleave.counts(slots)
        return (counts / np.diff(self._first_row)).tolist()

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows this rank reads at ``step``. Row i of a source is its tokens [i * context, (i + 1) * context); the
        rows of a mixture are numbered source after source."""
        first = (step * self.world_size + self.rank) * self.batch_size
        slots = np.arange(first, first + self.batch_size)
        if self._interleave is None:
            return self._shuffled(0, slots)
        sources, counts = self._interleave.places(slots)
        rows = np.empty_like(slots)
        for source in np.unique(sources).tolist():
            rows[sources == source] = self._first_row[source] + self._shuffled(source, counts[sources == source])
        return rows

    def _shuffled(self, source: int, counts: np.ndarray) -> np.ndarray:
        """Rows of a source, of which so many were read before."""
        num_rows = int(self._first_row[source + 1] - self._first_row[source])
        epochs, offsets = np.divmod(counts, num_rows)
        rows = np.empty_like(counts)
        for epoch in np.unique(epochs).tolist():
            # A single corpus keeps the order it had before there were mixtures.
            place = (epoch,) if self._interleave is None else (epoch, source)
            rows[epochs == epoch] = self._permutation(self.seed, place, num_rows)[offsets[epochs == epoch]]
        return rows

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """``input_ids``, ``position_ids`` and ``labels``, each int64 [batch_size, context] on the CPU.

        Positions restart at each document; labels equal input_ids (models shift inside and skip document starts).
        """
        rows = self.rows(step)
        sources = np.searchsorted(self._first_row, rows, side="right") - 1
        starts = (rows - self._first_row[sources]) * self.context
        tokens, positions = np.empty((2, self.batch_size, self.context), np.int64)
        for i, (source, start) in enumerate(zip(sources.tolist(), starts.tolist(), strict=True)):
            shards = self._sources[source]
            tokens[i] = shards.read(start, start + self.context)
            positions[i] = shards.positions(start, start + self.context)
        input_ids = torch.from_numpy(tokens)
        return {"input_ids": input_ids, "position_ids": torch.from_numpy(positions), "labels": input_ids.clone()}


def _permutation(seed: int, place: tuple[int, ...], num_rows: int) -> np.ndarray:
    """A shuffle of range(num_rows): 8 bytes a row, 98 MB for 100 billion tokens at a context of 8,192."""
    return generator(seed, *place).permutation(num_rows)
