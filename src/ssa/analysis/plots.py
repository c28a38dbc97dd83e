"""One picture about several runs, for a README, by matplotlib (without pyplot: no window system and no global state). The pictures of the
report are drawn by `ssa.report`, without matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.analysis.results import BudgetPerplexity, RunResults, losses
from ssa.errors import UserError
from ssa.methods import look_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2b2f36"
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v"}


def require_matplotlib() -> None:
    """Raises a `UserError` that says what to install, before any work is done."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError('the summary picture needs matplotlib: pip install "sparse-sparse-attention[plots]"') from None


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
        "svg.fonttype": "none", "figure.constrained_layout.use": True, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield


def perplexity_by_budget(results: Sequence[RunResults], axes: Axes) -> None:
    """Perplexity over the budgets that were evaluated, in the order of their size; full attention comes last."""
    budgets = [budget for _, budget in sorted({(p.tokens, p.budget) for run in results for p in run.perplexity})]
    for run, look in zip(results, _looks(results), strict=True):
        at: dict[str, BudgetPerplexity] = {p.budget: p for p in run.perplexity}
        x = [i for i, budget in enumerate(budgets) if budget in at]
        if x:
            axes.plot(x, [at[budgets[i]].perplexity for i in x], **look, marker=_marker(run.method))
    axes.set_xticks(range(len(budgets)), budgets, rotation=0 if sum(map(len, budgets)) < 28 else 35)
    axes.set(xlabel="budget (blocks x block size)", ylabel="perplexity", xlim=(-0.3, len(budgets) - 0.7))


def kept_by_layer(results: Sequence[RunResults], axes: Axes) -> None:
    """Kept mass by layer, mean over heads: solid under sparse, dotted under full inference."""
    for run, look in zip(results, _looks(results), strict=True):
        values = run.by_layer("sparse", "kept_mass")
        layers = range(1, len(values) + 1)
        axes.plot(layers, values, **look, marker=_marker(run.method))
        axes.plot(layers, run.by_layer("full", "kept_mass"), **(look | {"linestyle": (0, (2, 2)), "linewidth": 1.2}))
    axes.set(xlabel="layer", ylabel="attention mass kept by the selection")
    _few_ticks(axes, integer=True, min_n_ticks=1)


def gap_bars(results: Sequence[RunResults], axes: Axes) -> None:
    """Loss under sparse minus loss under full attention, nats a token, one bar a run."""
    gaps = [loss.gap for loss in losses(results)[0]]
    rows = range(len(results))
    axes.barh(rows, gaps, height=0.6, color=[look["color"] for look in _looks(results)])
    axes.set_yticks(rows, [_label(run.name) for run in results])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    widest = max(map(abs, gaps)) or 1.0
    for row, gap in zip(rows, gaps, strict=True):
        axes.annotate(f"{gap:+.4f}", (max(gap, 0), row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(min(0, min(gaps)) * 1.15, max(0, max(gaps)) + 0.4 * widest)
    _few_ticks(axes, nbins=4)  # longer numbers than these have no room beside each other
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
        kept_by_layer(results, axes[0])
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


def _looks(results: Sequence[RunResults]) -> list[dict[str, Any]]:
    """Colour by method; runs of the same method differ in shade."""
    seen: dict[str, int] = {}
    looks = []
    for run in results:
        again = seen[run.method] = seen.get(run.method, -1) + 1
        colour = _shade(look_of(run.method)[0][0], again)
        looks.append({"color": colour, "label": _label(run.name)})
    return looks


def _shade(colour: str, again: int) -> str:
    """`colour`, mixed with grey a little more for each run of the method before this one."""
    mix = min(0.75, 0.32 * again)
    channels = [round(int(colour[i : i + 2], 16) * (1 - mix) + 0xA0 * mix) for i in (1, 3, 5)]
    return "#" + "".join(f"{c:02x}" for c in channels)


def _marker(method: str) -> str:
    return MARKERS[look_of(method)[1]]


def _few_ticks(axes: Axes, **options: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(**options))


def _label(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves names with an underscore out of legends


def _legend(figure: Figure, results: Sequence[RunResults]) -> None:
    """One line and marker a run, below the picture."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look, marker=_marker(run.method)) for run, look in zip(results, _looks(results), strict=True)]
    # About as many characters as fit below a picture of this width; a handle takes the room of seven.
    widest = max(len(run.name) for run in results) + 7
    columns = max(1, min(len(handles), int(12 * figure.get_figwidth()) // widest))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
