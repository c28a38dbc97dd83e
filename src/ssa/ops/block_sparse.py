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
    slots: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_sparse(t) = softmax(q(t) . k(j) * scale + bias(j)) v(j) over the keys j <= t in the selected blocks.

    Differentiable in q, k, v, bias, through out and lse. Memory and time grow with T * M * block_size, never with T * S.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D], H a multiple of K, T <= S; the queries are the last T tokens.
        block_indices: int32 [B, K, T, M], or [B, H, T, M] where every query head chose its own. Block n of a query covers the
            keys n * block_size ... of its document. -1 = nothing; entries of a row are unique, no block starts after its query.
        positions: int [B, T] document-relative query positions (packed, padded or cached rows); None = plain rows. With slots they
            are needed, and count in the document, whatever the columns of k.
        cu_seqlens: int32 [documents + 1], the same for one packed row (B = 1, T = S).
        bias: [B, S, K] logit bias per key, added after scaling (NOSA); -inf masks a key.
        slots: int32, shaped like block_indices: where, in blocks, a chosen block's keys lie in k and v (and bias), which may be pages of
            a pool or a part of the document. The keys of a block with slot n are the columns n * block_size ...; what a query reads of it
            still follows from the block's own number. Other columns are never read. None = blocks lie at their own numbers.
            On a GPU slots are not looked at. Differentiable by the reference alone.
        scale: logit scale, 1/sqrt(D) by default.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype, zero for a query with no key but masked ones; lse [B, T, H], fp32 (fp64 for fp64), -inf there.

    Raises:
        UserError: shapes that do not fit, slots outside k, or gradients asked of the kernels with slots.
    """
    check_keys(q, k, v, bias)
    check_blocks(q, k, block_indices, block_size)
    if slots is None:
        positions = resolve_positions(q, k, positions, cu_seqlens)
        block_size = block_within_rows(block_size, k.shape[1])
    else:
        if positions is None or cu_seqlens is not None:
            raise UserError("slots need positions [B, T] of the queries in their documents: where keys lie no longer says it")
        if positions.shape != q.shape[:2]:
            raise UserError(f"positions has shape {tuple(positions.shape)}, not [B, T] = {list(q.shape[:2])}")
        positions = positions.to(torch.int64)
        check_slots(block_indices, slots, positions, block_size, k.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    # modules of one implementation are imported when it runs: without triton the reference still does
    if resolve(impl, q) == "triton":
        if slots is not None and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
            raise UserError(
                "the Triton kernels have no gradient through slots: pass impl='reference', or call under torch.no_grad()"
            )
        from ssa.ops.triton.block_sparse import block_sparse_attention as by_triton

        return by_triton(q, k, v, block_indices, positions, bias, slots, block_size, scale)
    with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
        return by_reference(q, k, v, block_indices, positions, bias, slots, block_size, scale)


def check_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raises `UserError` where shapes do not fit."""
    batch, _, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    if bias is not None and bias.shape != k.shape[:3]:
        raise UserError(f"bias {tuple(bias.shape)} is not [B, S, K] = {list(k.shape[:3])}")


def check_blocks(q: Tensor, k: Tensor, block_indices: Tensor, block_size: int) -> None:
    """Raises `UserError` where shapes do not fit."""
    batch, queries, heads, _ = q.shape
    if block_indices.ndim != 4 or block_indices.shape[0] != batch or block_indices.shape[2] != queries:
        raise UserError(f"block_indices {tuple(block_indices.shape)} is not [B, K, T, M] with B = {batch}, T = {queries}")
    if block_indices.shape[1] not in (k.shape[2], heads):
        raise UserError(
            f"block_indices chooses for {block_indices.shape[1]} heads; there are {k.shape[2]} kv heads and {heads} query heads"
        )
    if block_size < 1:
        raise UserError(f"block_size = {block_size} must be at least 1")


def check_slots(block_indices: Tensor, slots: Tensor, positions_BT: Tensor | None, block_size: int, columns: int) -> None:
    """Raises `UserError` where slots are none, or leave the `columns` of k; that needs the queries' positions, which on a GPU are not looked at."""
    if slots.shape != block_indices.shape or slots.dtype != torch.int32:
        raise UserError(
            f"slots {tuple(slots.shape)} of {slots.dtype} is not int32 like block_indices {tuple(block_indices.shape)}"
        )
    if block_size > columns:
        raise UserError(f"block_size = {block_size} is more than the {columns} columns of k: with slots k holds whole blocks")
    # on a GPU looking at them would stall every layer, and a compiled graph cannot look
    if positions_BT is not None and not slots.is_cuda and not torch.compiler.is_compiling():
        read = (positions_BT[:, None, :, None] + 1 - block_indices * block_size).clamp(max=block_size)
        read = torch.where(block_indices < 0, 0, read)
        if bool(((read > 0) & ((slots < 0) | (slots.to(torch.int64) * block_size + read > columns))).any()):
            raise UserError(f"slots leave k: the keys of every chosen block must lie within its {columns} columns")
