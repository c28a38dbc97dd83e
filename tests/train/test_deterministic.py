"""`train.deterministic`. That a GPU run repeats itself is for benchmarks/train_heads_128.py, on a GPU."""

import os

import pytest
import torch
from torch.utils import deterministic as options

from ssa.bench import train as bench
from ssa.cli import main
from ssa.errors import UserError
from ssa.train import trainer as module
from ssa.train.deterministic import CUBLAS, deterministic
from ssa.train.trainer import train

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def cublas_is_not_told(monkeypatch):
    monkeypatch.setenv(CUBLAS, "")  # noted, to be put back
    monkeypatch.delenv(CUBLAS)


def on():
    return torch.are_deterministic_algorithms_enabled()


def refused():
    """An operation that has no deterministic version, not even on the CPU."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def gradients(recipe, out, monkeypatch, **changes):
    """(each step's gradients, whether deterministic algorithms were asked for in one)."""
    seen, asked = [], []
    norm = module._Run._gradient_norm

    def note(self, clip):
        seen.append([p.grad.clone() for p in self.model.parameters()])
        asked.append(on())
        return norm(self, clip)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_gradient_norm", note)
        train(recipe(steps=3, **changes), out)
    return seen, any(asked)


def test_on_the_cpu_it_changes_nothing(recipe, tmp_path, monkeypatch):
    plain, _ = gradients(recipe, tmp_path / "plain", monkeypatch)
    told, asked = gradients(recipe, tmp_path / "told", monkeypatch, deterministic=True)
    assert len(plain) == len(told) == 3 and not asked
    assert all(torch.equal(a, b) for one, two in zip(plain, told, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("wanted, device", [(True, CPU), (False, CUDA), (False, CPU)])
def test_elsewhere_it_leaves_pytorch_alone(wanted, device, monkeypatch):
    monkeypatch.setenv(CUBLAS, ":0:0")
    with deterministic(wanted, device):
        assert not on()
        refused()


def test_on_a_gpu_pytorch_is_told_and_untold(monkeypatch):
    monkeypatch.setattr(options, "fill_uninitialized_memory", True)
    with deterministic(True, CUDA):
        assert on() and not torch.is_deterministic_algorithms_warn_only_enabled() and not options.fill_uninitialized_memory
        assert os.environ[CUBLAS] == ":4096:8"
    assert not on() and options.fill_uninitialized_memory


def test_what_has_no_deterministic_version_is_named():
    says = r"train\.deterministic = true: put_ has no deterministic version on cuda; .*false$"
    with pytest.raises(UserError, match=says), deterministic(True, CUDA):
        refused()
    assert not on()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size") as caught, deterministic(True, CUDA):
        torch.zeros(2) + torch.zeros(3)
    assert not isinstance(caught.value, UserError) and not on()


def test_other_workspaces_of_cublas_are_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(UserError, match=f"{CUBLAS} = ':0:0'.*unset it"), deterministic(True, CUDA):
        pass
    monkeypatch.setenv(CUBLAS, ":16:8")
    with deterministic(True, CUDA):
        assert on()


def test_training_and_its_benchmark_run_inside_it(recipe, tmp_path, monkeypatch, capsys):
    """Seen by whom they ask: the device is the CPU here."""
    asked = []

    def note(wanted, device):
        asked.append((wanted, device.type))
        return deterministic(wanted, CUDA)

    monkeypatch.setattr("ssa.train.trainer.deterministic", note)
    monkeypatch.setattr(bench, "deterministic", note)
    _, inside = gradients(recipe, tmp_path / "run", monkeypatch, deterministic=True)
    assert inside and asked == [(True, "cpu")] and not on()
    monkeypatch.setattr(bench, "measure", lambda *arguments: refused())
    assert main(["bench", "train", "tiny", "--train.device", "cpu", "--variants", "full", "--train.deterministic"]) == 2
    assert "put_ has no deterministic version" in capsys.readouterr().err and asked[1:] == [(True, "cpu")]
