"""Curves of two implementations, and the control that tells rounding from an error."""

import concurrent.futures
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import curves

    return curves


def test_controls_differ_by_rounding_alone(curves, tmp_path, monkeypatch):
    """The control gets the same rows in the other order. Whether that order rounds to another loss is the processor's matter (on some it
    does not), so no least difference is asked for; bfloat16 rounds coarsely everywhere."""
    from ssa.data.prepare import prepare

    lines = [json.dumps({"text": "to select is to attend to a few blocks of many" + "." * i}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "text.jsonl"], tmp_path / "data", workers=1, valid_fraction=0.1, show_progress=False)
    args = Namespace(data=tmp_path / "data", recipe="tiny", context=32, batch_size=3, steps=3, seconds=0.0, overrides=[])
    read, forward = [], curves.SSAForCausalLM.forward
    monkeypatch.setattr(curves.SSAForCausalLM, "forward", lambda self, **rows: read.append(rows) or forward(self, **rows))
    ways = curves.ways("bfloat16")
    first = curves.curve(curves.Way("reference", "float32"), "cpu", args)
    assert first == curves.curve(ways["float32"], "cpu", args)
    in_order, read[:] = read[:3], []
    for way, low, high in ((curves.ways("float32")["reversed"], -1, 1e-3), (ways["reference"], 1e-4, 0.1)):
        largest = (torch.tensor(curves.curve(way, "cpu", args)) - torch.tensor(first)).abs().max()
        assert low < largest < high, way
    for a, b in zip(in_order, read[:3], strict=True):
        assert a["stream"] == b["stream"] and not torch.equal(a["input_ids"], b["input_ids"])
        for name in ("input_ids", "position_ids"):
            assert torch.equal(a[name].flip(0), b[name]), name


def test_the_report_holds_kernels_and_controls(curves, monkeypatch, tmp_path):
    losses = {
        ("reference", "bfloat16", False): [3.0] * 20, ("triton", "bfloat16", False): [3.0] * 10 + [3.5] * 10,
        ("reference", "bfloat16", True): [3.25] * 12, ("reference", "float32", False): [3.0] * 20,
    }  # fmt: skip
    monkeypatch.setattr(curves, "curve", lambda way, device, args: losses[tuple(way)])
    threads = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(curves.concurrent.futures, "ProcessPoolExecutor", lambda number, context: threads(number))
    arguments = ["data", "--out", str(tmp_path / "c.json"), "--dtype", "bfloat16", "--devices", "cpu", "--train.lr", "2e-4"]
    monkeypatch.setattr("sys.argv", ["curves.py", *arguments])
    curves.main()
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["apart"]["triton"] == {"steps": 20, "largest": 0.5, "mean": 0.25, "mean_by_tenth": [0.0] * 5 + [0.5] * 5}
    assert (report["apart"]["reversed"]["steps"], report["apart"]["reversed"]["largest"]) == (12, 0.25)
    assert report["apart"]["float32"]["largest"] == 0 and report["triton"] == losses["triton", "bfloat16", False]
    assert report["overrides"] == ["--train.lr", "2e-4"]
    assert report["dtype"] == "bfloat16" and report["ways"]["reversed"]["reverse"]


def test_a_control_needs_two_rows(curves, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["curves.py", "data", "--out", "x.json", "--batch-size", "1"])
    with pytest.raises(SystemExit):
        curves.main()
    assert "--batch-size 1" in capsys.readouterr().err
