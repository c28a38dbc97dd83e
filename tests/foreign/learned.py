"""A selector with weights, a bias and a state: blocks by the best learned score among their keys, which is part of the logits, too."""

import torch
from torch import nn

from ssa.attention import Selector
from ssa.attention.state import SelectorState, taken
from ssa.methods import SelectorKind, register_selector
from ssa.ops.documents import query_positions


class Learned(Selector):
    adds_bias, weight_decay, muon = True, False, False

    def __init__(self, shape):
        super().__init__(shape)
        self.score = nn.Linear(shape.head_dim, 1, bias=False)
        nn.init.normal_(self.score.weight)

    def key_bias(self, k, v):
        return self.score(k + v).squeeze(-1).float()  # [B, T, K]

    def select(self, inputs, call):
        size, keys = call.selection.block_size, inputs.k_BSKD.shape[1]
        position = query_positions(inputs.q_BTHD, inputs.k_BSKD, call.positions_BT)  # [B, T]
        own, blocks = position // size, -(-keys // size)
        if inputs.cached is not None:
            best = inputs.cached.state(("learned", size), lambda: BlockBest(size)).best_BKN[..., :blocks][:, :, None]
        else:
            start = torch.arange(keys - position.shape[1], keys) - position
            columns = start[:, :, None] + torch.arange(blocks * size)  # [B, T, N * s]
            rows = torch.arange(len(position))[:, None, None]
            best = inputs.bias_BSK.detach()[rows, columns.clamp(0, keys - 1)].unflatten(2, (blocks, size)).amax(3).movedim(3, 1)
        block = torch.arange(blocks)
        score = best.masked_fill(block >= own[:, None, :, None], -float("inf"))  # complete blocks: those before the own one
        score = torch.where(block == own[:, None, :, None], float("inf"), score)
        top = score.topk(min(call.selection.num_selected_blocks, blocks), -1)
        chosen = torch.where(top.values == -float("inf"), blocks, top.indices).sort(-1).values
        return torch.where(chosen == blocks, -1, chosen).int().contiguous()

    def flops(self, selection, position_ids):
        return 2.0 * self.shape.kv_heads * self.shape.head_dim


class BlockBest(SelectorState):
    def __init__(self, size):
        super().__init__()
        self.size, self.best_BKN = size, None

    def extend(self, buffers, length, end, start_B):
        rows = []  # plainly anew; fast ones extend
        for bias, start in zip(buffers[2][:, :, :length, 0], start_B.tolist(), strict=True):
            padded = nn.functional.pad(
                bias[:, start:], (0, -(length - start) % self.size + self.size * -(-start // self.size)), value=-1e30
            )
            rows.append(padded.unflatten(1, (-1, self.size)).amax(2)[:, : -(-length // self.size)])
        self.best_BKN = torch.stack(rows)

    def crop(self, length):
        self.best_BKN = None

    def take(self, rows):
        self.best_BKN = taken(self.best_BKN, rows, self.best_BKN.shape[2], 2)


def register():
    register_selector(SelectorKind("learned", "learned", f"{__name__}:Learned"))
