"""NSA's compression branch: attention over the mean-pooled keys and values of complete blocks.

Legend: B batch, T queries, S keys, H query heads, K kv heads, G = H / K, D head size, N key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.documents import BlockGrid, query_positions, resolve_positions

LOGIT_ELEMENTS = 1 << 24


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
) -> Tensor:
    """h_cmp(t) = softmax(q(t) . mean(k of block n) * scale) mean(v of block n) over the complete blocks n that end by t.

    Differentiable in q, k, v. Zero for a query that sees no complete block. Memory grows with S, not with T * N.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D]; positions, cu_seqlens, scale: as for `ssa.ops.block_sparse_attention`.
        means: cached block means of k and of v, [B, N, K, D] each, as for `ssa.ops.select_blocks`.

    Returns:
        out [B, T, H, D] in q's dtype.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
        return _compressed(q, k, v, block_size, resolve_positions(q, k, positions, cu_seqlens), scale, means)


def _compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    positions: Tensor | None,
    scale: float | None,
    means: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    position_BT = query_positions(q, k, positions)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if means is None:
        grid = BlockGrid.build(q, k, positions, block_size)
        first_block_BT = grid.first_block_BT
        pooled_k, pooled_v = (grid.gather(x).to(dtype).mean(2).to(x.dtype).to(dtype) for x in (k, v))
    else:
        first_block_BT = torch.zeros_like(position_BT)
        pooled_k, pooled_v = (x.to(dtype) for x in means)
    blocks = pooled_k.shape[1]
    if blocks == 0:
        return torch.zeros_like(q)
    scale = size**-0.5 if scale is None else scale
    chunk = max(1, LOGIT_ELEMENTS // max(1, batch * heads * blocks))
    outs = []
    for t in range(0, queries, chunk):
        cut = slice(t, t + chunk)
        block_BCN = torch.arange(blocks, device=q.device) - first_block_BT[:, cut, None]
        seen_BCN = (block_BCN >= 0) & (block_BCN < (position_BT[:, cut, None] + 1) // block_size)
        rows = q[:, cut].to(dtype).reshape(batch, -1, kv_heads, heads // kv_heads, size)
        logits = torch.einsum("bckgd,bnkd->bkgcn", rows, pooled_k) * scale
        # exp of a shifted row instead of softmax: a row with no visible block becomes 0 / 1, with zero gradients
        logits = logits.masked_fill(~seen_BCN[:, None, None], float("-inf"))
        peak = logits.detach().amax(-1, keepdim=True)
        p = (logits - peak.masked_fill(peak == float("-inf"), 0.0)).exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        outs.append(torch.einsum("bkgcn,bnkd->bckgd", p, pooled_v).reshape(batch, -1, heads, size))
    return torch.cat(outs, 1).to(q.dtype)
