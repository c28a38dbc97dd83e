"""Which implementation computes an operation: `impl="auto" | "reference" | "triton"`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from ssa.errors import UserError

logger = logging.getLogger("ssa")


def chosen_implementation(device: torch.device | str) -> tuple[str, str]:
    """What `impl="auto"` takes on `device`, and why: ("triton", "..."), ("reference", "...")."""
    device = torch.device(device)
    missing = _triton_missing(device.type)
    if missing is None:
        return "triton", f"{torch.cuda.get_device_name(device)} runs the Triton kernels"
    return "reference", f"plain PyTorch: {missing}"


def resolve(impl: str, like: torch.Tensor) -> str:
    """The implementation of `impl` for tensors like `like`. An explicit request is honoured or refused, never replaced."""
    return _resolve(impl, like.dtype == torch.float64, like.device.type)


@torch.compiler.assume_constant_result
def _resolve(impl: str, double: bool, kind: str) -> str:
    if impl == "reference" or (impl == "auto" and double):
        return "reference"
    if impl == "auto":
        return _announce(kind)
    if impl != "triton":
        raise UserError(f"impl = {impl!r} does not exist; use 'auto', 'reference' or 'triton'")
    missing = "the Triton kernels have no float64" if double else _triton_missing(kind)
    if missing and (double or kind != "cpu" or not _interpreting()):
        raise UserError(f"impl = 'triton' cannot run: {missing}; use 'auto' or 'reference'")
    return impl


def _interpreting() -> bool:
    """Triton's interpreter runs kernels on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_missing(kind: str) -> str | None:
    """Why the Triton kernels cannot run on a device of this kind; None where they can."""
    if kind != "cuda":
        return f"the Triton kernels need an NVIDIA GPU, not a {kind} device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"the Triton kernels need compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


@functools.cache
def _announce(kind: str) -> str:
    name, reason = chosen_implementation(kind)
    logger.info("impl='auto' on %s: %s, because %s", kind, name, reason)
    return name
