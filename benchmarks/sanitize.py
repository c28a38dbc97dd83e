"""Every Triton kernel once, on tiny shapes, for NVIDIA's compute-sanitizer (it comes with the CUDA toolkit).

    python benchmarks/sanitize.py --out sanitize.json       # memcheck and racecheck
    python benchmarks/sanitize.py --tools memcheck,initcheck
    python benchmarks/sanitize.py --tools none              # the cases alone

The cases run once without the tools first, which fills Triton's cache: under a tool only what is checked is slow. Allocations are not
cached under a tool, so that an access past the end of a tensor leaves its allocation and is seen. A kernel that no case launches is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ssa.ops.triton
from ssa.bench.report import Deadline, Report, environment
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import (
    block_sparse_attention,
    compressed_attention,
    decode_attention,
    decode_dense,
    gated_alignment,
    gated_sum,
    select_blocks,
    window_attention,
)
from ssa.ops.cached_means import extend_means
from ssa.ops.cross_entropy import linear_cross_entropy
from ssa.ops.windows import key_importance, window_means
from ssa.testing import document_positions, random_qkv

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sparse(heads: int, kv_heads: int, size: int, block: int, k: int, tokens: int, dtype: torch.dtype, *, packed: bool = False,
           bias: bool = False, scope: str = "group", rule: str = "exact", sink: bool = False) -> None:  # fmt: skip
    """Select, attend, and the backward pass through output and log-normaliser. `sink`: all queries read their own block and the first."""
    q, key, v = random_qkv(1, tokens, tokens, heads, kv_heads, size, dtype=dtype)
    positions = document_positions([7, 1, tokens - 8]).to(q.device) if packed else None
    keys_bias = torch.zeros(1, tokens, kv_heads, dtype=torch.float32, device=q.device, requires_grad=True) if bias else None
    index, _ = select_blocks(q, key, Selection(k, block, scope=scope, rule=rule), positions=positions, impl="triton")
    if sink:
        own = torch.arange(tokens, device=q.device) // block
        pair = torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], -1)
        index = pair.to(torch.int32).expand(1, kv_heads, tokens, 2).contiguous()
    out, lse = block_sparse_attention(q, key, v, index, block_size=block, positions=positions, bias=keys_bias, impl="triton")
    _backward(out.float().sum() + lse.sum(), [q, key, v, *([] if keys_bias is None else [keys_bias])])


def chunked(dtype: torch.dtype) -> None:
    """Selection as it is among many blocks: by chunks of several."""
    with mock.patch.object(importlib.import_module("ssa.ops.triton.select"), "CHUNKS", ((1 << 31, 4),)):
        sparse(2, 1, 16, 4, 2, 150, dtype)


def sorted_lists(dtype: torch.dtype) -> None:
    """Readers of a block as they are listed among many keys: by sorting."""
    with mock.patch.object(importlib.import_module("ssa.ops.triton.reader_lists"), "MAP_BYTES", 0):
        sparse(16, 1, 64, 16, 4, 103, dtype)


def decode(heads: int, kv_heads: int, size: int, block: int, k: int, dtype: torch.dtype, blocks: int = 5) -> None:
    """Two queries over ragged rows of a cache, after its block means took a token more."""
    keys = blocks * block + 3
    q, key, v = (x.detach() for x in random_qkv(2, 2, keys, heads, kv_heads, size, dtype=dtype))
    means = [torch.zeros(2, blocks + 1, kv_heads, size, dtype=dtype, device=q.device) for _ in range(2)]
    starts = torch.tensor([0, block + 1], device=q.device)
    extend_means([key, v], means, torch.tensor(keys, device=q.device), starts, 3, block, block, impl="triton")
    out, _, _ = decode_attention(q, key, v, means[0], keys - starts, Selection(k, block), starts=starts, impl="triton")
    _finite([out])


def windows(heads: int, kv_heads: int, size: int, dtype: torch.dtype, lse: Literal["exact", "coarse"] = "exact") -> None:
    """Windows and importance: of packed and of whole rows, token by token, and in decoding over ragged rows."""
    selection = Selection(6, 16, mean_size=8, mean_stride=4, sink_blocks=1, local_blocks=1, query_blocks=2, lse=lse)
    q, key, v = (x.detach() for x in random_qkv(2, 133, 133, heads, kv_heads, size, dtype=dtype))
    bias = torch.randn(2, 133, kv_heads, 1, device=q.device)
    for positions in (None, torch.cat([torch.arange(90), torch.arange(43)])[None].repeat(2, 1).to(q.device)):
        select_blocks(q, key, selection, positions=positions, bias=bias[..., 0], impl="triton")
    means, coarse = (window_means(key, 8 * c, 4 * c) for c in (1, 4))
    importance = key_importance(bias[..., 0], None, 16, 8, 4)
    ends, starts = torch.tensor(133, device=q.device), torch.tensor([0, 17], device=q.device)
    for x, more in ((key, {}), (bias, {"importance": importance, "block_size": 16})):
        kept = [torch.zeros(2, 33, kv_heads, x.shape[3], dtype=x.dtype, device=q.device)]
        extend_means([x], kept, ends, starts, 21, 8, 4, impl="triton", **more)
    out, _, _ = decode_attention(
        q[:, -2:], key, v, means, 133 - starts, selection, starts=starts, bias=bias[..., 0], coarse_means=coarse,
        importance=importance, impl="triton",
    )  # fmt: skip
    _finite([out])


def dense_decoding(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    """Several queries over ragged rows with a bias, within a window, and over block means."""
    q, key, v = (x.detach() for x in random_qkv(2, 3, 700, heads, kv_heads, size, dtype=dtype))
    starts = torch.tensor([0, 17], device=q.device)
    bias = torch.randn(2, 700, kv_heads, device=q.device)
    for more in ({"bias": bias}, {"window": 9}):
        _finite([decode_dense(q, key, v, 700 - starts, starts=starts, impl="triton", **more)[0]])
    _finite([decode_dense(q, key, v, torch.full((2,), 2800, device=q.device), per=4, impl="triton")[0]])


@torch.no_grad()
def around_attention(heads: int, kv_heads: int, size: int, rows: int, dtype: torch.dtype) -> None:
    """A decoder layer's other parts, into a cache whose rows end apart."""
    from ssa.ops.triton import layer

    def linear(features: int, count: int) -> nn.Linear:
        return nn.Linear(features, count, bias=False, dtype=dtype)

    hidden, norm = 40, LlamaRMSNorm(40).to(dtype)
    norm.to(torch.get_default_device())
    x = torch.randn(2 * rows, hidden, dtype=dtype)
    counts = (heads * size, kv_heads * size, kv_heads * size, heads)
    y = layer.project(x, norm, [linear(hidden, count) for count in counts])
    angle = torch.rand(2, rows, size)
    buffers = [torch.zeros(2, kv_heads, rows + 5, size, dtype=dtype) for _ in range(2)]
    q, _, _, _ = layer.rope_and_append(
        y, (angle.cos(), angle.sin()), torch.tensor([rows, rows + 5]), buffers, (rows, heads, kv_heads, size), heads, True
    )
    x = layer.project_back(q.reshape(2 * rows, -1), linear(heads * size, hidden), x)
    _finite([layer.mlp(x, norm, linear(hidden, 72), linear(hidden, 72), linear(72, hidden))])


