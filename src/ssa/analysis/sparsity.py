"""How much of full attention the selected blocks keep, and what Theorem 1 says about the rest.

Everything is computed from the q, k, v that an observer sees, in tiles of queries x keys: memory never grows with T x S.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), D head size, M selected blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa.analysis.dense_pass import DenseFigures, dense_pass
from ssa.ops import block_sparse_attention
from ssa.ops.documents import query_positions, resolve_positions


@dataclass(frozen=True)
class AttentionFigures(DenseFigures):
    """Per query and query head, [B, T, H] each, fp32 (fp64 for fp64 input)."""

    kept: Tensor
    """AttnSparsity(t) = 1 - delta(t): full-attention weight on the keys of the selected blocks, 0..1."""
    bound: Tensor
    """Theorem 1: delta(t) * (largest norm of a dropped value + ||h_sparse(t)||)."""
    violated: Tensor
    """bool: the error is not below the bound plus the arithmetic's rounding."""


ROUNDING = 128
"""In units of the arithmetic's precision: what a sum of weighted values may be off by, relative to the largest value."""
LOGIT_ROUNDING = 4
"""The same for a logit, relative to ||q|| ||k|| scale: the two streams sum its products in different orders."""


@torch.no_grad()
def attention_figures(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int, positions: Tensor | None = None,
    bias: Tensor | None = None, scale: float | None = None, tile: int | None = None,
) -> AttentionFigures:  # fmt: skip
    """Compare full attention with attention over `block_indices` on the same q, k, v (section 5 of the method, Theorem 1).

    Each document by itself, in fp32 at least. h_sparse is what `ssa.ops.block_sparse_attention` computes from the same q, k, v.

    Args:
        q: [B, T, H, D] and k, v: [B, S, K, D] after RoPE, T <= S; the queries are the last T tokens.
        block_indices: int [B, K or H, T, M], document-relative, -1 padded, the own block present (see `ssa.ops.select_blocks`).
        positions: int [B, T] document-relative query positions; None = plain rows.
        bias: [B, S, K], a selector's, part of the logits of both streams; finite, or -inf for a key that nobody reads.
        scale: logit scale, 1/sqrt(D) by default.
        tile: weights held at once; by the device's memory by default. Does not change the result beyond rounding.
    """
    positions = resolve_positions(q, k, positions, None)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sparse_BTHD, _ = block_sparse_attention(
        q, k, v, block_indices, block_size=block_size, positions=positions, bias=bias, scale=scale
    )
    rows: list[list[Tensor]] = []
    for b, documents in enumerate(documents_of(query_positions(q, k, positions), k.shape[1])):
        parts = [
            _of_document(
                q[b, queries],
                k[b, keys],
                v[b, keys],
                sparse_BTHD[b, queries],
                block_indices[b, :, queries],
                block_size,
                scale,
                tile,
                None if bias is None else bias[b, keys],
            )
            for queries, keys in documents
        ]
        rows.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return AttentionFigures(*(torch.stack(column) for column in zip(*rows, strict=True)))


def documents_of(position_BT: Tensor, num_keys: int) -> list[list[tuple[slice, slice]]]:
    """(queries, keys) of every document in every row, as slices of the row's columns."""
    offset = num_keys - position_BT.shape[1]
    rows = []
    for positions in position_BT.tolist():
        edges = [t for t in range(len(positions)) if t == 0 or positions[t] != positions[t - 1] + 1] + [len(positions)]
        rows.append([(slice(t, end), slice(offset + t - positions[t], offset + end)) for t, end in itertools.pairwise(edges)])
    return rows


def _of_document(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, sparse_THD: Tensor, index_RTM: Tensor, block_size: int, scale: float,
    tile: int | None, bias_SK: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The fields of `AttentionFigures` for one document, in their order."""
    each = dense_pass(q_THD, k_SKD, v_SKD, sparse_THD, index_RTM, block_size=block_size, scale=scale, tile=tile, bias=bias_SK)
    bound = each.dropped * (each.largest_dropped + sparse_THD.norm(dim=-1))
    group = q_THD.shape[1] // k_SKD.shape[1]
    longest_k, longest_v = (x.norm(dim=-1).amax(0).repeat_interleave(group) for x in (k_SKD, v_SKD))
    logit = q_THD.norm(dim=-1) * longest_k * scale
    rounding = torch.finfo(q_THD.dtype).eps * (ROUNDING + LOGIT_ROUNDING * logit) * longest_v
    return [*vars(each).values(), 1 - each.dropped, bound, ~(each.error <= bound + rounding)]
