"""The key/value cache: keys and values in growing buffers, block means kept beside them as blocks complete.

All that `transformers` moves between releases about caches is touched here.

Legend: B batch, S keys, K kv heads, D head size, N blocks, s block size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ssa.attention.base import BlockMeans
from ssa.errors import UserError


class BlockLayer(DynamicLayer):
    """One layer's cache. `keys` and `values` are [B, K, S, D] views of buffers that grow by half, so a step copies one token."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._means: dict[int, _Means] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends [B, K, T, D] and returns everything cached, [B, K, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        # reorder and select replace the views by fresh tensors; crop keeps them
        if not self._buffers or new > self._buffers[0].shape[2] or (old and self.keys.data_ptr() != self._buffers[0].data_ptr()):
            room = max(new + 64, new + new // 2 if old else new + 64)
            buffers = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states)]
            if old:
                buffers[0][:, :, :old], buffers[1][:, :, :old] = self.keys, self.values
            self._buffers = buffers
        self._buffers[0][:, :, old:new] = key_states
        self._buffers[1][:, :, old:new] = value_states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self._buffers)
        return self.keys, self.values

    def block_means(self, block_size: int, start_B: Tensor) -> BlockMeans:
        """Means of the complete blocks, [B, S // s, K, D] each; row b's blocks start at key column `start_B[b]` (left padding).

        Only blocks completed since the last call are computed. Places of blocks that a row has not completed are undefined.
        """
        if block_size not in self._means:
            self._means[block_size] = _Means(block_size)
        return self._means[block_size].extended(self.keys, self.values, start_B)

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        for means in self._means.values():
            means.length = min(means.length, self.get_seq_length())

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._buffers, self._means = [], {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for means in self._means.values():
            means.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for means in self._means.values():
            means.take(torch.arange(means.rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for means in self._means.values():
            means.take(indices)


class _Means:
    """Block means of one block size, up to `length` cached keys."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.length = block_size, 0
        self.sets: list[Tensor] = []

    @property
    def rows(self) -> int:
        return self.sets[0].shape[0] if self.sets else 0

    def take(self, rows: Tensor) -> None:
        self.sets = [x[rows.to(x.device)] for x in self.sets]

    def extended(self, keys: Tensor, values: Tensor, start_B: Tensor) -> BlockMeans:
        size, total = self.block_size, keys.shape[2]
        batch, blocks = keys.shape[0], total // size
        if not self.sets or blocks + 1 > self.sets[0].shape[1]:
            room = blocks + 1 + max(16, blocks // 2)  # one place more than blocks: see `place` below
            grown = [x.new_zeros(batch, room, x.shape[1], x.shape[3]) for x in (keys, values)]
            for new, old in zip(grown, self.sets, strict=False):
                new[:, : old.shape[1]] = old
            self.sets = grown
        if total > self.length:
            begun_B = ((self.length - start_B).clamp(min=0)) // size
            complete_B = (total - start_B) // size
            block_BN = begun_B[:, None] + torch.arange((total - self.length) // size + 1, device=keys.device)
            # Rows complete different numbers of blocks; what is not complete yet goes to the last place, which nobody reads.
            place_BN = torch.where(block_BN < complete_B[:, None], block_BN, self.sets[0].shape[1] - 1)
            columns = start_B[:, None, None] + block_BN[..., None] * size + torch.arange(size, device=keys.device)
            columns = columns.clamp(0, total - 1)
            rows = torch.arange(batch, device=keys.device)
            for means, x in zip(self.sets, (keys, values), strict=True):
                tokens_BNsKD = x.transpose(1, 2)[rows[:, None, None], columns]
                mean = tokens_BNsKD.to(torch.promote_types(x.dtype, torch.float32)).mean(2).to(x.dtype)
                means[rows[:, None], place_BN] = mean
            self.length = total
        return BlockMeans(*(x[:, :blocks] for x in self.sets))


class BlockCache(Cache):
    """What `SSAForCausalLM` caches while it generates; works in sparse and full mode, and at any budget."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BlockLayer)


class BlockCacheGeneration:
    """Makes `generate` use a `BlockCache` (mix in before GenerationMixin)."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(f"cache_implementation = {generation_config.cache_implementation!r} is not supported; leave it out")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = BlockCache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
