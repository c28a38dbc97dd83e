"""What a training step has to compute, and what share of the device's peak that is (MFU).

Model FLOPs, forward and backward: what the mathematics asks for, whatever the kernels do. A multiplication with its addition is two. The
backward pass of a matrix product is two matrix products, so everything with a gradient counts three times its forward pass. Computing again
(activation checkpointing, kernels that recompute scores), norms, RoPE, softmax, gates, means of blocks and the optimizer count nothing.
Per token, with C hidden size, F feed-forward size, V vocabulary, L layers, H query heads, K kv heads, D head size, s block size, k blocks:

    matmul      3 * 2 * (L * (C * (2 * H + 2 * K) * D + C * H * gates + 3 * C * F) + C * V)
    dense       3 * 4 * L * H * D * keys          keys: those up to the query in its document
    sparse      3 * 4 * L * H * D * keys          keys: whole selected blocks and the query's own up to the query
    selection       what the selector says; means: 2 * L * H * D * blocks, those before the query's own, each scored by its mean key; no gradient
    compression 3 * 4 * L * H * D * blocks        NSA: complete blocks
    window      3 * 4 * L * H * D * keys          NSA: those of the sliding window

with means over the queries of the batch, whose positions say how long the documents are. The embedding is a look-up and counts nothing,
the output matrix counts whether it is tied to it or not. SSA computes dense, selection and sparse in every step, whichever stream goes on;
without an alignment loss it computes the stream that was drawn. NSA's block scores are counted once for the compression branch, whose
softmax the paper reuses, and once for the selection, which here computes them again.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ssa.model.configuration import SSAConfig, build_attention

PEAK_BF16 = {
    r"(NVIDIA )?A100[- ].*": 312e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM.*": 989e12,
    r"NVIDIA H200 NVL": 835e12,
    r"NVIDIA H200( SXM.*)?": 989e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA L40S": 362e12,
}
"""Dense bf16 FLOP/s by the device's name, from NVIDIA's data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a whole device; None for one that is not in `PEAK_BF16`, and for a part of one (MIG)."""
    if "MIG" in device_name:
        return None
    return next((peak for pattern, peak in PEAK_BF16.items() if re.fullmatch(pattern, device_name)), None)


def run_peak_flops(device: torch.device, dtype: torch.dtype, devices: int = 1) -> float | None:
    """Dense bf16 FLOP/s of so many devices like this one; None where it is not known, or the run does not compute in bfloat16."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else peak * devices


PARTS = ("matmul", "dense", "sparse", "selection", "compression", "window")
"""What FLOPs are spent on; a method's branches may add others."""


def training_flops(config: SSAConfig, position_ids: Tensor, stream: str | None = None) -> dict[str, float]:
    """Of one training step for each token of a batch, forward and backward, by what they are spent on, and their "total".

    Args:
        config: The model's.
        position_ids: int [B, T] on the CPU, restarting at 0 at each document; whole rows, not a rank's part of them.
        stream: SSA: the stream that goes on. It matters only without an alignment loss.
    """
    size, count, layers = config.block_size, config.num_selected_blocks, config.num_hidden_layers
    parts = dict.fromkeys(PARTS, 0.0) | {"matmul": 6.0 * matmul_weights(config)}
    width = config.num_attention_heads * config.head_dim
    with torch.device("meta"):
        method, selector = build_attention(config)
    streams = (
        {"full", "sparse"} if config.aligns else {stream or "sparse" if config.attends.draws_stream else config.attends.streams}
    )
    position = position_ids.double()
    if "full" in streams:
        parts["dense"] = 12 * layers * width * (position + 1).mean().item()
    if "sparse" in streams:
        keys = (position / size).floor().clamp(max=count - 1) * size + position % size + 1
        keys = torch.where(position < selector.rule(config.selection()).dense_length, position + 1, keys)
        parts["sparse"] = 12 * layers * width * keys.mean().item()
        parts["selection"] = layers * selector.flops(config.selection(), position_ids)
    for name, flops in method.branch_flops(config.selection(), position_ids, width).items():
        parts[name] = layers * flops
    return parts | {"total": sum(parts.values())}


def flops_record(config: SSAConfig, position_ids: Tensor) -> dict[str, Any]:
    """What a run records of its work: FLOPs a token by what they are spent on, and their "total".

    SSA without an alignment loss computes the stream that was drawn; the record then has those of each under "full" and "sparse".
    """
    records = {stream: training_flops(config, position_ids, stream) for stream in ("full", "sparse")}
    return records["full"] if records["full"] == records["sparse"] else records


def matmul_weights(config: SSAConfig) -> int:
    """Weights that every token is multiplied with: all matrices but the embedding, the output matrix among them."""
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    assert config.num_key_value_heads is not None  # the configuration fills it in
    attention = hidden * (2 * heads + 2 * config.num_key_value_heads) * size
    gates = config.attends.num_gates * hidden * heads if config.attention_gate else 0
    layer = attention + gates + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * layer + hidden * config.vocab_size
