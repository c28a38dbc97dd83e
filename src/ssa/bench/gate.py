"""No speed of a wrong result: what is about to be timed is compared with the reference in fp64 on the same bf16 inputs first.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, M selected blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssa.attention import AttentionCall, AttentionInputs, HeadShape
from ssa.attention.selectors.means import MeansSelector
from ssa.attention.ssa import SSA
from ssa.bench.shapes import Shape, draw
from ssa.budget import AttentionMode
from ssa.ops import block_means, block_sparse_attention, select_blocks
from ssa.testing import RMS_RATIO, rms_ratio

SCORE_ERROR = 1e-3
"""Largest relative error of a selected block's score, sorted by score: near-ties may change places."""
ROWS_EQUAL = 0.99
"""Smallest share of queries whose selection is the exact one; what differs beyond near-ties fails by its scores."""
WHOLE = 2048
"""Rows up to this length are compared whole, longer ones in three windows of `WINDOW` queries."""
WINDOW = 64
TINY = 1e-7
"""Softmax scores below it are compared as if they were it."""


class GateError(AssertionError):
    """A result is wrong; the message says which and by how much."""


def gate_tokens(shape: Shape) -> int:
    """A length at which every case occurs: queries with fewer blocks than they may read, many with more, a last incomplete block."""
    return 3 * shape.budget.tokens // 2 + 37


def check(shape: Shape, tokens: int, device: str, impl: str, oracle: Any = None) -> dict[str, float]:
    """Errors of selection, output and all gradients at this length.

    Long rows are checked in windows of queries: the backward pass then gets a gradient that is zero elsewhere, so that what the keys
    receive comes from these queries alone, and the reference needs no others.

    Args:
        impl: The implementation on trial.
        oracle: fla-core's `naive_nsa_selection`, a second opinion on the output; only for rows that are compared whole.

    Raises:
        GateError: a result is wrong, or two backward passes differ in a bit.
    """
    q, k, v = draw(shape, tokens, device, torch.bfloat16)
    block = shape.budget.block_size
    index, score = select_blocks(q, k, shape.selection, impl=impl)
    out, lse = block_sparse_attention(q, k, v, index, block_size=block, impl=impl)
    windows = _windows(tokens)
    weight = torch.zeros_like(q)
    for a, b in windows:
        weight[:, a:b].normal_(generator=torch.Generator(device).manual_seed(a))
    grads = torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)
    again = torch.autograd.grad(out, (q, k, v), weight)
    if not all(torch.equal(x, y) for x, y in zip(grads, again, strict=True)):
        raise GateError(f"{shape} at {tokens} tokens: two backward passes differ")

    errors: dict[str, float] = {"rows_equal": 1.0, "score_error": 0.0}
    gold_k, gold_v = (torch.zeros(x.shape, dtype=torch.float64, device=device) for x in (k, v))
    for a, b in windows:
        exact = [x.detach()[:, cut].double().requires_grad_() for x, cut in ((q, slice(a, b)), (k, slice(b)), (v, slice(b)))]
        means = block_means(k.detach()[:, :b], block).double()
        wanted, wanted_score = select_blocks(exact[0], exact[1], shape.selection, block_keys=means, impl="reference")
        rows_equal, score_error = _selection_errors(index[:, :, a:b], score[:, :, a:b], wanted, wanted_score)
        gold, gold_lse = block_sparse_attention(
            exact[0], exact[1], exact[2], index[:, :, a:b].contiguous(), block_size=block, impl="reference"
        )
        d_q, d_k, d_v = torch.autograd.grad(gold, exact, weight[:, a:b].double())
        gold_k[:, :b] += d_k
        gold_v[:, :b] += d_v
        found = {
            "score_error": score_error, "out": rms_ratio(out[:, a:b], gold), "lse": rms_ratio(lse[:, a:b], gold_lse),
            "dq": rms_ratio(grads[0][:, a:b], d_q),
        }  # fmt: skip
        errors["rows_equal"] = min(errors["rows_equal"], rows_equal)
        errors |= {name: max(errors.get(name, 0.0), value, key=_badness) for name, value in found.items()}
    errors |= {"dk": rms_ratio(grads[1], gold_k), "dv": rms_ratio(grads[2], gold_v)}
    if oracle is not None and shape.scope == "group" and tokens <= WHOLE:
        other = oracle(q.detach(), k.detach(), v.detach(), index.transpose(1, 2).long(), block_size=block)
        errors["out_naive_nsa"] = rms_ratio(out, other)
    return _passed(errors, f"{shape} at {tokens} tokens")


