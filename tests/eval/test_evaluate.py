import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from ssa.budget import Budget
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval import text_passes
from ssa.eval.documents import read_documents
from ssa.eval.evaluate import evaluate
from ssa.eval.perplexity import WINDOW_TOKENS, WindowBatches, perplexity
from ssa.eval.results import result_key
from ssa.eval.tables import print_perplexity
from ssa.infer.load import load_model
from ssa.methods import methods
from ssa.testing import tiny_model


def saved(run, name="perplexity.json"):
    return json.loads((run / "eval" / name).read_text())


def test_a_run_needs_no_arguments(make_run, prepared):
    run = make_run()
    result = evaluate(run)
    entry = result["perplexity"]
    assert result["needle"] is None and result["files"] == [run / "eval" / "perplexity.json"]
    file = saved(run)
    assert file["results"] == {file["latest"]: entry}
    assert list(entry["budgets"]) == ["3x4", "full"]  # the model's own, and full
    assert entry["setting"]["context"] == entry["setting"]["stride"] == 64
    assert entry["setting"]["data"] == str(prepared) and entry["setting"]["split"] == "valid"
    assert entry["model"]["step"] == 7 and entry["model"]["method"] == "ssa"
    model, tokenizer = load_model(run)
    documents, _ = read_documents(prepared, "valid", tokenizer)
    for name, call in {"full": {"attention_mode": "full"}, "3x4": {"attention_mode": "sparse"}}.items():
        measured = perplexity(model, documents, context=64, **call)
        figures = entry["budgets"][name]
        assert figures["nats_per_token"] == pytest.approx(measured.nats_per_token, rel=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["nats_per_token"]))
        assert figures["tokens"] == entry["tokens"] == measured.tokens
        assert {"torch", "ssa"} <= set(figures["versions"]) and figures["device"] == "cpu"
    gap = entry["budgets"]["3x4"]["nats_per_token"] - entry["budgets"]["full"]["nats_per_token"]
    assert entry["budgets"]["3x4"]["gap_to_full"] == pytest.approx(gap) and entry["budgets"]["full"]["gap_to_full"] == 0


