"""Where tests of operations run, and the selections that several of them make."""

import importlib.util
import os

import pytest
import torch

from ssa.budget import Selection

on_gpu = os.environ.get("SSA_TEST_DEVICE", "cpu").startswith("cuda")
needs_gpu = pytest.mark.skipif(not on_gpu, reason="of a size for a GPU")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (torch.cuda.is_available() and not on_gpu),
    reason="needs triton; with a GPU at hand the kernels are tested there: SSA_TEST_DEVICE=cuda",
)
either = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])


def windows(count, block_size, size, stride, sinks=1, local=1, by_query=None, **more):
    return Selection(
        count, block_size, mean_size=size, mean_stride=stride, sink_blocks=sinks, local_blocks=local, query_blocks=by_query, **more
    )  # fmt: skip
