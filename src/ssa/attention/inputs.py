"""What one pass asks of every attention layer, what a layer's method gets and gives back, and what an observer sees.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ssa.budget import AttentionMode, Selection
from ssa.ops import decode_dense

if TYPE_CHECKING:
    from ssa.attention.state import BlockMeans, CachedRows, RowBounds


@dataclass(frozen=True)
class AttentionCall:
    """What one forward pass asks of every attention layer."""

    mode: AttentionMode
    """What goes on through the network: attention over the selected blocks, or over everything."""
    selection: Selection
    align: bool = False
    """SSA in training: compute the other stream too and compare them."""
    train: bool = False
    """A training pass: selectors that have a loss of their own compute it."""
    positions_BT: Tensor | None = None
    """Document-relative query positions; None = plain rows (see `ssa.ops.documents`)."""
    padding_BT: Tensor | None = None
    """True where a query is padding, which the alignment loss leaves out."""
    cu_seqlens: Tensor | None = None
    """int32: where documents begin in the flattened batch, beside `positions_BT` (see `ssa.ops.dense_attention`)."""
    bounds: RowBounds | None = None
    """Where each row's tokens lie in the cache; None = nothing is cached."""
    keep_for: Selection | None = None
    """A pass of few tokens over everything keeps up what this selection needs of the cached tokens."""
    impl: str = "auto"
    observer: Callable[[int, AttentionRecord], None] | None = None
    row_blocks_B: Tensor | None = None
    """int32, the most blocks of each row, where few tokens are decoded (`ssa.ops.decode_attention`); None = `selection`'s."""


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's method works on; the queries are the last T tokens of the S keys."""

    q_BTHD: Tensor
    """After RoPE, like k."""
    k_BSKD: Tensor
    v_BSKD: Tensor
    gates_BTHG: Tensor | None = None
    """In 0..1, one for each of the method's branches; None = no gate."""
    bias_BSK: Tensor | None = None
    """fp32, the selector's: part of the logits in every stream."""
    cached: CachedRows | None = None
    """Where earlier tokens are cached: what is kept of them."""
    means: BlockMeans | None = None
    """Where one of the method's branches has pooled the blocks already."""

    def dense_step(self, impl: str, window: int | None = None) -> Tensor:
        """Dense attention of a few queries to what is cached, [B, T, H, D]."""
        assert self.cached is not None
        buffers = self.cached.buffers()
        out, _ = decode_dense(
            self.q_BTHD, buffers.k_BSKD, buffers.v_BSKD, buffers.lengths_B, starts=buffers.starts_B, bias=buffers.bias_BSK, window=window,
            impl=impl,
        )  # fmt: skip
        return out


class MethodOutput(NamedTuple):
    out_BTHD: Tensor
    """Gated."""
    ungated_BTHD: Tensor
    block_indices: Tensor | None
    alignment: Tensor | None
    """fp32 [2]: sparsity loss, commitment loss."""
    selection_loss: Tensor | None = None
    """fp32 scalar, the selector's own."""


@dataclass(frozen=True)
class AttentionRecord:
    """What an observer sees of one layer: q and k after RoPE, the gate's values, the bias, the choice and the ungated output."""

    q_BTHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    gates_BTH: Tensor | None
    """Of the selection's branch."""
    positions_BT: Tensor | None
    block_indices: Tensor | None
    mode: AttentionMode
    selection: Selection
    out_BTHD: Tensor
    bias_BSK: Tensor | None = None
    """What the selector adds to the logits of each key."""
