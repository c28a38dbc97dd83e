"""The language model's loss without its logits: product with the vocabulary, cross-entropy and both gradients, a slice of tokens at a time.

The gradients are made in the forward pass, while a slice's logits exist; the backward pass only scales them. That takes three
matrix products where computing the logits again takes four.

Legend: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssa.ops.implementations import resolve
from ssa.ops.reference import cross_entropy as reference

SLICE_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Logits of a slice, by device."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str = "auto") -> Tensor:
    """sum over tokens of -log softmax(weight @ hidden)[target] in nats, fp32 scalar; differentiable in hidden and weight.

    Args:
        hidden: [N, C]. weight: [V, C], brought to hidden's dtype for the products; its gradient is summed in fp32.
        targets: int64 [N]; -100 = no target.
        impl: "auto", "reference" or "triton", who turns logits into losses and gradients.
    """
    arguments = (hidden, weight, targets, resolve(impl, hidden))
    if torch.compiler.is_compiling():  # a graph would have to fix the number of slices
        wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
        return _loss_op(*arguments, *wanted)[0]
    return _LinearCrossEntropy.apply(*arguments)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, implementation: str, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by hidden and weight; empty where not wanted."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    low = weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape if want_weight else 0, dtype=wide, device=weight.device)
    step = max(1, SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cpu"]) // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for i in range(0, len(hidden), step):
            part = hidden[i : i + step]
            logits = part @ low.T
            if implementation == "triton":
                from ssa.ops.triton.cross_entropy import loss_and_gradient
            else:
                loss_and_gradient = reference.loss_and_gradient
            losses, d_logits = loss_and_gradient(logits, targets[i : i + step])
            total += losses.sum()
            if want_hidden:
                torch.mm(d_logits, low, out=d_hidden[i : i + step])
            if not want_weight:
                continue
            if hidden.is_cuda and hidden.dtype != wide:  # accumulates in fp32 inside the product
                torch.addmm(d_weight, d_logits.T, part, out_dtype=wide, out=d_weight)
            else:
                d_weight.addmm_(d_logits.T.to(wide), part.to(wide))
    return total, d_hidden, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _scaled(ctx: Any, d_total: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    return (
        d_hidden * d_total.to(d_hidden.dtype) if ctx.needs_input_grad[0] else None,
        (d_weight * d_total).to(ctx.dtype) if ctx.needs_input_grad[1] else None,
        *(None for _ in ctx.needs_input_grad[2:]),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, implementation: str) -> Tensor:  # type: ignore[override]
        output = _loss_and_gradients(hidden, weight, targets, implementation, *ctx.needs_input_grad[:2])
        _save(ctx, (hidden, weight), output)
        return output[0]

    backward = staticmethod(_scaled)  # type: ignore[assignment]


_loss_op = torch.library.custom_op("ssa::linear_cross_entropy", _loss_and_gradients, mutates_args=())
_loss_op.register_autograd(_scaled, setup_context=_save)


@_loss_op.register_fake
def _(hidden, weight, targets, implementation, want_hidden, want_weight):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=wide) if want_weight else weight.new_empty(0, dtype=wide)
    return hidden.new_empty((), dtype=wide), d_hidden, d_weight
