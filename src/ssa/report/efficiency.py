"""What things cost: measured times from benchmark files, and where sparse attention overtakes dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ssa.report.charts import line_figure
from ssa.report.collect import Benchmark
from ssa.report.measurements import DENSE_COLOURS, about, other_tables, records_table, times_chart
from ssa.report.page import Cell, Section, table
from ssa.report.svg import Series, number, tokens

_PASSES = (("forward", "Forward"), ("both", "Forward and backward"))


def efficiency(benchmarks: Sequence[Benchmark]) -> Section:
    """Files of times: kernels beside dense attention as charts and tables, others as tables of what they measured, and their bars."""
    tables: list[str] = []
    pictures: list[str] = []
    for benchmark in benchmarks:
        if _is_of_kernels(benchmark):
            tables += [made for way in ("launches", "graph") if (made := _kernel_table(benchmark, way))]
            pictures += _kernel_charts(benchmark)
        else:
            tables.append(records_table(benchmark.name, about(benchmark), benchmark.content["rows"]))
            pictures += times_chart(benchmark.name, benchmark.content["rows"])
        if bars := _bars(benchmark):
            tables.append(bars)
        tables += other_tables(benchmark)
    return Section(
        "Efficiency", "Times as the benchmarks measured them, each on the hardware that its table names.", tables, pictures
    )


def crossover(lengths: Sequence[int], dense: Sequence[float], sparse: Sequence[float]) -> float | None:
    """Tokens from which sparse is faster, between the measured lengths on logarithmic scales; 0 where it always is, None where never."""
    faster = [s < d for d, s in zip(dense, sparse, strict=True)]
    if not faster[-1]:
        return None
    last_slower = max((i for i, x in enumerate(faster) if not x), default=None)
    if last_slower is None:
        return 0.0
    a, b = last_slower, last_slower + 1
    lead = [math.log(sparse[i] / dense[i]) for i in (a, b)]
    share = lead[0] / (lead[0] - lead[1])
    return math.exp(math.log(lengths[a]) + share * (math.log(lengths[b]) - math.log(lengths[a])))


def is_timed(benchmark: Benchmark) -> bool:
    """Whether the file holds times of this project's kernels, decoding or training."""
    return bool(benchmark.content.get("rows")) and ("suite" in benchmark.content or _is_of_kernels(benchmark))


def _is_of_kernels(benchmark: Benchmark) -> bool:
    return all(_is_kernel_row(row) for row in benchmark.content["rows"])


def _is_kernel_row(row: dict[str, Any]) -> bool:
    """Passes over whole sequences; decoding steps have other times."""
    return (
        isinstance(row.get("dense"), dict)
        and isinstance(_ours(row), dict)
        and any(name in _ours(row) for name, _ in _PASSES)
        and isinstance(row.get("tokens"), int)
        and "shape" in row
    )


def _ours(row: dict[str, Any]) -> Any:
    return row.get("ours", row.get("sparse"))


def _ms(times: Any, name: str, way: str = "launches") -> float | None:
    """A time in ms, given as a number (of launched kernels) or by the way it was taken; None where it was not measured."""
    found = times.get(name) if isinstance(times, dict) else None
    if isinstance(found, dict):
        found = found.get(way)
    elif way != "launches":
        found = None
    return float(found) if isinstance(found, int | float) and found > 0 else None


def _kernel_table(benchmark: Benchmark, way: str) -> str:
    """ "" where nothing was timed that way."""
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    for row in benchmark.content["rows"]:
        cells: list[Cell | str] = [tokens(row["tokens"])]
        for name, _ in _PASSES:
            dense = [x for backend in row["dense"].values() if (x := _ms(backend, name, way)) is not None]
            ours = _ms(_ours(row), name, way)
            cells += ["–" if not dense else f"{min(dense):.3f}", "–" if ours is None else f"{ours:.3f}"]
            ratio = min(dense) / ours if dense and ours else None
            cells.append(Cell("–" if ratio is None else f"{ratio:.2f}x", ratio is not None and ratio > 1))
        rows.append((str(row["shape"]), cells))
    if all(cell == "–" for _, cells in rows for cell in (*cells[1:3], *cells[4:6])):
        return ""
    note = (
        f"Milliseconds; dense is the fastest backend measured, sparse includes selection; tinted where sparse is faster. {about(benchmark)}"
        if way == "launches"
        else "The same replayed as captured CUDA graphs, without the time that launching kernels takes the host."
    )
    head = [
        "shape",
        "tokens",
        "dense, forward",
        "sparse, forward",
        "dense / sparse",
        "dense, both",
        "sparse, both",
        "dense / sparse",
    ]
    return table(f"Kernels{' in captured graphs' if way == 'graph' else ''} ({benchmark.name})", note, head, rows)


