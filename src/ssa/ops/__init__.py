"""The public operations: select, attend, compress. An operation's name is its mathematics; `impl` picks who computes it."""

from ssa.ops.block_sparse import block_sparse_attention
from ssa.ops.compress import compressed_attention
from ssa.ops.dense import dense_attention
from ssa.ops.implementations import chosen_implementation
from ssa.ops.select import block_means, select_blocks

__all__ = [
    "block_means",
    "block_sparse_attention",
    "chosen_implementation",
    "compressed_attention",
    "dense_attention",
    "select_blocks",
]
