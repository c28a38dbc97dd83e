"""The fused parts of a decoder layer against the modules that they stand for (on the CPU by Triton's interpreter, or on a GPU)."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from marks import needs_triton, on_gpu
from ssa.testing import rms_ratio

pytestmark = needs_triton
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE) if on_gpu else [torch.float32, torch.float16]
ROWS = [1, 3, 16, 17]


def linears(dtype, features, *counts, bias=False):
    made = [nn.Linear(features, count, bias=bias, dtype=dtype) for count in counts]
    return made[0] if len(made) == 1 else made


def a_norm(dtype, features):
    norm = LlamaRMSNorm(features, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(features, dtype=dtype)
    return norm


def exact(module):
    wide = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None) if isinstance(module, nn.Linear) else LlamaRMSNorm(len(module.weight), eps=1e-5)  # fmt: skip
    wide.load_state_dict(module.state_dict())
    return wide.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_projections_of_the_normed_input(dtype, rows, bias):
    from ssa.ops.triton.layer import project

    norm, all_of_them = a_norm(dtype, 40), linears(dtype, 40, 48, 16, 20, bias=bias)
    all_of_them.append(linears(dtype, 40, 3))  # a gate has no bias
    x = (3 * torch.randn(rows, 40)).to(dtype)
    for some in (all_of_them, all_of_them[:3], all_of_them[:2], all_of_them[:1]):
        wanted = torch.cat([exact(linear)(exact(norm)(x.double())) for linear in some], 1)
        assert rms_ratio(project(x, norm, some), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_mlp_and_the_way_back_add_to_the_residual(dtype, rows):
    from ssa.ops.triton.layer import mlp, project_back

    norm, x = a_norm(dtype, 40), torch.randn(rows, 40).to(dtype)
    gate, up = linears(dtype, 40, 72, 72)
    down = linears(dtype, 72, 40)
    n = exact(norm)(x.double())
    wanted = x.double() + exact(down)(nn.functional.silu(exact(gate)(n)) * exact(up)(n))
    assert rms_ratio(mlp(x.clone(), norm, gate, up, down), wanted) < TOLERANCE[dtype]
    for bias in (False, True):
        back, attended = linears(dtype, 60, 40, bias=bias), torch.randn(rows, 60).to(dtype)
        assert rms_ratio(project_back(attended, back, x.clone()), x.double() + exact(back)(attended.double())) < TOLERANCE[dtype]


@torch.no_grad()
def test_weights_side_by_side_stay_parameters_of_their_own(tmp_path):
    from ssa.ops.triton.layer import side_by_side

    some = linears(torch.float32, 8, 6, 3, 5)
    before = [linear.weight.clone() for linear in some]
    together = side_by_side(some)
    assert torch.equal(together, torch.cat(before)) and all(torch.equal(x.weight, y) for x, y in zip(some, before, strict=True))
    assert side_by_side(some).data_ptr() == together.data_ptr() == some[0].weight.data_ptr()  # moved once
    some[1].weight.mul_(2)  # whoever trains or loads a weight writes to it
    assert torch.equal(side_by_side(some)[6:9], 2 * before[1])
    some[2].weight = nn.Parameter(torch.ones(5, 8))
    assert torch.equal(side_by_side(some)[9:], torch.ones(5, 8))
    moved = nn.ModuleList(some).double()
    assert torch.equal(side_by_side(list(moved)), torch.cat([before[0], 2 * before[1], torch.ones(5, 8)]).double())


def test_weights_can_be_trained_after_inference():
    from ssa.ops.triton.layer import side_by_side

    some = linears(torch.float32, 8, 6, 3)
    with torch.inference_mode():
        side_by_side(some)
    sum(linear(torch.randn(2, 8)).sum() for linear in some).backward()
    torch.optim.SGD([linear.weight for linear in some], 0.1).step()
    assert all(linear.weight.grad is not None for linear in some)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, queries, rope_rows, gates, keep", [(1, 1, 1, 6, False), (2, 3, 2, 0, True), (3, 9, 1, 18, True)])
def test_rope_and_the_caches_columns(dtype, batch, queries, rope_rows, gates, keep):
    from ssa.ops.triton.layer import rope_and_append

    heads, kv_heads, size, end = 6, 3, 20, 12
    y = torch.randn(batch * queries, (heads + 2 * kv_heads) * size + gates).to(dtype)
    angle = torch.rand(rope_rows, queries, size // 2).repeat(1, 1, 2) * 9
    buffers = [torch.full((batch, kv_heads, 15, size), 7.0, dtype=dtype) for _ in range(2)]
    q, gated, k, v = rope_and_append(
        y, (angle.cos(), angle.sin()), torch.tensor(end), buffers, (queries, heads, kv_heads, size), gates, keep
    )  # fmt: skip
    parts = y.double().view(batch, queries, -1).split([heads * size, kv_heads * size, kv_heads * size, gates], 2)
    exact_q, exact_k, exact_v = (x.unflatten(2, (-1, size)) for x in parts[:3])
    exact_q, exact_k = apply_rotary_pos_emb(exact_q, exact_k, angle.double().cos(), angle.double().sin(), unsqueeze_dim=2)
    assert rms_ratio(q, exact_q) < TOLERANCE[dtype]
    for buffer, wanted, kept in ((buffers[0], exact_k, k), (buffers[1], exact_v, v)):
        assert rms_ratio(buffer[:, :, end - queries : end].transpose(1, 2), wanted) < TOLERANCE[dtype]
        assert (buffer[:, :, : end - queries] == 7).all() and (buffer[:, :, end:] == 7).all()
        assert (kept is None) != keep and (kept is None or rms_ratio(kept, wanted) < TOLERANCE[dtype])
    assert (gated is None) == (gates == 0)
    if gates:
        torch.testing.assert_close(gated.double().view(batch, queries, -1), parts[3].sigmoid(), rtol=1e-5, atol=1e-6)


def test_the_caches_columns_of_rows_that_end_apart():
    from ssa.ops.triton.layer import rope_and_append

    ends, buffers = torch.tensor([12, 7]), [torch.zeros(2, 3, 15, 20) for _ in range(2)]
    y, angle = torch.randn(6, 12 * 20), torch.rand(2, 3, 10).repeat(1, 1, 2)
    _, _, k, v = rope_and_append(y, (angle.cos(), angle.sin()), ends, buffers, (3, 6, 3, 20), 0, True)
    for buffer, new in zip(buffers, (k, v), strict=True):
        for row, end in enumerate(ends.tolist()):
            assert torch.equal(buffer[row, :, end - 3 : end].transpose(0, 1), new[row])
            buffer[row, :, end - 3 : end] = 0
        assert not buffer.any()
