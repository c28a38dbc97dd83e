"""A decoding step as one CUDA graph: few tokens of each row of a cache in, logits (or the tokens chosen from them) out.

Launched one by one, the kernels of a step take the host ten times as long as the GPU. A graph holds the addresses of the cache that it was
captured over, and dies with it; where the cache has moved (it grew, or its rows were reordered into other memory) a new one is captured.

Legend: B batch, T tokens of each row, V vocabulary, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssa.attention import AttentionCall
from ssa.attention.state import RowBounds
from ssa.model.cache import BlockCache
from ssa.model.inference import fused_layers, kernels, plain, runs_fused
from ssa.ops.decode import MAX_QUERIES

MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the longest position, which the host looks at."""
Choose = Callable[[Tensor], Tensor]
"""Logits [B, T, V] to what becomes of them, on the device alone."""


class DecodeSteps:
    """The steps of one model. `graphs = False` launches them instead, with the same kernels; `fused = False` leaves all passes to the model's own
    layers."""

    def __init__(self) -> None:
        self.graphs = self.fused = True
        self._of_cache: weakref.WeakKeyDictionary[BlockCache, dict[tuple[Hashable, Hashable], _Graph]] = (
            weakref.WeakKeyDictionary()
        )

    def __deepcopy__(self, memo: Any) -> DecodeSteps:
        return self._anew()

    def __reduce__(self) -> Any:
        return (DecodeSteps, ())

    def _anew(self) -> DecodeSteps:
        """Graphs belong to the model that they were captured from."""
        copy = DecodeSteps()
        copy.graphs, copy.fused = self.graphs, self.fused
        return copy

    def applies(self, model: Any, calls: Sequence[AttentionCall], x: Tensor, tokens: int) -> bool:
        """Whether the model's step is what `run` computes: a few tokens after others, through parts as they were made, on a GPU's kernels."""
        return (
            tokens <= MAX_QUERIES
            and plain(model.lm_head)
            and plain(model.model.norm)
            and model.lm_head.weight.dtype == x.dtype
            and all(layer.self_attn.method.graphed and layer.self_attn.selector.fused for layer in model.model.layers)
            and runs_fused(model.model, x, replace(calls[0], bounds=RowBounds(x, x)))
        )

    def run(
        self, model: Any, ids_BT: Tensor, cache: BlockCache, starts_B: Tensor, calls: Sequence[AttentionCall],
        choose: Choose | None = None,
    ) -> Tensor:  # fmt: skip
        """Appends the tokens to the cache; what `choose` makes of their logits, or these. The result's memory is used again by the next step.

        Args:
            ids_BT: int64 [B, T], 1 <= T <= 8, the tokens after those in the cache. If the result of `choose` is to be the next step's
                `ids_BT`, pass the same tensor and let `choose` write to it: a graph reads it where it lies.
            starts_B: int64 [B], first column of each row; lies where it lies for as long as the cache is used.
            calls: one a layer; `applies` is true of them.
        """
        with torch.cuda.device_of(ids_BT):  # where kernels are launched and captured
            return self._run(model, ids_BT, cache, starts_B, calls, choose)

    def _run(
        self,
        model: Any,
        ids_BT: Tensor,
        cache: BlockCache,
        starts_B: Tensor,
        calls: Sequence[AttentionCall],
        choose: Choose | None,
    ) -> Tensor:
        moves = model.config.rope_parameters.get("rope_type") in MOVING_ROPE
        if not (self.graphs and ids_BT.is_cuda):
            return _step(model, ids_BT, cache, starts_B, calls, choose)
        what = (
            ids_BT.data_ptr(),
            starts_B.data_ptr(),
            ids_BT.shape,
            *((c.mode, c.selection, c.keep_for) for c in calls),
            choose,
        )
        graphs = self._of_cache.setdefault(cache, {})
        graph = graphs.get((what, cache.addresses()))
        full = cache.get_seq_length() + ids_BT.shape[1] > cache.room
        if graph is None or full or not graph.states <= cache.current_states():
            # The first step of its kind runs as it is: it makes room, and compiles what is not compiled yet. So does one that has more to
            # take up than its own tokens, or finds the cache full: a replay would write beyond its buffers.
            result = _step(model, ids_BT, cache, starts_B, calls, choose)
            places = cache.addresses()
            for old in [key for key in graphs if key[1] != places]:
                del graphs[old]
            graphs.setdefault((what, places), _Graph())
            return result
        if moves:
            graph.rope(_rope(model, ids_BT, _bounds(cache, starts_B, ids_BT)))
        if graph.captured:
            cache.advance(ids_BT.shape[1], graph.states)
        else:
            graph.capture(lambda: _step(model, ids_BT, cache, starts_B, calls, choose, graph.its_rope), (ids_BT, starts_B))
            graph.states = cache.current_states()
        return graph.replay()


class _Graph:
    """One step, captured the second time that it is asked for."""

    def __init__(self) -> None:
        self.captured = False
        self.states: frozenset[Hashable] = frozenset()
        """What the step takes its tokens up in, beside keys and values."""
        self.its_rope: tuple[Tensor, Tensor] | None = None
        self._graph: Any = None
        self._result: Any = None
        self._kept: Any = None

    def rope(self, new: tuple[Tensor, Tensor]) -> None:
        """Puts the tables where the graph finds them."""
        if self.its_rope is None:
            self.its_rope = new
        else:
            torch._foreach_copy_(list(self.its_rope), list(new))

    def capture(self, step: Callable[[], Tensor], kept: tuple[Tensor, ...]) -> None:
        """Python counts the step's tokens while it is captured; its kernels run when it is replayed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self._result = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph, self._kept, self.captured = graph, kept, True

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result


def _bounds(cache: BlockCache, starts_B: Tensor, ids_BT: Tensor) -> RowBounds:
    end = cache.layers[0].end
    assert end is not None
    return RowBounds(starts_B, end + ids_BT.shape[1] - starts_B)


def _rope(model: Any, ids_BT: Tensor, bounds: RowBounds) -> tuple[Tensor, Tensor]:
    positions_BT = (bounds.lengths_B[:, None] + torch.arange(-ids_BT.shape[1], 0, device=ids_BT.device)).clamp(min=0)
    return model.model.rotary_emb(positions_BT.float(), positions_BT)


def _step(
    model: Any, ids_BT: Tensor, cache: BlockCache, starts_B: Tensor, calls: Sequence[AttentionCall], choose: Choose | None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    inner, bounds = model.model, _bounds(cache, starts_B, ids_BT)
    rope = _rope(model, ids_BT, bounds) if rope is None else rope
    calls = [replace(call, positions_BT=None, bounds=bounds) for call in calls]
    x_BTC = fused_layers(inner, inner.embed_tokens(ids_BT), rope, calls, cache)
    logits_BTV = kernels().project(x_BTC.flatten(0, 1), inner.norm, [model.lm_head]).view(*ids_BT.shape, -1)
    return logits_BTV if choose is None else choose(logits_BTV)
