"""`ssa bench kernels`: select, attend, forward and backward beside dense attention, fla-core and FlashMoBA, in one run on one GPU.

Each time is the median of calls as they are launched, and again of replays of a CUDA graph: at 8k tokens the host's launches decide.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.bench.gate import GateError, check, check_layer, gate_tokens
from ssa.bench.kernel_bars import kernel_bars
from ssa.bench.layer import How, layer_row
from ssa.bench.peers import (
    BASELINE,
    DENSE,
    FLEX_TOKENS,
    chosen_peers,
    dense_forward,
    fla_forward,
    fla_refuses,
    flash_moba_forward,
    naive_nsa,
)
from ssa.bench.report import Deadline, Report, environment
from ssa.bench.shapes import Shape, draw, parse_list, parse_tokens
from ssa.bench.timing import LONG_MS, both_ways, extra_memory_gb, first_line, kernel_profile
from ssa.errors import UserError
from ssa.ops import block_means, block_sparse_attention, select_blocks
from ssa.testing import rms_ratio

DEFAULT_TOKENS = "8k,32k,128k"


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    peers: tuple[str, ...]
    flex_tokens: int
    """FlexAttention up to this length only."""
    seconds: float
    """For the repeats of each time."""
    compiled_layer: bool
    device: str = "cuda"
    impl: str = "triton"
    """The implementation on trial."""


def plan(shapes: str, tokens: str, peers: str, quick: bool) -> Plan:
    """The command line's words, understood.

    `quick`: cuDNN and fla-core alone, up to 32k, a quarter of the repeats, no compiled layer; what is named explicitly stays.
    """
    lengths = parse_tokens(tokens or ("8k,32k" if quick else DEFAULT_TOKENS))
    names = chosen_peers(peers)
    if quick and peers == "auto":
        names = tuple(name for name in names if name in (BASELINE, "fla"))
    flex_tokens = FLEX_TOKENS if peers == "auto" else max(lengths)
    return Plan(
        tuple(Shape.parse(part) for part in parse_list(shapes, "--shapes")), tuple(lengths), names, flex_tokens,
        0.05 if quick else 0.2, not quick,
    )  # fmt: skip


def bench_kernels(plan: Plan, out: Path | None, budget_seconds: float) -> int:
    """Measure, write, print; 1 where a gate failed (what it guards is not timed).

    Raises:
        UserError: no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("ssa bench kernels needs a CUDA GPU, and PyTorch finds none here")
    report = Report(
        out, Deadline(budget_seconds), suite="kernels", unit="ms, median", dtype="bfloat16", peers=plan.peers, gates=[], layers=[],
        failures=[], **environment(f"cuda:{torch.cuda.current_device()}"),
    )  # fmt: skip
    report.write()
    with torch.cuda.stream(torch.cuda.Stream()):  # capture needs a stream of its own
        _measure(plan, report)
    report.finish(kernel_bars(report.data["rows"], report.data["layers"]))
    for failure in report.data["failures"]:
        print(f"not timed: {failure}", flush=True)
    return 1 if report.data["failures"] else 0


def _measure(plan: Plan, report: Report) -> None:
    oracle = naive_nsa() if "fla" in plan.peers else None
    right = []
    for shape in plan.shapes:
        if _gate(report, str(shape), functools.partial(check, shape, gate_tokens(shape), plan.device, plan.impl, oracle)):
            right.append(shape)
    dense: dict[tuple[int, ...], dict[str, Any]] = {}
    for i, tokens in enumerate(plan.tokens):
        for shape in right:
            what = f"{shape} at {tokens} tokens"
            if report.out_of_time(what) or not _gate(
                report, what, functools.partial(check, shape, tokens, plan.device, plan.impl)
            ):
                continue
            case = (*shape.dense, tokens)
            start = time.monotonic()
            if case not in dense:
                dense[case] = dense_times(shape, tokens, plan)
            row = {"shape": str(shape), "tokens": tokens, "dense": dense[case]} | sparse_times(
                shape, tokens, plan, profiled=i == 0
            )
            row |= {"ratios": ratios(row), "seconds": round(time.monotonic() - start, 1)}
            report.add(row)
            print(described(row), flush=True)
            gc.collect()
        if i == 0 and right:
            _measure_layer(plan, report, right[0], tokens, "eager")
    if plan.compiled_layer and right:  # last, since its compilation takes longest
        _measure_layer(plan, report, right[0], plan.tokens[0], "compiled")


