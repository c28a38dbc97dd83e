"""Dense causal attention, by PyTorch: scaled_dot_product_attention wherever it can say the mask, variable-length attention on a GPU for
packed rows and for the last queries of rows, query chunks with a mask for the rest.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from ssa.errors import UserError
from ssa.ops.documents import cu_seqlens_from_positions, document_starts, query_positions, resolve_positions

# older PyTorch groups heads without being told
VARLEN_NAMES_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
MASK_ELEMENTS = 1 << 24  # booleans of an explicit mask held at once
BIAS_LIMIT = 1e4
MASKED = -4e4  # far below every bias; near enough that no kernel's rounding of it overflows 2^x, and half precision holds it
DOCUMENTS_PER_ROW = 4  # up to so many on average, a causal call for each document beats one call with a mask


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """h_full(t) = softmax(q(t) . k(j) * scale + bias(j)) v(j) over the keys j <= t of the query's document. Differentiable in q, k, v, bias.

    Args:
        q: [B, T, H, D]. k, v: [B, S, K, D], H a multiple of K, T <= S; the queries are the last T tokens.
        positions: int [B, T] document-relative query positions (packed, padded or cached rows); None = plain rows.
        cu_seqlens: int32 [documents + 1], the same for packed rows (T = S) laid end to end, from 0 to B * T; its last value may repeat.
            Beside `positions` it spares a GPU the search for the documents (`ssa.ops.documents.cu_seqlens_from_positions`); there
            it may be int32 [2, documents + 1], of the queries and of the keys, as it must be where T < S.
        window: read only the last `window` keys, own included (NSA's sliding window).
        bias: fp32 [B, S, K] logit bias per key, added after scaling; -inf masks a key. It rides in 8 more columns of k or up to 15, so that any
            kernel of PyTorch's adds it, to fp32's precision in half precision, too; its gradient has the precision of k's. Finite values
            count as within +-1e4 in every type; in fp32 a sum of 1e4 is exact to 1e-3. On a GPU heads of more than 248 leave no room
            for it in the flash kernels.
        scale: logit scale, 1/sqrt(D) by default.

    Returns:
        out [B, T, H, D] in q's dtype; with a bias, 0 for a query whose keys are all masked.

    Raises:
        UserError: a window of less than one key, a bias of another shape, more queries than keys, or documents that do not fit the rows.
    """
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if window is not None and window < 1:
        raise UserError(f"window = {window} must be at least 1")
    if window is not None and window >= keys:
        window = None
    if cu_seqlens is not None and (cu_seqlens.ndim == 2 or queries < keys) and (cu_seqlens.ndim == 1 or positions is None):
        raise UserError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} for T = {queries} queries over S = {keys} keys: one dimension is for T = S, "
            "two go beside positions (cu_seqlens_from_positions(positions, S))"
        )
    if bias is not None:
        return _with_bias(q, k, v, bias, positions, cu_seqlens, window, q.shape[3] ** -0.5 if scale is None else float(scale))
    packed = positions is not None or cu_seqlens is not None
    if (packed if queries == keys else 1 < queries < keys) and _has_varlen(q):
        return _variable_length(q, k, v, _bounds(positions, cu_seqlens, q, keys), window, scale)
    positions = resolve_positions(q, k, positions, None if positions is not None else cu_seqlens)
    grouped = q.shape[2] != k.shape[2]
    position_BT = None if positions is None and window is None and queries in (1, keys) else query_positions(q, k, positions)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads first, as PyTorch has them
    if position_BT is None:
        causal = False
        if queries > 1:  # in a graph of any number of queries a branch is a bool, and a comparison is not
            causal = True
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)
    # a compiled graph cannot depend on where documents lie
    few = window is None and queries == keys and not torch.compiler.is_compiling()
    if few and int((position_BT == 0).sum()) <= DOCUMENTS_PER_ROW * batch:
        return _by_document(q, k, v, position_BT, scale, grouped).transpose(1, 2)
    start_BT = document_starts(position_BT, keys)
    column_T = torch.arange(keys - queries, keys, device=q.device)
    first_BT = start_BT if window is None else torch.maximum(start_BT, column_T - (window - 1))
    reach = keys if window is None else window
    chunk = max(1, min(queries, MASK_ELEMENTS // (batch * keys) if window is None else max(window, 256)))
    # a graph would have to fix the number of chunks
    cuts = [(0, queries)] if torch.compiler.is_compiling() else [(t, min(t + chunk, queries)) for t in range(0, queries, chunk)]
    outs = []
    for t, stop in cuts:
        low = max(0, keys - queries + t - reach + 1)  # first key column that any of these queries can see
        high = keys - queries + stop
        columns = torch.arange(low, high, device=q.device)
        mask = (columns >= first_BT[:, t:stop, None]) & (columns <= column_T[t:stop, None])
        outs.append(
            scaled_dot_product_attention(
                q[:, :, t:stop],
                k[:, :, low:high],
                v[:, :, low:high],
                attn_mask=mask[:, None],
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)).transpose(1, 2)


def _with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> Tensor:  # fmt: skip
    """The bias over `scale` in more columns of k, where q has a constant."""
    if bias.shape != k.shape[:3]:
        raise UserError(f"bias {tuple(bias.shape)} is not [B, S, K] = {list(k.shape[:3])}")
    kind, size = q.device.type, q.shape[3]
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:  # attention would cast the columns one by one
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    parts = {torch.float64: 1, torch.float32: 2}.get(q.dtype, 3)
    extra = parts + -(size + parts) % 8  # kernels want heads of a multiple of 8
    constant = 2.0 ** round(-math.log2(scale))  # so that the columns are about as large as the bias, which half precision holds
    masked = bias == float("-inf")
    rest = torch.where(masked, MASKED, bias.clamp(-BIAS_LIMIT, BIAS_LIMIT))
    rest = rest.to(torch.float32 if parts == 3 else torch.float64) / (scale * constant)
    columns = []
    for _ in range(parts):  # the first carries the gradient, the others what it rounds away
        columns.append(rest.to(k.dtype))
        rest = (rest - columns[-1]).detach()
    kx = torch.cat([k, torch.stack(columns, -1), k.new_zeros(*k.shape[:3], extra - parts)], -1)
    ones = torch.nn.functional.pad(q.new_full((parts,), constant), (0, extra - parts))
    qx = torch.cat([q, ones.expand(*q.shape[:3], extra)], -1)
    vx = torch.nn.functional.pad(v, (0, extra))
    out = dense_attention(qx, kx, vx, positions=positions, cu_seqlens=cu_seqlens, window=window, scale=scale)[..., :size]
    none_BTK = _reads_only(masked, q, k, positions, cu_seqlens, window)
    return out.masked_fill(none_BTK.repeat_interleave(q.shape[2] // k.shape[2], 2)[..., None], 0.0)


def _reads_only(
    masked_BSK: Tensor, q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, window: int | None
) -> Tensor:
    """Whether all keys that a query sees are masked, bool [B, T, K]."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    column_T = torch.arange(keys - queries, keys, device=q.device)
    if positions is None and cu_seqlens is not None:  # T = S
        row_B = torch.arange(batch, device=q.device)[:, None] * queries
        bounds = cu_seqlens.to(q.device, torch.int64)
        document_BT = torch.searchsorted(bounds, row_B + column_T, right=True) - 1
        low_BT = bounds[document_BT] - row_B
    else:
        low_BT = document_starts(query_positions(q, k, positions), keys)
    if window is not None:
        low_BT = torch.maximum(low_BT, column_T - (window - 1))
    readable_BSK = torch.nn.functional.pad((~masked_BSK).to(torch.int32), (0, 0, 1, 0)).cumsum(1)
    before_BTK = readable_BSK.gather(1, low_BT.clamp(min=0)[..., None].expand(-1, -1, k.shape[2]))
    return readable_BSK[:, keys - queries + 1 :] == before_BTK


def _has_varlen(q: Tensor) -> bool:
    """Whether PyTorch's variable-length attention, which is the flash kernel as it is, takes queries like these."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def _bounds(positions: Tensor | None, cu_seqlens: Tensor | None, q: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Where documents begin among the flattened queries and among the flattened keys."""
    batch, queries = q.shape[:2]
    if cu_seqlens is None and positions is None:
        rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return rows * queries, rows * keys
    if cu_seqlens is None:
        assert positions is not None
        cu_seqlens = cu_seqlens_from_positions(positions, None if queries == keys else keys)
    return (cu_seqlens, cu_seqlens) if cu_seqlens.ndim == 1 else (cu_seqlens[0], cu_seqlens[1])


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], window: int | None, scale: float | None
) -> Tensor:
    """Flash attention over the flattened batch; the last query of a document reads its last key. [B, T, H, D] in and out."""
    shape, keys = q.shape, k.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if VARLEN_NAMES_GQA else {}
    reach = -1 if window is None else window - 1
    # no document is longer than a row
    out = varlen.varlen_attn(q, k, v, *bounds, shape[1], keys, scale=scale, window_size=(reach, 0), **grouped)
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out.view(shape)


