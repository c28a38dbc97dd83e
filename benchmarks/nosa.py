"""Selectors with memory on real text: FullAttn, SSA, InfLLM-V2, NOSA and SSA over NOSA's selection, trained alike and measured alike.

    ssa prepare TEXT... --out data/33m --train-bpe 16384
    python benchmarks/nosa.py data/33m --out benchmarks/results/h200/nosa

The 33m recipe at a context of 8192, every query reading 16 blocks of 32 keys: 1 sink, 4 local ones, its own, 4 by query and the rest by importance
(InfLLM-V2: all by query; SSA: by block means). Windows are of 16 keys, one every 8. One JSON a run, and a trace of the blocks that the last
512 queries of 4 texts choose, TRACE.npz: int16 [layers, texts, kv heads, queries, places], -1 for none. Finished runs are kept; on one GPU or
several, start it as often as there is room: each process takes the next run that no other has.

What a cache of slots for blocks would miss is replayed from the trace: least recently used blocks make room.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import check_texts, finish, run_each, trained
from torch import Tensor

from ssa.analysis.analyze import analyze
from ssa.attention import AttentionInputs, AttentionRecord
from ssa.budget import Selection
from ssa.config import load_recipe, override
from ssa.data.shards import TokenShards
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.infer.load import load_model
from ssa.model import BlockCache
from ssa.ops import block_sparse_attention, select_blocks

WINDOWS = ["mean_size", "16", "mean_stride", "8", "sink_blocks", "1", "local_blocks", "4"]
DISTIL = ["eviction_loss_weight", "0.1"]


def _over(selector: str, method: str, *options: str) -> list[str]:
    return ["--model.method", method, "--model.selector", selector, "--model.selector-options", *WINDOWS, *options]


def _nosa(by_query: int = 4, *options: str, method: str = "moba") -> list[str]:
    return _over("eviction", method, "query_blocks", str(by_query), *options)


RUNS: dict[str, list[str]] = {
    "infllmv2": _over("windows", "moba"),
    "nosa": _nosa(),
    "ssa-eviction": _nosa(method="ssa"),
    "nosa-distil": _nosa(4, *DISTIL),
    "ssa-eviction-distil": _nosa(4, *DISTIL, method="ssa"),
    "ssa": ["--model.method", "ssa"],
    "full": ["--model.method", "full"],
    "nosa-by-query-0": _nosa(0),
    "nosa-by-query-2": _nosa(2),
    "nosa-by-query-8": _nosa(8),
    "nosa-distil-1": _nosa(4, "eviction_loss_weight", "1.0"),
}
"""Overrides on the recipe, in the order of their worth; NAME-seed-2 is NAME with another seed."""
SHAPE = ["--data.context", "8192", "--train.batch-size", "8", "--model.block-size", "32", "--model.num-selected-blocks", "16"]
BUDGETS = "16x32,32x32,64x32,full"
TEXTS, STEPS = 4, 512
SLOTS = (1.0, 1.25, 1.5, 2.0, 3.0)


def recipe_of(name: str, data: str, extra: list[str], base: str) -> Any:
    arm, seed, number = name.partition("-seed-")
    words = [*SHAPE, *RUNS[arm], *(["--train.seed", number] if seed else []), *extra]
    recipe = override(load_recipe(base), words)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=data))


def misses(trace: np.ndarray, slots: int) -> float:
    """Blocks that a query asks for and does not find, the mean over queries, layers, texts and heads; nothing is there before the first, which
    is not counted."""
    total = count = 0
    for sequence in trace.reshape(-1, *trace.shape[-2:]):
        held: OrderedDict[int, None] = OrderedDict()
        for step, row in enumerate(sequence):
            wanted = [int(n) for n in row if n >= 0]
            missing = [n for n in wanted if n not in held]
            for n in wanted:
                held.pop(n, None)
                held[n] = None  # the newest
            while len(held) > slots:
                held.popitem(last=False)
            if step:
                total, count = total + len(missing), count + 1
    return total / count


def kept_share(trace: np.ndarray) -> float:
    """gamma: the share of a query's blocks that the query before chose, too."""
    now, before = trace[..., 1:, :], trace[..., :-1, :]
    kept = (now[..., :, None] == before[..., None, :]).any(-1) & (now >= 0)
    return float((kept.sum(-1) / (now >= 0).sum(-1)).mean())


