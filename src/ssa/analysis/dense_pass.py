"""One pass of full attention over a document in tiles: where its weight lies, how wide it is, what the selection drops.

Tiles of queries x keys with a running maximum, as flash attention has them: memory is the tile's, whatever the length. Blocks of
keys are whole inside a tile, so everything that is a mass of blocks (dropped, own, first) costs a block_size-th of the tile.

Legend: T queries (C of a chunk), S keys, W keys of a tile, H query heads, K kv heads, G = H / K, R = K or H (who selects), D head
size, N blocks, M selected blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINK_TOKENS = 4
CPU_TILE = 1 << 20  # weights of a tile: stays in a core's cache more or less
CUDA_TILE = 1 << 26  # 256 MiB in fp32; three such tensors live at a time
_BYTES_PER_WEIGHT = 16  # what a tile takes at its peak, in fp32


@dataclass(frozen=True)
class DenseFigures:
    """Per query and query head, in the inputs' dtype: [T, H] each of one document, [B, T, H] of packed rows."""

    dropped: Tensor
    """delta(t): full-attention weight on the visible keys outside the selected blocks, summed over those, so that a small one is exact."""
    entropy: Tensor
    """Of the full-attention weights, -sum_j a(t, j) log a(t, j), in nats."""
    sink_first: Tensor
    """Full-attention weight on the document's first token."""
    sink_first_4: Tensor
    """On its first four."""
    first_block: Tensor
    """On its first block."""
    own_block: Tensor
    """On the query's own block."""
    error: Tensor
    """||h_full(t) - h_sparse(t)||."""
    largest_dropped: Tensor
    """Largest ||v(j)|| of a dropped key, 0 where nothing is dropped."""


