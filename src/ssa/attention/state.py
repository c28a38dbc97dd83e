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
from torch.nn.functional import pad

from ssa.budget import Selection, num_windows
from ssa.ops.documents import block_within_rows
from ssa.ops.running_means import extend_means
from ssa.ops.windows import block_importance, window_means


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

    def buffers(self) -> CacheBuffers:
        """With all their room."""
        keys, values, *bias = (x.transpose(1, 2) for x in self._layer.buffers())
        lengths_B = self._layer.filled() - self.start_B
        return CacheBuffers(keys, values, bias[0].squeeze(-1) if bias else None, lengths_B, self.start_B)

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
        """fp32 [B, N, K]: the largest of the bias's window means that touch a block, -inf where none is complete yet."""
        size, stride, block = selection.mean_size, selection.mean_stride, selection.block_size
        state = self.state(("importance", size, stride, block), lambda: ImportanceState(size, stride, block))
        return state.importance[:, : -(-self._columns(room) // block)]

    def _columns(self, room: bool) -> int:
        return self._layer.buffers()[0].shape[2] if room else self.length


class MeansState(SelectorState):
    """Means of windows of `size` keys, one every `stride`, over the first `length` cached tokens, and sums of the windows still open.

    size = stride: means of blocks.
    """

    def __init__(self, size: int, stride: int, which: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.which = which
        """Of which of the cache's buffers: keys, values, bias."""
        self.sets: list[Tensor] = []
        """[B, W + 1, K, D] each; nobody reads the last place."""
        self.sums: list[Tensor] = []
        """fp32 [B, K, size / stride, D]: sums over each row's last stretches of `stride` tokens, stretch p at p % (size / stride); where
        `summed`."""
        self.summed = False

    def crop(self, length: int) -> None:
        self.summed = False

    def take(self, rows: Tensor) -> None:
        self.sets = [taken(x, rows, x.shape[1], 1) for x in self.sets]
        self.sums = [taken(x, rows, x.shape[1], 1) for x in self.sums]

    def extend(self, buffers: list[Tensor], length: int, end: Tensor, start_B: Tensor) -> None:
        buffers = [buffers[i] for i in self.which]
        batch, heads, room, _ = buffers[0].shape
        places = num_windows(room, self.size, self.stride) + 1
        if not self.sets or self.sets[0].shape[1] != places:
            grown = [x.new_zeros(batch, places, heads, x.shape[3]) for x in buffers]
            for new, old in zip(grown, self.sets, strict=False):
                new[:, : old.shape[1] - 1] = old[:, :-1]
            self.sets = grown
        if not self.sums:
            wide = torch.promote_types(buffers[0].dtype, torch.float32)
            self.sums = [x.new_zeros(batch, heads, self.size // self.stride, x.shape[3], dtype=wide) for x in buffers]
        if self.summed and length == self.length + 1:
            self._add_token([x.transpose(1, 2) for x in buffers], end, start_B)
        elif length > self.length:
            self._add_tokens(buffers, length - self.length, end, start_B)

    def _add_token(self, buffers: list[Tensor], end: Tensor, start_B: Tensor) -> None:
        extend_means(buffers, self.sets, self.sums, end, start_B, self.size, self.stride)

    def _add_tokens(self, buffers: list[Tensor], new: int, end: Tensor, start_B: Tensor) -> None:
        """The windows that the last `new` tokens complete, and the sums of those they leave open."""
        size, stride, ratio, room = self.size, self.stride, self.size // self.stride, buffers[0].shape[2]
        device, tokens_B = end.device, end - start_B
        begun_B, done_B = self._complete((tokens_B - new).clamp(min=0)), self._complete(tokens_B)
        most = new // stride + 1
        window_BW = begun_B[:, None] + torch.arange(most, device=device)
        # Rows complete different numbers of windows; what is not complete yet goes to the last place, which nobody reads.
        place_BW = torch.where(window_BW < done_B[:, None], window_BW, self.sets[0].shape[1] - 1)
        rows = torch.arange(len(start_B), device=device)
        first_B = start_B + begun_B * stride
        column_BC = (first_B[:, None] + torch.arange((most + ratio - 1) * stride, device=device)).clamp(0, room - 1)
        stretch_BR = (tokens_B // stride)[:, None] - torch.arange(ratio, device=device)
        tail_BRs = (start_B[:, None] + stretch_BR * stride)[..., None] + torch.arange(stride, device=device)
        inside_BRs = (stretch_BR[..., None] >= 0) & (tail_BRs < end)
        for means, total, x in zip(self.sets, self.sums, buffers, strict=True):
            x_BSKD = x.transpose(1, 2)
            means[rows[:, None], place_BW] = window_means(x_BSKD[rows[:, None], column_BC], size, stride)
            rest_BRsKD = x_BSKD[rows[:, None, None], tail_BRs.clamp(0, room - 1)]
            rest_BRKD = torch.where(inside_BRs[..., None, None], rest_BRsKD, 0).sum(2, dtype=total.dtype)
            total.transpose(1, 2)[rows[:, None], stretch_BR % ratio] = rest_BRKD
        self.summed = True

    def _complete(self, tokens_B: Tensor) -> Tensor:
        """Windows that end within so many tokens."""
        return (tokens_B - self.size + self.stride).clamp(min=0) // self.stride


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

    def _add_token(self, buffers: list[Tensor], end: Tensor, start_B: Tensor) -> None:
        if self.importance.shape[1] != -(-buffers[0].shape[1] // self.block_size):
            self._pool(buffers[0].shape[1], end - 1, start_B)
        extend_means(
            buffers, self.sets, self.sums, end, start_B, self.size, self.stride, importance=self.importance, block_size=self.block_size
        )  # fmt: skip

    def _add_tokens(self, buffers: list[Tensor], new: int, end: Tensor, start_B: Tensor) -> None:
        super()._add_tokens(buffers, new, end, start_B)
        self._pool(buffers[0].shape[2], end, start_B)

    def _pool(self, room: int, end: Tensor, start_B: Tensor) -> None:
        """Anew, of the first `end` columns; in place where there is room for as many blocks as before."""
        means_BWK = self.sets[0][:, :-1, :, 0]
        complete_BW = torch.arange(means_BWK.shape[1], device=end.device) < self._complete((end - start_B).clamp(min=0))[:, None]
        means_BWK = means_BWK.masked_fill(~complete_BW[..., None], float("-inf"))
        per_block, blocks = self.block_size // self.stride, -(-room // self.block_size)
        # the last window may end in a block where none starts
        means_BWK = pad(means_BWK, (0, 0, 0, blocks * per_block - means_BWK.shape[1]), value=float("-inf"))
        found = block_importance(means_BWK, per_block, self.size // self.stride - 1)
        if self.importance is None or self.importance.shape != found.shape:
            self.importance = found.new_empty(found.shape)
        self.importance.copy_(found)


def taken(x: Tensor, rows: Tensor, length: int, dim: int) -> Tensor:
    """Rows of x, of which the first `length` entries along `dim` matter; in place where their number stays."""
    chosen = x.narrow(dim, 0, length).index_select(0, rows.to(x.device))
    if len(chosen) != len(x):
        x = x.new_empty(len(chosen), *x.shape[1:])
    x.narrow(dim, 0, length).copy_(chosen)
    return x