def _measure_layer(plan: Plan, report: Report, shape: Shape, tokens: int, how: How) -> None:
    what = f"SSA layer, {shape}, {how}"
    if report.out_of_time(what) or not _gate(report, what, functools.partial(check_layer, shape, plan.device, plan.impl)):
        return
    row = layer_row(shape, tokens, how, plan.device)
    report.data["layers"].append(row)
    report.write()
    print(f"{what}: time / dense layer's {row['ratio']}", flush=True)


def _gate(report: Report, case: str, test: Callable[[], dict[str, float]]) -> bool:
    """Whether the test passes; either way the report says so."""
    try:
        report.data["gates"].append({"case": case, "errors": test()})
    except GateError as error:
        report.data["failures"].append(str(error))
        print(f"gate failed: {error}", flush=True)
        return False
    finally:
        report.write()
    return True


def dense_times(shape: Shape, tokens: int, plan: Plan) -> dict[str, Any]:
    """{backend: {"forward", "both", "memory_gb"} or {"error"}}; "both" is forward and backward."""
    q, k, v = draw(shape, tokens, plan.device, torch.bfloat16)
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    results: dict[str, Any] = {}
    for name in plan.peers:
        if name not in DENSE:
            continue
        if name == "flex" and tokens > plan.flex_tokens:
            results[name] = {"error": f"left out above {plan.flex_tokens} tokens; --peers flex measures it"}
            continue
        try:
            with dense_forward(name, leaves[0], leaves[1], leaves[2]) as forward:
                results[name] = _passes(forward, leaves, plan.seconds, inference=name != "flex")
        except Exception as error:  # a backend that refuses the shape, or its compiler
            results[name] = {"error": first_line(error)}
    return results


def sparse_times(shape: Shape, tokens: int, plan: Plan, profiled: bool) -> dict[str, Any]:
    """{"ours", "fla", "flash-moba"}: ours in parts, attention alone by fla-core, and MoBA with its selection by FlashMoBA; "profile" where
    asked for."""
    q, k, v = draw(shape, tokens, plan.device, torch.bfloat16)
    block = shape.budget.block_size

    def select() -> Tensor:
        return select_blocks(q, k, shape.selection, impl=plan.impl)[0]

    def forward() -> Tensor:
        return block_sparse_attention(q, k, v, select(), block_size=block, impl=plan.impl)[0]

    index = select()

    def attend() -> Tensor:
        return block_sparse_attention(q, k, v, index, block_size=block, impl=plan.impl)[0]

    with torch.no_grad():
        ours = {"means": both_ways(lambda: block_means(k, block), plan.seconds), "select": both_ways(select, plan.seconds)}
    ours |= _passes(forward, [q, k, v], plan.seconds)
    alone = _passes(attend, [q, k, v], plan.seconds)
    weight = torch.randn_like(q)
    kept = attend()
    backward = both_ways(lambda: torch.autograd.grad(kept, (q, k, v), weight, retain_graph=True), plan.seconds)
    ours |= {"attend": alone["forward"], "attend_both": alone["both"], "backward": backward}
    row: dict[str, Any] = {"ours": ours}
    if "fla" in plan.peers:
        try:
            reason = fla_refuses(shape)
            row["fla"] = {"error": reason} if reason else _passes(fla_forward(shape, q, k, v, index), [q, k, v], plan.seconds)
        except Exception as error:  # theirs is theirs
            row["fla"] = {"error": first_line(error)}
    if "flash-moba" in plan.peers:
        try:
            moba = flash_moba_forward(shape, q, k, v)
            chosen = select_blocks(q, k, replace(shape.selection, scope="head", scoring="logit"), impl=plan.impl)[0]
            same = block_sparse_attention(q, k, v, chosen, block_size=block, impl=plan.impl)[0]
            row["flash-moba"] = {"difference": rms_ratio(moba(), same)} | _passes(moba, [q, k, v], plan.seconds)
        except Exception as error:  # theirs is theirs
            row["flash-moba"] = {"error": first_line(error)}
    if profiled:
        try:
            row["profile"] = kernel_profile(lambda: torch.autograd.grad(forward(), (q, k, v), weight))
        except RuntimeError as error:  # the profiler may be forbidden where the rest works
            row["profile_error"] = first_line(error)
    return row


