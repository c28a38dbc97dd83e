"""What is read from run directories for a report, and what is made of it."""

import json
import math

import pytest

from ssa.analysis.analyze import unique_names
from ssa.analysis.results import curve, printable, read_results
from ssa.errors import UserError
from ssa.eval.results import add_results


def evaluated(run, budgets, step=30, **setting):
    figures = {name: {"nats_per_token": nats, "perplexity": math.exp(nats)} for name, nats in budgets.items()}
    setting = {"text_sha256": "a", "context": 64, "stride": 64} | setting
    add_results(run / "eval" / "perplexity.json", {"setting": setting, "model": {"step": step}, "budgets": figures})


def test_everything_that_training_and_evaluation_left_is_read(tmp_path):
    lines = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "valid", "step": 1, "full": 3.0, "sparse": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n[1]\n{"step": "x"}\n{"kind": "tra')
    evaluated(tmp_path, {"full": 1.0, "16x4": 1.2, "4x4": 1.5})
    cells = [{"length": n, "depth": d, "cases": 2, "accuracy": n * d / 200} for n in (200, 100) for d in (0.0, 1.0)]
    add_results(tmp_path / "eval" / "needle.json", {"setting": {}, "model": {}, "budgets": {"4x4": {"grid": cells[:-1]}}})
    run = read_results(tmp_path, {"method": "ssa"})
    assert run.metrics == lines
    assert [(p.budget, p.tokens) for p in run.perplexity] == [("4x4", 16), ("16x4", 64), ("full", math.inf)]
    assert (run.perplexity[0].nats, run.perplexity[0].perplexity) == (1.5, pytest.approx(math.exp(1.5)))
    assert run.perplexity_setting == {"text_sha256": "a", "context": 64, "stride": 64, "tokens": None, "step": 30}
    (grid,) = run.needles
    assert (grid.lengths, grid.depths, grid.accuracy) == ([100, 200], [0.0, 1.0], [[0.0, 0.0], [None, 1.0]])


def test_the_latest_evaluation_counts_and_infinite_perplexities_are_left_out(tmp_path):
    evaluated(tmp_path, {"full": 1.0}, context=32)
    evaluated(tmp_path, {"full": 2.0}, context=64)
    assert [p.nats for p in read_results(tmp_path, {}).perplexity] == [2.0]
    huge = {"full": {"nats_per_token": 900.0, "perplexity": None}}
    add_results(tmp_path / "eval" / "perplexity.json", {"setting": {}, "model": {}, "budgets": huge})
    assert read_results(tmp_path, {}).perplexity == []


def test_a_bare_directory_has_nothing_and_a_damaged_evaluation_is_named(tmp_path):
    run = read_results(tmp_path, {}, "given")
    assert (run.name, run.metrics, run.perplexity, run.needles) == ("given", [], [], [])
    (tmp_path / "eval").mkdir()
    for text in ("{", '{"format": 1, "latest": "k", "results": {"k": {"budgets": {"full": {}}}}}'):
        (tmp_path / "eval" / "perplexity.json").write_text(text)
        with pytest.raises(UserError, match=r"perplexity\.json"):
            read_results(tmp_path, {})


def test_curves_sum_names_and_skip_lines_without_them():
    lines = [
        {"step": 1, "a": 1.0, "b": 2},
        {"step": 2, "a": None, "b": 1.0},
        {"step": 3, "a": math.nan, "b": 1.0},
        {"step": 4, "a": 0.5, "b": 1.0},
    ]
    assert curve(lines, "a", "b") == ([1, 4], [3.0, 1.5])
    assert curve(lines, "c") == ([], [])


def test_names_are_printable_and_unique(tmp_path):
    assert printable("a\x1b[31m\nb") == "a?[31m?b"
    assert len(printable("x" * 300)) == 40
    runs = [tmp_path / "a" / "ssa", tmp_path / "b" / "ssa", tmp_path / "b" / "moba"]
    assert unique_names(runs) == ["a/ssa", "b/ssa", "moba"]
    steps = [tmp_path / "ssa" / "checkpoints" / f"step-{i:08d}" for i in (1, 2)]
    assert unique_names(steps) == ["ssa/step-00000001", "ssa/step-00000002"]
    assert len(set(unique_names([runs[0], runs[0]]))) == 2
