"""The attention mass that selections of several sizes keep, from one look at a layer's q and k.

Legend: B batch, T queries (C of a chunk), S keys, H query heads, K kv heads, G = H / K, R = K or H (who selects), D head size, N blocks,
M selected blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssa.analysis.attention_stats import Select
from ssa.analysis.dense_pass import tile_elements
from ssa.analysis.sparsity import documents_of
from ssa.attention import AttentionRecord
from ssa.ops.documents import query_positions

HELD_PLACES = 1 << 27
"""Chosen blocks held at once, of several selections of a layer: half a gigabyte."""


class KeptMass:
    """An observer: `model(..., observer=kept)` as often as there are rows, then `kept.means()`.

    Args:
        beyond: Queries at document positions from this one on count.
        select: What chooses; see `ssa.analysis.attention_stats.selection_of`.
        blocks: How many, once for each number. Without them what the model itself reads counts, everything in a layer that reads everything.
    """

    def __init__(self, beyond: int, select: Select | None = None, blocks: Sequence[int] = ()) -> None:
        self.beyond, self.select, self.blocks = beyond, select, blocks
        self.sums: dict[int, Tensor] = {}
        """By layer: mass summed over queries, means over heads, fp64 [blocks] on the CPU."""
        self.queries: dict[int, int] = {}

    @torch.no_grad()
    def __call__(self, layer: int, record: AttentionRecord) -> None:
        position_BT = query_positions(record.q_BTHD, record.k_BSKD, record.positions_BT)
        counts_BT = position_BT >= self.beyond
        queries = int(counts_BT.sum())
        parts: list[Tensor] = []
        for indices in self._choices(layer, record):
            kept = kept_mass(
                record.q_BTHD, record.k_BSKD, indices, position_BT, block_size=record.selection.block_size, bias=record.bias_BSK
            )
            parts += [each[counts_BT].double().mean(-1).sum().cpu() for each in kept]
        sums = torch.stack(parts) if parts else torch.tensor([queries], dtype=torch.float64)
        self.add({layer: sums}, {layer: queries})

    def _choices(self, layer: int, record: AttentionRecord) -> Iterator[list[Tensor]]:
        """The selections to measure, so many at a time as memory likes; none in a layer that reads everything."""
        if self.select is None:
            if record.block_indices is not None:
                yield [record.block_indices]
            return
        waiting: list[Tensor] = []
        for k in self.blocks:
            sized = replace(record, selection=replace(record.selection, num_selected_blocks=k))
            waiting.append(self.select(layer, sized))
            if sum(index.numel() for index in waiting) > HELD_PLACES:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def add(self, sums: Mapping[int, Tensor], queries: Mapping[int, int]) -> None:
        """What another observer of the same selections has seen of other rows."""
        for layer, other in sums.items():
            self.sums[layer] = self.sums.get(layer, 0) + other
            self.queries[layer] = self.queries.get(layer, 0) + queries[layer]

    def means(self) -> list[list[float]]:
        """By layer, the mean kept mass over queries and heads for each number of blocks."""
        return [(self.sums[layer] / max(1, self.queries[layer])).tolist() for layer in sorted(self.sums)]


@torch.no_grad()
def kept_mass(
    q: Tensor, k: Tensor, indices: Sequence[Tensor], position_BT: Tensor, *, block_size: int, bias: Tensor | None = None,
    tile: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Full attention's weight on the selected blocks, each document by itself.

    Args:
        q: [B, T, H, D] and k: [B, S, K, D] after RoPE, T <= S; the queries are the last T tokens. Computed in fp32.
        indices: selections, int [B, K or H, T, M] each, document-relative, -1 padded.
        position_BT: int, document-relative query positions.
        bias: [B, S, K], a selector's, part of the logits; finite, or -inf for a key that nobody reads.
        tile: weights held at once; by the device's memory by default.

    Returns:
        For each selection the mass, fp32 [B, T, H], 0..1.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    tile = tile_elements(q.device) if tile is None else tile
    found = [q.new_zeros(q.shape[:3], dtype=torch.float32) for _ in indices]
    lowest = torch.finfo(torch.float32).min / 2
    for b, documents in enumerate(documents_of(position_BT, k.shape[1])):
        for queries, keys in documents:
            k_SKD = k[b, keys].float()
            first = len(k_SKD) - (queries.stop - queries.start)
            k_SKD = torch.nn.functional.pad(k_SKD, (0, 0, 0, 0, 0, -len(k_SKD) % block_size))
            step = max(1, tile // (heads * len(k_SKD)))
            for t in range(queries.start, queries.stop, step):
                cut = slice(t, min(t + step, queries.stop))
                position_C = torch.arange(first + cut.start, first + cut.stop, device=q.device) - queries.start
                reach = (
                    (first + cut.stop - 1 - queries.start) // block_size + 1
                ) * block_size  # to the end of the last query's own block
                q_CKGD = q[b, cut].float().unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5
                logits_CKGS = torch.einsum("ckgd,skd->ckgs", q_CKGD, k_SKD[:reach])
                if bias is not None:
                    bias_SK = torch.nn.functional.pad(bias[b, keys].float(), (0, 0, 0, len(k_SKD) - (keys.stop - keys.start)))
                    logits_CKGS = (logits_CKGS + bias_SK[:reach].T[:, None]).clamp(min=lowest)
                later_CS = torch.arange(reach, device=q.device) > position_C[:, None]
                weights = logits_CKGS.masked_fill(later_CS[:, None, None], float("-inf")).softmax(-1)
                mass_CHN = weights.unflatten(-1, (-1, block_size)).sum(-1).flatten(1, 2)
                mass_CHN = torch.nn.functional.pad(mass_CHN, (0, 1))  # where nothing is chosen
                for each, index in zip(found, indices, strict=True):
                    index_CRM = index[b, :, cut].transpose(0, 1).to(torch.int64)
                    index_CHM = index_CRM.repeat_interleave(heads // index_CRM.shape[1], 1)
                    index_CHM = torch.where(index_CHM < 0, mass_CHN.shape[-1] - 1, index_CHM)
                    each[b, cut] = mass_CHN.gather(-1, index_CHM).sum(-1).clamp(max=1)
    return found
