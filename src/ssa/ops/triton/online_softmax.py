"""Softmax over keys that come a step at a time: running maximum, sum and weighted values of every row.

Start with a peak of `LOWEST`, which no finite logit is below and a masked one (-inf) is: a masked key then gets 2^-inf = 0 whether or not
the row has seen a key yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.triton.numerics import LOG2E, natural_log

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite number of fp32."""


@triton.jit
def softmax_step(logits, values, peak, total, acc, PRECISION: tl.constexpr):
    """(peak, total, acc) after `logits` [rows, keys], natural and masked, and `values` [keys, D]."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    p = tl.exp2((logits - higher[:, None]) * LOG2E)
    shrink = tl.exp2((peak - higher) * LOG2E)
    acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def softmax_end(total, acc):
    """(output, log of the total) of every row; 0 and -inf of rows without keys. The log-sum-exp is the peak plus the log."""
    empty = total == 0.0
    return acc / tl.where(empty, 1.0, total)[:, None], tl.where(empty, float("-inf"), natural_log(total))


@triton.jit
def store_lse(lse, row, peak, log, mask, BIAS: tl.constexpr):
    """Log-sum-exps for `load_lse`; with a bias, which may be as low as it likes, as two numbers: in -1e9 + log(3) no digit of the log is left."""
    if BIAS:
        tl.store(lse + 2 * row, peak, mask=mask)
        tl.store(lse + 2 * row + 1, log, mask=mask)
    else:
        tl.store(lse + row, peak + log, mask=mask)


@triton.jit
def load_lse(lse, row, mask, other: tl.constexpr, BIAS: tl.constexpr):
    """(peak, log), without a bias (log-sum-exp, 0). Where `mask` is not: `other`."""
    if BIAS:
        peak = tl.load(lse + 2 * row, mask=mask, other=other)
        log = tl.load(lse + 2 * row + 1, mask=mask, other=other)
    else:
        peak = tl.load(lse + row, mask=mask, other=other)
        log = tl.zeros_like(peak)
    return peak, log
