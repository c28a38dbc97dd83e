"""How much of full attention the selected blocks keep, and what Theorem 1 says about the rest.

Everything is computed from the q, k, v that an observer sees, for a chunk of queries at a time: memory is chunk x S, never T x S.

Legend: B batch, T queries (C of a chunk), S keys (of the chunk's reach), H query heads, K kv heads, G = H / K, R = K or H (who
selects), D head size, N blocks, M selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssa.attention import AttentionRecord
from ssa.config import Budget
from ssa.ops import select_blocks
from ssa.ops.documents import document_starts, query_positions, resolve_positions

LOGIT_ELEMENTS = 1 << 21  # weights held at once: 8 MiB in fp32, a few times over
SINK_TOKENS = 4
BITS_PER_NAT = 1 / 0.6931471805599453


@dataclass(frozen=True)
class AttentionFigures:
    """Per query and query head, [B, T, H] each, fp32 (fp64 for fp64 input)."""

    kept: Tensor
    """AttnSparsity(t): full-attention weight on the keys of the selected blocks, 0..1."""
    dropped: Tensor
    """delta(t) = 1 - kept, summed over the dropped keys so that a small one is exact."""
    entropy: Tensor
    """Of the full-attention weights, in nats."""
    sink_first: Tensor
    """Full-attention weight on the document's first token."""
    sink_first_4: Tensor
    """On its first four."""
    own_block: Tensor
    """On the query's own block."""
    error: Tensor
    """||h_full(t) - h_sparse(t)||."""
    bound: Tensor
    """Theorem 1: delta(t) * (largest norm of a dropped value + ||h_sparse(t)||)."""
    violated: Tensor
    """bool: the error is not below the bound plus the arithmetic's rounding."""


