"""`ssa bench kernels` on the CPU: the reference stands in for the kernels, clocks for a GPU's."""

import contextlib
import dataclasses
import importlib.machinery
import json
import sys
import types

import pytest
import torch

from ssa.bench import gate, kernels, layer
from ssa.bench.gate import GateError, check, check_layer, gate_tokens
from ssa.bench.kernel_bars import FLA, LAYER_CASE, SPEED, kernel_bars
from ssa.bench.kernels import plan, ratios
from ssa.bench.plot import plot_results
from ssa.bench.report import Bar, Deadline, Report
from ssa.bench.shapes import Shape, parse_tokens
from ssa.budget import Selection
from ssa.cli import main
from ssa.errors import UserError

SHAPE = "4/2/16:3x4"


@pytest.fixture
def calls(monkeypatch):
    """What was timed; every call takes 2 ms launched and 1 ms replayed."""
    timed = []

    def both_ways(call, seconds=0.2):
        timed.append(call())
        return {"launches": 2.0, "graph": 1.0}

    for module in (kernels, layer):
        monkeypatch.setattr(module, "both_ways", both_ways)
        monkeypatch.setattr(module, "extra_memory_gb", lambda call: 0.5)
    monkeypatch.setattr(kernels, "kernel_profile", lambda call: [{"name": "k", "count": 1.0, "us": 3.0}])
    monkeypatch.setattr(kernels, "dense_forward", lambda name, q, k, v: contextlib.nullcontext(lambda: q + k.sum() + v.sum()))
    return timed


def tiny_plan(shapes=SHAPE, tokens="40,48"):
    return dataclasses.replace(plan(shapes, tokens, "cudnn", True), device="cpu", impl="reference")


def measured(tmp_path, the_plan, seconds=0):
    report = Report(tmp_path / "k.json", Deadline(seconds), gates=[], layers=[], failures=[])
    kernels._measure(the_plan, report)
    return json.loads((tmp_path / "k.json").read_text())


@pytest.mark.parametrize(
    "text, says",
    [
        ("32/2:16x16", "32/8/128:16x64"), ("16", "BLOCKSxSIZE"), ("3/2/64:16x16", "multiple"), ("0/2/64:16x16", "0"),
    ],
)  # fmt: skip
def test_a_shape_that_is_none_is_one_line(text, says):
    with pytest.raises(UserError, match=says):
        Shape.parse(text)


def test_shapes_and_lengths():
    assert str(Shape.parse("16x16")) == "32/2/64:16x16"
    assert Shape.parse("32/8/128:16x64").dense == (32, 8, 128)
    assert str(Shape.parse("32/8/128:8x128@head")) == "32/8/128:8x128@head"
    assert Shape.parse("16x16@head").selection == Selection(16, 16, scope="head")
    assert Shape.parse("16x16@group") == Shape.parse("16x16")
    assert parse_tokens("32k,100,8192,100") == [100, 8192, 32768]
    with pytest.raises(UserError, match="8m"):
        parse_tokens("8m")