def check_layer(shape: Shape, device: str, impl: str) -> dict[str, float]:
    """Errors of SSA's training layer (both streams, gate, alignment) under either stream: outputs, both losses, gradients of q, k, v
    and the gate.

    Raises:
        GateError: one is wrong.
    """
    tokens = gate_tokens(shape)
    inputs = (*draw(shape, tokens, device, torch.bfloat16), draw_gates(shape, tokens, device))
    weight = torch.randn(inputs[0].shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    # selection is the other gate's business: were it made anew in fp64, block means of another rounding would flip near-ties
    index, _ = select_blocks(*inputs[:2], replace(shape.selection, scope="group"), impl=impl)
    errors: dict[str, float] = {}
    modes: tuple[AttentionMode, ...] = ("full", "sparse")
    for mode in modes:
        actual = _layer_results(mode, [x.detach().requires_grad_() for x in inputs], shape, impl, weight, None)
        exact = _layer_results(mode, [x.detach().double().requires_grad_() for x in inputs], shape, "reference", weight, index)
        for name in actual:
            errors[f"{mode}_{name}"] = rms_ratio(actual[name], exact[name])
    # gradients of two streams, each rounded, are added
    return _passed(errors, f"the SSA layer, {shape} at {tokens} tokens", 2 * RMS_RATIO[torch.bfloat16])


def draw_gates(shape: Shape, tokens: int, device: str | torch.device) -> Tensor:
    """Seeded gates in 0..1, fp32 [1, T, H, 1], as the model makes them."""
    generator = torch.Generator(device).manual_seed(tokens + 1)
    return torch.rand(1, tokens, shape.heads, 1, generator=generator, device=device).requires_grad_()


def _layer_results(
    mode: AttentionMode, leaves: list[Tensor], shape: Shape, impl: str, weight: Tensor, index: Tensor | None
) -> dict[str, Tensor]:
    selector = MeansSelector(HeadShape(*shape.dense))
    if index is not None:
        selector.select = lambda *_: index  # type: ignore[method-assign, assignment]
    call = AttentionCall(mode, shape.selection, align=True, impl=impl)
    q, k, v, gates = leaves
    out, _, _, alignment, _ = SSA()(selector, AttentionInputs(q, k, v, gates), call)
    assert alignment is not None  # asked for
    # the sum over elements keeps the alignment's gradient as large as the output's
    loss = (out.double() * weight).sum() + out.numel() * alignment.double().sum()
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out, "alignment": alignment} | dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=True))


def _badness(error: float) -> float:
    """NaN is worse than anything; `max` alone would lose it."""
    return math.inf if math.isnan(error) else error


def _windows(tokens: int) -> list[tuple[int, int]]:
    if tokens <= WHOLE:
        return [(0, tokens)]
    middle = tokens // 2 + 1  # astride of block borders
    return [(a, a + WINDOW) for a in (0, middle, tokens - WINDOW)]


def _selection_errors(index: Tensor, score: Tensor, wanted: Tensor, wanted_score: Tensor) -> tuple[float, float]:
    """(share of rows with the same blocks, largest relative score error by rank)."""
    rows_equal = (index == wanted).all(-1).double().mean().item()
    ours, theirs = score.double().sort(-1).values, wanted_score.double().sort(-1).values
    finite = torch.isfinite(theirs)
    # own block +inf, padding -inf, in the same numbers
    if not torch.equal(ours[~finite], theirs[~finite]) or not torch.equal(finite, torch.isfinite(ours)):
        return rows_equal, float("inf")
    error = (ours[finite] - theirs[finite]).abs() / theirs[finite].abs().clamp(min=TINY)
    return rows_equal, error.max().item() if error.numel() else 0.0


def _passed(errors: dict[str, float], what: str, largest: float = RMS_RATIO[torch.bfloat16]) -> dict[str, float]:
    def fine(name: str, value: float) -> bool:
        if name == "rows_equal":
            return value >= ROWS_EQUAL
        return value <= (SCORE_ERROR if name == "score_error" else largest)  # NaN is not fine

    if wrong := [f"{name} {value:.3g}" for name, value in errors.items() if not fine(name, value)]:
        raise GateError(f"{what} is wrong: {', '.join(wrong)}")
    return errors
