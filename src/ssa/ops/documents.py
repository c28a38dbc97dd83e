"""Where documents lie in packed, padded or cached rows: everything follows from document-relative query positions.

The query in column t of a row of T queries over S keys stands at key column S - T + t. If it is the p-th token of its document
(p = `positions[t]`, from 0), the document starts at key column S - T + t - p. So positions alone describe packed rows (they
restart at 0), left padding (they start at the first real token) and cached decoding (T < S); `None` is one plain document.

Legend: B batch, T queries, S keys, N blocks (of one row, all documents).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa.errors import UserError

FIXED_BLOCK_SIZE = 1024


def block_within_rows(block_size: int, num_keys: int) -> int:
    """A block size that means the same for rows of `num_keys` keys and costs no more than they do: a block that is longer than the row holds
    all of it and is never complete. One of few sizes, since kernels compile for each; up to `FIXED_BLOCK_SIZE` the size itself."""
    size = FIXED_BLOCK_SIZE
    while size < block_size and size <= num_keys:
        size *= 2
    return min(block_size, size)


def resolve_positions(q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Document-relative positions int64 [B, T], or None for plain causal rows; `cu_seqlens` (flash-attention's convention,
    int32 [documents + 1], B = 1) is another way to say them."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if queries > keys:
        raise UserError(f"{queries} queries over {keys} keys: q must not be longer than k")
    if cu_seqlens is not None:
        if positions is not None:
            raise UserError("positions and cu_seqlens both given: pass one of them")
        if batch != 1 or queries != keys:
            raise UserError(f"cu_seqlens needs one packed row (B = 1, T = S), not B = {batch}, T = {queries}, S = {keys}")
        return positions_from_cu_seqlens(cu_seqlens, queries).to(q.device)
    if positions is None:
        return None
    if positions.shape != (batch, queries):
        raise UserError(f"positions has shape {tuple(positions.shape)}, not [B, T] = [{batch}, {queries}]")
    positions = positions.to(torch.int64)
    # on a GPU looking at them would stall every layer, and a compiled graph cannot look
    if not positions.is_cuda and not torch.compiler.is_compiling():
        columns = torch.arange(keys - queries, keys, device=positions.device)
        if bool(((positions < 0) | (positions > columns)).any()):
            raise UserError(
                "positions must count from 0 in each document: one is negative or larger than the number of keys before it"
            )
    return positions


def positions_from_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """[0, 3, 5] -> [[0, 1, 2, 0, 1]], int64 [1, total]."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise UserError(f"cu_seqlens must run from 0 to T = {total} in one dimension, not {cu_seqlens.tolist()[:8]}")
    starts = cu_seqlens.to(torch.int64)
    columns = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(starts, columns, right=True) - 1
    return (columns - starts[document])[None]


def positions_from_starts(starts_BT: Tensor) -> Tensor:
    """Where documents begin, bool [B, T] with a start in column 0 -> positions in them, int64 [B, T]."""
    columns = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return columns - torch.where(starts_BT, columns, 0).cummax(1).values


def cu_seqlens_from_positions(positions_BT: Tensor, num_keys: int | None = None) -> Tensor:
    """Where documents begin in a flattened batch: int32 [n + 1] from 0 to B * T, on the device of `positions_BT`.

    n is a power of two, at least 16: the end is repeated, so that few sizes occur (each compiles anew). Waits for a GPU; a
    loader calls it on the CPU.

    With `num_keys` = S the positions are those of the last T tokens of rows of S keys, and the result is int32 [2, n + 1]: where
    documents begin among the queries, from 0 to B * T, and among the keys, from 0 to B * S. In every row the keys before the first
    query's document come first, as a document that has no queries (and no keys where that document fills the row).
    """
    if num_keys is None:
        return _repeat_the_end((positions_BT.reshape(-1) == 0).nonzero().flatten()[None], [positions_BT.numel()])[0]
    batch, queries = positions_BT.shape
    past = num_keys - queries
    opens = torch.nn.functional.pad(positions_BT[:, 1:] == 0, (2, 0), value=True)
    # per row: 0 = the keys before the first query's document, 1 = that document, c = one that opens at query c - 1
    row, c = opens.nonzero().unbind(1)
    first_B = past - positions_BT[:, 0].clamp(0, past)  # positions are not checked on a GPU, and a kernel must stay in its row
    key = torch.where(c == 1, first_B[row], torch.where(c == 0, 0, past + c - 1))
    starts = torch.stack([row * queries + (c - 1).clamp(min=0), row * num_keys + key])
    return _repeat_the_end(starts, [batch * queries, batch * num_keys])


