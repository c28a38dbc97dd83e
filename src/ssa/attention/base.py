"""What every method shares: selecting blocks, attending to them or to everything, and the gate.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ssa.config import AttentionMode, Budget
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, decode_attention, dense_attention, gated_sum, select_blocks
from ssa.ops.implementations import resolve


@dataclass(frozen=True)
class AttentionCall:
    """What one forward pass asks of every attention layer."""

    mode: AttentionMode
    """What goes on through the network: attention over the selected blocks, or over everything."""
    budget: Budget
    align: bool = False
    """SSA in training: compute the other stream too and compare them."""
    positions_BT: Tensor | None = None
    """Document-relative query positions; None = plain rows (see `ssa.ops.documents`)."""
    padding_BT: Tensor | None = None
    """True where a query is padding, which the alignment loss leaves out."""
    cu_seqlens: Tensor | None = None
    """int32: where documents begin in the flattened batch, beside `positions_BT` (see `ssa.ops.dense_attention`)."""
    impl: str = "auto"
    observer: Callable[[int, AttentionRecord], None] | None = None


@dataclass(frozen=True)
class AttentionRecord:
    """What an observer sees of one layer: q and k after RoPE, the gate's values, the choice and the ungated output."""

    q_BTHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    gates_BTH: Tensor | None
    positions_BT: Tensor | None
    block_indices: Tensor | None
    mode: AttentionMode
    budget: Budget
    out_BTHD: Tensor


class BlockMeans(NamedTuple):
    """Cached means of complete blocks, [B, N, K, D] each."""

    keys: Tensor
    values: Tensor
    room: Any = None
    """A `ssa.model.cache.CacheRoom` where a few tokens are decoded: the whole cache, for `ssa.ops.decode_attention`."""


class MethodOutput(NamedTuple):
    out_BTHD: Tensor
    """Gated."""
    ungated_BTHD: Tensor
    block_indices: Tensor | None
    alignment: Tensor | None
    """fp32 [2]: sparsity loss, commitment loss."""


class AttentionMethod:
    """A method has no weights of its own unless it is a `torch.nn.Module`, too: projections, RoPE, cache and the gate's projection belong to
    the model."""

    num_gates: ClassVar[int] = 1
    training_mode: ClassVar[AttentionMode]
    """The stream that training feeds on; SSA draws it anew each step."""

    def __init__(
        self, *, scope: str = "group", scoring: str = "softmax", rule: str = "exact", window_size: int = 128,
        alignment_loss: str = "smooth_l1", align_gated: bool = True,
    ) -> None:  # fmt: skip
        self.scope, self.scoring, self.rule, self.window_size = scope, scoring, rule, window_size
        self.alignment_loss, self.align_gated = alignment_loss, align_gated

    def check_registered(self) -> None:
        """Raises `UserError` for a tensor or module of the method that is no registered part of a model."""
        known = set()
        if isinstance(self, nn.Module):
            known = {id(x) for x in (*self.parameters(), *self.buffers(), *self.modules())}
        for name, value in vars(self).items():
            for x in _tensors_and_modules(value, {id(self)}):
                if id(x) not in known:
                    raise UserError(
                        f"the method {type(self).__name__} holds a {type(x).__name__} in {name!r} that would be neither trained nor saved: "
                        "derive the method from torch.nn.Module, too, and make it a parameter, buffer or submodule"
                    )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, call: AttentionCall, means: BlockMeans | None = None
    ) -> MethodOutput:
        """q [B, T, H, D], k and v [B, S, K, D] after RoPE, gates [B, T, H, num_gates] in 0..1 or None for no gate."""
        out, block_indices = self.attend(call.mode, q, k, v, call, means)
        gated = out if gates is None else gated_sum([out], gates, impl=call.impl)
        return MethodOutput(gated, out, block_indices, None)

    def attend(
        self, mode: AttentionMode, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, means: BlockMeans | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream `mode`: (out [B, T, H, D], block_indices or None)."""
        if mode == "full":
            return dense_attention(q, k, v, positions=call.positions_BT, cu_seqlens=call.cu_seqlens), None
        # the fused operation chooses by itself, as `select` below does; a method with a selection of its own needs that
        fused = type(self).select is AttentionMethod.select and "select" not in vars(self)
        if fused and means is not None and means.room is not None and resolve(call.impl, q) == "triton":
            room = means.room
            out, _, block_indices = decode_attention(
                q, room.k_BSKD, room.v_BSKD, room.means.keys, room.lengths_B, starts=room.starts_B,
                block_size=call.budget.block_size, num_selected_blocks=call.budget.num_selected_blocks,
                scope=self.scope, scoring=self.scoring, rule=self.rule, impl=call.impl,
            )  # fmt: skip
            return out, block_indices
        block_indices = self.select(q, k, call, means)
        out, _ = block_sparse_attention(
            q, k, v, block_indices, block_size=call.budget.block_size, positions=call.positions_BT, impl=call.impl
        )
        return out, block_indices

    def select(self, q: Tensor, k: Tensor, call: AttentionCall, means: BlockMeans | None) -> Tensor:
        """int32 [B, K or H, T, M]; see `ssa.ops.select_blocks`."""
        block_indices, _ = select_blocks(
            q, k, block_size=call.budget.block_size, num_selected_blocks=call.budget.num_selected_blocks,
            positions=call.positions_BT, scope=self.scope, scoring=self.scoring, rule=self.rule,
            block_keys=None if means is None else means.keys, impl=call.impl,
        )  # fmt: skip
        return block_indices


def _tensors_and_modules(value: Any, seen: set[int]) -> Iterator[Tensor | nn.Module]:
    """Those in `value`, its items and its attributes, but for what is in objects of `seen` ids."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
    elif id(value) not in seen and not isinstance(value, (type, types.FunctionType, types.ModuleType)):
        seen.add(id(value))
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()
        for x in (*items, *getattr(value, "__dict__", {}).values()):
            yield from _tensors_and_modules(x, seen)
