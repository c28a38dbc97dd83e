"""Running means of blocks and windows: both implementations against means of the tokens themselves."""

import pytest
import torch
from marks import either, needs_triton

from ssa.ops.running_means import extend_means


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size, stride", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_token_by_token_equals_the_mean_of_each_window(impl, dtype, size, stride):
    batch, columns, heads, width = 2, 17, 3, 24
    # a strided cache, as the model's, and garbage wherever nothing has been written
    k, v = (torch.randn(batch, heads, columns, width).to(dtype).transpose(1, 2) for _ in range(2))
    starts = torch.tensor([0, 3])
    windows = (columns - size) // stride + 1
    means = [torch.full((batch, windows + 1, heads, width), float("nan"), dtype=dtype) for _ in range(2)]
    sums = [torch.full((batch, heads, size // stride, width), float("nan"), dtype=torch.float32) for _ in range(2)]
    end = torch.tensor(3)
    for _ in range(3, columns):
        end += 1
        extend_means([k, v], means, sums, end, starts, size, stride, impl=impl)
    begun = -(-3 // stride)  # windows of the first row before this one began before the sums did
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    for x, found in zip((k, v), means, strict=True):
        for row, first in ((0, begun), (1, 0)):
            own = x[row, int(starts[row]) :].double()
            for j in range(first, (len(own) - size) // stride + 1):
                exact = own[j * stride : j * stride + size].mean(0)
                torch.testing.assert_close(found[row, j].double(), exact, rtol=tolerance, atol=tolerance)
        assert found[1, (columns - 3 - size) // stride + 1 + size // stride : -1].isnan().all()


@either
@pytest.mark.parametrize("size, stride, block", [(4, 2, 4), (4, 2, 8), (4, 2, 2), (4, 4, 4)])
def test_importance_is_the_largest_mean_that_touches_a_block(impl, size, stride, block):
    bias, starts = torch.randn(2, 2, 21, 1).transpose(1, 2), torch.tensor([0, 5])
    blocks = -(-21 // block)
    means, sums = [torch.zeros(2, (21 - size) // stride + 2, 2, 1)], [torch.zeros(2, 2, size // stride, 1)]
    importance, end = torch.full((2, blocks, 2), float("-inf")), torch.tensor(0)
    for _ in range(21):
        end += 1
        extend_means([bias], means, sums, end, starts, size, stride, importance=importance, block_size=block, impl=impl)
        for row, start in enumerate(starts.tolist()):
            own = bias[row, start : int(end), :, 0]
            if start >= int(end):
                continue
            wanted = torch.full((blocks, 2), float("-inf"))
            for j in range(max(0, len(own) - size + stride) // stride):
                for n in range(j * stride // block, (j * stride + size - 1) // block + 1):
                    wanted[n] = torch.maximum(wanted[n], own[j * stride : j * stride + size].mean(0))
            # before its row begins a column counts as the row's first token, of which nothing is complete
            torch.testing.assert_close(importance[row], wanted, rtol=1e-5, atol=1e-6)


@needs_triton
def test_the_operator_is_a_good_citizen_of_pytorch():
    from ssa.ops.triton.running_means import extend_means_op as operator

    k, v = torch.randn(2, 2, 9, 2, 16)
    means, sums = torch.zeros(2, 2, 4, 2, 16), torch.zeros(2, 2, 2, 2, 16)
    ends = (torch.tensor(7), torch.tensor([0, 2]), 4, 2, 4)
    for arguments in ((k, v, *means, *sums, None, *ends), (k, None, means[0], None, sums[0], None, None, *ends)):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
