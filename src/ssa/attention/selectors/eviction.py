"""NOSA's selection (arXiv 2510.13602): few blocks by query, the others by a learned importance of their keys, which no query changes. So the
choice of neighbouring queries has most blocks in common, and what is not chosen can lie in slower memory.

The importance of a key is part of its logits as well; that is how it is trained.

Legend: B batch, T tokens, Q some of the queries, S keys, H query heads, K kv heads, D head size, N row blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ssa.attention.inputs import AttentionCall, AttentionInputs
from ssa.attention.selectors.selector import HeadShape
from ssa.attention.selectors.windows import WindowsSelector
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops.documents import BlockGrid, query_positions
from ssa.ops.windows import block_scores, grid_window_means, key_importance, window_means

LOSS_ELEMENTS = 1 << 26
"""Queries times keys that the loss looks at at once."""


class EvictionSelector(WindowsSelector):
    """bias = A * softplus(v delta^T), v the values of all kv heads of a token; a block's importance is the largest of its bias's window means.

    A [K] and delta.weight [K, K * D] are NOSA's names. They start at 1 and 0: the same bias for every key, which changes no attention, and a
    gradient for delta (A = 0, the authors' start, has none).
    """

    fused = True
    adds_bias = True
    weight_decay = False
    muon = False

    def __init__(
        self,
        shape: HeadShape,
        *,
        delta_bias: bool = False,
        eviction_loss_weight: float = 0.0,
        eviction_loss_every: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(shape, **options)
        if not 0 <= eviction_loss_weight < math.inf or eviction_loss_every < 1:
            raise UserError(
                f"eviction_loss_weight = {eviction_loss_weight} must be 0 or more and finite, eviction_loss_every = {eviction_loss_every} at least 1"
            )
        self.loss_weight, self.loss_every = eviction_loss_weight, eviction_loss_every
        self.A = nn.Parameter(torch.ones(shape.kv_heads, dtype=torch.float32))
        self.delta = nn.Linear(shape.kv_heads * shape.head_dim, shape.kv_heads, bias=delta_bias, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter, value in ((self.A, 1.0), (self.delta.weight, 0.0), (self.delta.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def key_bias(self, k: Tensor, v: Tensor) -> Tensor:
        if v.shape[2] != self.shape.kv_heads:
            raise UserError(
                "tensor parallelism shares out the heads whose values the selector eviction reads together: share the model by FSDP"
            )
        wide = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            weight = None if self.delta.bias is None else self.delta.bias.to(wide)
            scores = nn.functional.linear(v.to(wide).flatten(2), self.delta.weight.to(wide), weight)
            return self.A.to(wide) * softplus(scores)

    def flops(self, selection: Selection, position_ids: Tensor) -> float:
        return super().flops(selection, position_ids) + 6 * self.shape.kv_heads**2 * self.shape.head_dim

    def loss(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor:
        """KL(attention || importance) in nats, both as distributions over the blocks that a query may choose from: A and delta learn to rank
        blocks as the attention of later queries does. Nothing else of the model learns from it.

        Every `eviction_loss_every`-th query of a row is looked at, and the sum over those, and over kv heads, is divided by how many there are in
        as many tokens; a query with fewer than two blocks to choose from adds nothing. So the mean over parts of rows or over micro-batches is
        that of the whole. The attention is that of the dense stream where one is trained, without the bias, which would confirm itself; otherwise
        the scores of the blocks' windows, by which they are chosen.
        """
        q, k, v = (x.detach() for x in (inputs.q_BTHD, inputs.k_BSKD, inputs.v_BSKD))
        rule, keys, queries = self.rule(call.selection), k.shape[1], q.shape[1]
        size, stride, block = rule.mean_size, rule.mean_stride, rule.block_size
        bias = self.key_bias(k, v)
        position_BT = query_positions(q, k, call.positions_BT)
        # by their columns in the row, which parts of it do not change
        first = (self.loss_every // 2 - (keys - queries)) % self.loss_every
        column_Q = torch.arange(first, queries, self.loss_every, device=q.device)
        grid, first_BT = None, torch.zeros_like(position_BT)
        if call.positions_BT is not None:
            grid = BlockGrid.build(q, k, call.positions_BT, block, (size, stride))
            first_BT = grid.first_block_BT
        importance_BNK = key_importance(bias, grid, block, size, stride)
        with torch.autocast(q.device.type, enabled=False):
            means = None
            if not call.align:
                means = window_means(k, size, stride) if grid is None else grid_window_means(k, grid, size, stride)
            together = max(1, LOSS_ELEMENTS // (k.shape[0] * k.shape[2] * keys))
            total = 0.0 * importance_BNK.sum().nan_to_num(0.0, 0.0, 0.0)  # part of the graph where nothing is looked at
            for column_C in column_Q.split(together):
                cut = q[:, column_C], position_BT[:, column_C], first_BT[:, column_C]
                start_BC = column_C + keys - queries - cut[1]
                total = total + self._gap(*cut, start_BC, k, means, importance_BNK, rule)
        return total * (self.loss_every / (queries * k.shape[0] * k.shape[2]))

    def _gap(
        self, q_BQHD: Tensor, position_BQ: Tensor, first_BQ: Tensor, start_BQ: Tensor, k_BSKD: Tensor, means: Tensor | None,
        importance_BNK: Tensor, rule: Selection,
    ) -> Tensor:  # fmt: skip
        """Sum over these queries and kv heads; `means` None: against the attention itself."""
        blocks = importance_BNK.shape[1]
        with torch.no_grad():
            number_BQN = torch.arange(blocks, device=q_BQHD.device) - first_BQ[..., None]
            late_BQ = torch.where(position_BQ < rule.dense_length, 0, position_BQ // rule.block_size - rule.local_blocks)
            candidate_BQN = (number_BQN >= rule.sink_blocks) & (number_BQN < late_BQ[..., None])
            if means is None:
                target_BKQN = _attention_mass(q_BQHD, k_BSKD, start_BQ, position_BQ, first_BQ, rule.block_size, blocks)
            else:
                target_BKQN = block_scores(q_BQHD, means, first_BQ, position_BQ, rule)
            target_BKQN = target_BKQN.float().masked_fill(~candidate_BQN[:, None], 0.0)
            total_BKQ = target_BKQN.sum(-1)
            asked_BKQ = (candidate_BQN.sum(-1) > 1)[:, None] & (total_BKQ > 0)
            target_BKQN = target_BKQN / total_BKQ.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        logits_BKQN = importance_BNK.transpose(1, 2)[:, :, None].masked_fill(~candidate_BQN[:, None], -1e9)
        gap_BKQN = torch.xlogy(target_BKQN, target_BKQN) - target_BKQN * logits_BKQN.log_softmax(-1)
        return torch.where(asked_BKQ, gap_BKQN.sum(-1), 0.0).sum()


def _attention_mass(
    q_BQHD: Tensor, k_BSKD: Tensor, start_BQ: Tensor, position_BQ: Tensor, first_BQ: Tensor, block: int, blocks: int
) -> Tensor:
    """Attention of each query to each row block of its document, the mean over a group's heads, fp32 [B, K, Q, N]."""
    batch, queries, heads, dim = q_BQHD.shape
    keys, kv_heads = k_BSKD.shape[1:3]
    wide = torch.promote_types(q_BQHD.dtype, torch.float32)
    column_S = torch.arange(keys, device=q_BQHD.device)
    offset_BQS = column_S - start_BQ[..., None]
    read_BQS = (offset_BQS >= 0) & (offset_BQS <= position_BQ[..., None])
    row_block_BQS = torch.where(read_BQS, first_BQ[..., None] + offset_BQS.div(block, rounding_mode="floor"), blocks).clamp(
        max=blocks
    )
    mass = q_BQHD.new_zeros(batch, kv_heads, queries, blocks + 1, dtype=wide)
    q, k = q_BQHD.to(wide).unflatten(2, (kv_heads, -1)), k_BSKD.to(wide)
    for g in range(heads // kv_heads):
        logits_BKQS = torch.einsum("bqkd,bskd->bkqs", q[:, :, :, g], k) * dim**-0.5
        logits_BKQS = logits_BKQS.masked_fill(~read_BQS[:, None], float("-inf"))
        mass.scatter_add_(-1, row_block_BQS[:, None].expand_as(logits_BKQS), logits_BKQS.softmax(-1))
    return mass[..., :blocks] * (kv_heads / heads)