def branches(heads: int, kv_heads: int, size: int, block: int, dtype: torch.dtype) -> None:
    """NSA's compression and window, and its gated sum."""
    q, key, v = random_qkv(1, 5 * block + 3, 5 * block + 3, heads, kv_heads, size, dtype=dtype)
    compressed, _ = compressed_attention(q, key, v, block_size=block, impl="triton")
    window = window_attention(q, key, v, window=block + 5, impl="triton")
    gates = torch.full((*q.shape[:3], 2), 0.5, device=q.device, requires_grad=True)
    out = gated_sum([compressed, window], gates, impl="triton")
    _backward(out.float().sum(), [q, key, v, gates])


def alignment(heads: int, size: int, dtype: torch.dtype) -> None:
    """SSA's gate and losses, with padding."""
    full, other, _ = random_qkv(2, 19, 19, heads, heads, size, dtype=dtype)
    gates = torch.full((2, 19, heads), 0.5, device=full.device, requires_grad=True)
    padding = torch.zeros(2, 19, dtype=torch.bool, device=full.device)
    padding[0, :3] = True
    out, losses = gated_alignment(full, other, gates, padding, main="sparse", impl="triton")
    _backward(out.float().sum() + losses.sum(), [full, other, gates])


def vocabulary(tokens: int, size: int, words: int, dtype: torch.dtype) -> None:
    """The language model's loss; some tokens have no target."""
    hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, size, requires_grad=True)
    targets = torch.arange(tokens) % words
    targets[::5] = -100
    loss = linear_cross_entropy(hidden, weight, targets, impl="triton")
    _backward(loss, [hidden, weight])


