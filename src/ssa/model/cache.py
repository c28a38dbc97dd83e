"""The key/value cache: keys and values in buffers with room to grow, block means kept beside them token by token.

A `BlockCache` grows by half when it is full, or has a `max_length` and then never moves: appending, block means, `crop` and
`reorder_cache` write in place at positions that live on the device, so that a decoding step over `room` can be captured in a CUDA
graph once and replayed (tell the cache with `advance`, since Python's own count of the tokens stands still meanwhile).

All that `transformers` moves between releases about caches is touched here.

Legend: B batch, S key columns, K kv heads, D head size, N blocks, s block size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssa.attention.base import BlockMeans
from ssa.errors import UserError
from ssa.ops.documents import block_within_rows
from ssa.ops.running_means import extend_block_means

CACHE_FIELD = "cache" if any(field.name == "cache" for field in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"
"""What this release of transformers calls the cache in outputs and in `generate`'s loop."""


class CacheRoom(NamedTuple):
    """A layer's buffers with all their room, as `ssa.ops.decode_attention` takes them."""

    k_BSKD: Tensor
    v_BSKD: Tensor
    means: BlockMeans
    """[B, N, K, D] each with N = S // s."""
    lengths_B: Tensor
    """int64, tokens of each row."""
    starts_B: Tensor
    """int64, first column of each row."""


class BlockLayer(DynamicLayer):
    """One layer's cache. `keys` and `values` are [B, K, S, D] views of the buffers' filled columns."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args, max_length: int | None = None, **kwargs) -> None:
        super().__init__()
        self.max_length = max_length
        self._buffers: list[Tensor] = []
        self._means: dict[int, _Means] = {}
        self._end: Any = None
        """int64 scalar on the device: columns filled."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends [B, K, T, D] and returns everything cached, [B, K, S, D].

        Raises `UserError` where a cache with a `max_length` is full.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        self._make_room(key_states, value_states, old, new)
        if self.max_length is None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, old:new] = states
        else:  # at the device's own count, which a replayed CUDA graph advances
            columns = self._end[None] if new == old + 1 else self._end + torch.arange(new - old, device=self._end.device)
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, columns, states)
        self._end += new - old
        self._show(new)
        return self.keys, self.values

    def block_means(self, block_size: int, start_B: Tensor) -> BlockMeans:
        """Means of the complete blocks, [B, S // s, K, D] each; row b's blocks start at key column `start_B[b]` (left padding).

        Only what was appended since the last call is computed. Places of blocks that a row has not completed are undefined.
        """
        blocks = self.get_seq_length() // block_size
        keys, values = (x[:, :blocks] for x in self._extended(block_size, start_B))
        return BlockMeans(keys, values)

    def room(self, block_size: int, start_B: Tensor) -> CacheRoom:
        """The buffers with all their room, block means included; rows as for `block_means`. Copies nothing."""
        sets = self._extended(block_size, start_B)
        keys, values = (x.transpose(1, 2) for x in self._buffers)
        blocks = keys.shape[1] // block_size
        key_means, value_means = (x[:, :blocks] for x in sets)
        return CacheRoom(keys, values, BlockMeans(key_means, value_means), self._end - start_B, start_B)

    def advance(self, tokens: int) -> None:
        """Counts tokens that replays of a captured step have appended, means of up-to-date block sizes included."""
        old = self.get_seq_length()
        for means in self._means.values():
            means.length += tokens if means.length == old else 0
        self._show(old + tokens)

    def crop(self, tokens: int) -> None:
        """Drops the last `-tokens` tokens; a positive number, as releases before 5.24 have it, is the length to keep."""
        old = self.get_seq_length()
        length = min(tokens, old) if tokens > 0 else max(0, old + tokens)
        if length < old:
            self._show(length)
            self._end.fill_(length)
            for means in self._means.values():
                means.crop(length)

    def reset(self) -> None:
        if self.max_length is None or not self._buffers:
            self.keys = self.values = None
            self.is_initialized = False
            self._buffers, self._means = [], {}
        else:
            self._end.zero_()
            self._show(0)
            for means in self._means.values():
                means.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffers:
            self._take(torch.arange(len(self._buffers[0]), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def _make_room(self, key_states: Tensor, value_states: Tensor, old: int, new: int) -> None:
        if self.max_length is not None and new > self.max_length:
            raise UserError(f"the cache is full: {new} tokens in a BlockCache of max_length = {self.max_length}; make it longer")
        if self._buffers and new <= self._buffers[0].shape[2]:
            return
        room = self.max_length or (new + new // 2 if old else new) + 64
        buffers = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states)]
        if self._buffers:
            buffers[0][:, :, :old], buffers[1][:, :, :old] = self.keys, self.values
        else:
            self._end = torch.zeros((), dtype=torch.int64, device=key_states.device)
        self._buffers = buffers

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _take(self, rows: Tensor) -> None:
        """Makes row i the old row `rows[i]`; in place where their number stays."""
        if self._buffers:
            length = self.get_seq_length()
            self._buffers = [_taken(x, rows, length, 2) for x in self._buffers]
            for means in self._means.values():
                means.take(rows)
            self._show(length)

    def _extended(self, block_size: int, start_B: Tensor) -> list[Tensor]:
        block_size = block_within_rows(block_size, self._buffers[0].shape[2])
        if block_size not in self._means:
            self._means[block_size] = _Means(block_size)
        return self._means[block_size].extended(self._buffers, self.get_seq_length(), self._end, start_B)


class _Means:
    """Block means of one block size over the first `length` cached tokens, and the sums of the blocks that are still open."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.length = block_size, 0
        self.sets: list[Tensor] = []
        """Means of keys and values, [B, N + 1, K, D]; nobody reads the last place."""
        self.sums: list[Tensor] = []
        """fp32 [B, K, D]: sums over the tokens of each row's last block, where `summed`."""
        self.summed = False

    def crop(self, length: int) -> None:
        if length < self.length:
            self.length, self.summed = length, False

    def take(self, rows: Tensor) -> None:
        self.sets = [_taken(x, rows, x.shape[1], 1) for x in self.sets]
        self.sums = [_taken(x, rows, x.shape[1], 1) for x in self.sums]

    def extended(self, buffers: list[Tensor], length: int, end: Tensor, start_B: Tensor) -> list[Tensor]:
        """The sets over the first `length` columns of `buffers` [B, K, S, D]; `end` is the same number on the device."""
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
        self.length = length
        return self.sets

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


def _taken(x: Tensor, rows: Tensor, length: int, dim: int) -> Tensor:
    """Rows of x, of which the first `length` entries along `dim` matter; in place where their number stays."""
    chosen = x.narrow(dim, 0, length).index_select(0, rows.to(x.device))
    if len(chosen) != len(x):
        x = x.new_empty(len(chosen), *x.shape[1:])
    x.narrow(dim, 0, length).copy_(chosen)
    return x


class BlockCache(Cache):
    """What `SSAForCausalLM` caches while it generates; works in sparse and full mode, and at any budget.

    Args:
        max_length: Most tokens; their memory is taken at the first step and stays where it is. None = grow as needed.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length = {max_length} must be at least 1")
        super().__init__(layer_class_to_replicate=functools.partial(BlockLayer, max_length=max_length))
        self.max_length = max_length

    def advance(self, tokens: int) -> None:
        """Counts tokens that replays of a captured step have appended to every layer."""
        for layer in self.layers:
            layer.advance(tokens)


class CacheByEitherName:
    """`output.cache` on every release: before transformers 5.24 outputs have the cache as `past_key_values` alone (mix in first)."""

    if CACHE_FIELD != "cache":

        @property
        def cache(self) -> Any:
            return self.past_key_values  # type: ignore[attr-defined]


def one_cache(cache: Any, past_key_values: Any) -> BlockCache | None:
    """The cache that a caller handed over under either name.

    Raises:
        UserError: Two different ones, or no `BlockCache`.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise UserError(
            "cache and past_key_values are two names of one thing, and two different caches were passed: pass cache alone"
        )
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, BlockCache):
        raise UserError(f"the cache is a {type(found).__name__}; pass an ssa.model.BlockCache or None")
    return found