@torch.no_grad()
def traced(model: Any, ids_BT: Tensor) -> np.ndarray:
    """The blocks of the last queries [layers, texts, kv heads, queries, places]: decoding chooses what one pass chooses."""
    found: dict[int, Tensor] = {}

    def look(layer: int, record: AttentionRecord) -> None:
        assert record.block_indices is not None
        found[layer] = record.block_indices[:, :, -STEPS:].to(torch.int16).cpu()

    model(ids_BT, attention_mode="sparse", use_cache=False, observer=look, logits_to_keep=1)
    return torch.stack([found[layer] for layer in sorted(found)]).numpy()


@torch.no_grad()
def continued(model: Any, ids_BT: Tensor, first: str, then: str) -> float:
    """Loss of the last tokens in nats, read in the mode `then` after the others were read in the mode `first`."""
    cut, total = ids_BT.shape[1] - STEPS, 0.0
    for row in ids_BT.split(1):
        cache = BlockCache()
        model(row[:, :cut], attention_mode=first, cache=cache, use_cache=True, logits_to_keep=1)
        logits = model(row[:, cut:], attention_mode=then, cache=cache, use_cache=True).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), row[:, cut + 1 :].flatten()).item()
    return total / len(ids_BT)


def without_bias(layer: Any) -> Any:
    """A method that attends without the bias to the blocks that are chosen with it."""
    method, selector = layer.self_attn.method, layer.self_attn.selector

    def call(_: Any, inputs: AttentionInputs, asked: Any) -> Any:
        out = method(selector, inputs, asked)
        if out.block_indices is None:
            return method(selector, dataclasses.replace(inputs, bias_BSK=None, cached=None), asked)
        plain, _lse = block_sparse_attention(
            inputs.q_BTHD, inputs.k_BSKD, inputs.v_BSKD, out.block_indices, block_size=asked.selection.block_size,
            positions=asked.positions_BT, impl=asked.impl,
        )  # fmt: skip
        gated = plain if inputs.gates_BTHG is None else plain * inputs.gates_BTHG.to(plain.dtype)
        return out._replace(out_BTHD=gated, ungated_BTHD=plain)

    return call


