"""What the comparison of resumed runs sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def resume(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import resume

    return resume


def write(run, losses, weight):
    for step in (2, 4):
        (run / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
        save_file(
            {"w": torch.full((3,), float(step)) + weight}, run / "checkpoints" / f"step-0000000{step}" / "model.safetensors"
        )
    lines = [{"kind": "train", "step": i + 1, "loss": loss} for i, loss in enumerate(losses)] + [{"kind": "valid", "step": 4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_and_last_weights_are_compared(resume, tmp_path):
    for name, losses, weight in (("whole", [4, 3, 2, 1], 0.0), ("same", [4, 3, 2, 1], 0.0), ("other", [4, 3, 2, 1.5], 0.25)):
        write(tmp_path / name, losses, weight)
    whole = tmp_path / "whole"
    assert resume.apart(whole, tmp_path / "same") == {
        "largest_loss_difference": 0, "first_step_apart": None, "weights_equal": True, "largest_weight_difference": 0,
    }  # fmt: skip
    assert resume.apart(whole, tmp_path / "other") == {
        "largest_loss_difference": 0.5, "first_step_apart": 4, "weights_equal": False, "largest_weight_difference": 0.25,
    }  # fmt: skip
    write(tmp_path / "short", [4, 3, 2], 0.0)
    with pytest.raises(AssertionError, match="short has logged 3 steps of 4"):
        resume.apart(whole, tmp_path / "short")


def test_a_line_that_is_being_written_is_left_out(resume, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "st')
    assert resume.losses(tmp_path) == {1: 2.0} and resume.losses(tmp_path / "nothing") == {}


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_one_left_alone(tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]

    run("-m", "ssa", "prepare", "builtin:python", "--out", tmp_path / "data")
    run(BENCHMARKS / "resume.py", tmp_path / "data", "--runs", tmp_path / "runs", "--steps", 12, "--save-every", 3, "--parallel", "ddp", "--out",
        tmp_path / "out.json", "--data.context", 128, "--train.batch-size", 1, "--train.accumulation", 1)  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["found"]["ddp"]
    assert found["killed"]["last_start_at"] in (6, 9) and found["control"]["last_start_at"] == 0
    assert found["stopped"]["last_start_at"] >= found["stopped"]["interrupted_after"] >= 8
    assert all(result["weights_equal"] and result["first_step_apart"] is None for result in found.values())
