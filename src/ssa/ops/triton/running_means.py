"""Running block means in one launch.

Legend: B batch, S cache columns, K kv heads, D head size, N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import launch, plan_of, power_of_two
from ssa.ops.triton.operation import operation


@triton.jit
def _add_token_kernel(
    k, v, k_means, v_means, k_sums, v_sums, end, starts, k_b, k_s, k_h, v_b, v_s, v_h, km_b, km_n, km_h, vm_b, vm_n, vm_h,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    kv = row % K
    column = tl.load(end) - 1
    place = tl.maximum(column - tl.load(starts + b), 0)
    block = place // BS
    d = tl.arange(0, DP)
    mask = d < D
    going_on = place % BS > 0  # else the sums are those of the block before
    total = tl.where(going_on, tl.load(k_sums + row * D + d, mask=mask, other=0.0), 0.0)
    total += tl.load(k + b * k_b + column * k_s + kv * k_h + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(k_sums + row * D + d, total, mask=mask)
    tl.store(k_means + b * km_b + block * km_n + kv * km_h + d, (total / BS).to(k_means.dtype.element_ty), mask=mask)
    total = tl.where(going_on, tl.load(v_sums + row * D + d, mask=mask, other=0.0), 0.0)
    total += tl.load(v + b * v_b + column * v_s + kv * v_h + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_sums + row * D + d, total, mask=mask)
    tl.store(v_means + b * vm_b + block * vm_n + kv * vm_h + d, (total / BS).to(v_means.dtype.element_ty), mask=mask)


def _run(
    k: Tensor, v: Tensor, k_means: Tensor, v_means: Tensor, k_sums: Tensor, v_sums: Tensor, end: Tensor, starts: Tensor, block_size: int
) -> None:  # fmt: skip
    """See `ssa.ops.running_means.extend_block_means`."""
    batch, _, heads, size = k.shape
    launch(
        plan_of(k, v, k_means, v_means, k_sums, v_sums, end, starts, block_size), _add_token_kernel, (batch * heads,),
        k, v, k_means, v_means, k_sums, v_sums, end, starts, *k.stride()[:3], *v.stride()[:3], *k_means.stride()[:3],
        *v_means.stride()[:3], K=heads, D=size, DP=power_of_two(size), BS=block_size, num_warps=1,
    )  # fmt: skip


extend_block_means_op = torch.library.custom_op(
    "ssa::extend_block_means", _run, mutates_args=("k_means", "v_means", "k_sums", "v_sums")
)


@extend_block_means_op.register_fake
def _(k, v, k_means, v_means, k_sums, v_sums, end, starts, block_size):
    return None


extend_block_means = operation(extend_block_means_op, _run)
