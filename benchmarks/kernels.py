"""Speed of selection and block-sparse attention beside PyTorch's dense attention, in one run on one GPU.

    python benchmarks/kernels.py --out benchmarks/results/h200/kernels.json

A speed is reported only where the result agrees with the reference: selected scores, outputs and gradients are checked first, on
shapes small enough for it. Times are medians in milliseconds; `sparse` includes block means and selection.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ssa.ops import block_means, block_sparse_attention, select_blocks
from ssa.testing import rms_ratio

SHAPES = {  # name: query heads, kv heads, head size, k, block size
    "16x16": (32, 2, 64, 16, 16),
    "32x32": (32, 2, 64, 32, 32),
    "16x64 head 128": (32, 8, 128, 16, 64),
}


def median(function: Any, warmup: int = 25, rep: int = 100) -> float:
    return triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")


def draw(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(1, tokens, h, size, device="cuda", dtype=dtype, requires_grad=True) for h in shapes]


def check(heads: int, kv_heads: int, size: int, k: int, block: int) -> dict[str, float]:
    """Errors in bf16 against the reference in fp64 on the same inputs; raises where they are too large."""
    tokens = 3 * k * block // 2 + 37
    q, key, v = draw(tokens, heads, kv_heads, size, torch.bfloat16)
    index, score = select_blocks(q, key, block_size=block, num_selected_blocks=k, impl="triton")
    other, other_score = select_blocks(q, key, block_size=block, num_selected_blocks=k, impl="reference")
    same = (index == other).all(-1).double().mean().item()
    finite = torch.isfinite(other_score)
    worst = (score - other_score)[finite].abs().max().item()
    exact = [x.detach().double().requires_grad_() for x in (q, key, v)]
    weight = torch.randn(q.shape, device="cuda", dtype=torch.bfloat16)
    out, _ = block_sparse_attention(q, key, v, index, block_size=block, impl="triton")
    gold, _ = block_sparse_attention(*exact, index, block_size=block, impl="reference")
    grads = torch.autograd.grad((out * weight).sum(), (q, key, v), retain_graph=True)
    again = torch.autograd.grad((out * weight).sum(), (q, key, v))
    gold_grads = torch.autograd.grad((gold * weight.double()).sum(), exact)
    errors = {"out": rms_ratio(out, gold)}
    errors |= {f"d{n}": rms_ratio(a, b) for n, a, b in zip("qkv", grads, gold_grads, strict=True)}
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "gradients are not reproducible"
    assert same > 0.999 and worst < 1e-3, f"selection differs: {same:.4%} rows equal, scores off by {worst}"
    assert all(e < 5e-3 for e in errors.values()), f"errors too large: {errors}"
    return {"rows_equal": same, "score_error": worst, **errors}


def dense_times(q: torch.Tensor, key: torch.Tensor, v: torch.Tensor) -> dict[str, dict[str, float]]:
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, key, v)]
    result = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def forward(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

        try:
            with torch.no_grad():
                alone = median(forward)
            weight = torch.randn_like(forward())
            result[name] = {"forward": alone, "both": median(lambda f=forward, w=weight: f().backward(w))}
        except RuntimeError as error:
            result[name] = {"error": str(error).splitlines()[0][:200]}
    return result


def sparse_times(q: torch.Tensor, key: torch.Tensor, v: torch.Tensor, k: int, block: int) -> dict[str, float]:
    def pick() -> torch.Tensor:
        return select_blocks(q, key, block_size=block, num_selected_blocks=k, impl="triton")[0]

    def forward() -> torch.Tensor:
        return block_sparse_attention(q, key, v, pick(), block_size=block, impl="triton")[0]

    index = pick()

    def given() -> torch.Tensor:
        return block_sparse_attention(q, key, v, index, block_size=block, impl="triton")[0]

    with torch.no_grad():
        times = {
            "means": median(lambda: block_means(key, block)),
            "select": median(pick),
            "attend": median(given),
            "forward": median(forward),
        }
    weight = torch.randn_like(q)
    times["attend_both"] = median(lambda: given().backward(weight))
    times["both"] = median(lambda: forward().backward(weight))
    return times


def extra_memory(function: Any) -> float:
    """GB allocated at the peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "device": torch.cuda.get_device_name(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "dtype": "bfloat16", "unit": "ms, median", "rows": [],
    }  # fmt: skip
    for name in args.shapes.split(","):
        heads, kv_heads, size, k, block = SHAPES[name]
        errors = check(heads, kv_heads, size, k, block)
        print(name, "checked:", {key: f"{value:.2e}" for key, value in errors.items()}, flush=True)
        for tokens in map(int, args.tokens.split(",")):
            q, key, v = draw(tokens, heads, kv_heads, size, torch.bfloat16)
            dense, sparse = dense_times(q, key, v), sparse_times(q, key, v, k, block)
            row: dict[str, Any] = {"shape": name, "tokens": tokens, "errors": errors, "dense": dense, "sparse": sparse}
            best = dense.get("cudnn", {})
            if "forward" in best:
                row["ratio_forward"] = best["forward"] / sparse["forward"]
                row["ratio_both"] = best["both"] / sparse["both"]
            report["rows"].append(row)
            print(name, tokens, "dense", {n: {p: round(x, 3) if isinstance(x, float) else x for p, x in t.items()} for n, t in dense.items()},
                  "sparse", {n: round(x, 3) for n, x in sparse.items()}, f"ratio {row.get('ratio_forward', 0):.2f} / {row.get('ratio_both', 0):.2f}", flush=True)  # fmt: skip
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
