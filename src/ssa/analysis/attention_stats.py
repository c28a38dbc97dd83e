"""An observer that sums the figures of every layer over all rows that a model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa.analysis.selection import BINS, LAGS, bit_length, distance_histogram, selection_overlap
from ssa.analysis.sparsity import AttentionFigures, attention_figures
from ssa.attention import AttentionCall, AttentionInputs, AttentionRecord
from ssa.budget import Budget, Rule, Scope, Scoring
from ssa.ops import select_blocks
from ssa.ops.documents import query_positions

BITS_PER_NAT = 1 / 0.6931471805599453


@dataclass(frozen=True)
class HeadMeans:
    """Means over a set of queries, one value per query head."""

    queries: int
    kept_mass: list[float]
    entropy_bits: list[float]
    entropy_nats: list[float]
    sink_mass_first: list[float]
    sink_mass_first_4: list[float]
    sink_mass_first_block: list[float]
    own_block_mass: list[float]
    output_error: list[float]


@dataclass(frozen=True)
class PositionMeans:
    """Means over heads of the queries whose document position is in a bin: 0, 1, 2-3, 4-7, ..."""

    first_position: list[int]
    """Where the bin starts; the next one ends it. Bins without queries are left out."""
    queries: list[int]
    kept_mass: list[float]
    entropy_bits: list[float]


@dataclass(frozen=True)
class Overlap:
    """NOSA's locality: the share of a query's blocks that the query `lag` tokens before it chose too. Pairs of queries of one
    document, both beyond the receptive field."""

    lags: list[int]
    pairs: list[int]
    gamma: list[list[float]]
    """By selector (kv head, or query head for head scope) and lag."""


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
    by_position: PositionMeans
    selected_blocks_mean: float
    own_block_share: float
    """Share of the selected blocks that is the query's own."""
    distance_histogram: list[int]
    """Selected blocks by the distance from the block's start to the query, in tokens: bin 0 is distance 0, bin b is
    2^(b-1) .. 2^b - 1."""
    distance_histogram_by_selector: list[list[int]]
    overlap: Overlap | None
    """None where no two queries beyond the receptive field follow one another."""
    theorem_1: TheoremOne


_MEANS = ("kept", "entropy", "sink_first", "sink_first_4", "first_block", "own_block", "error")
_ADDED = (
    "totals", "queries", "by_bin", "in_bin", "selections", "own", "checked", "violations", "histogram", "overlap", "pairs", "rows",
)  # fmt: skip
"""Of `LayerSums`: what two of them have together."""
Select = Callable[[int, AttentionRecord], Tensor]


def selection_by_rule(scope: Scope = "group", scoring: Scoring = "softmax", rule: Rule = "exact") -> Select:
    """What `ssa.ops.select_blocks` chooses from a record's q and k."""

    def select(layer: int, record: AttentionRecord) -> Tensor:
        selection = replace(record.selection, scope=scope, scoring=scoring, rule=rule)
        return select_blocks(record.q_BTHD, record.k_BSKD, selection, positions=record.positions_BT)[0]

    return select


def selection_of(model: Any) -> Select:
    """What an `SSAForCausalLM` would choose from a record's q and k if it attended sparsely."""

    def select(layer: int, record: AttentionRecord) -> Tensor:
        call = AttentionCall("sparse", record.selection, positions_BT=record.positions_BT, impl=model.model.impl)
        inputs = AttentionInputs(record.q_BTHD, record.k_BSKD, record.v_BSKD, bias_BSK=record.bias_BSK)
        return model.model.layers[layer].self_attn.selector.select(inputs, call)

    return select


