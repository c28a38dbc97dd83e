"""The page and its pictures, from figures that no model had to make."""

import builtins
import dataclasses
import random
from html.parser import HTMLParser

import pytest

from ssa.analysis import plots
from ssa.analysis.report import _lead, _notes, render_report
from ssa.analysis.results import BudgetPerplexity, NeedleGrid, RunResults, printable
from ssa.analysis.table import table_rows
from ssa.errors import UserError

pytest.importorskip("matplotlib")


def head_means(rng, queries, heads=4):
    names = ("kept_mass", "entropy_bits", "entropy_nats", "sink_mass_first", "sink_mass_first_4", "own_block_mass")
    return {"queries": queries} | {name: [rng.random() for _ in range(heads)] for name in names}


def inference(rng, beyond, layers):
    def mean(queries):
        return {name: sum(x) / len(x) for name, x in head_means(rng, queries).items() if name != "queries"}

    each = [
        {
            "layer": i, "all_queries": head_means(rng, 100), "beyond_receptive_field": head_means(rng, 60) if beyond else None,
            "selected_blocks_mean": 3.5, "own_block_share": 0.3, "distance_histogram": [3, 4, 5, 9],
            "theorem_1": {"checked": 400, "violations": 0, "points": [[0.1, e := rng.random(), e * 2] for _ in range(20)]},
        }
        for i in range(layers)
    ]  # fmt: skip
    return {"all_queries": mean(100), "beyond_receptive_field": mean(60) if beyond else None, "layers": each}


def results(name="run", method="ssa", seed=0, beyond=True, extras=True, layers=3, gap=0.01):
    rng = random.Random(seed)
    predictions = {
        "tokens": 100, "kl_nats": 0.02, "top1_agreement": 0.9, "cross_entropy_full": 2.0, "cross_entropy_sparse": 2.0 + gap, "gap_nats": gap,
    }  # fmt: skip
    analysis = {
        "format": 1, "run": name, "method": method, "step": 30, "budget": "4x16", "block_size": 16, "receptive_field": 64,
        "selection": "group / softmax / exact", "device": "cpu", "dtype": "float32", "versions": {"torch": "2"},
        "measured": {"data": "text", "split": "valid", "context": 256, "rows": 2, "tokens": 512, "seed": 0},
        "predictions": {"all_tokens": predictions, "beyond_receptive_field": predictions},
        "inference": {mode: inference(rng, beyond, layers) for mode in ("sparse", "full")},
    }  # fmt: skip
    if not extras:
        return RunResults(printable(name), analysis)
    aligned = (
        {"sparsity_loss": 0.1, "commitment_loss": 0.1} if method == "ssa" else {"sparsity_loss": None, "commitment_loss": None}
    )
    metrics = [{"kind": "train", "step": i, "cross_entropy": 3 - i / 50, **aligned} for i in range(1, 40)]
    metrics += [{"kind": "valid", "step": i, "full": 3.0, "sparse": 3.1} for i in (20, 40)]
    perplexity = [BudgetPerplexity("4x16", 64, 2.0, 7.4), BudgetPerplexity("full", float("inf"), 1.9, 6.7)]
    setting = {"text_sha256": "a", "context": 256, "stride": 256, "step": 30}
    needles = [NeedleGrid("4x16", [128, 256], [0.0, 1.0], [[0.5, 1.0], [None, 0.0]])]
    return RunResults(printable(name), analysis, metrics, perplexity, setting, needles)


