"""What the attention of the runs does: the figures of `ssa analyze`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssa.analysis.results import RunResults, losses
from ssa.analysis.table import table_rows
from ssa.methods import full_notes
from ssa.report.charts import heat_figure, line_figure, marked, step_figure
from ssa.report.page import Cell, Section, figure, table
from ssa.report.svg import scatter, tokens

MAP_POINTS = 1500
"""A scatter plot shows so many points at most, taken at even steps."""
Named = Sequence[tuple[RunResults, str]]
_POSITION = "position in the document (from)"
_SOLID = "Solid: sparse inference; dashed: full inference (where they coincide only one shows)."


def attention(named: Named) -> list[Section]:
    """Sections from the analyses of runs, each with its colour."""
    if not named:
        return []
    results = [run for run, _ in named]
    which = "queries beyond the receptive field" if any(run.beyond for run in results) else "all queries"
    measured = results[0].analysis["measured"]
    intro = (
        f"{measured['tokens']:,} tokens of {measured['data']} in rows of {measured['context']}. Mean over heads and {which} "
        "(below the receptive field everything is selected, and the kept mass is 1 by construction)."
    )
    if any(run.analysis["measured"] != measured for run in results):
        intro = "The runs were analysed on different texts or lengths: their figures do not compare. " + intro
    for note in sorted({note for run in results for note in full_notes(run.method)}):
        intro += f" {note}."
    if not any(run.beyond for run in results):
        intro = (
            "Nothing was left out: no query stands beyond the budget, so sparse and full attention read the same. Analyse a longer context "
            "or a smaller budget to see a difference. " + intro
        )
    overview = Section("What the selection keeps", intro, [_table(results)], [p for p in _overview(named) if p])
    return [overview, _maps(named), _theorem(named), _selection(named)]


def theorem_notes(results: Sequence[RunResults]) -> list[str]:
    """A line of alarm where Theorem 1's bound does not hold."""
    violations, checked = (sum(x) for x in zip(*(run.violations() for run in results), strict=True))
    return [f"Theorem 1 is violated at {violations} of {checked} points: the numbers cannot be right."] if violations else []


def _table(results: Sequence[RunResults]) -> str:
    rows: list[tuple[str, Sequence[Cell | str]]] = [
        (heading, [Cell(cell, i == best) for i, cell in enumerate(cells)]) for heading, cells, best in table_rows(results)
    ]
    note = f"The paper's Table A9 and more. {losses(results)[1]} KL over all tokens; entropy and sink under full inference. The best of a row is tinted."
    return table("Full against sparse attention", note, ["", *(run.name for run in results)], rows)


def _overview(named: Named) -> list[str | None]:
    return [
        _by_layer(named, "kept_mass", "Kept attention mass by layer", "kept mass",
                  f"Share of the full-attention weight on the selected blocks. {_SOLID} 1 means that nothing that matters was left out."),
        _by_layer(named, "entropy_bits", "Entropy of full attention by layer", "entropy (bits)",
                  f"How widely attention spreads: b bits is as wide as uniform attention over 2ᵇ tokens. {_SOLID}"),
        _by_layer(named, "sink_mass_first", "Attention on the first token by layer", "attention mass",
                  f"Share of full-attention weight on the document's first token, the usual sink. {_SOLID}"),
        _by_layer(named, "sink_mass_first_block", "Attention on the first block by layer", "attention mass",
                  f"The same for the document's first block. {_SOLID}"),
        _by_position(named, "kept_mass", "Kept mass by position", "kept mass",
                     "By position of the query in its document, from 2ᵇ to 2ᵇ⁺¹ − 1, mean over layers and heads, sparse inference. Longer "
                     "contexts are harder to keep with the same budget."),
        _by_position(named, "entropy_bits", "Entropy by position", "entropy (bits)", "The same for the entropy of full attention."),
        _divergence(named),
    ]  # fmt: skip


