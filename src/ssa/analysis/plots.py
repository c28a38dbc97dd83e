"""The pictures of a report. Every function returns a matplotlib `Figure`, or None where there is nothing to draw.

Figures are made without pyplot, so no window system and no global state is involved. Ink is one colour, `INK`, which a page can
replace by its own text colour; backgrounds are transparent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.analysis.results import BudgetPerplexity, NeedleGrid, RunResults, curve
from ssa.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2b2f36"
COLOURS = {"full": "#3a7fc1", "moba": "#e69f00", "nsa": "#009e73", "ssa": "#d55e00"}
"""Fixed per method; told apart by all common kinds of colour blindness, and each has a marker of its own besides."""
MARKERS = {"full": "o", "moba": "s", "nsa": "^", "ssa": "D"}
OTHER_COLOUR, OTHER_MARKER = "#8a63a8", "v"
MAP = "cividis"
ANNOTATED_CELLS = 64  # a heat map with more cells carries no numbers


def require_matplotlib() -> None:
    """Raises a `UserError` that says what to install, before any work is done."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            'the report\'s pictures need matplotlib: pip install "sparse-sparse-attention[plots]", or leave the report out (html=False)'
        ) from None


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib settings that hold while figures are made and while they are saved."""
    import matplotlib

    settings: dict[str, Any] = {
        "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": INK, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.14, "grid.linewidth": 0.6, "xtick.major.width": 0.6,
        "ytick.major.width": 0.6, "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False, "text.parse_math": False,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "none",
        "svg.hashsalt": "ssa", "figure.constrained_layout.use": True, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield


def training_loss(results: Sequence[RunResults]) -> Figure | None:
    """Cross-entropy by step, smoothed, over the raw curve."""
    return _curves(results, "cross-entropy (nats / token)", ("cross_entropy",), fallback=("loss",))


def alignment_loss(results: Sequence[RunResults]) -> Figure | None:
    """Sparsity + commitment loss by step, on a logarithmic axis."""
    return _curves(results, "sparsity + commitment loss", ("sparsity_loss", "commitment_loss"), log=True)


def validation_loss(results: Sequence[RunResults]) -> Figure | None:
    """Validation loss by step: solid sparse, dashed full. None unless a run was validated at least twice."""
    lines = []
    for run, look in zip(results, _looks(results), strict=True):
        for mode, dashes in (("sparse", "-"), ("full", "--")):
            steps, values = _validation(run, mode)
            if len(steps) > 1:
                lines.append((steps, values, {**look, "linestyle": dashes}))
    if not lines:
        return None
    figure, axes = _figure()
    for steps, values, look in lines:
        axes.plot(steps, values, **look)
    axes.set(xlabel="step", ylabel="validation loss (nats / token)")
    _legend(figure, results)
    return figure


def perplexity_by_budget(results: Sequence[RunResults], axes: Axes | None = None) -> Figure | None:
    """Perplexity over the budgets that were evaluated, in the order of their size; full attention comes last."""
    known = {(p.tokens, p.budget) for run in results for p in run.perplexity}
    if len(known) < 2:
        return None
    budgets = [budget for _, budget in sorted(known)]
    figure, axes = _figure() if axes is None else (None, axes)
    for run, look in zip(results, _looks(results), strict=True):
        at: dict[str, BudgetPerplexity] = {p.budget: p for p in run.perplexity}
        x = [i for i, budget in enumerate(budgets) if budget in at]
        if x:
            axes.plot(x, [at[budgets[i]].perplexity for i in x], **look, marker=_marker(run.method))
    axes.set_xticks(range(len(budgets)), budgets, rotation=0 if sum(map(len, budgets)) < 28 else 35)
    axes.set(xlabel="budget (blocks x block size)", ylabel="perplexity", xlim=(-0.3, len(budgets) - 0.7))
    if figure is not None:
        _legend(figure, results)
    return figure


def by_layer(
    results: Sequence[RunResults], name: str, label: str, axes: Axes | None = None, top: float | None = None
) -> Figure | None:
    """A `HeadMeans` field by layer, mean over heads: solid under sparse, dashed under full inference."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure() if axes is None else (None, axes)
    for run, look in zip(results, _looks(results), strict=True):
        layers = range(1, len(run.by_layer("sparse", name)) + 1)
        axes.plot(layers, run.by_layer("sparse", name), **look, marker=_marker(run.method))
        axes.plot(layers, run.by_layer("full", name), **(look | {"linestyle": (0, (2, 2)), "linewidth": 1.2}))
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high if top is None else max(top, high))
    if figure is not None:
        _legend(figure, results)
    return figure


def head_map(run: RunResults, name: str, label: str, low: float, high: float) -> Figure:
    """Heat map layers x heads of a `HeadMeans` field under sparse inference; `low`..`high` is the colour scale."""
    rows = run.heads("sparse", name)
    return _heat_map(
        rows,
        "query head",
        "layer",
        label,
        [str(i + 1) for i in range(len(rows[0]))],
        [str(i + 1) for i in range(len(rows))],
        low,
        high,
    )


