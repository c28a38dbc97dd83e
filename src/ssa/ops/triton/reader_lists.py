"""For every key block the (query, slot) pairs that read it, in the order of the queries.

Two ways, which give the same lists (a query names a block once), without a host sync. Where a map of bytes [blocks, queries] is
small, each pair enters its slot in its block's line, and a program a block gathers its line: three launches. At short lengths the
host's work for a launch outlasts the GPU's. Elsewhere the pairs are sorted by the name of their block, which is a dozen launches
with PyTorch's radix sort, and each block looks up where its list begins.

A row is one kv head of one batch row. Its readers are the queries of all heads that choose blocks of it, head after head.

Legend: B batch, T queries, K kv heads, R heads that select, J = R / K, M selected blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.errors import UserError
from ssa.ops.triton.launch import Plan, ceil_div, launch

LIST_BYTES = 12
"""A list's line in the table."""
MAP_BYTES = 1 << 24
"""The largest map."""
_NAMES = 1024
_LISTS = 128
_WORDS = 1024


class ReaderLists(NamedTuple):
    """One list per (span, block): the pairs of `length` consecutive queries of `rows` rows that read a block, as work items of at
    most `segment` pairs. A pair is numbered as in block_indices [B, R, T, M]."""

    pair_order: Tensor
    """int32 [B * R * T * M]: each list's pairs, by head and query."""
    table: Tensor
    """int32 [lists, 3]: where a list begins and ends in pair_order; its first partial sum where it needs several items."""
    counts: Tensor
    """int64 [spans + 1]: work items of a span and, times 2^32, those among them whose list needs several. The last is for those who
    make the lists."""
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
    kv_heads: int,
) -> ReaderLists:
    """`block_indices` int32 [B, R, T, M] contiguous; `positions` int64 [B, T] contiguous, None = plain rows. `span`: queries and rows of
    a span; its rows divide B * K."""
    batch, selectors, queries, selected = block_indices.shape
    device, pairs = block_indices.device, block_indices.numel()
    if pairs >= 2**31:
        raise UserError(
            f"block_indices {tuple(block_indices.shape)} holds {pairs:,} entries, the kernels take less than 2^31: split the batch"
        )
    # documents start anywhere: there a block is named by its first column
    row_blocks, unit = (-(-keys // block_size), block_size) if positions is None else (keys, 1)
    length, rows = span
    groups = batch * kv_heads // rows
    sharing = selectors // kv_heads
    num_blocks = rows * row_blocks
    spans = ceil_div(queries, length) * groups
    lists = spans * num_blocks
    if lists * LIST_BYTES >= 2**33:
        raise UserError(
            f"{queries:,} queries of {keys:,} packed keys need {lists:,} lists, the kernels take less than {2**33 // LIST_BYTES:,}: "
            "shorten the rows or split the batch"
        )
    span_pairs = rows * sharing * min(length, queries) * selected
    span_items = min(num_blocks, span_pairs) + span_pairs // segment
    counts = torch.empty(spans + 1, dtype=torch.int64, device=device)
    table = torch.empty(lists, 3, dtype=torch.int32, device=device)
    item_list = torch.empty(spans, span_items, dtype=torch.int64, device=device)
    line = ceil_div(queries, 16) * 16
    fits = length >= queries or length % 4 == 0  # no word of a line is of two spans
    mapped = fits and selected < 256 and batch * selectors * row_blocks * line <= MAP_BYTES
    if mapped:
        name = torch.zeros(batch * selectors * row_blocks, line, dtype=torch.uint8, device=device)
    else:  # keys of two bytes halve the passes of the radix sort
        name = torch.empty(pairs, dtype=torch.int16 if lists < 2**15 else torch.int32, device=device)
    launch(
        plan, _name_kernel, (ceil_div(max(pairs, spans + 1), _NAMES),),
        block_indices, positions, name, counts, pairs, spans, queries, keys, row_blocks, num_blocks, lists, length, rows, groups, line,
        R=selectors, J=sharing, M=selected, BS=block_size, PLAIN=positions is None, MAPPED=mapped, X=_NAMES, num_warps=4,
    )  # fmt: skip
    if mapped:
        pair_order = torch.empty(pairs, dtype=torch.int32, device=device)
        launch(
            plan, _gather_kernel, (num_blocks, spans),
            name.view(torch.int32), pair_order, table, counts, item_list, spans, queries, row_blocks, num_blocks, length, rows, groups, line // 4, span_items,
            J=sharing, M=selected, SEGMENT=segment, X=_WORDS, num_warps=4,
        )  # fmt: skip
    else:
        name, pair_order = name.sort(stable=True)
        pair_order = pair_order.to(torch.int32)  # read faster than it is narrowed
        launch(
            plan, _list_kernel, (ceil_div(num_blocks, _LISTS), spans),
            name, table, counts, item_list, pairs, num_blocks, row_blocks, span_items,
            pairs.bit_length(), SEGMENT=segment, X=_LISTS, num_warps=4,
        )  # fmt: skip
    return ReaderLists(
        pair_order, table, counts, item_list, num_blocks, row_blocks, unit, spans, length, rows, groups, segment, span_items,
        max(1, span_pairs // segment + min(num_blocks, span_pairs // segment)),
    )  # fmt: skip


@triton.jit
def _name_kernel(
    indices, positions, name, counts, pairs, spans, T, S, row_blocks, num_blocks, lists, length, rows, groups, line,
    R: tl.constexpr, J: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, PLAIN: tl.constexpr, MAPPED: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """The list of every pair, `lists` where there is none; MAPPED: its slot, from 1, in the map. Also empties `counts`."""
    i = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    block = tl.load(indices + i, mask=i < pairs, other=-1)
    query = i // M
    choice = (query // T).to(tl.int32)
    t = (query % T).to(tl.int32)
    if PLAIN:
        place = block
    else:
        position = tl.load(positions + (choice // R).to(tl.int64) * T + t, mask=i < pairs, other=0).to(tl.int32)
        place = S - T + t - position + block * BS
    if MAPPED:
        real = (block >= 0) & (place >= 0) & (place < row_blocks)
        tl.store(name + (choice * row_blocks + place) * line + t, (i % M + 1).to(tl.uint8), mask=real)
    else:
        row = choice // J
        which = (t // length * groups + row // rows) * num_blocks + row % rows * row_blocks + place
        tl.store(name + i, tl.where(block < 0, lists, which).to(name.dtype.element_ty), mask=i < pairs)
    tl.store(counts + i, 0, mask=i <= spans)


@triton.jit
def _enter(table, counts, item_list, span, which, start, stop, real, span_items, SEGMENT: tl.constexpr):
    """Lists' lines in the table, and room for their items.

    Programs take room one after the other as they come. That moves items and partial sums around, but leaves a list's own in order:
    what is computed from them does not depend on it.
    """
    tl.store(table + which * 3, start, mask=real)
    tl.store(table + which * 3 + 1, stop, mask=real)
    segments = tl.where(real, tl.cdiv(stop - start, SEGMENT), 0)
    several = tl.where(segments > 1, segments, 0)
    both = segments + (several.to(tl.int64) << 32)
    room = tl.atomic_add(counts + span, tl.sum(both, 0), sem="relaxed") + tl.cumsum(both, 0) - both
    first = room & 0xFFFFFFFF
    first_part = (room >> 32).to(tl.int32)
    tl.store(table + which * 3 + 2, first_part, mask=real)
    to = item_list + span.to(tl.int64) * span_items + first
    for s in range(tl.max(segments, 0)):
        tl.store(to + s, which + ((segments * 0 + s).to(tl.int64) << 32), mask=s < segments)


# A line of unknown divisibility is loaded word by word, in the layout of the scattered stores. Were it loaded in vectors, every store would
# be converted through shared memory.
@triton.jit(do_not_specialize=["line"])
def _gather_kernel(
    name, pair_order, table, counts, item_list, spans, T, row_blocks, num_blocks, length, rows, groups, line, span_items,
    J: tl.constexpr, M: tl.constexpr, SEGMENT: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """The list of one block from its line of the map, four queries a word. Lists take their room in `pair_order` as they come, too."""
    span = tl.program_id(1)
    place = tl.program_id(0) // rows  # blocks that all can read first, see `_list_kernel`
    block = tl.program_id(0) % rows * row_blocks + place
    first = (span % groups * rows + tl.program_id(0) % rows) * J
    low = span // groups * length
    high = tl.minimum(low + length, T)
    i = tl.arange(0, X)
    total = tl.zeros([], tl.int32)
    for choice in range(first, first + J):
        words = name + (choice * row_blocks + place) * line + i
        for c in range(low, high, 4 * X):
            total += tl.sum(_filled(tl.load(words + c // 4, mask=c + i * 4 < high, other=0)), 0)
    start = tl.atomic_add(counts + spans, total.to(tl.int64), sem="relaxed").to(tl.int32)
    one = tl.arange(0, 1)
    _enter(
        table, counts, item_list, span, span * num_blocks + block + one, start + one, start + total + one, one == 0, span_items, SEGMENT
    )  # fmt: skip
    for choice in range(first, first + J):
        words = name + (choice * row_blocks + place) * line + i
        for c in range(low, high, 4 * X):
            word = tl.load(words + c // 4, mask=c + i * 4 < high, other=0)
            filled = _filled(word)
            to = start + tl.cumsum(filled, 0) - filled
            pair = (choice * T + c + i * 4) * M - 1
            for byte in tl.static_range(4):
                slot = (word >> 8 * byte) & 255
                tl.store(pair_order + to, pair + byte * M + slot, mask=slot != 0)
                to += (slot != 0).to(tl.int32)
            start += tl.sum(filled, 0)


@triton.jit
def _filled(word):
    """Bytes of each word that are not 0."""
    # carries into each byte's high bit; the highest is the sign
    carried = tl.add(word & 0x7F7F7F7F, 0x7F7F7F7F, sanitize_overflow=False)
    high = (carried | word) >> 7  # a byte's low bit: whether it is filled
    return (high & 1) + (high >> 8 & 1) + (high >> 16 & 1) + (high >> 24 & 1)


@triton.jit(do_not_specialize=["steps"])
def _list_kernel(
    name, table, counts, item_list, pairs, num_blocks, row_blocks, span_items, steps,
    SEGMENT: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Where lists begin and end among the sorted names.

    Early blocks of all rows come first, since more queries can read them: whatever is left for the end of a launch is short.
    """
    span = tl.program_id(1)
    i = tl.program_id(0) * X + tl.arange(0, X)
    rows = num_blocks // row_blocks
    block = i % rows * row_blocks + i // rows
    which = span * num_blocks + block
    start = _first(name, which, pairs, steps)
    stop = _first(name, which + 1, pairs, steps)
    _enter(table, counts, item_list, span, which, start, stop, i < num_blocks, span_items, SEGMENT)


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