class SparsityMeter:
    """An observer: `model(..., observer=meter)` as often as there are rows, then `meter.layers()`.

    Under full inference, where the model selects nothing, `select(layer, record)` does on the same q and k. Several meters can read a
    part of the rows each, after `skip` of those before it, and one of them `add` the others' `sums`: the figures of one meter, rounding aside.
    """

    def __init__(
        self, select: Select | None = None, *, points: int = 200, seed: int = 0, tile: int | None = None, beyond: int | None = None,
    ) -> None:  # fmt: skip
        """beyond: the document position from which on queries are "beyond the receptive field"; each layer's own k * s if left out."""
        self.beyond = beyond
        self.select = selection_by_rule() if select is None else select
        self.points, self.seed, self.tile = points, seed, tile
        self.sums: dict[int, LayerSums] = {}
        """What is known of each layer so far."""
        self._skipped = 0

    def skip(self, rows: int) -> None:
        """The next `rows` rows are read by another meter."""
        self._skipped += rows

    def add(self, sums: dict[int, LayerSums]) -> None:
        """The `sums` of a meter that has read other rows."""
        for layer, other in sums.items():
            if layer in self.sums:
                self.sums[layer].join(other)
            else:
                self.sums[layer] = other

    @torch.no_grad()
    def __call__(self, layer: int, record: AttentionRecord) -> None:
        index = self.select(layer, record) if record.block_indices is None else record.block_indices
        figures = attention_figures(
            record.q_BTHD, record.k_BSKD, record.v_BSKD, index, block_size=record.selection.block_size,
            positions=record.positions_BT, bias=record.bias_BSK, tile=self.tile,
        )  # fmt: skip
        position_BT = query_positions(record.q_BTHD, record.k_BSKD, record.positions_BT)
        if layer not in self.sums:
            self.sums[layer] = LayerSums(record.q_BTHD.shape[2], index.shape[1], self.points, (self.seed, layer))
        self.sums[layer].add(figures, index, position_BT, record.selection.budget, self._skipped, self.beyond)

    def layers(self) -> list[LayerFigures]:
        """The means so far, in the order of the layers."""
        return [self.sums[layer].figures(layer) for layer in sorted(self.sums)]


