"""Time and memory of every measure that `ssa analyze` takes, on random activations of one layer, in one run on one device.

    python benchmarks/analysis.py --tokens 8192,32768,131072 --model --out benchmarks/results/h200/analysis.json
    python benchmarks/analysis.py --tokens 512,1024 --heads 4 --kv-heads 1 --vocabulary 300 --out /tmp/analysis.json     # any CPU

The defaults are a layer of the 1B model at 16x16. Nothing is timed before the same code, in the same precision on the same device, has
agreed with the dense computation in fp64 on a short input. Seconds are medians; memory is the device's peak above what was allocated
before (null on a CPU), and the largest single tensor. `estimate_seconds` is what the arithmetic and the memory traffic of the dense
pass would take at the rates given by --tflops and --terabytes. `layers_and_modes` times `layer` is an analysis of one row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.analysis.attention_stats import SparsityMeter
from ssa.analysis.dense_pass import dense_pass, tile_elements, tile_shape
from ssa.analysis.divergence import token_divergence
from ssa.analysis.measure import measure_model
from ssa.analysis.selection import distance_histogram, selection_overlap
from ssa.analysis.sparsity import attention_figures
from ssa.attention import AttentionRecord
from ssa.budget import Budget, Selection
from ssa.files import write_atomically
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.ops import block_sparse_attention, select_blocks
from ssa.testing import LargestTensor, attention_oracle, readable_keys

TOLERANCE = 1e-4  # of a weight or an entropy in nats, in fp32 arithmetic against fp64
BYTES_PER_WEIGHT = 48  # of the dense pass in fp32: two products, mask, maximum, shift, exponential, block sums, entropy


def draw(tokens: int, shape: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [torch.randn(1, tokens, h, shape.head_size, device=device).to(dtype) for h in heads]


def check(shape: argparse.Namespace, budget: Budget, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences from dense attention in fp64 on the CPU, same inputs and selection; ends the program if too large."""
    q, k, v = draw(2 * budget.tokens + 37, shape, device, dtype)
    index, _ = select_blocks(q, k, Selection(budget.num_selected_blocks, budget.block_size))
    figures = attention_figures(q, k, v, index, block_size=budget.block_size, tile=1 << 16)
    q, k, v, index = (x.cpu().double() if x.is_floating_point() else x.cpu() for x in (q, k, v, index))
    full, _, weights = attention_oracle(q, k, v)
    sparse, _, _ = attention_oracle(q, k, v, index, block_size=budget.block_size)
    chosen = readable_keys(q, k, None, index, budget.block_size).repeat_interleave(q.shape[2] // index.shape[1], 1)
    gold = {
        "kept": (weights * chosen).sum(-1).transpose(1, 2), "entropy": torch.special.entr(weights).sum(-1).transpose(1, 2),
        "sink_first": weights[..., 0].transpose(1, 2), "error": (full - sparse).norm(dim=-1),
    }  # fmt: skip
    errors = {name: (getattr(figures, name).cpu().double() - exact).abs().max().item() for name, exact in gold.items()}
    if not max(errors.values()) < TOLERANCE or bool(figures.violated.any()):
        sys.exit(f"analysis differs from the dense computation: {errors}, {int(figures.violated.sum())} violations")
    return errors


def measure(function: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float | None]:
    cuda = device.type == "cuda"
    with LargestTensor() as seen:
        function()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if cuda else None
    return {"seconds": statistics.median(seconds), "peak_mib": peak, "largest_tensor_elements": seen.elements}


def layer_measures(
    tokens: int, shape: argparse.Namespace, budget: Budget, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What one layer costs under one mode of inference, part by part and whole, and the divergence of one row."""
    q, k, v = draw(tokens, shape, device, dtype)
    wide = [x.float() for x in (q, k, v)]
    size = budget.block_size
    positions = torch.arange(tokens, device=device)[None]
    index, _ = select_blocks(q, k, Selection(budget.num_selected_blocks, size))
    sparse, _ = block_sparse_attention(*wide, index, block_size=size)
    hidden = [torch.randn(1, tokens, shape.hidden, device=device).to(dtype) for _ in range(2)]
    head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device, dtype=dtype)
    ids = torch.randint(shape.vocabulary, (1, tokens), device=device)
    record = AttentionRecord(q, k, v, None, None, None, "full", budget, q)
    parts: dict[str, Callable[[], Any]] = {
        "select": lambda: select_blocks(q, k, Selection(budget.num_selected_blocks, size)),
        "sparse_output": lambda: block_sparse_attention(*wide, index, block_size=size),
        "dense_pass": lambda: dense_pass(
            *(x[0] for x in wide), sparse[0], index[0], block_size=size, scale=shape.head_size**-0.5
        ),
        "distances": lambda: distance_histogram(index, positions, size),
        "overlap": lambda: selection_overlap(index, positions, budget.tokens),
        "layer": lambda: SparsityMeter()(0, record),
        "divergence": lambda: token_divergence(*hidden, head, ids, positions),
    }
    weights = shape.heads * tokens * tokens / 2
    tile = tile_elements(device)
    return {
        "tokens": tokens,
        "tile": tile,
        "tile_shape": tile_shape(tile, shape.heads, tokens, tokens, size),
        "measures": {name: measure(part, device, shape.repeats) for name, part in parts.items()},
        "estimate_seconds": {
            "dense_pass_arithmetic": weights * 4 * shape.head_size / (shape.tflops * 1e12),
            "dense_pass_memory": weights * BYTES_PER_WEIGHT / (shape.terabytes * 1e12),
        },
    }


def model_measure(
    tokens: int, shape: argparse.Namespace, budget: Budget, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One row through a random model of the given shape: both modes, every layer, every measure, 64 decode steps."""
    config = SSAConfig(
        method="ssa", hidden_size=shape.hidden, intermediate_size=4 * shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
        vocab_size=shape.vocabulary, block_size=budget.block_size, num_selected_blocks=budget.num_selected_blocks,
        max_position_embeddings=max(131072, tokens),
    )  # fmt: skip
    with torch.device(device):
        model = SSAForCausalLM(config).to(dtype).eval()
    ids, positions = torch.randint(shape.vocabulary, (1, tokens)), torch.arange(tokens)[None]
    return measure(lambda: measure_model(model, ids, positions, budget, decode_steps=64), device, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="4096,8192,32768", help="comma-separated lengths of the one document")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--budget", default="16x16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", action="store_true", help="also a whole random model at every length")
    parser.add_argument("--tflops", type=float, default=50.0, help="fp32 rate for the estimate")
    parser.add_argument("--terabytes", type=float, default=4.0, help="memory rate for the estimate, TB/s")
    parser.add_argument("--out", type=Path, required=True)
    shape = parser.parse_args()
    device, dtype, budget = torch.device(shape.device), getattr(torch, shape.dtype), Budget.parse(shape.budget)
    result: dict[str, Any] = {
        "benchmark": "analysis",
        "command": " ".join(["python", "benchmarks/analysis.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": {name: getattr(shape, name) for name in ("heads", "kv_heads", "head_size", "hidden", "layers", "vocabulary", "budget")},
        "dtype": shape.dtype,
        "layers_and_modes": 2 * shape.layers,
        "errors": check(shape, budget, device, dtype),
        "rows": [],
    }  # fmt: skip
    for tokens in (int(n) for n in shape.tokens.split(",")):
        row = layer_measures(tokens, shape, budget, device, dtype)
        if shape.model:
            row["model"] = model_measure(tokens, shape, budget, device, dtype)
        result["rows"].append(row)
        print(json.dumps({"tokens": tokens} | {name: round(x["seconds"], 4) for name, x in row["measures"].items()}), flush=True)
        write_atomically(shape.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
