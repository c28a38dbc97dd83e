"""`ssa bench decode`: one decoding step of one layer, selection from cached block means and attention, beside PyTorch's dense attention.

Every row is checked before it is timed: chosen blocks and outputs against the reference, dense backends against a plain softmax. Times are
medians in ms with a cold L2 cache: "graph" replayed from a CUDA graph, as a serving engine runs it, "launches" as Python launches it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from ssa.bench.gate import GateError
from ssa.bench.peers import BACKENDS
from ssa.bench.report import Deadline, Report, environment
from ssa.bench.shapes import Shape, parse_list, parse_tokens
from ssa.bench.timing import both_ways, first_line, kernel_profile
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import block_means, decode_attention
from ssa.ops.dense import VARLEN_NAMES_GQA
from ssa.testing import rms_ratio

Step = Callable[[], Any]
WAYS = ("graph", "launches")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    """Keys in the cache."""
    batches: tuple[int, ...]
    queries: int
    """Tokens that a row decodes at once; dense attention is timed beside 1."""
    flex: bool
    device: str = "cuda"
    impl: str = "triton"
    """The implementation on trial."""


def plan(shapes: str, tokens: str, batches: str, queries: int, flex: bool) -> Plan:
    """The command line's words, understood.

    Raises:
        UserError: one of them names nothing.
    """
    rows = []
    for part in parse_list(batches, "--batches"):
        if not part.isdecimal() or not int(part):
            raise UserError(f"--batches {part!r} is not a number of rows; write e.g. 1,8,32")
        rows.append(int(part))
    if queries < 1:
        raise UserError(f"--queries {queries} must be at least 1")
    parsed = tuple(Shape.parse(part) for part in parse_list(shapes, "--shapes"))
    for shape in parsed:
        if shape.scope == "head":
            raise UserError(f"shape {str(shape)!r}: decoding is measured with heads that choose together; leave out @head")
    return Plan(parsed, tuple(parse_tokens(tokens)), tuple(rows), queries, flex)


def bench_decode(plan: Plan, out: Path | None, budget_seconds: float) -> int:
    """Measure, write, print; 1 where a result was wrong (such a row is not timed).

    Raises:
        UserError: no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("ssa bench decode needs a CUDA GPU, and PyTorch finds none here")
    report = Report(
        out, Deadline(budget_seconds), suite="decode", unit="ms, median, cold L2", dtype="bfloat16", failures=[],
        **environment(f"cuda:{torch.cuda.current_device()}"),
    )  # fmt: skip
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():  # capture needs a stream of its own
        measure_all(plan, report)
    report.finish([])
    return 1 if report.data["failures"] else 0


def measure_all(plan: Plan, report: Report) -> None:
    """A row of the report for every shape, length and batch."""
    for shape in plan.shapes:
        for tokens in plan.tokens:
            for batch in plan.batches:
                what = f"{shape} at {tokens} tokens, {batch} rows"
                if report.out_of_time(what):
                    continue
                try:
                    row = measure(plan, shape, tokens, batch)
                except GateError as error:
                    report.data["failures"].append(f"{what}: {error}")
                    report.write()
                    print(f"not timed: {what}: {error}", flush=True)
                    continue
                report.add(row)
                print(described(row), flush=True)
                if plan.device == "cuda":
                    torch.cuda.empty_cache()


def measure(plan: Plan, shape: Shape, tokens: int, batch: int) -> dict[str, Any]:
    """One row.

    Raises:
        GateError: ours is not what the reference gives.
    """
    q, k, v = cached(shape, tokens, batch, plan)
    means = torch.cat([block_means(k[b : b + 1], shape.budget.block_size) for b in range(batch)])
    row: dict[str, Any] = {"shape": str(shape), "batch": batch, "tokens": tokens, "queries": plan.queries}
    row["errors"] = check(plan, q, k, v, means, shape.selection)
    lengths = torch.full((batch,), tokens, device=q.device, dtype=torch.int32)

    def sparse() -> Any:
        return decode_attention(q, k, v, means, lengths, shape.selection, impl=plan.impl)

    row |= {"sparse": both_ways(sparse), "kernels": kernel_profile(sparse, repeats=20)}
    if plan.queries == 1:
        steps = dense_steps(q, k, v) | ({"flex, gqa": flex_step(q, k, v)} if plan.flex else {})
        row["dense"] = dense_times(steps, dense_first_row(q, k, v))
        row |= best(row)
    return row


