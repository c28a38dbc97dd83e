"""Decoding: select and attend in one operation, for the last few tokens of cached rows.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.config import released_rule_check
from ssa.errors import UserError
from ssa.ops.documents import block_within_rows
from ssa.ops.implementations import resolve
from ssa.ops.reference.decode import decode_attention as by_reference
from ssa.ops.select import within_rows

MAX_QUERIES = 8


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_means: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    num_selected_blocks: int,
    starts: Tensor | None = None,
    scope: str = "group",
    scoring: str = "softmax",
    rule: str = "exact",
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_blocks` and `block_sparse_attention` for the last T tokens of each row of a cache, in three or four launches.

    Row b holds the tokens of one sequence in the columns starts[b] ... starts[b] + lengths[b] - 1, its own T queries' tokens
    included; query t is its token lengths[b] - T + t. Other columns are never read. Rows differ in length, and nothing about
    lengths is asked of the device, so a CUDA graph of a step serves all steps. Carries no gradient.

    Args:
        q: [B, T, H, D] after RoPE, 1 <= T <= 8. k, v: [B, S, K, D] of q's dtype, any strides: the cache, S columns of room.
        block_means: [B, N, K, D], N >= S // block_size, of q's dtype; row b's block n is the mean of its tokens n * block_size ...
            (n + 1) * block_size - 1. Means of blocks that a row has not completed are never read.
        lengths: int32 or int64 [B], cached tokens of each row. Queries before a shorter row's start read nothing.
        starts: int32 or int64 [B], first column of each row; None = 0.
        scope, scoring, rule, scale: as for `select_blocks`.
        bias: [B, S, K] logit bias per key, added after scaling; -inf masks a key. Blocks are chosen without it.
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in q's dtype; lse fp32 [B, T, H] (fp64 for fp64); block_indices int32 [B, K, T, M] ([B, H, T, M] for
        head scope), ascending, right-padded with -1, M as for `select_blocks`. A query that reads nothing: 0, -inf and -1.

    Raises:
        UserError: shapes or dtypes that do not fit, an unknown option, or a "released" budget that their kernel cannot compute.
    """
    batch, queries, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: [B, T, H, D] and [B, S, K, D] with H a multiple of K"
        )
    if not 1 <= queries <= min(MAX_QUERIES, k.shape[1]):
        raise UserError(
            f"{queries} queries over {k.shape[1]} columns: decode_attention takes 1 to {MAX_QUERIES}, no more than columns; for more use select_blocks and block_sparse_attention"
        )
    if block_size < 1 or num_selected_blocks < 1:
        raise UserError(f"block_size = {block_size} and num_selected_blocks = {num_selected_blocks} must be at least 1")
    if (
        block_means.shape[:1] + block_means.shape[2:] != k.shape[:1] + k.shape[2:]
        or block_means.shape[1] < k.shape[1] // block_size
    ):
        raise UserError(
            f"block_means {tuple(block_means.shape)} is not [B, N, K, D] with a mean for each of {k.shape[1] // block_size} blocks"
        )
    if not q.dtype == k.dtype == v.dtype == block_means.dtype:
        raise UserError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype} and block_means {block_means.dtype} differ in dtype; cast them to one"
        )
    for name, value, known in (("scope", scope, ("group", "head")), ("scoring", scoring, ("softmax", "logit")), ("rule", rule, ("exact", "released"))):  # fmt: skip
        if value not in known:
            raise UserError(f"{name} = {value!r} is not one of {', '.join(known)}")
    if rule == "released":
        released_rule_check(num_selected_blocks, block_size)
    if bias is not None and bias.shape != k.shape[:3]:
        raise UserError(f"bias {tuple(bias.shape)} is not [B, S, K] = {list(k.shape[:3])}")
    if scale is not None and not scale > 0:
        raise UserError(f"scale = {scale} must be positive")
    _check_rows(lengths, starts, batch, k.shape[1])
    impl = resolve(impl, q)
    block_size = block_within_rows(block_size, k.shape[1])
    arguments = (
        q, k, v, block_means, lengths, starts, bias, block_size, within_rows(num_selected_blocks, block_size, k.shape[1], impl),
        scope, scoring, rule, size**-0.5 if scale is None else float(scale),
    )  # fmt: skip
    with torch.no_grad():
        # modules of one implementation are imported when it runs: without triton the reference still does; and by statements,
        # which torch.compile traces
        if impl == "triton":
            from ssa.ops.triton.decode import decode_attention as by_triton

            return by_triton(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # it would take fp32 products back to half precision
            return by_reference(*arguments)


def _check_rows(lengths: Tensor, starts: Tensor | None, batch: int, columns: int) -> None:
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (x.shape != (batch,) or x.dtype not in (torch.int32, torch.int64)):
            raise UserError(f"{name} {tuple(x.shape)} of {x.dtype} is not int32 or int64 [B] with B = {batch}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU looking at them would stall every layer
        ends = lengths if starts is None else lengths + starts
        if bool((lengths < 0).any() | (ends > columns).any()) or (starts is not None and bool((starts < 0).any())):
            raise UserError(f"lengths (and starts) leave the cache: a row must lie within its {columns} columns")
