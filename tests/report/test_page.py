"""The page: what is on it, that it nests, loads nothing and escapes everything."""

import json
import re
from html.parser import HTMLParser

import pytest
from report_sample import analysis_of, answered, evaluated, full_sample, kernels, recorded, trained, write

from ssa.cli import main
from ssa.errors import UserError
from ssa.report.collect import collect, collect_analyses
from ssa.report.page import colours
from ssa.report.report import render_report, write_report


class Page(HTMLParser):
    """Tags must nest; collects attributes and text."""

    void = {"meta", "br", "img", "link"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.rows = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = full_sample(tmp_path_factory.mktemp("all"))
    return render_report(collect([directory]))


def test_everything_found_has_its_section_table_and_picture(page):
    text = " ".join(Page(page).text)
    for wanted in (
        "Perplexity by budget", "Tasks", "RULER", "RULER by length", "Needle in a haystack", "What the selection keeps",
        "Kept attention mass by layer", "Attention on the first block by layer", "Kept mass by position",
        "Divergence of the predictions by position", "Layers and heads", "Theorem 1", "Distance of selected blocks",
        "Selection overlap between queries", "Locality while decoding", "Training loss", "Validation loss", "Alignment loss", "Speed",
        "Model FLOPs utilisation", "Peak memory", "Waiting for data", "Gradient norm", "Kept mass layer 0", "Kept mass while training", "Loss of the probes", "Efficiency", "What was looked for",
        "How this was measured",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "Queries" not in text and "Nll full" not in text  # known numbers get no picture of their own


def test_the_page_nests_and_loads_nothing(page):
    parsed = Page(page)
    assert not {"script", "iframe", "object", "img", "foreignObject"} & set(parsed.tags)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#") or value == "data:,"
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(value[1:] in ids for name, value in parsed.attributes if name == "href" and value.startswith("#"))
    pictures = [value for name, value in parsed.attributes if name == "role" and value == "img"]
    assert len(pictures) == parsed.tags.count("svg") > 30
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


def test_tables_hold_the_figures_and_seeds_make_one_row(page):
    rows = Page(page).rows
    assert [
        "full",
        "full",
        "1",
        "60",
        "6000",
        "2.5250",
        "2.4000",
        "2.5000",
        "1000",
        "0.4",
        "3.5",
        "1",
    ] in rows  # training, one spike
    assert ["full", "full", "8.17", "6.69", "6.36"] in rows  # exp of 2.1, 1.9, 1.85; budgets by their receptive field
    assert ["ssa, 2 seeds", "ssa", "8.60 ± 0.61", "6.69 ± 0.00", "6.52 ± 0.23"] in rows
    assert ["full", "full", "70.00 ± 1.00", "15.50"] in rows  # PIQA's acc_norm, WikiText
    assert ["sparse 64 (4x16)", "moba", "62.00 ± 2.00", "–"] in rows
    assert ["sparse 64 (4x16)", "ssa, 2 seeds", "63.00 ± 1.41", "–"] in rows  # 62 and 64
    assert '<td class="best">63.00 ± 1.41' in page and '<td class="best">62.00 ± 2.00' not in page  # the highest score
    assert '<td class="best">8.17' in page and '<td class="best">8.60' not in page  # the lowest perplexity
    assert ["sparse 256 (16x16)", "full", "77.50 ± 1.41", "52.50 ± 1.41", "65.00"] in rows  # RULER at 4k and 8k, mean
    assert ["ssa", "0.925", "0.925", "0.925", "200", "64"] in rows  # locality while decoding
    assert ["16x16", "32k", "16.000", "8.000", "2.00x", "48.000", "16.000", "3.00x"] in rows
    assert ["16x16", "32k", "16.000", "2.000", "8.00x", "–", "–", "–"] in rows  # in captured graphs
    assert ["forward at 32k", ">= 1.5", "2", "reached", "1.25", "missed"] in rows


def test_measurements_of_any_make_are_shown(page):
    parsed = Page(page)
    text = " ".join(parsed.text)
    for row in (["copa", "4", "0.75", "0.5"], ["a", "2"], ["8", "0.25"], ["42", "True"]):
        assert row in parsed.rows, row
    for wanted in ("ours beside theirs", "largest: 0.5", "prepare.json: loader", "Other measurements", "python compare.py"):
        assert wanted in text, wanted
    label = next(v for name, v in parsed.attributes if name == "aria-label" and "curves.json" in v)
    assert "reference" in label and "triton" in label


def test_a_run_in_one_file_is_a_run_with_a_table_for_each_text(page):
    parsed = Page(page)
    text = " ".join(parsed.text)
    assert "Perplexity, valid, context 256" in text and "Perplexity, wikitext, context 512" in text
    assert ["nsa", "nsa", "4.48", "2.72"] in parsed.rows and ["nsa", "nsa", "12.18", "7.39"] in parsed.rows
    assert ["nsa", "found", "found", "not found", "not found", "found", "found"] in parsed.rows
    assert ["nsa", "0.925", "0.925", "0.925", "200", "64"] in parsed.rows  # locality while decoding, from its analysis
    assert ["nsa", "4x16", "50.0", "2"] in parsed.rows


def test_a_damaged_record_of_a_run_is_named(tmp_path):
    trained(tmp_path / "a")
    file = recorded(tmp_path / "bad.json")
    content = json.loads(file.read_text())
    content["figures"]["valid"]["perplexity"]["budgets"] = {"full": 3}
    file.write_text(json.dumps(content))
    evidence = collect([tmp_path])
    assert [run.name for run in evidence.runs] == ["a"] and "not evaluations" in evidence.problems[0][1]


def test_what_is_missing_or_not_understood_is_said(tmp_path):
    trained(tmp_path / "a")
    write(tmp_path / "a" / "eval" / "perplexity.json", "{")
    write(tmp_path / "a" / "analysis" / "analysis.json", analysis_of() | {"inference": {}})
    write(tmp_path / "odd.json", [1])
    parsed = Page(render_report(collect([tmp_path])))
    text = " ".join(parsed.text)
    assert ["a", "found", *["not found"] * 5] in parsed.rows
    for file, why in (
        ("eval/perplexity.json", "cannot be read"),
        ("analysis/analysis.json", "cannot be read"),
        ("odd.json", "no kind of result"),
    ):
        assert any(row[0].endswith(file) and why in row[1] for row in parsed.rows), file
    assert "No benchmark file" in text and "ssa analyze RUN" in text
    assert "Theorem 1" not in text and "Efficiency" not in text


def test_benchmarks_alone_make_a_page_too(tmp_path):
    file = kernels(tmp_path / "k.json")
    text = " ".join(Page(render_report(collect([file]))).text)
    assert re.search(r"Overtakes the best dense backend at about 1\d\.\dk tokens", text) and "No run" in text


def test_names_and_contents_from_files_are_escaped(tmp_path):
    hostile = '<img src=x onerror=alert(1)>"&'
    run = trained(tmp_path / hostile)
    evaluated(run, {"full": 1.0}, data=hostile)
    write(run / "analysis" / "analysis.json", analysis_of(hostile) | {"device": hostile, "versions": {hostile: hostile}})
    write(tmp_path / "b.json", {"command": hostile, "device": hostile, "rows": [{"tokens": 1, hostile: hostile}]})
    page = render_report(collect([tmp_path]))
    parsed = Page(page)
    assert "img" not in parsed.tags and not any(name.startswith("on") for name, _ in parsed.attributes)
    assert any(hostile in text for text in parsed.text)


def test_the_lead_names_the_extremes_and_says_when_nothing_was_left_out(tmp_path):
    runs = [
        (tmp_path / n, n, analysis_of(n, m, seed, gap=gap))
        for n, m, seed, gap in (("wide", "full", 1, 0.2), ("tight", "ssa", 2, -0.001))
    ]
    page = render_report(collect_analyses(runs))
    lead = page[page.index('class="lead"') :][:400]
    assert lead.index("tight") < lead.index("wide") and "-0.0010" in lead and "+0.2000" in lead
    one = render_report(collect_analyses([(tmp_path, "one", analysis_of("one", beyond=False))]))
    assert "Nothing was left out" in one and 'class="lead"' not in one


def test_violations_and_figures_that_do_not_compare_raise_an_alarm(tmp_path):
    good, bad = analysis_of("a"), analysis_of("b", seed=3)
    assert "violated" not in render_report(collect_analyses([(tmp_path / "a", "a", good)]))
    bad["inference"]["sparse"]["layers"][0]["theorem_1"]["violations"] = 2
    bad["measured"]["context"] = 999
    for name, context in (("a", 256), ("b", 512)):
        evaluated(trained(tmp_path / name, seed=context), {"full": 1.0}, context=context)
    page = render_report(collect_analyses([(tmp_path / "a", "a", good), (tmp_path / "b", "b", bad)]))
    assert "Theorem 1 is violated at 2 of 4800 points" in page
    assert "analysed on different texts or lengths" in page and "evaluated on different texts or with different windows" in page


def test_an_analysis_of_an_older_version_shows_what_it_has(tmp_path):
    old = analysis_of()
    for mode in ("sparse", "full"):
        for layer in old["inference"][mode]["layers"]:
            for name in ("by_position", "overlap", "distance_histogram_by_selector"):
                del layer[name]
            for which in ("all_queries", "beyond_receptive_field"):
                del layer[which]["sink_mass_first_block"], layer[which]["output_error"]
    del old["decode"], old["predictions"]["by_position"]
    text = " ".join(Page(render_report(collect_analyses([(tmp_path, "old", old)]))).text)
    assert "Kept attention mass by layer" in text and "Selection overlap" not in text and "first block by layer" not in text


def test_the_file_is_written_whole_and_bad_paths_are_one_line(tmp_path):
    trained(tmp_path / "run")
    out = tmp_path / "deep" / "report.html"
    evidence = write_report([tmp_path / "run"], out)
    assert [run.name for run in evidence.runs] == ["run"] and out.read_text().rstrip().endswith("</html>")
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    for path, message in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "empty", "nothing to report"),
        (tmp_path / "bad.json", "bad.json: cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_report([path], tmp_path / "x.html")
        assert "\n" not in str(caught.value) and not (tmp_path / "x.html").exists()
    with pytest.raises(UserError, match="names no file"):
        write_report([tmp_path / "run"], "")


def test_under_torchrun_rank_0_writes_it(tmp_path, monkeypatch, capsys):
    trained(tmp_path / "run")
    out = tmp_path / "report.html"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
        assert out.exists() == written == ("1 runs" in capsys.readouterr().out)


def test_runs_of_a_method_keep_its_colour_and_differ_in_shade():
    shades = colours(["ssa", "full", "ssa", "ssa", "mine"])
    assert shades[:2] == ["var(--ssa)", "var(--full)"] and shades[4] == "var(--other)" and len(set(shades)) == 5


def test_tasks_are_ordered_and_averaged_as_in_the_paper_and_other_checkpoints_left_out(tmp_path):
    run = trained(tmp_path / "run")
    answered(run, {"piqa": {"full": {"acc_norm": (0.1, 0.0, None)}}}, model_sha256="old")
    for task, score in (
        ("wikitext", 15.0),
        ("copa", 0.9),
        ("arc_challenge", 0.4),
        ("arc_easy", 0.6),
        ("hellaswag", 0.5),
        ("piqa", 0.7),
    ):
        metric = "word_perplexity" if task == "wikitext" else "acc" if task == "copa" else "acc_norm"
        answered(run, {task: {"full": {metric: (score, 0.0, None)}}}, model_sha256="new")
    page = render_report(collect([run]))
    rows = Page(page).rows
    assert ["inference", "run", "PIQA (acc norm)", "HellaSwag (acc norm)", "ARC-e (acc norm)", "ARC-c (acc norm)", "COPA (acc)",
            "average of PIQA, HellaSwag, ARC-e, ARC-c", "PPL"] in rows  # fmt: skip
    assert ["full", "run", "70.00", "50.00", "60.00", "40.00", "90.00", "55.00", "15.00"] in rows
    assert "Results of other checkpoints of run are left out." in page


def test_judged_claims_come_first_and_losses_are_one_measurement(tmp_path):
    for method, gap in (("full", 0.02), ("ssa", -0.03)):
        run = trained(tmp_path / method, method)
        write(run / "analysis" / "analysis.json", analysis_of(method, method, gap=0.5))
        evaluated(run, {"full": 2.0, "4x16": 2.0 + gap})
    claims = [{"claim": "It <b>pays</b>.", "verdict": verdict, "here": "1 < 2"} for verdict in ("holds", "does not hold here")]
    write(tmp_path / "demo.json", {"command": "ssa demo", "claims": claims, "methods": {"full": {"x": 1}}})
    write(tmp_path / "other.json", {"command": "x", "claims": [{"claim": "no verdict"}]})
    evidence = collect([tmp_path])
    assert [name for name, _ in evidence.problems] == [f"{tmp_path.name}/other.json"]
    page = render_report(evidence)
    text = " ".join(Page(page).text)
    assert page.index("What the paper says, and what these runs show</h2>") < page.index("Perplexity by budget</h2>")
    assert page.count("It &lt;b&gt;pays&lt;/b&gt;.") == 2 and ["It <b>pays</b>.", "holds", "1 < 2"] in Page(page).rows
    assert re.search(r"full\s+changes least \(\+0.0200 nats per token\) and\s+ssa\s+most \(-0.0300\)", text)
    assert ["gap, sparse − full (nats)", "+0.0200", "-0.0300"] in Page(page).rows and "Words of this page" in text


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("eval/perplexity.json", {"format": 1, "latest": "x", "results": {"x": {"setting": {}, "budgets": {"full": {"nats_per_token": 1.0}}}}}, "missing"),
        ("eval/perplexity.json", {"format": 1, "latest": "x", "results": {"x": {"setting": {}, "model": {}, "budgets": {"full": {"nats_per_token": {}, "perplexity": 2}}}}}, "cannot be read"),
        ("eval/perplexity.json", {"format": 1, "latest": "x", "results": {"x": {"setting": {}, "model": {}, "budgets": {"full": {"nats_per_token": 1, "perplexity": 1e308}}}}}, "too large"),
        ("eval/needle.json", {"format": 1, "latest": "x", "results": {"x": {"setting": {}, "model": {}, "budgets": {"4x4": {"grid": [{"length": {}, "depth": 0, "accuracy": 1}]}}}}}, "cannot be read"),
        ("eval/tasks.json", {"format": 1, "latest": "x", "results": {"x": {"setting": 3, "model": {}, "budgets": {"full": {}}}}}, "not evaluations"),
        ("analysis/analysis.json", analysis_of() | {"method": 3}, "method = 3 is not str"),
        ("analysis/analysis.json", analysis_of() | {"measured": {}}, "missing"),
        ("analysis/analysis.json", analysis_of() | {"versions": 3}, "cannot be read"),
        ("recipe.json", {"model": 3, "train": 4}, "model = 3 is not an object"),
        ("recipe.json", {"model": {"method": "ssa"}, "train": {"seed": {}}}, "train.seed = {} is not int"),
        ("bench.json", {"command": "x", "rows": [{"a": {}}]}, "cannot be read"),
        ("bench.json", {"command": "x", "rows": [{"tokens": 1, "ms": 2.0}], "bars": [{"name": "a", "bar": "b"}], "suite": 1}, "cannot be read"),
        ("deep.json", "[" * 10**5, "is not JSON"),
        ("deep.json", '{"rows": ' + "[" * 70 + "]" * 70 + "}", "levels of nesting"),
        ("digits.json", '{"command": "x", "answer": ' + "9" * 400 + "}", "too large"),
        ("digits.jsonl", '{"command": "x"}\n{"tokens": NaN}\n', "line 2"),
    ],
)  # fmt: skip
def test_a_file_with_the_wrong_content_costs_a_line_and_not_the_page(tmp_path, capsys, file, content, says):
    run = trained(tmp_path / "all" / "run")
    evaluated(trained(tmp_path / "all" / "good", "full"), {"4x4": 2.0, "full": 1.0})
    write(run / file, content)
    assert main(["report", str(tmp_path / "all"), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"not shown: all/run/{file}: ") and says in said and said.count("\n") == 1
    text = " ".join(Page((tmp_path / "r.html").read_text()).text)
    assert says in text and "Perplexity by budget" in text and "Training loss" in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", text))


def test_lines_of_metrics_that_are_none_are_left_out_and_counted(tmp_path, capsys):
    run = trained(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for bad in (
            '{"kind": "train", "step": %s}' % ("9" * 400),
            "[" * 10**5,
            '{"step": %s}' % ("9" * 5000),
            '{"step": "x"}',
            "3",
        ):
            file.write(bad + "\n")
        file.write('{"kind": "train", "step": 61, "loss": 1e308, "grad_norm": -1e308, "lr": -Infinity, "cross_entropy": NaN}\n')
        file.write('{"kind": [], "step": 62}\n{"kind": "tra')
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run/metrics.jsonl: line 66" in said and "; 5 lines are left out" in said
    page = (tmp_path / "r.html").read_text()
    assert "Training loss" in page and not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


def test_what_no_page_can_be_made_of_is_taken_out_when_the_page_is_made(tmp_path):
    for name in ("a", "b"):
        evaluated(trained(tmp_path / name), {"full": 1.0})
    evidence = collect([tmp_path])
    evidence.runs[1].evaluations["perplexity"][0]["budgets"]["4y4"] = {"nats_per_token": 1.0, "perplexity": 2.0}
    page = render_report(evidence)
    assert "b/eval/perplexity.json" in page and evidence.runs[1].evaluations == {} and evidence.runs[0].evaluations
