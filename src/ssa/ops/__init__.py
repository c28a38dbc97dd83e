"""The public operations: select, attend, decode, compress, align, and the vocabulary's loss. An operation's name is its mathematics; `impl` picks who computes it."""

from ssa.ops.align import gated_alignment, gated_sum
from ssa.ops.block_sparse import block_sparse_attention
from ssa.ops.compress import compressed_attention
from ssa.ops.cross_entropy import linear_cross_entropy
from ssa.ops.decode import decode_attend, decode_attention, decode_dense, decode_select
from ssa.ops.dense import dense_attention
from ssa.ops.implementations import chosen_implementation
from ssa.ops.select import block_means, select_blocks
from ssa.ops.window import window_attention

__all__ = [
    "block_means",
    "block_sparse_attention",
    "chosen_implementation",
    "compressed_attention",
    "decode_attend",
    "decode_attention",
    "decode_dense",
    "decode_select",
    "dense_attention",
    "gated_alignment",
    "gated_sum",
    "linear_cross_entropy",
    "select_blocks",
    "window_attention",
]
