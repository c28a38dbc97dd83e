"""SSA's gate and two-way alignment, and the gate alone: what stands between attention and the output projection.

Legend: B batch, T queries, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.implementations import resolve
from ssa.ops.reference import align as reference

LOSSES = ("smooth_l1", "l2")


def gated_alignment(
    full: Tensor,
    sparse: Tensor,
    gates: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    main: str,
    loss: str = "smooth_l1",
    align_gated: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated main stream, and both alignment losses (Algorithm 1) of the two streams of one attention layer.

    The sparsity loss d(full, stopgrad(sparse)) pulls full attention towards what sparse attention can express, the commitment loss
    d(sparse, stopgrad(full)) keeps sparse attention near full. d is SmoothL1 with beta 1 or the squared difference, each the mean
    over elements; so both losses have one value and opposite gradients. Differentiable in full, sparse and gates. All arithmetic
    is fp32 (fp64 for fp64), rounded once at the end; the Triton implementation keeps nothing but its inputs for the backward pass.

    Args:
        full, sparse: [B, T, H, D], the outputs of both streams before the gate.
        gates: [B, T, H], one factor per token and query head; None = no gate.
        padding: bool [B, T], True where a token is padding, which the losses leave out.
        main: "full" or "sparse", the stream that goes on.
        loss: "smooth_l1" or "l2".
        align_gated: compare the streams after the gate (released code) rather than before it (Algorithm 1).
        impl: "auto", "reference" or "triton".

    Returns:
        out [B, T, H, D] in the main stream's dtype; alignment [2], fp32: sparsity loss, commitment loss.

    Raises:
        UserError: shapes that do not fit, or an unknown option.
    """
    if full.shape != sparse.shape or full.ndim != 4 or full.dtype != sparse.dtype:
        raise UserError(
            f"full {full.dtype} {tuple(full.shape)} and sparse {sparse.dtype} {tuple(sparse.shape)} are not one dtype and shape [B, T, H, D]"
        )
    if gates is not None and gates.shape != full.shape[:3]:
        raise UserError(f"gates {tuple(gates.shape)} is not [B, T, H] = {list(full.shape[:3])}")
    if padding is not None and (padding.shape != full.shape[:2] or padding.dtype != torch.bool):
        raise UserError(f"padding {padding.dtype} {tuple(padding.shape)} is not bool [B, T] = {list(full.shape[:2])}")
    for name, value, known in (("main", main, ("full", "sparse")), ("loss", loss, LOSSES)):
        if value not in known:
            raise UserError(f"{name} = {value!r} is not one of {', '.join(known)}")
    # modules of one implementation are imported when it runs: without triton the reference still does
    options = (main == "full", loss == "smooth_l1", align_gated)
    if resolve(impl, full) == "triton":
        from ssa.ops.triton.align import gated_alignment as by_triton

        return by_triton(full, sparse, gates, padding, *options)
    with torch.autocast(full.device.type, enabled=False):
        return reference.gated_alignment(full, sparse, gates, padding, *options)


def gated_sum(branches: Sequence[Tensor], gates: Tensor, *, impl: str = "auto") -> Tensor:
    """The sum of gates[..., i] * branches[i] over the branches of a method: one, or NSA's three.

    Differentiable in the branches and the gates. Products and sum are fp32 (fp64 for fp64), rounded once; none is kept.

    Args:
        branches: one to three outputs [B, T, H, D] of one dtype.
        gates: [B, T, H, branches], one factor per token, query head and branch.
        impl: "auto", "reference" or "triton".

    Returns:
        [B, T, H, D] in the branches' dtype.

    Raises:
        UserError: shapes that do not fit.
    """
    branches = list(branches)
    if not 1 <= len(branches) <= 3:
        raise UserError(f"{len(branches)} branches: gated_sum takes one to three")
    first = branches[0]
    if any(x.shape != first.shape or x.dtype != first.dtype for x in branches) or first.ndim != 4:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in branches)
        raise UserError(f"the branches are not of one dtype and shape [B, T, H, D]: {shapes}")
    if gates.shape != (*first.shape[:3], len(branches)):
        raise UserError(f"gates {tuple(gates.shape)} is not [B, T, H, branches] = {[*first.shape[:3], len(branches)]}")
    if resolve(impl, first) == "triton":
        from ssa.ops.triton.align import gated_sum as by_triton

        return by_triton(branches, gates)
    return reference.gated_sum(branches, gates)
