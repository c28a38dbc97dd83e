"""Running block means: both implementations against means of the blocks themselves."""

import importlib.util
import os

import pytest
import torch

from ssa.ops.running_means import extend_block_means

on_gpu = os.environ.get("SSA_TEST_DEVICE", "cpu").startswith("cuda")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (torch.cuda.is_available() and not on_gpu),
    reason="needs triton; with a GPU at hand the kernels are tested there: SSA_TEST_DEVICE=cuda",
)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_token_by_token_equals_the_mean_of_each_block(impl, dtype):
    batch, columns, heads, size, block_size = 2, 17, 3, 24, 4
    # a strided cache, as the model's, and garbage wherever nothing has been written
    k, v = (torch.randn(batch, heads, columns, size).to(dtype).transpose(1, 2) for _ in range(2))
    starts = torch.tensor([0, 3])
    means = [torch.full((batch, 6, heads, size), float("nan"), dtype=dtype) for _ in range(2)]
    sums = [torch.full((batch, heads, size), float("nan"), dtype=torch.float32) for _ in range(2)]
    end = torch.tensor(3)
    for _ in range(3, columns):
        end += 1
        extend_block_means(k, v, means, sums, end, starts, block_size, impl=impl)
    for x, found in zip((k, v), means, strict=True):
        exact = x[0, 4:16].double().view(3, 4, heads, size).mean(1)  # its first block was begun before
        late = x[1, 3:15].double().view(3, 4, heads, size).mean(1)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(found[0, 1:4].double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found[1, :3].double(), late, rtol=tolerance, atol=tolerance)
        assert found[1, 4:].isnan().all() and found[0, 5:].isnan().all()


@needs_triton
def test_the_operator_is_a_good_citizen_of_pytorch():
    from ssa.ops.triton.running_means import extend_block_means_op as operator

    k, v = torch.randn(2, 2, 9, 2, 16)
    arguments = (k, v, *torch.zeros(2, 2, 3, 2, 16), *torch.zeros(2, 2, 2, 16), torch.tensor(7), torch.tensor([0, 2]), 4)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
