"""The commands, as a user types them, on the releases that are installed."""

import subprocess
import sys

import pytest

from ssa import __version__
from ssa.data.tokenizer import byte_tokenizer
from ssa.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def ssa(*arguments):
    done = subprocess.run([sys.executable, "-m", "ssa", *map(str, arguments)], capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return done


def test_generate(model):
    options = ("--prompt", "The module", "--max-new-tokens", 12)
    sparse = ssa("generate", model, *options, "--budget", "2x4")
    assert sparse.stdout == ssa("generate", model, *options, "--budget", "2x4", "--no-stream").stdout != ""
    assert "12 tokens" in sparse.stderr and "deprecat" not in sparse.stderr.lower()


def test_doctor():
    report = ssa("doctor").stdout
    assert f"ssa {__version__}" in report and "all well" in report and "FAILED" not in report
