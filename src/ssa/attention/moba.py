"""MoBA: trained with block-sparse attention alone. Run full, it shows the capability gap.

The paper's MoBA shares the selection over a GQA group and scores blocks by softmax; `selection_scope="head"` with
`selection_scoring="logit"` is MoBA as first published.
"""

from ssa.attention.method import AttentionMethod


class MoBA(AttentionMethod):
    pass
