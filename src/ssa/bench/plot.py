"""The crossover picture: time over length, dense and sparse, from the JSON of `ssa bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssa.checked_json import read_json
from ssa.errors import UserError
from ssa.files import check_directory

COLOURS = {"dense, cuDNN": "#444444", "16x16": "#c0392b", "32x32": "#2471a3", "16x64": "#1e8449"}
SPARE_COLOURS = ("#8e44ad", "#d68910", "#117a65", "#884ea0")


def plot_kernels(results: Path, out: Path) -> Path:
    """A panel for each kind of heads and each pass: milliseconds of dense attention and of ours, selection included, over length.

    Raises:
        UserError: no such file, not such a file, `out` cannot be written, or no matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError('ssa bench plot needs matplotlib: pip install "sparse-sparse-attention[plots]"') from None
    check_directory(out.parent)
    curves, title = _curves(results)
    heads = list(curves)
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(len(heads), 2, figsize=(9, 3.4 * len(heads)), squeeze=False, sharex=True, layout="constrained")
    for line, head in zip(axes, heads, strict=True):
        for axis, (key, words) in zip(line, (("forward", "forward"), ("both", "forward + backward")), strict=True):
            spare = iter(SPARE_COLOURS)
            for name, points in curves[head].items():
                lengths, times = zip(*sorted((tokens, times[key]) for tokens, times in points.items()), strict=True)
                colour = COLOURS.get(name) or next(spare, "#000000")
                axis.plot(lengths, times, "o--" if name.startswith("dense") else "o-", label=name, color=colour, markersize=4)
            axis.set(xscale="log", yscale="log", title=f"{words}, heads {head}", ylabel="ms")
            ticks = sorted({tokens for points in curves[head].values() for tokens in points})
            axis.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
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


def _curves(results: Path) -> tuple[dict[str, dict[str, dict[int, dict[str, float]]]], str]:
    """{heads: {curve: {tokens: {"forward", "both"}}}} of launched times, and the picture's title."""
    try:
        data = read_json(results)
        curves: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        for row in data["rows"]:
            heads, _, budget = row["shape"].partition(":")
            found = curves.setdefault(heads, {})
            for name, times in (("dense, cuDNN", row["dense"]["cudnn"]), (budget, row["ours"])):
                if "forward" in times:
                    found.setdefault(name, {})[row["tokens"]] = {key: times[key]["launches"] for key in ("forward", "both")}
        title = _title(data)
    except UserError:
        raise
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