def test_peers_and_quick():
    assert plan("16x16", "", "flash", False).peers == ("cudnn", "flash")  # ratios need the baseline
    assert plan("16x16", "", "auto", True).tokens == (8192, 32768)
    assert plan("16x16", "128k", "auto", False).flex_tokens < 131072 <= plan("16x16", "128k", "flex", False).flex_tokens
    with pytest.raises(UserError, match="cuddn"):
        plan("16x16", "", "cuddn", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert main(["bench", "kernels", "--out", str(tmp_path / "x.json")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_gate_passes_the_reference():
    shape = Shape.parse(SHAPE)
    errors = check(shape, gate_tokens(shape), "cpu", "reference", oracle=plain_attention)
    assert errors["rows_equal"] == 1 and {"score_error", "out", "lse", "dq", "dk", "dv", "out_naive_nsa"} < set(errors)
    assert 0 < errors["dk"] < 5e-3


def test_long_rows_are_checked_in_windows(monkeypatch):
    monkeypatch.setattr(gate, "WHOLE", 100)
    monkeypatch.setattr(gate, "WINDOW", 16)
    shape = Shape.parse(SHAPE)
    whole, windows = check(shape, 100, "cpu", "reference"), check(shape, 101, "cpu", "reference")
    assert whole.keys() == windows.keys() and max(windows["dk"], windows["dv"]) < 5e-3
    # wrong for the keys that a window's queries read, in the middle of the row alone
    monkeypatch.setattr(gate, "block_sparse_attention", wrong_in_the_middle)
    with pytest.raises(GateError, match="dv"):
        check(shape, 101, "cpu", "reference")


def plain_attention(q, k, v, block_indices, block_size):
    from ssa.testing import attention_oracle

    return attention_oracle(q.double(), k.double(), v.double(), block_indices.transpose(1, 2).int(), block_size=block_size)[0]


def only_on_trial(change):
    """block_sparse_attention that is changed in bf16 and left alone in fp64."""

    def wrong(q, k, v, block_indices, **options):
        from ssa.ops import block_sparse_attention

        if q.dtype == torch.float64:
            return block_sparse_attention(q, k, v, block_indices, **options)
        return change(*block_sparse_attention(q, k, v, block_indices, **options))

    return wrong


def wrong_in_the_middle(q, k, v, block_indices, **options):
    from ssa.ops import block_sparse_attention

    if q.dtype != torch.float64:
        scale = torch.ones_like(v)
        scale[:, 48:52] = 1.5
        v = v.detach() + (v - v.detach()) * scale  # the same values, other gradients
    return block_sparse_attention(q, k, v, block_indices, **options)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda out, lse: (out * 1.02, lse), "out"),
        (lambda out, lse: (out, lse + 0.1), "lse"),
        (lambda out, lse: (torch.where(torch.arange(out.shape[1])[:, None, None] == 30, torch.nan, out), lse), "out"),
    ],
)
def test_gate_stops_a_wrong_output(monkeypatch, change, says):
    monkeypatch.setattr(gate, "block_sparse_attention", only_on_trial(change))
    shape = Shape.parse(SHAPE)
    with pytest.raises(GateError, match=says):
        check(shape, gate_tokens(shape), "cpu", "reference")


def test_gate_stops_a_gradient_that_is_not_reproducible(monkeypatch):
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + 0.02 * torch.randn_like(grad)

    monkeypatch.setattr(gate, "block_sparse_attention", only_on_trial(lambda out, lse: (Noisy.apply(out), lse)))
    with pytest.raises(GateError, match="two backward passes differ"):
        check(Shape.parse(SHAPE), 55, "cpu", "reference")


def test_gate_stops_a_wrong_selection(monkeypatch):
    from ssa.ops import select_blocks

    def lowest_blocks(q, k, selection, **options):
        index, score = select_blocks(q, k, selection, **options)
        if q.dtype == torch.float64:
            return index, score
        full = index[:, :, -1] >= 0
        index[:, :, -1] = torch.where(full, torch.tensor([0, 1, 13], dtype=torch.int32), index[:, :, -1])
        score[:, :, -1, 0] *= 0.5
        return index, score

    monkeypatch.setattr(gate, "select_blocks", lowest_blocks)
    with pytest.raises(GateError, match="score_error"):
        check(Shape.parse(SHAPE), 55, "cpu", "reference")


def test_gate_of_the_layer(monkeypatch):
    shape = Shape.parse(SHAPE)
    assert check_layer(shape, "cpu", "reference")["sparse_dgate"] < 1e-2

    class Louder(gate.SSA):
        def __call__(self, selector, inputs, call):
            result = super().__call__(selector, inputs, call)
            return result if inputs.q_BTHD.dtype == torch.float64 else result._replace(alignment=1.1 * result.alignment)

    monkeypatch.setattr(gate, "SSA", Louder)
    with pytest.raises(GateError, match="full_alignment"):
        check_layer(shape, "cpu", "reference")


