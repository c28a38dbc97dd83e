"""Pictures of `ssa.report.svg` with their title, legend and caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ssa.methods import look_of
from ssa.report.page import figure
from ssa.report.svg import Series, heat_map, line_chart


def marked(
    name: str, method: str, colour: str, x: Sequence[float], y: Sequence[float], spread: Sequence[float | None] = (), **more: Any
) -> Series:  # fmt: skip
    """A `Series` with the marker of a method, and an error bar of `spread` to both sides at every point if any of them is known."""
    if any(spread):
        more |= {end: [a + sign * (s or 0) for a, s in zip(y, spread, strict=True)] for end, sign in (("low", -1), ("high", 1))}
    return Series(name, colour, x, y, marker=look_of(method)[1], **more)


def line_figure(
    series: Sequence[Series], title: str, caption: str, *, legend: Sequence[tuple[str, str]] | None = None, heading: str = "", **chart: Any
) -> str | None:  # fmt: skip
    """A `line_chart`; None where there is no series.

    Args:
        legend: (name, colour), repeated or not; those of the series if left out.
        heading: The title if left out.
    """
    if not series:
        return None
    keys = [(s.name, s.colour) for s in series] if legend is None else legend
    return figure(heading or title, line_chart(series, title=title, **chart), caption, list(dict.fromkeys(keys)))


def step_figure(series: Sequence[Series], title: str, caption: str, name: Callable[[float], str], **chart: Any) -> str | None:
    """`line_figure` over the values of x that occur, evenly spaced."""
    values = sorted({x for s in series for x in s.x})
    at = {x: i for i, x in enumerate(values)}
    placed = [replace(s, x=[at[x] for x in s.x]) for s in series]
    return line_figure(placed, title, caption, categories=[name(x) for x in values], **chart)


def heat_figure(rows: Sequence[Sequence[float | None]], heading: str, **options: Any) -> str:
    """A `heat_map`."""
    return figure(heading, heat_map(rows, title=heading, **options), "")