@torch.no_grad()
def attention_figures(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int, positions: Tensor | None = None,
    scale: float | None = None, chunk: int | None = None,
) -> AttentionFigures:  # fmt: skip
    """Compare full attention with attention over `block_indices` on the same q, k, v (section 5 of the method, Theorem 1).

    Args:
        q: [B, T, H, D] and k, v: [B, S, K, D] after RoPE, T <= S; the queries are the last T tokens.
        block_indices: int [B, K or H, T, M], document-relative, -1 padded, the own block present (see `ssa.ops.select_blocks`).
        positions: int [B, T] document-relative query positions; None = plain rows.
        scale: logit scale, 1/sqrt(D) by default.
        chunk: queries at a time; chosen from the shapes by default. Does not change the result beyond rounding.
    """
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = size**-0.5 if scale is None else scale
    position_BT = query_positions(q, k, resolve_positions(q, k, positions, None))
    start_BT = document_starts(position_BT, keys)
    q_BKGTD = q.to(wide).reshape(batch, queries, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    k_BK1DS = k.to(wide).permute(0, 2, 3, 1)[:, :, None]
    v_BK1SD = v.to(wide).transpose(1, 2)[:, :, None]
    norm_BK11S = v_BK1SD.norm(dim=-1)[:, :, :, None]
    rounding = 128 * torch.finfo(wide).eps * norm_BK11S.amax(-1).squeeze(-1)[..., None]  # [B, K, 1, 1]
    chunk = chunk or max(1, LOGIT_ELEMENTS // (batch * heads * keys))
    parts: list[list[Tensor]] = []
    for t in range(0, queries, chunk):
        cut = slice(t, t + chunk)
        position_BC, start_BC = position_BT[:, cut], start_BT[:, cut]
        # The keys that any of these queries can see: from the earliest start of a document to the last query.
        low, high = max(0, int(start_BC.min())), keys - queries + min(t + chunk, queries)
        relative_BCS = torch.arange(low, high, device=q.device) - start_BC[..., None]
        visible = ((relative_BCS >= 0) & (relative_BCS <= position_BC[..., None]))[:, None, None]
        chosen = _chosen_keys(block_indices[:, :, cut], relative_BCS, block_size)
        chosen = chosen.view(batch, kv_heads, -1, *chosen.shape[2:]) & visible  # [B, K, 1 or G, C, S]
        lost = visible & ~chosen
        logits = (q_BKGTD[:, :, :, cut] @ k_BK1DS[..., low:high]) * scale
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        v_cut = v_BK1SD[..., low:high, :]
        full = weights @ v_cut
        sparse = logits.masked_fill(~chosen, float("-inf")).softmax(-1) @ v_cut
        dropped = weights.masked_fill(chosen, 0).sum(-1)
        largest = torch.where(lost, norm_BK11S[..., low:high], 0).amax(-1)
        error = (full - sparse).norm(dim=-1)
        bound = dropped * (largest + sparse.norm(dim=-1))
        sink = _weights_from(weights, start_BC - low, SINK_TOKENS)
        own = _weights_from(weights, start_BC - low + position_BC // block_size * block_size, block_size)
        figures = [
            1 - dropped, dropped, torch.special.entr(weights).sum(-1), sink[..., 0], sink.sum(-1), own.sum(-1), error, bound,
            ~(error <= bound + rounding),
        ]  # fmt: skip
        parts.append([x.permute(0, 3, 1, 2).flatten(2) for x in figures])  # [B, C, H]
    return AttentionFigures(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


def _chosen_keys(index_BRCM: Tensor, relative_BCS: Tensor, block_size: int) -> Tensor:
    """bool [B, R, C, S]: the key lies in a selected block. Keys outside the document come out arbitrary."""
    blocks = max(int(relative_BCS.max()) // block_size, int(index_BRCM.max())) + 1
    index = torch.where(index_BRCM < 0, blocks, index_BRCM).to(torch.int64)
    table = index.new_zeros((*index.shape[:3], blocks + 1), dtype=torch.bool).scatter_(-1, index, True)
    block_BCS = (relative_BCS // block_size).clamp(min=0)
    return table.gather(-1, block_BCS[:, None].expand(-1, index.shape[1], -1, -1))


def _weights_from(weights: Tensor, first_BC: Tensor, count: int) -> Tensor:
    """Weights [B, K, G, C, S] of `count` columns from `first_BC` on, 0 beyond the row's end: [B, K, G, C, count]."""
    column = first_BC[..., None] + torch.arange(count, device=weights.device)
    index = column.clamp(max=weights.shape[-1] - 1)[:, None, None].expand(*weights.shape[:4], count)
    return weights.gather(-1, index) * (column < weights.shape[-1])[:, None, None]


@dataclass(frozen=True)
class HeadMeans:
    """Means over a set of queries, one value per query head."""

    queries: int
    kept_mass: list[float]
    entropy_bits: list[float]
    entropy_nats: list[float]
    sink_mass_first: list[float]
    sink_mass_first_4: list[float]
    own_block_mass: list[float]


@dataclass(frozen=True)
class TheoremOne:
    """The bound of Theorem 1 at every (query, head), and a sample of the points."""

    checked: int
    violations: int
    points: list[list[float]]
    """(delta, error, bound) of a random sample of queries beyond the receptive field."""


@dataclass(frozen=True)
class LayerFigures:
    """One layer. Below the receptive field k * s everything is selected, so its queries keep all mass by construction; means are
    given over all queries, and over those at document positions >= k * s, where the selection leaves something out."""

    layer: int
    all_queries: HeadMeans
    beyond_receptive_field: HeadMeans | None
    """None where no query stands that far in its document."""
    selected_blocks_mean: float
    own_block_share: float
    """Share of the selected blocks that is the query's own."""
    distance_histogram: list[int]
    """Selected blocks by the distance from the block's start to the query, in tokens: bin 0 is distance 0, bin b is
    2^(b-1) .. 2^b - 1."""
    theorem_1: TheoremOne


_MEANS = ("kept", "entropy", "sink_first", "sink_first_4", "own_block")


class SparsityMeter:
    """An observer that sums the figures of every layer over the rows it sees.

    `meter = SparsityMeter(...)`, `model(..., observer=meter)` as often as there are rows, `meter.layers()`. Under full inference,
    where the model selects nothing, the model's own rule selects on the same q and k.
    """

    def __init__(
        self, *, scope: str = "group", scoring: str = "softmax", rule: str = "exact", points: int = 200, seed: int = 0,
        chunk: int | None = None,
    ) -> None:  # fmt: skip
        self.scope, self.scoring, self.rule, self.points, self.seed, self.chunk = scope, scoring, rule, points, seed, chunk
        self._sums: dict[int, _LayerSums] = {}

    @torch.no_grad()
    def __call__(self, layer: int, record: AttentionRecord) -> None:
        budget = record.budget
        index = record.block_indices
        if index is None:
            index, _ = select_blocks(
                record.q_BTHD, record.k_BSKD, block_size=budget.block_size, num_selected_blocks=budget.num_selected_blocks,
                positions=record.positions_BT, scope=self.scope, scoring=self.scoring, rule=self.rule,
            )  # fmt: skip
        figures = attention_figures(
            record.q_BTHD, record.k_BSKD, record.v_BSKD, index, block_size=budget.block_size, positions=record.positions_BT,
            chunk=self.chunk,
        )  # fmt: skip
        position_BT = query_positions(record.q_BTHD, record.k_BSKD, record.positions_BT)
        if layer not in self._sums:
            self._sums[layer] = _LayerSums(record.q_BTHD.shape[2], self.points, self.seed * 1009 + layer)
        self._sums[layer].add(figures, index, position_BT, budget)

    def layers(self) -> list[LayerFigures]:
        """The means so far, in the order of the layers."""
        return [self._sums[layer].figures(layer) for layer in sorted(self._sums)]


class _LayerSums:
    """Sums of one layer, in fp64 on the CPU."""

    def __init__(self, heads: int, points: int, seed: int) -> None:
        self.totals = torch.zeros(2, len(_MEANS), heads, dtype=torch.float64)  # [all | beyond, figure, head]
        self.queries = [0, 0]
        self.selected = self.selections = self.own = self.checked = self.violations = 0
        self.histogram = torch.zeros(64, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)
        self.points, self.sample, self.sample_keys = points, torch.zeros(0, 3), torch.zeros(0)

    def add(self, figures: AttentionFigures, index_BRTM: Tensor, position_BT: Tensor, budget: Budget) -> None:
        beyond_BT = (position_BT >= budget.tokens).cpu()
        each = torch.stack([getattr(figures, name) for name in _MEANS]).double().cpu()  # [figure, B, T, H]
        self.totals[0] += each.sum((1, 2))
        self.totals[1] += each[:, beyond_BT].sum(1)
        self.queries = [self.queries[0] + beyond_BT.numel(), self.queries[1] + int(beyond_BT.sum())]
        distance = position_BT[:, None, :, None] - index_BRTM.to(torch.int64) * budget.block_size
        distance = distance[index_BRTM >= 0].cpu()
        # The exponent of frexp is an integer's bit length: 0 for 0, b for 2^(b-1) .. 2^b - 1.
        self.histogram += torch.bincount(torch.frexp(distance.double()).exponent.long(), minlength=64)
        self.selected += len(distance)
        self.selections += index_BRTM[..., 0].numel()
        self.own += int((index_BRTM == (position_BT // budget.block_size)[:, None, :, None]).sum())
        self.checked += figures.error.numel()
        self.violations += int(figures.violated.sum())
        self._keep_sample(torch.stack([figures.dropped, figures.error, figures.bound], -1).float().cpu()[beyond_BT].view(-1, 3))

    def _keep_sample(self, points: Tensor) -> None:
        """A uniform sample over all rows: every point draws a key, the largest keys stay."""
        keys = torch.cat([self.sample_keys, torch.rand(len(points), generator=self.generator)])
        best = keys.topk(min(self.points, len(keys))).indices
        self.sample, self.sample_keys = torch.cat([self.sample, points])[best], keys[best]

    def figures(self, layer: int) -> LayerFigures:
        histogram = self.histogram[: int(self.histogram.nonzero().max()) + 1].tolist()
        return LayerFigures(
            layer=layer,
            all_queries=self._means(0),
            beyond_receptive_field=self._means(1) if self.queries[1] else None,
            selected_blocks_mean=self.selected / self.selections,
            own_block_share=self.own / self.selected,
            distance_histogram=histogram,
            theorem_1=TheoremOne(self.checked, self.violations, self.sample.tolist()),
        )

    def _means(self, which: int) -> HeadMeans:
        kept, entropy, first, first_4, own = (self.totals[which] / self.queries[which]).tolist()
        bits = [x * BITS_PER_NAT for x in entropy]
        return HeadMeans(self.queries[which], kept, bits, entropy, first, first_4, own)


def mean_figures(layers: list[LayerFigures], beyond: bool) -> dict[str, float] | None:
    """Means over layers and heads of every `HeadMeans` field; None where no query stands beyond the receptive field."""
    sets = [layer.beyond_receptive_field if beyond else layer.all_queries for layer in layers]
    names = [f.name for f in fields(HeadMeans) if f.name != "queries"]
    values = {name: [x for s in sets if s is not None for x in getattr(s, name)] for name in names}
    if not all(values.values()):
        return None
    return {name: sum(x) / len(x) for name, x in values.items()}
