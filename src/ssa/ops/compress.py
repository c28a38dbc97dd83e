"""NSA's compression branch: attention over the mean-pooled keys and values of complete blocks.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, N key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.documents import BlockGrid, block_within_rows, query_positions, resolve_positions
from ssa.ops.implementations import resolve
from ssa.ops.reference.span import span_attention as by_reference


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    means: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_cmp(t) = softmax(q(t) . mean(k of block n) * scale) mean(v of block n) over the complete blocks n that end by t.

    Differentiable in q, k, v and in `means`, through out and lse. Memory grows with T and S, never with T * N.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D]; positions, cu_seqlens, scale: as for `ssa.ops.block_sparse_attention`.
        means: block means of k and of v, [B, N, K, D] each, as for `ssa.ops.select_blocks`; computed from k and v when absent.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype, zero for a query that sees no complete block; lse [B, T, H], fp32 (fp64 for fp64), -inf
        there: the log-normaliser of the block scores that `ssa.ops.select_blocks` ranks.

    Raises:
        UserError: shapes that do not fit.
    """
    batch, queries, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    if block_size < 1:
        raise UserError(f"block_size = {block_size} must be at least 1")
    positions = resolve_positions(q, k, positions, cu_seqlens)
    position_BT = query_positions(q, k, positions)
    block_size = block_within_rows(block_size, k.shape[1])
    if means is None:
        grid = BlockGrid.build(q, k, positions, block_size)
        low_BT = grid.first_block_BT
        pooled_k, pooled_v = (
            grid.gather(x).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype) for x in (k, v)
        )
    else:
        low_BT = torch.zeros_like(position_BT)
        pooled_k, pooled_v = means
        if pooled_k.shape != pooled_v.shape or pooled_k.shape[0] != batch or pooled_k.shape[2:] != k.shape[2:]:
            raise UserError(
                f"means {tuple(pooled_k.shape)} and {tuple(pooled_v.shape)} are not [B, N, K, D] for k {tuple(k.shape)}"
            )
    blocks = pooled_k.shape[1]
    if blocks == 0:
        lse = q.new_full((batch, queries, heads), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.zeros_like(q), lse
    high_BT = (low_BT + (position_BT + 1) // block_size).clamp(max=blocks)
    scale = size**-0.5 if scale is None else float(scale)
    # modules of one implementation are imported when it runs: without triton the reference still does
    if resolve(impl, q) == "triton":
        from ssa.ops.triton.span import span_attention as by_triton

        return by_triton(q, pooled_k, pooled_v, low_BT, high_BT, scale)
    with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
        return by_reference(q, pooled_k, pooled_v, low_BT, high_BT, scale)