def needle_map(grid: NeedleGrid) -> Figure:
    """Heat map depth x length of needle accuracy, 0..1."""
    rows = [[math.nan if x is None else x for x in row] for row in grid.accuracy]
    depths = [f"{100 * d:.0f} %" for d in grid.depths]
    return _heat_map(rows, "length (tokens)", "depth of the needle", "accuracy", [str(n) for n in grid.lengths], depths, 0, 1)


def theorem_scatter(run: RunResults) -> Figure | None:
    """Error against bound of sampled queries under sparse inference, log-log; the diagonal is the bound itself."""
    layers = run.analysis["inference"]["sparse"]["layers"]
    points = [
        (bound, error, i) for i, layer in enumerate(layers) for _, error, bound in layer["theorem_1"]["points"] if error > 0
    ]
    if not points:
        return None
    bounds, errors, colours = zip(*points, strict=True)
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    layer_map = ListedColormap(colormaps["viridis"](range(45, 225)))  # without the ends that vanish on dark or on light pages
    figure, axes = _figure(height=3.4)
    dots = axes.scatter(
        bounds,
        errors,
        s=9,
        c=colours,
        cmap=layer_map,
        vmin=0,
        vmax=max(1, len(layers) - 1),
        alpha=0.6,
        linewidths=0,
        rasterized=True,
    )
    low, high = min(errors), max(bounds) * 1.5
    axes.plot([low, high], [low, high], color=INK, linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(min(bounds) / 1.5, high), ylim=(low / 1.5, high), xlabel="bound of Theorem 1", ylabel="error  ‖h_full − h_sparse‖")  # fmt: skip
    _plain_logarithm(axes.xaxis)
    _plain_logarithm(axes.yaxis)
    if len(layers) > 1:
        bar = figure.colorbar(dots, ax=axes, label="layer", ticks=sorted({0, (len(layers) - 1) // 2, len(layers) - 1}))
        bar.ax.set_yticklabels([str(t + 1) for t in sorted({0, (len(layers) - 1) // 2, len(layers) - 1})])
        assert bar.solids is not None
        bar.solids.set(alpha=1, rasterized=True)
        bar.outline.set_visible(False)
    return figure


def distance_histogram(results: Sequence[RunResults]) -> Figure:
    """Share of the selected blocks by distance between query and start of the block, in powers of two, under sparse inference."""
    figure, axes = _figure()
    bins = 0
    for run, look in zip(results, _looks(results), strict=True):
        layers = [layer["distance_histogram"] for layer in run.analysis["inference"]["sparse"]["layers"]]
        bins = max(bins, *map(len, layers))
        total = sum(map(sum, layers))
        share = [100 * sum(h[i] for h in layers if i < len(h)) / total for i in range(max(map(len, layers)))]
        axes.plot(range(len(share)), share, **look, marker=_marker(run.method))
    ticks = range(0, bins, 1 if bins < 9 else 2)
    axes.set_xticks(ticks, ["0" if b == 0 else _short(2 ** (b - 1)) for b in ticks])
    axes.set(xlabel="distance to the block's start (tokens, from)", ylabel="% of selected blocks")
    axes.set_ylim(bottom=0)
    _legend(figure, results)
    return figure


def gap_bars(results: Sequence[RunResults], axes: Axes) -> None:
    """Loss under sparse minus loss under full attention, nats a token, one bar a run."""
    gaps = [run.predictions["gap_nats"] for run in results]
    rows = range(len(results))
    axes.barh(rows, gaps, height=0.6, color=[look["color"] for look in _looks(results)])
    axes.set_yticks(rows, [_label(run.name) for run in results])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    widest = max(map(abs, gaps)) or 1.0
    for row, gap in zip(rows, gaps, strict=True):
        axes.annotate(f"{gap:+.3f}", (max(gap, 0), row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(min(0, min(gaps)) * 1.15, max(0, max(gaps)) + 0.3 * widest)
    axes.set(xlabel="loss, sparse − full (nats / token)")


def save_summary_picture(results: Sequence[RunResults], path: Path | str) -> Path:
    """One picture for a README: kept mass by layer, loss gap from full to sparse, perplexity by budget. PNG or SVG by suffix."""
    require_matplotlib()
    from matplotlib.figure import Figure

    if not results:
        raise UserError("the summary picture needs at least one run")
    path = Path(path)
    with style():
        panels = 3 if len({p.budget for run in results for p in run.perplexity}) > 1 else 2
        figure = Figure(figsize=(4.2 * panels, 3.7), facecolor="white")
        axes = figure.subplots(1, panels)
        by_layer(results, "kept_mass", "attention mass kept by the selection", axes[0])
        axes[0].set_title("What the selection keeps (dotted: full inference)")
        gap_bars(results, axes[1])
        axes[1].set_title("Cost of switching full → sparse")
        if panels == 3:
            perplexity_by_budget(results, axes[2])
            axes[2].set_title("Perplexity by budget")
        _legend(figure, results)
        scratch = path.with_name(f".{path.name}.tmp{path.suffix}")
        try:
            figure.savefig(scratch, dpi=160)
            scratch.replace(path)
        except (OSError, ValueError) as error:
            scratch.unlink(missing_ok=True)
            raise UserError(f"picture {path} cannot be written: {' '.join(str(error).split())}") from None
    return path


def _curves(
    results: Sequence[RunResults], label: str, names: tuple[str, ...], fallback: tuple[str, ...] = (), log: bool = False
) -> Figure | None:
    found = []
    for run, look in zip(results, _looks(results), strict=True):
        steps, values = curve(run.metrics, *names)
        if not steps and fallback:
            steps, values = curve(run.metrics, *fallback)
        if len(steps) > 1:
            found.append((run, steps, values, look))
    if not found:
        return None
    figure, axes = _figure()
    for _, steps, values, look in found:
        axes.plot(steps, values, color=look["color"], linewidth=0.7, alpha=0.3)
        axes.plot(steps, _smooth(values), **look)
    if log:
        axes.set_yscale("log")
        _plain_logarithm(axes.yaxis)
    axes.set(xlabel="step", ylabel=label)
    _legend(figure, [run for run, *_ in found], results)
    return figure


def _plain_logarithm(axis: Any) -> None:
    """Tick labels without mathtext, and between the decades too where there are few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0), numticks=8)
    )
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if 1e-3 <= x < 1e4 else f"{x:.0e}".replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a thirtieth of the curve, at both ends over what there is."""
    half = max(1, len(values) // 60)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def _validation(run: RunResults, mode: str) -> tuple[list[int], list[float]]:
    steps, values = curve([line for line in run.metrics if line.get("kind") == "valid"], mode)
    return (steps, values) if steps else curve(run.metrics, f"valid_{mode}")


def _heat_map(
    rows: Sequence[Sequence[float]], xlabel: str, ylabel: str, label: str, columns: list[str], names: list[str], low: float, high: float
) -> Figure:  # fmt: skip
    figure, axes = _figure(height=min(4.6, max(2.4, 1.3 + 0.24 * len(rows))))
    mesh = axes.pcolormesh(rows, cmap=MAP, vmin=low, vmax=high, edgecolors="none", rasterized=len(rows) * len(rows[0]) > 400)
    for positions, labels, place in (
        (range(len(columns)), columns, axes.set_xticks),
        (range(len(names)), names, axes.set_yticks),
    ):
        step = 1 + (len(labels) - 1) // 16
        place([i + 0.5 for i in positions][::step], labels[::step])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    bar = figure.colorbar(mesh, ax=axes, label=label)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=True)
    if len(rows) * len(rows[0]) <= ANNOTATED_CELLS:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    light = value < (low + high) / 2
                    axes.text(
                        j + 0.5,
                        i + 0.5,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        color="#ffffff" if light else "#111111",
                    )
    return figure


def _figure(width: float = 4.2, height: float = 3.1) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def run_colours(results: Sequence[RunResults]) -> list[str]:
    """The colour of every run, the same in all pictures of a report."""
    return [look["color"] for look in _looks(results)]


def _looks(results: Sequence[RunResults]) -> list[dict[str, Any]]:
    """Colour by method; runs of the same method differ in shade."""
    seen: dict[str, int] = {}
    looks = []
    for run in results:
        again = seen[run.method] = seen.get(run.method, -1) + 1
        colour = _shade(COLOURS.get(run.method, OTHER_COLOUR), again)
        looks.append({"color": colour, "label": _label(run.name)})
    return looks


def _shade(colour: str, again: int) -> str:
    """`colour`, mixed with grey a little more for each run of the method before this one."""
    mix = min(0.75, 0.32 * again)
    channels = [round(int(colour[i : i + 2], 16) * (1 - mix) + 0xA0 * mix) for i in (1, 3, 5)]
    return "#" + "".join(f"{c:02x}" for c in channels)


def _marker(method: str) -> str:
    return MARKERS.get(method, OTHER_MARKER)


def _label(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves names with an underscore out of legends


def _legend(figure: Figure, shown: Sequence[RunResults], results: Sequence[RunResults] | None = None) -> None:
    """One line and marker a run, below the picture; `results` are all runs of the report, which decide the colours."""
    from matplotlib.lines import Line2D

    results = shown if results is None else results
    looks = {run.name: look for run, look in zip(results, _looks(results), strict=True)}
    handles = [Line2D([], [], **looks[run.name], marker=_marker(run.method)) for run in shown]
    # About as many characters as fit below a picture of this width; a handle takes the room of seven.
    one_line = sum(len(run.name) + 7 for run in shown) < 12 * figure.get_figwidth()
    columns = len(handles) if one_line else max(1, int(12 * figure.get_figwidth()) // (max(len(run.name) for run in shown) + 7))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)
