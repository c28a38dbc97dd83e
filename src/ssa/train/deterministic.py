"""`train.deterministic`: a run on a GPU that repeats itself bit for bit.

This package's kernels add in a fixed order. Dense attention's backward pass does not: cuDNN has no kernel that would, and flash has one only
where PyTorch is told to use deterministic algorithms, upon which attention leaves cuDNN by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

from ssa.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_FIXED = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS repeats itself; PyTorch refuses to multiply matrices with any other."""
REFUSAL = "does not have a deterministic implementation"


@contextlib.contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """A block in which PyTorch uses deterministic algorithms alone, if `wanted`; on the CPU, which repeats itself anyway, nothing changes.

    Raises:
        UserError: cuBLAS was told to use other workspaces, or an operation of the block has no deterministic version.
    """
    if not wanted or device.type == "cpu":
        yield
        return
    options: Any = torch.utils.deterministic
    if (workspaces := os.environ.setdefault(CUBLAS, CUBLAS_FIXED[0])) not in CUBLAS_FIXED:
        raise UserError(
            f"{CUBLAS} = {workspaces!r} does not go with train.deterministic = true; unset it or set {CUBLAS_FIXED[0]}"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # it writes every new tensor once more, for code that reads what it never wrote
    options.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        head, refused, _ = str(error).partition(REFUSAL)
        if not refused:
            raise
        operation = head.split()[-1] if head.split() else "an operation"
        raise UserError(
            f"train.deterministic = true: {operation} has no deterministic version on {device.type}; train in bfloat16 or set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = filled
