"""Compiles every Triton kernel of `ssa.ops` for one GPU generation, without a GPU, and prints their shared memory, and the bytes a thread
keeps on its stack because registers do not suffice, as JSON.

    python tests/ops/compile_only.py 90 [all|heads-128]      # 80, 89, 90, 100, 120
    # all = every kernel, and the largest tiles; heads-128 = attention with heads of 128 alone

The operations run on CPU tensors with a stand-in for the GPU's driver: each launch compiles its kernel exactly as it would there,
with the types, constants, alignments and warps of that launch, and launches nothing. What the operations then return is not defined.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import triton.backends.nvidia
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import ssa.ops.triton
from ssa.budget import Selection
from ssa.ops import (
    block_sparse_attention,
    compressed_attention,
    decode_attend,
    decode_attention,
    decode_dense,
    decode_select,
    gated_alignment,
    gated_sum,
    implementations,
    select_blocks,
    window_attention,
)
from ssa.ops.cached_means import extend_means
from ssa.ops.cross_entropy import linear_cross_entropy
from ssa.ops.triton import key_side, reader_lists

shared: dict[str, int] = {}
stack: dict[str, int] = {}


class StandIn:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def stack_bytes(cubin: bytes) -> int:
    """Of a thread, as the binary asks for it. Triton's kernels have no arrays of their own: all of it is spilled registers."""
    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", told))


def compile_only(launch=JITFunction.run):
    def run(kernel, *arguments, grid, warmup, **options) -> None:
        binary = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        name = f"{kernel.fn.__module__.removeprefix('ssa.ops.triton.')}.{kernel.fn.__name__}"
        shared[name] = max(shared.get(name, 0), binary.metadata.shared)
        stack[name] = max(stack.get(name, 0), stack_bytes(binary.asm["cubin"]))

    return run


