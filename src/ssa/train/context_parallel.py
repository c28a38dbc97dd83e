"""Context parallelism: several ranks share each row, so that no rank holds a long row's activations alone.

With c ranks a row is cut into 2c chunks and rank r works on chunks r and 2c - 1 - r: under causal attention an early chunk is cheap and a
late one dear, and every such pair costs the same. Queries stay where they are. Keys and values, few heads in these models, are gathered
from all ranks in every layer, and each chunk attends as the last T queries of the S keys up to its end, which is what every method and
operation of this package takes. In the backward pass their gradients are summed back to the ranks that own them.

Everything else in the network acts on tokens one by one. What the model cannot know from its part of a row, the positions, is supplied
here: to RoPE and to the methods.

Legend: B batch, T queries of this rank, S keys of the row, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa.attention import AttentionCall, AttentionInputs, MethodOutput, Selector
from ssa.attention.method import with_selection_loss
from ssa.errors import UserError
from ssa.ops.documents import cu_seqlens_from_positions


class ContextParallel:
    """Makes an `SSAForCausalLM` work on parts of rows, while `sharing`; outside of it the model is what it was."""

    def __init__(self, model: Any, group: Any, rank: int, ranks: int) -> None:
        self.group, self.ranks = group, ranks
        self.chunks = (rank, 2 * ranks - 1 - rank)
        self.position_BT: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.plain = False
        for layer in model.model.layers:
            if isinstance(layer.self_attn.method, torch.nn.Module):
                raise UserError(
                    f"context_parallel does not share out rows for {type(layer.self_attn.method).__name__}, a method with weights of its own: "
                    "move these into a selector, or leave train.context_parallel at 1"
                )
            layer.self_attn.method = _Gathering(layer.self_attn.method, self)
        model.model.rotary_emb.register_forward_pre_hook(self._rope_positions)

    def part(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole rows: `input_ids`, `position_ids` and `targets`, int64 [B, T / c] each.

        `targets` are the labels moved to the position that predicts them, -100 where nothing is to be predicted: the last token of a
        chunk predicts the first of the next, which another rank holds.
        """
        labels, positions = rows["labels"], rows["position_ids"]
        targets = torch.where(positions[:, 1:] == 0, -100, labels[:, 1:])
        targets = torch.nn.functional.pad(targets, (0, 1), value=-100)
        return {
            "input_ids": self._own(rows["input_ids"]),
            "position_ids": self._own(positions),
            "targets": self._own(targets),
        }

    def documents(self, position_BT: Tensor) -> Tensor:
        """Where documents begin in this rank's two chunks, among queries and among keys: int32 [2, 2, n + 1].

        Waits for a GPU: a training loop calls it on the CPU, with the `position_ids` [B, T] of `part`. Both chunks have the same n, of
        few values, since every pair of sizes compiles anew.
        """
        chunk = position_BT.shape[1] // 2
        bounds = [
            cu_seqlens_from_positions(own, (number + 1) * chunk)
            for own, number in zip(position_BT.split(chunk, 1), self.chunks, strict=True)
        ]
        length = max(x.shape[1] for x in bounds)
        return torch.stack([torch.cat([x, x[:, -1:].expand(2, length - x.shape[1])], 1) for x in bounds])

    @contextlib.contextmanager
    def sharing(self, position_BT: Tensor, cu_seqlens: Tensor | None = None, plain: bool = False) -> Iterator[None]:
        """The model's inputs are parts of rows, of these positions; around the backward pass, too, which may compute layers again.

        `cu_seqlens`: what `documents` made of the positions, on their device; spares a GPU one wait.
        `plain`: every row is one document, for which attention has faster kernels.
        """
        if cu_seqlens is None and not plain and position_BT.is_cuda:
            cu_seqlens = self.documents(position_BT)  # once, not in every layer
        self.position_BT, self.cu_seqlens, self.plain = position_BT, cu_seqlens, plain
        try:
            yield
        finally:
            self.position_BT = self.cu_seqlens = None

    def gather(self, x_BTKD: Tensor) -> Tensor:
        """[B, T, K, D] of this rank -> [B, S, K, D] of the row, in its order. Differentiable."""
        gathered = _Gather.apply(x_BTKD, self.group, self.ranks)  # [c, B, 2, T / 2, K, D]
        ordered = [gathered[i, :, 0] for i in range(self.ranks)] + [gathered[i, :, 1] for i in reversed(range(self.ranks))]
        return torch.cat(ordered, 1)

    def _own(self, x_BS: Tensor) -> Tensor:
        pieces = x_BS.chunk(2 * self.ranks, 1)
        return torch.cat([pieces[i] for i in self.chunks], 1)

    def _rope_positions(self, module: torch.nn.Module, arguments: tuple) -> tuple | None:
        return None if self.position_BT is None else (arguments[0], self.position_BT, *arguments[2:])


