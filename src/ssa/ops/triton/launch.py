"""The host's side of every kernel: which way an operation is called, and small helpers for its launch.

At 8k tokens the host, not the GPU, sets the time of a call. PyTorch's dispatcher takes as long as a short kernel (its Python parts,
twice with autograd), so plain eager calls go past it; and Triton works out anew at each launch which binary its arguments need, so
an operation remembers that for arguments of one layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

Plan = dict[int, tuple[CompiledKernel, dict[str, Any], tuple[Any, ...]]]
"""The binaries that an operation launches for arguments of one layout by the ids of their kernels, each with
its options and constants."""
_MOST_PLANS = 4096
_plans: dict[tuple[Any, ...], Plan] = {}

_PLAIN = (Tensor, torch.nn.Parameter)


def operation(
    op: torch.library.CustomOpDef,
    body: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A function that calls `body` as it is where only autograd looks, and as the custom operator `op` wherever compilers, fake tensors,
    selective checkpointing, other dispatch modes (FlopCounterMode) or tensor subclasses want to see it.

    `setup_context`, `backward`: as for `op.register_autograd`, which is done here.
    """
    if setup_context is None or backward is None:
        direct = body
    else:
        op.register_autograd(backward, setup_context=setup_context)
        direct = _differentiable(body, setup_context, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        first = args[0]
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # where Triton launches
                return call(*args)
        return direct(*args) if _only_eager(args) else op(*args)

    return call


def _differentiable(
    body: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # type: ignore[override]
            output = body(*args)
            setup_context(ctx, args, output)
            return output

    Direct.backward = staticmethod(torch.autograd.function.once_differentiable(backward))  # type: ignore[assignment, method-assign]

    def direct(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(type(x) in _PLAIN and x.requires_grad for x in args):
            return Direct.apply(*args)
        return body(*args)

    return direct


def _only_eager(args: tuple[Any, ...]) -> bool:
    """No mode or subclass of tensors looks at operations."""
    return not torch._C._len_torch_dispatch_stack() and all(type(x) in _PLAIN for x in args if isinstance(x, Tensor))


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, which is all that kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The next power of two, `n` itself included."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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
