"""The sanitizer's cases, in Triton's interpreter."""

import ast
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU at hand the script itself runs the cases")
spec = importlib.util.spec_from_file_location("sanitize", Path(__file__).parents[2] / "benchmarks" / "sanitize.py")
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


def test_launches_are_noted_and_kernels_put_back():
    from ssa.ops.triton import align

    kernel = align._alignment_kernel
    with sanitize.recorded_launches() as (known, seen):
        assert {"align._alignment_kernel", "select._score_kernel", "decode._attend_kernel"} <= known and not seen
        sanitize.alignment(2, 16, torch.float32)
    assert seen == {"align._alignment_kernel", "align._alignment_gradient_kernel"} and align._alignment_kernel is kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_has_a_case(dtype):
    """What leads to a launch depends on shapes alone, so that nothing needs to be computed to see it."""
    assert sanitize.run_cases("cpu", dtype, run=False)[1] == set()


def test_a_kernel_without_a_case_is_named(monkeypatch):
    every = sanitize.cases
    monkeypatch.setattr(sanitize, "cases", lambda dtype: {"vocabulary": every(dtype)["vocabulary"]})
    _, missing = sanitize.run_cases("cpu", torch.float32, run=False)
    assert "cross_entropy._cross_entropy_kernel" not in missing
    assert {"select._bound_kernel", "reader_lists._name_kernel", "reader_lists._list_kernel", "span._dq_kernel"} <= missing


def test_every_launched_kernel_is_known():
    """By its name in the sources, so that none escapes by being called otherwise."""
    launched = {
        f"{getattr(importlib.import_module(f'ssa.ops.triton.{path.stem}'), node.args[1].id).fn.__module__.split('.')[-1]}.{node.args[1].id}"
        for path in Path(sanitize.ssa.ops.triton.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "launch"
    }
    with sanitize.recorded_launches(run=False) as (known, _):
        assert launched == known


@pytest.mark.parametrize("found, status", [("0 errors", 0), ("2 errors", 1)])
def test_what_a_tool_says_is_kept(found, status, monkeypatch, tmp_path):
    """A stand-in for compute-sanitizer, and for the GPU."""
    (tmp_path / "compute-sanitizer").write_text(
        "#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho ran: documents\n"
        f"echo '========= ERROR SUMMARY: {found}'\nexit {status}\n"
    )
    (tmp_path / "compute-sanitizer").chmod(0o755)
    out = tmp_path / "sanitize.json"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--tools", "memcheck", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "environment", lambda device: {"hardware": device})
    monkeypatch.setattr(sanitize, "run_cases", lambda *arguments: ({"select._bound_kernel"}, set()))
    assert sanitize.main() == status
    data = json.loads(out.read_text())
    assert (
        data["kernels"] == ["select._bound_kernel"]
        and data["command"] == f"python benchmarks/sanitize.py --tools memcheck --out {out}"
    )
    (row,) = data["rows"]
    assert row["summary"] == [f"ERROR SUMMARY: {found}"] and row["status"] == status and row["findings"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cases_pass_in_the_interpreter():
    assert sanitize.run_cases("cpu", torch.float32)[1] == set()