class _Gathering:
    """A method whose queries are a part of the row; see `ssa.attention.AttentionMethod.__call__`."""

    def __init__(self, method: Any, context: ContextParallel) -> None:
        self.method, self.context = method, context

    def __call__(self, selector: Selector, inputs: AttentionInputs, call: AttentionCall) -> MethodOutput:
        context = self.context
        if context.position_BT is None:
            return self.method(selector, inputs, call)
        q, gates, bias, size = inputs.q_BTHD, inputs.gates_BTHG, inputs.bias_BSK, inputs.k_BSKD.shape[-1]
        k, v = context.gather(torch.cat([inputs.k_BSKD, inputs.v_BSKD], -1)).split([size, size], -1)
        bias = None if bias is None else context.gather(bias[..., None]).squeeze(-1)
        chunk = q.shape[1] // 2
        parts = []
        for i, number in enumerate(context.chunks):
            own, end = slice(i * chunk, (i + 1) * chunk), (number + 1) * chunk
            positions_BT = None if context.plain else context.position_BT[:, own]
            cu_seqlens = None if context.plain or context.cu_seqlens is None else context.cu_seqlens[i]
            part = dataclasses.replace(call, positions_BT=positions_BT, cu_seqlens=cu_seqlens)
            cut = AttentionInputs(
                q[:, own],
                k[:, :end],
                v[:, :end],
                None if gates is None else gates[:, own],
                None if bias is None else bias[:, :end],
            )
            parts.append(with_selection_loss(self.method(selector, cut, part), selector, cut, part))
        first, second = parts
        indices = None
        if first.block_indices is not None and second.block_indices is not None:  # more keys may hold more blocks
            missing = second.block_indices.shape[3] - first.block_indices.shape[3]
            padded = torch.nn.functional.pad(first.block_indices, (0, missing), value=-1)
            indices = torch.cat([padded, second.block_indices], 2)
        return MethodOutput(
            torch.cat([first.out_BTHD, second.out_BTHD], 1),
            torch.cat([first.ungated_BTHD, second.ungated_BTHD], 1),
            indices,
            _mean(first.alignment, second.alignment),
            _mean(first.selection_loss, second.selection_loss),
        )


def _mean(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of a loss of two chunks of equally many tokens."""
    return None if first is None or second is None else (first + second) / 2


class _Gather(torch.autograd.Function):
    """[B, T, K, D] of each rank -> [c, B, 2, T / 2, K, D] on all of them; backward sums what all ranks' queries ask of each key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int) -> Tensor:  # type: ignore[override]
        ctx.group = group
        batch, tokens, *rest = x.shape
        gathered = x.new_empty(ranks * batch, 2, tokens // 2, *rest)
        dist.all_gather_into_tensor(gathered, x.contiguous().view(batch, 2, tokens // 2, *rest), group=group)
        return gathered.view(ranks, batch, 2, tokens // 2, *rest)

    @staticmethod
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ranks, batch, two, half, *rest = d_gathered.shape
        d_x = d_gathered.new_empty(batch, two * half, *rest)
        dist.reduce_scatter_tensor(
            d_x, d_gathered.contiguous().view(ranks * batch, two * half, *rest), dist.ReduceOp.SUM, group=ctx.group
        )
        return d_x, None, None
