"""What a run ran on."""

import ctypes
from importlib import metadata

import pytest
import torch

from ssa.runs import provenance
from ssa.runs.provenance import driver_version, versions


@pytest.fixture(autouse=True)
def forget_the_driver():
    driver_version.cache_clear()
    yield
    driver_version.cache_clear()


class Library:
    """Stands for NVIDIA's."""

    def __init__(self, started=0, told=0):
        self.started, self.told, self.open = started, told, False

    def nvmlInitWithFlags(self, flags):
        self.open = not self.started
        return self.started

    def nvmlSystemGetDriverVersion(self, buffer, size):
        buffer.value = b"570.86.15"[: size - 1]
        return self.told

    def nvmlShutdown(self):
        self.open = False


def with_gpu(monkeypatch, library):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)


def test_without_a_gpu_nothing_of_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(provenance, "driver_version", lambda: pytest.fail("asked for a driver"))
    assert versions().keys() - {"triton"} == {"ssa", "python", "torch", "transformers", "numpy"}


def test_with_a_gpu_its_software_is_named(monkeypatch):
    library = Library()
    with_gpu(monkeypatch, library)
    found = versions()
    assert (found["cuda"], found["cudnn"], found["driver"]) == ("12.8", "91002", "570.86.15") and not library.open
    with_gpu(monkeypatch, None)
    assert versions() == found, "a process has one driver: it is asked once"


@pytest.mark.parametrize("library", [Library(started=999), Library(told=999), object()])
def test_a_driver_that_does_not_say_is_left_out(monkeypatch, library):
    with_gpu(monkeypatch, library)
    assert "driver" not in versions()


def test_what_is_missing_or_does_not_fit_is_left_out(monkeypatch):
    def fail(*args):
        raise RuntimeError("cuDNN version incompatibility")

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    def uninstalled(name):
        raise metadata.PackageNotFoundError(name)

    with_gpu(monkeypatch, None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.backends.cudnn, "version", fail)
    monkeypatch.setattr(metadata, "version", uninstalled)
    assert versions().keys() == {"ssa", "python", "torch", "transformers", "numpy", "cuda"}
