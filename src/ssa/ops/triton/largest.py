"""The largest of a row of scores: by searching the threshold that `count` of them reach, which costs a few instructions an entry
where sorting costs a few hundred."""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-2147483648)
"""The rank of no entry: below that of every score."""


@triton.jit
def ordered(x):
    """Integers in the order of the floats; -0.0 and 0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_largest(value, count, hint):
    """(flag, place, threshold) of the `count` largest of `value` int32 [X], ties to the lower column; place counts the taken
    ones from the left. NOTHING stands for no value and is never taken. `hint`: a guess at a value that `count` entries reach.

    The threshold is found by a search with three trials a round, between a value that enough entries reach and the maximum.
    """
    X: tl.constexpr = value.shape[0]
    valid = value != NOTHING
    reached = tl.sum(valid.to(tl.int32), 0)
    low = tl.full([], -2147483647, tl.int32)
    if reached > count:
        high = tl.max(value, 0)
        floor = tl.min(tl.where(valid, value, 2147483647), 0)
        low = tl.maximum(floor, hint)
        reached = tl.sum((value >= low).to(tl.int32), 0)
        if reached < count:
            low = floor
            reached = tl.sum(valid.to(tl.int32), 0)
        while (reached != count) & (low < high):
            step = tl.maximum((high.to(tl.int64) - low.to(tl.int64)) >> 2, 1).to(tl.int32)
            a = low + step
            b = tl.minimum(a, high - step) + step
            c = tl.minimum(b, high - step) + step
            if X < 32768:  # two counts fit into one sum
                two = tl.sum((value >= a).to(tl.int32) + ((value >= b).to(tl.int32) << 16), 0)
                reach_a = two & 0xFFFF
                reach_b = two >> 16
            else:
                reach_a = tl.sum((value >= a).to(tl.int32), 0)
                reach_b = tl.sum((value >= b).to(tl.int32), 0)
            reach_c = tl.sum((value >= c).to(tl.int32), 0)
            if reach_c >= count:
                low = c
                reached = reach_c
            elif reach_b >= count:
                low = b
                reached = reach_b
                high = c - 1
            elif reach_a >= count:
                low = a
                reached = reach_a
                high = b - 1
            else:
                high = a - 1
    taken = value >= low
    if reached > count:  # ties at the threshold: the lower columns
        equal = value == low
        room = count - reached + tl.sum(equal.to(tl.int32), 0)
        taken = taken & ((value > low) | (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1, low
