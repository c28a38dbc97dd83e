"""FullAttn: trained with dense attention. Run sparse, it shows the attention gap."""

from ssa.attention.method import AttentionMethod


class FullAttention(AttentionMethod):
    pass
