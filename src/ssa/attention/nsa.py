"""NSA: compression, selection and sliding window, each with its own gate.

h = g_cmp * h_cmp + g_slc * h_slc + g_swa * h_swa. Blocks are scored by the compression branch's softmax summed over the GQA
group, which is the selection every method here uses. `mode="full"` reads everything in the selection branch and leaves the other
two as they are (Table A6's cmp + fa + swa).
"""

from __future__ import annotations

from torch import Tensor

from ssa.attention.base import AttentionCall, AttentionMethod, BlockMeans, MethodOutput, gated
from ssa.ops import compressed_attention, dense_attention


class NSA(AttentionMethod):
    num_gates = 3
    training_mode = "sparse"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, call: AttentionCall, means: BlockMeans | None = None
    ) -> MethodOutput:
        compressed = compressed_attention(q, k, v, block_size=call.budget.block_size, positions=call.positions_BT, means=means)
        selected, block_indices = self.attend(call.mode, q, k, v, call, means)
        window = dense_attention(q, k, v, positions=call.positions_BT, window=self.window_size)
        out = gated(compressed, gates, 0) + gated(selected, gates, 1) + gated(window, gates, 2)
        return MethodOutput(out, selected, block_indices, None)
