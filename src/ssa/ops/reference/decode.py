"""Decoding in plain PyTorch: rows are moved until they end together, then selected from and attended to like any other.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, D head size, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.reference.block_sparse import block_sparse_attention
from ssa.ops.reference.select import select_blocks
from ssa.ops.reference.select_windows import select_windows


def decode_attention(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, block_means_BNKD: Tensor, lengths_B: Tensor, starts_B: Tensor | None,
    bias_BSK: Tensor | None, block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
    row_blocks_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attention`."""
    indices = decode_select(
        q_BTHD, block_means_BNKD, lengths_B, block_size, num_selected, scope, scoring, rule, scale, row_blocks_B
    )
    return *decode_attend(q_BTHD, k_BSKD, v_BSKD, indices, lengths_B, starts_B, bias_BSK, None, block_size, scale), indices


def decode_select(
    q_BTHD: Tensor, block_means_BNKD: Tensor, lengths_B: Tensor, block_size: int, num_selected: int, scope: str, scoring: str, rule: str,
    scale: float, row_blocks_B: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ssa.ops.decode_select`."""
    positions_BT, before_BT = _positions(lengths_B, q_BTHD)
    first_block_BT = torch.zeros_like(positions_BT)
    indices, _ = select_blocks(
        q_BTHD, block_means_BNKD, first_block_BT, positions_BT, 0, block_size, num_selected, scope, scoring, rule, scale, row_blocks_B
    )  # fmt: skip
    return indices.masked_fill(before_BT[:, None, :, None], -1)


def decode_select_windows(
    q_BTHD: Tensor, means_BWKD: Tensor, coarse_BVKD: Tensor | None, importance_BNK: Tensor | None, lengths_B: Tensor, block_size: int,
    places: int, num_selected: int, windows: list[int], scope: str, scoring: str, scale: float, row_blocks_B: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ssa.ops.decode_select`."""
    positions_BT, before_BT = _positions(lengths_B, q_BTHD)
    indices, _ = select_windows(
        q_BTHD, means_BWKD, coarse_BVKD, importance_BNK, None, None, positions_BT, 0, block_size, places, num_selected, windows, scope,
        scoring, scale, row_blocks_B,
    )  # fmt: skip
    return indices.masked_fill(before_BT[:, None, :, None], -1)


def decode_attend(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, indices_BRTM: Tensor, lengths_B: Tensor, starts_B: Tensor | None,
    bias_BSK: Tensor | None, slots_BRTM: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attend`."""
    positions_BT, before_BT = _positions(lengths_B, q_BTHD)
    indices = indices_BRTM.masked_fill(before_BT[:, None, :, None], -1)
    if slots_BRTM is None:
        k_BSKD, v_BSKD, bias_BSK = _moved(k_BSKD, v_BSKD, bias_BSK, lengths_B.to(torch.int64), starts_B)
    return block_sparse_attention(q_BTHD, k_BSKD, v_BSKD, indices, positions_BT, bias_BSK, slots_BRTM, block_size, scale)


def decode_dense(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, lengths_B: Tensor, starts_B: Tensor | None, bias_BSK: Tensor | None, window: int,
    per: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_dense`."""
    columns, heads, kv_heads = k_BSKD.shape[1], q_BTHD.shape[2], k_BSKD.shape[2]
    positions_BT, before_BT = _positions(lengths_B, q_BTHD)
    after_BT = torch.where(before_BT, 0, (positions_BT + 1) // per)
    key_BS = torch.arange(columns, device=q_BTHD.device) - (0 if starts_B is None else starts_B.to(torch.int64)[:, None])
    key_BTS = key_BS.expand(len(q_BTHD), columns)[:, None]
    seen_BTS = (key_BTS >= 0) & (key_BTS < after_BT[..., None]) & (key_BTS >= (after_BT - window)[..., None])
    there_BS = seen_BTS.any(1)  # what nobody sees may be anything
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    q = q_BTHD.to(wide).unflatten(2, (kv_heads, heads // kv_heads))
    k, v = (x.to(wide).masked_fill(~there_BS[..., None, None], 0.0) for x in (k_BSKD, v_BSKD))
    logits = torch.einsum("btkgd,bskd->btkgs", q, k) * scale
    if bias_BSK is not None:
        logits = logits + bias_BSK.masked_fill(~there_BS[..., None], 0.0).transpose(1, 2)[:, None, :, None]
    logits = logits.masked_fill(~seen_BTS[:, :, None, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = torch.einsum("btkgs,bskd->btkgd", weights, v)
    return out.flatten(2, 3).to(q_BTHD.dtype), lse.flatten(2, 3)


def _positions(lengths_B: Tensor, q_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    """Of the queries in their rows, and True where the row is shorter than T: no query stands here."""
    queries = q_BTHD.shape[1]
    positions_BT = lengths_B.to(torch.int64)[:, None] - queries + torch.arange(queries, device=q_BTHD.device)
    return positions_BT.clamp(min=0), positions_BT < 0


def _moved(
    k_BSKD: Tensor, v_BSKD: Tensor, bias_BSK: Tensor | None, lengths_B: Tensor, starts_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each row moved until it ends with the last column; 0 before it."""
    batch, columns = k_BSKD.shape[:2]
    device = k_BSKD.device
    starts_B = torch.zeros_like(lengths_B) if starts_B is None else starts_B.to(torch.int64)
    from_BS = (starts_B + lengths_B - columns)[:, None] + torch.arange(columns, device=device)
    inside_BS = from_BS >= starts_B[:, None]
    rows = torch.arange(batch, device=device)[:, None]

    def moved(x: Tensor) -> Tensor:
        y = x[rows, from_BS.clamp(min=0)]
        return torch.where(inside_BS.view(batch, columns, *(1,) * (x.ndim - 2)), y, 0)

    return moved(k_BSKD), moved(v_BSKD), None if bias_BSK is None else moved(bias_BSK)