def test_rows_have_what_the_bars_and_the_picture_need(calls, tmp_path):
    data = measured(tmp_path, tiny_plan())
    assert [(row["shape"], row["tokens"]) for row in data["rows"]] == [(SHAPE, 40), (SHAPE, 48)]
    row = data["rows"][0]
    assert set(row["ours"]) == {"means", "select", "attend", "attend_both", "forward", "both", "backward", "memory_gb"}
    assert row["ratios"]["cudnn"]["both"] == {"launches": 1.0, "graph": 1.0} and row["ratios"]["memory"] == 1
    assert row["profile"] and "profile" not in data["rows"][1]  # at the shortest length alone
    assert data["layers"][0]["ratio"] == {"launches": 1.0, "graph": 1.0}
    assert len(data["gates"]) == 4 and not data["failures"]  # once, at each length, and the layer
    (tmp_path / "k.json").write_text(
        json.dumps(data | {"hardware": {"device": "none"}, "versions": {"torch": "2"}, "dtype": "bf16"})
    )
    picture = plot_results(tmp_path / "k.json", tmp_path / "k.svg").read_text()
    assert picture.startswith("<?xml") and "3x4" in picture


def flash_moba(monkeypatch, attend):
    """A stand-in for FlashMoBA's package."""
    package, interface = types.ModuleType("flash_moba"), types.ModuleType("flash_moba.flash_moba_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_moba", None)
    interface.flash_moba_varlen_func = attend
    monkeypatch.setitem(sys.modules, "flash_moba", package)
    monkeypatch.setitem(sys.modules, "flash_moba.flash_moba_interface", interface)


def test_flash_moba_is_a_peer_where_it_is_installed(calls, monkeypatch, tmp_path):
    from ssa.ops import block_sparse_attention, select_blocks

    with pytest.raises(UserError, match="--peers flash-moba needs mit-han-lab/flash-moba"):
        plan(SHAPE, "40", "flash-moba", False)

    def attend(q, k, v, ends, same, longest, longest_too, block, count, causal):
        assert ends is same and ends.tolist() == [0, 40] and (longest, longest_too, block, count, causal) == (40, 40, 4, 3, True)
        q, k, v = (x[None] for x in (q, k, v))
        index, _ = select_blocks(q, k, Selection(count, block, "head", "logit"))
        return 1.01 * block_sparse_attention(q, k, v, index, block_size=block)[0][0]

    flash_moba(monkeypatch, attend)
    assert "flash-moba" in plan(SHAPE, "40", "auto", False).peers
    the_plan = dataclasses.replace(plan(SHAPE, "40", "flash-moba", True), device="cpu", impl="reference")
    assert the_plan.peers == ("cudnn", "flash-moba")
    (row,) = measured(tmp_path, the_plan)["rows"]
    assert row["flash-moba"]["difference"] == pytest.approx(0.01, abs=3e-3) and row["flash-moba"]["both"]["graph"] == 1.0
    assert row["ratios"]["flash-moba"]["both"] == {"launches": 1.0, "graph": 1.0}
    assert row["ratios"]["flash-moba"]["backward"] == {"launches": 0.0, "graph": 0.0}  # of two equal times


def test_flash_moba_that_refuses_says_why(calls, monkeypatch, tmp_path):
    def refuse(*arguments, causal):
        raise RuntimeError("FlashMoBA was built for heads of 128\nand more")

    flash_moba(monkeypatch, refuse)
    (row,) = measured(tmp_path, dataclasses.replace(plan(SHAPE, "40", "flash-moba", True), device="cpu", impl="reference"))[
        "rows"
    ]
    assert row["flash-moba"] == {"error": "FlashMoBA was built for heads of 128"}
    assert row["ratios"]["flash-moba"]["forward"] == {"launches": None, "graph": None}


def test_a_failing_gate_stops_the_clock(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "block_sparse_attention", only_on_trial(lambda out, lse: (2 * out, lse)))
    data = measured(tmp_path, tiny_plan())
    assert not calls and not data["rows"] and not data["layers"]
    assert len(data["failures"]) == 1 and "out 1" in data["failures"][0]


