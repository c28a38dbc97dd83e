"""FullAttn: trained with dense attention. Run sparse, it shows the attention gap."""

from ssa.attention.base import AttentionMethod


class FullAttention(AttentionMethod):
    training_mode = "full"
