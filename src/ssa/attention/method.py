"""What every method shares: attending to the selected blocks or to everything, and the gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ssa.attention.inputs import AttentionCall, AttentionInputs, MethodOutput
from ssa.attention.registered import check_registered
from ssa.attention.selectors.selector import Selector
from ssa.budget import AttentionMode, Selection
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, decode_attention, dense_attention, gated_sum
from ssa.ops.decode import MAX_QUERIES
from ssa.ops.implementations import resolve


def with_selection_loss(output: MethodOutput, selector: Selector, inputs: AttentionInputs, call: AttentionCall) -> MethodOutput:
    """`output` and, in training, the selector's own loss, unless it is there already."""
    if output.selection_loss is not None or not call.train or not selector.loss_weight:
        return output
    loss = selector.loss(inputs, call)
    return output._replace(selection_loss=inputs.q_BTHD.new_zeros((), dtype=torch.float32) if loss is None else loss)


class AttentionMethod:
    """Which streams are computed and what is added to them. Its name, what it trains and its options stand in `ssa.methods`.

    A method has no weights of its own unless it is a `torch.nn.Module`, too: projections, RoPE, cache and the gate's projection belong to
    the model, and what chooses blocks is the layer's selector.
    """

    graphed: ClassVar[bool] = True
    """A decoding step looks at lengths on the device alone, and does what it did last time, so that a CUDA graph can repeat it. A subclass with
    a `__call__` or `attend` of its own says so anew."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"__call__", "attend"} & vars(cls).keys():
            cls.graphed = bool(vars(cls).get("graphed", False))

    def __init__(self, *, window_size: int = 128, alignment_loss: str = "smooth_l1", align_gated: bool = True) -> None:
        self.window_size, self.alignment_loss, self.align_gated = window_size, alignment_loss, align_gated

    def check_registered(self) -> None:
        """Raises `UserError` for a tensor or module of the method that is no registered part of a model, and for a `select` that nobody
        would ask."""
        if hasattr(self, "select"):
            raise UserError(
                f"the method {type(self).__name__} has a select, which is a selector's business: derive an ssa.attention.Selector and "
                "register it (docs/add-a-selector.md)"
            )
        check_registered(self, "method")

    def __call__(self, selector: Selector, inputs: AttentionInputs, call: AttentionCall) -> MethodOutput:
        """One layer's attention; `selector` is the layer's."""
        out, block_indices = self.attend(call.mode, selector, inputs, call)
        gates = inputs.gates_BTHG
        gated = out if gates is None else gated_sum([out], gates, impl=call.impl)
        return MethodOutput(gated, out, block_indices, None)

    def attend(
        self, mode: AttentionMode, selector: Selector, inputs: AttentionInputs, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """The stream `mode`: (out [B, T, H, D], block_indices or None)."""
        q, k, v, bias = inputs.q_BTHD, inputs.k_BSKD, inputs.v_BSKD, inputs.bias_BSK
        cached = inputs.cached
        few = cached is not None and cached.few and resolve(call.impl, q) == "triton"
        if mode == "full" and few:
            if call.keep_for is not None and selector.fused:
                assert cached is not None
                selector.kept(cached, selector.rule(call.keep_for), room=True)
            return inputs.dense_step(call.impl), None
        if mode == "full":
            return dense_attention(q, k, v, positions=call.positions_BT, cu_seqlens=call.cu_seqlens, bias=bias), None
        row_blocks = call.row_blocks_B
        by_rows = cached if selector.fused and cached is not None and cached.few else None
        if row_blocks is not None and (by_rows is None or call.train):
            raise UserError(
                f"row_blocks are for decoding, 1 to {MAX_QUERIES} tokens after cached ones, by a selector that is fused, and here are {q.shape[1]} of "
                f"{k.shape[1]} tokens by {type(selector).__name__}: give all rows one budget"
            )
        if by_rows is not None and (row_blocks is not None or few):
            rule = selector.rule(call.selection)
            buffers, kept = by_rows.buffers(), selector.kept(by_rows, rule, room=True)
            out, _, block_indices = decode_attention(
                q, buffers.k_BSKD, buffers.v_BSKD, kept.means, buffers.lengths_B, rule, starts=buffers.starts_B,
                bias=buffers.bias_BSK, coarse_means=kept.coarse, importance=kept.importance, row_blocks=row_blocks, impl=call.impl,
            )  # fmt: skip
            return out, block_indices
        block_indices = selector.select(inputs, call)
        out, _ = block_sparse_attention(
            q, k, v, block_indices, block_size=call.selection.block_size, positions=call.positions_BT, bias=bias, impl=call.impl
        )
        return out, block_indices

    def branch_flops(self, selection: Selection, position_ids: Tensor, width: int) -> dict[str, float]:
        """FLOPs a token of one layer's branches beside the streams, forward and backward, by name; `width` = query heads x head size."""
        return {}
