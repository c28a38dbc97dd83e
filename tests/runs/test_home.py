import json
from pathlib import Path

import pytest

from ssa.errors import UserError
from ssa.runs.home import DEFAULT_CONTEXT, run_context, run_data, run_home


def prepared(path):
    path.mkdir(parents=True, exist_ok=True)
    (path / "index.json").write_text("{}")
    return path


def test_the_text_of_a_run_is_what_its_recipe_names_else_what_it_prepared_itself(tmp_path):
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    checkpoint = run / "checkpoints" / "step-00000030"
    checkpoint.mkdir(parents=True)
    assert run_home(checkpoint) == run and run_home(run) == run
    assert run_context(run) == DEFAULT_CONTEXT  # a model directory
    with pytest.raises(UserError, match=r"no data of its own, .*--data"):
        run_data(checkpoint)
    own = prepared(run / "data")
    assert run_data(checkpoint) == own
    (run / "recipe.json").write_text(json.dumps({"data": {"path": str(corpus), "context": 96}}))
    assert run_data(checkpoint) == own and run_context(checkpoint) == 96
    assert run_data(run) == own
    prepared(corpus)
    assert run_data(checkpoint) == corpus  # a run started from another one's directory may hold old shards beside it


def test_a_checkpoint_is_recognised_from_inside(tmp_path, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    monkeypatch.chdir(checkpoint)
    assert run_home(".").resolve() == (tmp_path / "run").resolve()
    assert run_home("elsewhere") == Path("elsewhere")
