"""SSA: both streams on the same q, k, v at every layer; one goes on, the other serves the alignment loss alone.

Which stream goes on is drawn once per step (`ssa.model.streams`), never per layer: per layer the paper's runs end in NaN.
"""

from __future__ import annotations

from ssa.attention.inputs import AttentionCall, AttentionInputs, MethodOutput
from ssa.attention.method import AttentionMethod
from ssa.attention.selectors.selector import Selector
from ssa.ops import gated_alignment


class SSA(AttentionMethod):
    graphed = True

    def __call__(self, selector: Selector, inputs: AttentionInputs, call: AttentionCall) -> MethodOutput:
        if not call.align or self.alignment_loss == "none":
            return super().__call__(selector, inputs, call)
        full, _ = self.attend("full", selector, inputs, call)
        sparse, block_indices = self.attend("sparse", selector, inputs, call)
        gates = inputs.gates_BTHG
        out, alignment = gated_alignment(
            full, sparse, None if gates is None else gates[..., 0], call.padding_BT,
            main=call.mode, loss=self.alignment_loss, align_gated=self.align_gated, impl=call.impl,
        )  # fmt: skip
        ungated, chosen = (full, None) if call.mode == "full" else (sparse, block_indices)
        return MethodOutput(out, ungated, chosen, alignment)
