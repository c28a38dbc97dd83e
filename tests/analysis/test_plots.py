"""The summary picture and the table, from figures that no model had to make."""

import builtins
import itertools
import random

import pytest

from ssa.analysis import plots
from ssa.analysis.results import BudgetPerplexity, RunResults, losses, printable
from ssa.analysis.table import table_rows
from ssa.errors import UserError

NAMES = ("kept_mass", "entropy_bits", "sink_mass_first")


def results(name="run", method="ssa", seed=0, extras=True, gap=0.01, changed=None):
    rng = random.Random(seed)
    layers = [{"beyond_receptive_field": {n: [rng.random() for _ in range(4)] for n in NAMES}} for _ in range(3)]
    means = {n: 0.5 for n in NAMES}
    predictions = {
        "kl_nats": 0.02, "top1_agreement": 0.9, "cross_entropy_full": 2.0, "cross_entropy_sparse": 2.0 + gap, "gap_nats": gap,
    }  # fmt: skip
    analysis = {
        "method": method, "budget": "4x16", "step": 30, "predictions": {"all_tokens": predictions},
        "inference": {mode: {"beyond_receptive_field": means, "layers": layers} for mode in ("sparse", "full")},
    }  # fmt: skip
    if not extras:
        return RunResults(printable(name), analysis)
    perplexity = [BudgetPerplexity("4x16", 64, 1.9 + 3 * gap, 7.4), BudgetPerplexity("full", float("inf"), 1.9, 6.7)]
    setting = {"text_sha256": "a", "context": 64, "stride": 64, "tokens": 999, "step": 30}
    return RunResults(printable(name), analysis, perplexity=perplexity, perplexity_setting=setting | (changed or {}))


def test_the_best_of_several_runs_is_marked():
    runs = [results(gap=gap, extras=False) for gap in (0.2, -0.1, 0.15)]
    rows = {heading: (cells, best) for heading, cells, best in table_rows(runs)}
    assert rows["gap, sparse − full (nats)"] == (["+0.2000", "-0.1000", "+0.1500"], 1)
    assert rows["KL(full ‖ sparse) (nats)"][1] is None  # all equal


def test_losses_are_the_evaluations_where_all_runs_have_the_same_one():
    found, said = losses([results(gap=0.2), results(gap=-0.1)])
    assert [loss.gap for loss in found] == pytest.approx([0.6, -0.3]) and [loss.full for loss in found] == [1.9, 1.9]
    assert said == "Losses are ssa eval's: 999 tokens in windows of 64."
    other_budget = results(gap=-0.1)
    other_budget.analysis["budget"] = "2x16"
    for odd in (
        results(gap=-0.1, extras=False),
        other_budget,
        *(results(gap=-0.1, changed={k: v}) for k, v in (("text_sha256", "b"), ("step", 20), ("stride", 8))),
    ):
        found, said = losses([results(gap=0.2), odd])
        assert [loss.gap for loss in found] == pytest.approx([0.2, -0.1]) and said == "Losses are over all analysed tokens."


def test_the_picture_shows_the_gaps_of_the_table_and_tick_labels_apart(monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [results("full", "full", gap=0.00177), results("moba", "moba", gap=-0.00387), results("ssa", "ssa", gap=-0.00003)]
    with plots.style():
        figure = Figure(figsize=(12.6, 3.7))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3)
        for draw, panel in zip((plots.kept_by_layer, plots.gap_bars, plots.perplexity_by_budget), axes, strict=True):
            draw(runs, panel)
        figure.canvas.draw()
    shown = [text.get_text() for text in axes[1].texts]
    table = {heading: cells for heading, cells, _ in table_rows(runs)}
    assert shown == table["gap, sparse − full (nats)"] == ["+0.0053", "-0.0116", "-0.0001"]
    for panel in axes:
        boxes = [label.get_window_extent() for label in panel.get_xticklabels() if label.get_text()]
        low, high = panel.get_window_extent().x0 - 20, panel.get_window_extent().x1 + 20
        boxes = sorted((box for box in boxes if low < (box.x0 + box.x1) / 2 < high), key=lambda box: box.x0)
        assert len(boxes) > 1 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("extras", [True, False])
def test_the_summary_picture_is_written_whole(tmp_path, extras):
    pytest.importorskip("matplotlib")
    path = plots.save_summary_picture(
        [results("_a", "full", 1, extras=extras), results("b $^", "ssa", 2, extras=extras)], tmp_path / "s.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    with pytest.raises(UserError, match=r"missing/s.png"):
        plots.save_summary_picture([results()], tmp_path / "missing" / "s.png")
    with pytest.raises(UserError, match="at least one run"):
        plots.save_summary_picture([], path)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"\[plots\]"):
        plots.save_summary_picture([], "x.png")
