"""Gate and alignment losses, each in one pass over its inputs; nothing but the inputs is kept for the backward pass.

Both losses have one value and opposite gradients, so one kernel does gate and loss, and another all gradients of both. Every
program writes the sum of its own rows, and the sums are added in a fixed order: losses and gradients are bitwise reproducible.

A row is one token's output of one query head. Legend: B batch, T queries, H query heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.operation import operation

TILE_ELEMENTS = 2048


@triton.jit
def _offsets(b, t, h, stride_b, stride_t, stride_h):
    """int64 element offsets of rows."""
    return b * stride_b + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h


@triton.jit
def _heads(T, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows: (batch row, tokens, heads, columns, their places in [B, T, H], which exist, mask of [ROWS, DP])."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = row // H
    h = row % H
    d = tl.arange(0, DP)
    inside = t < T
    return b, t, h, d, ((b * T + t) * H + h).to(tl.int64), inside, inside[:, None] & (d < D)[None, :]


@triton.jit
def _read(x, b, t, h, d, x_b, x_t, x_h, mask):
    return tl.load(x + _offsets(b, t, h, x_b, x_t, x_h)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _difference(full_RD, sparse_RD, gate_R, padding, token_R, inside_R, SCALED: tl.constexpr, PADDED: tl.constexpr):
    """What the losses compare, zero in padded rows whatever is there."""
    difference = full_RD - sparse_RD
    if SCALED:
        difference = difference * gate_R[:, None]
    if PADDED:
        real = tl.load(padding + token_R, mask=inside_R, other=1) == 0
        difference = tl.where(real[:, None], difference, 0.0)
    return difference


@triton.jit
def _alignment_kernel(
    full, sparse, gates, padding, out, partial, T, f_b, f_t, f_h, s_b, s_t, s_h, g_b, g_t, g_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, ALIGN_GATED: tl.constexpr,
    PADDED: tl.constexpr, MAIN_FULL: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    b, t, h, d, own, inside, mask = _heads(T, H, D, DP, ROWS)
    f = _read(full, b, t, h, d, f_b, f_t, f_h, mask)
    s = _read(sparse, b, t, h, d, s_b, s_t, s_h, mask)
    gate = tl.zeros([ROWS], tl.float32)
    if GATED:
        gate = tl.load(gates + _offsets(b, t, h, g_b, g_t, g_h), mask=inside, other=0.0).to(tl.float32)
        main = (f if MAIN_FULL else s) * gate[:, None]
        tl.store(out + own[:, None] * D + d[None, :], main.to(out.dtype.element_ty), mask=mask)
    difference = _difference(f, s, gate, padding, b * T + t, inside, GATED and ALIGN_GATED, PADDED)
    if SMOOTH:
        size = tl.abs(difference)
        distance = tl.where(size < 1.0, 0.5 * difference * difference, size - 0.5)
    else:
        distance = difference * difference
    tl.store(partial + b * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(distance, 1), 0))


@triton.jit
def _alignment_gradient_kernel(
    full, sparse, gates, padding, d_out, weights, d_full, d_sparse, d_gates, T,
    f_b, f_t, f_h, s_b, s_t, s_h, g_b, g_t, g_h, df_b, df_t, df_h, ds_b, ds_t, ds_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, ALIGN_GATED: tl.constexpr,
    PADDED: tl.constexpr, MAIN_FULL: tl.constexpr, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr, PASSED_ON: tl.constexpr,
):  # fmt: skip
    b, t, h, d, own, inside, mask = _heads(T, H, D, DP, ROWS)
    f = _read(full, b, t, h, d, f_b, f_t, f_h, mask)
    s = _read(sparse, b, t, h, d, s_b, s_t, s_h, mask)
    gate = tl.zeros([ROWS], tl.float32)
    if GATED:
        gate = tl.load(gates + _offsets(b, t, h, g_b, g_t, g_h), mask=inside, other=0.0).to(tl.float32)
    # gradients of the compared tensors, gated or not, and of the gated main stream
    to_f = tl.zeros([ROWS, DP], tl.float32)
    to_s = tl.zeros([ROWS, DP], tl.float32)
    if ALIGNED:
        difference = _difference(f, s, gate, padding, b * T + t, inside, GATED and ALIGN_GATED, PADDED)
        slope = 2.0 * difference
        if SMOOTH:  # NaN stays NaN
            slope = tl.where(difference >= 1.0, 1.0, tl.where(difference <= -1.0, -1.0, difference))
        to_f = slope * tl.load(weights)
        to_s = -slope * tl.load(weights + 1)
    onward = tl.zeros([ROWS, DP], tl.float32)
    if PASSED_ON:
        onward = tl.load(d_out + own[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if GATED:
        main = f if MAIN_FULL else s
        gate_terms = onward * main
        onward = onward * gate[:, None]
        if ALIGN_GATED:
            gate_terms += to_f * f + to_s * s
            to_f = to_f * gate[:, None]
            to_s = to_s * gate[:, None]
        tl.store(d_gates + own, tl.sum(gate_terms, 1).to(d_gates.dtype.element_ty), mask=inside)
    if MAIN_FULL:
        to_f += onward
    else:
        to_s += onward
    to = _offsets(b, t, h, df_b, df_t, df_h)[:, None] + d[None, :]
    tl.store(d_full + to, to_f.to(d_full.dtype.element_ty), mask=mask)
    to = _offsets(b, t, h, ds_b, ds_t, ds_h)[:, None] + d[None, :]
    tl.store(d_sparse + to, to_s.to(d_sparse.dtype.element_ty), mask=mask)


def _tiles(x_BTHD: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and shape constants; a batch row has less than 2^31 rows of heads."""
    batch, queries, heads, size = x_BTHD.shape
    padded = power_of_two(size)
    rows = max(1, TILE_ELEMENTS // padded)
    return (ceil_div(queries * heads, rows), batch), dict(H=heads, D=size, DP=padded, ROWS=rows)


def _per_element(x_BTHD: Tensor, padding_BT: Tensor | None) -> float | Tensor:
    """1 / number of elements that the losses average over; a tensor where only the device knows it."""
    batch, queries, heads, size = x_BTHD.shape
    if padding_BT is None:
        return 1.0 / max(1, batch * queries * heads * size)
    return 1.0 / ((~padding_BT).sum().clamp(min=1) * (heads * size)).float()


def _align(
    full: Tensor, sparse: Tensor, gates: Tensor | None, padding: Tensor | None, main_full: bool, smooth: bool, align_gated: bool
) -> tuple[Tensor, Tensor]:
    """out, contiguous, empty without gates; alignment [2] fp32."""
    per_element = _per_element(full, padding)
    full, sparse = contiguous_rows(full), contiguous_rows(sparse)
    out = full.new_empty(full.shape if gates is not None else 0)
    grid, shape = _tiles(full)
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=full.device)
    padding = None if padding is None else padding.contiguous()
    plan = plan_of(full, sparse, gates, padding, main_full, smooth, align_gated, "forward")
    launch(
        plan, _alignment_kernel, grid, full, sparse, gates, padding, out, partial, full.shape[1], *full.stride()[:3], *sparse.stride()[:3],
        *(gates.stride() if gates is not None else (0, 0, 0)), GATED=gates is not None, ALIGN_GATED=align_gated,
        PADDED=padding is not None, MAIN_FULL=main_full, SMOOTH=smooth, num_warps=4, **shape,
    )  # fmt: skip
    return out, (partial.sum() * per_element).repeat(2)


