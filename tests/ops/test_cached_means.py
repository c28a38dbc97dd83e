"""Means of a cache's blocks and windows as tokens come: both implementations against means of the tokens themselves."""

import pytest
import torch

from marks import either, needs_triton
from ssa.ops.cached_means import extend_means


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size, stride", [(4, 4), (4, 2), (6, 2), (3, 1), (40, 20)])
@pytest.mark.parametrize("cuts", [(1,) * 17, (5, 1, 7, 4), (17,), (2, 15)])
def test_any_chunks_give_the_mean_of_each_window(impl, dtype, size, stride, cuts):
    if size == 40:
        cuts = [4 * cut for cut in cuts[-4:]]
    columns, heads, width = sum(cuts), 3, 24
    # a strided cache, as the model's, and garbage wherever nothing has been written
    k, v = (torch.full((2, heads, columns, width), float("nan"), dtype=dtype).transpose(1, 2) for _ in range(2))
    starts = torch.tensor([0, 3])
    windows = max(0, columns - size + stride) // stride
    means = [torch.full((2, windows, heads, width), float("nan"), dtype=dtype) for _ in range(2)]
    end = torch.tensor(0)
    for cut in cuts:
        for x in (k, v):
            x[:, int(end) : int(end) + cut] = torch.randn(2, cut, heads, width).to(dtype)
        end += cut
        extend_means([k, v], means, end, starts, cut, size, stride, impl=impl)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    for x, found in zip((k, v), means, strict=True):
        for row in range(2):
            own = x[row, int(starts[row]) :].double()
            complete = max(0, len(own) - size + stride) // stride
            for j in range(complete):
                exact = own[j * stride : j * stride + size].mean(0)
                torch.testing.assert_close(found[row, j].double(), exact, rtol=tolerance, atol=tolerance)
            assert found[row, complete:].isnan().all()


@either
@pytest.mark.parametrize("size, stride, block", [(4, 2, 4), (4, 2, 8), (4, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("cuts", [(1,) * 21, (6, 1, 9, 5)])
def test_importance_is_the_largest_mean_that_touches_a_block(impl, size, stride, block, cuts):
    bias, starts = torch.randn(2, 2, 21, 1).transpose(1, 2), torch.tensor([0, 5])
    blocks = -(-21 // block)
    means = [torch.zeros(2, (21 - size) // stride + 1, 2, 1)]
    importance, end = torch.full((2, blocks, 2), float("-inf")), torch.tensor(0)
    for cut in cuts:
        end += cut
        extend_means([bias], means, end, starts, cut, size, stride, importance=importance, block_size=block, impl=impl)
        for row, start in enumerate(starts.tolist()):
            own = bias[row, start : int(end), :, 0]
            wanted = torch.full((blocks, 2), float("-inf"))
            for j in range(max(0, len(own) - size + stride) // stride):
                for n in range(j * stride // block, (j * stride + size - 1) // block + 1):
                    wanted[n] = torch.maximum(wanted[n], own[j * stride : j * stride + size].mean(0))
            torch.testing.assert_close(importance[row], wanted, rtol=1e-5, atol=1e-6)


@either
def test_rows_that_end_apart_are_as_each_alone(impl):
    x, starts, ends = torch.randn(3, 21, 2, 1), torch.tensor([0, 5, 2]), torch.tensor([20, 17, 9])
    outs = []
    for rows in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)):
        means, importance = [torch.full((3, 9, 2, 1), 7.0)[rows]], torch.full((3, 6, 2), 7.0)[rows]
        end = ends[rows] if rows == slice(0, 3) else ends[rows].squeeze()
        how = {"importance": importance, "block_size": 4, "impl": impl}
        extend_means([x[rows]], means, end - 5, starts[rows], 4, 4, 2, **how)
        extend_means([x[rows]], means, end, starts[rows], 5, 4, 2, **how)
        outs.append((means[0], importance))
    for together, *alone in zip(*outs, strict=True):
        assert torch.equal(together, torch.cat(alone)) and (together != 7).any()


@either
def test_what_was_cut_off_leaves_no_trace(impl):
    """Tokens that were drafted and dropped: what comes in their place decides, in means and in importance."""
    x, starts = torch.randn(1, 12, 1, 1), torch.tensor([0])
    means, importance = [torch.zeros(1, 5, 1, 1)], torch.full((1, 3, 1), float("-inf"))
    how = {"importance": importance, "block_size": 4, "impl": impl}
    wild = x.clone()
    wild[:, 6:] = 100.0
    extend_means([wild], means, torch.tensor(11), starts, 11, 4, 2, **how)
    for end in (7, 8, 9, 10, 11, 12):
        extend_means([x], means, torch.tensor(end), starts, 1, 4, 2, **how)
    exact = x[0, :, 0, 0].unfold(0, 4, 2).mean(1)
    torch.testing.assert_close(means[0].flatten(), exact)
    torch.testing.assert_close(importance.flatten(), torch.stack([exact[:2].max(), exact[1:4].max(), exact[3:].max()]))


@needs_triton
def test_the_operator_is_a_good_citizen_of_pytorch():
    from ssa.ops.triton.cached_means import extend_means_op as operator

    k, v = torch.randn(2, 2, 9, 2, 16)
    means, ends = torch.zeros(2, 2, 4, 2, 16), (torch.tensor(7), torch.tensor([0, 2]), 2, 4, 2, 4)
    for arguments in ((k, v, *means, None, *ends), (k, None, means[0], None, None, *ends)):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
