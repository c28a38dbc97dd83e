"""Axes, ticks and marks of the pictures."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.report.efficiency import crossover
from ssa.report.scores import Column, Figure, scores_of
from ssa.report.svg import WIDTH, Axis, Series, colour_of, heat_map, line_chart, number, scatter, tick_labels, tokens
from ssa.report.training import smooth

LABELS = {"title": "t", "xlabel": "x", "ylabel": "y"}


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), log=st.booleans())
def test_ticks_lie_on_the_axis_and_are_few(low, span, log):
    if log:
        low = abs(low) + 1e-6
    axis = Axis(low, low + span, 0, 100, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert all(-1 <= axis(x) <= 101 for x in ticks)


def test_an_axis_maps_its_ends_and_gives_a_single_value_room():
    axis = Axis(1, 100, 50, 250, log=True)
    assert (axis(1), axis(10), axis(100)) == pytest.approx((50, 150, 250))
    assert Axis(3, 3, 0, 10)(3) == pytest.approx(5)
    with pytest.raises(ValueError, match="logarithmic"):
        Axis(0, 1, 0, 1, log=True)


@pytest.mark.parametrize(
    "value,text", [(0, "0"), (0.25, "0.25"), (2e-5, "2e-5"), (12345, "12.35k"), (1.5e6, "1.5M"), (5000, "5000"), (3e9, "3e9")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_ticks_of_a_narrow_axis_are_told_apart():
    assert tick_labels([27.4925, 27.495, 27.5]) == ["27.4925", "27.495", "27.5"]
    assert tick_labels([1e-13, 0.25]) == ["0", "0.25"] and tick_labels([10_000, 10_002]) == ["10k", "10.002k"]
    svg = line_chart([Series("a", "red", [1, 2], [27.4926, 27.5107])], **LABELS)
    shown = re.findall(r">(27\.[\d]+)</text>", svg)
    assert len(shown) == len(set(shown)) > 2


def test_lengths_are_written_as_people_do():
    assert [tokens(x) for x in (512, 4096, 32768, 1 << 20, 1000)] == ["512", "4k", "32k", "1M", "1000"]


def test_lines_marks_and_error_bars_stay_in_the_picture_and_higher_values_are_higher():
    svg = line_chart([Series("a", "red", [1, 2, 3], [1.0, 5.0, 3.0], low=[0.5, 4.0, 2.0], high=[2.0, 9.0, 4.0])], **LABELS)
    (line,) = re.findall(r'class="line" d="M([^"]+)"', svg)
    points = [tuple(map(float, p.split())) for p in line.split("L")]
    assert points[1][1] < points[2][1] < points[0][1]
    assert svg.count("<title>") == 3 and "a, 2: 5" in svg
    (bars,) = re.findall(r'class="error" d="([^"]+)"', svg)
    ends = [float(y) for y in re.findall(r"V([\d.]+)", bars)]
    assert all(0 <= y <= 260 for y in ends) and min(ends) < points[1][1]
    assert all(0 <= x <= WIDTH for x, _ in points)


def test_categories_are_named_and_a_solid_line_lies_over_a_dashed_one():
    svg = line_chart(
        [Series("solid", "red", [0, 1], [1, 2]), Series("dashed", "red", [0, 1], [1, 2], dashed=True)],
        categories=["4x16", "full"],
        **LABELS,
    )
    assert ">4x16</text>" in svg and ">full</text>" in svg and svg.index("dashed, 4x16") < svg.index("solid, 4x16")


def test_heat_maps_colour_by_value_and_say_what_was_not_measured():
    svg = heat_map(
        [[0.0, 1.0], [None, 0.5]],
        title="t",
        row_names=["1", "2"],
        column_names=["a", "b"],
        row_label="layer",
        column_label="head",
        low=0,
        high=1,
    )
    assert (
        f'fill="{colour_of(0)}"><title>layer 1, head a: 0.000' in svg
        and f'fill="{colour_of(1)}"><title>layer 1, head b: 1.000' in svg
    )
    assert "layer 2, head a: not measured" in svg and "mean 0.500" in svg
    assert colour_of(-1) == colour_of(0) != colour_of(1) == colour_of(2)


def test_long_row_names_move_the_cells_over_and_are_cut():
    svg = heat_map(
        [[0.5]], title="t", row_names=["x" * 60], column_names=["a"], row_label="task", column_label="n", low=0, high=1
    )
    assert "x" * 21 + "…</text>" in svg and "x" * 22 + "<" not in svg
    assert float(re.search(r'<rect x="([\d.]+)"', svg)[1]) > 100


def test_the_diagonal_of_a_scatter_plot_is_y_equals_x():
    svg = scatter([("g", "red", [(1.0, 1.0), (100.0, 10.0)])], diagonal=True, **LABELS)
    dots = [tuple(map(float, p)) for p in re.findall(r"M([\d.]+) ([\d.]+)h0", svg)]
    (ends,) = re.findall(r'class="rule" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    x1, y1, x2, y2 = map(float, ends)
    at = y1 + (dots[0][0] - x1) / (x2 - x1) * (y2 - y1)
    assert dots[0][1] == pytest.approx(at, abs=0.2)
    assert dots[1][1] > y1 + (dots[1][0] - x1) / (x2 - x1) * (y2 - y1)  # below the line


def test_smoothing_keeps_constants_and_bounds_the_points():
    assert smooth([2.0] * 7) == ([float(i) for i in range(7)], [2.0] * 7)
    where, means = smooth([float(i) for i in range(1000)], 50)
    assert len(where) == 50 and where[0] == 0 and where[-1] == 999
    assert means[20] == pytest.approx(where[20])


def test_the_crossover_is_between_the_lengths_where_the_order_changes():
    assert crossover([8, 32], [1.0, 16.0], [2.0, 8.0]) == pytest.approx(16.0)
    assert crossover([8, 32], [1.0, 16.0], [0.5, 8.0]) == 0
    assert crossover([8, 32], [1.0, 1.0], [0.5, 2.0]) is None


def test_scores_prefer_the_papers_metric_and_know_their_spread():
    metrics = {
        "acc": {"mean": 0.5, "std": None, "stderr": 0.1},
        "acc_norm": {"mean": 0.6, "std": 0.02, "stderr": 0.1, "by_seed": {"1": 1, "2": 1}},
    }
    assert scores_of("tasks", {"task": "piqa"}, {"metrics": metrics}) == {Column("piqa", None, "acc_norm"): Figure(0.6, 0.02)}
    assert Figure(0.6, 0.02).text(100, 1) == "60.0 ± 2.0" and Figure(0.6, None).text(1, 2) == "0.60"
    cells = [
        {"task": "books", "length": 64, "perplexity": 9.0, "nats_per_token": 2.2, "standard_error": 0.1},
        {"task": "x", "length": 1},
    ]
    (found,) = scores_of("books", {}, {"cells": cells, "score": 1}).items()
    assert found == (Column("books", 64, "perplexity"), Figure(9.0, None)) and not found[0].is_share
