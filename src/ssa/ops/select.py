"""Block selection: which key blocks each query reads. Carries no gradient.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, N key blocks, M selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssa.budget import COARSER, Selection
from ssa.errors import UserError
from ssa.ops.documents import FIXED_BLOCK_SIZE, BlockGrid, block_within_rows, resolve_positions
from ssa.ops.implementations import resolve
from ssa.ops.reference.select import select_blocks as by_reference
from ssa.ops.reference.select_windows import select_windows as windows_by_reference
from ssa.ops.windows import grid_window_means, key_importance, window_means

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
    coarse_keys: Tensor | None = None,
    bias: Tensor | None = None,
    importance: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The top `selection.num_selected_blocks` key blocks of every query by block score; the query's own block is always among them.

    A block's key is the mean of its (roped) keys. With scoring "softmax" each query head takes a softmax of
    q . block_key * scale over the complete blocks it sees, and a block scores the sum over the heads of its group; "logit"
    sums the scaled products themselves (the paper's text). Scope "head" lets each query head choose for itself (MoBA as first
    published). Rule "exact" is the true top-k; "released" what the authors' kernel computes and their checkpoints were trained with:
    where k > block_size / 2, the best k/2 of all earlier chunks of `block_size` blocks and the best k/2 of the query's. Candidates are the blocks before the query's own. Ties go to the lower block. Where a NaN or an infinity makes scores
    NaN, which candidates are chosen, and whether the implementations agree, is not defined; the contract below holds.

    With a `selection.mean_size` the means are windows of keys (InfLLM-V2): the softmax is over the windows that end at or before the
    query, a block scores the best of those that touch it, sinks and local blocks are read anyway and are no candidates. With
    `selection.query_blocks` so many blocks go by score and the rest by importance: the largest window mean of `bias` (NOSA).

    Args:
        q: [B, T, H, D], after RoPE. k: [B, S, K, D], after RoPE, T <= S; the queries are the last T tokens.
        selection: how many blocks of how many keys, by whom and by which rule.
        positions: int [B, T] document-relative query positions (packed, padded or cached rows); None = plain rows.
        cu_seqlens: int32 [documents + 1], the same for one packed row (B = 1, T = S).
        scale: logit scale, 1/sqrt(D) by default.
        block_keys: [B, N, K, D] cached means of the complete blocks, row b's block n starting n * block_size keys after the
            start of its only document; computed from k when absent. Means of windows are [B, W, K, D], window j starting
            j * mean_stride keys after it.
        coarse_keys: [B, V, K, D] those of lse = "coarse".
        bias: [B, S, K] what is added to the logits of each key; gives the importance where that is absent.
        importance: fp32 [B, N, K] of cached blocks, as `ssa.ops.windows.block_importance` has it.
        impl: "auto", "reference" or "triton".

    Returns:
        block_indices: int32 [B, K, T, M] ([B, H, T, M] for head scope), document-relative, ascending, right-padded with -1. M is
            `selection.places`, which is num_selected_blocks but for a dense length. Of more than 32, or of blocks of 1024 keys and more, M is at most the number that rows have,
            ceil(S / block_size), which the kernels, compiled for each M, round up to a power of two.
        scores: fp32, same shape; +inf for blocks that are read anyway, -inf for padding.

    Raises:
        UserError: shapes that do not fit.
    """
    batch, _, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    block_size = selection.block_size
    for name, means, coarser in (("block_keys", block_keys, 1), ("coarse_keys", coarse_keys, COARSER)):
        needed = selection.num_windows(k.shape[1], coarser)
        if means is not None and (means.shape[0] != batch or means.shape[2:] != k.shape[2:] or means.shape[1] < needed):
            raise UserError(f"{name} {tuple(means.shape)} is not [B, N, K, D] with a mean for each of {needed} blocks or windows")
    if scale is not None and not scale > 0:
        raise UserError(f"scale = {scale} must be positive")
    positions = resolve_positions(q, k, positions, cu_seqlens)
    scale = size**-0.5 if scale is None else float(scale)
    if selection.mean_size:
        return _select_windows(q, k, selection, positions, scale, block_keys, coarse_keys, bias, importance, impl)
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
            scale,
        )  # fmt: skip
        if impl == "triton":
            return _kernels().select_blocks(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return by_reference(*arguments)


def _select_windows(
    q: Tensor, k: Tensor, selection: Selection, positions: Tensor | None, scale: float, means: Tensor | None, coarse: Tensor | None,
    bias: Tensor | None, importance: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `select_blocks`."""
    size, stride, block_size, keys = selection.mean_size, selection.mean_stride, selection.block_size, k.shape[1]
    cached = means is not None
    by_importance = selection.query_blocks is not None
    if by_importance and bias is None and importance is None:
        raise UserError("query_blocks choose the other blocks by importance: pass bias or importance")
    if by_importance and importance is None and bias is not None and bias.shape != k.shape[:3]:
        raise UserError(f"bias {tuple(bias.shape)} is not [B, S, K] = {list(k.shape[:3])}")
    check_importance(importance if by_importance else None, k, selection, keys)
    with torch.no_grad():
        grid = first = first_coarse = None
        if positions is not None:
            positions = positions.contiguous()
            first = first_coarse = torch.zeros_like(positions)
        if positions is not None and not cached:
            grid = BlockGrid.build(q, k, positions, block_size, (size, stride))
            first = grid.first_block_BT.contiguous()
        if means is None:
            means = window_means(k, size, stride) if grid is None else grid_window_means(k, grid, size, stride)
        if selection.lse == "exact":
            coarse = None
        elif coarse is None:
            wide, apart = COARSER * size, COARSER * stride
            if positions is None:
                coarse = window_means(k, wide, apart)
            else:
                coarse_grid = BlockGrid.build(q, k, positions, apart, (wide, apart))
                coarse, first_coarse = grid_window_means(k, coarse_grid, wide, apart), coarse_grid.first_block_BT.contiguous()
        if not by_importance:
            importance = None
        elif importance is None:
            assert bias is not None
            importance = key_importance(bias.to(torch.promote_types(bias.dtype, torch.float32)), grid, block_size, size, stride)
        impl = resolve(impl, q)
        arguments = (
            q, means, coarse, importance, first, first_coarse, positions, keys, block_size, within_rows(selection.places, block_size, keys, impl),
            selection.num_selected_blocks, window_numbers(selection), selection.scope, selection.scoring, scale,
        )  # fmt: skip
        if impl == "triton":
            return _kernels(True).select_windows(*arguments)
        with torch.autocast(q.device.type, enabled=False):
            return windows_by_reference(*arguments)


def check_importance(importance: Tensor | None, means: Tensor, selection: Selection, columns: int) -> None:
    """Raises `UserError` for one that is not fp32 (or wider) [B, N, K] with a block for each that may be chosen; means [B, ..., K, D]."""
    if importance is None:
        return
    with_windows = -(-selection.num_windows(columns) // selection.windows_per_block)
    blocks, (batch, kv_heads) = min(columns // selection.block_size, with_windows), (means.shape[0], means.shape[2])
    if importance.ndim != 3 or importance.shape[::2] != (batch, kv_heads) or importance.shape[1] < blocks:
        raise UserError(f"importance {tuple(importance.shape)} is not [B, N, K] = [{batch}, at least {blocks}, {kv_heads}]")
    if importance.dtype not in (torch.float32, torch.float64):
        raise UserError(f"importance of {importance.dtype} must be float32: its differences order the blocks")


def _kernels(windows: bool = False) -> Any:
    """Imported when they run: without triton the reference still does; by a statement, which torch.compile traces."""
    from ssa.ops.triton import select, select_windows

    return select_windows if windows else select


def window_numbers(selection: Selection) -> list[int]:
    """As the implementations take them: size, stride, sinks, local blocks, blocks by query (-1: all), dense length."""
    by_query = -1 if selection.query_blocks is None else selection.query_blocks
    return [
        selection.mean_size, selection.mean_stride, selection.sink_blocks, selection.local_blocks, by_query, selection.dense_length
    ]  # fmt: skip
