"""NSA's sliding window: attention over the last keys of the query's document.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.dense import dense_attention
from ssa.ops.documents import document_starts, query_positions, resolve_positions
from ssa.ops.implementations import resolve


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """h_swa(t) = softmax(q(t) . k(j) * scale) v(j) over the last `window` keys j <= t of the query's document, own included.

    Differentiable in q, k, v. Time grows with T * window, memory with T.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D]; positions, cu_seqlens, scale: as for `ssa.ops.block_sparse_attention`.
        impl: "auto", "reference" (`ssa.ops.dense_attention` with a window, which is PyTorch's attention on chunks of queries) or
            "triton".

    Returns:
        out [B, T, H, D] in q's dtype.

    Raises:
        UserError: a window of less than one key.
    """
    if resolve(impl, q) == "reference":
        return dense_attention(q, k, v, positions=positions, cu_seqlens=cu_seqlens, window=window, scale=scale)
    if window < 1:
        raise UserError(f"window = {window} must be at least 1")
    queries, keys = q.shape[1], k.shape[1]
    position_BT = query_positions(q, k, resolve_positions(q, k, positions, cu_seqlens))
    column_T = torch.arange(keys - queries, keys, device=q.device)
    low_BT = torch.maximum(document_starts(position_BT, keys), column_T - (window - 1))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    from ssa.ops.triton.span import span_attention  # when it runs: without triton the reference still does

    return span_attention(q, k, v, low_BT, (column_T + 1).expand_as(low_BT), scale)[0]
