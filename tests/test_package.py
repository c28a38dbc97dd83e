"""What the package is made of when it is built and installed."""

import zipfile
from importlib import resources
from pathlib import Path

import pytest


def test_type_checkers_may_read_the_package():
    assert resources.files("ssa").joinpath("py.typed").is_file()


def test_a_wheel_carries_the_marker_and_the_recipes(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build", reason="needs hatchling")
    monkeypatch.chdir(Path(__file__).parents[1])
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        assert {"ssa/py.typed", "ssa/configs/tiny.toml", "ssa/eval/long/words.txt"} <= set(wheel.namelist())
