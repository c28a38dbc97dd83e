"""Block selection by windows of keys in the two kernels of `ssa.ops.triton.select`'s kind: its `_score_kernel`, for which windows are blocks
and blocks are chunks, leaves of each block the best of the windows that start in it and the best of those that end in the next;
`_pick_windows_kernel` puts both together, and takes the best by score and, with an importance, the best of the rest. No query changes an
importance: where many queries choose, `_rank_kernel` ranks it for all of them, and each searches few numbers instead of all that fp32 has.

Legend: B batch, T queries, H query heads, K kv heads, R = K or H (who selects), G = H / R heads that share a selection, D head size,
W windows, N row blocks, M places for selected blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.budget import COARSER
from ssa.ops.triton.largest import NOTHING, ordered, take_largest
from ssa.ops.triton.launch import Plan, ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E
from ssa.ops.triton.operation import operation
from ssa.ops.triton.select import BOUND_TILE, SCORE_BYTES, SCORE_TILE, _bound_kernel, _score_kernel


@triton.jit(do_not_specialize=["N"])
def _rank_kernel(importance, ranks, N, i_b, i_n, i_h, K: tl.constexpr, BN: tl.constexpr):
    """int32 [B, K, N]: of the most important block of a row N - 1, and one less for each that another is behind, ties to the lower; NOTHING
    for a block without a window."""
    row = tl.program_id(1)
    importance += (row // K).to(tl.int64) * i_b + (row % K) * i_h
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    value = tl.load(importance + n.to(tl.int64) * i_n, mask=n < N, other=float("-inf"))
    own = ordered(value)
    ahead = tl.zeros([BN], tl.int32)
    for start in range(0, N, BN):
        m = start + tl.arange(0, BN)
        other = ordered(tl.load(importance + m.to(tl.int64) * i_n, mask=m < N, other=float("-inf")))
        before = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (m[None, :] < n[:, None]))
        ahead += tl.sum(before.to(tl.int32), 1)
    tl.store(ranks + row.to(tl.int64) * N + n, tl.where(value > float("-inf"), N - 1 - ahead, NOTHING), mask=n < N)


@triton.jit(do_not_specialize=["slab_start", "N"])
def _pick_windows_kernel(
    best, importance, ranks, positions, first_blocks, lengths, row_blocks, indices, scores, slab_start, slab, T, S, N, row_length, tails, i_b, i_n, i_h,
    R: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, SINKS: tl.constexpr,
    LOCAL: tl.constexpr, BY_SCORE: tl.constexpr, BY_IMPORTANCE: tl.constexpr, RANKED: tl.constexpr, DENSE: tl.constexpr, TAIL: tl.constexpr,
    WHERE: tl.constexpr, SOFTMAX: tl.constexpr, SCORES: tl.constexpr, ROW_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of one query and selector. `best`: rows of scores by row block, `tails` places further those for the next block. N: blocks with an
    importance; RANKED: with `ranks`. WHERE queries stand: "last" of S keys, at "positions", or last of "lengths". ROW_BLOCKS: a row's budget is
    its `row_blocks`, of which BY_SCORE and BY_IMPORTANCE are the most."""
    local = tl.num_programs(0) - 1 - tl.program_id(0)
    t = slab_start + local
    row = tl.program_id(1)
    b = (row // R).to(tl.int64)
    r = row % R
    first = 0
    if WHERE == "last":
        position = S - T + t
    elif WHERE == "positions":
        position = tl.load(positions + b * T + t).to(tl.int32)
        first = tl.load(first_blocks + b * T + t).to(tl.int32)
    else:
        position = tl.load(lengths + b).to(tl.int32) - T + t
    own = tl.where(position < 0, -1, position // BS)
    lead = tl.minimum(own + 1, SINKS)
    if DENSE > 0:
        lead = tl.where(position < DENSE, own + 1, lead)
    late = tl.maximum(lead, own - LOCAL)
    number = lead + tl.arange(0, CP)
    valid = number < late
    at = best + (row.to(tl.int64) * slab + local) * row_length + first + number
    score = tl.load(at, mask=valid, other=float("-inf"))
    if TAIL > 0:
        score = tl.maximum(score, tl.load(at + tails - 1, mask=valid & (number > 0), other=float("-inf")))
    if not SOFTMAX:
        score *= LN2
    rank = tl.where(valid, ordered(score), NOTHING)
    chosen = rank != rank
    if ROW_BLOCKS:
        free = tl.maximum(tl.load(row_blocks + b) - (SINKS + LOCAL + 1), 0)
        by_score = tl.minimum(free, BY_SCORE)
        by_importance = tl.minimum(free - by_score, BY_IMPORTANCE)
    if BY_SCORE > 0:
        chosen, _, _ = take_largest(rank, by_score if ROW_BLOCKS else BY_SCORE, tl.full([], NOTHING, tl.int32))
    if BY_IMPORTANCE > 0:
        kv = r // (R // K)
        worth = importance + b * i_b + kv * i_h + (first + number).to(tl.int64) * i_n
        rest = valid & (chosen == 0) & (first + number < N)
        if RANKED:
            rank = tl.load(ranks + (b * K + kv) * N + first + number, mask=rest, other=NOTHING)
            # of blocks that are as important as the row's others, twice as many as are to be taken reach this
            hint = N - (2 * BY_IMPORTANCE * N) // tl.maximum(late - lead - BY_SCORE, 1)
        else:
            value = tl.load(worth, mask=rest, other=float("-inf"))
            rank = tl.where(value > float("-inf"), ordered(value), NOTHING)
            hint = tl.full([], NOTHING, tl.int32)
        more, _, _ = take_largest(rank, by_importance if ROW_BLOCKS else BY_IMPORTANCE, hint)
        if SCORES:
            score = tl.where(more, tl.load(worth, mask=more, other=0.0), score)
        chosen = chosen | more
    found = tl.sum(chosen.to(tl.int32), 0)
    place = lead + tl.cumsum(chosen.to(tl.int32), 0) - 1
    to = (row.to(tl.int64) * T + t) * M
    tl.store(indices + to + place, number, mask=chosen & (place < M))
    m = tl.arange(0, MP)
    last = m - lead - found + late
    forced = tl.where(m < lead, m, tl.where(last <= own, last, -1))
    outside = (m < M) & ((m < lead) | (m >= lead + found))
    tl.store(indices + to + m, forced, mask=outside)
    if SCORES:
        tl.store(scores + to + place, score, mask=chosen & (place < M))
        tl.store(scores + to + m, tl.where(forced >= 0, float("inf"), float("-inf")), mask=outside)


LN2 = tl.constexpr(0.6931471805599453)


def pick(
    plan: Plan | None, best: Tensor, tails: int, importance: Tensor | None, ranks: Tensor | None, positions: Tensor | None,
    first_blocks: Tensor | None, lengths: Tensor | None, indices: Tensor, scores: Tensor | None, start: int, here: int, num_keys: int, kv_heads: int, block_size: int,
    num_selected: int, windows: list[int], softmax: bool, row_blocks: Tensor | None,
) -> None:  # fmt: skip
    """Writes `indices` [B, R, T, M], and `scores` where given, of the queries from `start` on, of which `best` [B * R, slab, row] has the scores."""
    size, stride, sinks, local, by_query, dense = windows
    batch, selectors, queries, places = indices.shape
    free = max(0, num_selected - sinks - local - 1)
    by_score = free if by_query < 0 else min(by_query, free)
    candidates = max(1, -(-num_keys // block_size) - 1 - local)
    columns = power_of_two(max(16, candidates))
    where = "lengths" if lengths is not None else "last" if positions is None else "positions"
    launch(
        plan, _pick_windows_kernel, (here, batch * selectors),
        best, importance, ranks, positions, first_blocks, lengths, row_blocks, indices, scores, start, best.shape[-2], queries, num_keys,
        0 if importance is None else importance.shape[1], best.shape[-1], tails, *((0, 0, 0) if importance is None else importance.stride()),
        R=selectors, K=kv_heads, BS=block_size, M=places, MP=power_of_two(places), CP=columns, SINKS=sinks, LOCAL=local,
        BY_SCORE=min(by_score, columns), BY_IMPORTANCE=min(free - by_score, columns) if importance is not None else 0,
        RANKED=ranks is not None, DENSE=dense, TAIL=size // stride - 1, WHERE=where, SOFTMAX=softmax, SCORES=scores is not None,
        ROW_BLOCKS=row_blocks is not None,
        num_warps=1 if columns <= 1024 else 4 if columns <= 4096 else 8, num_stages=1,
    )  # fmt: skip


def _run(
    q_BTHD: Tensor, means_BWKD: Tensor, coarse_BVKD: Tensor | None, importance_BNK: Tensor | None, first_block_BT: Tensor | None,
    first_coarse_BT: Tensor | None, positions_BT: Tensor | None, num_keys: int, block_size: int, places: int, num_selected: int,
    windows: list[int], scope: str, scoring: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.reference.select_windows`."""
    size, stride, _, local, _, _ = windows
    batch, queries, heads, dim = q_BTHD.shape
    kv_heads = means_BWKD.shape[2]
    selectors = heads if scope == "head" else kv_heads
    device, per_block = q_BTHD.device, block_size // stride
    indices = torch.empty(batch, selectors, queries, places, dtype=torch.int32, device=device)
    scores = torch.empty(indices.shape, dtype=torch.float32, device=device)
    if not q_BTHD.numel():
        return indices, scores
    if not means_BWKD.shape[1]:  # fewer keys than a window: nothing is scored
        means_BWKD = means_BWKD.new_zeros(batch, 1, kv_heads, dim)
    q, means = contiguous_rows(q_BTHD), means_BWKD.contiguous()
    blocks = ceil_div(means.shape[1], per_block)
    softmax = scoring == "softmax"
    layout = (
        q, means, coarse_BVKD, importance_BNK, first_block_BT, first_coarse_BT, positions_BT, num_keys, block_size, places, num_selected,
        *windows, scope, scoring, SCORE_BYTES,
    )  # fmt: skip
    plan = plan_of(*layout, "windows")
    group, padded_size = heads // selectors, max(16, power_of_two(dim))
    wide = power_of_two(group)
    columns = SCORE_TILE["columns"] * 256 // max(256, padded_size * q.element_size())  # wide heads leave less shared memory
    per_tile = max(1, columns // wide)
    row_length = 2 * blocks
    slab = min(queries, max(1, SCORE_BYTES // (4 * batch * selectors * row_length * per_tile)) * per_tile)
    best = torch.empty(batch * selectors, slab, row_length, dtype=torch.float32, device=device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=device)
    common = dict(
        R=selectors, K=kv_heads, G=group, GP=wide, D=dim, DP=padded_size, BT=per_tile, BC=max(64, per_block), PLAIN=positions_BT is None,
        SOFTMAX=softmax, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=SCORE_TILE["warps"],
        num_stages=SCORE_TILE["stages"] if padded_size <= 64 else 1,
        maxnreg=SCORE_TILE["registers"] if columns == SCORE_TILE["columns"] else None,
    )  # fmt: skip
    ranks = None if importance_BNK is None else _ranks(plan, importance_BNK, queries)
    scale2, strides = scale * LOG2E.value, q.stride()[:3]
    coarse, given = None if not softmax else coarse_BVKD, None
    bounds = _bounds(plan, means, padded_size) if softmax else (None, 1)
    if coarse is not None and coarse.shape[1]:
        coarse, given = coarse.contiguous(), torch.empty_like(lse)
        coarse_plan = plan_of(*layout, "coarse")  # of the same kernels, launched another way
        coarse_bounds = _bounds(coarse_plan, coarse, padded_size)
        launch(
            coarse_plan, _score_kernel, (ceil_div(queries, per_tile), batch * selectors),
            q, coarse, positions_BT, first_coarse_BT, coarse_bounds[0], None, given, best, scale2, 0, queries, queries, num_keys,
            coarse.shape[1], 0, 0, *strides, BS=COARSER * stride, TP=power_of_two(coarse_bounds[1]), CHUNK=1, SIZE=COARSER * size,
            STRIDE=COARSER * stride, LOCAL=size // stride - 1, TAIL=0, LSE="leave", **common,
        )  # fmt: skip
    for start in range(0, queries, slab):
        here = min(slab, queries - start)
        launch(
            plan, _score_kernel, (ceil_div(here, per_tile), batch * selectors),
            q, means, positions_BT, first_block_BT, bounds[0], given, lse, best, scale2, start, slab, queries, num_keys, means.shape[1],
            row_length, blocks, *strides, BS=block_size, TP=power_of_two(bounds[1]), CHUNK=per_block, SIZE=size, STRIDE=stride, LOCAL=local,
            TAIL=size // stride - 1, LSE="own" if given is None else "take", **common,
        )  # fmt: skip
        pick(
            plan, best, blocks, importance_BNK, ranks, positions_BT, first_block_BT, None, indices, scores, start, here, num_keys, kv_heads,
            block_size, num_selected, windows, softmax, None,
        )  # fmt: skip
    return indices, scores


def _ranks(plan: Plan | None, importance: Tensor, queries: int) -> Tensor | None:
    """int32 [B, K, N]; None for so few queries that ranking each block against each costs more than it saves."""
    batch, blocks, kv_heads = importance.shape
    if not blocks or queries < blocks // 16:
        return None
    ranks = torch.empty(batch, kv_heads, blocks, dtype=torch.int32, device=importance.device)
    launch(
        plan, _rank_kernel, (ceil_div(blocks, 32), batch * kv_heads), importance, ranks, blocks, *importance.stride(), K=kv_heads, BN=32,
        num_warps=4,
    )  # fmt: skip
    return ranks


def _bounds(plan: Plan | None, means: Tensor, padded_size: int) -> tuple[Tensor, int]:
    """(longest mean of every tile [B * K, tiles], tiles)"""
    batch, windows, kv_heads, dim = means.shape
    tiles = ceil_div(windows, BOUND_TILE.value)
    bounds = torch.empty(batch * kv_heads, tiles, dtype=torch.float32, device=means.device)
    launch(plan, _bound_kernel, (tiles, batch * kv_heads), means, bounds, windows, K=kv_heads, D=dim, DP=padded_size, num_warps=4)
    return bounds, tiles


select_windows_op = torch.library.custom_op("ssa::select_windows", _run, mutates_args=())


@select_windows_op.register_fake
def _(q, means, coarse, importance, first_block, first_coarse, positions, num_keys, block_size, places, num_selected, windows, scope, scoring, scale):  # fmt: skip
    selectors = q.shape[2] if scope == "head" else means.shape[2]
    shape = (q.shape[0], selectors, q.shape[1], places)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


select_windows = operation(select_windows_op, _run)
