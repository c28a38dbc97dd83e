"""Blocks by windows of keys that overlap, beside sinks and local blocks that everybody reads: the selection of InfLLM-V2 (arXiv 2509.24663)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ssa.attention.inputs import AttentionCall, AttentionInputs
from ssa.attention.selectors.means import MeansSelector
from ssa.attention.selectors.selector import HeadShape, Kept
from ssa.attention.state import CachedRows
from ssa.budget import COARSER, Selection
from ssa.errors import UserError


class WindowsSelector(MeansSelector):
    """Every query reads the first blocks, the latest ones and those with the best windows; its options are fields of `ssa.budget.Selection`."""

    fused = True

    def __init__(self, shape: HeadShape, **options: Any) -> None:
        super().__init__(shape)
        self.options = options

    def rule(self, selection: Selection) -> Selection:
        if selection.mean_size:
            return selection
        if self.options["mean_size"] < 1:
            raise UserError(
                f"mean_size = {self.options['mean_size']} must be at least 1; for a mean of each block use the selector means"
            )
        return replace(selection, **self.options)

    def select(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor:
        if inputs.means is not None:  # a branch's, of blocks
            inputs = replace(inputs, means=None)
        return super().select(inputs, call)

    def kept(self, cached: CachedRows, selection: Selection, room: bool = False) -> Kept:
        size, stride = selection.mean_size, selection.mean_stride
        coarse = cached.windows(COARSER * size, COARSER * stride, room) if selection.lse == "coarse" else None
        importance = None if selection.query_blocks is None else cached.importance(selection, room)
        return Kept(cached.windows(size, stride, room), coarse, importance)

    def flops(self, selection: Selection, position_ids: Tensor) -> float:
        rule = self.rule(selection)
        windows = (
            ((position_ids.double() + 1 - rule.mean_size + rule.mean_stride) / rule.mean_stride)
            .floor()
            .clamp(min=0)
            .mean()
            .item()
        )
        if rule.lse == "coarse":
            windows *= 1 + 1 / COARSER
        return 2 * self.shape.heads * self.shape.head_dim * windows
