"""NSA: compression, selection and sliding window, each with its own gate.

h = g_cmp * h_cmp + g_slc * h_slc + g_swa * h_swa. Blocks are scored by the compression branch's softmax summed over the GQA
group, which is the selection every method here uses. `mode="full"` reads everything in the selection branch and leaves the other
two as they are (Table A6's cmp + fa + swa).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssa.attention.inputs import AttentionCall, AttentionInputs, MethodOutput
from ssa.attention.method import AttentionMethod
from ssa.attention.selectors.selector import Selector
from ssa.attention.state import BlockMeans
from ssa.budget import Selection
from ssa.ops import block_means, compressed_attention, decode_dense, gated_sum, window_attention
from ssa.ops.implementations import resolve


class NSA(AttentionMethod):
    graphed = True

    def __call__(self, selector: Selector, inputs: AttentionInputs, call: AttentionCall) -> MethodOutput:
        q, k, v, gates = inputs.q_BTHD, inputs.k_BSKD, inputs.v_BSKD, inputs.gates_BTHG
        block_size = call.selection.block_size
        cached = inputs.cached
        few = cached is not None and cached.few and resolve(call.impl, q) == "triton"
        means = None  # made once, for the compression and for the selection
        if cached is not None:
            means = cached.means(block_size, room=few)
        elif call.positions_BT is None:
            means = BlockMeans(block_means(k, block_size), block_means(v, block_size))
        inputs = replace(inputs, means=means)
        if few:
            assert cached is not None and means is not None
            compressed, _ = decode_dense(q, *means, cached.buffers().lengths_B, per=block_size, impl=call.impl)
            window = inputs.dense_step(call.impl, self.window_size)
        else:
            compressed, _ = compressed_attention(
                q, k, v, block_size=block_size, positions=call.positions_BT, means=means, impl=call.impl
            )
            window = window_attention(q, k, v, window=self.window_size, positions=call.positions_BT, impl=call.impl)
        selected, block_indices = self.attend(call.mode, selector, inputs, call)
        branches = [compressed, selected, window]
        out = compressed + selected + window if gates is None else gated_sum(branches, gates, impl=call.impl)
        return MethodOutput(out, selected, block_indices, None)

    def branch_flops(self, selection: Selection, position_ids: Tensor, width: int) -> dict[str, float]:
        seen = position_ids.double() + 1
        return {
            "compression": 12 * width * (seen / selection.block_size).floor().mean().item(),
            "window": 12 * width * seen.clamp(max=self.window_size).mean().item(),
        }
