"""Blocks by the means of their keys: the selection of MoBA, NSA and SSA."""

from __future__ import annotations

from torch import Tensor

from ssa.attention.inputs import AttentionCall, AttentionInputs
from ssa.attention.selectors.selector import Kept, Selector
from ssa.attention.state import CachedRows
from ssa.budget import Selection
from ssa.ops import select_blocks


class MeansSelector(Selector):
    """Every query reads its own block and those whose mean keys it scores best; see `ssa.ops.select_blocks`."""

    fused = True

    def select(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor:
        kept, rule = None, self.rule(call.selection)
        if inputs.means is not None:
            kept = Kept(inputs.means.keys)
        elif inputs.cached is not None:
            kept = self.kept(inputs.cached, rule)
        means, coarse, importance = kept or (None, None, None)
        block_indices, _ = select_blocks(
            inputs.q_BTHD, inputs.k_BSKD, rule, positions=call.positions_BT, block_keys=means, coarse_keys=coarse,
            bias=inputs.bias_BSK, importance=importance, impl=call.impl,
        )  # fmt: skip
        return block_indices

    def kept(self, cached: CachedRows, selection: Selection, room: bool = False) -> Kept:
        return Kept(cached.means(selection.block_size, room).keys)

    def flops(self, selection: Selection, position_ids: Tensor) -> float:
        blocks = (position_ids.double() / selection.block_size).floor().mean().item()
        return 2 * self.shape.heads * self.shape.head_dim * blocks