class LayerSums:
    """Sums of one layer, in fp64 on the CPU."""

    def __init__(self, heads: int, selectors: int, points: int, seed: tuple[int, ...]) -> None:
        self.totals = torch.zeros(2, len(_MEANS), heads, dtype=torch.float64)  # [all | beyond, figure, head]
        self.queries = torch.zeros(2, dtype=torch.int64)
        self.by_bin = torch.zeros(BINS, 2, dtype=torch.float64)  # kept, entropy, summed over heads
        self.in_bin = torch.zeros(BINS, dtype=torch.int64)
        self.selections = self.own = self.checked = self.violations = 0
        self.histogram = torch.zeros(selectors, BINS, dtype=torch.int64)
        self.overlap = torch.zeros(selectors, len(LAGS), dtype=torch.float64)
        self.pairs = torch.zeros(len(LAGS), dtype=torch.int64)
        self.rows, self.seed = 0, seed
        self.points, self.sample, self.sample_keys = points, torch.zeros(0, 3), torch.zeros(0, dtype=torch.float64)

    def add(
        self, figures: AttentionFigures, index_BRTM: Tensor, position_BT: Tensor, budget: Budget, skipped: int, beyond: int | None = None
    ) -> None:  # fmt: skip
        """One pass; `skipped`: rows before it that are not added here; `beyond`: see `SparsityMeter`."""
        beyond_BT = position_BT >= (budget.tokens if beyond is None else beyond)
        for i, name in enumerate(_MEANS):
            each = getattr(figures, name).double()
            self.totals[0, i] += each.sum((0, 1)).cpu()
            self.totals[1, i] += each[beyond_BT].sum(0).cpu()
        self.queries += torch.tensor([beyond_BT.numel(), int(beyond_BT.sum())])
        self._add_positions(figures, position_BT)
        self.histogram += distance_histogram(index_BRTM, position_BT, budget.block_size).cpu()
        overlap, pairs = selection_overlap(index_BRTM, position_BT, budget.tokens)
        self.overlap, self.pairs = self.overlap + overlap.cpu(), self.pairs + pairs.cpu()
        self.selections += index_BRTM[..., 0].numel()
        self.own += int((index_BRTM == (position_BT // budget.block_size)[:, None, :, None]).sum())
        self.checked += figures.error.numel()
        self.violations += int(figures.violated.sum())
        points_BTH3 = torch.stack([figures.dropped, figures.error, figures.bound], -1)
        for points_TH3, beyond_T in zip(points_BTH3, beyond_BT, strict=True):
            self._draw(points_TH3[beyond_T].flatten(0, 1), self.rows + skipped)
            self.rows += 1

    def join(self, other: LayerSums) -> None:
        """Add the sums over other rows."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._keep(other.sample, other.sample_keys)

    def _add_positions(self, figures: AttentionFigures, position_BT: Tensor) -> None:
        bin_BT = bit_length(position_BT)
        both_BT2 = torch.stack([figures.kept, figures.entropy], -1).double().sum(2)
        for b in bin_BT.unique().tolist():
            inside = bin_BT == b
            self.by_bin[b] += both_BT2[inside].sum(0).cpu()
            self.in_bin[b] += int(inside.sum())

    def _draw(self, points: Tensor, row: int) -> None:
        """Every point draws a key, the same whoever reads the row; fp64, because among millions of points fp32 keys tie."""
        drawn = torch.from_numpy(np.random.default_rng((*self.seed, row)).random(len(points)))
        best = drawn.topk(min(self.points, len(drawn))).indices
        self._keep(points[best.to(points.device)].float().cpu(), drawn[best])

    def _keep(self, points: Tensor, keys: Tensor) -> None:
        """The largest keys stay: a uniform sample over all rows."""
        keys, sample = torch.cat([self.sample_keys, keys]), torch.cat([self.sample, points])
        best = keys.topk(min(self.points, len(keys))).indices
        self.sample, self.sample_keys = sample[best], keys[best]

    def figures(self, layer: int) -> LayerFigures:
        selected = int(self.histogram.sum())
        histogram = self.histogram[:, : int(self.histogram.sum(0).nonzero().max()) + 1]
        return LayerFigures(
            layer=layer,
            all_queries=self._means(0),
            beyond_receptive_field=self._means(1) if int(self.queries[1]) else None,
            by_position=self._positions(),
            selected_blocks_mean=selected / (self.selections),
            own_block_share=self.own / selected,
            distance_histogram=histogram.sum(0).tolist(),
            distance_histogram_by_selector=histogram.tolist(),
            overlap=self._overlap(),
            theorem_1=TheoremOne(self.checked, self.violations, self.sample.tolist()),
        )

    def _means(self, which: int) -> HeadMeans:
        kept, entropy, *rest = (self.totals[which] / self.queries[which]).tolist()
        return HeadMeans(int(self.queries[which]), kept, [x * BITS_PER_NAT for x in entropy], entropy, *rest)

    def _positions(self) -> PositionMeans:
        bins = self.in_bin.nonzero().squeeze(-1).tolist()
        means = (self.by_bin[bins] / (self.in_bin[bins, None] * self.totals.shape[-1])).T
        return PositionMeans(
            [0 if b == 0 else 2 ** (b - 1) for b in bins],
            self.in_bin[bins].tolist(),
            means[0].tolist(),
            (means[1] * BITS_PER_NAT).tolist(),
        )

    def _overlap(self) -> Overlap | None:
        known = self.pairs > 0
        if not bool(known.any()):
            return None
        lags = torch.tensor(LAGS)[known].tolist()
        return Overlap(lags, self.pairs[known].tolist(), (self.overlap[:, known] / self.pairs[known]).tolist())


def mean_figures(layers: list[LayerFigures], beyond: bool) -> dict[str, float] | None:
    """Means over layers and heads of every `HeadMeans` field; None where no query stands beyond the receptive field."""
    sets = [layer.beyond_receptive_field if beyond else layer.all_queries for layer in layers]
    names = [f.name for f in fields(HeadMeans) if f.name != "queries"]
    values = {name: [x for s in sets if s is not None for x in getattr(s, name)] for name in names}
    if not all(values.values()):
        return None
    return {name: sum(x) / len(x) for name, x in values.items()}