def _by_layer(named: Named, name: str, title: str, label: str, caption: str) -> str | None:
    series, shown = [], []
    for run, colour in named:
        for mode in ("sparse", "full"):
            try:
                values = run.by_layer(mode, name)
            except KeyError:  # an analysis from before this figure was measured
                continue
            layers = list(range(1, len(values) + 1))
            series.append(marked(f"{run.name}, {mode}", run.method, colour, layers, values, dashed=mode == "full"))
            shown.append((run.name, colour))
    most = max((len(s.x) for s in series), default=1)
    ticks = range(1, most + 1, 1 + (most - 1) // 12)
    return line_figure(series, title, caption, legend=shown, xlabel="layer", ylabel=label, x_ticks=ticks)


def _by_position(named: Named, name: str, title: str, label: str, caption: str) -> str | None:
    series = []
    for run, colour in named:
        layers = run.analysis["inference"]["sparse"]["layers"]
        if not all("by_position" in layer for layer in layers):
            continue
        first = layers[0]["by_position"]["first_position"]
        values = [sum(layer["by_position"][name][i] for layer in layers) / len(layers) for i in range(len(first))]
        start = next((i for i, p in enumerate(first) if p >= 16), 0)
        if len(first) - start > 1:
            series.append(marked(run.name, run.method, colour, first[start:], values[start:]))
    return step_figure(series, title, caption, tokens, xlabel=_POSITION, ylabel=label)


def _divergence(named: Named) -> str | None:
    series = []
    for run, colour in named:
        found = run.analysis["predictions"].get("by_position")
        if found is None:
            continue
        start = next((i for i, p in enumerate(found["first_position"]) if p >= 16), 0)
        if len(found["kl_nats"]) - start > 1:
            series.append(marked(run.name, run.method, colour, found["first_position"][start:], found["kl_nats"][start:]))
    caption = "KL(full ‖ sparse) of the next-token distribution. It is 0 while the budget covers everything before the query."
    return step_figure(series, "Divergence of the predictions by position", caption, tokens, xlabel=_POSITION, ylabel="KL (nats)")


def _maps(named: Named) -> Section:
    pictures = []
    for name, title, low_fixed in (("kept_mass", "Kept mass", False), ("entropy_bits", "Entropy, bits", False), ("sink_mass_first", "Mass on the first token", True)):  # fmt: skip
        values = [x for run, _ in named for row in run.heads("sparse", name) for x in row]
        low, high = (
            (0.0, _round_up(max(values))) if low_fixed else (math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10)
        )
        for run, _ in named:
            rows = run.heads("sparse", name)
            heads, layers = ([str(i + 1) for i in range(n)] for n in (len(rows[0]), len(rows)))
            picture = heat_figure(
                rows, f"{title}, {run.name}", row_names=layers, column_names=heads, row_label="layer", column_label="query head", low=low,
                high=high if high > low else low + 0.1, digits=1 if name == "entropy_bits" else 3 if high < 0.1 else 2,
            )  # fmt: skip
            pictures.append(picture)
    intro = (
        "Every cell is one query head of one layer under sparse inference; the colour scale of a figure is the same for all runs. Dark "
        "cells in the maps of kept mass are heads whose attention the selection misses."
    )
    return Section("Layers and heads", intro, [], pictures)


def _round_up(value: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, ..."""
    if value <= 0:
        return 0.1
    size = 10.0 ** math.floor(math.log10(value))
    return next(m * size for m in (1, 2, 5, 10) if m * size >= value * 0.999)


def _theorem(named: Named) -> Section:
    pictures = []
    for run, _ in named:
        layers = run.analysis["inference"]["sparse"]["layers"]
        samples = [layer["theorem_1"]["points"] if "theorem_1" in layer else [] for layer in layers]
        points = [[(p[2], p[1]) for p in sample if p[1] > 0 and p[2] > 0] for sample in samples]
        stride = max(1, math.ceil(sum(map(len, points)) / MAP_POINTS))
        groups = []
        for i, of_layer in enumerate(points):
            if of_layer:
                hue = round(210 + 190 * i / max(1, len(points) - 1)) % 360
                groups.append((f"layer {i + 1}", f"hsl({hue} 60% 52%)", of_layer[::stride]))
        if not groups:
            continue
        violations, checked = run.violations()
        svg = scatter(
            groups,
            title=f"Theorem 1, {run.name}",
            xlabel="bound of Theorem 1",
            ylabel="error  ‖h_full − h_sparse‖",
            diagonal=True,
        )
        ends = [(groups[0][0], groups[0][1])] + ([(groups[-1][0], groups[-1][1])] if len(groups) > 1 else [])
        pictures.append(figure(run.name, svg, f"{checked:,} points checked, {violations} above the bound.", ends))
    intro = (
        "Each point is one query and head: the distance between full and sparse attention output against the bound "
        "δ·(‖v‖max + ‖h_sparse‖), where δ is the dropped attention mass. Every point must lie on or below the line; the further to the "
        "lower left, the closer sparse attention is to full."
    )
    return Section("Theorem 1", intro, [], pictures)


def _selection(named: Named) -> Section:
    series, bins = [], 0
    for run, colour in named:
        layers = [layer["distance_histogram"] for layer in run.analysis["inference"]["sparse"]["layers"]]
        width = max(map(len, layers))
        bins, total = max(bins, width), sum(map(sum, layers))
        share = [100 * sum(h[i] for h in layers if i < len(h)) / total for i in range(width)]
        series.append(marked(run.name, run.method, colour, list(range(width)), share))
    distance = line_figure(
        series, "Distance of selected blocks",
        "How far the first token of a selected block lies behind the query, in powers of two. The left side is the query's own "
        "block, which is always read; weight on the right means that the model looks far back.",
        xlabel="distance to the block's start (tokens, from)", ylabel="% of selected blocks",
        categories=["0" if b == 0 else tokens(2 ** (b - 1)) for b in range(bins)], range_y=(0.0, None),
    )  # fmt: skip
    tables = [t for t in (_decode(named),) if t]
    return Section("Which blocks are chosen", "", tables, [p for p in (distance, _overlap(named)) if p])


def _overlap(named: Named) -> str | None:
    series = []
    for run, colour in named:
        layers = [layer["overlap"] for layer in run.analysis["inference"]["sparse"]["layers"] if layer.get("overlap")]
        if layers:
            lags = layers[0]["lags"]
            gamma = [
                sum(sum(row[i] for row in x["gamma"]) / len(x["gamma"]) for x in layers) / len(layers) for i in range(len(lags))
            ]
            series.append(marked(run.name, run.method, colour, lags, gamma))
    caption = (
        "NOSA's γ: the share of a query's blocks that an earlier query of the same document chose too, both beyond the receptive field; "
        "mean over layers and selectors. What is missing to 1 would have to be fetched if keys and values lay in slower memory."
    )
    labels = {"xlabel": "tokens between the two queries", "ylabel": "locality γ"}
    return step_figure(series, "Selection overlap between queries", caption, str, range_y=(None, 1.0), **labels)


def _decode(named: Named) -> str | None:
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    for run, _ in named:
        found = run.analysis.get("decode")
        if found:
            layers = [sum(row) / len(row) for row in found["gamma"]]
            values = [f"{sum(layers) / len(layers):.3f}", f"{min(layers):.3f}", f"{max(layers):.3f}"]
            rows.append((run.name, [*values, str(found["prompt_tokens"]), str(found["steps"])]))
    if not rows:
        return None
    note = "γ between one step of greedy decoding and the next: the share of a step's blocks that the step before chose too, by layer."
    return table("Locality while decoding", note, ["run", "mean γ", "least layer", "most layer", "prompt tokens", "steps"], rows)
