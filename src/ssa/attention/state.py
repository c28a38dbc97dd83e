"""What is kept of cached tokens beside their keys and values: block means, and whatever a selector needs.

A state is extended with the tokens that came since it was last asked for, and lies at fixed addresses as long as the cache's buffers do,
so that a decoding step can be captured in a CUDA graph.

Legend: B batch, S key columns, K kv heads, D head size, N blocks, s block size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ssa.budget import Selection, num_windows
from ssa.ops.cached_means import extend_means
from ssa.ops.documents import block_within_rows


class BlockMeans(NamedTuple):
    """Means of complete blocks, [B, N, K, D] each."""

    keys: Tensor
    values: Tensor


class CacheBuffers(NamedTuple):
    """A layer's buffers with all their room, as `ssa.ops.decode_attention` takes them."""

    k_BSKD: Tensor
    v_BSKD: Tensor
    bias_BSK: Tensor | None
    lengths_B: Tensor
    """int64, tokens of each row."""
    starts_B: Tensor
    """int64, first column of each row."""


class SelectorState:
    """What a selector keeps of one layer's cached tokens: the first `length` of them are in it."""

    def __init__(self) -> None:
        self.length = 0

    def extend(self, buffers: list[Tensor], length: int, end: Tensor, start_B: Tensor) -> None:
        """Takes up the tokens from `self.length` to `length`, which is set afterwards.

        Args:
            buffers: keys, values [B, K, S, D] and, of a selector that adds a bias, that [B, K, S, 1], of which `length` columns are filled.
            end: `length` as int64 scalar on the device, where a replayed CUDA graph advances it; int64 [B], each at most `length`, where a
                cache's rows end apart, as only fused selectors meet it.
            start_B: int64 [B], the first column of each row.
        """
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Forgets what it knows of tokens beyond the first `length`, fewer than it has."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> None:
        """Makes row i the old row `rows[i]`, in place where their number stays (`taken`)."""
        raise NotImplementedError


class RowBounds(NamedTuple):
    """Where each row's tokens lie in a cache after a pass, int64 [B] each, on the device."""

    starts_B: Tensor
    """First column."""
    lengths_B: Tensor
    """Tokens."""


class CacheLayer(Protocol):
    """What is asked of one layer of a cache (`ssa.model.cache.BlockLayer`)."""

    def buffers(self) -> list[Tensor]: ...
    def state(self, key: Hashable, make: Callable[[], Any], start_B: Tensor) -> Any: ...


class CachedRows:
    """One layer's cache as one pass sees it. Nothing is computed before it is asked for: dense attention asks for nothing."""

    def __init__(self, layer: CacheLayer, bounds: RowBounds, length: int, few: bool) -> None:
        self._layer, self.bounds, self.length = layer, bounds, length
        self.few = few
        """Whether the queries are so few that `ssa.ops.decode_attention` takes them."""

    def state(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The `SelectorState` of that key in this layer, made where there is none yet, with all cached tokens in it."""
        return self._layer.state(key, make, self.bounds.starts_B)

    def buffers(self) -> CacheBuffers:
        """With all their room."""
        keys, values, *bias = (x.transpose(1, 2) for x in self._layer.buffers())
        return CacheBuffers(keys, values, bias[0].squeeze(-1) if bias else None, self.bounds.lengths_B, self.bounds.starts_B)

    def means(self, block_size: int, room: bool = False) -> BlockMeans:
        """Means of the complete blocks, [B, S // s, K, D]; row b's blocks start at key column `start_B[b]` (left padding). Places of
        blocks that a row has not completed are undefined. `room`: of as many blocks as the buffers have room for."""
        size = block_within_rows(block_size, self._layer.buffers()[0].shape[2])
        sets = self.state(("means", size), lambda: MeansState(size, size, (0, 1))).sets
        keys, values = (x[:, : self._columns(room) // block_size] for x in sets)
        return BlockMeans(keys, values)

    def windows(self, size: int, stride: int, room: bool = False) -> Tensor:
        """Means of the complete windows of keys, [B, W, K, D], as `means` has those of blocks."""
        [means] = self.state(("windows", size, stride), lambda: MeansState(size, stride, (0,))).sets
        return means[:, : num_windows(self._columns(room), size, stride)]

    def importance(self, selection: Selection, room: bool = False) -> Tensor:
        """fp32 [B, N, K]: the largest of the bias's window means that touch a block; of a block whose windows are not all complete, which no
        query chooses by importance, undefined."""
        size, stride, block = selection.mean_size, selection.mean_stride, selection.block_size
        state = self.state(("importance", size, stride, block), lambda: ImportanceState(size, stride, block))
        return state.importance[:, : -(-self._columns(room) // block)]

    def _columns(self, room: bool) -> int:
        return self._layer.buffers()[0].shape[2] if room else self.length


class MeansState(SelectorState):
    """Means of windows of `size` keys, one every `stride`, over the first `length` cached tokens. size = stride: means of blocks."""

    def __init__(self, size: int, stride: int, which: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.which = which
        """Of which of the cache's buffers: keys, values, bias."""
        self.sets: list[Tensor] = []
        """[B, W, K, D] each."""

    def crop(self, length: int) -> None:
        """Means of windows that are no longer complete are never read, and written anew when they are."""

    def take(self, rows: Tensor) -> None:
        self.sets = [taken(x, rows, x.shape[1], 1) for x in self.sets]

    def extend(self, buffers: list[Tensor], length: int, end: Tensor, start_B: Tensor) -> None:
        given = [buffers[i].transpose(1, 2) for i in self.which]
        batch, room, heads, _ = given[0].shape
        windows = num_windows(room, self.size, self.stride)
        if not self.sets or self.sets[0].shape[1] != windows:
            grown = [x.new_zeros(batch, windows, heads, x.shape[3]) for x in given]
            for new, old in zip(grown, self.sets, strict=False):
                new[:, : old.shape[1]] = old
            self.sets = grown
        if length > self.length:
            self._extend(given, length - self.length, end, start_B)

    def _extend(self, given: list[Tensor], new: int, end: Tensor, start_B: Tensor) -> None:
        extend_means(given, self.sets, end, start_B, new, self.size, self.stride)


class ImportanceState(MeansState):
    """Window means of the bias, and of each block the largest that touch it."""

    def __init__(self, size: int, stride: int, block_size: int) -> None:
        super().__init__(size, stride, (2,))
        self.block_size = block_size
        self.importance: Any = None
        """[B, N, K]"""

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        if self.importance is not None:
            self.importance = taken(self.importance, rows, self.importance.shape[1], 1)

    def _extend(self, given: list[Tensor], new: int, end: Tensor, start_B: Tensor) -> None:
        batch, room, heads, _ = given[0].shape
        blocks = -(-room // self.block_size)
        if self.importance is None or self.importance.shape[1] != blocks:
            grown = given[0].new_full((batch, blocks, heads), float("-inf"))
            if self.importance is not None:
                grown[:, : self.importance.shape[1]] = self.importance
            self.importance = grown
        extend_means(
            given, self.sets, end, start_B, new, self.size, self.stride, importance=self.importance, block_size=self.block_size
        )  # fmt: skip


def taken(x: Tensor, rows: Tensor, length: int, dim: int) -> Tensor:
    """Rows of x, of which the first `length` entries along `dim` matter; in place where their number stays."""
    chosen = x.narrow(dim, 0, length).index_select(0, rows.to(x.device))
    if len(chosen) != len(x):
        x = x.new_empty(len(chosen), *x.shape[1:])
    x.narrow(dim, 0, length).copy_(chosen)
    return x