def cached(shape: Shape, tokens: int, batch: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal q [B, T, H, D], and keys and values [B, S, K, D] as the cache holds them: views of [B, K, S, D]."""
    generator = torch.Generator(plan.device).manual_seed(tokens)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=plan.device, dtype=torch.bfloat16)

    q = normal(batch, plan.queries, shape.heads, shape.head_dim)
    k, v = (normal(batch, shape.kv_heads, tokens, shape.head_dim).transpose(1, 2) for _ in range(2))
    return q, k, v


def check(plan: Plan, q: Tensor, k: Tensor, v: Tensor, means: Tensor, selection: Selection) -> dict[str, float]:
    """Errors of the first rows, ragged, against the reference in fp64.

    Raises:
        GateError: they are too large.
    """
    rows, tokens = min(2, len(q)), k.shape[1]
    lengths = torch.tensor([tokens, tokens - tokens // 3], device=q.device, dtype=torch.int32)[:rows]
    q, k, v, means = (x[:rows] for x in (q, k, v, means))
    out, lse, index = decode_attention(q, k, v, means, lengths, selection, impl=plan.impl)
    q, k, v, means = (x.double() for x in (q, k, v, means))
    gold_out, gold_lse, gold = decode_attention(q, k, v, means, lengths, selection, impl="reference")
    same = (index == gold).all(-1)
    readers = same.repeat_interleave(q.shape[2] // index.shape[1], 1).transpose(1, 2)
    errors = {
        "queries_equal": same.double().mean().item(),
        # near-ties may flip: of a query that differs, one block of the budget at most
        "blocks_equal": (index[..., :, None] == gold[..., None, :]).any(-1).double().mean().item(),
        "out": rms_ratio(out[readers], gold_out[readers]),
        "lse": (lse - gold_lse)[readers].abs().max().item(),
    }
    if not (errors["blocks_equal"] > 0.98 and errors["out"] < 5e-3 and errors["lse"] < 1e-3):
        raise GateError(f"not the reference's results: {errors}")
    return errors


def dense_steps(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Step]:
    """PyTorch's dense attention of the last token: with grouped heads as they are, and with a group's heads as queries of their kv head,
    which reads keys once a group in every backend. Results are [B, H, 1, D], [B, K, G, D], [B, H, D] and [B * G, K, D]."""
    batch, _, heads, size = q.shape
    tokens, kv_heads = k.shape[1:3]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    one = q.transpose(1, 2)
    grouped = q.view(batch, kv_heads, heads // kv_heads, size)
    steps: dict[str, Step] = {}
    for name, backend in BACKENDS.items():

        def sdpa(query: Tensor, gqa: bool, backend: Any = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, enable_gqa=gqa)

        steps[f"{name}, gqa"] = functools.partial(sdpa, one, True)
        steps[f"{name}, group as queries"] = functools.partial(sdpa, grouped, False)

    def flat(x: Tensor) -> Tensor:  # packed copies, made once
        return x.reshape(-1, *x.shape[2:]).contiguous()

    ends = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
    packed = {"gqa": (flat(q), 1), "group as queries": (flat(grouped.transpose(1, 2)), heads // kv_heads)}
    flat_k, flat_v = flat(k), flat(v)
    for name, (query, count) in packed.items():

        def varlen(query: Tensor = query, count: int = count) -> Any:
            grouped: dict[str, Any] = {"enable_gqa": count == 1} if VARLEN_NAMES_GQA else {}
            return varlen_attn(query, flat_k, flat_v, ends * count, ends * tokens, count, tokens, **grouped)

        steps[f"varlen, {name}"] = varlen
    return steps


def flex_step(q: Tensor, k: Tensor, v: Tensor) -> Step:
    compiled = torch.compile(flex_attention, dynamic=False)
    one, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(one, keys, values, enable_gqa=True)


def dense_first_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of the first row in fp32, [K, G, D]."""
    kv_heads, size = k.shape[2:]
    grouped = q[0, 0].float().view(kv_heads, -1, size)
    weights = (torch.einsum("kgd,skd->kgs", grouped, k[0].float()) * size**-0.5).softmax(-1)
    return torch.einsum("kgs,skd->kgd", weights, v[0].float())


def dense_times(steps: dict[str, Step], exact_KGD: Tensor) -> dict[str, Any]:
    """{backend: times or {"error"}}; a backend whose first row is not `exact_KGD` has an error, and no time."""
    results: dict[str, Any] = {}
    kv_heads, group, _ = exact_KGD.shape
    for name, step in steps.items():
        try:
            result = step()
            out = (result[0] if isinstance(result, tuple) else result).flatten()[: exact_KGD.numel()]
            if name == "varlen, group as queries":
                out = out.view(group, kv_heads, -1).transpose(0, 1).flatten()
            error = rms_ratio(out, exact_KGD.flatten())
            results[name] = both_ways(step) if error < 2e-2 else {"error": f"is not dense attention: off by {error:.3g}"}
        except (RuntimeError, ImportError, TypeError) as error:  # a backend that does not take the shape, or an older PyTorch
            results[name] = {"error": first_line(error)}
    return results


def best(row: dict[str, Any]) -> dict[str, Any]:
    """{"best": {way: the fastest dense backend}, "ratio": {way: its time over ours}}; None where there is none."""
    found: dict[str, dict[str, Any]] = {"best": {}, "ratio": {}}
    for way in WAYS:
        timed = {name: times[way] for name, times in row["dense"].items() if times.get(way)}
        fastest = min(timed, key=timed.__getitem__) if timed else None
        ours = row["sparse"][way]
        found["best"][way] = fastest
        found["ratio"][way] = timed[fastest] / ours if fastest and ours else None
    return found


def described(row: dict[str, Any]) -> str:
    """One line a row for the terminal, in microseconds."""
    parts = [f"{way} {1000 * row['sparse'][way]:.1f} us" for way in WAYS if row["sparse"][way]]
    for way, ratio in row.get("ratio", {}).items():
        if ratio is not None:
            parts.append(f"{row['best'][way]} / ours by {way} {ratio:.2f}x")
    return f"{row['shape']} S={row['tokens']} B={row['batch']}: " + ", ".join(parts)