class Page(HTMLParser):
    """Tags must nest; collects attributes and text."""

    void = {"meta", "br", "img", "link"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


SECTIONS = ("Training and evaluation", "What the selection keeps", "Kept mass, head by head", "Theorem 1", "Needle in a haystack")
PICTURES = ("Training loss", "Alignment loss", "Validation loss", "Perplexity by budget", "Kept attention mass by layer",
            "Entropy of full attention by layer", "Distance of selected blocks")  # fmt: skip


def test_the_page_nests_has_every_section_and_loads_nothing():
    page = render_report([results("a", "full", 1), results("b", "ssa", 2)])
    parsed = Page(page)
    text = " ".join(parsed.text)
    for wanted in (*SECTIONS, *PICTURES, "How this was measured"):
        assert wanted in text, wanted
    assert "http:" not in page and "https:" not in page and "//" not in page.replace("data:image/png;base64,", "")[:2000]
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in ids
    assert plots.INK not in page and "currentColor" in page  # ink follows the page's colour, light or dark
    assert "mathdefault" not in page


def test_names_from_runs_are_escaped():
    hostile = '<img src=x onerror=alert(1)>"$x^{$'
    page = render_report([results(hostile, seed=1), results("_under & <b>", "moba", 2, extras=False)])
    parsed = Page(page)
    assert "img" not in parsed.tags and "b" not in parsed.tags
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert any("<img src=x onerror=" in text for text in parsed.text)
    assert any("_under & <b>" in text for text in parsed.text)


def test_what_a_run_does_not_have_is_left_out():
    page = render_report([results(extras=False, beyond=False)])
    text = " ".join(Page(page).text)
    assert "Nothing was left out" in text
    assert "Training and evaluation" not in text and "Needle" not in text and "Theorem 1" in text
    assert "perplexity" not in text.lower()


def test_the_lead_names_the_extremes_and_says_when_nothing_was_left_out():
    runs = [results("wide", "full", 1, gap=0.2), results("tight", "ssa", 2, gap=-0.001)]
    lead = _lead(runs)
    assert lead.index("tight") < lead.index("wide") and "-0.0010" in lead and "+0.2000" in lead
    assert "Nothing was left out" in _lead([results(beyond=False)])


def test_violations_and_evaluations_that_do_not_compare_raise_an_alarm():
    good, bad = results("a"), results("b", seed=3)
    assert "alarm" not in _notes([good, bad])
    bad.analysis["inference"]["sparse"]["layers"][0]["theorem_1"]["violations"] = 2
    other = dataclasses.replace(bad, perplexity_setting=bad.perplexity_setting | {"context": 99, "step": 7})
    page = _notes([good, other])
    assert "violated at 2 of 4800 points" in page and "do not compare" in page and "step 7" in page


def test_the_best_of_several_runs_is_marked():
    rows = {
        heading: (cells, best) for heading, cells, best in table_rows([results(gap=0.2), results(gap=-0.1), results(gap=0.15)])
    }
    assert rows["gap, sparse − full (nats)"] == (["+0.2000", "-0.1000", "+0.1500"], 1)
    assert rows["KL(full ‖ sparse) (nats)"][1] is None  # all equal
    only_one = {heading: cells for heading, cells, _ in table_rows([results(), results(extras=False)])}
    assert only_one["perplexity, full (eval)"] == ["6.700", "–"]


def test_a_picture_per_method_keeps_its_colour_and_same_methods_differ():
    runs = [results("a", "ssa"), results("b", "full"), results("c", "ssa")]
    colours = plots.run_colours(runs)
    assert colours[0] == plots.COLOURS["ssa"] and colours[1] == plots.COLOURS["full"] and len(set(colours)) == 3


@pytest.mark.parametrize("extras", [True, False])
def test_the_summary_picture_is_written_whole(tmp_path, extras):
    path = plots.save_summary_picture(
        [results("_a", "full", 1, extras=extras), results("b $^", "ssa", 2, extras=extras)], tmp_path / "s.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    with pytest.raises(UserError, match=r"missing/s.png"):
        plots.save_summary_picture([results()], tmp_path / "missing" / "s.png")
    with pytest.raises(UserError, match="at least one run"):
        plots.save_summary_picture([], path)


def test_many_layers_and_heads_still_draw():
    assert Page(render_report([results(layers=40)])).tags.count("svg") >= 7


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    from ssa.analysis.analyze import analyze

    for action in (
        lambda: render_report([results()]),
        lambda: analyze([tmp_path / "nothing"]),
        lambda: plots.save_summary_picture([], "x.png"),
    ):
        with pytest.raises(UserError, match=r"\[plots\]"):
            action()
