"""What the kernels are measured against: dense attention of PyTorch, fla-core's attention over given blocks, and FlashMoBA's MoBA."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ssa.bench.shapes import Shape
from ssa.errors import UserError

Forward = Callable[[], Tensor]

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DENSE = (*BACKENDS, "flex")
OPTIONAL = {
    "fla": ("fla", 'fla-core: pip install "sparse-sparse-attention[bench]"'),
    "flash-moba": ("flash_moba", "mit-han-lab/flash-moba from GitHub, built for this GPU and PyTorch"),
}
"""Peer: its module, and what to install."""
PEERS = (*DENSE, *OPTIONAL)
BASELINE = "cudnn"
"""The fastest dense attention of PyTorch on Hopper; ratios are against it."""
FLEX_TOKENS = 32768
"""FlexAttention, compiled anew for each length and slower than cuDNN throughout, is left out above this length unless asked for by name."""


def chosen_peers(text: str) -> tuple[str, ...]:
    """ "auto" = all that are installed; otherwise a comma-separated list, to which the baseline is always added.

    Raises:
        UserError: an unknown name, or a peer that is not installed.
    """
    missing = [name for name, (module, _) in OPTIONAL.items() if importlib.util.find_spec(module) is None]
    if text == "auto":
        return tuple(name for name in PEERS if name not in missing)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise UserError(f"--peers {name!r} is not one of {', '.join(PEERS)}")
        if name in missing:
            raise UserError(f"--peers {name} needs {OPTIONAL[name][1]}")
    return tuple(name for name in PEERS if name in names or name == BASELINE)


@contextlib.contextmanager
def dense_forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Forward]:
    """Causal grouped-query attention over heads-first tensors [B, H, T, D], [B, K, T, D] by the backend `name`, while the context lasts."""
    if name == "flex":
        yield _flex_forward(q, k, v)
        return
    with sdpa_kernel(BACKENDS[name]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a backend refuses is in its error, too
        yield lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flex_forward(q: Tensor, k: Tensor, v: Tensor) -> Forward:
    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    tokens = q.shape[2]
    mask = create_block_mask(causal, None, None, tokens, tokens, device=str(q.device))
    torch._dynamo.reset()  # else the lengths together exceed the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    # a plain Tensor without auxiliary outputs
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]


def fla_refuses(shape: Shape) -> str | None:
    """Why fla-core has no kernel for a shape; None where it has one."""
    if shape.scope == "head":
        return "fla-core's query heads of a kv head choose together"
    group = shape.heads // shape.kv_heads
    if group < 16 or group & (group - 1):
        return f"fla-core needs a power of two of at least 16 query heads a kv head, not {group}"
    return None


def fla_forward(shape: Shape, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Forward:
    """Attention of fla-core's `parallel_nsa` over `block_indices` [B, K, T, M], without the two poolings that it computes for its other
    branches and then drops."""
    from fla.ops.nsa.parallel import ParallelNSAFunction

    index = block_indices.transpose(1, 2).long().contiguous()
    budget, scale = shape.budget, shape.head_dim**-0.5

    def forward() -> Tensor:
        return ParallelNSAFunction.apply(q, k, v, index, budget.num_selected_blocks, budget.block_size, scale, None)

    return forward


def naive_nsa() -> Any:
    """fla-core's plain PyTorch attention over given blocks, an oracle that shares no line with ours."""
    from fla.ops.nsa.naive import naive_nsa_selection

    return naive_nsa_selection


def flash_moba_forward(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Forward:
    """MoBA by FlashMoBA, its own selection included, in which every query head chooses for itself by logits."""
    from flash_moba.flash_moba_interface import flash_moba_varlen_func

    tokens, budget = q.shape[1], shape.budget
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)

    def forward() -> Tensor:
        out: Tensor = flash_moba_varlen_func(
            q[0], k[0], v[0], ends, ends, tokens, tokens, budget.block_size, budget.num_selected_blocks, causal=True
        )
        return out[None]

    return forward
