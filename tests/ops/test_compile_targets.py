"""The Triton kernels compile for the GPUs that are supported, within their shared memory; no GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPILLED = 512
"""Bytes a thread may have on its stack: more than any kernel has today."""
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may ask for (CUDA programming guide, technical specifications per compute capability)."""


def compiled(capability: int, *words: str) -> dict:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this triton has no compiler for NVIDIA GPUs")
    script = Path(__file__).with_name("compile_only.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, str(capability), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    too_large = {name: size for name, size in report["shared"].items() if size > SHARED[capability]}
    assert not too_large, f"more shared memory than sm_{capability} has: {too_large}"
    return report


@pytest.mark.parametrize(
    "capability", [89, pytest.param(90, marks=pytest.mark.slow)]
)  # the least shared memory, and the GPU that is tuned for
def test_the_main_kernels_compile(capability):
    kernels = set(compiled(capability)["shared"])
    assert {
        "decode._score_kernel",
        "decode._attend_kernel",
        "cross_entropy._cross_entropy_kernel",
    } <= kernels
    assert {f"key_side._{name}_kernel" for name in ("partial", "combine")} <= kernels
    assert {f"reader_lists._{name}_kernel" for name in ("name", "gather", "list")} <= kernels
    assert {f"key_gradients._{name}_kernel" for name in ("dkv", "add_parts", "add_dq", "terms")} <= kernels


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("capability", list(SHARED))
def test_every_kernel_compiles_at_every_size(capability):
    assert compiled(capability, "all")["missed"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", list(SHARED))
def test_heads_of_128_compile_and_hold_most_in_registers(capability):
    report = compiled(capability, "heads-128")
    assert {f"key_side._{name}_kernel" for name in ("partial", "combine")} <= set(report["shared"])
    assert {f"key_gradients._{name}_kernel" for name in ("dkv", "add_parts", "add_dq", "terms")} <= set(report["shared"])
    assert set(report["stack"]) == set(report["shared"])
    too_many = {name: size for name, size in report["stack"].items() if size > SPILLED}
    assert not too_many, f"bytes a thread keeps in memory instead of registers on sm_{capability}: {too_many}"
