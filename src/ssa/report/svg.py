"""Pictures as inline SVG, drawn by hand: line charts with error bars, scatter plots, heat maps.

A picture has no size of its own (it fills its box, down to a phone's width), no ids, and no colours but CSS values, so that it follows
the page from light to dark. Every mark says its value in a `<title>`, and the picture's `aria-label` sums it up.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 400
MARKERS = {"circle": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z", "square": "M-3-3h6v6h-6z", "triangle": "M0-3.8l3.6 6.6h-7.2z",
           "diamond": "M0-4l4 4l-4 4l-4-4z", "down": "M0 3.8l3.6-6.6h-7.2z"}  # fmt: skip
MARKED_POINTS = 40  # a line with more points carries no markers
ANNOTATED_CELLS = 64  # a heat map with more cells carries no numbers
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 8, 42
# Cividis, told apart by all common kinds of colour blindness, and the same in grey.
_MAP = ((0, 32, 77), (0, 49, 111), (57, 72, 107), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116), (195, 181, 105),
        (225, 204, 85), (255, 234, 70))  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high`, where given, are the ends of an error bar at every point."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    faint: bool = False
    """Drawn thin and pale, e.g. the raw values under a running mean."""
    marker: str = "circle"


class Axis:
    """Where values lie along one side of a chart."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False) -> None:
        if log and low <= 0:
            raise ValueError(f"a logarithmic axis cannot show {low}")
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5))
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        low, high, x = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (x - low) / (high - low) * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the axis, at most about `most`."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for parts in ((1, 2, 5), (1, 3), (1,)):
                ticks = [x for d in decades for m in parts if self.low <= (x := m * 10.0**d) <= self.high]
                if len(ticks) <= most:
                    break
            if len(ticks) > 1:  # else the axis is so short that it is almost linear
                return ticks[:: math.ceil(len(ticks) / most)]
        raw = (self.high - self.low) / most
        size = 10 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float, digits: int = 4) -> str:
    """A value as an axis or a table shows it: 0.25, 12k, 1.5M, 2e-05."""
    size = abs(value)
    if size >= 1e9 or (0 < size < 1e-3):
        mantissa, exponent = f"{value:.{digits - 3}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if suffix == 'M' else 1e3):.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """`number` of each, with as many digits as round values need: on a narrow axis four make several the same."""
    values = [0.0 if abs(x) < 1e-12 else x for x in ticks]
    digits = next(d for d in range(4, 12) if d == 11 or all(number(x, d) == number(x, d + 3) for x in values))
    return [number(x, digits) for x in values]


def tokens(value: float) -> str:
    """A length in tokens as people write it: 512, 4k, 32k, 1M."""
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{int(value) // unit}{suffix}"
    return number(value)


def line_chart(
    series: Sequence[Series], *, title: str, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False,
    categories: Sequence[str] | None = None, x_ticks: Sequence[float] | None = None, range_y: tuple[float | None, float | None] = (None, None),
    x_format=number, height: int = 260,
) -> str:  # fmt: skip
    """Lines over a common x axis.

    Args:
        categories: Names of x = 0, 1, ..., evenly spaced, instead of a numeric axis.
        range_y: What the y axis must reach, where not None.
    """
    all_y = [y for s in series for ys in (s.y, s.low or (), s.high or ()) for y in ys]
    all_x = [x for s in series for x in s.x]
    low, high = _range(all_y, range_y, log_y)
    y_axis = Axis(low, high, height - _BOTTOM, _TOP, log_y)
    if categories is None:
        x_axis = Axis(min(all_x), max(all_x), _LEFT + 6, WIDTH - _RIGHT - 6, log_x)
        at = x_axis.ticks() if x_ticks is None else [x for x in x_ticks if x_axis.low <= x <= x_axis.high]
        labels = [x_format(x) for x in at]
    else:
        x_axis = Axis(-0.35, len(categories) - 0.65, _LEFT, WIDTH - _RIGHT)
        at, labels = list(range(len(categories))), list(categories)
    parts = [_frame(x_axis, y_axis, at, labels, xlabel, ylabel, height)]
    for s in sorted(series, key=lambda s: (not s.faint, not s.dashed)):  # what matters most comes on top
        points = [(x_axis(x), y_axis(y)) for x, y in zip(s.x, s.y, strict=True)]
        kind = "line" + (" dashed" if s.dashed else "") + (" faint" if s.faint else "")
        parts.append(f'<g style="--c:{s.colour}">')
        if len(points) > 1:
            parts.append(f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        if s.low is not None and s.high is not None:
            ends = [(x, y_axis(a), y_axis(b)) for (x, _), a, b in zip(points, s.low, s.high, strict=True)]
            bars = "".join(f"M{x:.1f} {a:.1f}V{b:.1f}M{x - 3:.1f} {a:.1f}h6M{x - 3:.1f} {b:.1f}h6" for x, a, b in ends)
            parts.append(f'<path class="error" d="{bars}"/>')
        if len(points) <= MARKED_POINTS and not s.faint:
            for i, (x, y) in enumerate(points):
                where = categories[int(s.x[i])] if categories is not None else x_format(s.x[i])
                text = html.escape(f"{s.name}, {where}: {number(s.y[i])}")
                hollow = " hollow" if s.dashed else ""
                parts.append(
                    f'<path class="mark{hollow}" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[s.marker]}"><title>{text}</title></path>'
                )
        parts.append("</g>")
    spans = [f"{s.name}: {number(s.y[0])} to {number(s.y[-1])}" for s in series if not s.faint and len(s.y)]
    return _picture(f"{title}: {ylabel} by {xlabel}. {'; '.join(spans)}", height, parts)


def scatter(
    groups: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, title: str, xlabel: str, ylabel: str, diagonal: bool, height: int = 300
) -> str:  # fmt: skip
    """Points (x, y) of groups (name, colour, points) on logarithmic axes; `diagonal` draws y = x."""
    xs, ys = zip(*(p for _, _, points in groups for p in points), strict=True)
    low_x, high_x, low_y, high_y = min(xs) / 1.4, max(xs) * 1.4, min(ys) / 1.4, max(ys) * 1.4
    if diagonal:
        high_y = max(high_y, high_x)
    x_axis = Axis(low_x, high_x, _LEFT + 6, WIDTH - _RIGHT, True)
    y_axis = Axis(low_y, high_y, height - _BOTTOM, _TOP, True)
    at = x_axis.ticks(5)
    parts = [_frame(x_axis, y_axis, at, tick_labels(at), xlabel, ylabel, height)]
    for name, colour, points in groups:
        d = "".join(f"M{x_axis(x):.1f} {y_axis(y):.1f}h0" for x, y in points)
        parts.append(f'<path class="dots" style="--c:{colour}" d="{d}"><title>{html.escape(name)}</title></path>')
    if diagonal:
        low, high = max(low_x, low_y), min(high_x, high_y)
        if low < high:
            ends = f"M{x_axis(low):.1f} {y_axis(low):.1f}L{x_axis(high):.1f} {y_axis(high):.1f}"
            parts.append(f'<path class="rule" d="{ends}"/>')
    return _picture(f"{title}: {ylabel} against {xlabel}, {len(xs)} points", height, parts)


def heat_map(
    rows: Sequence[Sequence[float | None]], *, title: str, row_names: Sequence[str], column_names: Sequence[str], row_label: str,
    column_label: str, low: float, high: float, digits: int = 2,
) -> str:  # fmt: skip
    """Cells of a colour between `low` and `high`; None is hatched out. The scale is drawn beside them."""
    count_x, count_y = len(column_names), len(row_names)
    cell_y = min(26.0, max(7.0, 300 / count_y))
    height = int(_TOP + cell_y * count_y + _BOTTOM)
    row_names = [name if len(name) <= 22 else f"{name[:21]}…" for name in row_names]
    left = max(_LEFT, 24 + 6.4 * max(map(len, row_names)))
    right = WIDTH - max(46.0, 21 + 6.5 * max(len(number(low)), len(number(high))))
    cell_x = (right - left) / count_x
    parts = []
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            x, y = left + j * cell_x, _TOP + i * cell_y
            said = f"{row_label} {row_names[i]}, {column_label} {column_names[j]}: " + (
                "not measured" if value is None else f"{value:.3f}"
            )
            fill = "var(--line)" if value is None else colour_of((value - low) / (high - low))
            box = f'x="{x:.1f}" y="{y:.1f}" width="{cell_x + 0.3:.1f}" height="{cell_y + 0.3:.1f}"'
            parts.append(f'<rect {box} fill="{fill}"><title>{html.escape(said)}</title></rect>')
            if value is not None and count_x * count_y <= ANNOTATED_CELLS and cell_x > 24:
                ink = "#fff" if (value - low) / (high - low) < 0.5 else "#111"  # equally far from both there
                parts.append(_text(x + cell_x / 2, y + cell_y / 2 + 3.5, f"{value:.{digits}f}", "cell", fill=ink))
    for i in range(0, count_y, 1 + (count_y - 1) // 16):
        parts.append(_text(left - 5, _TOP + (i + 0.5) * cell_y + 3.5, row_names[i], "end"))
    widest = max(map(len, column_names))
    for j in range(0, count_x, max(1, math.ceil((6.5 * widest + 6) / cell_x))):
        parts.append(_text(left + (j + 0.5) * cell_x, height - _BOTTOM + 15, column_names[j], "mid"))
    parts += [_text((left + right) / 2, height - 8, column_label, "mid axis"), _vertical(row_label, _TOP, height - _BOTTOM)]
    bar = height - _BOTTOM - _TOP
    for i in range(24):
        y = _TOP + bar * (1 - (i + 1) / 24)
        parts.append(
            f'<rect x="{right + 8:.1f}" y="{y:.1f}" width="8" height="{bar / 24 + 0.4:.1f}" fill="{colour_of((i + 0.5) / 24)}"/>'
        )
    parts += [_text(right + 19, _TOP + 8, number(high), "start"), _text(right + 19, height - _BOTTOM, number(low), "start")]
    known = [v for row in rows for v in row if v is not None]
    span = f"from {min(known):.3f} to {max(known):.3f}, mean {sum(known) / len(known):.3f}" if known else "nothing measured"
    return _picture(f"{title}: heat map of {count_y} ({row_label}) by {count_x} ({column_label}), {span}", height, parts)


def colour_of(share: float) -> str:
    """The heat map's colour at 0..1; beyond, that of the nearer end."""
    at = min(1.0, max(0.0, share)) * (len(_MAP) - 1)
    i = min(int(at), len(_MAP) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(_MAP[i], _MAP[i + 1], strict=True))