def tile_elements(device: torch.device) -> int:
    """Weights held at once on `device`: at most a quarter of the memory that is free there."""
    if device.type != "cuda":
        return CPU_TILE
    free, _ = torch.cuda.mem_get_info(device)
    return max(1 << 18, min(CUDA_TILE, free // (4 * _BYTES_PER_WEIGHT)))


def tile_shape(tile: int, heads: int, queries: int, keys: int, block_size: int) -> tuple[int, int]:
    """(queries C, keys W) of a tile: about `tile` weights over all heads, W whole blocks and some times as long as C."""
    per_head = max(1, tile // heads)
    width = max(1, 2 * math.isqrt(per_head) // block_size) * block_size
    width = min(width, -(-keys // block_size) * block_size)
    return min(queries, max(1, per_head // width)), width


@torch.no_grad()
def dense_pass(
    q: Tensor, k: Tensor, v: Tensor, sparse_out: Tensor, block_indices: Tensor, *, block_size: int, scale: float,
    tile: int | None = None, bias: Tensor | None = None,
) -> DenseFigures:  # fmt: skip
    """Figures of full causal attention of one document against a selection of its blocks.

    Args:
        q: [T, H, D] and k, v: [S, K, D] in fp32 or fp64, T <= S; the queries are the document's last T tokens.
        sparse_out: [T, H, D], h_sparse of the same q, k, v.
        block_indices: int [K or H, T, M], -1 padded, the own block present.
        scale: logit scale.
        tile: weights held at once; by the device's memory by default. Changes the result by rounding only.
        bias: [S, K], added to the logits of each key.
    """
    queries, heads = q.shape[:2]
    keys, kv_heads = k.shape[:2]
    first = keys - queries
    tile = tile_elements(q.device) if tile is None else tile
    chunk, width = tile_shape(tile, heads, queries, keys, block_size)
    padding = -keys % block_size
    k_KDS = torch.nn.functional.pad(k.permute(1, 2, 0), (0, padding))
    v_KSD = torch.nn.functional.pad(v.transpose(0, 1), (0, 0, 0, padding))
    bias_KS = None if bias is None else torch.nn.functional.pad(bias.T.to(q.dtype), (0, padding))
    norm_KN = v_KSD.norm(dim=-1).unflatten(1, (-1, block_size)).amax(-1)
    parts: list[list[Tensor]] = []
    for t in range(0, queries, chunk):
        cut = slice(t, min(t + chunk, queries))
        position_C = torch.arange(first + cut.start, first + cut.stop, device=q.device)
        blocks = (first + cut.stop - 1) // block_size + 1  # up to the last query's own
        q_KXD = (q[cut] * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # X = G * C
        lost_RCN = dropped_blocks(block_indices[:, cut], position_C, block_size, blocks)
        sums, entropy, out_KGCD = _stream(q_KXD, k_KDS, v_KSD, bias_KS, lost_RCN, position_C, first + t, block_size, width)
        norm_RN = norm_KN[:, :blocks].repeat_interleave(lost_RCN.shape[0] // kv_heads, 0)
        largest_RC = torch.where(lost_RCN, norm_RN[:, None], 0).amax(-1)
        largest = largest_RC.repeat_interleave(heads // largest_RC.shape[0], 0)
        full_CHD = out_KGCD.permute(2, 0, 1, 3).flatten(1, 2)
        figures = [sums[..., 0], entropy, *sums[..., 1:].unbind(-1)]
        figures = [x.permute(2, 0, 1).flatten(1) for x in figures]
        parts.append([*figures, (full_CHD - sparse_out[cut]).norm(dim=-1), largest.T])
    return DenseFigures(*(torch.cat(column) for column in zip(*parts, strict=True)))


def dropped_blocks(index_RCM: Tensor, position_C: Tensor, block_size: int, blocks: int) -> Tensor:
    """bool [R, C, N]: of the document's first `blocks` blocks, those that the query sees and has not selected."""
    index = torch.where(index_RCM < 0, blocks, index_RCM).to(torch.int64)
    table = index.new_zeros((*index.shape[:2], blocks + 1), dtype=torch.bool).scatter_(-1, index, True)[..., :blocks]
    return ~table & (torch.arange(blocks, device=index.device) <= (position_C // block_size)[:, None])


def _stream(
    q_KXD: Tensor,
    k_KDS: Tensor,
    v_KSD: Tensor,
    bias_KS: Tensor | None,
    lost_RCN: Tensor,
    position_C: Tensor,
    start: int,
    block_size: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over tiles of keys for the queries at `start` ...: (shares of the weight [K, G, C, 5] in the order dropped, first token, first four, first
    block, own block; entropy [K, G, C]; h_full [K, G, C, D])."""
    kv_heads, chunk = q_KXD.shape[0], len(position_C)
    shape = (kv_heads, q_KXD.shape[1] // chunk, chunk)
    lowest = torch.finfo(q_KXD.dtype).min / 2  # as good as -inf, and 0 * lowest is still 0
    peak = q_KXD.new_full(shape, lowest)
    sums = q_KXD.new_zeros(*shape, 6)  # total, dropped, first token, first four, first block, own block
    spread = q_KXD.new_zeros(shape)  # sum of weight * (logit - peak)
    out = q_KXD.new_zeros(*shape, q_KXD.shape[-1])
    own_C1 = (position_C // block_size)[:, None]
    reach = lost_RCN.shape[-1] * block_size
    lost_KGCN = lost_RCN.unflatten(0, (kv_heads, -1))
    for low in range(0, reach, width):
        high = min(low + width, reach)
        logits = (q_KXD @ k_KDS[..., low:high]).view(*shape, high - low)
        if bias_KS is not None:
            logits += bias_KS[:, None, None, low:high]
            logits.clamp_(min=lowest)
        if high > start + 1:  # the tile touches the diagonal
            logits.masked_fill_(torch.arange(low, high, device=q_KXD.device) > position_C[:, None], lowest)
        higher = torch.maximum(peak, logits.amax(-1))
        logits -= higher[..., None]
        weights = logits.exp()
        mass = weights.unflatten(-1, (-1, block_size)).sum(-1)
        blocks = slice(low // block_size, high // block_size)
        own = torch.arange(blocks.start, blocks.stop, device=q_KXD.device) == own_C1
        new = [mass.sum(-1), torch.where(lost_KGCN[..., blocks], mass, 0).sum(-1)]
        if low == 0:
            new += [weights[..., 0], weights[..., :SINK_TOKENS].sum(-1), mass[..., 0]]
        else:
            new += [torch.zeros_like(peak)] * 3
        new.append(torch.where(own, mass, 0).sum(-1))
        shrink = (peak - higher).exp()
        spread = shrink * (spread + (peak - higher) * sums[..., 0]) + logits.mul_(weights).sum(-1)
        sums = shrink[..., None] * sums + torch.stack(new, -1)
        out = shrink[..., None] * out + (weights.flatten(1, 2) @ v_KSD[:, low:high]).view_as(out)
        peak = higher
    total = sums[..., :1]
    entropy = total.log().squeeze(-1) - spread / total.squeeze(-1)
    return sums[..., 1:] / total, entropy, out / total