class BlockCacheGeneration:
    """Makes `generate` use a `BlockCache` and refuse prompts padded where tokens follow (mix in before GenerationMixin)."""

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs, *args, **kwargs):
        if getattr(generation_config, "is_assistant", False):
            # An assistant is handed what was generated so far, in which a pad token is text; transformers passes on a mask only if it has zeros.
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.int64)
        mask = super()._prepare_attention_mask_for_generation(  # type: ignore[misc]
            inputs_tensor, generation_config, model_kwargs, *args, **kwargs
        )
        _refuse_right_padding(mask)
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise UserError(
                f"the pad token (id {generation_config.pad_token_id}) stands inside the text, and generate took it for padding: "
                "pass attention_mask"
            )
        return mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise UserError(f"cache_implementation = {kind!r} is not supported; use 'dynamic' or 'static', or leave it out")
        _refuse_right_padding(model_kwargs.get("attention_mask"))
        # A caller's cache goes on under the name that this release's loop reads: beside a second one it would be ignored.
        cache = one_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_FIELD] = BlockCache(generation_config.max_length if kind == "static" else None)
            return None
        if cache is not None:
            model_kwargs[CACHE_FIELD] = cache
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def _refuse_right_padding(mask: Tensor | None) -> None:
    if mask is not None and mask.ndim == 2 and bool((mask[:, -1:] == 0).any()):
        raise UserError(
            "a prompt ends in padding, and what is generated would follow it: tokenize with padding_side='left' "
            "(where the last token is text, pass attention_mask)"
        )
