"""Decoding by windows of keys: the scores and the attention of `ssa.ops.triton.decode`, between which `pick` of
`ssa.ops.triton.select_windows` chooses. A family of means is a block's windows.

Legend: B batch, T queries, R = K or H (who selects), M places for selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.budget import COARSER, num_windows
from ssa.ops.triton.decode import Scored, run_attend, unfilled, workspace
from ssa.ops.triton.launch import contiguous_rows, plan_of
from ssa.ops.triton.operation import operation
from ssa.ops.triton.select_windows import pick


def _run(
    q: Tensor, means: Tensor, coarse_means: Tensor | None, importance: Tensor | None, lengths: Tensor, block_size: int, places: int,
    num_selected: int, windows: list[int], scope: str, scoring: str, scale: float, row_blocks: Tensor | None, k: Tensor, v: Tensor,
    starts: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.decode_attention`."""
    choice = (block_size, places, num_selected, windows, scope, scoring, scale, row_blocks)
    indices = _choose(q, means, coarse_means, importance, lengths, *choice, k.shape[1])
    return *run_attend(q, k, v, indices, lengths, starts, bias, None, block_size, scale), indices


def _run_select(
    q: Tensor, means: Tensor, coarse_means: Tensor | None, importance: Tensor | None, lengths: Tensor, block_size: int, places: int,
    num_selected: int, windows: list[int], scope: str, scoring: str, scale: float, row_blocks: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ssa.ops.decode_select`."""
    columns = means.shape[1] * windows[1] + windows[0] - 1
    choice = (block_size, places, num_selected, windows, scope, scoring, scale, row_blocks)
    return _choose(q, means, coarse_means, importance, lengths, *choice, columns)


def _choose(
    q: Tensor, means: Tensor, coarse_means: Tensor | None, importance: Tensor | None, lengths: Tensor, block_size: int, places: int,
    num_selected: int, windows: list[int], scope: str, scoring: str, scale: float, row_blocks: Tensor | None, columns: int,
) -> Tensor:  # fmt: skip
    """int32 [B, R, T, M]; `columns`: the most tokens of a row."""
    q, means, lengths = contiguous_rows(q), contiguous_rows(means), lengths.contiguous()
    coarse_means = None if coarse_means is None else contiguous_rows(coarse_means)
    row_blocks = None if row_blocks is None else row_blocks.contiguous()
    size, stride, _, local, _, _ = windows
    batch, queries = q.shape[:2]
    kv_heads, per_block = means.shape[2], block_size // stride
    indices = unfilled(q, kv_heads, places, scope)
    layout = (
        q, means, coarse_means, importance, lengths, row_blocks, block_size, places, num_selected, *windows, scope, scoring, columns
    )  # fmt: skip
    plan = plan_of(*layout, "windows")
    softmax, selectors = scoring == "softmax", indices.shape[1]
    scored = Scored.of(q, means, num_windows(columns, size, stride), per_block)
    pitch = scored.spans * scored.span // per_block
    tops = workspace(q, batch * selectors, queries, 2 * pitch)
    coarse = None
    if coarse_means is not None and softmax and coarse_means.shape[1]:
        wide = Scored.of(q, coarse_means, coarse_means.shape[1])
        apart = (COARSER * size, COARSER * stride, 0)
        # of the same kernel, launched another way
        sums = wide.launch(
            plan_of(*layout, "coarse"), q, coarse_means, lengths, None, tops, apart[1], selectors, scoring, scale, 1, apart, sums_alone=True
        )  # fmt: skip
        assert sums is not None
        coarse = sums, wide
    scored.launch(
        plan, q, means, lengths, None, tops, block_size, selectors, scoring, scale, per_block, (size, stride, local), coarse
    )
    pick(
        plan, tops, pitch, importance, None, None, None, lengths, indices, None, 0, queries, columns, kv_heads, block_size, num_selected,
        windows, True, row_blocks,
    )  # fmt: skip
    return indices


decode_windows_op = torch.library.custom_op("ssa::decode_windows", _run, mutates_args=())
decode_select_windows_op = torch.library.custom_op("ssa::decode_select_windows", _run_select, mutates_args=())


@decode_windows_op.register_fake
def _(
    q, means, coarse, importance, lengths, block_size, places, num_selected, windows, scope, scoring, scale, row_blocks, k, v, starts, bias
):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), unfilled(q, k.shape[2], places, scope)


@decode_select_windows_op.register_fake
def _(q, means, coarse_means, importance, lengths, block_size, places, num_selected, windows, scope, scoring, scale, row_blocks):
    return unfilled(q, means.shape[2], places, scope)


decode_windows = operation(decode_windows_op, _run)
decode_select_windows = operation(decode_select_windows_op, _run_select)