def _passes(forward: Callable[[], Tensor], leaves: list[Tensor], seconds: float, inference: bool = True) -> dict[str, Any]:
    """Forward (without autograd if `inference`: FlexAttention would compile a second time), forward and backward, and the peak memory of
    the latter."""
    weight = torch.randn_like(forward())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, weight)

    result: dict[str, Any] = {"both": both_ways(both, seconds), "memory_gb": extra_memory_gb(both)}
    with torch.set_grad_enabled(not inference):
        result["forward"] = both_ways(forward, seconds)
    return result


def ratios(row: dict[str, Any]) -> dict[str, Any]:
    """{"cudnn", "fla", "flash-moba"}: {"forward", "both"}: {"launches", "graph"}, their time over ours; "memory": ours over cuDNN's. The
    "backward" of FlashMoBA is the difference of its two times."""
    ours, baseline, fla, moba = row["ours"], row["dense"].get(BASELINE, {}), row.get("fla", {}), row.get("flash-moba", {})
    if "both" in moba:
        pairs = {way: (moba["both"][way], moba["forward"][way]) for way in ("launches", "graph")}
        alone = {way: None if None in pair else pair[0] - pair[1] for way, pair in pairs.items()}
        moba = moba | {"backward": alone}
    result: dict[str, Any] = {
        BASELINE: {name: _faster(baseline.get(name), ours[name]) for name in ("forward", "both")},
        "fla": {name: _faster(fla.get(name), ours[mine]) for name, mine in (("forward", "attend"), ("both", "attend_both"))},
        "flash-moba": {name: _faster(moba.get(name), ours.get(name)) for name in ("forward", "both", "backward")},
        "memory": None,
    }
    if "memory_gb" in baseline:
        result["memory"] = ours["memory_gb"] / baseline["memory_gb"]
    return result


def _faster(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> dict[str, float | None]:
    if theirs is None or ours is None:
        return {"launches": None, "graph": None}
    graphs = [times["launches"] if times["launches"] > LONG_MS else times["graph"] for times in (theirs, ours)]
    by_graph = None if None in graphs else graphs[0] / graphs[1]
    return {"launches": theirs["launches"] / ours["launches"], "graph": by_graph}


def described(row: dict[str, Any]) -> str:
    """One line a row for the terminal: launched times, replayed ones in brackets."""

    def ms(times: dict[str, Any]) -> str:
        replayed = "" if times["graph"] is None else f" [{times['graph']:.3f}]"
        return f"{times['launches']:.3f}{replayed}"

    ours = row["ours"]
    parts = [f"{name} {ms(ours[name])}" for name in ("select", "attend", "forward", "both")]
    for name, times in (row["dense"] | {"fla alone": row.get("fla", {}), "FlashMoBA": row.get("flash-moba", {})}).items():
        if "forward" in times:
            parts.append(f"{name} {ms(times['forward'])} / {ms(times['both'])}")
    ratio = {name: pair["launches"] for name, pair in row["ratios"][BASELINE].items()}
    if ratio["forward"] is not None:
        parts.append(f"cuDNN / ours {ratio['forward']:.2f}x / {ratio['both']:.2f}x")
    return f"{row['shape']} T={row['tokens']}: " + ", ".join(parts) + f" ({row['seconds']} s)"