def _repeat_the_end(starts: Tensor, ends: list[int]) -> Tensor:
    """[sides, documents] -> int32 [sides, n + 1], each side's end in all the rest."""
    documents = starts.shape[1]
    length = max(16, 1 << (documents - 1).bit_length()) + 1
    filled = torch.tensor(ends, dtype=torch.int32).to(starts.device, non_blocking=True)[:, None].repeat(1, length)
    filled[:, :documents] = starts
    return filled


def query_positions(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """`positions`, or those of plain rows, int64 [B, T]."""
    if positions is not None:
        return positions
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    return torch.arange(keys - queries, keys, device=q.device).expand(batch, queries)


def document_starts(positions_BT: Tensor, num_keys: int) -> Tensor:
    """Key column where every query's document starts, int64 [B, T]."""
    queries = positions_BT.shape[1]
    return torch.arange(num_keys - queries, num_keys, device=positions_BT.device) - positions_BT


@dataclass(frozen=True)
class BlockGrid:
    """Key blocks of a row, anchored at the start of their document and numbered through the row.

    Block n of a query's document is row block `first_block_BT + n`. In packed and padded rows only complete blocks are in the grid:
    an incomplete one is the last of its document, is never scored, and padding would otherwise fill the grid with them. With windows of
    keys (`ssa.ops.windows`) those are in the grid that have a complete window.
    """

    block_size: int
    num_blocks: int
    first_column_BN: Tensor
    """Key column of each block's first token, int64 [B, N]; rows with fewer blocks are filled with the last column."""
    first_block_BT: Tensor
    """Row block of block 0 of the query's document, int64 [B, T]."""
    windows_BN: Tensor | None = None
    """Complete windows that start in each block."""
    opens_document_BN: Tensor | None = None

    @classmethod
    def build(
        cls, q: Tensor, k: Tensor, positions: Tensor | None, block_size: int, windows: tuple[int, int] | None = None
    ) -> BlockGrid:
        """`windows`: their size and stride, where there are positions."""
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        if positions is None:
            blocks = -(-keys // block_size)
            first = torch.arange(blocks, device=q.device) * block_size
            return cls(block_size, blocks, first.expand(batch, blocks), first.new_zeros(()).expand(batch, queries))
        start_BT = document_starts(positions, keys)
        columns = torch.arange(keys, device=q.device)
        # Keys cached before this call belong to the first query's document, or to none that is still being read.
        position_BS = torch.cat([columns[: keys - queries] - start_BT[:, :1], positions], dim=1)
        needed = block_size if windows is None else windows[0]
        opens_BS = (position_BS >= 0) & (position_BS % block_size == 0)
        ends_BS = torch.nn.functional.pad(position_BS[:, needed - 1 :], (0, min(needed - 1, keys)), value=-1)[:, :keys]
        opens_BS &= ends_BS == position_BS + needed - 1
        before_BS = opens_BS.cumsum(1) - opens_BS.to(torch.int64)  # complete blocks that open before this column
        blocks = max(1, keys // min(needed, block_size))  # as many as can be; to count them, a GPU would have to be waited for
        first_BN = columns.new_full((batch, blocks + 1), keys - 1)
        first_BN.scatter_(1, torch.where(opens_BS, before_BS, blocks), columns.expand(batch, keys))
        first_BN = first_BN[:, :blocks]
        first_block_BT = before_BS.gather(1, start_BT.clamp(min=0))
        if windows is None:
            return cls(block_size, blocks, first_BN, first_block_BT)
        size, stride = windows
        position_BN = position_BS.gather(1, first_BN)
        ends = torch.arange(block_size // stride, device=q.device) * stride + size - 1
        ends_BNr = first_BN[..., None] + ends
        last_BNr = position_BS.gather(1, ends_BNr.clamp(max=keys - 1).flatten(1)).view(ends_BNr.shape)
        complete_BNr = (ends_BNr < keys) & (last_BNr == position_BN[..., None] + ends)
        return cls(block_size, blocks, first_BN, first_block_BT, complete_BNr.sum(-1), position_BN == 0)

    def gather(self, x_BSKD: Tensor, width: int | None = None) -> Tensor:
        """Keys by block, [B, N, width, K, D], `block_size` of them by default; columns past the row's end repeat its last key."""
        batch, keys = x_BSKD.shape[:2]
        offsets = torch.arange(width or self.block_size, device=x_BSKD.device)
        columns = (self.first_column_BN[..., None] + offsets).clamp(max=keys - 1)
        rows = torch.arange(batch, device=x_BSKD.device)[:, None, None]
        return x_BSKD[rows, columns]
