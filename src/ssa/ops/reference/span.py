"""Attention over a span of keys in plain PyTorch, in chunks of queries, so that memory does not grow with T * N.

Legend: B batch, T queries (C of a chunk), H query heads, K kv heads, G = H / K, D head size, N keys or pooled blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGIT_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in fp32


def span_attention(
    q_BTHD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, low_BT: Tensor, high_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Query t of row b attends to the keys low[b, t] <= n < high[b, t]: out [B, T, H, D], lse [B, T, H] in fp32 (fp64 for fp64);
    zero and -inf where that is none."""
    batch, queries, heads, _ = q_BTHD.shape
    chunk = max(1, LOGIT_ELEMENTS // max(1, batch * heads * k_BNKD.shape[1]))
    # a graph would have to fix the number of chunks
    cuts = [slice(None)] if torch.compiler.is_compiling() else [slice(t, t + chunk) for t in range(0, queries, chunk)]
    parts = []
    for cut in cuts:
        chunk_of = (q_BTHD[:, cut], k_BNKD, v_BNKD, low_BT[:, cut], high_BT[:, cut], scale)
        if len(cuts) > 1 and torch.is_grad_enabled():  # else the backward pass would hold the weights of all chunks
            parts.append(checkpoint(_attend, *chunk_of, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*chunk_of))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, low_BC: Tensor, high_BC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    column = torch.arange(keys, device=q.device)
    seen_BCN = (column >= low_BC[..., None]) & (column < high_BC[..., None])
    rows = q.to(dtype).reshape(batch, queries, kv_heads, heads // kv_heads, size)
    logits = torch.einsum("bckgd,bnkd->bkgcn", rows, k.to(dtype)) * scale
    # exp of a shifted row instead of softmax: a row with no visible key becomes 0 / 1, with zero gradients
    logits = logits.masked_fill(~seen_BCN[:, None, None], float("-inf"))
    peak = logits.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    p = (logits - peak).exp()
    total = p.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = torch.einsum("bkgcn,bnkd->bckgd", p / total, v.to(dtype)).reshape(batch, queries, heads, size)
    lse = (peak + total.log()).masked_fill(empty, float("-inf"))
    return out.to(q.dtype), lse.squeeze(-1).permute(0, 3, 1, 2).reshape(batch, queries, heads)
