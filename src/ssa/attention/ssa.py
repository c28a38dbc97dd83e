"""SSA: both streams on the same q, k, v at every layer; one goes on, the other serves the alignment loss alone.

Which stream goes on is drawn once per step (`ssa.model.streams`), never per layer: per layer the paper's runs end in NaN.
"""

from __future__ import annotations

from torch import Tensor

from ssa.attention.base import AttentionCall, AttentionMethod, BlockMeans, MethodOutput
from ssa.ops import gated_alignment


class SSA(AttentionMethod):
    training_mode = "sparse"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, call: AttentionCall, means: BlockMeans | None = None
    ) -> MethodOutput:
        if not call.align or self.alignment_loss == "none":
            return super().__call__(q, k, v, gates, call, means)
        full, _ = self.attend("full", q, k, v, call, means)
        sparse, block_indices = self.attend("sparse", q, k, v, call, means)
        out, alignment = gated_alignment(
            full, sparse, None if gates is None else gates[..., 0], call.padding_BT,
            main=call.mode, loss=self.alignment_loss, align_gated=self.align_gated, impl=call.impl,
        )  # fmt: skip
        ungated, chosen = (full, None) if call.mode == "full" else (sparse, block_indices)
        return MethodOutput(out, ungated, chosen, alignment)