def cases(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    return {
        "select, attend, many heads a kv head": lambda: sparse(16, 1, 64, 16, 4, 103, dtype),
        "few heads a kv head": lambda: sparse(8, 2, 64, 32, 3, 133, dtype),
        "one head, one block, head size 96": lambda: sparse(2, 2, 96, 16, 1, 37, dtype),
        "popular blocks": lambda: sparse(2, 1, 16, 16, 2, 290, dtype, sink=True),
        "many blocks": lambda: chunked(dtype),
        "lists by sorting": lambda: sorted_lists(dtype),
        "documents": lambda: sparse(6, 2, 64, 16, 3, 90, dtype, packed=True),
        "bias": lambda: sparse(8, 1, 64, 16, 3, 90, dtype, bias=True),
        "heads choose, released rule": lambda: sparse(2, 1, 16, 16, 16, 290, dtype, scope="head", rule="released"),
        "decode": lambda: decode(32, 2, 64, 16, 4, dtype),
        "decode, programs that wait for each other": lambda: decode(2, 1, 256, 16, 4, dtype, blocks=130),
        "decode, few heads a kv head, a large budget": lambda: decode(4, 2, 64, 128, 16, dtype),
        "windows and importance": lambda: windows(8, 2, 64, dtype),
        "windows, a coarse normaliser": lambda: windows(3, 1, 64, dtype, "coarse"),
        "dense decoding": lambda: dense_decoding(8, 2, 64, dtype),
        "around attention": lambda: around_attention(6, 2, 20, 3, dtype),
        "compression, window, gates": lambda: branches(8, 2, 64, 16, dtype),
        "alignment": lambda: alignment(4, 64, dtype),
        "vocabulary": lambda: vocabulary(19, 24, 5003, dtype),
    }


def _backward(loss: Tensor, leaves: list[Tensor]) -> None:
    _finite(list(torch.autograd.grad(loss, leaves)))


def _finite(results: list[Tensor]) -> None:
    assert all(bool(torch.isfinite(x).all()) for x in results), "a result is not finite"


class _Recorded:
    """A kernel that notes its launches, and without `run` leaves it at that."""

    def __init__(self, kernel: Any, name: str, seen: set[str], run: bool) -> None:
        self._kernel, self._name, self._seen, self._run = kernel, name, seen, run

    def __getitem__(self, grid: Any) -> Any:
        self._seen.add(self._name)
        return self._kernel[grid] if self._run else lambda *args, **options: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextlib.contextmanager
def recorded_launches(run: bool = True) -> Iterator[tuple[set[str], set[str]]]:
    """Within it: (names of all kernels of the package, those launched so far). Without `run` nothing is computed, and results are not
    looked at."""
    known: set[str] = set()
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        if not run:
            stack.enter_context(mock.patch.dict(globals(), _finite=lambda results: None))
        for info in pkgutil.iter_modules(ssa.ops.triton.__path__):
            module = importlib.import_module(f"ssa.ops.triton.{info.name}")
            for name, kernel in list(vars(module).items()):
                if not name.endswith("_kernel") or not hasattr(kernel, "fn"):
                    continue
                full_name = (
                    f"{kernel.fn.__module__.rpartition('.')[2]}.{name}"  # of the module that has it, wherever it is launched
                )
                known.add(full_name)
                stack.enter_context(mock.patch.object(module, name, _Recorded(kernel, full_name, seen, run)))
        yield known, seen


def run_cases(device: str, dtype: torch.dtype, run: bool = True) -> tuple[set[str], set[str]]:
    """All cases; (kernels that were launched, those that were not). Without `run` kernels are not, only what leads to their launches."""
    with recorded_launches(run) as (known, seen), torch.device(device):
        for name, case in cases(dtype).items():
            case()
            if device != "cpu":
                torch.cuda.synchronize()
            print(f"ran: {name}", flush=True)
    print(f"launched {len(seen)} of {len(known)} kernels")
    return seen, known - seen


def check(tool: str, sanitizer: str, command: list[str]) -> dict[str, Any]:
    """The cases once more under a tool: its status, its own summary, what it found, and the seconds that it took."""
    print(f"== {tool}", flush=True)
    begin = time.perf_counter()
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", *command],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    told = [line.removeprefix("=========").strip() for line in done.stdout.splitlines() if line.startswith("=========")]
    return {
        "tool": tool, "status": done.returncode, "summary": [line for line in told if "SUMMARY" in line],
        "findings": [line for line in told if line and "SUMMARY" not in line and line != "COMPUTE-SANITIZER"][:40],
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck", help=f"of {', '.join(TOOLS)}; none")
    parser.add_argument("--out", type=Path, help="JSON file for what was run and found")
    args = parser.parse_args()
    tools = [] if args.tools == "none" else args.tools.split(",")
    if not torch.cuda.is_available():
        raise UserError("the kernels need a CUDA GPU, and PyTorch finds none here")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        raise UserError(f"--tools {unknown[0]!r} is not one of {', '.join(TOOLS)}, none")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tools and sanitizer is None:
        raise UserError("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    report = Report(args.out, Deadline(0), suite="sanitize", dtype="bfloat16", kernels=[], missing=[], **environment("cuda:0"))
    report.data["command"] = shlex.join(["python", "benchmarks/sanitize.py", *sys.argv[1:]])
    launched, missing = run_cases("cuda", torch.bfloat16)
    report.data |= {"kernels": sorted(launched), "missing": sorted(missing)}
    if missing:
        print(f"no case launches {', '.join(sorted(missing))}")
    for tool in [] if missing else tools:
        assert sanitizer is not None
        report.add(check(tool, sanitizer, [sys.executable, __file__, "--tools", "none"]))
    report.finish([])
    return 1 if missing or any(row["status"] for row in report.data["rows"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
