"""Block selection: which key blocks each query reads. Carries no gradient.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, N key blocks, M selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops.documents import FIXED_BLOCK_SIZE, BlockGrid, block_within_rows, resolve_positions
from ssa.ops.implementations import resolve
from ssa.ops.reference.select import select_blocks as by_reference

FIXED_PLACES = 32
"""Up to so many selected blocks `block_indices` has a place for each whatever the rows' length; beyond, what nobody fills would cost."""


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean of each complete block of keys of plain rows, the block keys of MoBA, NSA and SSA.

    k [B, S, K, D] -> [B, S // block_size, K, D] in k's dtype, summed in fp32 (fp64 for fp64). Differentiable.
    """
    batch, keys, heads, size = k.shape
    block_size = block_within_rows(block_size, keys)
    blocks = keys // block_size
    x = k[:, : blocks * block_size].reshape(batch, blocks, block_size, heads, size)
    if k.is_cuda:  # sums in fp32 as it is, and rounds in the same kernel
        return x.mean(2)
    return x.mean(2, dtype=torch.promote_types(k.dtype, torch.float32)).to(k.dtype)


def within_rows(num_selected_blocks: int, block_size: int, num_keys: int, impl: str) -> int:
    """M of `block_indices` for rows of `num_keys` keys, see `select_blocks`."""
    if num_selected_blocks <= FIXED_PLACES and block_size < FIXED_BLOCK_SIZE:
        return num_selected_blocks
    places = blocks = -(-num_keys // block_size)
    if impl == "triton":
        places = 1
        while places < blocks and places < num_selected_blocks:  # by comparisons, which a graph of dynamic shapes can hold
            places *= 2
    return max(1, min(num_selected_blocks, places))


def select_blocks(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    block_keys: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The top `selection.num_selected_blocks` key blocks of every query by block score; the query's own block is always among them.

    A block's key is the mean of its (roped) keys. With scoring "softmax" each query head takes a softmax of
    q . block_key * scale over the complete blocks it sees, and a block scores the sum over the heads of its group; "logit"
    sums the scaled products themselves (the paper's text). Scope "head" lets each query head choose for itself (MoBA as first
    published). Rule "exact" is the true top-k; "released" what the authors' kernel computes and their checkpoints were trained with:
    where k > block_size / 2, the best k/2 of all earlier chunks of `block_size` blocks and the best k/2 of the query's. Candidates are the blocks before the query's own. Ties go to the lower block. Where a NaN or an infinity makes scores
    NaN, which candidates are chosen, and whether the implementations agree, is not defined; the contract below holds.

    Args:
        q: [B, T, H, D], after RoPE. k: [B, S, K, D], after RoPE, T <= S; the queries are the last T tokens.
        selection: how many blocks of how many keys, by whom and by which rule.
        positions: int [B, T] document-relative query positions (packed, padded or cached rows); None = plain rows.
        cu_seqlens: int32 [documents + 1], the same for one packed row (B = 1, T = S).
        scale: logit scale, 1/sqrt(D) by default.
        block_keys: [B, N, K, D] cached means of the complete blocks, row b's block n starting n * block_size keys after the
            start of its only document; computed from k when absent.
        impl: "auto", "reference" or "triton".

    Returns:
        block_indices: int32 [B, K, T, M] ([B, H, T, M] for head scope), document-relative, ascending, right-padded with -1. M is
            `selection.num_selected_blocks`. Of more than 32, or of blocks of 1024 keys and more, M is at most the number that rows have,
            ceil(S / block_size), which the kernels, compiled for each M, round up to a power of two.
        scores: fp32, same shape; +inf for the own block, -inf for padding.

    Raises:
        UserError: shapes that do not fit.
    """
    batch, _, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    block_size = selection.block_size
    if block_keys is not None and (
        block_keys.shape[0] != batch or block_keys.shape[2:] != k.shape[2:] or block_keys.shape[1] < k.shape[1] // block_size
    ):
        raise UserError(
            f"block_keys {tuple(block_keys.shape)} is not [B, N, K, D] with a mean for each of {k.shape[1] // block_size} blocks"
        )
    if scale is not None and not scale > 0:
        raise UserError(f"scale = {scale} must be positive")
    positions = resolve_positions(q, k, positions, cu_seqlens)
    block_size = block_within_rows(block_size, k.shape[1])
    with torch.no_grad():
        first_block = None
        if positions is not None:
            positions = positions.contiguous()
            first_block = torch.zeros_like(positions)
        if block_keys is None and positions is None:
            block_keys = block_means(k, block_size)
        elif block_keys is None:
            grid = BlockGrid.build(q, k, positions, block_size)
            block_keys = grid.gather(k).mean(2, dtype=torch.promote_types(k.dtype, torch.float32)).to(k.dtype)
            first_block = grid.first_block_BT.contiguous()
        impl = resolve(impl, q)
        arguments = (
            q, block_keys, first_block, positions, k.shape[1], block_size,
            within_rows(selection.num_selected_blocks, block_size, k.shape[1], impl), selection.scope, selection.scoring, selection.rule,
            size**-0.5 if scale is None else float(scale),
        )  # fmt: skip
        # modules of one implementation are imported when it runs: without triton the reference still does
        if impl == "triton":
            from ssa.ops.triton.select import select_blocks as by_triton

            return by_triton(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return by_reference(*arguments)
