"""How far the model's predictions move when it switches from full to sparse attention.

Legend: B batch, T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa.analysis.selection import BINS, bit_length

CPU_LOGITS = 1 << 22  # fp32 logits held at once, for each of the two modes
CUDA_LOGITS = 1 << 26  # 256 MiB keep a GPU busy


@dataclass(frozen=True)
class TokenDivergence:
    """Per position, [B, T]; positions with nothing to predict (the last of a document) have `target` False."""

    kl: Tensor
    """KL(full || sparse) of the next-token distribution, fp32, nats."""
    agree: Tensor
    """bool: both modes rank the same token first."""
    nll_full: Tensor
    """-log p(next token) under full attention, fp32, nats; 0 without a target."""
    nll_sparse: Tensor
    target: Tensor


@torch.no_grad()
def token_divergence(
    full_BTC: Tensor, sparse_BTC: Tensor, head: torch.nn.Module, input_ids: Tensor, positions: Tensor | None = None,
    rows: int | None = None,
) -> TokenDivergence:  # fmt: skip
    """Compare the last hidden states of the two modes through the output projection `head`, a few tokens at a time.

    Args:
        full_BTC, sparse_BTC: last hidden states under full and sparse attention.
        input_ids: int [B, T]. positions: int [B, T]; where one is 0 a document starts and the token before it predicts nothing.
        rows: tokens whose logits are held at once; chosen from the vocabulary by default.
    """
    batch, tokens = input_ids.shape
    target_BT = torch.zeros_like(input_ids, dtype=torch.bool)
    target_BT[:, :-1] = True if positions is None else positions[:, 1:] != 0
    next_BT = torch.roll(input_ids, -1, 1).reshape(-1, 1)
    full, sparse = full_BTC.flatten(0, 1), sparse_BTC.flatten(0, 1)
    vocabulary = head(full[:1]).shape[-1]
    rows = rows or max(1, (CUDA_LOGITS if full.is_cuda else CPU_LOGITS) // vocabulary)
    parts: list[list[Tensor]] = []
    for i in range(0, batch * tokens, rows):
        log_p, log_q = (head(x[i : i + rows]).float().log_softmax(-1) for x in (full, sparse))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding can leave -1e-8
        chosen = [-x.gather(-1, next_BT[i : i + rows]).squeeze(-1) for x in (log_p, log_q)]
        parts.append([kl, log_p.argmax(-1) == log_q.argmax(-1), *chosen])
    kl, agree, nll_full, nll_sparse = (torch.cat(column).view(batch, tokens) for column in zip(*parts, strict=True))
    return TokenDivergence(kl, agree, nll_full.where(target_BT, 0), nll_sparse.where(target_BT, 0), target_BT)


class DivergenceSums:
    """Means over rows: over all tokens, and over those beyond the receptive field."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, 4, dtype=torch.float64)
        self.counts = torch.zeros(2, 2, dtype=torch.int64)  # tokens, targets
        self.in_bin = torch.zeros(BINS, dtype=torch.int64)
        self.kl_in_bin = torch.zeros(BINS, dtype=torch.float64)

    def add(self, each: TokenDivergence, position_BT: Tensor, receptive_field: int) -> None:
        """`position_BT`: document positions; `receptive_field`: k * s."""
        beyond_BT = position_BT >= receptive_field
        bin_BT = bit_length(position_BT)
        for b in bin_BT.unique().tolist():
            inside = bin_BT == b
            self.in_bin[b] += int(inside.sum())
            self.kl_in_bin[b] += each.kl[inside].double().sum().cpu()
        for i, inside in enumerate((torch.ones_like(beyond_BT), beyond_BT)):
            columns = (each.kl, each.agree, each.nll_full, each.nll_sparse)
            self.sums[i] += torch.stack([x[inside].double().sum() for x in columns]).cpu()
            self.counts[i] += torch.stack([inside.sum(), (inside & each.target).sum()]).cpu()

    def join(self, other: DivergenceSums) -> None:
        """Add the sums over other rows."""
        for name in ("sums", "counts", "in_bin", "kl_in_bin"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def by_position(self) -> dict[str, list[float]]:
        """first_position, tokens, kl_nats of the tokens at document positions 0, 1, 2-3, 4-7, ..., where there are any."""
        bins = self.in_bin.nonzero().squeeze(-1).tolist()
        return {
            "first_position": [0 if b == 0 else 2 ** (b - 1) for b in bins], "tokens": self.in_bin[bins].tolist(),
            "kl_nats": (self.kl_in_bin[bins] / self.in_bin[bins]).tolist(),
        }  # fmt: skip

    def means(self, beyond: bool) -> dict[str, float | int] | None:
        """tokens, kl_nats, top1_agreement, cross_entropy_full, cross_entropy_sparse, gap_nats; None where there are none."""
        tokens, targets = self.counts[int(beyond)].tolist()
        if not tokens or not targets:
            return None
        kl, agree, full, sparse = self.sums[int(beyond)].tolist()
        return {
            "tokens": tokens, "kl_nats": kl / tokens, "top1_agreement": agree / tokens, "cross_entropy_full": full / targets,
            "cross_entropy_sparse": sparse / targets, "gap_nats": (sparse - full) / targets,
        }  # fmt: skip