@torch.no_grad()
def agnostic_mass(model: Any, ids_BT: Tensor) -> dict[str, Any]:
    """Attention of the dense stream on the blocks chosen by importance, beside as many others: the earliest, random ones, those by query. Means over
    the queries of a text's second half, and what the bias looks like."""
    sums: dict[str, list[float]] = {}

    def look(layer: int, record: AttentionRecord) -> None:
        if record.bias_BSK is None:
            return
        selector = model.model.layers[layer].self_attn.selector
        rule: Selection = selector.rule(record.selection)
        free = rule.num_selected_blocks - rule.forced_blocks - (rule.query_blocks or 0)
        some = dataclasses.replace(rule, num_selected_blocks=rule.forced_blocks + free, query_blocks=0)
        q, k, bias = record.q_BTHD, record.k_BSKD, record.bias_BSK
        generator = torch.Generator("cpu").manual_seed(layer)
        random = torch.randn(bias.shape, generator=generator).to(bias.device)
        chosen = {
            name: select_blocks(q, k, selection, bias=own)[0]
            for name, selection, own in (
                ("importance", some, bias), ("earliest", some, torch.zeros_like(bias)), ("random", some, random),
                ("query", dataclasses.replace(some, query_blocks=None), None),
            )
        }  # fmt: skip
        columns = torch.arange(q.shape[1] // 2, q.shape[1], 16, device=q.device)
        heads, kv_heads, size = q.shape[2], k.shape[2], rule.block_size
        for b in range(len(q)):
            logits = (
                torch.einsum("qkgd,skd->kgqs", q[b, columns].unflatten(1, (kv_heads, -1)).float(), k[b].float())
                * q.shape[3] ** -0.5
            )
            logits = logits + bias[b].T[:, None, None]
            logits = logits.masked_fill(torch.arange(q.shape[1], device=q.device) > columns[:, None], float("-inf"))
            mass = logits.softmax(-1).mean(1).unflatten(-1, (-1, size)).sum(-1)  # [K, Q, N]
            own = columns // size
            number = torch.arange(mass.shape[-1], device=q.device)
            forced = (number < rule.sink_blocks) | (number >= own[:, None] - rule.local_blocks)
            mass = mass.masked_fill(forced, 0.0)
            for name, index in chosen.items():
                blocks = index[b][:, columns].long()
                sums.setdefault(name, []).append(
                    mass.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, 0.0).sum(-1).mean().item()
                )
        sums.setdefault("bias spread", []).append(bias.std(1).mean().item())
        sums.setdefault("|A|", []).append(selector.A.abs().mean().item())
        assert heads % kv_heads == 0

    model(ids_BT, attention_mode="full", use_cache=False, observer=look, logits_to_keep=1)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def measure(run: Path, data: str, max_tokens: int, trace_to: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {"valid": evaluate(run, data=data, budgets=BUDGETS, max_tokens=max_tokens, out=run / "valid")}
    analysis = analyze([run], data=data, max_tokens=65536, out=run / "measured")
    figures["analysis"] = json.loads(analysis.files[0].read_text())
    model = load_model(run)[0]
    context, device = 8192, model.device
    shards = TokenShards(data, "valid")
    ids_BT = torch.stack(
        [torch.from_numpy(shards.read(i * context, (i + 1) * context).astype(np.int64)) for i in range(TEXTS)]
    ).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        trace = traced(model, ids_BT)
        np.savez_compressed(trace_to, trace=trace)
        places = int((trace >= 0).sum(-1).max())
        figures["trace"] = {
            "gamma": kept_share(trace), "misses": {str(x): misses(trace, round(x * places)) for x in SLOTS}, "places": places,
        }  # fmt: skip
        figures["continued"] = {
            f"{first}, then {then}": continued(model, ids_BT, first, then)
            for first, then in (("full", "full"), ("full", "sparse"), ("sparse", "sparse"))
        }
        figures["importance"] = agnostic_mass(model, ids_BT[:2])
        if figures["importance"]:
            for layer in model.model.layers:
                layer.self_attn.method = without_bias(layer)
            figures["continued"]["sparse, then sparse, no bias in attention"] = continued(model, ids_BT, "sparse", "sparse")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="run directories; OUT/runs if left out")
    parser.add_argument("--recipe", default="33m")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--eval-tokens", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    args, extra = parser.parse_known_args()
    names = args.runs.split(",")
    if unknown := [name for name in names if name.partition("-seed-")[0] not in RUNS]:
        parser.error(f"--runs {unknown[0]!r} is not one of {', '.join(RUNS)}")
    check_texts(args.data)
    work = args.work or args.out / "runs"
    recipes = {name: recipe_of(name, args.data, extra, args.recipe) for name in names}
    began = time.time()

    def one(name: str, path: Path) -> str:
        report = trained(name, recipes[name], work / name, path.with_suffix(".trained.json"))
        finish(path, report, functools.partial(measure, work / name, args.data, args.eval_tokens, args.out / f"{name}.npz"))
        return " ".join(str(report["figures"][part]) for part in ("continued", "trace", "importance"))

    return run_each(names, args.out, work, one, lambda *_: time.time() - began > args.seconds)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
