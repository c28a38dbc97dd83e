"""Decoding: select and attend for the last few tokens of cached rows, in one operation or in two.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssa.budget import COARSER, Selection
from ssa.errors import UserError
from ssa.ops.block_sparse import check_blocks, check_keys, check_slots
from ssa.ops.documents import block_within_rows
from ssa.ops.implementations import resolve
from ssa.ops.reference import decode as reference
from ssa.ops.select import check_importance, window_numbers, within_rows

MAX_QUERIES = 8


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_means: Tensor,
    lengths: Tensor,
    selection: Selection,
    *,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    coarse_means: Tensor | None = None,
    importance: Tensor | None = None,
    row_blocks: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_select` and `decode_attend` of its choice in one: selection and attention for the last T tokens of each row of a cache, in three
    or four launches.

    Row b holds the tokens of one sequence in the columns starts[b] ... starts[b] + lengths[b] - 1, its own T queries' tokens
    included; query t is its token lengths[b] - T + t. Other columns are never read. Rows differ in length, and nothing about
    lengths is asked of the device, so a CUDA graph of a step serves all steps. Carries no gradient.

    Args:
        q: [B, T, H, D] after RoPE, 1 <= T <= 8. k, v: [B, S, K, D] of q's dtype, any strides: the cache, S columns of room.
        block_means: [B, N, K, D], N >= S // block_size, of q's dtype; row b's block n is the mean of its tokens n * block_size ...
            (n + 1) * block_size - 1. Means of blocks that a row has not completed are never read. With a `selection.mean_size` they are
            means of windows [B, W, K, D], window j from its token j * mean_stride on.
        lengths: int32 or int64 [B], cached tokens of each row. Queries before a shorter row's start read nothing.
        starts: int32 or int64 [B], first column of each row; None = 0.
        selection, scale: as for `select_blocks`.
        bias: [B, S, K] logit bias per key, added after scaling; -inf masks a key. Blocks are chosen without it.
        coarse_means, importance: as `select_blocks` takes them; row b's begin with its first token.
        row_blocks: int32 [B] on q's device: row b reads what it would alone with `num_selected_blocks = row_blocks[b]`, from what is always
            read up to the selection's own number; one that is not below its number of blocks reads everything. None = the selection's for
            all. By rule "exact". Not looked at on a GPU, where no row reads more than the selection's number, or less than sinks, local blocks
            and its own.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype; lse fp32 [B, T, H] (fp64 for fp64); block_indices int32 [B, K, T, M] ([B, H, T, M] for
        head scope), ascending, right-padded with -1, M as for `select_blocks`. A query that reads nothing: 0, -inf and -1.

    Raises:
        UserError: shapes or dtypes that do not fit; on the CPU lengths, starts or row_blocks out of their range.
    """
    check_keys(q, k, v, bias)
    batch, columns, block_size = q.shape[0], k.shape[1], selection.block_size
    needed = selection.num_windows(columns)
    if block_means.shape[:1] + block_means.shape[2:] != k.shape[:1] + k.shape[2:] or block_means.shape[1] < needed:
        raise UserError(
            f"block_means {tuple(block_means.shape)} is not [B, N, K, D] with a mean for each of {needed} blocks or windows"
        )
    _check_call(q, {"k": k, "v": v, "block_means": block_means}, columns, scale)
    _check_rows(lengths, starts, batch, columns)
    _check_row_blocks(row_blocks, selection, q)
    impl = resolve(impl, q)
    if selection.mean_size:
        windows = _windows(q, block_means, coarse_means, importance, lengths, selection, columns, scale, row_blocks, impl)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if impl == "triton":
                return _kernels("decode_windows").decode_windows(*windows, k, v, starts, bias)
            indices = reference.decode_select_windows(*windows)
            return *reference.decode_attend(q, k, v, indices, lengths, starts, bias, None, block_size, _scale(q, scale)), indices
    block_size = block_within_rows(block_size, columns)
    arguments = (
        q, k, v, block_means, lengths, starts, bias, block_size,
        within_rows(selection.num_selected_blocks, block_size, columns, impl), selection.scope, selection.scoring, selection.rule,
        _scale(q, scale), row_blocks,
    )  # fmt: skip
    with torch.no_grad():
        if impl == "triton":
            return _kernels().decode_attention(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return reference.decode_attention(*arguments)


def _windows(
    q: Tensor, means: Tensor, coarse: Tensor | None, importance: Tensor | None, lengths: Tensor, selection: Selection, columns: int,
    scale: float | None, row_blocks: Tensor | None, impl: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What chooses by windows in rows of at most `columns` tokens, as implementations take it.

    Raises:
        UserError: Without coarse means or an importance that the selection asks for.
    """
    if selection.lse == "exact":
        coarse = None
    elif coarse is None or coarse.shape[1] < selection.num_windows(columns, COARSER):
        raise UserError("lse = 'coarse' needs coarse_means of every coarse window")
    if selection.query_blocks is None:
        importance = None
    elif importance is None:
        raise UserError("query_blocks choose the other blocks by importance: pass importance")
    check_importance(importance, means, selection, columns)
    return (
        q, means, coarse, importance, lengths, selection.block_size, within_rows(selection.places, selection.block_size, columns, impl),
        selection.num_selected_blocks, window_numbers(selection), selection.scope, selection.scoring, _scale(q, scale), row_blocks,
    )  # fmt: skip


def decode_select(
    q: Tensor,
    block_means: Tensor,
    lengths: Tensor,
    selection: Selection,
    *,
    coarse_means: Tensor | None = None,
    importance: Tensor | None = None,
    row_blocks: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """What `decode_attention` chooses: between this and `decode_attend` a cache may bring the blocks.

    Nothing about lengths is asked of the device. Carries no gradient.

    Args:
        q: [B, T, H, D] after RoPE, 1 <= T <= 8: the last T of the `lengths` tokens of each row.
        block_means: [B, N, K, D] of q's dtype, N at least the number of blocks (windows) that any row has completed; others are never read.
        lengths: int32 or int64 [B].
        selection, scale, coarse_means, importance: as for `select_blocks`; row_blocks: as for `decode_attention`.
        impl: "auto", "reference" or "triton".

    Returns:
        block_indices int32 [B, K, T, M] ([B, H, T, M] for head scope), ascending, right-padded with -1; -1 alone where a row has no such
        query. M as for `select_blocks` on rows of N blocks and one that is not complete.

    Raises:
        UserError: shapes or dtypes that do not fit; on the CPU lengths or row_blocks out of their range.
    """
    batch, _, heads, size = q.shape
    if block_means.ndim != 4 or block_means.shape[::3] != (batch, size) or heads % block_means.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)} and block_means {tuple(block_means.shape)} do not fit: [B, T, H, D] and [B, N, K, D] with H a multiple of K"
        )
    # as many keys as there are means for
    columns = (block_means.shape[1] + 1) * selection.block_size - 1
    if selection.mean_size:
        columns = block_means.shape[1] * selection.mean_stride + selection.mean_size - 1
    _check_call(q, {"block_means": block_means}, None, scale)
    _check_rows(lengths, None, batch, columns)
    _check_row_blocks(row_blocks, selection, q)
    impl = resolve(impl, q)
    if selection.mean_size:
        windows = _windows(q, block_means, coarse_means, importance, lengths, selection, columns, scale, row_blocks, impl)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return (_kernels("decode_windows") if impl == "triton" else reference).decode_select_windows(*windows)
    arguments = (
        q, block_means, lengths, selection.block_size, within_rows(selection.num_selected_blocks, selection.block_size, columns, impl),
        selection.scope, selection.scoring, selection.rule, _scale(q, scale), row_blocks,
    )  # fmt: skip
    with torch.no_grad():
        if impl == "triton":
            return _kernels().decode_select(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return reference.decode_select(*arguments)


def decode_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    starts: Tensor | None = None,
    slots: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of the last T tokens of each row to the blocks chosen for them, wherever these lie: the second half of `decode_attention`.

    Nothing about lengths, choices or slots is asked of the device. Carries no gradient.

    Args:
        q, k, v, lengths, starts, bias, scale: as for `decode_attention`.
        block_indices: int32 [B, K, T, M] or [B, H, T, M], left-packed and right-padded with -1, as `decode_select` gives them.
        slots: int32, shaped like block_indices: the keys of a chosen block are the columns slot * block_size ... of k and v (and bias), which
            may be fewer than the tokens of a row, as in `block_sparse_attention`. Then there are no starts.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype; lse fp32 [B, T, H] (fp64 for fp64). A query that reads nothing: 0 and -inf.

    Raises:
        UserError: shapes or dtypes that do not fit, starts beside slots, or slots outside k.
    """
    check_keys(q, k, v, bias)
    check_blocks(q, k, block_indices, block_size)
    if block_indices.dtype != torch.int32:
        raise UserError(f"block_indices of {block_indices.dtype} must be int32")
    batch, queries = q.shape[:2]
    columns = k.shape[1]
    _check_call(q, {"k": k, "v": v}, columns if slots is None else None, scale)
    _check_rows(lengths, starts, batch, columns if slots is None else None)
    if slots is None:
        block_size = block_within_rows(block_size, columns)
    else:
        if starts is not None:
            raise UserError("slots and starts both given: slots say where keys lie, leave out starts")
        positions = None if slots.is_cuda else lengths.to(torch.int64)[:, None] + torch.arange(-queries, 0, device=lengths.device)
        check_slots(block_indices, slots, positions, block_size, columns)
    arguments = (q, k, v, block_indices, lengths, starts, bias, slots, block_size, _scale(q, scale))
    with torch.no_grad():
        if resolve(impl, q) == "triton":
            return _kernels().decode_attend(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return reference.decode_attend(*arguments)


def decode_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    per: int = 1,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense attention for the last T tokens of each row of a cache, beside `decode_attention`: nothing about lengths is asked of the device.

    Args:
        q, k, v, lengths, starts, bias, scale, impl: as for `decode_attention`.
        window: read only the last `window` keys, own included; None = all.
        per: a key of k stands for so many tokens of the row, and is read by queries from the last of them on: with block means as k and v this
            is NSA's compression branch. Then S is a number of blocks, and there are no starts.

    Returns:
        out [B, T, H, D] in q's dtype; lse fp32 [B, T, H] (fp64 for fp64). A query that reads nothing: 0 and -inf.

    Raises:
        UserError: shapes or dtypes that do not fit.
    """
    check_keys(q, k, v, bias)
    batch, columns = q.shape[0], k.shape[1]
    if per < 1 or (window is not None and window < 1):
        raise UserError(f"window = {window} and per = {per} must be at least 1")
    if per > 1 and (starts is not None or window is not None):
        raise UserError(f"per = {per} counts from the first token of a row over all keys: leave out starts and window")
    _check_call(q, {"k": k, "v": v}, columns if per == 1 else None, scale)
    _check_rows(lengths, starts, batch, columns if per == 1 else (columns + 1) * per - 1)
    arguments = (q, k, v, lengths, starts, bias, columns if window is None else min(window, columns), per, _scale(q, scale))
    with torch.no_grad():
        if resolve(impl, q) == "triton":
            return _kernels("decode_dense").decode_dense(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return reference.decode_dense(*arguments)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _check_call(q: Tensor, others: dict[str, Tensor], columns: int | None, scale: float | None) -> None:
    """`columns`: those that hold all tokens of a row; None = none need to."""
    queries = q.shape[1]
    if not 1 <= queries <= (MAX_QUERIES if columns is None else min(MAX_QUERIES, columns)):
        over = "" if columns is None else f" over {columns} columns"
        raise UserError(
            f"{queries} queries{over}: decoding takes 1 to {MAX_QUERIES}, no more than columns; for more use select_blocks and block_sparse_attention"
        )
    if any(x.dtype != q.dtype for x in others.values()):
        *most, last = [f"{name} {x.dtype}" for name, x in {"q": q, **others}.items()]
        raise UserError(f"{', '.join(most)} and {last} differ in dtype; cast them to one")
    if scale is not None and not scale > 0:
        raise UserError(f"scale = {scale} must be positive")


def _check_rows(lengths: Tensor, starts: Tensor | None, batch: int, columns: int | None) -> None:
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (x.shape != (batch,) or x.dtype not in (torch.int32, torch.int64)):
            raise UserError(f"{name} {tuple(x.shape)} of {x.dtype} is not int32 or int64 [B] with B = {batch}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU looking at them would stall every layer
        ends = lengths if starts is None else lengths + starts
        if bool((lengths < 0).any()):
            raise UserError("lengths hold a negative number")
        if (columns is not None and bool((ends > columns).any())) or (starts is not None and bool((starts < 0).any())):
            raise UserError(f"lengths (and starts) leave the cache: a row must lie within its {columns} columns")


def _check_row_blocks(row_blocks: Tensor | None, selection: Selection, q: Tensor) -> None:
    if row_blocks is None:
        return
    if row_blocks.shape != q.shape[:1] or row_blocks.dtype != torch.int32 or row_blocks.device != q.device:
        raise UserError(
            f"row_blocks {tuple(row_blocks.shape)} of {row_blocks.dtype} on {row_blocks.device} is not int32 [B] with B = {len(q)} on {q.device}"
        )
    if selection.rule == "released":
        raise UserError("row_blocks: rule 'released' exists for few numbers of blocks, and rows have any; use rule 'exact'")
    if row_blocks.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = selection.least_blocks, selection.num_selected_blocks
        if bool(((row_blocks < least) | (row_blocks > most)).any()):
            raise UserError(
                f"row_blocks {row_blocks.tolist()} must lie between {least}, what is always read, and {most}, the selection's num_selected_blocks"
            )


def _kernels(module: str = "decode") -> Any:
    """Imported when they run: without triton the reference still does; by a statement, which torch.compile traces."""
    from ssa.ops.triton import decode, decode_dense, decode_windows

    return {"decode": decode, "decode_dense": decode_dense, "decode_windows": decode_windows}[module]