def test_a_gate_that_fails_at_one_length_leaves_the_others(calls, monkeypatch, tmp_path):
    def wrong_at_48(out, lse):
        return (2 * out if out.shape[1] == 48 else out), lse

    monkeypatch.setattr(gate, "block_sparse_attention", only_on_trial(wrong_at_48))
    data = measured(tmp_path, tiny_plan())
    assert [row["tokens"] for row in data["rows"]] == [40] and "at 48 tokens" in data["failures"][0]


def test_a_spent_budget_skips_and_says_so(calls, tmp_path):
    data = measured(tmp_path, tiny_plan(), seconds=1e-9)
    assert not calls and not data["rows"] and f"{SHAPE} at 40 tokens" in data["skipped"][0]


def test_a_ratio_by_graphs_needs_both(calls):
    long, short, failed = {"launches": 60.0, "graph": None}, {"launches": 2.0, "graph": 1.5}, {"launches": 3.0, "graph": None}

    def ratio(theirs, ours):
        times = {"forward": ours, "both": ours, "attend": ours, "attend_both": ours, "memory_gb": 1.0}
        return ratios({"ours": times, "dense": {"cudnn": {"forward": theirs, "both": theirs}}})["cudnn"]["forward"]

    assert ratio(long, short) == {"launches": 30.0, "graph": 40.0}  # the launches of a long call do not count
    assert ratio(failed, short) == {"launches": 1.5, "graph": None}
    assert ratio(short, failed)["graph"] is None


def fake_row(shape, tokens, factor):
    def pair(values):
        return {key: {"launches": factor * bar, "graph": 2 * bar} for key, bar in zip(("forward", "both"), values, strict=True)}

    speed = SPEED[shape].get(tokens, (1.0, 1.0))
    return {"shape": shape, "tokens": tokens, "ratios": {"cudnn": pair(speed), "fla": pair(FLA), "memory": 0.6 / factor}}


@pytest.mark.parametrize("factor, reached", [(1.0, True), (0.99, False)])
def test_bars_from_rows(factor, reached):
    rows = [fake_row(shape, 1024 * k, factor) for shape in SPEED for k in (8, 32, 128)]
    ratio = {"launches": 1.7 / factor, "graph": 1.0}
    layers = [{"shape": LAYER_CASE[0], "tokens": LAYER_CASE[1], "how": how, "ratio": ratio} for how in ("eager", "compiled")]
    bars = [bar.to_dict() for bar in kernel_bars(rows, layers)]
    assert {bar["reached"] for bar in bars} == {reached} and len({bar["name"] for bar in bars}) == len(bars) == 34
    assert all(bar["reached_graph"] for bar in bars if "reached_graph" in bar)


def test_bars_of_what_was_not_measured():
    bars = kernel_bars([], [])
    assert all(bar.value is None and bar.to_dict()["reached"] is None for bar in bars)
    assert "not measured" in str(bars[0])


def test_a_bar_from_above():
    assert Bar("memory", 0.6, 0.5, "<=").to_dict()["reached"] is True
    assert Bar("memory", 0.6, 0.7, "<=").to_dict()["reached"] is False


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "no json",
        '{"rows": [{"shape": "a"}]}',
        '{"rows": [], "versions": {"torch": "2"}, "hardware": {"device": "x"}, "dtype": "b"}',
    ],
)
def test_plot_refuses_other_files(tmp_path, content, capsys):
    (tmp_path / "k.json").write_text(content)
    assert main(["bench", "plot", str(tmp_path / "k.json"), "--out", str(tmp_path / "k.svg")]) == 2
    assert "k.json" in capsys.readouterr().err and not (tmp_path / "k.svg").exists()


@pytest.mark.parametrize("out", [".", "file/k.json"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Report(tmp_path / out, Deadline(0))


def test_a_budget_is_no_negative_time():
    with pytest.raises(UserError, match="budget_seconds"):
        Deadline(-1)
