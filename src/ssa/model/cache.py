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
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssa.attention.state import CachedRows, RowBounds, SelectorState, taken
from ssa.errors import UserError
from ssa.ops.decode import MAX_QUERIES

CACHE_FIELD = "cache" if any(field.name == "cache" for field in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"
"""What this release of transformers calls the cache in outputs and in `generate`'s loop."""


class BlockLayer(DynamicLayer):
    """One layer's cache. `keys` and `values` are [B, K, S, D] views of the buffers' filled columns."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args, max_length: int | None = None, **kwargs) -> None:
        super().__init__()
        self.max_length = max_length
        self._buffers: list[Tensor] = []
        self._states: dict[Hashable, SelectorState] = {}
        self._end: Any = None
        """int64 scalar on the device: columns filled."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, bias: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, K, T, D], and the selector's bias [B, K, T, 1] where it adds one; returns all keys and values, [B, K, S, D].

        Raises `UserError` where a cache with a `max_length` is full.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        given = (key_states, value_states) if bias is None else (key_states, value_states, bias)
        self._make_room(given, old, new)
        if not old:
            for buffer, states in zip(self._buffers, given, strict=True):
                buffer[:, :, :new] = states
        else:  # at the device's own count, which a replayed CUDA graph advances
            columns = self._end[None] if new == old + 1 else self._end + torch.arange(new - old, device=self._end.device)
            for buffer, states in zip(self._buffers, given, strict=True):
                buffer.index_copy_(2, columns, states)
        self._end += new - old
        self._show(new)
        return self.keys, self.values

    def reserve(self, tokens: int, batch: int, kv_heads: int, head_dim: int, like: Tensor, bias: bool) -> None:
        """Counts so many tokens as being there, which the caller writes, and adds to `end`."""
        empty = like.new_empty(batch, kv_heads, 0, head_dim)
        if not self.is_initialized:
            self.lazy_initialization(empty, empty)
        old = self.get_seq_length()
        given = (
            (empty, empty, like.new_empty(batch, kv_heads, 0, 1, dtype=torch.promote_types(like.dtype, torch.float32)))
            if bias
            else (empty, empty)
        )
        self._make_room(given, old, old + tokens)
        self._show(old + tokens)

    def write_bias(self, bias_BTK: Tensor) -> None:
        """The selector's bias of the tokens before `end`."""
        tokens = bias_BTK.shape[1]
        columns = self._end - tokens + torch.arange(tokens, device=self._end.device)
        self._buffers[2].index_copy_(2, columns, bias_BTK.transpose(1, 2)[..., None])

    def buffers(self) -> list[Tensor]:
        """Keys and values [B, K, S, D] and, where there is one, the bias [B, K, S, 1], with all their room."""
        return self._buffers

    @property
    def end(self) -> Tensor | None:
        """int64 scalar on the device: columns filled. None before the first token."""
        return self._end

    def state(self, key: Hashable, make: Callable[[], SelectorState], start_B: Tensor) -> SelectorState:
        """The state of that key, with all tokens in it; row b's tokens start at key column `start_B[b]` (left padding).

        Only what was appended since the last call is computed.
        """
        if key not in self._states:
            self._states[key] = make()
        state, length = self._states[key], self.get_seq_length()
        state.extend(self._buffers, length, self._end, start_B)
        state.length = length
        return state

    def advance(self, tokens: int, states: Collection[Hashable] | None = None) -> None:
        """Counts tokens that replays of a captured step have appended, also in these states; None: in all that were up to date."""
        old = self.get_seq_length()
        for key, state in self._states.items():
            state.length += tokens if state.length == old and (states is None or key in states) else 0
        self._show(old + tokens)

    def current_states(self) -> frozenset[Hashable]:
        """The states with all tokens in them."""
        return frozenset(key for key, state in self._states.items() if state.length == self.get_seq_length())

    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie."""
        return tuple(buffer.data_ptr() for buffer in self._buffers)

    def crop(self, tokens: int) -> None:
        """Drops the last `-tokens` tokens; a positive number, as releases before 5.24 have it, is the length to keep."""
        old = self.get_seq_length()
        length = min(tokens, old) if tokens > 0 else max(0, old + tokens)
        if length < old:
            self._show(length)
            self._end.fill_(length)
            self._crop_states(length)

    def reset(self) -> None:
        if self.max_length is None or not self._buffers:
            self.keys = self.values = None
            self.is_initialized = False
            self._buffers, self._states = [], {}
        else:
            self._end.zero_()
            self._show(0)
            self._crop_states(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffers:
            self._take(torch.arange(len(self._buffers[0]), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def _make_room(self, given: tuple[Tensor, ...], old: int, new: int) -> None:
        if self.max_length is not None and new > self.max_length:
            raise UserError(f"the cache is full: {new} tokens in a BlockCache of max_length = {self.max_length}; make it longer")
        if self._buffers and len(self._buffers) != len(given):
            raise UserError("the cache was filled by a model with another selector: start with a new one")
        if self._buffers and new <= self._buffers[0].shape[2]:
            return
        room = self.max_length or (new + new // 2 if old else new) + 64
        buffers = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in given]
        if self._buffers:
            for grown, x in zip(buffers, self._buffers, strict=True):
                grown[:, :, :old] = x[:, :, :old]
        else:
            self._end = torch.zeros((), dtype=torch.int64, device=given[0].device)
        self._buffers = buffers

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers[:2])

    def _take(self, rows: Tensor) -> None:
        """Makes row i the old row `rows[i]`; in place where their number stays."""
        if self._buffers:
            length = self.get_seq_length()
            self._buffers = [taken(x, rows, length, 2) for x in self._buffers]
            for state in self._states.values():
                state.take(rows)
            self._show(length)

    def _crop_states(self, length: int) -> None:
        for state in self._states.values():
            if length < state.length:
                state.crop(length)
                state.length = length


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
        self.step_inputs: tuple[Tensor, Tensor] | None = None
        """Where captured steps find their tokens and each row's first column."""

    def bounds(self, batch: int, queries: int, positions_BT: Tensor | None, device: torch.device) -> RowBounds:
        """Of the rows with `queries` tokens more, whose positions in their documents are `positions_BT`, None = plain rows. Reads no device."""
        end = self.layers[0].end if self.layers else None
        end = torch.zeros((), dtype=torch.int64, device=device) if end is None else end.to(device)
        starts_B = torch.zeros(batch, dtype=torch.int64, device=device)
        if positions_BT is not None:
            starts_B = self.get_seq_length() + queries - 1 - positions_BT[:, -1]
        return RowBounds(starts_B, end + queries - starts_B)

    def open(self, layers: int, tokens: int, batch: int, kv_heads: int, head_dim: int, like: Tensor, bias: bool) -> None:
        """Makes room for so many tokens in every layer and counts them as being there; the caller writes them to the columns before `end`."""
        while len(self.layers) < layers:
            self.layers.append(self.layer_class_to_replicate())
        for layer in self.layers:
            layer.reserve(tokens, batch, kv_heads, head_dim, like, bias)
        torch._foreach_add_([layer.end for layer in self.layers], tokens)

    def append(
        self, layer_idx: int, k: Tensor, v: Tensor, bias: Tensor | None, positions_BT: Tensor | None, bounds: RowBounds
    ) -> tuple[Tensor, Tensor, Tensor | None, CachedRows | None]:
        """Takes up the new tokens' k, v [B, T, K, D] and bias [B, T, K]; `positions_BT` and `bounds` as for the pass.

        Returns:
            k, v [B, S, K, D] and bias [B, S, K] of all cached tokens; and the layer's `CachedRows`, None where they do not apply.
        """
        queries, states = k.shape[1], {} if bias is None else {"bias": bias.transpose(1, 2)[..., None]}
        self.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx, **states)
        return self.rows(layer_idx, queries, positions_BT, bounds)

    def rows(
        self, layer_idx: int, queries: int, positions_BT: Tensor | None, bounds: RowBounds
    ) -> tuple[Tensor, Tensor, Tensor | None, CachedRows | None]:
        """What `append` returns, of tokens that are there."""
        layer = self.layers[layer_idx]
        k, v, length = layer.keys.transpose(1, 2), layer.values.transpose(1, 2), layer.get_seq_length()
        bias = layer.buffers()[2][:, :, :length, 0].transpose(1, 2) if len(layer.buffers()) > 2 else None
        # Packed documents share a row only where positions are given for several queries at once; there the blocks of earlier
        # documents matter and what is cached of one document a row does not apply.
        if queries == length or not (positions_BT is None or queries == 1):
            return k, v, bias, None
        return k, v, bias, CachedRows(layer, bounds, length, queries <= MAX_QUERIES)

    def has_room(self, tokens: int) -> bool:
        """Whether so many more fit into the buffers where they lie."""
        return all(layer.get_seq_length() + tokens <= layer.buffers()[0].shape[2] for layer in self.layers[:1])

    def advance(self, tokens: int, states: Collection[Hashable] | None = None) -> None:
        """Counts tokens that replays of a captured step have appended to every layer, and to these states of each; None: all that were up to
        date."""
        for layer in self.layers:
            layer.advance(tokens, states)

    def current_states(self) -> frozenset[Hashable]:
        """The states that have all tokens in them in every layer."""
        return frozenset.intersection(*(layer.current_states() for layer in self.layers))

    def addresses(self) -> tuple[tuple[int, ...], ...]:
        """Where each layer's buffers lie."""
        return tuple(layer.addresses() for layer in self.layers)


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