def _kernel_charts(benchmark: Benchmark) -> list[str]:
    pictures = []
    for shape in dict.fromkeys(str(row["shape"]) for row in benchmark.content["rows"]):
        rows = sorted((row for row in benchmark.content["rows"] if str(row["shape"]) == shape), key=lambda row: row["tokens"])
        for name, title in _PASSES:
            if picture := _kernel_chart(shape, name, title, rows):
                pictures.append(picture)
    return pictures


def _kernel_chart(shape: str, name: str, title: str, rows: Sequence[dict[str, Any]]) -> str | None:
    backends = list(dict.fromkeys(b for row in rows for b in row["dense"]))
    kinds = [("sparse", "var(--ssa)", "diamond", [_ms(_ours(row), name) for row in rows])]
    for i, backend in enumerate(backends):
        times = [_ms(row["dense"].get(backend), name) for row in rows]
        kinds.append((f"dense, {backend}", DENSE_COLOURS[min(i, len(DENSE_COLOURS) - 1)], "circle", times))
    series = []
    for label, colour, marker, times in kinds:
        points = [(row["tokens"], x) for row, x in zip(rows, times, strict=True) if x is not None]
        if points:
            series.append(Series(label, colour, [p[0] for p in points], [p[1] for p in points], marker=marker))
    if len({x for s in series for x in s.x}) < 2 or len(series) < 2:
        return None
    heading = f"{title}, {shape}"
    lengths = [row["tokens"] for row in rows]
    best = [min((x for _, _, _, times in kinds[1:] if (x := times[i]) is not None), default=None) for i in range(len(rows))]
    pairs = [(n, d, s) for n, d, s in zip(lengths, best, kinds[0][3], strict=True) if d is not None and s is not None]
    caption = "Both axes logarithmic. "
    if pairs:
        at = crossover([p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs])
        caption += (
            f"Not faster than the best dense backend up to {tokens(pairs[-1][0])} tokens." if at is None
            else f"Faster than the best dense backend at every length measured, from {tokens(pairs[0][0])} tokens." if at == 0
            else f"Overtakes the best dense backend at about {number(round(at / 100) * 100)} tokens."
        )  # fmt: skip
    axes: dict[str, Any] = {"xlabel": "tokens", "ylabel": "ms", "x_ticks": lengths, "x_format": tokens}
    return line_figure(series, heading, caption, log_x=True, log_y=True, **axes)


def _bars(benchmark: Benchmark) -> str:
    """What the benchmark promised and reached; times of launched kernels and, where they were taken, of captured graphs."""
    bars = benchmark.content.get("bars")
    if not (isinstance(bars, list) and bars and all(isinstance(b, dict) and {"name", "bar"} <= b.keys() for b in bars)):
        return ""
    ways = ["", "_graph"] if any("value_graph" in bar for bar in bars) else [""]
    rows: list[tuple[str, Sequence[Cell | str]]] = []
    for bar in bars:
        cells: list[Cell | str] = [f"{bar.get('sense', '')} {bar['bar']:g}".strip()]
        for way in ways:
            value, reached = bar.get(f"value{way}"), bar.get(f"reached{way}")
            verdict = "not measured" if reached is None else "reached" if reached else "missed"
            kind = "no" if reached is None else "yes" if reached else ""
            cells += ["–" if value is None else f"{value:.3g}", Cell(verdict, kind=kind)]
        rows.append((str(bar["name"]), cells))
    counts = [f"{sum(bar.get(f'reached{way}') is True for bar in bars)} of {len(bars)} reached" for way in ways]
    note = f"What the benchmark is to reach: {counts[0]}" + (f", {counts[1]} in captured graphs." if len(ways) > 1 else ".")
    head = ["", "bar", "value", "", *(["captured graph", ""] if len(ways) > 1 else [])]
    return table(f"Bars ({benchmark.name})", note, head, rows)