def test_budgets_of_one_setting_gather_and_other_settings_stay_apart(make_run):
    run = make_run()
    first = evaluate(run, budgets="2x4")["perplexity"]
    assert first["budgets"]["2x4"]["gap_to_full"] is None
    second = evaluate(run, budgets=["full", Budget(1, 16)])["perplexity"]
    assert set(second["budgets"]) == {"2x4", "full", "1x16"}
    assert second["budgets"]["2x4"]["gap_to_full"] is not None  # known now
    # what the logs of all versions are named after
    named = {**first["setting"], "batch": WINDOW_TOKENS // (first["setting"]["context"] + 1)}
    logs = {result_key({**named, "attention": name}) for name in ("2x4", "full", "1x16")}
    assert {log.name for log in (run / "eval" / "items" / "perplexity").iterdir()} == logs
    for other in ({"context": 32}, {"stride": 16}, {"split": "train"}, {"max_tokens": 50}, {"dtype": "bfloat16"}):
        evaluate(run, budgets="2x4", **other)
    file = saved(run)
    assert len(file["results"]) == 6 and second in file["results"].values()
    assert file["results"][file["latest"]]["setting"]["dtype"] == "bfloat16"


def test_another_checkpoint_is_another_setting(make_run):
    run = make_run(step=7)
    evaluate(run, budgets="full")
    make_run(step=9)
    evaluate(run, budgets="full")
    evaluate(run / "checkpoints" / "step-00000007", budgets="2x4")  # a checkpoint's results go to its run
    steps = {entry["model"]["step"]: set(entry["budgets"]) for entry in saved(run)["results"].values()}
    assert steps == {7: {"full", "2x4"}, 9: {"full"}}


def test_a_model_directory_with_text(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Some words to read. " * 20)
    with pytest.raises(UserError, match="has no data of its own"):
        evaluate(tmp_path / "model")
    result = evaluate(tmp_path / "model", data=tmp_path / "a.txt", max_tokens=99, out=tmp_path / "out")["perplexity"]
    assert result["tokens"] == 99 and "first 99 tokens" in " ".join(result["notes"])
    assert result["setting"]["split"] is None and result["setting"]["context"] == 2048
    assert (tmp_path / "out" / "perplexity.json").is_file() and not (tmp_path / "model" / "eval").exists()


def test_needles(make_run, prepared):
    run = make_run()
    result = evaluate(
        run, budgets="4x16,full", perplexity=False, needle_lengths=[500, 600], needle_depths=[0, 1], needle_cases=2, seed=3
    )
    assert result["perplexity"] is None and not (run / "eval" / "perplexity.json").exists()
    entry = result["needle"]
    file = saved(run, "needle.json")
    assert file["results"] == {file["latest"]: entry}
    for figures in entry["budgets"].values():
        assert [(c["length"], c["depth"]) for c in figures["grid"]] == [(500, 0), (500, 1), (600, 0), (600, 1)]
        assert figures["accuracy"] == 0 and figures["log_probability"] < -7
    assert entry["setting"]["seed"] == 3 and set(entry["budgets"]) == {"4x16", "full"}


def figures_of(entry):
    """What was measured, without when and how fast."""
    measured = ("nats_per_token", "gap_to_full", "perplexity", "word_perplexity", "bits_per_byte", "tokens", "accuracy", "grid")
    return {n: {k: x for k, x in f.items() if k in measured} for n, f in entry["budgets"].items()}


def test_an_interrupted_perplexity_goes_on_and_computes_nothing_twice(make_run, monkeypatch):
    monkeypatch.setattr(text_passes, "LOGGED_AT_ONCE", 2)
    ask = {"budgets": "full,2x4", "batch_size": 1}
    whole = evaluate(make_run(name="other"), **ask)["perplexity"]
    run, nats, done = make_run(), WindowBatches.nats, []

    def interrupted(batches, model, number, *rest, **how):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(number)
        return nats(batches, model, number, *rest, **how)

    monkeypatch.setattr(WindowBatches, "nats", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, **ask)
    again = []
    monkeypatch.setattr(WindowBatches, "nats", lambda *a, **how: again.append(a[2]) or nats(*a, **how))
    resumed = evaluate(run, **ask)["perplexity"]
    (count,) = {again.count(n) + (n in done[:4]) for n in again}  # each once a budget; the fifth was not logged yet
    assert count == 2 and again[0] == 4
    assert figures_of(resumed) == figures_of(whole)
    again.clear()
    assert evaluate(run, **ask)["perplexity"] == resumed and not again
    assert evaluate(run, budgets="full", batch_size=2)["perplexity"]["budgets"].keys() == {"full", "2x4"} and again


def test_two_processes_give_exactly_the_figures_of_one(make_run, prepared):
    """At the same time, with what torchrun sets; whoever is last writes the results, of whatever both have scored."""
    ask = ["--budgets", "2x4,full", "--batch-size", "1", "--stride", "16", "--needle-lengths", "500,520", "--needle-cases", "3"]
    alone, shared = make_run(name="alone"), make_run(name="shared")
    evaluate(alone, budgets="2x4,full", batch_size=1, stride=16, needle_lengths=[500, 520], needle_cases=3)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ssa", "eval", str(shared), "--device", "cpu", *ask],
            env=os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        shown = "".join(rank.communicate()[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0] and "of the needles found" in shown and "gap to full" in shown
    for name in ("perplexity.json", "needle.json"):
        (one,), (two,) = (saved(run, name)["results"].values() for run in (alone, shared))
        assert figures_of(two) == figures_of(one) and one["setting"] == two["setting"]
    logs = list((shared / "eval" / "items").glob("*/*/rank-*.jsonl"))
    indices = [[json.loads(line)["index"] for line in log.read_text().splitlines()] for log in logs]
    assert len(logs) == 8 and all(len({i % 2 for i in of_rank}) == 1 for of_rank in indices)


def test_a_rank_that_is_not_the_last_says_so_and_writes_no_results(make_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    out, run = io.StringIO(), make_run()
    result = evaluate(run, needle_lengths=[500], needle_cases=1, console=Console(file=out, width=300))
    assert result["perplexity"]["budgets"] == result["needle"]["budgets"] == {} and result["files"] == []
    assert out.getvalue().count("rank 1 is done; the rank that finishes last writes") == 2
    assert not list((run / "eval").glob("*.json"))


def test_notes(make_run):
    entry = evaluate(make_run("nsa"), budgets="full,16x4,2x4", max_tokens=200)["perplexity"]
    assert methods()["nsa"].full_notes[0] in entry["notes"]
    assert any(note.startswith("16x4 reads everything") for note in entry["notes"])
    assert entry["budgets"]["16x4"]["nats_per_token"] == pytest.approx(entry["budgets"]["full"]["nats_per_token"], abs=1e-5)
    assert evaluate(make_run(name="other"), budgets="full")["perplexity"]["notes"] == []


@pytest.mark.parametrize("terminal", [True, False])
def test_tables(make_run, terminal):
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, color_system=None)
    evaluate(make_run("nsa"), budgets="2x4,full", needle_lengths=[500], needle_depths=[0.5], needle_cases=1, console=console)
    text = out.getvalue()
    for expected in (
        "nsa at step 7: perplexity on",
        "gap to full",
        "2x4",
        "context 64",
        "selected branch",
        "depth 50%",
        "of the needles found",
    ):
        assert expected in text
    assert ("\x1b[" in text) == terminal  # the progress bar moves the cursor


@pytest.mark.parametrize("width", [80, 40])
def test_tables_fit_80_columns_and_never_lose_digits(width):
    """Where there are fewer, the terminal breaks the line."""
    setting = {"data": "d", "split": None, "context": 1, "stride": 1}
    row = {"nats_per_token": 12.3456, "gap_to_full": -1.2345, "perplexity": 999999.99, "word_perplexity": 2.2345e11,
           "bits_per_byte": 12.3456, "tokens_per_second": 1234567.0}  # fmt: skip
    entry = {
        "model": {"method": "ssa", "step": 7},
        "setting": setting,
        "tokens": 1,
        "documents": 1,
        "notes": [],
        "budgets": {"128x128": row},
    }
    out = io.StringIO()
    print_perplexity(Console(file=out, width=width, force_terminal=True, color_system=None), entry, ["128x128"])
    line = next(line for line in out.getvalue().splitlines() if "128x128" in line)
    assert line.split() == ["128x128", "12.3456", "-1.2345", "999999.99", "2.23e+11", "12.3456", "1,234,567"]
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_damaged_results_file_is_left_alone(make_run):
    run = make_run()
    (run / "eval").mkdir()
    (run / "eval" / "perplexity.json").write_text("{")
    with pytest.raises(UserError, match="move it away"):
        evaluate(run)
    assert (run / "eval" / "perplexity.json").read_text() == "{"


def test_a_failed_write_leaves_the_old_file(make_run, monkeypatch):
    import ssa.files

    run = make_run()
    evaluate(run, budgets="2x4")
    before = (run / "eval" / "perplexity.json").read_bytes()

    def full(descriptor):
        if "perplexity.json" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ssa.files.os, "fsync", full)
    with pytest.raises(UserError, match=r"perplexity\.json cannot be written: No space left"):
        evaluate(run, budgets="2x4", max_tokens=50)
    assert (run / "eval" / "perplexity.json").read_bytes() == before
    assert sorted(p.name for p in (run / "eval").iterdir()) == [".lock", "items", "perplexity.json"]


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"budgets": "4by16"}, "budget '4by16'"),
        ({"budgets": ""}, "names none"),
        ({"context": 1 << 20}, "exceeds the model's"),
        ({"stride": 65}, "stride = 65"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"perplexity": False}, "nothing to evaluate"),
        ({"needle_lengths": [1 << 20]}, "needle length 1048576 exceeds"),
        ({"needle_lengths": [500], "needle_depths": [2]}, "depth 2"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"data": "/nowhere/at-all.txt"}, "no such file"),
    ],
)
def test_errors(make_run, arguments, match):
    arguments = {"max_tokens": 10} | arguments
    with pytest.raises(UserError, match=match):
        evaluate(make_run(), **arguments)


def test_a_budget_that_the_released_rule_cannot_serve_is_refused_at_once(tmp_path):
    model = tiny_model(selection_rule="released", num_selected_blocks=4)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'released'"):
        evaluate(tmp_path, data="builtin:python", budgets="full,3x4", max_tokens=10)
