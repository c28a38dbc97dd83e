"""SSA's two-way alignment of the full and the sparse stream (section 4 of the method's specification, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from ssa.attention.base import masked_mean


def alignment_losses(full_BTHD: Tensor, sparse_BTHD: Tensor, loss: str = "smooth_l1", padding_BT: Tensor | None = None) -> Tensor:
    """fp32 [2]: the sparsity loss d(full, stopgrad(sparse)) pulls full attention towards what sparse attention can express, the
    commitment loss d(sparse, stopgrad(full)) keeps sparse attention near full.

    d is SmoothL1 with beta 1 ("smooth_l1") or the squared difference ("l2"), each the mean over elements.
    """

    def distance(moving: Tensor, still: Tensor) -> Tensor:
        moving, still = moving.float(), still.detach().float()
        each = smooth_l1_loss(moving, still, reduction="none") if loss == "smooth_l1" else (moving - still).square()
        return masked_mean(each, padding_BT)

    return torch.stack([distance(full_BTHD, sparse_BTHD), distance(sparse_BTHD, full_BTHD)])