def every_kernel() -> set[str]:
    found = set()
    for module in pkgutil.iter_modules(ssa.ops.triton.__path__):
        for name, value in vars(importlib.import_module(f"ssa.ops.triton.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(f"{value.fn.__module__.removeprefix('ssa.ops.triton.')}.{name}")
    return found


def tensors(*shapes, dtype=torch.bfloat16):
    return [torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def sparse(heads, kv_heads, size, count, block, tokens=512, dtype=torch.bfloat16, packed=False, bias=False, scope="group"):
    q, k, v = tensors((1, tokens, heads, size), *[(1, tokens, kv_heads, size)] * 2, dtype=dtype)
    positions = torch.arange(tokens)[None] % (tokens // 2) if packed else None
    options = {"positions": positions, "impl": "triton"}
    index, _ = select_blocks(q, k, Selection(count, block, scope=scope), **options)
    (per_key,) = tensors((1, tokens, kv_heads), dtype=torch.float32) if bias else (None,)
    out, lse = block_sparse_attention(q, k, v, torch.zeros_like(index), block_size=block, bias=per_key, **options)
    if packed:
        with torch.no_grad():
            at_hand = torch.zeros_like(index)
            block_sparse_attention(q, k, v, at_hand, block_size=block, bias=per_key, slots=at_hand, **options)
    inputs = [q, k, v, *([per_key] if bias else [])]
    torch.autograd.grad(out.float().sum() + lse.sum(), inputs)


def decode(heads, kv_heads, size, count, block, columns, queries=1, dtype=torch.bfloat16):
    q, k, v, means = tensors(
        (2, queries, heads, size), *[(2, columns, kv_heads, size)] * 2, (2, columns // block, kv_heads, size), dtype=dtype
    )
    lengths, selection = torch.tensor([columns, 7]), Selection(count, block)
    for rows in (None, torch.tensor([count, 1], dtype=torch.int32)):
        decode_attention(q, k, v, means, lengths, selection, starts=torch.tensor([0, 3]), row_blocks=rows, impl="triton")
        index = torch.zeros_like(decode_select(q, means, lengths, selection, row_blocks=rows, impl="triton"))
    decode_attend(q, k, v, index, lengths, block_size=block, slots=index, impl="triton")


def nsa(heads, kv_heads, size, block, tokens=512):
    q, k, v = tensors((1, tokens, heads, size), *[(1, tokens, kv_heads, size)] * 2)
    out, _ = compressed_attention(q, k, v, block_size=block, impl="triton")
    window = window_attention(q, k, v, window=128, impl="triton")
    (gates,) = tensors((1, tokens, heads, 2))
    gated_sum([out, window], gates, impl="triton").sum().backward()


def alignment(heads, size, tokens=512):
    full, low = tensors(*[(1, tokens, heads, size)] * 2)
    (gates,) = tensors((1, tokens, heads))
    out, losses = gated_alignment(full, low, gates, main="sparse", impl="triton")
    (out.sum() + losses.sum()).backward()


def vocabulary(tokens=64, width=32, words=1000):
    hidden, weight = tensors((tokens, width), (words, width))
    linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64), impl="triton").sum().backward()


def cached_means(kv_heads, size):
    k, v = torch.zeros(2, 1, 99, kv_heads, size, dtype=torch.bfloat16)
    means = [torch.zeros(1, 13, kv_heads, size, dtype=torch.bfloat16) for _ in range(2)]
    extend_means([k, v], means, torch.tensor(9), torch.tensor([0]), 1, 16, 16, impl="triton")
    extend_means([k], means[:1], torch.tensor(9), torch.tensor([0]), 1, 16, 8, impl="triton")
    bias, importance, means = torch.zeros(1, 99, kv_heads, 1), torch.zeros(1, 7, kv_heads), [torch.zeros(1, 12, kv_heads, 1)]
    extend_means([bias], means, torch.tensor(9), torch.tensor([0]), 1, 16, 8, importance=importance, block_size=16, impl="triton")


def around_attention(heads, kv_heads, size, hidden, inside, rows=1, dtype=torch.bfloat16, columns=131072):
    """A layer's other parts, and dense attention over a cache."""
    from ssa.ops.triton import layer

    def linear(features, count):
        return torch.nn.Linear(features, count, bias=False, dtype=dtype)

    norm = LlamaRMSNorm(hidden).to(dtype)
    with torch.no_grad():
        x = torch.zeros(rows, hidden, dtype=dtype)
        counts = (heads * size, kv_heads * size, kv_heads * size, heads)
        y = layer.project(x, norm, [linear(hidden, count) for count in counts])
        layer.project(x, norm, [linear(hidden, 60000)])  # a vocabulary
        rope, cache = [torch.zeros(1, rows, size)] * 2, torch.zeros(2, 1, kv_heads, 99, size, dtype=dtype)
        q, _, _, _ = layer.rope_and_append(
            y, tuple(rope), torch.tensor(rows), [*cache], (rows, heads, kv_heads, size), heads, False
        )
        layer.project_back(torch.zeros(rows, heads * size, dtype=dtype), linear(heads * size, hidden), x)
        layer.mlp(x, norm, linear(hidden, inside), linear(hidden, inside), linear(inside, hidden))
        k = torch.zeros(1, 1, kv_heads, size, dtype=dtype).expand(1, columns, kv_heads, size)
        for queries in (1, 8):
            decode_dense(q.new_zeros(1, queries, heads, size), k, k, torch.tensor([9]), impl="triton")
        decode_dense(
            q.new_zeros(1, 1, heads, size), k, k, torch.tensor([9]), bias=torch.zeros(1, columns, kv_heads), impl="triton"
        )


def windows(heads, kv_heads, size, tokens, packed=False, queries=1, dtype=torch.bfloat16, **more):
    q, k, v = (x.detach() for x in tensors((1, tokens, heads, size), *[(1, tokens, kv_heads, size)] * 2, dtype=dtype))
    selection = Selection(24, 64, mean_size=32, mean_stride=16, sink_blocks=1, local_blocks=16, query_blocks=3, **more)
    bias = torch.zeros(1, tokens, kv_heads)
    positions = torch.arange(tokens)[None] % (tokens // 2) if packed else None
    select_blocks(q, k, selection, bias=bias, positions=positions, impl="triton")
    means, coarse = torch.zeros(2, 2, tokens // 16, kv_heads, size, dtype=dtype)[:, :1]
    importance = torch.zeros(1, tokens // 64, kv_heads)
    for rows in (None, torch.tensor([24], dtype=torch.int32)):
        decode_attention(
            q[:, :queries], k, v, means, torch.tensor([tokens]), selection, bias=bias, coarse_means=coarse, importance=importance,
            row_blocks=rows, impl="triton",
        )  # fmt: skip


def all_windows() -> None:
    windows(32, 2, 64, 4096)
    windows(32, 2, 128, 4096, packed=True, lse="coarse")
    windows(8, 2, 128, 2048, queries=4, scope="head", dense_length=512)
    windows(8, 2, 64, 2048, scoring="logit")
    windows(4, 2, 64, 2048, dtype=torch.float32)


def heads_128() -> None:
    """Groups of 4 and 1, blocks of 128 and 64, heads that choose together and apart, as `ssa bench kernels` measures them."""
    sparse(8, 2, 128, 8, 128, tokens=2048)
    sparse(8, 2, 128, 8, 128, tokens=2048, scope="head")
    sparse(2, 2, 128, 8, 128, tokens=2048)
    sparse(8, 2, 128, 16, 64, tokens=2048)
    with patch.object(key_side, "SPAN_BYTES", {"forward": 1, "backward": 1}):  # in spans, whose gradients add up
        sparse(8, 2, 128, 8, 128, tokens=2048)
        sparse(8, 2, 128, 16, 64, tokens=2048)


def main(capability: int, what: str) -> None:
    driver.set_active(StandIn(capability))
    JITFunction.run = compile_only()
    implementations._triton_missing = lambda kind: None
    if what == "heads-128":
        heads_128()
    elif what == "layer":
        around_attention(32, 2, 64, 2048, 8192)
        around_attention(32, 8, 128, 4096, 14336, rows=16)
        around_attention(6, 2, 96, 1000, 2048, rows=40)
        around_attention(8, 1, 256, 512, 2048, dtype=torch.float32)
        cached_means(2, 64)
    elif what == "windows":
        all_windows()
    else:
        every(what == "all")
    print(json.dumps({"shared": shared, "stack": stack, "missed": sorted(every_kernel() - set(shared))}))


def every(everything: bool) -> None:
    sparse(32, 2, 64, 16, 16)
    decode(32, 2, 64, 16, 16, columns=131072)
    cached_means(2, 64)
    vocabulary()
    around_attention(32, 2, 64, 2048, 8192)
    sparse(8, 2, 128, 16, 64, tokens=2048, packed=True, bias=True)  # from the key side
    sparse(8, 2, 128, 8, 128, tokens=2048)
    with patch.object(reader_lists, "MAP_BYTES", 0):  # lists of readers by sorting
        sparse(32, 2, 64, 16, 16)
    if everything:
        around_attention(32, 8, 128, 4096, 14336, rows=16)
        around_attention(6, 2, 96, 1000, 2048, rows=40)
        around_attention(8, 1, 256, 512, 2048, dtype=torch.float32)
        all_windows()
        sparse(8, 2, 128, 8, 128, tokens=2048, packed=True, bias=True, scope="head")
        sparse(8, 2, 64, 4, 256, tokens=4096)
        nsa(32, 2, 64, 16)
        alignment(32, 64)
        sparse(8, 2, 64, 16, 16, tokens=16384)  # chunks of 4 blocks
        sparse(8, 2, 64, 16, 16, tokens=40960)  # of 8
        with patch.object(key_side, "SPAN_BYTES", {"forward": 1, "backward": 1}):  # in spans, whose gradients add up
            sparse(8, 2, 128, 16, 64, tokens=2048, packed=True, bias=True)
        decode(8, 2, 128, 64, 32, columns=8192, queries=2)
        sparse(4, 2, 64, 4, 32, dtype=torch.float32)  # wider ones in fp32, by no tensor core, compile for a minute each
        for size in (96, 256):
            sparse(32, 1, size, 16, 128)
            for dtype in (torch.bfloat16, torch.float32):
                decode(32, 1, size, 16, 128, columns=65536, queries=8, dtype=dtype)
                decode(6, 2, size, 64, 16, columns=262144, dtype=dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), "".join(sys.argv[2:]))
