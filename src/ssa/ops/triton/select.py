"""Exact block selection in two kernels (and a small one for a bound), which hold about SCORE_BYTES of scores: queries go through in
slabs.

1. `_score_kernel`: per tile of queries, a first sweep over the block keys for every head's log-sum-exp, a second for the group's
   summed probabilities, of which only the maximum of each chunk of CHUNK consecutive blocks is stored.
2. `_pick_kernel`: per query, the M best chunks hold the M best blocks (a block elsewhere is beaten by M chunk maxima). Their
   blocks are scored again, unless a chunk is one block, and the best M taken. Both choices search the M-th largest value, three trials
   a round, and compact what reaches it, which costs a few instructions a candidate where sorting costs a few hundred.

Scores are ranked in fp32; ties go to the lower block.

Legend: B batch, T queries, H query heads, K kv heads, R = K or H (who selects), G = H / R heads that share a selection, D head
size, N row blocks, M selected blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton.largest import NOTHING, ordered, take_largest
from ssa.ops.triton.launch import ceil_div, contiguous_rows, launch, plan_of, power_of_two
from ssa.ops.triton.numerics import LOG2E
from ssa.ops.triton.operation import operation

_SAFE_BOUND = tl.constexpr(110.0)
CHUNKS = ((512, 1), (2048, 4), (1 << 31, 8))
"""Up to so many blocks, chunks of so many: small ones leave fewer candidates to score again, large ones fewer scores to store."""
SCORE_BYTES = 1 << 27
BOUND_TILE = tl.constexpr(128)
SCORE_TILE = {"columns": 128, "blocks": 64, "warps": 4, "stages": 2, "registers": 128}
PICK_TILE = {"keys": 32, "warps": 1, "stages": 1}


@triton.jit
def _bound_kernel(block_keys, key_bounds, N, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The longest block key of every tile of BOUND_TILE."""
    tile = tl.program_id(0)
    row = tl.program_id(1)  # batch row and kv head
    n = tile * BOUND_TILE + tl.arange(0, BOUND_TILE)
    d = tl.arange(0, DP)
    base = block_keys + ((row // K).to(tl.int64) * N * K + row % K) * D
    mask = (n < N)[:, None] & (d < D)[None, :]
    keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(key_bounds + row * tl.num_programs(0) + tile, tl.sqrt(tl.max(tl.sum(keys * keys, 1), 0)))


@triton.jit
def _log_sum(
    q_C, base, bounds, first, complete, low, inner, stop, scale2, N, tiles, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BC: tl.constexpr, TP: tl.constexpr, PRECISION: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, in powers of two, of the logits of each row of q over the keys first ... complete - 1 at `base`; NONE where there are none.
    Below `inner` all rows see all keys."""
    d = tl.arange(0, DP)
    step = tl.arange(0, BC)
    part = tl.arange(0, TP)
    # Queries are rows here, so that a thread has few of them to sum, and columns in the second sweep.
    total = tl.zeros([q_C.shape[0]], tl.float32)
    norm = tl.sqrt(tl.sum(q_C.to(tl.float32) * q_C.to(tl.float32), 1))
    longest = tl.max(tl.load(bounds + part, mask=part < tiles, other=0.0), 0)
    bound = norm * longest * scale2  # Cauchy-Schwarz: no logit exceeds it
    if tl.max(bound) <= _SAFE_BOUND:
        # 2^(logit - peak) neither overflows nor loses the largest term, whatever the logits: no running maximum needed
        peak = bound - 100.0
        for c in range(low, inner, BC):
            n = c + step
            keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(d < D)[None, :], other=0.0)
            logits = tl.dot(q_C, tl.trans(keys), input_precision=PRECISION) * scale2
            total += tl.sum(tl.exp2(logits - peak[:, None]), 1)
        for c in range(inner, stop, BC):
            n = c + step
            keys = tl.load(
                base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
            )
            seen = (n[None, :] >= first[:, None]) & (n[None, :] < complete[:, None])
            logits = tl.dot(q_C, tl.trans(keys), input_precision=PRECISION) * scale2
            total += tl.sum(tl.where(seen, tl.exp2(logits - peak[:, None]), 0.0), 1)
    else:
        peak = tl.full([q_C.shape[0]], -1e30, tl.float32)
        for c in range(low, stop, BC):
            n = c + step
            keys = tl.load(
                base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
            )
            seen = (n[None, :] >= first[:, None]) & (n[None, :] < complete[:, None])
            logits = tl.where(seen, tl.dot(q_C, tl.trans(keys), input_precision=PRECISION) * scale2, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
            peak = higher
    return tl.where(complete > first, peak + tl.log2(total), NONE)


@triton.jit(do_not_specialize=["slab_start"])
def _score_kernel(
    q, block_keys, positions, first_blocks, key_bounds, lse_in, lse_out, chunk_max,
    scale2, slab_start, slab, T, S, N, row_length, num_chunks, q_b, q_t, q_h, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, TP: tl.constexpr,
    CHUNK: tl.constexpr, PLAIN: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    LOCAL: tl.constexpr, TAIL: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Keys are means of SIZE keys of the document, one every STRIDE; candidates start in the blocks of BS keys before the last LOCAL. TAIL: of
    each chunk, the maximum of its last TAIL entries is stored, too, `num_chunks` places further. LSE: "own" sums up as above; "leave" does
    that alone, with -inf where there is nothing to sum; "take" has it from `lse_in` where that is finite."""
    PER: tl.constexpr = BS // STRIDE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles have the most blocks: start them first
    row = tl.program_id(1)
    b = row // R
    r = row % R
    kv = r // (R // K)
    # Columns are sorted by head, then token: with 8 tokens a tile, each thread holds all heads of its tokens and adds them alone.
    column = tl.arange(0, GP * BT)
    t = slab_start + tile * BT + column % BT
    g = column // BT
    head = r * G + g
    real = (t < T) & (g < G)
    d = tl.arange(0, DP)
    q_rows = q + b.to(tl.int64) * q_b + t.to(tl.int64) * q_t + head.to(tl.int64) * q_h
    q_C = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    q_T = tl.trans(q_C)
    token = slab_start + tile * BT + tl.arange(0, BT)
    if PLAIN:
        position = tl.where(t < T, S - T + t, 0)
        first = tl.zeros_like(t)
        low = 0
        token_own = tl.where(token < T, tl.maximum((S - T + token) // BS - LOCAL, 0) * PER, 0)
        token_first = tl.zeros_like(token)
        # below `inner` every block is complete and seen by every query of the tile: no masks
        inner = tl.min(tl.where(token < T, token_own, N)) // BC * BC
    else:
        position = tl.load(positions + b * T + t, mask=t < T, other=0).to(tl.int32)
        first = tl.load(first_blocks + b * T + t, mask=t < T, other=0).to(tl.int32) * PER
        low = tl.min(tl.where(t < T, first, N)) // BC * BC
        token_position = tl.load(positions + b * T + token, mask=token < T, other=0).to(tl.int32)
        token_first = tl.load(first_blocks + b * T + token, mask=token < T, other=0).to(tl.int32) * PER
        token_own = tl.where(token < T, token_first + tl.maximum(token_position // BS - LOCAL, 0) * PER, 0)
        inner = low
    complete = tl.where(t < T, first + tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE, 0)
    stop = tl.max(complete)
    base = block_keys + (b.to(tl.int64) * N * K + kv) * D
    step = tl.arange(0, BC)
    lse = tl.zeros([GP * BT], tl.float32)
    lse_rows = (b * T + t).to(tl.int64) * (R * G) + head
    if SOFTMAX:
        tiles = tl.cdiv(N, BOUND_TILE)
        bounds = key_bounds + (b * K + kv) * tiles
        if LSE == "take":
            lse = tl.load(lse_in + lse_rows, mask=real, other=0.0)
            if tl.min(lse, 0) == float("-inf"):
                found = _log_sum(
                    q_C, base, bounds, first, complete, low, inner, stop, scale2, N, tiles, K, D, DP, BC, TP, PRECISION, 0.0
                )  # fmt: skip
                lse = tl.where(lse == float("-inf"), found, lse)
        else:
            NONE: tl.constexpr = float("-inf") if LSE == "leave" else 0.0
            lse = _log_sum(
                q_C, base, bounds, first, complete, low, inner, stop, scale2, N, tiles, K, D, DP, BC, TP, PRECISION, NONE
            )
            tl.store(lse_out + lse_rows, lse, mask=real)
    last = tl.max(token_own)
    if LSE == "leave":
        inner = low  # no second sweep
        last = low
    out = chunk_max + ((b * R + r).to(tl.int64) * slab + token - slab_start) * row_length
    chunk_step = tl.arange(0, BC // CHUNK)
    for c in range(low, inner, BC):
        n = c + step
        keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(d < D)[None, :], other=0.0)
        score = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
        if SOFTMAX:
            score = tl.exp2(score - lse[None, :])
        if G != GP:
            score = tl.where((g < G)[None, :], score, 0.0)
        score = tl.sum(tl.reshape(score, [BC, GP, BT]), 1)
        best = tl.max(tl.reshape(score, [BC // CHUNK, CHUNK, BT]), 1)
        chunk = c // CHUNK + chunk_step
        tl.store(out[None, :] + chunk[:, None], best, mask=(token < T)[None, :])
        if TAIL > 0:
            tail = tl.where((step % CHUNK >= CHUNK - TAIL)[:, None], score, float("-inf"))
            tail = tl.max(tl.reshape(tail, [BC // CHUNK, CHUNK, BT]), 1)
            tl.store(out[None, :] + num_chunks + chunk[:, None], tail, mask=(token < T)[None, :])
    for c in range(inner, last, BC):
        n = c + step
        keys = tl.load(base + n.to(tl.int64)[:, None] * (K * D) + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        score = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
        if SOFTMAX:
            score = tl.exp2(score - lse[None, :])
        if G != GP:
            score = tl.where((g < G)[None, :], score, 0.0)
        score = tl.sum(tl.reshape(score, [BC, GP, BT]), 1)
        candidate = (n[:, None] >= token_first[None, :]) & (n[:, None] < token_own[None, :])
        best = tl.max(tl.reshape(tl.where(candidate, score, float("-inf")), [BC // CHUNK, CHUNK, BT]), 1)
        chunk = c // CHUNK + chunk_step
        tl.store(out[None, :] + chunk[:, None], best, mask=(token < T)[None, :] & (chunk < num_chunks)[:, None])
        if TAIL > 0:
            tail = tl.where((step % CHUNK >= CHUNK - TAIL)[:, None], tl.where(candidate, score, float("-inf")), float("-inf"))
            tail = tl.max(tl.reshape(tail, [BC // CHUNK, CHUNK, BT]), 1)
            tl.store(out[None, :] + num_chunks + chunk[:, None], tail, mask=(token < T)[None, :] & (chunk < num_chunks)[:, None])


@triton.jit
def _pick_range(
    q_T, key_base, lse, row, candidate_row, chosen, indices, scores, first, low, high, count, taken_before, scale2,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
    KS: tl.constexpr, CHUNK: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the best `count` of the row blocks low..high in order, from place `taken_before` on; returns how many there are.

    `row` holds the chunk maxima. Unless chunks are single blocks, the candidates' scores go to `candidate_row`, their chunks to `chosen`.
    """
    hint = tl.full([], NOTHING, tl.int32)
    column = tl.arange(0, CP)
    if CHUNK == 1:
        n = low + column
        score = tl.load(row + n, mask=n < high, other=float("-inf"))
        if not SOFTMAX:
            score *= 0.6931471805599453
    else:
        first_chunk = low // CHUNK
        chunks = tl.where(high > low, tl.cdiv(high, CHUNK) - first_chunk, 0)
        if chunks > MP:
            best = tl.load(row + first_chunk + column, mask=column < chunks, other=float("-inf"))
            value = tl.where(column < chunks, ordered(best), NOTHING)
            taken, slot, threshold = take_largest(value, MP, hint)
            tl.store(chosen + slot, column + first_chunk, mask=taken)
            # MP blocks reach this much, up to the rounding of another order of summation
            hint = tl.maximum(threshold, NOTHING + 4096) - 4096
        else:
            place = tl.arange(0, MP)
            tl.store(chosen + place, first_chunk + place)
        tl.debug_barrier()
        g = tl.arange(0, GP)
        d = tl.arange(0, DP)
        key = tl.arange(0, KS)
        for c in range(0, tl.minimum(chunks, MP) * CHUNK, KS):
            slot = (c + key) // CHUNK
            n = tl.load(chosen + slot, mask=slot < MP, other=0) * CHUNK + (c + key) % CHUNK
            candidate = (n >= low) & (n < high) & (slot < MP)
            key_rows = key_base + tl.where(candidate, n, 0).to(tl.int64) * (K * D)
            keys = tl.load(key_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
            score = tl.dot(keys, q_T, input_precision=PRECISION) * scale2
            score = tl.exp2(score - lse[None, :]) if SOFTMAX else score * 0.6931471805599453
            score = tl.sum(tl.where((g < G)[None, :], score, 0.0), 1)
            tl.store(candidate_row + c + key, tl.where(candidate, score, float("-inf")), mask=slot < MP)
        tl.debug_barrier()
        place = tl.arange(0, MP * CHUNK)
        score = tl.load(candidate_row + place, mask=place < chunks * CHUNK, other=float("-inf"))
        n = tl.load(chosen + place // CHUNK) * CHUNK + place % CHUNK
    value = tl.where((n >= low) & (n < high), ordered(score), NOTHING)
    taken, slot, _ = take_largest(value, count, hint)
    tl.store(indices + taken_before + slot, n - first, mask=taken)
    tl.store(scores + taken_before + slot, score, mask=taken)
    return taken_before + tl.sum(taken.to(tl.int32), 0)


@triton.jit(do_not_specialize=["slab_start"])
def _pick_kernel(
    q, block_keys, positions, first_blocks, lse_in, chunk_max, chosen, indices, scores,
    scale2, slab_start, slab, T, S, N, row_length, q_b, q_t, q_h, R: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, KS: tl.constexpr,
    CHUNK: tl.constexpr, PLAIN: tl.constexpr, SOFTMAX: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.num_programs(0) - 1 - tl.program_id(0)
    t = slab_start + local
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
    q_T = tl.load(q_rows[None, :] + d[:, None], mask=(g < G)[None, :] & (d < D)[:, None], other=0.0)
    lse = tl.zeros([GP], tl.float32)
    if SOFTMAX:
        lse = tl.load(lse_in + (b * T + t).to(tl.int64) * (R * G) + r * G + g, mask=g < G, other=0.0)
    key_base = block_keys + (b.to(tl.int64) * N * K + r // (R // K)) * D
    in_slab = (b * R + r).to(tl.int64) * slab + local
    best_row = chunk_max + in_slab * row_length
    # the maxima are read once, so that the scores may take their place; the released rule reads them twice
    candidate_row = best_row + (row_length - MP * CHUNK if RELEASED else 0)
    out = indices + query * M
    out_score = scores + query * M
    count = 0
    low = first
    room = M - 1
    if RELEASED:
        split = first + (own - first) // BS * BS
        if split > first:
            count = _pick_range(
                q_T, key_base, lse, best_row, candidate_row, chosen + in_slab * MP, out, out_score, first, first, split, M // 2, count, scale2,
                K, G, GP, D, DP, MP, CP, KS, CHUNK, SOFTMAX, PRECISION,
            )  # fmt: skip
            low = split
            room = M // 2 - 1
            tl.debug_barrier()
    count = _pick_range(
        q_T, key_base, lse, best_row, candidate_row, chosen + in_slab * MP, out, out_score, first, low, own, room, count, scale2,
        K, G, GP, D, DP, MP, CP, KS, CHUNK, SOFTMAX, PRECISION,
    )  # fmt: skip
    place = tl.arange(0, MP)
    rest = (place >= count) & (place < M)
    tl.store(indices + query * M + place, tl.where(place == count, own - first, -1), mask=rest)
    tl.store(scores + query * M + place, tl.where(place == count, float("inf"), float("-inf")), mask=rest)


def _run(
    q_BTHD: Tensor, block_keys_BNKD: Tensor, first_block_BT: Tensor | None, positions_BT: Tensor | None, num_keys: int,
    block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ssa.ops.select_blocks`; `positions_BT` and `first_block_BT` None = plain rows."""
    batch, queries, heads, size = q_BTHD.shape
    blocks, kv_heads = block_keys_BNKD.shape[1:3]
    selectors = heads if scope == "head" else kv_heads
    group = heads // selectors
    device = q_BTHD.device
    indices = torch.empty(batch, selectors, queries, num_selected, dtype=torch.int32, device=device)
    scores = torch.empty(indices.shape, dtype=torch.float32, device=device)
    if not q_BTHD.numel():
        return indices, scores
    if blocks == 0:  # fewer keys than a block: every query has its own block alone
        block_keys_BNKD, blocks = block_keys_BNKD.new_zeros(batch, 1, kv_heads, size), 1
    block_keys = block_keys_BNKD.contiguous()
    q = contiguous_rows(q_BTHD)
    chunk = next(chunk for most, chunk in CHUNKS if blocks <= most)
    num_chunks = ceil_div(blocks, chunk)
    padded = max(power_of_two(num_selected), 16 // chunk)
    released = rule == "released" and num_selected > max(1, block_size // 2)
    candidates = 0 if chunk == 1 else padded * chunk
    row_length = num_chunks + candidates if released else max(num_chunks, candidates)
    wide, padded_size = power_of_two(group), max(16, power_of_two(size))
    columns = SCORE_TILE["columns"] * 256 // max(256, padded_size * q.element_size())  # wide heads leave less shared memory
    per_tile = max(1, columns // wide)
    slab = min(queries, max(1, SCORE_BYTES // (4 * batch * selectors * row_length * per_tile)) * per_tile)
    chunk_max = torch.empty(batch, selectors, slab, row_length, dtype=torch.float32, device=device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=device)
    tiles = ceil_div(blocks, BOUND_TILE.value)
    key_bounds = torch.empty(batch * kv_heads, tiles, dtype=torch.float32, device=device)
    chosen = torch.empty(batch, selectors, slab, padded if chunk > 1 else 0, dtype=torch.int32, device=device)
    common = dict(
        R=selectors, K=kv_heads, G=group, D=size, DP=padded_size, BS=block_size, CHUNK=chunk,
        PLAIN=positions_BT is None, SOFTMAX=scoring == "softmax", PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    strides = q.stride()[:3]
    plan = plan_of(
        q, block_keys, positions_BT, first_block_BT, num_keys, block_size, num_selected, scope, scoring, rule, CHUNKS, SCORE_BYTES
    )
    scale2 = scale * LOG2E.value
    if scoring == "softmax":
        launch(
            plan, _bound_kernel, (tiles, batch * kv_heads), block_keys, key_bounds, blocks, K=kv_heads, D=size, DP=padded_size,
            num_warps=4,
        )  # fmt: skip
    stages = (
        SCORE_TILE["stages"] if padded_size <= 64 else 1
    )  # one stage of wide heads leaves room for another program (measured)
    for start in range(0, queries, slab):
        here = min(slab, queries - start)
        launch(
            plan, _score_kernel, (ceil_div(here, per_tile), batch * selectors),
            q, block_keys, positions_BT, first_block_BT, key_bounds, None, lse, chunk_max, scale2, start, slab, queries, num_keys, blocks,
            row_length, num_chunks, *strides, GP=wide, BT=per_tile, BC=SCORE_TILE["blocks"], TP=power_of_two(tiles),
            num_warps=SCORE_TILE["warps"], num_stages=stages,
            maxnreg=SCORE_TILE["registers"] if columns == SCORE_TILE["columns"] else None, SIZE=block_size, STRIDE=block_size, LOCAL=0,
            TAIL=0, LSE="own", **common,
        )  # fmt: skip
        launch(
            plan, _pick_kernel, (here, batch * selectors),
            q, block_keys, positions_BT, first_block_BT, lse, chunk_max, chosen, indices, scores, scale2, start, slab, queries, num_keys,
            blocks, row_length, *strides, GP=max(16, wide), M=num_selected, MP=padded, CP=power_of_two(num_chunks),
            KS=min(PICK_TILE["keys"], padded * chunk), RELEASED=released, num_warps=PICK_TILE["warps"] if num_chunks <= 1024 else 4,
            num_stages=PICK_TILE["stages"], **common,
        )  # fmt: skip
    return indices, scores


select_blocks_op = torch.library.custom_op("ssa::select_blocks", _run, mutates_args=())


@select_blocks_op.register_fake
def _(q_BTHD, block_keys_BNKD, first_block_BT, positions_BT, num_keys, block_size, num_selected, scope, scoring, rule, scale):
    selectors = q_BTHD.shape[2] if scope == "head" else block_keys_BNKD.shape[2]
    shape = (q_BTHD.shape[0], selectors, q_BTHD.shape[1], num_selected)
    return q_BTHD.new_empty(shape, dtype=torch.int32), q_BTHD.new_empty(shape, dtype=torch.float32)


select_blocks = operation(select_blocks_op, _run)
