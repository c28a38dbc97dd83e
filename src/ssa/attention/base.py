"""What every method shares: selecting blocks, attending to them or to everything, and the gate.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from ssa.config import AttentionMode, Budget
from ssa.ops import block_sparse_attention, decode_attention, dense_attention, gated_sum, select_blocks
from ssa.ops.implementations import resolve

if TYPE_CHECKING:
    from ssa.model.cache import CacheRoom


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
    room: CacheRoom | None = None
    """Where a few tokens are decoded: the whole cache, for `ssa.ops.decode_attention`."""


class MethodOutput(NamedTuple):
    out_BTHD: Tensor
    """Gated."""
    ungated_BTHD: Tensor
    block_indices: Tensor | None
    alignment: Tensor | None
    """fp32 [2]: sparsity loss, commitment loss."""


class AttentionMethod:
    """A method without weights of its own: projections, RoPE, cache and the gate's projection belong to the model."""

    num_gates: ClassVar[int] = 1
    training_mode: ClassVar[AttentionMode]
    """The stream that training feeds on; SSA draws it anew each step."""

    def __init__(
        self, *, scope: str = "group", scoring: str = "softmax", rule: str = "exact", window_size: int = 128,
        alignment_loss: str = "smooth_l1", align_gated: bool = True,
    ) -> None:  # fmt: skip
        self.scope, self.scoring, self.rule, self.window_size = scope, scoring, rule, window_size
        self.alignment_loss, self.align_gated = alignment_loss, align_gated

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
        if means is not None and means.room is not None and resolve(call.impl, q) == "triton":
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
