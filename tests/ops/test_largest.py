"""The search for the largest of a row, against sorting."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ssa.ops.triton.largest import NOTHING, take_largest  # noqa: E402

device = os.environ.get("SSA_TEST_DEVICE", "cpu")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not device.startswith("cuda"), reason="with a GPU at hand the kernels are tested there"
)


@triton.jit
def _kernel(values, flags, places, count, hint, X: tl.constexpr):
    i = tl.arange(0, X)
    taken, place, _ = take_largest(tl.load(values + i), count, hint)
    tl.store(flags + i, taken.to(tl.int32))
    tl.store(places + i, place)


@pytest.mark.parametrize("size", [64, 1 << 16])  # counts of two trials fit into one sum, or not
@pytest.mark.parametrize("kind", ["any", "ties", "few", "equal"])
def test_it_takes_what_sorting_would(size, kind):
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(-(2**31) + 1, 2**31 - 1, (size,), generator=generator, dtype=torch.int64, device="cpu")
    if kind == "ties":
        values = values % 5
    if kind == "equal":
        values = torch.full_like(values, -7)
    if kind == "few":
        values[3:] = NOTHING.value
    order = sorted(range(size), key=lambda i: (-int(values[i]), i))
    there = int((values != NOTHING.value).sum())
    on_device = values.to(torch.int32).to(device)
    for count in (0, 1, 15, size):
        for hint in (NOTHING.value, int(values.median())):
            flags, places = torch.empty(2, size, dtype=torch.int32, device=device)
            _kernel[(1,)](on_device, flags, places, count, hint, X=size)
            expected = torch.zeros(size, dtype=torch.int32, device="cpu")
            expected[order[: min(count, there)]] = 1
            assert torch.equal(flags.cpu(), expected)
            assert torch.equal(places.cpu()[expected.bool()], torch.arange(int(expected.sum()), dtype=torch.int32, device="cpu"))
