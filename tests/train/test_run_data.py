"""Where a run's data lies: after moves, from other directories, beside other data."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from ssa.cli import main
from ssa.config import load_recipe
from ssa.errors import UserError
from ssa.runs.home import places, read_starts, run_data
from ssa.train.trainer import train


def with_data(recipe, **changes):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


@pytest.fixture
def project(recipe, shards, tmp_path, monkeypatch):
    """project/ with data/ and run/, trained there with `data.path = "data"`; the test stands in another directory."""
    (tmp_path / "project").mkdir()
    shutil.copytree(shards, tmp_path / "project" / "data")
    monkeypatch.chdir(tmp_path / "project")
    train(with_data(recipe(steps=2), path="data"), "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def other_corpus(directory):
    from ssa.data.prepare import prepare

    Path("digits.jsonl").write_text("".join(json.dumps({"text": f"{i} 3141592653 " * 9}) + "\n" for i in range(20)))
    prepare(["digits.jsonl"], directory, valid_fraction=0.2, workers=1, show_progress=False)
    return directory


def test_it_is_found_from_anywhere_and_other_text_is_passed_over(project):
    assert run_data(project / "run") == project / "data"
    other_corpus(Path("data"))  # the recipe's relative path leads here
    assert run_data(project / "run").samefile(project / "data")
    assert run_data(project / "run" / "checkpoints" / "step-00000002").samefile(project / "data")
    assert run_data(os.path.relpath(project / "run" / "latest")).samefile(project / "data")


def test_run_and_data_may_move_together_or_the_run_alone(project):
    shutil.move(project / "run", "alone")
    assert run_data("alone").samefile(project / "data")
    Path("tree").mkdir()
    shutil.move("alone", "tree/run")
    shutil.move(project / "data", "tree/data")
    assert run_data("tree/run").samefile("tree/data")


def test_what_was_tried_is_named(project):
    other = other_corpus(Path("data"))
    shutil.rmtree(project / "data")
    with pytest.raises(
        UserError, match=rf"the data in {other.absolute()} is not what {project / 'run'} was trained on; pass --data"
    ):
        run_data(project / "run")
    shutil.rmtree("data")
    with pytest.raises(UserError, match=f"not there any more .tried {Path('data').absolute()}, {project / 'data'}") as caught:
        run_data(project / "run")
    assert "\n" not in str(caught.value)


def test_a_run_that_did_not_record_its_place_is_found_by_its_fingerprint(project):
    """As it was written before: a relative path and a fingerprint."""
    environment = json.loads((project / "run" / "environment.json").read_text())
    for start in environment["starts"]:
        del start["directory"], start["run"], start["data"]["index"]
    (project / "run" / "environment.json").write_text(json.dumps(environment))
    other_corpus(Path("data"))
    assert run_data(project / "run").samefile(project / "data")
    shutil.rmtree(project / "data")
    with pytest.raises(UserError, match="is not what"):
        run_data(project / "run")


def test_data_that_training_prepared_lies_in_the_run(recipe, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"to select is to attend {i} " * 9}) + "\n" for i in range(20)))
    train(with_data(recipe(steps=1), path=str(text)), tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert run_data(tmp_path / "moved") == tmp_path / "moved" / "data"
    text.unlink()
    assert train(with_data(recipe(steps=2), path=str(text)), tmp_path / "moved", resume=True).step == 2


def test_resume_takes_the_run_and_needs_nothing_else(project, capsys):
    other_corpus(Path("data"))
    assert main(["train", "--resume", str(project / "run"), "--train.steps", "3"]) == 0
    assert f"resuming from {project / 'run' / 'checkpoints' / 'step-00000002'}" in capsys.readouterr().out
    assert run_data(project / "run").samefile(project / "data")  # the later start was made from here
    assert len(read_starts(project / "run")) == 2
    assert main(["train", str(project / "run")]) == 2
    assert "is a run: go on with it by `ssa train --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "data"]) == 2
    assert "it has no recipe.json" in capsys.readouterr().err


def test_resume_accepts_the_same_data_at_another_place_and_no_other(project, capsys):
    shutil.move(project / "data", "here")
    assert main(["train", "--resume", str(project / "run"), "--train.steps", "3"]) == 2
    assert "restore it, or name its place with --data.path" in capsys.readouterr().err
    assert main(["train", "--resume", str(project / "run"), "--train.steps", "3", "--data.path", "here"]) == 0
    assert run_data(project / "run").samefile("here")
    capsys.readouterr()
    other = other_corpus(Path("other"))
    for path, says in ((str(other), "is not what"), ("nowhere", "holds no prepared data")):
        assert main(["train", "--resume", str(project / "run"), "--train.steps", "4", "--data.path", path]) == 2
        assert says in capsys.readouterr().err
    assert len(read_starts(project / "run")) == 2


def test_other_data_is_refused_before_the_first_checkpoint_too(project):
    shutil.rmtree(project / "run" / "checkpoints")
    recipe = load_recipe(str(project / "run" / "recipe.json"))
    other = other_corpus(Path("other"))
    with pytest.raises(UserError, match=r"the data in other is not what .* began with"):
        train(with_data(recipe, path=str(other)), project / "run", resume=True)


def test_a_mixture_is_found_again(recipe, project, monkeypatch):
    from ssa.data.prepare import prepare

    monkeypatch.chdir(project)
    (project / "more.jsonl").write_text("".join(json.dumps({"text": f"more {i} " * 9}) + "\n" for i in range(30)))
    prepare([project / "more.jsonl"], project / "data", split="more", show_progress=False)
    r = with_data(recipe(steps=1), path="data", mixture={"data": 0.5, "data:more": 0.5})
    train(r, "mixed")
    monkeypatch.chdir(project.parent / "elsewhere")
    shutil.copytree(project, "tree")
    shutil.rmtree(project)
    assert run_data("tree/mixed").samefile("tree/data")
    assert main(["train", "--resume", "tree/mixed", "--train.steps", "2"]) == 0
    assert main(["doctor", "tree/mixed"]) == 0


def test_a_damaged_record_is_one_line(project, capsys):
    path = project / "run" / "environment.json"
    for text in (path.read_text()[:20], '{"starts": 3}', '{"starts": [{"directory": 3}]}', "[" * 10**5):
        path.write_text(text)
        for words in (["train", "--resume", str(project / "run"), "--train.steps", "3"], ["eval", str(project / "run")]):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert str(path) in said and said.count("\n") == 1
    path.unlink()
    assert main(["train", "--resume", str(project / "run"), "--train.steps", "3", "--data.path", str(project / "data")]) == 0


def test_places_of_absolute_and_relative_names(tmp_path):
    run = tmp_path / "b" / "run"
    run.mkdir(parents=True)
    assert places(run, "x") == [Path("x")]
    (run / "environment.json").write_text(json.dumps({"starts": [{"directory": "/a/work", "run": "/a/work/runs/run"}, {}]}))
    assert places(run, "data") == [Path("data"), Path("/a/work/data"), tmp_path / "data"]
    assert places(run, "/c/data") == [Path("/c/data"), Path(os.path.normpath(run / "../../../../c/data"))]
