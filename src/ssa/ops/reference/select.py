"""Block selection in plain PyTorch. Scores exist for a chunk of queries at a time, so memory never grows with T * N.

Legend: B batch, T queries (C of a chunk), H query heads, K kv heads, G = H / K, R = K or H (who selects), D head size,
N row blocks, M selected blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCORE_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in fp32
_NONE = 0x7FFFFFFF


def select_blocks(*args: Any) -> tuple[Tensor, Tensor]:
    """See `ssa.ops.select_blocks`; `positions_BT` and `first_block_BT` None = plain rows. One node of compiled and exported graphs, which
    would have to fix the number of chunks."""
    return select_blocks_op(*args) if torch.compiler.is_compiling() else _select_blocks(*args)


def _select_blocks(
    q_BTHD: Tensor, block_keys_BNKD: Tensor, first_block_BT: Tensor | None, positions_BT: Tensor | None, num_keys: int,
    block_size: int, num_selected: int, scope: str, scoring: str, rule: str, scale: float, row_blocks_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`row_blocks_B`: the most blocks of each row, at most `num_selected`; by rule "exact"."""
    batch, queries, heads, _ = q_BTHD.shape
    blocks = block_keys_BNKD.shape[1]
    if positions_BT is None:
        positions_BT = torch.arange(num_keys - queries, num_keys, device=q_BTHD.device).expand(batch, queries)
    if first_block_BT is None:
        first_block_BT = torch.zeros_like(positions_BT)
    chunk = max(1, SCORE_ELEMENTS // max(1, batch * heads * (blocks + 1)))
    indices, scores = _empty(q_BTHD, block_keys_BNKD, num_selected, scope)
    for t in range(0, queries, chunk):
        cut = slice(t, t + chunk)
        score_BRCN, block_BCN = block_scores(
            q_BTHD[:, cut], block_keys_BNKD, first_block_BT[:, cut], positions_BT[:, cut], block_size, scope, scoring, scale
        )
        own_BC = positions_BT[:, cut] // block_size
        indices[:, :, cut], scores[:, :, cut] = _top(
            score_BRCN, block_BCN[:, None], own_BC[:, None], num_selected, block_size, rule, row_blocks_B
        )
    return indices, scores


def _empty(q_BTHD: Tensor, block_keys_BNKD: Tensor, num_selected: int, scope: str) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BTHD.shape
    selectors = heads if scope == "head" else block_keys_BNKD.shape[2]
    indices = torch.empty(batch, selectors, queries, num_selected, dtype=torch.int32, device=q_BTHD.device)
    return indices, torch.empty_like(indices, dtype=torch.float32)


select_blocks_op = torch.library.custom_op("ssa::select_blocks_reference", _select_blocks, mutates_args=())


@select_blocks_op.register_fake
def _(q, block_keys, first_block, positions, num_keys, block_size, num_selected, scope, scoring, rule, scale, row_blocks=None):
    return _empty(q, block_keys, num_selected, scope)


def block_scores(
    q_BCHD: Tensor, block_keys_BNKD: Tensor, first_block_BC: Tensor, positions_BC: Tensor,
    block_size: int, scope: str, scoring: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score of every candidate block, fp32 [B, R, C, N], -inf where a row block is no candidate; and each row block's number
    within the query's document, int64 [B, C, N]."""
    batch, queries, heads, size = q_BCHD.shape
    blocks, kv_heads = block_keys_BNKD.shape[1:3]
    wide = torch.promote_types(q_BCHD.dtype, torch.float32)
    q = q_BCHD.to(wide).reshape(batch, queries, kv_heads, heads // kv_heads, size)
    logits_BKGCN = torch.einsum("bckgd,bnkd->bkgcn", q, block_keys_BNKD.to(wide)) * scale
    block_BCN = torch.arange(blocks, device=q.device) - first_block_BC[..., None]
    in_document = block_BCN >= 0
    candidate = in_document & (block_BCN < positions_BC[..., None] // block_size)
    if scoring == "softmax":
        complete = (in_document & (block_BCN < (positions_BC[..., None] + 1) // block_size))[:, None, None]
        # A query that sees no complete block has no candidates either: its NaN row is masked below.
        score_BKGCN = logits_BKGCN.masked_fill(~complete, float("-inf")).softmax(-1)
    else:
        score_BKGCN = logits_BKGCN
    score_BRCN = score_BKGCN.flatten(1, 2) if scope == "head" else score_BKGCN.sum(2)
    return score_BRCN.masked_fill(~candidate[:, None], float("-inf")).float(), block_BCN


def _top(
    score: Tensor, block: Tensor, own: Tensor, num_selected: int, block_size: int, rule: str, row_blocks_B: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Top blocks of `score` [B, R, C, N] plus the own block [B, 1, C], ascending: (int32, fp32) [B, R, C, M]."""
    own = own.expand(score.shape[:-1])
    if rule == "exact" or num_selected <= block_size // 2 or num_selected == 1:
        index, value = best(score, block, num_selected - 1)
        if row_blocks_B is not None:
            value = first_of_rows(value, row_blocks_B - 1)
    else:
        # The released kernel merges sorted chunks of `block_size` blocks and keeps only the best half of each side at the last
        # merge; in the first chunk there is nothing to merge with, and all blocks fit.
        half = num_selected // 2
        chunk_start = (own // block_size * block_size)[..., None]
        last = block >= chunk_start
        index, value = best(score.masked_fill(last, float("-inf")), block, half)
        tail_index, tail_value = best(score.masked_fill(~last, float("-inf")), block, num_selected - 1)
        tail_value[..., half - 1 :].masked_fill_(chunk_start > 0, float("-inf"))
        index, value = torch.cat([index, tail_index], -1), torch.cat([value, tail_value], -1)
    index = torch.cat([index, own[..., None]], -1)
    value = torch.cat([value, torch.full_like(own, float("inf"), dtype=value.dtype)[..., None]], -1)
    index = torch.where(value == float("-inf"), _NONE, index)
    index, order = index.sort(-1)
    index, value = index[..., :num_selected], value.gather(-1, order)[..., :num_selected]
    missing = num_selected - index.shape[-1]  # fewer blocks in the row than the budget allows
    index = torch.nn.functional.pad(index, (0, missing), value=_NONE)
    value = torch.nn.functional.pad(value, (0, missing), value=float("-inf"))
    return torch.where(index == _NONE, -1, index).to(torch.int32), value


def best(score: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best (block, score), best first; equal scores go to the lower block, which torch.topk alone does not promise."""
    count = min(count, score.shape[-1])
    bits = (score + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    key = (ordered << 32) | (_NONE - torch.arange(score.shape[-1], device=score.device))
    column = _NONE - (key.topk(count, -1).values & 0x7FFFFFFF)
    return block.expand(score.shape).gather(-1, column), score.gather(-1, column)


def first_of_rows(value_BRCX: Tensor, count_B: Tensor) -> Tensor:
    """Row b's first `count_B[b]` values; -inf, which chooses nothing, beyond."""
    place = torch.arange(value_BRCX.shape[-1], device=value_BRCX.device)
    return value_BRCX.masked_fill(place >= count_B[:, None, None, None], float("-inf"))
