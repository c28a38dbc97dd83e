import json
import sys
import types

import pytest

from ssa.errors import UserError
from ssa.train.trackers import PROJECT, numbers, open_tracker


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.fixture
def tracker(monkeypatch):
    """fake(name): a stand-in for wandb or trackio that keeps what `init` was given."""

    def fake(name):
        module = types.ModuleType(name)
        module.run, module.Error = FakeRun(), type("Error", (Exception,), {})
        module.init = lambda **options: setattr(module, "options", options) or module.run
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return fake


def test_none_is_nothing_and_an_unknown_name_an_error(tmp_path):
    assert open_tracker("none", tmp_path, 0) is None
    with pytest.raises(UserError, match=r"train.track = 'mlflow' is not one of none, tensorboard, wandb, trackio"):
        open_tracker("mlflow", tmp_path, 0)


@pytest.mark.parametrize("name, extra", [("tensorboard", "track"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=rf'"{PROJECT}\[{extra}\]"') as caught:
        open_tracker(name, tmp_path, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_recipe_and_an_entry_a_start(tmp_path, tracker, name):
    module = tracker(name)
    (tmp_path / "recipe.json").write_text(json.dumps({"train": {"steps": 3}}))
    tracker = open_tracker(name, tmp_path, 0)
    assert module.options["config"] == {"train": {"steps": 3}}
    assert (module.options["project"], module.options["group"], module.options["name"]) == (PROJECT, tmp_path.name, tmp_path.name)
    tracker.write(1, {"train/loss": 2.0})
    tracker.close()
    assert module.run.logged == [(1, {"train/loss": 2.0})] and module.run.finished
    open_tracker(name, tmp_path, 40)
    assert module.options["name"] == f"{tmp_path.name} from step 40"


def test_wandb_gets_one_entry_a_step(tmp_path, tracker):
    """It drops what comes for a step that it has closed."""
    run = tracker("wandb").run
    tracker = open_tracker("wandb", tmp_path, 0)
    tracker.write(1, {"train/loss": 2.0})
    tracker.write(2, {"train/loss": 1.0})
    tracker.write(2, {"valid/full": 3.0})
    tracker.close()
    assert run.logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0, "valid/full": 3.0})]


def test_a_tracker_that_refuses_is_one_line(tmp_path, tracker):
    module = tracker("wandb")

    def refuse(**options):
        raise module.Error("no API key\nconfigured")

    module.init = refuse
    with pytest.raises(UserError, match="no API key configured; log in, or set WANDB_MODE=offline"):
        open_tracker("wandb", tmp_path, 0)


def test_lines_become_numbers_by_name():
    line = {
        "kind": "probe",
        "step": 3,
        "budget": "4x16",
        "queries": 5,
        "kept": 0.5,
        "by_layer": [0.25, 0.75],
        "mfu": None,
        "spike": True,
    }
    assert numbers(line) == {
        "probe/queries": 5.0, "probe/kept": 0.5, "probe/by_layer/00": 0.25, "probe/by_layer/01": 0.75, "probe/spike": 1.0,
    }  # fmt: skip