alignment_forward = torch.library.custom_op("ssa::gated_alignment", _align, mutates_args=())


@alignment_forward.register_fake
def _(full, sparse, gates, padding, main_full, smooth, align_gated):
    out = full.new_empty(full.shape if gates is not None else 0)
    return out, full.new_empty(2, dtype=torch.float32)


def _align_backward(
    full: Tensor, sparse: Tensor, gates: Tensor | None, padding: Tensor | None, d_out: Tensor | None, d_alignment: Tensor | None,
    main_full: bool, smooth: bool, align_gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_full, d_sparse, d_gates (empty without gates)."""
    weights = None if d_alignment is None else d_alignment.float() * _per_element(full, padding)
    full, sparse = contiguous_rows(full), contiguous_rows(sparse)
    # laid out as the streams are: what comes before is attention, whose backward pass wants that
    d_full, d_sparse = torch.empty_like(full), torch.empty_like(sparse)
    d_gates = full.new_empty(0) if gates is None else torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    grid, shape = _tiles(full)
    padding = None if padding is None else padding.contiguous()
    d_out = None if d_out is None else d_out.contiguous()
    plan = plan_of(full, sparse, gates, padding, d_out, weights, main_full, smooth, align_gated, "backward")
    launch(
        plan, _alignment_gradient_kernel, grid, full, sparse, gates, padding, d_out, weights,
        d_full, d_sparse, d_gates, full.shape[1], *full.stride()[:3], *sparse.stride()[:3],
        *(gates.stride() if gates is not None else (0, 0, 0)), *d_full.stride()[:3], *d_sparse.stride()[:3], GATED=gates is not None,
        ALIGN_GATED=align_gated, PADDED=padding is not None, MAIN_FULL=main_full, SMOOTH=smooth, ALIGNED=weights is not None,
        PASSED_ON=d_out is not None, num_warps=4, **shape,
    )  # fmt: skip
    return d_full, d_sparse, d_gates


alignment_backward = torch.library.custom_op("ssa::gated_alignment_backward", _align_backward, mutates_args=())


@alignment_backward.register_fake
def _(full, sparse, gates, padding, d_out, d_alignment, main_full, smooth, align_gated):
    d_gates = full.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return torch.empty_like(contiguous_rows(full)), torch.empty_like(contiguous_rows(sparse)), d_gates


def _alignment_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    full, sparse, gates, padding, *ctx.options = inputs
    ctx.save_for_backward(full, sparse, gates, padding)
    ctx.set_materialize_grads(False)


def _alignment_gradients(ctx: Any, d_out: Tensor | None, d_alignment: Tensor | None) -> tuple[Tensor | None, ...]:
    full, sparse, gates, padding = ctx.saved_tensors
    if gates is None:
        d_out = None
    d_full, d_sparse, d_gates = _differentiate_alignment(full, sparse, gates, padding, d_out, d_alignment, *ctx.options)
    return d_full, d_sparse, (None if gates is None else d_gates), None, None, None, None


_aligned = operation(alignment_forward, _align, _alignment_context, _alignment_gradients)
_differentiate_alignment = operation(alignment_backward, _align_backward)


def gated_alignment(
    full_BTHD: Tensor, sparse_BTHD: Tensor, gates_BTH: Tensor | None, padding_BT: Tensor | None, main_full: bool, smooth: bool,
    align_gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.gated_alignment`."""
    out, alignment = _aligned(full_BTHD, sparse_BTHD, gates_BTH, padding_BT, main_full, smooth, align_gated)
    if gates_BTH is None:
        out = full_BTHD if main_full else sparse_BTHD
    return out, alignment


@triton.jit
def _gated_sum_kernel(
    x0, x1, x2, gates, out, T, x0_b, x0_t, x0_h, x1_b, x1_t, x1_h, x2_b, x2_t, x2_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    b, t, h, d, own, inside, mask = _heads(T, H, D, DP, ROWS)
    gate = tl.load(gates + own * NUM, mask=inside, other=0.0).to(tl.float32)
    x = _read(x0, b, t, h, d, x0_b, x0_t, x0_h, mask)
    total = x * gate[:, None]
    if NUM > 1:
        gate = tl.load(gates + own * NUM + 1, mask=inside, other=0.0).to(tl.float32)
        x = _read(x1, b, t, h, d, x1_b, x1_t, x1_h, mask)
        total += x * gate[:, None]
    if NUM > 2:
        gate = tl.load(gates + own * NUM + 2, mask=inside, other=0.0).to(tl.float32)
        x = _read(x2, b, t, h, d, x2_b, x2_t, x2_h, mask)
        total += x * gate[:, None]
    tl.store(out + own[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradient(
    x, d_x, d_out_RD, gates, d_gates, b, t, h, own, d, inside, mask, x_b, x_t, x_h, dx_b, dx_t, dx_h, WHICH: tl.constexpr,
    NUM: tl.constexpr,
):  # fmt: skip
    gate = tl.load(gates + own * NUM + WHICH, mask=inside, other=0.0).to(tl.float32)
    x_RD = _read(x, b, t, h, d, x_b, x_t, x_h, mask)
    to = d_x + _offsets(b, t, h, dx_b, dx_t, dx_h)[:, None] + d[None, :]
    tl.store(to, (d_out_RD * gate[:, None]).to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_gates + own * NUM + WHICH, tl.sum(d_out_RD * x_RD, 1).to(d_gates.dtype.element_ty), mask=inside)


@triton.jit
def _gated_sum_gradient_kernel(
    x0, x1, x2, gates, d_out, d_x0, d_x1, d_x2, d_gates, T, x0_b, x0_t, x0_h, x1_b, x1_t, x1_h, x2_b, x2_t, x2_h,
    dx0_b, dx0_t, dx0_h, dx1_b, dx1_t, dx1_h, dx2_b, dx2_t, dx2_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    b, t, h, d, own, inside, mask = _heads(T, H, D, DP, ROWS)
    d_out_RD = tl.load(d_out + own[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    _gate_gradient(
        x0, d_x0, d_out_RD, gates, d_gates, b, t, h, own, d, inside, mask, x0_b, x0_t, x0_h, dx0_b, dx0_t, dx0_h, 0, NUM
    )
    if NUM > 1:
        _gate_gradient(
            x1, d_x1, d_out_RD, gates, d_gates, b, t, h, own, d, inside, mask, x1_b, x1_t, x1_h, dx1_b, dx1_t, dx1_h, 1, NUM
        )
    if NUM > 2:
        _gate_gradient(
            x2, d_x2, d_out_RD, gates, d_gates, b, t, h, own, d, inside, mask, x2_b, x2_t, x2_h, dx2_b, dx2_t, dx2_h, 2, NUM
        )


def _three(xs: list[Tensor]) -> tuple[list[Tensor | None], list[int]]:
    """Three places for up to three tensors, and their strides."""
    strides = [stride for x in xs for stride in x.stride()[:3]]
    return [*xs, *[None] * (3 - len(xs))], strides + [0] * (9 - len(strides))


@torch.library.custom_op("ssa::gated_sum", mutates_args=())
def gated_sum_forward(branches: list[Tensor], gates: Tensor) -> Tensor:
    """[B, T, H, D], contiguous."""
    xs, strides = _three([contiguous_rows(x) for x in branches])
    out = branches[0].new_empty(branches[0].shape)
    grid, shape = _tiles(out)
    gates = gates.contiguous()
    launch(
        plan_of(*xs, gates, "sum"),
        _gated_sum_kernel,
        grid,
        *xs,
        gates,
        out,
        out.shape[1],
        *strides,
        NUM=len(branches),
        num_warps=4,
        **shape,
    )
    return out


@gated_sum_forward.register_fake
def _(branches, gates):
    return branches[0].new_empty(branches[0].shape)


@torch.library.custom_op("ssa::gated_sum_backward", mutates_args=())
def gated_sum_backward(branches: list[Tensor], gates: Tensor, d_out: Tensor) -> list[Tensor]:
    """Gradients of the branches, laid out as they are, and of the gates."""
    branches = [contiguous_rows(x) for x in branches]
    d_branches = [torch.empty_like(x) for x in branches]
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    (xs, strides), (d_xs, d_strides) = _three(branches), _three(d_branches)
    grid, shape = _tiles(d_out)
    gates, d_out = gates.contiguous(), d_out.contiguous()
    launch(
        plan_of(*xs, gates, d_out, "sum, backward"), _gated_sum_gradient_kernel, grid,
        *xs, gates, d_out, *d_xs, d_gates, d_out.shape[1], *strides, *d_strides, NUM=len(branches),
        num_warps=4, **shape,
    )  # fmt: skip
    return [*d_branches, d_gates]


@gated_sum_backward.register_fake
def _(branches, gates, d_out):
    return [*(torch.empty_like(contiguous_rows(x)) for x in branches), gates.new_empty(gates.shape)]


def _sum_context(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    branches, gates = inputs
    ctx.save_for_backward(*branches, gates)


def _sum_gradients(ctx: Any, d_out: Tensor) -> tuple[list[Tensor], Tensor]:
    *branches, gates = ctx.saved_tensors
    *d_branches, d_gates = gated_sum_backward(branches, gates, d_out)
    return d_branches, d_gates


gated_sum_forward.register_autograd(_sum_gradients, setup_context=_sum_context)


def gated_sum(branches_BTHD: list[Tensor], gates_BTHn: Tensor) -> Tensor:
    """See `ssa.ops.gated_sum`."""
    if torch.compiler.is_compiling():
        return gated_sum_forward(branches_BTHD, gates_BTHn)
    with torch.cuda.device_of(gates_BTHn):  # where Triton launches
        return gated_sum_forward(branches_BTHD, gates_BTHn)
