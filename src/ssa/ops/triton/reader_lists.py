"""For every key block the (query, slot) pairs that read it: name each pair's block, sort, look up where each list begins.

Three launches and no host sync: at short lengths the host's work for a launch outlasts the GPU's.

Legend: B batch, T queries, R heads that select, M selected blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.triton.launch import Plan, ceil_div, launch

LIST_BYTES = 8
"""A list's line in the table."""
_NAMES = 1024
_LISTS = 128


class ReaderLists(NamedTuple):
    """One list per (span, block): the pairs of `length` consecutive queries of `rows` rows that read a block, as work items of at
    most `segment` pairs. A pair is numbered as in block_indices [B, R, T, M], whose B * R are the rows."""

    pair_order: Tensor
    """int64 [B * R * T * M]: pairs by span, then block, then query."""
    table: Tensor
    """int32 [lists + 1, 2]: where a list begins in pair_order; its first partial sum where it needs several items."""
    counts: Tensor
    """int32 [spans, 2]: work items of a span, and those among them whose list needs several."""
    item_list: Tensor
    """int64 [spans, span_items]: the list of each item and, times 2^32, which of the list's segments it is; in the
    GPU's order."""
    num_blocks: int
    """Block names: lists of one span."""
    row_blocks: int
    unit: int
    """Keys between the first columns of neighbouring block names."""
    spans: int
    length: int
    rows: int
    groups: int
    """Of rows. Spans of the same queries are neighbours."""
    segment: int
    span_items: int
    """An upper bound on the items of one span."""
    span_parts: int
    """An upper bound on the partial sums of one span."""


def reader_lists(
    plan: Plan | None,
    block_indices: Tensor,
    positions: Tensor | None,
    keys: int,
    block_size: int,
    span: tuple[int, int],
    segment: int,
) -> ReaderLists:
    """`block_indices` int32 [B, R, T, M] contiguous; `positions` int64 [B, T] contiguous, None = plain rows. `span`: queries and rows of
    a span; its rows divide B * R."""
    batch, selectors, queries, selected = block_indices.shape
    device, pairs = block_indices.device, block_indices.numel()
    if pairs >= 2**31:
        raise UserError(
            f"block_indices {tuple(block_indices.shape)} holds {pairs:,} entries, the kernels take less than 2^31: split the batch"
        )
    # documents start anywhere: there a block is named by its first column
    row_blocks, unit = (-(-keys // block_size), block_size) if positions is None else (keys, 1)
    length, rows = span
    groups = batch * selectors // rows
    num_blocks = rows * row_blocks
    spans = ceil_div(queries, length) * groups
    lists = spans * num_blocks
    if lists * LIST_BYTES >= 2**33:
        raise UserError(
            f"{queries:,} queries of {keys:,} packed keys need {lists:,} lists, the kernels take less than {2**33 // LIST_BYTES:,}: "
            "shorten the rows or split the batch"
        )
    # keys of two bytes halve the passes of the radix sort
    name = torch.empty(pairs, dtype=torch.int16 if lists < 2**15 else torch.int32, device=device)
    span_pairs = rows * min(length, queries) * selected
    span_items = min(num_blocks, span_pairs) + span_pairs // segment
    counts = torch.empty(spans, 2, dtype=torch.int32, device=device)
    launch(
        plan, _name_kernel, (ceil_div(max(pairs, 2 * spans), _NAMES),),
        block_indices, positions, name, counts, pairs, spans, queries, keys, row_blocks, num_blocks, lists, length, rows, groups,
        R=selectors, M=selected, BS=block_size, PLAIN=positions is None, X=_NAMES, num_warps=4,
    )  # fmt: skip
    name, pair_order = name.sort(stable=True)
    table = torch.empty(lists + 1, 2, dtype=torch.int32, device=device)
    item_list = torch.empty(spans, span_items, dtype=torch.int64, device=device)
    launch(
        plan, _list_kernel, (ceil_div(num_blocks, _LISTS), spans),
        name, table, counts, item_list, pairs, num_blocks, span_items,
        pairs.bit_length(), SEGMENT=segment, X=_LISTS, num_warps=4,
    )  # fmt: skip
    return ReaderLists(
        pair_order, table, counts, item_list, num_blocks, row_blocks, unit, spans, length, rows, groups, segment, span_items,
        2 * (span_pairs // segment) + 1,
    )  # fmt: skip


@triton.jit
def _name_kernel(
    indices, positions, name, counts, pairs, spans, T, S, row_blocks, num_blocks, lists, length, rows, groups,
    R: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, PLAIN: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """The list of every pair; `lists` where there is none. Also empties `counts`."""
    i = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    block = tl.load(indices + i, mask=i < pairs, other=-1)
    query = i // M
    row = (query // T).to(tl.int32)
    t = (query % T).to(tl.int32)
    if PLAIN:
        place = block
    else:
        position = tl.load(positions + (row // R).to(tl.int64) * T + t, mask=i < pairs, other=0).to(tl.int32)
        place = S - T + t - position + block * BS
    which = (t // length * groups + row // rows) * num_blocks + row % rows * row_blocks + place
    tl.store(name + i, tl.where(block < 0, lists, which).to(name.dtype.element_ty), mask=i < pairs)
    tl.store(counts + i, 0, mask=i < 2 * spans)


@triton.jit(do_not_specialize=["steps"])
def _list_kernel(
    name, table, counts, item_list, pairs, num_blocks, span_items, steps,
    SEGMENT: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Where lists begin, and room for their items.

    Programs take room one after the other as they come. That moves items and partial sums around, but leaves a list's own in order:
    what is computed from them does not depend on it.
    """
    span = tl.program_id(1)
    block = tl.program_id(0) * X + tl.arange(0, X)
    real = block < num_blocks
    which = span * num_blocks + block
    start = _first(name, which, pairs, steps)
    stop = _first(name, which + 1, pairs, steps)
    tl.store(table + which * 2, start, mask=real)
    tl.store(table + which * 2 + 2, stop, mask=real)
    segments = tl.where(real, tl.cdiv(stop - start, SEGMENT), 0)
    several = tl.where(segments > 1, segments, 0)
    first = tl.atomic_add(counts + span * 2, tl.sum(segments, 0)) + tl.cumsum(segments, 0) - segments
    first_part = tl.atomic_add(counts + span * 2 + 1, tl.sum(several, 0)) + tl.cumsum(several, 0) - several
    tl.store(table + which * 2 + 1, first_part, mask=real)
    to = item_list + span.to(tl.int64) * span_items + first
    for s in range(tl.max(segments, 0)):
        tl.store(to + s, which + ((segments * 0 + s).to(tl.int64) << 32), mask=s < segments)


@triton.jit
def _first(name, value, pairs, steps):
    """How many names are below `value`; they are sorted."""
    low = tl.zeros_like(value)
    high = low + pairs
    for _ in range(steps):
        middle = low + (high - low) // 2
        below = tl.load(name + middle, mask=middle < high, other=0).to(tl.int32) < value
        low = tl.where(below & (middle < high), middle + 1, low)
        high = tl.where(below, high, middle)
    return low
