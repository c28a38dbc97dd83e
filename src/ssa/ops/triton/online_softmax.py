"""Softmax over keys that come a step at a time: running maximum, sum and weighted values of every row.

Start with a peak of -1e30, which is below every logit and above a masked one (-inf): a masked key then gets 2^-inf = 0 whether or not
the row has seen a key yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.triton.numerics import LOG2E, natural_log


@triton.jit
def softmax_step(logits, values, peak, total, acc, PRECISION: tl.constexpr):
    """(peak, total, acc) after `logits` [rows, keys], natural and masked, and `values` [keys, D]."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    p = tl.exp2((logits - higher[:, None]) * LOG2E)
    shrink = tl.exp2((peak - higher) * LOG2E)
    acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def softmax_end(peak, total, acc):
    """(output, log-sum-exp) of every row; 0 and -inf of rows without keys."""
    empty = total == 0.0
    return acc / tl.where(empty, 1.0, total)[:, None], tl.where(empty, float("-inf"), peak + natural_log(total))
