"""The selections of InfLLM-V2 and NOSA beside block means and dense attention: choosing, attending with a bias, both ways, and decoding.

    python benchmarks/windows.py --out benchmarks/results/h200/windows.json

Everything in one process; every case is checked before it is timed: chosen blocks of the last queries and of decoding against the reference,
outputs with a bias against dense attention where everything is chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.attention import HeadShape
from ssa.bench.decode import best, dense_first_row, dense_steps
from ssa.bench.decode import dense_times as dense_decoding
from ssa.bench.gate import GateError
from ssa.bench.kernels import Plan, _passes, dense_times
from ssa.bench.report import Bar, Deadline, Report, environment
from ssa.bench.shapes import Shape, draw
from ssa.bench.timing import both_ways, kernel_profile
from ssa.budget import Selection
from ssa.methods import checked_options, selector_named
from ssa.ops import block_means, block_sparse_attention, decode_attention, select_blocks
from ssa.ops.windows import key_importance, window_means
from ssa.testing import rms_ratio

LAST = 64
"""Queries whose choice is compared."""


def rule(selector: str, budget: Selection, **options: Any) -> Selection:
    """What the selector, with its registered options, makes of a budget."""
    kind = selector_named(selector)
    made = kind.load()(HeadShape(2, 1, 16), **checked_options(kind, options, "options"))
    return made.rule(budget)


def choices(tokens: int, bias: Tensor, quick: bool) -> dict[str, tuple[Selection, Tensor | None]]:
    """{name: (selection, bias)}"""
    wide = Selection(64, 64)
    local = {"local_blocks": 16}
    if quick:
        wide, local = Selection(8, 64), {"local_blocks": 2}
    return {
        "means 16x16": (Selection(16, 16), None),
        "means 64x64": (wide, None),
        "windows 64x64": (rule("windows", wide, **local), None),
        "windows 64x64, coarse": (rule("windows", wide, lse="coarse", **local), None),
        "eviction 64x64": (rule("eviction", wide, query_blocks=2 if quick else 15, **local), bias),
    }


def same_blocks(index: Tensor, wanted: Tensor) -> float:
    """Share of the chosen blocks that both have: near-ties may flip."""
    kept = (index[..., :, None] == wanted[..., None, :]).any(-1)
    return kept[index >= 0].double().mean().item()


def check_choice(q: Tensor, k: Tensor, selection: Selection, bias: Tensor | None, impl: str) -> float:
    index = select_blocks(q, k, selection, bias=bias, impl=impl)[0][:, :, -LAST:]
    wanted = select_blocks(q[:, -LAST:], k, selection, bias=bias, impl="reference")[0]
    width = max(index.shape[3], wanted.shape[3])
    index, wanted = (torch.nn.functional.pad(x, (0, width - x.shape[3]), value=-1) for x in (index, wanted))
    same = same_blocks(index, wanted)
    if same < 0.98:
        raise GateError(f"{selection}: {same:.4f} of the chosen blocks are the reference's")
    return same


def prefill(report: Report, shape: Shape, tokens: int, plan: Plan, quick: bool) -> dict[str, Any]:
    """Times of every selection at one length, attention with and without a bias, and the whole beside dense attention."""
    q, k, v = draw(shape, tokens, plan.device, torch.bfloat16)
    generator = torch.Generator(plan.device).manual_seed(1)
    bias = torch.randn(1, tokens, shape.kv_heads, generator=generator, device=plan.device)
    row: dict[str, Any] = {"what": "prefill", "shape": f"{shape.heads}/{shape.kv_heads}/{shape.head_dim}", "tokens": tokens}
    row["select"], row["checked"] = {}, {}
    for name, (selection, own) in choices(tokens, bias, quick).items():
        with torch.no_grad():
            row["checked"][name] = check_choice(q, k, selection, own, plan.impl)

            def select(selection: Selection = selection, own: Tensor | None = own) -> Tensor:
                return select_blocks(q, k, selection, bias=own, impl=plan.impl)[0]

            row["select"][name] = both_ways(select, plan.seconds)
        print(f"{row['shape']} T={tokens}: select by {name}: {row['select'][name]}", flush=True)
        report.write()
    windows = choices(tokens, bias, quick)["windows 64x64"][0]
    size = windows.block_size
    index = select_blocks(q, k, windows, impl=plan.impl)[0].contiguous()

    def attend(bias: Tensor | None = None) -> Tensor:
        return block_sparse_attention(q, k, v, index, block_size=size, bias=bias, impl=plan.impl)[0]

    few = slice(0, 300)
    everything = torch.arange(-(-300 // size), device=q.device, dtype=torch.int32)
    everything = torch.where(everything <= torch.arange(300, device=q.device)[:, None] // size, everything, -1)
    everything = everything.int().expand(1, shape.kv_heads, -1, -1).contiguous()
    out = block_sparse_attention(
        q[:, few], k[:, few], v[:, few], everything, block_size=size, bias=bias[:, few].contiguous(), impl=plan.impl
    )[0]
    exact = block_sparse_attention(
        *(x[:, few].double() for x in (q, k, v)), everything, block_size=size, bias=bias[:, few].double(), impl="reference"
    )[0]
    row["checked"]["bias"] = rms_ratio(out, exact)
    if row["checked"]["bias"] > 5e-3:
        raise GateError(f"attention with a bias is off by {row['checked']['bias']:.3g}")
    learned = bias.requires_grad_()
    row["attend"] = _passes(attend, [q, k, v], plan.seconds)
    row["attend with bias"] = _passes(lambda: attend(learned), [q, k, v, learned], plan.seconds)

    def whole() -> Tensor:
        chosen = select_blocks(q, k, windows, impl=plan.impl)[0]
        return block_sparse_attention(q, k, v, chosen, block_size=size, impl=plan.impl)[0]

    row["infllmv2"] = _passes(whole, [q, k, v], plan.seconds)
    row["dense"] = dense_times(shape, tokens, plan)
    if plan.device == "cuda":
        with torch.no_grad():
            row["profile"] = {
                name: kernel_profile(lambda: select_blocks(q, k, selection, bias=own)[0], repeats=2)  # noqa: B023
                for name, (selection, own) in choices(tokens, bias.detach(), quick).items()
            }
    return row


@torch.no_grad()
def decoding(report: Report, shape: Shape, tokens: int, batch: int, plan: Plan, quick: bool) -> dict[str, Any]:
    """One step of every selection beside the fastest dense one."""
    generator = torch.Generator(plan.device).manual_seed(tokens)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=plan.device, dtype=torch.bfloat16)

    q = normal(batch, 1, shape.heads, shape.head_dim)
    k, v = (normal(batch, shape.kv_heads, tokens, shape.head_dim).transpose(1, 2) for _ in range(2))
    bias = torch.randn(batch, shape.kv_heads, tokens, generator=generator, device=plan.device).transpose(1, 2)
    lengths = torch.full((batch,), tokens, device=q.device, dtype=torch.int32)
    row: dict[str, Any] = {
        "what": "decode",
        "shape": f"{shape.heads}/{shape.kv_heads}/{shape.head_dim}",
        "tokens": tokens,
        "batch": batch,
    }
    row |= {"sparse": {}, "checked": {}, "kernels": {}, "ratio": {}}
    dense = dense_decoding(dense_steps(q, k, v), dense_first_row(q, k, v)) if plan.device == "cuda" else {}
    for name, (selection, own) in choices(tokens, bias, quick).items():
        size, stride = selection.mean_size, selection.mean_stride
        extra: dict[str, Any] = {"bias": own}
        if not size:
            means = torch.cat([block_means(k[b : b + 1], selection.block_size) for b in range(batch)])
        else:
            means = torch.cat([window_means(k[b : b + 1], size, stride) for b in range(batch)])
            if selection.lse == "coarse":
                extra["coarse_means"] = torch.cat([window_means(k[b : b + 1], 4 * size, 4 * stride) for b in range(batch)])
            if own is not None:
                extra["importance"] = key_importance(own, None, selection.block_size, size, stride)

        def step(means: Tensor = means, selection: Selection = selection, extra: dict[str, Any] = extra) -> Any:
            return decode_attention(q, k, v, means, lengths, selection, impl=plan.impl, **extra)

        rows = min(2, batch)
        part = {key: None if x is None else x[:rows] for key, x in extra.items()}
        ragged = torch.tensor([tokens, tokens - tokens // 3], device=q.device, dtype=torch.int32)[:rows]
        out, _, index = decode_attention(q[:rows], k[:rows], v[:rows], means[:rows], ragged, selection, impl=plan.impl, **part)
        wide = {key: None if x is None else x.double() for key, x in part.items()}
        gold, _, wanted = decode_attention(
            *(x[:rows].double() for x in (q, k, v, means)), ragged, selection, impl="reference", **wide
        )
        width = max(index.shape[3], wanted.shape[3])
        index, wanted = (torch.nn.functional.pad(x, (0, width - x.shape[3]), value=-1) for x in (index, wanted))
        alike = (index == wanted).all(-1).repeat_interleave(shape.heads // shape.kv_heads, 1).transpose(1, 2)
        row["checked"][name] = {"blocks": same_blocks(index, wanted), "out": rms_ratio(out[alike], gold[alike])}
        if row["checked"][name]["blocks"] < 0.98 or row["checked"][name]["out"] > 5e-3:
            raise GateError(f"decoding by {name} is not the reference's: {row['checked'][name]}")
        row["sparse"][name] = both_ways(step)
        if plan.device == "cuda":
            row["kernels"][name] = kernel_profile(step, repeats=10)
        row["ratio"][name] = best({"dense": dense, "sparse": row["sparse"][name]})["ratio"]
        print(f"{row['shape']} S={tokens} B={batch}: {name}: {row['sparse'][name]} {row['ratio'][name]}", flush=True)
    return row | {"dense": dense}


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    found = []

    def time_of(times: dict[str, Any]) -> float:
        return times["launches"] if times.get("graph") is None else times["graph"]

    for row in rows:
        where = f"{row['shape']}, {row['tokens']} tokens"
        if row["what"] == "prefill":
            select = {name: time_of(times) for name, times in row["select"].items()}
            windows = select["windows 64x64"]
            found += [
                Bar(f"{where}: windows 64x64 / means 16x16", 2.0, windows / select["means 16x16"], "<="),
                Bar(f"{where}: eviction / windows", 1.1, select["eviction 64x64"] / windows, "<="),
            ]
            found += [
                Bar(f"{where}: attention with / without bias, {part}", 1.1, time_of(row["attend with bias"][part]) / time_of(row["attend"][part]), "<=")
                for part in ("forward", "both")
            ]  # fmt: skip
            dense = row["dense"].get("cudnn", {}).get("both")
            found.append(
                Bar(f"{where}: cuDNN / infllmv2, both ways", 3.3, None if dense is None else time_of(dense) / time_of(row["infllmv2"]["both"]))
            )  # fmt: skip
        else:
            found += [
                Bar(f"{where} x {row['batch']}: dense / {name}, decoding", 6.0, row["ratio"][name]["graph"])
                for name in ("windows 64x64", "eviction 64x64")
            ]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="32768,131072")
    parser.add_argument("--seconds", type=float, default=0.15, help="of a timing")
    chosen = parser.parse_args(arguments)
    on_gpu = chosen.device == "cuda"
    plan = Plan((), (), ("cudnn",) if on_gpu else (), 0, chosen.seconds, False)
    plan = dataclasses.replace(plan, device=chosen.device, impl="triton" if on_gpu else "reference")
    if not on_gpu:  # to try the script: no clock, no graph
        module = sys.modules[__name__]
        for name in ("both_ways", "_passes"):
            setattr(
                module, name, lambda *_: {"launches": 1.0, "graph": None, "forward": {"launches": 1.0}, "both": {"launches": 1.0}}
            )
    report = Report(
        chosen.out, Deadline(0), suite="windows", unit="ms, median", dtype="bfloat16", failures=[],
        **environment(f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"),
    )  # fmt: skip

    report.data["command"] = shlex.join(["python", "benchmarks/windows.py", *arguments])

    def measure() -> None:
        prefills = [(Shape.parse("32/2/128:64x64"), int(n)) for n in chosen.tokens.split(",")]
        decodes = [(Shape.parse(f"32/2/{d}:64x64"), 131072 if on_gpu else 1024, 32 if on_gpu else 2) for d in (64, 128)]
        for function, cases in ((prefill, prefills), (decoding, decodes)):
            for case in cases:
                try:
                    report.add(function(report, *case, plan, not on_gpu))
                except GateError as error:
                    report.data["failures"].append(str(error))
                    print(f"not timed: {error}", flush=True)
                gc.collect()

    if on_gpu:
        with torch.cuda.stream(torch.cuda.Stream()):  # capture needs a stream of its own
            measure()
    else:
        measure()
    report.finish(bars(report.data["rows"]))
    return 1 if report.data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
