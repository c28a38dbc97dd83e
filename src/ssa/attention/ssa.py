"""SSA: both streams on the same q, k, v at every layer; one goes on, the other serves the alignment loss alone.

Which stream goes on is drawn once per step (`ssa.train.streams`), never per layer: per layer the paper's runs end in NaN.
"""

from __future__ import annotations

from torch import Tensor

from ssa.attention.alignment import alignment_losses
from ssa.attention.base import AttentionCall, AttentionMethod, BlockMeans, MethodOutput, gated


class SSA(AttentionMethod):
    training_mode = "sparse"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, call: AttentionCall, means: BlockMeans | None = None
    ) -> MethodOutput:
        if not call.align or self.alignment_loss == "none":
            return super().__call__(q, k, v, gates, call, means)
        full, _ = self.attend("full", q, k, v, call, means)
        sparse, block_indices = self.attend("sparse", q, k, v, call, means)
        gated_full, gated_sparse = gated(full, gates), gated(sparse, gates)
        pair = (gated_full, gated_sparse) if self.align_gated else (full, sparse)
        alignment = alignment_losses(*pair, loss=self.alignment_loss, padding_BT=call.padding_BT)
        if call.mode == "full":
            return MethodOutput(gated_full, full, None, alignment)
        return MethodOutput(gated_sparse, sparse, block_indices, alignment)
