"""The launch of a kernel from the host, and what its arguments need.

At 8k tokens the host, not the GPU, sets the time of a call. Triton works out anew at each launch which binary its arguments need; an
operation remembers that for arguments of one layout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Plan = dict[int, tuple[CompiledKernel, dict[str, Any], tuple[Any, ...]]]
"""The binaries that an operation launches for arguments of one layout by the ids of their kernels, each with
its options and constants."""
_MOST_PLANS = 4096
_plans: dict[tuple[Any, ...], Plan] = {}


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, which is all that kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The next power of two, `n` itself included."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def capability(device: int) -> int:
    """Compute capability of GPU `device`, e.g. 90. For -1, the CPU, it is the one that is compiled for, or 90 where the interpreter runs."""
    if device >= 0:
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    try:
        return int(driver.active.get_current_target().arch)
    except RuntimeError:
        return 90


def plan_of(*what: Any) -> Plan | None:
    """The plan for these tensors (by device, type, shape and strides), Nones and other values that decide an operation's launches; None
    where a pointer is not a multiple of 16, which binaries may count on: such calls are rare.

    The first is a tensor on the current device. Everything that a kernel takes as an integer or constant must follow from `what`.
    """
    key = [what[0].get_device()]
    for x in what:
        if isinstance(x, Tensor):
            if x.data_ptr() % 16:
                return None
            key += x.dtype, x.shape, x.stride()
        else:
            key.append(x)
    found = _plans.get(tuple(key))
    if found is None:
        if len(_plans) >= _MOST_PLANS:  # of a program whose shapes never repeat
            _plans.clear()
        found = _plans[tuple(key)] = {}
    return found


def launch(plan: Plan | None, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, by the plan's binary once it has one. `args` are what the kernel takes at run time, in order."""
    if plan is not None:
        found = plan.get(id(kernel))
        if found is not None and found[1] == options:
            found[0][(*grid, 1, 1)[:3]](*args, *found[2])
            return
    binary = kernel[grid](*args, **options)
    if plan is not None and isinstance(binary, CompiledKernel):  # the interpreter has none
        plan[id(kernel)] = binary, options, tuple(options[parameter.name] for parameter in kernel.params[len(args) :])
