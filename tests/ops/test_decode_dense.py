"""Dense decoding: each row against attention of the row alone, whatever lies in the columns beside it."""

import pytest
import torch
from test_decode import a_cache

from marks import either, on_gpu
from ssa.ops import compressed_attention, decode_dense, dense_attention
from ssa.testing import attention_oracle, rms_ratio

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if not on_gpu else list(TOLERANCE))
@pytest.mark.parametrize(
    "lengths, starts, changes",
    [
        ((40, 1, 17), (0, 39, 20), {}),
        ((9, 33), None, {"queries": 3, "heads": 6, "size": 20}),
        ((2, 30), (5, 1), {"queries": 8, "heads": 2, "kv_heads": 1}),
        ((40, 21), (0, 3), {"biased": True, "queries": 2}),
        ((0, 5), None, {"heads": 2}),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 6, 1000])
def test_each_row_alone(impl, dtype, lengths, starts, changes, window):
    cache = a_cache(lengths, starts, columns=47, dtype=dtype, **changes)
    cache.pop("block_means")
    out, lse = decode_dense(**cache, window=window, scale=0.3, impl=impl)
    queries = out.shape[1]
    for b, length in enumerate(lengths):
        few = min(queries, length)
        assert not out[b, : queries - few].any() and (lse[b, : queries - few] == float("-inf")).all()
        if not few:
            continue
        cut = slice(starts[b] if starts else 0, (starts[b] if starts else 0) + length)
        q, k, v = (
            x.double() for x in (cache["q"][b : b + 1, queries - few :], cache["k"][b : b + 1, cut], cache["v"][b : b + 1, cut])
        )
        bias = None if cache["bias"] is None else cache["bias"][b : b + 1, cut].double()
        if window is None:
            exact, exact_lse, _ = attention_oracle(q, k, v, bias=bias, scale=0.3)
            torch.testing.assert_close(lse[b, -few:].double(), exact_lse[0], rtol=1e-2, atol=TOLERANCE[dtype] * 5)
        else:
            exact = dense_attention(q, k, v, window=window, bias=bias, scale=0.3)
        assert rms_ratio(out[b, -few:], exact[0]) < TOLERANCE[dtype]


@either
@pytest.mark.parametrize("queries", [1, 5])
def test_block_means_as_keys_are_the_compression_branch(impl, queries):
    lengths = (43, 3, 28)
    cache = a_cache(lengths, columns=47, queries=queries)
    means = cache["block_means"]
    out, _ = decode_dense(cache["q"], means, means * 2, cache["lengths"], per=4, impl=impl)
    for b, length in enumerate(lengths):
        few = min(queries, length)
        q, k = cache["q"][b : b + 1, queries - few :], cache["k"][b : b + 1, :length]
        exact, _ = compressed_attention(q, k, 2 * k, block_size=4, impl="reference")
        torch.testing.assert_close(out[b, -few:], exact[0], rtol=1e-4, atol=1e-5)
    assert not out[1].any() and out[0].any()


@either
def test_what_does_not_fit_is_refused(impl):
    cache = a_cache((9,), columns=12)
    means = cache.pop("block_means")
    with pytest.raises(ValueError, match="window = 0"):
        decode_dense(**cache, window=0, impl=impl)
    with pytest.raises(ValueError, match="leave out starts and window"):
        decode_dense(cache["q"], means, means, cache["lengths"], window=3, per=4, impl=impl)
