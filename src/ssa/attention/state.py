"""What is kept of cached tokens beside their keys and values: block means, and whatever a selector needs.

A state is extended with the tokens that came since it was last asked for, and lies at fixed addresses as long as the cache's buffers do,
so that a decoding step can be captured in a CUDA graph.

Legend: B batch, S key columns, K kv heads, D head size, N blocks, s block size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssa.ops.documents import block_within_rows
from ssa.ops.running_means import extend_block_means


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
            end: `length` as int64 scalar on the device, where a replayed CUDA graph advances it.
            start_B: int64 [B], the first column of each row.
        """
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Forgets what it knows of tokens beyond the first `length`, fewer than it has."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> None:
        """Makes row i the old row `rows[i]`, in place where their number stays (`taken`)."""
        raise NotImplementedError


class CacheLayer(Protocol):
    """What is asked of one layer of a cache (`ssa.model.cache.BlockLayer`)."""

    def buffers(self) -> list[Tensor]: ...
    def filled(self) -> Tensor: ...
    def state(self, key: Hashable, make: Callable[[], Any], start_B: Tensor) -> Any: ...


class CachedRows:
    """One layer's cache as one pass sees it. Nothing is computed before it is asked for: dense attention asks for nothing."""

    def __init__(self, layer: CacheLayer, start_B: Tensor, length: int, few: bool) -> None:
        self._layer, self.start_B, self.length = layer, start_B, length
        self.few = few
        """Whether the queries are so few that `ssa.ops.decode_attention` takes them."""

    def state(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The `SelectorState` of that key in this layer, made where there is none yet, with all cached tokens in it."""
        return self._layer.state(key, make, self.start_B)

    def means(self, block_size: int) -> BlockMeans:
        """Means of the complete blocks, [B, S // s, K, D]; row b's blocks start at key column `start_B[b]` (left padding). Places of
        blocks that a row has not completed are undefined."""
        return self._means(block_size, self.length)

    def room(self, block_size: int) -> tuple[CacheBuffers, BlockMeans]:
        """The buffers with all their room and the means of as many blocks. Copies nothing."""
        keys, values, *bias = (x.transpose(1, 2) for x in self._layer.buffers())
        lengths_B = self._layer.filled() - self.start_B
        buffers = CacheBuffers(keys, values, bias[0].squeeze(-1) if bias else None, lengths_B, self.start_B)
        return buffers, self._means(block_size, keys.shape[1])

    def _means(self, block_size: int, columns: int) -> BlockMeans:
        size = block_within_rows(block_size, self._layer.buffers()[0].shape[2])
        sets = self.state(("block means", size), lambda: BlockMeansState(size)).sets
        keys, values = (x[:, : columns // block_size] for x in sets)
        return BlockMeans(keys, values)


class BlockMeansState(SelectorState):
    """Block means of one block size over the first `length` cached tokens, and the sums of the blocks that are still open."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.sets: list[Tensor] = []
        """Means of keys and values, [B, N + 1, K, D]; nobody reads the last place."""
        self.sums: list[Tensor] = []
        """fp32 [B, K, D]: sums over the tokens of each row's last block, where `summed`."""
        self.summed = False

    def crop(self, length: int) -> None:
        self.summed = False

    def take(self, rows: Tensor) -> None:
        self.sets = [taken(x, rows, x.shape[1], 1) for x in self.sets]
        self.sums = [taken(x, rows, x.shape[1], 1) for x in self.sums]

    def extend(self, buffers: list[Tensor], length: int, end: Tensor, start_B: Tensor) -> None:
        buffers = buffers[:2]
        batch, heads, room, _ = buffers[0].shape
        if not self.sets or self.sets[0].shape[1] != room // self.block_size + 1:
            grown = [x.new_zeros(batch, room // self.block_size + 1, heads, x.shape[3]) for x in buffers]
            for new, old in zip(grown, self.sets, strict=False):
                new[:, : old.shape[1] - 1] = old[:, :-1]
            self.sets = grown
        if not self.sums:
            wide = torch.promote_types(buffers[0].dtype, torch.float32)
            self.sums = [x.new_zeros(batch, heads, x.shape[3], dtype=wide) for x in buffers]
        if self.summed and length == self.length + 1:
            keys, values = (x.transpose(1, 2) for x in buffers)
            extend_block_means(keys, values, self.sets, self.sums, end, start_B, self.block_size)
        elif length > self.length:
            self._add_tokens(buffers, length - self.length, end, start_B)

    def _add_tokens(self, buffers: list[Tensor], new: int, end: Tensor, start_B: Tensor) -> None:
        """The blocks that the last `new` tokens complete, and the sums of those they leave open."""
        size, room = self.block_size, buffers[0].shape[2]
        begun_B = (end - new - start_B).clamp(min=0) // size
        open_B = (end - start_B) // size
        block_BN = begun_B[:, None] + torch.arange(new // size + 1, device=end.device)
        # Rows complete different numbers of blocks; what is not complete yet goes to the last place, which nobody reads.
        place_BN = torch.where(block_BN < open_B[:, None], block_BN, self.sets[0].shape[1] - 1)
        tokens = torch.arange(size, device=end.device)
        rows = torch.arange(len(start_B), device=end.device)
        columns_BNs = (start_B[:, None, None] + block_BN[..., None] * size + tokens).clamp(0, room - 1)
        tail_Bs = start_B[:, None] + open_B[:, None] * size + tokens
        for means, total, x in zip(self.sets, self.sums, buffers, strict=True):
            x_BSKD = x.transpose(1, 2)
            means[rows[:, None], place_BN] = x_BSKD[rows[:, None, None], columns_BNs].mean(2, dtype=total.dtype).to(means.dtype)
            rest = x_BSKD[rows[:, None], tail_Bs.clamp(max=room - 1)]
            total.copy_(torch.where((tail_Bs < end)[..., None, None], rest, 0).sum(1, dtype=total.dtype))
        self.summed = True


def taken(x: Tensor, rows: Tensor, length: int, dim: int) -> Tensor:
    """Rows of x, of which the first `length` entries along `dim` matter; in place where their number stays."""
    chosen = x.narrow(dim, 0, length).index_select(0, rows.to(x.device))
    if len(chosen) != len(x):
        x = x.new_empty(len(chosen), *x.shape[1:])
    x.narrow(dim, 0, length).copy_(chosen)
    return x
