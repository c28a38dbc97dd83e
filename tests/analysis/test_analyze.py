"""From run directories to files, table and page, with tiny random models."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from ssa.analysis import measure
from ssa.analysis.analyze import analyze
from ssa.analysis.dense_pass import dense_pass
from ssa.analysis.measure import measure_model
from ssa.analysis.rows import packed_rows
from ssa.analysis.selection import distance_histogram, selection_overlap
from ssa.analysis.sparsity import attention_figures
from ssa.budget import Budget, Selection
from ssa.data.tokenizer import byte_tokenizer, encode_documents
from ssa.errors import UserError
from ssa.ops import select_blocks
from ssa.report.report import write_analysis_report
from ssa.testing import LargestTensor, document_positions, random_qkv, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 12


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def make_run(tmp_path):
    def make(name, method="ssa", **changes):
        path = tmp_path / "runs" / name
        tiny_model(method, **changes).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    return make


def quiet():
    return Console(file=io.StringIO(), width=100)


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_measured_losses_and_divergence_equal_those_of_the_model(method):
    model = tiny_model(method)
    ids, positions = torch.randint(258, (3, 40)), document_positions([11, 29], 3)
    figures = measure_model(model, ids, positions, Budget(2, 4), decode_steps=2)
    nll = {
        mode: model.token_nll(ids, position_ids=positions, attention_mode=mode, budget="2x4").double().sum().item() / (3 * 38)
        for mode in ("full", "sparse")
    }
    assert figures["decode"]["prompt_tokens"] == 29  # the longest document
    tokens = figures["predictions"]["all_tokens"]
    assert tokens["cross_entropy_full"] == pytest.approx(nll["full"], rel=1e-5)
    assert tokens["cross_entropy_sparse"] == pytest.approx(nll["sparse"], rel=1e-5)
    assert tokens["kl_nats"] > 1e-6 and tokens["tokens"] == 120
    assert figures["predictions"]["beyond_receptive_field"]["tokens"] == 3 * (3 + 21)
    for mode in ("sparse", "full"):
        layers = figures["inference"][mode]["layers"]
        assert [layer["layer"] for layer in layers] == [0, 1]
        assert all(layer["theorem_1"]["violations"] == 0 for layer in layers)
        assert (
            figures["inference"][mode]["beyond_receptive_field"]["kept_mass"]
            < figures["inference"][mode]["all_queries"]["kept_mass"]
            < 1
        )
    # the first layer sees the same input in both modes
    first = [figures["inference"][mode]["layers"][0]["all_queries"]["kept_mass"] for mode in ("sparse", "full")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize("scope", ["group", "head"])
def test_a_budget_that_covers_everything_changes_nothing(scope):
    model = tiny_model("ssa", selection_scope=scope, selection_scoring="logit")
    figures = measure_model(model, torch.randint(258, (1, 40)), torch.arange(40)[None], Budget(10, 4))
    assert figures["predictions"]["all_tokens"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert figures["predictions"]["all_tokens"]["top1_agreement"] == 1
    assert figures["predictions"]["beyond_receptive_field"] is None
    assert figures["inference"]["sparse"]["beyond_receptive_field"] is None
    assert figures["inference"]["sparse"]["all_queries"]["kept_mass"] == pytest.approx(1)


def test_memory_does_not_grow_with_the_square_of_the_row():
    largest = []
    for tokens in (500, 1000):
        q, k, v = (x.detach() for x in random_qkv(1, tokens, tokens, 2, 1, 8))
        index, _ = select_blocks(q, k, Selection(2, 16))
        with LargestTensor() as seen:
            dense_pass(q[0], k[0], v[0], q[0], index[0], block_size=16, scale=1.0, tile=1 << 13)
        assert seen.elements <= max(1 << 13, q.numel())
        with LargestTensor() as seen:
            attention_figures(q, k, v, index, block_size=16, tile=1 << 13)
            distance_histogram(index, torch.arange(tokens)[None], 16)
            selection_overlap(index, torch.arange(tokens)[None], 32)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0]


def test_several_runs_end_in_files_a_table_and_a_report(make_run, text, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [make_run("one", "full"), make_run("two", "ssa")]
    console = quiet()
    result = analyze(runs, data=text, context=64, max_tokens=256, budget="2x4", device="cpu", console=console)
    assert result.files == [
        runs[0] / "analysis/analysis.json",
        runs[1] / "analysis/analysis.json",
        tmp_path / "runs/analysis/comparison.json",
    ]
    report = write_analysis_report(result)
    assert report == tmp_path / "runs/analysis/report.html" and "two" in report.read_text()
    one = json.loads(result.files[0].read_text())
    assert (one["method"], one["budget"], one["dtype"], one["device"]) == ("full", "2x4", "float32", "cpu")
    assert one["measured"] == {
        "data": "text.txt",
        "split": None,
        "context": 64,
        "rows": 4,
        "tokens": 256,
        "seed": 0,
        "whole_documents": False,
    }
    assert one["versions"]["torch"] == torch.__version__
    assert json.loads(result.files[2].read_text())["runs"] == [run.analysis for run in result.runs]
    printed = console.file.getvalue()
    assert "one" in printed and "kept mass, sparse inference" in printed and "Theorem 1: 0 of" in printed
    again = analyze(runs, data=text, context=64, max_tokens=256, budget="2x4", device="cpu", console=quiet())
    assert [r.analysis for r in again.runs] == [r.analysis for r in result.runs]


def test_with_out_the_run_is_left_as_it_was(make_run, text, tmp_path):
    run = make_run("one")
    before = sorted(run.rglob("*"))
    result = analyze([run], data=text, context=64, max_tokens=128, out=tmp_path / "here", device="cpu", console=quiet())
    assert result.files == [tmp_path / "here/analysis.json"] and sorted(run.rglob("*")) == before
    assert result.runs[0].analysis["budget"] == "3x4"  # the model's own


def test_what_cannot_be_analysed_is_one_line(make_run, text, tmp_path):
    run, empty = make_run("one"), tmp_path / "empty.txt"
    empty.touch()
    for arguments, message in (
        ({"runs": []}, "at least one run"),
        ({"runs": [tmp_path / "no"]}, "no model at"),
        ({"runs": [run]}, "--data"),
        ({"runs": [run], "data": tmp_path / "no.txt"}, r"no\.txt"),
        ({"runs": [run], "data": empty}, r"empty\.txt holds no text"),
        ({"runs": [run], "data": text, "context": 1}, "context = 1"),
        ({"runs": [run], "data": text, "max_tokens": 1}, "max_tokens = 1"),
        ({"runs": [run], "data": text, "budget": "4"}, "BLOCKSxSIZE"),
        ({"runs": [run], "data": text, "seed": -1}, "seed = -1"),
        ({"runs": [make_run("short", max_position_embeddings=32)], "data": text, "context": 64}, "32 positions"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            analyze(**arguments, device="cpu", console=quiet())
        assert "\n" not in str(caught.value)


def test_runs_with_different_tokenizers_do_not_compare(make_run, text):
    from ssa.data.tokenizer import train_bpe

    one, other = make_run("one"), make_run("other", vocab_size=300)
    train_bpe([TEXT], 270).save_pretrained(other)
    with pytest.raises(UserError, match="another tokenizer"):
        analyze([one, other], data=text, device="cpu", console=quiet())


def test_figures_that_are_not_finite_leave_no_file(make_run, text):
    run = make_run("broken")
    model = tiny_model("ssa")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(run)
    with pytest.raises(UserError, match="not finite"):
        analyze([run], data=text, context=64, max_tokens=128, device="cpu", console=quiet())
    assert not list(run.rglob("*.json.tmp*")) and not (run / "analysis" / "analysis.json").exists()


def test_rows_are_whole_seeded_and_restart_at_documents(tmp_path):
    for name, length in (("a", 30), ("b", 50), ("c", 200)):
        (tmp_path / f"{name}.txt").write_text(name * length)
    tokenizer = byte_tokenizer()
    everything = np.concatenate(encode_documents(tokenizer, ["a" * 30, "b" * 50, "c" * 200]))
    rows = packed_rows(tmp_path, tokenizer, split="valid", context=64, max_tokens=10_000, seed=0)
    assert rows.input_ids.flatten().tolist() == everything[:256].tolist()
    assert rows.position_ids[0].tolist() == [*range(31), *range(33)]
    assert rows.position_ids[1, :20].tolist() == [*range(18), 0, 1]  # 33 of b's 51 tokens are in the row before
    some = packed_rows(tmp_path, tokenizer, split="valid", context=64, max_tokens=130, seed=3)
    assert some.about["rows"] == 2 and all(row in rows.input_ids.tolist() for row in some.input_ids.tolist())
    draws = [
        packed_rows(tmp_path, tokenizer, split="valid", context=64, max_tokens=130, seed=seed).input_ids for seed in range(9)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) > 1
    assert packed_rows(tmp_path, tokenizer, split="valid", context=9999, max_tokens=10_000, seed=0).about["context"] == len(
        everything
    )


def test_whole_documents_begin_rows_and_short_ones_are_left_out(tmp_path):
    for name, length in (("a", 30), ("b", 90), ("c", 200)):
        (tmp_path / f"{name}.txt").write_text(name * length)
    tokenizer = byte_tokenizer()
    arguments = {"split": "valid", "seed": 0, "whole_documents": True}
    rows = packed_rows(tmp_path, tokenizer, context=64, max_tokens=1000, **arguments)
    assert [set(row[1:].tolist()) for row in rows.input_ids] == [
        set(encode_documents(tokenizer, [x])[0][:1].tolist()) for x in "bc"
    ]
    assert rows.position_ids.tolist() == [list(range(64))] * 2 and rows.about["whole_documents"]
    assert packed_rows(tmp_path, tokenizer, context=64, max_tokens=127, **arguments).about["rows"] == 1
    for context, tokens, message in ((500, 1000, "no document of 500"), (64, 63, "max_tokens = 63")):
        with pytest.raises(UserError, match=message):
            packed_rows(tmp_path, tokenizer, context=context, max_tokens=tokens, **arguments)


def test_one_long_row_is_read_by_default_even_beyond_the_usual_number_of_tokens(make_run, text, monkeypatch):
    monkeypatch.setattr("ssa.analysis.analyze.MAX_TOKENS", 40)
    result = analyze([make_run("one")], data=text, context=64, device="cpu", console=quiet(), decode_steps=4)
    assert result.runs[0].analysis["measured"]["tokens"] == 64
    assert result.runs[0].analysis["decode"]["steps"] == 4
    assert sum(result.runs[0].analysis["predictions"]["by_position"]["tokens"]) == 64


@pytest.mark.parametrize("asked, max_tokens, got, why", [(5000, None, len(TEXT) + 1, "the text has no more"), (400, 100, 100, "max_tokens = 100"), (64, 128, 64, "")])  # fmt: skip
def test_rows_shorter_than_asked_are_told_in_a_line(make_run, text, asked, max_tokens, got, why):
    out = io.StringIO()
    result = analyze(
        [make_run("one")], data=text, context=asked, max_tokens=max_tokens, device="cpu", decode_steps=0,
        console=Console(file=out, width=200),
    )  # fmt: skip
    assert result.runs[0].analysis["measured"]["context"] == got
    lines = [line for line in out.getvalue().splitlines() if "shortened" in line]
    assert len(lines) == (1 if why else 0) and all(f"context = {asked} is shortened to {got}: {why}" in line for line in lines)


@pytest.mark.parametrize("rows, context", [(3, 64), (1, 100)])
def test_two_ranks_give_the_figures_of_one(make_run, text, tmp_path, run_on_two_ranks, rows, context):
    """With an odd number of rows, and one rank that has none; rank 0 alone writes and speaks."""
    run = make_run("one")
    arguments = {"context": context, "max_tokens": 64 * rows, "decode_steps": 3}
    alone = analyze([run], data=text, out=tmp_path / "alone", device="cpu", console=quiet(), **arguments)
    shared = tmp_path / "shared"
    flags = [x for name, value in arguments.items() for x in (f"--{name.replace('_', '-')}", value)]
    said = run_on_two_ranks("-m", "ssa", "analyze", run, "--data", text, "--out", shared, "--device", "cpu", *flags)
    assert "kept mass" in said[0][0] and ("shortened" in said[0][0]) == (rows == 1) and said[1][0] == ""
    assert sorted(path.name for path in shared.iterdir()) == ["analysis.json", "report.html"]
    assert_alike(json.loads((shared / "analysis.json").read_text()), alone.runs[0].analysis)


def test_the_bar_comes_to_its_end_where_another_rank_reads_the_other_rows(make_run, text, monkeypatch):
    totals, steps = [], []
    monkeypatch.setattr(Progress, "add_task", lambda self, name, total: totals.append(total))
    monkeypatch.setattr(Progress, "advance", lambda self, task, done: steps.append(done))
    monkeypatch.setattr(measure, "ROW_TOKENS", 64)
    monkeypatch.setattr(measure, "meet", lambda: None)
    monkeypatch.setattr(measure, "gather", lambda value: [value])  # as if the other one had found nothing
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    analyze([make_run("one")], data=text, context=64, max_tokens=64 * 5, decode_steps=0, device="cpu", console=quiet())
    assert totals == [2] and steps == [1, 1]


def assert_alike(found, expected):
    """Equal but for rounding, all the way down."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


def test_entropy_units_agree():
    figures = measure_model(tiny_model("ssa"), torch.randint(258, (1, 30)), torch.arange(30)[None], Budget(2, 4))
    means = figures["inference"]["full"]["all_queries"]
    assert means["entropy_bits"] * math.log(2) == pytest.approx(means["entropy_nats"])
