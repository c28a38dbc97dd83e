"""Pictures from the JSON of `ssa bench kernels` (time over length, dense and sparse) and of `ssa bench decode --model` (tokens a second over
context, full and sparse)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ssa.checked_json import read_json
from ssa.errors import UserError
from ssa.files import check_directory

COLOURS = {
    "dense, cuDNN": "#444444",
    "full": "#444444",
    "sparse": "#c0392b",
    "16x16": "#c0392b",
    "32x32": "#2471a3",
    "16x64": "#1e8449",
}
DENSE = ("dense, cuDNN", "full")
SPARE_COLOURS = ("#8e44ad", "#d68910", "#117a65", "#884ea0")


def plot_results(results: Path, out: Path) -> Path:
    """Of kernels: a panel for each kind of heads and each pass, milliseconds of dense attention and of ours, selection included, over length. Of
    decoding: a panel for each number of rows that was measured at several contexts, tokens a second over context.

    Raises:
        UserError: no such file, not such a file, `out` cannot be written, or no matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError('ssa bench plot needs matplotlib: pip install "sparse-sparse-attention[plots]"') from None
    check_directory(out.parent)
    data = read_json(results)
    if isinstance(data, dict) and data.get("suite") == "decode steps":
        lines, title = _steps(results, data)
    else:
        lines, title = _kernels(results, data)
    pyplot.switch_backend("Agg")
    wide = max(map(len, lines))
    figure, axes = pyplot.subplots(len(lines), wide, figsize=(4.5 * wide, 3.4 * len(lines)), squeeze=False, layout="constrained")
    for row, panels in zip(axes, lines, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            spare = iter(SPARE_COLOURS)
            for name, points in panel.curves.items():
                lengths, values = zip(*sorted(points.items()), strict=True)
                colour = COLOURS.get(name) or next(spare, "#000000")
                axis.plot(lengths, values, "o--" if name in DENSE else "o-", label=name, color=colour, markersize=4)
            axis.set(xscale="log", yscale="log" if panel.log else "linear", title=panel.title, ylabel=panel.unit, xlabel="tokens")
            if not panel.log:
                axis.set_ylim(bottom=0)
            ticks = sorted({tokens for points in panel.curves.values() for tokens in points})
            axis.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)  # the same file for the same data
    except ValueError as error:
        raise UserError(f"--out {str(out)!r}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)
    return out


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    unit: str
    log: bool
    curves: dict[str, dict[int, float]]
    """{name: {tokens: value}}"""


def _kernels(results: Path, data: Any) -> tuple[list[list[Panel]], str]:
    """A line of panels for each kind of heads, and the picture's title."""
    curves, title = _curves(results, data)
    return [
        [
            Panel(f"{words}, heads {head}", "ms", True, {name: {n: ms[key] for n, ms in points.items()} for name, points in found.items()})
            for key, words in (("forward", "forward"), ("both", "forward + backward"))
        ]
        for head, found in curves.items()
    ], title  # fmt: skip


def _steps(results: Path, data: dict[str, Any]) -> tuple[list[list[Panel]], str]:
    """One line of panels, a panel for each number of rows, and the picture's title."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    try:
        for row in data["rows"]:
            if row["what"] == "decode":
                found.setdefault(row["batch"], {}).setdefault(row["mode"], {})[row["tokens"]] = row["tokens_per_s"]
        versions = data["versions"]
        title = f"{data['hardware']['device']}, torch {versions['torch']}, Triton {versions.get('triton', '?')}, {data['dtype']}"
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{results} is not the JSON of `ssa bench decode --model`: {type(error).__name__}: {error}") from None
    panels = [
        Panel(f"{batch} row{'s' * (batch > 1)}", "tokens/s", False, curves)
        for batch, curves in sorted(found.items())
        if max(map(len, curves.values())) > 1
    ]
    if not panels:
        raise UserError(f"{results} has no number of rows at several contexts to draw")
    return [panels], title


def _curves(results: Path, data: Any) -> tuple[dict[str, dict[str, dict[int, dict[str, float]]]], str]:
    """{heads: {curve: {tokens: {"forward", "both"}}}} of launched times, and the picture's title."""
    try:
        curves: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        for row in data["rows"]:
            heads, _, budget = row["shape"].partition(":")
            found = curves.setdefault(heads, {})
            for name, times in (("dense, cuDNN", row["dense"]["cudnn"]), (budget, row["ours"])):
                if "forward" in times:
                    found.setdefault(name, {})[row["tokens"]] = {key: times[key]["launches"] for key in ("forward", "both")}
        title = _title(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{results} is not the JSON of `ssa bench kernels`: {type(error).__name__}: {error}") from None
    if not curves:
        raise UserError(f"{results} has no rows to draw")
    return curves, title


def _title(data: dict[str, Any]) -> str:
    versions = data["versions"]
    return (
        f"{data['hardware']['device']}, torch {versions['torch']}, Triton {versions.get('triton', '?')}, {data['dtype']}, batch 1"
    )
