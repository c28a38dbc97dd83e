"""Block-sparse attention in plain PyTorch, as dense matrix products over (query, block) pairs.

Gathering the selected keys of every query would copy each key block once per query that reads it. Here the pairs are sorted by
block instead, cut into tiles of pairs that share a block, and each tile is one small dense product: q rows are gathered, keys are
read once a tile, and the backward pass needs no scattered additions larger than a tile's keys.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), G = H / R, D head size, M selected
blocks, P pairs of a tile, X tiles, s block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.ops.documents import document_starts, query_positions

LOGIT_ELEMENTS = 1 << 26  # logits of a chunk of queries: 256 MiB in fp32


def block_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.block_sparse_attention`. One node of compiled and exported graphs, which cannot know how many tiles the pairs make."""
    if torch.compiler.is_compiling():
        return block_sparse_op(*args)
    parts = [_Attend.apply(*chunk) for _, chunk in _chunks(*args)]
    return _joined(parts)


def _chunks(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, block_indices_BRTM: Tensor, positions_BT: Tensor | None,
    bias_BSK: Tensor | None, slots_BRTM: Tensor | None, block_size: int, scale: float,
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor | None, _Pairs, float]]]:  # fmt: skip
    """Queries whose logits fit `LOGIT_ELEMENTS` together, and what `_Attend` takes for them."""
    batch, queries, heads, _ = q_BTHD.shape
    keys = k_BSKD.shape[1]
    positions_BT = query_positions(q_BTHD, k_BSKD, positions_BT)
    start_BT = document_starts(positions_BT, keys)
    chunk = max(1, LOGIT_ELEMENTS // max(1, batch * heads * block_indices_BRTM.shape[3] * block_size))
    for t in range(0, queries, chunk):
        cut = slice(t, t + chunk)
        slots = None if slots_BRTM is None else slots_BRTM[:, :, cut]
        pairs = _pair_up(block_indices_BRTM[:, :, cut], slots, start_BT[:, cut], positions_BT[:, cut], block_size, keys)
        yield cut, (q_BTHD[:, cut], k_BSKD, v_BSKD, bias_BSK, pairs, scale)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


class _Pairs(NamedTuple):
    """(query, block) pairs laid out in tiles that share a block. Slot x * P + i is place i of tile x."""

    slot_of_pair: Tensor
    """int64 [B*R*T, M]"""
    pair_of_slot: Tensor
    """int64 [X*P]; empty places name pair 0 and are masked."""
    visible: Tensor
    """Keys that a slot's query may read of the tile's block, counted from the block's start: int64 [X*P], 0 = none."""
    batch_of_tile: Tensor
    selector_of_tile: Tensor
    column_of_tile: Tensor
    """Key columns of the tile's block, int64 [X, s], clamped to the row."""
    unread_of_tile: Tensor | None
    """Keys of the tile's block that none of its queries reads, bool [X, s]; None where all columns hold numbers."""


def _pair_up(
    index_BRTM: Tensor, slots_BRTM: Tensor | None, start_BT: Tensor, positions_BT: Tensor, block_size: int, keys: int
) -> _Pairs:
    device = index_BRTM.device
    batch, selectors, _queries, selected = index_BRTM.shape
    index = index_BRTM.to(torch.int64)
    if slots_BRTM is None:
        first_column = start_BT[:, None, :, None] + index * block_size
    else:
        first_column = slots_BRTM.to(torch.int64) * block_size
    visible = (positions_BT[:, None, :, None] + 1 - index * block_size).clamp(0, block_size)
    visible = torch.where(index < 0, 0, visible).flatten()
    rows = torch.arange(batch * selectors, device=device).view(batch, selectors, 1, 1)
    name = rows * keys + first_column.clamp(0, keys - 1)  # a block's name: (row, selector, first column)
    name, order = name.flatten().sort(stable=True)
    names, counts = torch.unique_consecutive(name, return_counts=True)
    pairs, blocks = len(name), len(names)
    # Half the mean number of readers keeps both the padding of small groups and the number of tiles low.
    per_tile = 1 << max(0, min(6, (pairs // blocks).bit_length() - 2))
    tiles_of_block = (counts + per_tile - 1) // per_tile
    block_of_tile = torch.arange(blocks, device=device).repeat_interleave(tiles_of_block)
    first_slot = (tiles_of_block.cumsum(0) - tiles_of_block) * per_tile
    place = torch.arange(pairs, device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    slot = first_slot.repeat_interleave(counts) + place
    slot_of_pair = torch.empty_like(order).scatter_(0, order, slot)
    slots = len(block_of_tile) * per_tile
    pair_of_slot = order.new_zeros(slots).scatter_(0, slot, order)
    visible_of_slot = order.new_zeros(slots).scatter_(0, slot_of_pair, visible)
    tile_name = names[block_of_tile]
    row, column = tile_name // keys, tile_name % keys
    place_s = torch.arange(block_size, device=device)
    columns = (column[:, None] + place_s).clamp(max=keys - 1)
    unread = None if slots_BRTM is None else place_s >= visible_of_slot.view(-1, per_tile).amax(1)[:, None]
    return _Pairs(
        slot_of_pair.view(-1, selected), pair_of_slot, visible_of_slot, row // selectors, row % selectors, columns, unread
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pairs: _Pairs, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        tiles = _Tiles(q, k, v, pairs, dtype)
        logits_XPGs = tiles.q_rows(q) @ tiles.k_XDs() * scale
        if bias is not None:
            logits_XPGs += tiles.of_keys(bias).to(dtype)[:, None]
        s = logits_XPGs.shape[-1]
        logits = logits_XPGs.view(-1, tiles.group, s)  # [X*P, G, s]
        hidden = torch.arange(s, device=q.device) >= pairs.visible[:, None]
        logits.masked_fill_(hidden[:, None], float("-inf"))
        # softmax over all pairs of a query: maxima and sums per slot, combined per query
        peak_QMG = logits.amax(-1)[pairs.slot_of_pair]
        peak_QG = peak_QMG.amax(1)
        safe_QG = peak_QG.masked_fill(peak_QG == float("-inf"), 0.0)
        query_of_slot = pairs.pair_of_slot // pairs.slot_of_pair.shape[1]
        p = torch.exp_(logits.sub_(safe_QG[query_of_slot][..., None]))
        sum_QG = p.sum(-1)[pairs.slot_of_pair].sum(1)
        inverse_QG = torch.where(sum_QG > 0, 1 / sum_QG, 0)
        out_QGD = (p.view_as(logits_XPGs) @ tiles.v_XsD()).view(-1, tiles.group * tiles.size)
        out_QGD = out_QGD[pairs.slot_of_pair].sum(1).view(-1, tiles.group, tiles.size) * inverse_QG[..., None]
        lse_QG = safe_QG + sum_QG.log()
        p.mul_(inverse_QG[query_of_slot][..., None])
        ctx.save_for_backward(q, k, v, bias, p.to(q.dtype), out_QGD, *pairs)
        ctx.scale = scale
        return tiles.to_queries(out_QGD).to(q.dtype), tiles.to_queries(lse_QG[..., None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, p, out_QGD, *rest = ctx.saved_tensors
        pairs = _Pairs(*rest)
        dtype = out_QGD.dtype
        tiles = _Tiles(q, k, v, pairs, dtype)
        query_of_slot = pairs.pair_of_slot // pairs.slot_of_pair.shape[1]
        d_out_QGD = tiles.from_queries(d_out.to(dtype))
        d_lse_QG = tiles.from_queries(d_lse.to(dtype)[..., None]).squeeze(-1)
        # d logits = p * (d_out . v - (d_out . out) + d_lse)
        shift_QG = (d_out_QGD * out_QGD).sum(-1) - d_lse_QG
        p_XPGs = p.to(dtype).view(len(pairs.batch_of_tile), -1, p.shape[-1])
        d_out_XPGD = d_out_QGD.flatten(1)[query_of_slot].view(*p_XPGs.shape[:2], tiles.size)
        d_v = tiles.to_keys(p_XPGs.transpose(1, 2) @ d_out_XPGD, v)
        d_logits = (d_out_XPGD @ tiles.v_XsD().transpose(1, 2)).view(p.shape)
        d_logits = d_logits.sub_(shift_QG[query_of_slot][..., None]).mul_(p).view_as(p_XPGs)
        d_bias = None if bias is None else tiles.to_keys(d_logits.sum(1)[..., None], bias[..., None]).squeeze(-1)
        d_logits = d_logits.mul_(ctx.scale)
        d_k = tiles.to_keys(d_logits.transpose(1, 2) @ tiles.q_rows(q), k)
        d_q = (d_logits @ tiles.k_XDs().transpose(1, 2)).view(len(query_of_slot), -1)
        d_q_QGD = d_q[pairs.slot_of_pair].sum(1).view(out_QGD.shape)
        return tiles.to_queries(d_q_QGD).to(q.dtype), d_k, d_v, d_bias, None, None


class _Tiles:
    """Moves rows between the tensors' layouts and the tiles'. Q = B*R*T queries, as seen by the selectors."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, pairs: _Pairs, dtype: torch.dtype) -> None:
        self.batch, self.queries, heads, self.size = q.shape
        self.selectors = len(pairs.slot_of_pair) // (self.batch * self.queries)
        self.group = heads // self.selectors
        self.pairs, self.k, self.v, self.dtype = pairs, k, v, dtype
        self.kv_head = pairs.selector_of_tile // (self.selectors // k.shape[2])

    def from_queries(self, x_BTHD: Tensor) -> Tensor:
        x = x_BTHD.reshape(self.batch, self.queries, self.selectors, self.group, x_BTHD.shape[-1])
        return x.transpose(1, 2).reshape(-1, self.group, x_BTHD.shape[-1])

    def to_queries(self, x_QGD: Tensor) -> Tensor:
        x = x_QGD.view(self.batch, self.selectors, self.queries, self.group, x_QGD.shape[-1])
        return x.transpose(1, 2).reshape(self.batch, self.queries, -1, x_QGD.shape[-1])

    def q_rows(self, q: Tensor) -> Tensor:
        """q of every slot, [X, P*G, D]."""
        rows = self.from_queries(q.to(self.dtype)).flatten(1)
        rows = rows[self.pairs.pair_of_slot // self.pairs.slot_of_pair.shape[1]]
        return rows.view(len(self.pairs.batch_of_tile), -1, self.size)

    def of_keys(self, x_BSK: Tensor) -> Tensor:
        """Rows of a per-key tensor for every tile, [X, s, ...]. Indexes a strided cache without copying it."""
        return x_BSK[self.pairs.batch_of_tile[:, None], self.pairs.column_of_tile, self.kv_head[:, None]]

    def read(self, x_BSKD: Tensor) -> Tensor:
        """Keys or values of every tile, [X, s, D]; 0 where no query reads: a page's free places may hold anything, and 0 * NaN is NaN."""
        rows_XsD = self.of_keys(x_BSKD).to(self.dtype)
        unread_Xs = self.pairs.unread_of_tile
        return rows_XsD if unread_Xs is None else rows_XsD.masked_fill(unread_Xs[..., None], 0.0)

    def k_XDs(self) -> Tensor:
        return self.read(self.k).transpose(1, 2)

    def v_XsD(self) -> Tensor:
        return self.read(self.v)

    def to_keys(self, x_XsD: Tensor, like_BSKD: Tensor) -> Tensor:
        """Sums tile rows into the keys they came from, in `like`'s shape and dtype."""
        batch, keys, heads, size = like_BSKD.shape
        row = (self.pairs.batch_of_tile[:, None] * keys + self.pairs.column_of_tile) * heads + self.kv_head[:, None]
        total = x_XsD.new_zeros(batch * keys * heads, size)
        if total.is_cuda:  # sorts where index_add_ would add atomically, in a different order each time
            total.index_put_((row.flatten(),), x_XsD.reshape(-1, size), accumulate=True)
        else:
            total.index_add_(0, row.flatten(), x_XsD.reshape(-1, size))
        return total.view(batch, keys, heads, size).to(like_BSKD.dtype)


class _Saved:
    """What `_Attend` wants of autograd, where a graph's backward pass computes a chunk's forward pass again."""

    saved_tensors: tuple[Tensor | None, ...]
    scale: float

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _run(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor | None, bias: Tensor | None,
    slots: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chunks = _chunks(q, k, v, block_indices, positions, bias, slots, block_size, scale)
    return _joined([_Attend.forward(_Saved(), *chunk) for _, chunk in chunks])


def _run_backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor | None,
    bias: Tensor | None, slots: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias; that of no bias is empty."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_bias = q.new_empty(0) if bias is None else torch.zeros_like(bias)
    for cut, chunk in _chunks(q, k, v, block_indices, positions, bias, slots, block_size, scale):
        saved = _Saved()
        _Attend.forward(saved, *chunk)
        parts: Any = _Attend.backward(saved, d_out[:, cut], d_lse[:, cut])
        d_q[:, cut] = parts[0]
        d_k += parts[1]
        d_v += parts[2]
        if bias is not None:
            d_bias += parts[3]
    return d_q, d_k, d_v, d_bias


block_sparse_op = torch.library.custom_op("ssa::block_sparse_reference", _run, mutates_args=())
block_sparse_backward_op = torch.library.custom_op("ssa::block_sparse_reference_backward", _run_backward, mutates_args=())


@block_sparse_op.register_fake
def _(q, k, v, block_indices, positions, bias, slots, block_size, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@block_sparse_backward_op.register_fake
def _(d_out, d_lse, q, k, v, block_indices, positions, bias, slots, block_size, scale):
    return *(torch.empty_like(x) for x in (q, k, v)), q.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.sizes = inputs[7:]


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_k, d_v, d_bias = block_sparse_backward_op(d_out, d_lse, *ctx.saved_tensors, *ctx.sizes)
    return d_q, d_k, d_v, None, None, None if ctx.saved_tensors[5] is None else d_bias, None, None, None


block_sparse_op.register_autograd(_backward, setup_context=_setup_context)
