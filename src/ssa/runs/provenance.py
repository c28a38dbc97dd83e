"""What a run ran on: versions and git state. Kept in every run directory and checkpoint."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import ssa


def versions() -> dict[str, str]:
    """Versions of the project and of what decides its numbers; those of Triton, CUDA, cuDNN and the driver only where there are such."""
    found: dict[str, object] = {
        "ssa": ssa.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    found |= installed("triton")
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "driver": driver_version()}
        with contextlib.suppress(RuntimeError):  # a cuDNN that PyTorch was not built for
            found["cudnn"] = torch.backends.cudnn.version()
    return {name: str(version) for name, version in found.items() if version is not None}


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are there."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def driver_version() -> str | None:
    """That of NVIDIA's driver, e.g. "570.86.15", from its library, so without starting a process; None where it does not say."""
    version = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInitWithFlags(_NVML_NO_GPUS | _NVML_NO_ATTACH):
            return None
        failed = nvml.nvmlSystemGetDriverVersion(version, len(version))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no library, or one without these functions
        return None
    return None if failed else version.value.decode(errors="replace")


_NVML_NO_GPUS, _NVML_NO_ATTACH = 1, 2
"""The library need not look at the GPUs, which takes time, to know its version."""


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the source checkout this package runs from; None for an installed package.

    Where the source is a copy of a checkout, SSA_GIT_COMMIT names what it was copied from: a commit, with "+dirty" if it was changed.
    """
    if told := os.environ.get("SSA_GIT_COMMIT"):
        return {"commit": told.removesuffix("+dirty"), "dirty": told.endswith("+dirty")}
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