def _range(values: Sequence[float], wanted: tuple[float | None, float | None], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    low, high = low if wanted[0] is None else min(low, wanted[0]), high if wanted[1] is None else max(high, wanted[1])
    if log:
        return low / 1.1, high * 1.1
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # a constant, up to rounding
        return (low, low) if low else (0.0, 1.0)
    room = 0.06 * (high - low)
    bottom = low if low == wanted[0] else max(low - room, 0.0) if low >= 0 else low - room
    return bottom, high if high == wanted[1] else high + room


def _frame(x_axis: Axis, y_axis: Axis, at: Sequence[float], labels: Sequence[str], xlabel: str, ylabel: str, height: int) -> str:
    """Grid, ticks and labels."""
    parts = []
    values = y_axis.ticks()
    for y, label in zip(values, tick_labels(values), strict=True):
        parts.append(f'<path class="grid" d="M{_LEFT} {y_axis(y):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 5, y_axis(y) + 3.5, label, "end"))
    room = (WIDTH - _LEFT - _RIGHT) / max(1, len(at))
    every = max(1, math.ceil((6.5 * max(map(len, labels), default=0) + 4) / room))
    for i, (x, label) in enumerate(zip(at, labels, strict=True)):
        if i % every == 0:
            parts.append(_text(x_axis(x), height - _BOTTOM + 15, label, "mid"))
            parts.append(f'<path class="grid" d="M{x_axis(x):.1f} {height - _BOTTOM}v4"/>')
    parts.append(f'<path class="frame" d="M{_LEFT} {height - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    parts += [_text((_LEFT + WIDTH - _RIGHT) / 2, height - 8, xlabel, "mid axis"), _vertical(ylabel, _TOP, height - _BOTTOM)]
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str, fill: str = "") -> str:
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(text)}</text>'


def _vertical(text: str, top: float, bottom: float) -> str:
    return f'<text class="mid axis" transform="translate(12 {(top + bottom) / 2:.1f}) rotate(-90)">{html.escape(text)}</text>'


def _picture(label: str, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label, quote=True)}">{"".join(parts)}</svg>'
