"""Which way an operation is called: past PyTorch's dispatcher where nothing but autograd looks.

The dispatcher takes the host as long as the GPU takes for a short kernel (its Python parts, twice with autograd).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
