"""The host's side of every kernel: which way an operation is called, and small helpers for its launch.

At 8k tokens the host, not the GPU, sets the time of a call. PyTorch's dispatcher takes as long as a short kernel (its Python parts,
twice with autograd), so plain eager calls go past it; and Triton works out anew at each launch which binary its arguments need, so
launches alike go straight to the binary of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_MOST_BINARIES = 4096
_binaries: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

_PLAIN = (Tensor, torch.nn.Parameter)


def operation(
    op: torch.library.CustomOpDef,
    body: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A function that calls `body` as it is where only autograd looks, and as the custom operator `op` wherever compilers, fake tensors,
    selective checkpointing, profilers of operations or tensor subclasses want to see it.

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


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; `args` are what the kernel takes at run time, in order, the first a
    tensor on the current device.

    A binary depends on types, on which pointers are multiples of 16, on integers (which are 1, multiples of 16, or long), and on
    `options`: here on integers themselves, which is simpler and as good, since calls repeat their shapes.
    """
    key = (id(kernel), args[0].get_device(), *[_trait(x) for x in args], *options, *options.values())
    found = _binaries.get(key)
    if found is not None:
        binary, constants = found
        binary[(*grid, 1, 1)[:3]](*args, *constants)
        return
    binary = kernel[grid](*args, **options)
    if isinstance(binary, CompiledKernel):  # the interpreter has none
        if len(_binaries) == _MOST_BINARIES:  # of a program whose shapes never repeat
            _binaries.clear()
        _binaries[key] = binary, tuple(options[parameter.name] for parameter in kernel.params[len(args) :])


def _trait(x: Any) -> Any:
    kind = type(x)
    if kind is int or x is None:
        return x
    return float if kind is float else (x.dtype, x.data_ptr() % 16)
