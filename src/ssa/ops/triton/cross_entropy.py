"""Losses and gradients from logits in two sweeps over each row; the gradient takes the logits' place. See `ssa.ops.cross_entropy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, V, row_stride, BV: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    v = tl.arange(0, BV)
    if target < 0:
        for c in range(0, V, BV):
            tl.store(base + c + v, tl.zeros([BV], logits.dtype.element_ty), mask=c + v < V)
        tl.store(losses + row, 0.0)
        return
    peak = tl.full([BV], -1e30, tl.float32)  # of each lane, so that the sweep needs no reduction
    total = tl.zeros([BV], tl.float32)
    for c in range(0, V, BV):
        x = tl.load(base + c + v, mask=c + v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        total = total * tl.exp2((peak - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
        peak = higher
    top = tl.max(peak, 0)
    whole = tl.sum(total * tl.exp2((peak - top) * LOG2E), 0)
    own = tl.load(base + target).to(tl.float32)
    tl.store(losses + row, top + tl.log2(whole) / LOG2E - own)
    for c in range(0, V, BV):
        x = tl.load(base + c + v, mask=c + v < V, other=float("-inf")).to(tl.float32)
        p = tl.exp2((x - top) * LOG2E) / whole
        p = tl.where(c + v == target, p - 1.0, p)
        tl.store(base + c + v, p.to(logits.dtype.element_ty), mask=c + v < V)


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(losses fp32 [N], their gradient in the memory of `logits` [N, V]); both 0 where the target is negative."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(4096, power_of_two(vocabulary))
    with torch.cuda.device_of(logits):  # where Triton launches
        launch(
            plan_of(logits, targets), _cross_entropy_kernel, (rows,), logits, targets, losses, vocabulary, logits.stride(0), BV=block,
            num_warps=8,
        )  # fmt: skip
    return losses, logits
