"""Block-sparse attention: every query attends to the keys of the blocks chosen for it.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, M selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.documents import block_within_rows, resolve_positions
from ssa.ops.implementations import resolve
from ssa.ops.reference.block_sparse import block_sparse_attention as by_reference


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_sparse(t) = softmax(q(t) . k(j) * scale + bias(j)) v(j) over the keys j <= t in the selected blocks.

    Differentiable in q, k, v, bias, through out and lse. Memory and time grow with T * M * block_size, never with T * S.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D], H a multiple of K, T <= S; the queries are the last T tokens.
        block_indices: int32 [B, K, T, M], or [B, H, T, M] where every query head chose its own. Block n of a query covers the
            keys n * block_size ... of its document. -1 = nothing; entries of a row are unique, no block starts after its query.
        positions: int [B, T] document-relative query positions (packed, padded or cached rows); None = plain rows.
        cu_seqlens: int32 [documents + 1], the same for one packed row (B = 1, T = S).
        bias: [B, S, K] logit bias per key, added after scaling (NOSA); -inf masks a key.
        scale: logit scale, 1/sqrt(D) by default.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype, zero for a query with no key but masked ones; lse [B, T, H], fp32 (fp64 for fp64), -inf there.

    Raises:
        UserError: shapes that do not fit.
    """
    batch, queries, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    if block_indices.ndim != 4 or block_indices.shape[0] != batch or block_indices.shape[2] != queries:
        raise UserError(f"block_indices {tuple(block_indices.shape)} is not [B, K, T, M] with B = {batch}, T = {queries}")
    if block_indices.shape[1] not in (k.shape[2], heads):
        raise UserError(
            f"block_indices chooses for {block_indices.shape[1]} heads; there are {k.shape[2]} kv heads and {heads} query heads"
        )
    if bias is not None and bias.shape != k.shape[:3]:
        raise UserError(f"bias {tuple(bias.shape)} is not [B, S, K] = {list(k.shape[:3])}")
    if block_size < 1:
        raise UserError(f"block_size = {block_size} must be at least 1")
    positions = resolve_positions(q, k, positions, cu_seqlens)
    block_size = block_within_rows(block_size, k.shape[1])
    scale = size**-0.5 if scale is None else float(scale)
    # modules of one implementation are imported when it runs: without triton the reference still does
    if resolve(impl, q) == "triton":
        from ssa.ops.triton.block_sparse import block_sparse_attention as by_triton

        return by_triton(q, k, v, block_indices, positions, bias, block_size, scale)
    with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
        return by_reference(q, k, v, block_indices, positions, bias, block_size, scale)
