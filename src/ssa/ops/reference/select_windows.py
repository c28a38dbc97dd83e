"""Block selection by windows of keys in plain PyTorch: InfLLM-V2's, and NOSA's by importance besides.

Legend: B batch, T queries (C of a chunk), H query heads, K kv heads, G = H / K, R = K or H (who selects), D head size, W windows of a row,
r windows of a block, N row blocks, M selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ssa.budget import COARSER
from ssa.ops.reference.select import SCORE_ELEMENTS, best, first_of_rows

_NONE = 0x7FFFFFFF


def select_windows(*args: Any) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.select_blocks`. One node of compiled and exported graphs, which would have to fix the number of chunks."""
    return select_windows_op(*args) if torch.compiler.is_compiling() else _select_windows(*args)


def _select_windows(
    q_BTHD: Tensor, means_BWKD: Tensor, coarse_BVKD: Tensor | None, importance_BNK: Tensor | None, first_block_BT: Tensor | None,
    first_coarse_BT: Tensor | None, positions_BT: Tensor | None, num_keys: int, block_size: int, places: int, num_selected: int,
    windows: list[int], scope: str, scoring: str, scale: float, row_blocks_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`windows`: size, stride, sinks, local blocks, blocks by query or -1 for all, dense length. `first_block_BT` and `first_coarse_BT`: where the
    blocks and the coarse windows of a query's document begin among the row's; None = 0. `row_blocks_B`: the budget of each row, at most
    `num_selected`."""
    batch, queries, heads, _ = q_BTHD.shape
    size, stride, sinks, local, by_query, dense = windows
    per_block, before = block_size // stride, size // stride - 1
    device, kv_heads = q_BTHD.device, means_BWKD.shape[2]
    if positions_BT is None:
        positions_BT = torch.arange(num_keys - queries, num_keys, device=device).expand(batch, queries)
    zeros = torch.zeros_like(positions_BT)
    first_block_BT = zeros if first_block_BT is None else first_block_BT
    first_coarse_BT = zeros if first_coarse_BT is None else first_coarse_BT
    blocks = max(1, -(-means_BWKD.shape[1] // per_block), 0 if importance_BNK is None else importance_BNK.shape[1])
    missing = blocks * per_block - means_BWKD.shape[1]
    means_BWKD = pad(means_BWKD, (0, 0, 0, 0, 0, missing))  # of windows that no query sees
    selectors = heads if scope == "head" else kv_heads
    indices = torch.empty(batch, selectors, queries, places, dtype=torch.int32, device=device)
    scores = torch.empty_like(indices, dtype=torch.float32)
    importance_BRN = None
    if importance_BNK is not None:
        importance_BNK = pad(importance_BNK.float(), (0, 0, 0, blocks - importance_BNK.shape[1]), value=float("-inf"))
        importance_BRN = importance_BNK.transpose(1, 2).repeat_interleave(selectors // kv_heads, 1)
    columns = blocks * per_block + (0 if coarse_BVKD is None else coarse_BVKD.shape[1])
    chunk = max(1, SCORE_ELEMENTS // max(1, batch * heads * (columns + 1)))
    block_N = torch.arange(blocks, device=device)
    for t in range(0, queries, chunk):
        cut = slice(t, t + chunk)
        position_BC = positions_BT[:, cut]
        own_BC = position_BC // block_size
        score_BRCW = window_scores(
            q_BTHD[:, cut], means_BWKD, coarse_BVKD, first_block_BT[:, cut] * per_block, first_coarse_BT[:, cut], position_BC,
            size, stride, scope, scoring, scale,
        )  # fmt: skip
        score_BRCN = best_of_blocks(score_BRCW, per_block, before)
        number_BCN = block_N - first_block_BT[:, cut, None]
        # what is read anyway: the first blocks up to `lead`, those from `late` on
        lead_BC = torch.where(position_BC < dense, own_BC + 1, (own_BC + 1).clamp(max=sinks))
        late_BC = torch.maximum(lead_BC, own_BC - local)
        candidate_BCN = (number_BCN >= lead_BC[..., None]) & (number_BCN < late_BC[..., None])
        score_BRCN = score_BRCN.masked_fill(~candidate_BCN[:, None], float("-inf"))
        free = num_selected - sinks - local - 1
        by_score = free if by_query < 0 else min(by_query, free)
        column, value = best(score_BRCN, block_N, by_score)
        if row_blocks_B is not None:
            free_B = row_blocks_B - (sinks + local + 1)
            value = first_of_rows(value, free_B)
        if importance_BRN is not None and free > by_score:
            rest_BRCN = importance_BRN[:, :, None].masked_fill(~candidate_BCN[:, None], float("-inf"))
            taken = torch.zeros_like(rest_BRCN, dtype=torch.bool).scatter_(-1, column, value != float("-inf"))
            more, worth = best(rest_BRCN.masked_fill(taken, float("-inf")), block_N, free - by_score)
            if row_blocks_B is not None:
                worth = first_of_rows(worth, free_B - by_score)
            column, value = torch.cat([column, more], -1), torch.cat([value, worth], -1)
        number = number_BCN[:, None].expand_as(score_BRCN).gather(-1, column)
        indices[:, :, cut], scores[:, :, cut] = _listed(number, value, lead_BC, late_BC, own_BC, places)
    return indices, scores


select_windows_op = torch.library.custom_op("ssa::select_windows_reference", _select_windows, mutates_args=())


@select_windows_op.register_fake
def _(q, means, coarse, importance, first_block, first_coarse, positions, num_keys, block_size, places, num_selected, windows, scope, scoring, scale, row_blocks=None):  # fmt: skip
    selectors = q.shape[2] if scope == "head" else means.shape[2]
    indices = q.new_empty(q.shape[0], selectors, q.shape[1], places, dtype=torch.int32)
    return indices, torch.empty_like(indices, dtype=torch.float32)


def best_of_blocks(x: Tensor, per_block: int, before: int) -> Tensor:
    """[..., W] of windows -> [..., N], N = ceil(W / per_block): the best of those that touch a block, its own and the `before` before it."""
    blocks = -(-x.shape[-1] // per_block)
    if not blocks:
        return x.new_empty(*x.shape[:-1], 0)
    padded = pad(x, (before, blocks * per_block - x.shape[-1]), value=float("-inf"))
    return padded.unfold(-1, per_block + before, per_block).amax(-1)


def window_scores(
    q_BCHD: Tensor, means_BWKD: Tensor, coarse_BVKD: Tensor | None, first_BC: Tensor, first_coarse_BC: Tensor, position_BC: Tensor,
    size: int, stride: int, scope: str, scoring: str, scale: float,
) -> Tensor:  # fmt: skip
    """fp32 [B, R, C, W], -inf where a query does not see a window whole."""
    logits_BKGCW, seen_BCW = _logits(q_BCHD, means_BWKD, first_BC, position_BC, size, stride, scale)
    seen = seen_BCW[:, None, None]
    if scoring == "logit":
        score_BKGCW = logits_BKGCW
    else:
        logits_BKGCW = logits_BKGCW.masked_fill(~seen, float("-inf"))
        lse = logits_BKGCW.logsumexp(-1, keepdim=True)
        if coarse_BVKD is not None:
            coarse, coarse_seen_BCV = _logits(
                q_BCHD, coarse_BVKD, first_coarse_BC, position_BC, COARSER * size, COARSER * stride, scale
            )
            coarse_lse = coarse.masked_fill(~coarse_seen_BCV[:, None, None], float("-inf")).logsumexp(-1, keepdim=True)
            # a document's first queries see no coarse window
            lse = torch.where(coarse_lse == float("-inf"), lse, coarse_lse)
        score_BKGCW = (logits_BKGCW - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    score = score_BKGCW.flatten(1, 2) if scope == "head" else score_BKGCW.sum(2)
    return score.float().masked_fill(~seen_BCW[:, None], float("-inf"))


def _logits(
    q_BCHD: Tensor, means_BWKD: Tensor, first_BC: Tensor, position_BC: Tensor, size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """([B, K, G, C, W] in fp32 or wider; which windows end at or before each query in its document, bool [B, C, W])."""
    batch, queries, heads, dim = q_BCHD.shape
    kv_heads = means_BWKD.shape[2]
    wide = torch.promote_types(q_BCHD.dtype, torch.float32)
    q = q_BCHD.to(wide).reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("bckgd,bwkd->bkgcw", q, means_BWKD.to(wide)) * scale
    number_BCW = torch.arange(means_BWKD.shape[1], device=q.device) - first_BC[..., None]
    return logits, (number_BCW >= 0) & (number_BCW * stride + size <= position_BC[..., None] + 1)


def _listed(
    number: Tensor, value: Tensor, lead_BC: Tensor, late_BC: Tensor, own_BC: Tensor, places: int
) -> tuple[Tensor, Tensor]:
    """What is read, ascending, right-padded with -1: the blocks before `lead`, the chosen ones, `late` to the own. (int32, fp32) [B, R, C, M]."""
    missing = max(0, places - number.shape[-1])
    number, value = pad(number, (0, missing), value=_NONE), pad(value, (0, missing), value=float("-inf"))
    number, order = torch.where(value == float("-inf"), _NONE, number).sort(-1)
    value, found = value.gather(-1, order), (number < _NONE).sum(-1, keepdim=True)
    place = torch.arange(places, device=number.device).expand(*number.shape[:3], places)
    lead, late, own = (x[:, None, :, None] for x in (lead_BC, late_BC, own_BC))
    chosen = (place >= lead) & (place < lead + found)
    at = (place - lead).clamp(0, number.shape[-1] - 1)
    last = place - lead - found + late
    index = torch.where(place < lead, place, torch.where(chosen, number.gather(-1, at), torch.where(last <= own, last, -1)))
    score = torch.where(chosen, value.gather(-1, at), torch.where(index >= 0, float("inf"), float("-inf")))
    return index.to(torch.int32), score.float()
