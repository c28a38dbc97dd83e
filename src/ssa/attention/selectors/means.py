"""Blocks by the means of their keys: the selection of MoBA, NSA and SSA."""

from __future__ import annotations

from torch import Tensor

from ssa.attention.inputs import AttentionCall, AttentionInputs
from ssa.attention.selectors.selector import Selector
from ssa.budget import Selection
from ssa.ops import select_blocks


class MeansSelector(Selector):
    """Every query reads its own block and those whose mean keys it scores best; see `ssa.ops.select_blocks`."""

    fused = True

    def select(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor:
        means = inputs.means
        if means is None and inputs.cached is not None:
            means = inputs.cached.means(call.selection.block_size)
        block_indices, _ = select_blocks(
            inputs.q_BTHD, inputs.k_BSKD, call.selection, positions=call.positions_BT,
            block_keys=None if means is None else means.keys, impl=call.impl,
        )  # fmt: skip
        return block_indices

    def flops(self, selection: Selection, position_ids: Tensor) -> float:
        blocks = (position_ids.double() / selection.block_size).floor().mean().item()
        return 2 * self.shape.heads * self.shape.head_dim * blocks
