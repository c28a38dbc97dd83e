"""What SSA's training costs beside plain dense attention: both streams, gate and alignment of one layer, forward and backward.

Projections and RoPE, which both have in common, are left out: the ratio of whole layers is smaller.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ssa.attention import AttentionCall, AttentionInputs, HeadShape
from ssa.attention.selectors.means import MeansSelector
from ssa.bench.gate import draw_gates
from ssa.bench.shapes import Shape, draw
from ssa.bench.timing import Call, both_ways, extra_memory_gb, first_line
from ssa.budget import AttentionMode
from ssa.methods import method_named

How = Literal["eager", "compiled"]
ALIGNMENT_WEIGHT = 10.0  # the paper's alpha


def layer_step(method: str, mode: AttentionMode, shape: Shape, inputs: tuple[Tensor, ...], compiled: bool) -> Call:
    """Forward and backward of one attention layer of `method`, its gate included; SSA with alignment."""
    attention = method_named(method).load()()
    selector = MeansSelector(HeadShape(*shape.dense))
    call = AttentionCall(mode, shape.selection, align=method_named(method).draws_stream, impl="auto")

    def losses(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor | None]:
        out, _, _, alignment, _ = attention(selector, AttentionInputs(q, k, v, gates), call)
        return out, None if alignment is None else ALIGNMENT_WEIGHT * alignment.sum()

    run = torch.compile(losses, dynamic=False) if compiled else losses
    weight = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        out, alignment = run(*inputs)
        outputs, weights = ([out], [weight]) if alignment is None else ([out, alignment], [weight, None])
        return torch.autograd.grad(outputs, inputs, weights)

    return step


def layer_row(shape: Shape, tokens: int, how: How, device: str = "cuda") -> dict[str, Any]:
    """Times of the dense layer and of SSA's under either stream, and their ratio."""
    inputs = (*draw(shape, tokens, device, torch.bfloat16), draw_gates(shape, tokens, device))
    cases: dict[str, tuple[str, AttentionMode]] = {
        "dense": ("full", "full"), "ssa_full": ("ssa", "full"), "ssa_sparse": ("ssa", "sparse"),
    }  # fmt: skip
    times: dict[str, Any] = {}
    for name, (method, mode) in cases.items():
        step = layer_step(method, mode, shape, inputs, how == "compiled")
        try:
            times[name] = both_ways(step) | {"memory_gb": extra_memory_gb(step)}
        except Exception as error:  # of the compiler, say
            times[name] = {"error": first_line(error)}
    ratio = {way: _ratio(times, way) for way in ("launches", "graph")}
    return {"shape": str(shape), "tokens": tokens, "how": how, "times": times, "ratio": ratio}


def _ratio(times: dict[str, Any], way: str) -> float | None:
    """SSA's time, the mean of its two streams (they take turns), over dense attention's."""
    values = [times[name].get(way) for name in ("ssa_full", "ssa_sparse", "dense")]
    if None in values:
        return None
    return (values[0] + values[1]) / 2 / values[2]
