"""The methods: each is select -> attend -> (extra branches, extra loss)."""

from ssa.attention.base import AttentionCall, AttentionMethod, AttentionRecord, MethodOutput
from ssa.attention.full import FullAttention
from ssa.attention.moba import MoBA
from ssa.attention.nsa import NSA
from ssa.attention.ssa import SSA

METHODS: dict[str, type[AttentionMethod]] = {"full": FullAttention, "moba": MoBA, "nsa": NSA, "ssa": SSA}

__all__ = ["METHODS", "AttentionCall", "AttentionMethod", "AttentionRecord", "MethodOutput"]
