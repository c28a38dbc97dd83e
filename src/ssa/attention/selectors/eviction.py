"""NOSA's selection (arXiv 2510.13602): few blocks by query, the others by a learned importance of their keys, which no query changes. So the
choice of neighbouring queries has most blocks in common, and what is not chosen can lie in slower memory.

The importance of a key is part of its logits as well; that is how it is trained.

Legend: B batch, T tokens, K kv heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ssa.attention.selectors.selector import HeadShape
from ssa.attention.selectors.windows import WindowsSelector
from ssa.errors import UserError


class EvictionSelector(WindowsSelector):
    """bias = A * softplus(v delta^T), v the values of all kv heads of a token; a block's importance is the largest of its bias's window means.

    A [K] and delta.weight [K, K * D] are NOSA's names. They start at 1 and 0: the same bias for every key, which changes no attention, and a
    gradient for delta (A = 0, the authors' start, has none).
    """

    fused = True
    adds_bias = True
    weight_decay = False
    muon = False

    def __init__(self, shape: HeadShape, *, delta_bias: bool = False, **options: Any) -> None:
        super().__init__(shape, **options)
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
