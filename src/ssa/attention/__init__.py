"""Attention: a method (which streams, which branches) over a selector (which blocks)."""

from ssa.attention.inputs import AttentionCall, AttentionInputs, AttentionRecord, MethodOutput
from ssa.attention.method import AttentionMethod
from ssa.attention.selectors.selector import HeadShape, Selector

__all__ = ["AttentionCall", "AttentionInputs", "AttentionMethod", "AttentionRecord", "HeadShape", "MethodOutput", "Selector"]
