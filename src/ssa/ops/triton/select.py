"""Exact block selection in two kernels, holding an eighth of a [T, N] score matrix.

1. `_score_kernel`: per tile of queries, a first sweep over the block keys for every head's log-sum-exp, a second for the group's
   summed probabilities, of which only the maximum of each chunk of CH consecutive blocks is stored.
2. `_pick_kernel`: per query, the M best chunks hold the M best blocks (a block elsewhere is beaten by M chunk maxima). Their
   blocks are scored again and the best M taken. Both choices find the M-th largest value by bisection on the bits of the
   scores and compact what reaches it, which costs a few instructions a candidate where sorting costs a few hundred.

Scores are ranked in fp32; ties go to the lower block.

Legend: B batch, T queries, H query heads, K kv heads, R = K or H (who selects), G = H / R heads that share a selection, D head
size, N row blocks, M selected blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
_CHUNK = tl.constexpr(8)
_SAFE_BOUND = tl.constexpr(110.0)


@triton.jit
def _exp_sum(total, peak, logits):
    """One tile of an online log-sum-exp whose reference point moves only when a logit passes it by far."""
    if tl.max(logits - peak[None, :]) > 64.0:
        higher = tl.maximum(peak, tl.max(logits, 0))
        total *= tl.exp2(peak - higher)[None, :]
        peak = higher
    return total + tl.exp2(logits - peak[None, :]), peak


@triton.jit
def _score_kernel(
    q, block_keys, positions, first_blocks, key_bound, lse_out, chunk_max,
    scale2, T, S, N, num_chunks, q_b, q_t, q_h, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PLAIN: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles have the most blocks: start them first
    row = tl.program_id(1)
    b = row // R
    r = row % R
    kv = r // (R // K)
    column = tl.arange(0, BT * GP)
    t = tile * BT + column // GP
    head = r * G + column % GP
    real = (t < T) & (column % GP < G)
    d = tl.arange(0, DP)
    q_rows = q + b.to(tl.int64) * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_T = tl.trans(tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0))
    if PLAIN:
        position = tl.where(t < T, S - T + t, 0)
        first = tl.zeros_like(t)
        low = 0
    else:
        position = tl.load(positions + b * T + t, mask=t < T, other=0).to(tl.int32)
        first = tl.load(first_blocks + b * T + t, mask=t < T, other=0).to(tl.int32)
        low = tl.min(tl.where(t < T, first, N)) // BC * BC
    complete = tl.where(t < T, first + (position + 1) // BS, 0)
    own = tl.where(t < T, first + position // BS, 0)
    stop = tl.max(complete)
    base = block_keys + (b.to(tl.int64) * N * K + kv) * D
    step = tl.arange(0, BC)
    lse = tl.zeros([BT * GP], tl.float32)
    if SOFTMAX:
        total = tl.zeros([BC, BT * GP], tl.float32)
        norm = tl.sqrt(tl.sum(q_T.to(tl.float32) * q_T.to(tl.float32), 0))
        bound = norm * tl.load(key_bound + b * K + kv) * scale2  # Cauchy-Schwarz: no logit exceeds it
        inner = tl.min(tl.where(t < T, complete, N)) // BC * BC if PLAIN else low
        if tl.max(bound) <= _SAFE_BOUND:
            # 2^(logit - peak) neither overflows nor loses the largest term, whatever the logits: no running maximum needed
            peak = bound - 100.0
            for c in range(low, inner, BC):
                n = c + step
                keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(d < D)[None, :], other=0.0)
                total += tl.exp2(tl.dot(keys, q_T, input_precision=PRECISION) * scale2 - peak[None, :])
            for c in range(inner, stop, BC):
                n = c + step
                keys = tl.load(
                    base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
                )
                seen = (n[:, None] >= first[None, :]) & (n[:, None] < complete[None, :])
                logits = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
                total += tl.where(seen, tl.exp2(logits - peak[None, :]), 0.0)
        else:
            peak = tl.full([BT * GP], -1e30, tl.float32)
            for c in range(low, stop, BC):
                n = c + step
                keys = tl.load(
                    base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
                )
                seen = (n[:, None] >= first[None, :]) & (n[:, None] < complete[None, :])
                logits = tl.where(seen, tl.dot(keys, q_T, input_precision=PRECISION) * scale2, float("-inf"))
                total, peak = _exp_sum(total, peak, logits)
        lse = tl.where(complete > first, peak + tl.log2(tl.sum(total, 0)), 0.0)
        tl.store(lse_out + (b * T + t).to(tl.int64) * (R * G) + head, lse, mask=real)
    token = tile * BT + tl.arange(0, BT)
    if PLAIN:
        token_own = tl.where(token < T, (S - T + token) // BS, 0)
        token_first = tl.zeros_like(token)
        inner = tl.min(tl.where(token < T, token_own, N)) // BC * BC
    else:
        token_position = tl.load(positions + b * T + token, mask=token < T, other=0).to(tl.int32)
        token_first = tl.load(first_blocks + b * T + token, mask=token < T, other=0).to(tl.int32)
        token_own = tl.where(token < T, token_first + token_position // BS, 0)
        inner = low
    out = chunk_max + ((b * R + r).to(tl.int64) * T + token) * num_chunks
    chunk_step = tl.arange(0, BC // _CHUNK)
    for c in range(low, inner, BC):
        n = c + step
        keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(d < D)[None, :], other=0.0)
        score = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
        if SOFTMAX:
            score = tl.exp2(score - lse[None, :])
        if G != GP:
            score = tl.where((column % GP < G)[None, :], score, 0.0)
        score = tl.sum(tl.reshape(score, [BC, BT, GP]), 2)
        best = tl.max(tl.reshape(score, [BC // _CHUNK, _CHUNK, BT]), 1)
        chunk = c // _CHUNK + chunk_step
        tl.store(out[None, :] + chunk[:, None], best, mask=(token < T)[None, :])
    for c in range(inner, tl.max(own), BC):
        n = c + step
        keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        score = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
        if SOFTMAX:
            score = tl.exp2(score - lse[None, :])
        if G != GP:
            score = tl.where((column % GP < G)[None, :], score, 0.0)
        score = tl.sum(tl.reshape(score, [BC, BT, GP]), 2)
        candidate = (n[:, None] >= token_first[None, :]) & (n[:, None] < token_own[None, :])
        best = tl.max(tl.reshape(tl.where(candidate, score, float("-inf")), [BC // _CHUNK, _CHUNK, BT]), 1)
        chunk = c // _CHUNK + chunk_step
        tl.store(out[None, :] + chunk[:, None], best, mask=(token < T)[None, :] & (chunk < num_chunks)[:, None])


@triton.jit
def _ordered(x):
    """Integers in the order of the floats; -0.0 and 0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _take(value, count):
    """(flag, place) of the `count` largest of `value` int32 [X], ties to the lower column; place counts the taken ones from the
    left. The smallest integer stands for no value and is never taken."""
    # bisection from the top bit: `threshold` ends as a value that exactly `count` entries reach or, with ties or too few
    # entries, as the largest that at least `count` reach
    reached = tl.sum((value >= 0).to(tl.int32), 0)
    threshold = tl.where(reached >= count, 0, -2147483648)
    bit = 1 << 30
    while (bit > 0) & (reached != count):
        trial = threshold | bit
        reaching = tl.sum((value >= trial).to(tl.int32), 0)
        threshold = tl.where(reaching >= count, trial, threshold)
        reached = tl.where(reaching >= count, reaching, reached)
        bit = bit >> 1
    above = value > threshold
    equal = (value == threshold) & (value != -2147483648)
    room = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def _pick_range(
    q_G, key_base, lse, best_row, scratch_row, indices, scores, first, low, high, count, taken_before, scale2, N,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the best `count` of the row blocks low..high in order, from place `taken_before` on; returns how many there are."""
    first_chunk = low // _CHUNK
    chunks = tl.where(high > low, tl.cdiv(high, _CHUNK) - first_chunk, 0)
    place = tl.arange(0, MP)
    if chunks > MP:
        column = tl.arange(0, CP)
        best = tl.load(best_row + first_chunk + column, mask=column < chunks, other=float("-inf"))
        value = tl.where(column < chunks, _ordered(best), -2147483648)
        taken, slot = _take(value, MP)
        tl.store(scratch_row + slot, column + first_chunk, mask=taken)
        tl.debug_barrier()
        chunk = tl.load(scratch_row + place)
        tl.debug_barrier()
    else:
        chunk = first_chunk + place
    n = tl.reshape(chunk[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :], [MP * _CHUNK])
    candidate = (n >= low) & (n < high)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    key_rows = key_base + tl.where(candidate, n, 0).to(tl.int64) * (K * D)
    keys = tl.load(key_rows[None, :] + d[:, None], mask=candidate[None, :] & (d < D)[:, None], other=0.0)
    score = tl.dot(q_G, keys, input_precision=PRECISION) * scale2
    score = tl.exp2(score - lse[:, None]) if SOFTMAX else score * 0.6931471805599453
    score = tl.sum(tl.where((g < G)[:, None], score, 0.0), 0)
    value = tl.where(candidate, _ordered(score), -2147483648)
    taken, slot = _take(value, count)
    tl.store(indices + taken_before + slot, n - first, mask=taken)
    tl.store(scores + taken_before + slot, score, mask=taken)
    return taken_before + tl.sum(taken.to(tl.int32), 0)


@triton.jit
def _pick_kernel(
    q, block_keys, positions, first_blocks, lse_in, chunk_max, scratch, indices, scores,
    scale2, T, S, N, num_chunks, q_b, q_t, q_h, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
    PLAIN: tl.constexpr, SOFTMAX: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b = row // R
    r = row % R
    if PLAIN:
        own = (S - T + t) // BS
        first = 0
    else:
        first = tl.load(first_blocks + b * T + t).to(tl.int32)
        own = first + tl.load(positions + b * T + t).to(tl.int32) // BS
    query = (b * R + r).to(tl.int64) * T + t
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    q_rows = q + b.to(tl.int64) * q_b + t.to(tl.int64) * q_t + (r * G + g).to(tl.int64) * q_h
    q_G = tl.load(q_rows[:, None] + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    lse = tl.zeros([GP], tl.float32)
    if SOFTMAX:
        lse = tl.load(lse_in + (b * T + t).to(tl.int64) * (R * G) + r * G + g, mask=g < G, other=0.0)
    key_base = block_keys + (b.to(tl.int64) * N * K + r // (R // K)) * D
    best_row = chunk_max + query * num_chunks
    out = indices + query * M
    out_score = scores + query * M
    count = 0
    low = first
    room = M - 1
    if RELEASED:
        split = first + (own - first) // BS * BS
        if split > first:
            count = _pick_range(
                q_G, key_base, lse, best_row, scratch + query * MP, out, out_score, first, first, split, M // 2, count, scale2, N,
                K, G, GP, D, DP, MP, CP, SOFTMAX, PRECISION,
            )  # fmt: skip
            low = split
            room = M // 2 - 1
    count = _pick_range(
        q_G, key_base, lse, best_row, scratch + query * MP, out, out_score, first, low, own, room, count, scale2, N,
        K, G, GP, D, DP, MP, CP, SOFTMAX, PRECISION,
    )  # fmt: skip
    place = tl.arange(0, MP)
    rest = (place >= count) & (place < M)
    tl.store(indices + query * M + place, tl.where(place == count, own - first, -1), mask=rest)
    tl.store(scores + query * M + place, tl.where(place == count, float("inf"), float("-inf")), mask=rest)


def select_blocks(
    q_BTHD: Tensor, block_keys_BNKD: Tensor, first_block_BT: Tensor | None, positions_BT: Tensor | None, num_keys: int,
    block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.select_blocks`; `positions_BT` None = plain rows, whose `first_block_BT` is all zero."""
    batch, queries, heads, size = q_BTHD.shape
    blocks, kv_heads = block_keys_BNKD.shape[1:3]
    selectors = heads if scope == "head" else kv_heads
    group = heads // selectors
    device = q_BTHD.device
    indices = torch.empty(batch, selectors, queries, num_selected, dtype=torch.int32, device=device)
    scores = torch.empty(indices.shape, dtype=torch.float32, device=device)
    if blocks == 0:  # fewer keys than a block: every query has its own block alone
        block_keys_BNKD, blocks = block_keys_BNKD.new_zeros(batch, 1, kv_heads, size), 1
    block_keys = block_keys_BNKD.contiguous()
    q = q_BTHD if q_BTHD.stride(3) == 1 else q_BTHD.contiguous()
    chunk = _CHUNK.value
    num_chunks = -(-blocks // chunk)
    chunk_max = torch.empty(batch, selectors, queries, num_chunks, dtype=torch.float32, device=device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=device)
    key_bound = block_keys.float().norm(dim=-1).amax(1)
    padded = max(triton.next_power_of_2(num_selected), 16 // chunk)
    scratch = torch.empty(batch, selectors, queries, padded, dtype=torch.int32, device=device)
    wide = triton.next_power_of_2(group)
    common = dict(
        R=selectors, K=kv_heads, G=group, D=size, DP=max(16, triton.next_power_of_2(size)), BS=block_size,
        PLAIN=positions_BT is None, SOFTMAX=scoring == "softmax", PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    strides = q.stride()[:3]
    scale2 = scale * LOG2E
    per_tile = max(1, 64 // wide)
    _score_kernel[(triton.cdiv(queries, per_tile), batch * selectors)](
        q, block_keys, positions_BT, first_block_BT, key_bound, lse, chunk_max, scale2, queries, num_keys, blocks, num_chunks,
        *strides, GP=wide, BT=per_tile, BC=64, num_warps=4, num_stages=3, **common,
    )  # fmt: skip
    _pick_kernel[(queries, batch * selectors)](
        q, block_keys, positions_BT, first_block_BT, lse, chunk_max, scratch, indices, scores, scale2, queries, num_keys, blocks,
        num_chunks, *strides, GP=max(16, wide), M=num_selected, MP=padded, CP=triton.next_power_of_2(num_chunks),
        RELEASED=rule == "released" and num_selected > max(1, block_size // 2), num_warps=1 if padded <= 16 else 2, **common,
    )  # fmt: skip
    return indices, scores
