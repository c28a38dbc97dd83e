"""What a run that was interrupted does when it is started again, and what is looked at before one begins."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssa.config import DataRecipe, ModelRecipe, Recipe, TrainRecipe
from ssa.errors import UserError


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import evidence

    return evidence


@pytest.fixture
def data(tmp_path):
    from ssa.data.prepare import prepare

    lines = [json.dumps({"text": "to select is to attend to a few blocks of many" + "." * i}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "text.jsonl"], tmp_path / "data", workers=1, valid_fraction=0.1, show_progress=False)
    return tmp_path / "data"


def make(data, steps, **changes):
    model = ModelRecipe(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    fields = {"steps": steps, "batch_size": 2, "log_every": 1, "device": "cpu"} | changes
    return Recipe(model, DataRecipe(str(data), context=16), TrainRecipe(**fields))


def test_a_complete_training_is_only_measured(evidence, data, tmp_path, monkeypatch):
    run, path = tmp_path / "run", tmp_path / "x.json"
    first = evidence.trained("x", make(data, 2), run, path)
    assert [line["step"] for line in first["curve"] if "loss" in line] == [1, 2]
    waits = [1e3 * line["data_wait"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[:2])]
    expected = pytest.approx({"mean_ms": sum(waits) / 2, "largest_ms": max(waits)}, rel=1e-5)
    assert first["data_wait"] == expected and json.loads(path.read_text())["data_wait"] == expected

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "train", fail)
        again = evidence.trained("x", make(data, 2), run, path)
        assert again == json.loads(path.read_text()) and again["seconds"]["train"] == pytest.approx(
            first["seconds"]["train"], rel=1e-5
        )
        with pytest.raises(AssertionError, match="trained again"):  # the report is of another length
            evidence.trained("x", make(data, 3), run, path)
    path.unlink()  # cut off between the last checkpoint and the report
    assert evidence.trained("x", make(data, 2), run, path)["validation"] == first["validation"]


def test_a_checkpoint_is_gone_on_from(evidence, data, tmp_path):
    run, path = tmp_path / "run", tmp_path / "x.json"
    whole = evidence.trained("x", make(data, 4, save_every=2), tmp_path / "whole", tmp_path / "whole.json")
    evidence.trained("x", make(data, 4, save_every=2), run, path)
    path.unlink()
    shutil.rmtree(evidence.checkpoint_path(run, 4))
    report = evidence.trained("x", make(data, 4, save_every=2), run, path)
    assert report["validation"] == whole["validation"]
    assert [start["step"] for start in report["environment"]["starts"]] == [0, 2]


def test_a_run_of_another_recipe_is_left_alone(evidence, data, tmp_path):
    run = tmp_path / "run"
    evidence.trained("x", make(data, 2), run, tmp_path / "x.json")
    with pytest.raises(UserError, match=r"train\.lr"):
        evidence.trained("x", make(data, 2, lr=0.5), run, tmp_path / "x.json")
    assert evidence.find_checkpoints(run) == [evidence.checkpoint_path(run, 2)]


def test_a_signal_ends_the_program_before_anything_is_measured(evidence, data, tmp_path, monkeypatch):
    from ssa.train.trainer import TrainResult

    monkeypatch.setattr(evidence, "train", lambda recipe, run, resume: TrainResult(run, run, 1, None, "SIGTERM"))
    with pytest.raises(SystemExit, match="stopped by SIGTERM after step 1"):
        evidence.trained("x", make(data, 2), tmp_path / "run", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("program", "missing"),
    [("adapt", "model"), ("adapt", "data"), ("adapt", "--wikitext"), ("evidence", "data"), ("evidence", "--wikitext"), ("evidence", "--books")],
)  # fmt: skip
def test_files_are_looked_for_before_training(evidence, program, missing, data, tmp_path, monkeypatch):
    import adapt

    module = {"adapt": adapt, "evidence": evidence}[program]
    monkeypatch.setattr(module, "trained", lambda *a: pytest.fail("began to train"))
    there, absent = str(tmp_path / "text.jsonl"), str(tmp_path / "absent.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    arguments = [absent if missing == "model" else str(tmp_path / "model")] if program == "adapt" else []
    arguments += [absent if missing == "data" else str(data), "--out", str(tmp_path / "out"), "--wikitext", there]
    if missing.startswith("--"):
        arguments += [missing, absent]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        module.main()
    assert not (tmp_path / "out").exists()


def program(module, monkeypatch, data, tmp_path, names):
    """`main` over `names` with trainings and measurements that only say that they were asked for; what was trained."""
    asked = []
    report = {"seconds": {"train": 5.0}, "recipe": make(data, 2).to_dict(), "curve": [{"loss": 1.0, "tokens_per_second": 32.0}]}
    monkeypatch.setattr(module, "trained", lambda name, *a: asked.append(name) or json.loads(json.dumps(report)))
    monkeypatch.setattr(module, "measure", lambda *a: {"answer": 42})
    monkeypatch.setattr(
        "sys.argv",
        ["evidence.py", str(data), "--out", str(tmp_path / "out"), "--runs", names, "--recipe", "tiny", "--seconds", "60"],
    )
    assert module.main() == 0
    return asked


def test_trained_but_not_measured_is_not_kept(evidence, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "full.trained.json").write_text("{}")
    (tmp_path / "out" / "moba.json").write_text("{}")
    assert program(evidence, monkeypatch, data, tmp_path, "full,moba") == ["full"]
    assert "moba: kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "full.json").read_text())["figures"] == {"answer": 42}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["full.json", "moba.json"]


def test_a_run_that_another_process_has_is_left_to_it(evidence, data, tmp_path, monkeypatch, capsys):
    ready = "import sys, evidence, pathlib\nwith evidence.claimed(pathlib.Path(sys.argv[1]), pathlib.Path('full.json'), 0.0) as reason: print(reason, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", ready, str(tmp_path / "out" / "runs")],
        stdin=-1,
        stdout=-1,
        text=True,
        cwd=Path(evidence.__file__).parent,
    ) as other:
        try:
            assert other.stdout.readline() == "None\n"
            assert program(evidence, monkeypatch, data, tmp_path, "full,moba") == ["moba"]
            assert "full: another process has it" in capsys.readouterr().out
        finally:
            other.kill()  # its claim goes with it
    assert program(evidence, monkeypatch, data, tmp_path, "full,moba") == ["full"]


@pytest.mark.parametrize("module", ["evidence", "adapt"])
def test_a_run_that_failed_is_tried_by_those_that_start_later_only(evidence, module, data, tmp_path, monkeypatch, capsys):
    """Another process, which fails, is played by this one."""
    module = importlib.import_module(module)
    monkeypatch.setattr(module, "resolve_checkpoint", lambda path: path, raising=False)
    model = [str(tmp_path / "model")] if module is not evidence else []
    monkeypatch.setattr(
        sys, "argv", ["x", *model, str(data), "--out", str(tmp_path / "out"), "--runs", "full,moba", "--recipe", "tiny"]
    )
    tried, works = [], False

    def trained(name, *rest):
        tried.append(name)
        if name == "full":
            with pytest.raises(RuntimeError), evidence.claimed(tmp_path / "out" / "runs", tmp_path / "out" / "moba.json", 0.0):
                raise RuntimeError("in another process")
        if not works:
            raise RuntimeError("here")
        return {"seconds": {"train": 5.0}, "recipe": make(data, 2).to_dict(), "curve": [{"loss": 1.0, "tokens_per_second": 32.0}]}

    monkeypatch.setattr(module, "trained", trained)
    monkeypatch.setattr(module, "measure", lambda *a: {})
    notes = tmp_path / "out" / "runs" / ".claims"
    assert module.main() == 1 and tried == ["full"]
    assert "moba: failed in another process" in capsys.readouterr().out
    assert "RuntimeError: here" in json.loads((notes / "full.failed").read_text())["error"]
    works = True
    assert module.main() == 0 and tried == ["full", "full"]  # the one of moba is newer again
    assert module.main() == 0 and tried == ["full", "full", "moba"]
    assert not list(notes.glob("*.failed"))


def test_looking_at_a_run_takes_it_from_nobody(evidence, tmp_path, monkeypatch):
    """While one process says that a run is finished, or that there is no time for it, another can have it."""
    work, path = tmp_path / "runs", tmp_path / "full.json"
    path.write_text("{}")
    with evidence.claimed(work, path, 0.0) as reason:
        path.unlink()
        with evidence.claimed(work, path, 0.0) as other:
            assert (reason, other) == ("kept", None)


def test_no_run_begins_that_would_not_end_in_time(evidence, data, tmp_path, monkeypatch, capsys):
    """`program` has 60 seconds and FullAttn's steps take 2 of them, so SSA's 3 fit beside the overhead; then 40 as slow a step."""
    assert program(evidence, monkeypatch, data, tmp_path, "full,ssa,nsa") == ["full", "ssa", "nsa"]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setitem(evidence.COSTS, "ssa", 40.0)
    claims, claimed = [], evidence.claimed
    monkeypatch.setattr(evidence, "claimed", lambda work, path, began: claims.append(path.stem) or claimed(work, path, began))
    assert program(evidence, monkeypatch, data, tmp_path, "full,ssa,nsa") == claims == ["full", "nsa"]
    assert "ssa: no time left" in capsys.readouterr().out


def test_a_second_run_of_a_process_compiles_anew(evidence, data, tmp_path, monkeypatch):
    import torch

    order = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: order.append("reset"))
    monkeypatch.setattr(evidence, "train", lambda recipe, run, resume: order.append("train") or sys.exit())
    for compiled in (True, False):
        with pytest.raises(SystemExit):
            evidence.trained("x", make(data, 2, compile=compiled), tmp_path / "run", tmp_path / "x.json")
    assert order == ["reset", "train", "train"]
