"""Decoding in plain PyTorch: rows are moved until they end together, then selected from and attended to like any other.

Legend: B batch, T queries, S cache columns, H query heads, K kv heads, D head size, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.reference.block_sparse import block_sparse_attention
from ssa.ops.reference.select import select_blocks


def decode_attention(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, block_means_BNKD: Tensor, lengths_B: Tensor, starts_B: Tensor | None,
    bias_BSK: Tensor | None, block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attention`."""
    batch, queries = q_BTHD.shape[:2]
    columns = k_BSKD.shape[1]
    device = q_BTHD.device
    lengths_B = lengths_B.to(torch.int64)
    starts_B = torch.zeros_like(lengths_B) if starts_B is None else starts_B.to(torch.int64)
    from_BS = (starts_B + lengths_B - columns)[:, None] + torch.arange(columns, device=device)
    inside_BS = from_BS >= starts_B[:, None]
    rows = torch.arange(batch, device=device)[:, None]

    def moved(x: Tensor) -> Tensor:
        y = x[rows, from_BS.clamp(min=0)]
        return torch.where(inside_BS.view(batch, columns, *(1,) * (x.ndim - 2)), y, 0)

    k, v = moved(k_BSKD), moved(v_BSKD)
    bias = None if bias_BSK is None else moved(bias_BSK)
    positions_BT = lengths_B[:, None] - queries + torch.arange(queries, device=device)
    before_BT = positions_BT < 0  # the row is shorter than T: no query stands here
    positions_BT = positions_BT.clamp(min=0)
    first_block_BT = torch.zeros_like(positions_BT)
    indices, _ = select_blocks(
        q_BTHD, block_means_BNKD, first_block_BT, positions_BT, columns, block_size, num_selected, scope, scoring, rule, scale
    )
    indices = indices.masked_fill(before_BT[:, None, :, None], -1)
    out, lse = block_sparse_attention(q_BTHD, k, v, indices, positions_BT, bias, None, block_size, scale)
    return out, lse, indices