def _by_document(q: Tensor, k: Tensor, v: Tensor, position_BT: Tensor, scale: float | None, grouped: bool) -> Tensor:
    """One causal call for all rows that are one document, one for every other document; [B, H, T, D] in and out."""

    def attend(rows: Tensor | slice, columns: slice) -> Tensor:
        return scaled_dot_product_attention(
            q[rows, :, columns], k[rows, :, columns], v[rows, :, columns], is_causal=True, scale=scale, enable_gqa=grouped
        )

    starts: list[list[int]] = [[] for _ in range(q.shape[0])]
    for row, column in (position_BT == 0).nonzero().tolist():
        starts[row].append(column)
    whole = [row for row, columns in enumerate(starts) if len(columns) == 1]
    if len(whole) == len(starts):
        return attend(slice(None), slice(None))
    parts: list[Tensor] = [attend(torch.tensor(whole, device=q.device), slice(None))] if whole else []
    order = whole
    for row, columns in enumerate(starts):
        if len(columns) > 1:
            ends = [*columns[1:], q.shape[2]]
            pieces = [attend(slice(row, row + 1), slice(a, b)) for a, b in zip(columns, ends, strict=True)]
            parts.append(torch.cat(pieces, 2))
            order.append(row)
    return torch.cat(parts)[torch.tensor(order, device=q.device).argsort()]
