"""Decoding with windows and importance: against selection and attention of whole rows; the Triton kernels against the reference (on the CPU by
Triton's interpreter, or on the GPU named by SSA_TEST_DEVICE). What a row has not completed, and what it cannot choose, holds NaN."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from marks import either, needs_triton, on_gpu, windows
from ssa.budget import COARSER
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, decode_attend, decode_attention, decode_select, dense_attention, select_blocks
from ssa.ops.windows import block_importance, window_means
from ssa.testing import assert_near_exact, attention_oracle, poisoned_empty

NAN = float("nan")


def a_cache(selection, lengths, starts=None, *, columns, queries=1, heads=4, kv_heads=2, size=16, dtype=torch.float32, row_blocks=None, seed=0):  # fmt: skip
    """Queries and a cache that holds NaN wherever nobody may look."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)

    rows, block, wide = len(lengths), selection.block_size, torch.promote_types(dtype, torch.float32)
    length, stride = selection.mean_size, selection.mean_stride
    k, v = (torch.full((rows, columns, kv_heads, size), NAN, dtype=dtype) for _ in range(2))
    bias = torch.full((rows, columns, kv_heads), NAN, dtype=wide)
    # a little room beyond the row: `decode_select` has to take as many tokens as there is room for means of
    room = columns + length + stride
    means = torch.full((rows, selection.num_windows(columns) + 1, kv_heads, size), NAN, dtype=dtype)
    coarse = torch.full((rows, selection.num_windows(room, COARSER), kv_heads, size), NAN, dtype=dtype)
    importance = torch.full((rows, -(-room // block), kv_heads), NAN, dtype=wide)
    for b, tokens in enumerate(lengths):
        cut = slice(starts[b] if starts else 0, (starts[b] if starts else 0) + tokens)
        k[b, cut], v[b, cut], bias[b, cut] = draw(tokens, kv_heads, size), draw(tokens, kv_heads, size), draw(tokens, kv_heads)
        for x, factor in ((means, 1), (coarse, COARSER)):
            complete = window_means(k[b : b + 1, cut], factor * length, factor * stride)[0]
            x[b, : len(complete)] = complete
        worth = window_means(bias[b : b + 1, cut, :, None], length, stride)[..., 0]
        worth = block_importance(worth, selection.windows_per_block, selection.windows_before)[0]
        candidates = max(0, (tokens - 1) // block - selection.local_blocks)
        importance[b, :candidates] = worth[:candidates]
    tensors = {"lengths": torch.tensor(lengths, dtype=torch.int32), "starts": torch.tensor(starts) if starts else None}
    more = {"bias": bias, "coarse_means": coarse, "importance": importance, "selection": selection}
    if row_blocks:
        more["row_blocks"] = torch.tensor(row_blocks, dtype=torch.int32)
    return {"q": draw(rows, queries, heads, size), "k": k, "v": v, "block_means": means} | tensors | more


def row_alone(cache, b):
    """Row b by the operations for whole rows, by its own budget where there is one for each: (out, lse, block_indices) of the queries that the
    row is long enough for."""
    start, length = 0 if cache["starts"] is None else int(cache["starts"][b]), int(cache["lengths"][b])
    cut, selection = slice(start, start + length), cache["selection"]
    q = cache["q"][b : b + 1, max(0, cache["q"].shape[1] - length) :]
    k, v, bias = (cache[name][b : b + 1, cut] for name in ("k", "v", "bias"))
    places = selection.places
    if "row_blocks" in cache:
        selection = replace(selection, num_selected_blocks=int(cache["row_blocks"][b]))
    index, _ = select_blocks(q, k, selection, bias=bias, impl="reference")
    out, lse = block_sparse_attention(q, k, v, index, block_size=selection.block_size, bias=bias, impl="reference")
    return out, lse, pad(index, (0, places - index.shape[3]), value=-1)


def choose(cache, impl):
    names = ("q", "block_means", "lengths", "selection", "coarse_means", "importance", "row_blocks")
    return decode_select(**{name: cache[name] for name in names if name in cache}, impl=impl)


def in_two(cache, impl):
    """(out, lse, block_indices), chosen first and attended to then."""
    index = choose(cache, impl)
    rest = {name: cache[name] for name in ("q", "k", "v", "lengths", "starts", "bias")}
    return *decode_attend(**rest, block_indices=index, block_size=cache["selection"].block_size, impl=impl), index


CASES = {
    "ragged": dict(selection=windows(5, 8, 4, 2), lengths=[90, 37, 8, 1], columns=92),
    "importance, left padding, odd sizes": dict(
        selection=windows(6, 8, 4, 2, 1, 1, 1), lengths=[75, 2, 50], starts=[3, 76, 28], columns=81, queries=3, heads=6, size=24
    ),
    "importance alone": dict(selection=windows(6, 8, 8, 4, 1, 2, 0), lengths=[85, 40], columns=90, queries=2),
    "windows longer than a block": dict(selection=windows(6, 8, 16, 8, 1, 1, 1), lengths=[85, 40], columns=90, queries=2),
    "windows of a block": dict(selection=windows(4, 8, 8, 8, 0, 0, 2), lengths=[85, 40], columns=90, queries=2, heads=2),
    "coarse normaliser": dict(
        selection=windows(6, 8, 4, 2, 1, 1, 2, lse="coarse"), lengths=[90, 20, 12], columns=90, queries=3, kv_heads=1
    ),
    "heads choose": dict(selection=windows(6, 8, 4, 2, 1, 1, 2, scope="head"), lengths=[85, 40], columns=90, queries=2),
    "logits": dict(selection=windows(5, 8, 4, 2, scoring="logit"), lengths=[85, 40], columns=90),
    "dense at first": dict(selection=windows(5, 8, 4, 2, 1, 1, 1, dense_length=50), lengths=[85, 51, 33], columns=90, queries=4),
    "more blocks asked for than there are": dict(selection=windows(20, 8, 4, 2, 1, 1, 2), lengths=[85, 11], columns=90, queries=2),
    "fewer columns than a window": dict(selection=windows(5, 32, 16, 8, 1, 1, 1), lengths=[5, 3], columns=6),
    "eight queries": dict(selection=windows(6, 8, 4, 2, 1, 1, 1), lengths=[85, 6], columns=90, queries=8, kv_heads=1),
    "an empty row": dict(selection=windows(6, 8, 4, 2, 1, 1, 1), lengths=[0, 61], columns=70, queries=2),
    "half precision": dict(selection=windows(6, 8, 4, 2, 1, 1, 1), lengths=[85, 40], columns=90, dtype=torch.float16),
    "a budget a row": dict(
        selection=windows(9, 8, 4, 2, 2, 1), lengths=[90, 37, 66, 70], starts=[0, 40, 3, 2], columns=92, row_blocks=[9, 5, 4, 7]
    ),
    "a budget a row, importance, several queries": dict(
        selection=windows(12, 8, 4, 2, 1, 1, 2), lengths=[90, 75, 80, 2], starts=[0, 15, 3, 2], columns=92, queries=3,
        row_blocks=[12, 5, 7, 5],
    ),
    "a budget a row, heads choose, coarse": dict(
        selection=windows(7, 8, 4, 2, 1, 1, 1, scope="head", lse="coarse"), lengths=[90, 75], columns=92, queries=2, row_blocks=[4, 6]
    ),
    "a budget a row, dense at first": dict(
        selection=windows(6, 8, 4, 2, 1, 1, 1, dense_length=60), lengths=[85, 61, 33], columns=90, queries=4, row_blocks=[4, 5, 6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_reference_equals_every_row_alone(name):
    cache = a_cache(**CASES[name])
    out, lse, index = decode_attention(**cache, impl="reference")
    twice = in_two(cache, "reference")
    both = min(index.shape[3], twice[2].shape[3])
    assert torch.equal(out, twice[0]) and torch.equal(lse, twice[1]) and torch.equal(index[..., :both], twice[2][..., :both])
    queries, tolerance = cache["q"].shape[1], 1e-5 if out.dtype == torch.float32 else 1e-3
    for b, length in enumerate(cache["lengths"].tolist()):
        missing = max(0, queries - length)
        assert (out[b, :missing] == 0).all() and (lse[b, :missing] == -float("inf")).all() and (index[b, :, :missing] == -1).all()
        if length:
            alone, both = row_alone(cache, b), cache["selection"].places
            assert torch.equal(index[b, :, missing:], alone[2][0][..., :both])
            torch.testing.assert_close(out[b, missing:], alone[0][0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[b, missing:], alone[1][0], rtol=tolerance, atol=tolerance)


def check_kernels(cache):
    expected_out, expected_lse, expected = decode_attention(**cache, impl="reference")
    with poisoned_empty():
        out, lse, index = decode_attention(**cache, impl="triton")
        twice = in_two(cache, "triton")
    both = min(index.shape[3], twice[2].shape[3])
    assert index.dtype == torch.int32 and torch.equal(index[..., :both], twice[2][..., :both])
    assert torch.equal(out, twice[0]) and torch.equal(lse, twice[1])
    assert (index[..., expected.shape[3] :] == -1).all()
    same = (index[..., : expected.shape[3]] == expected).all(-1).all(1)  # near-ties flip
    assert same.double().mean() > (0.98 if on_gpu else 0.999)
    torch.testing.assert_close(lse[same], expected_lse[same], rtol=1e-4, atol=1e-4)
    exact_cache = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in cache.items()}
    exact, _, exact_index = decode_attention(**exact_cache, impl="reference")
    same &= (exact_index == expected).all(-1).all(1)
    assert_near_exact(out[same], expected_out[same], exact[same], 3, "out")


@needs_triton
@pytest.mark.parametrize(
    ("name", "tiles"), [(name, "small") for name in CASES] + [(name, "as shipped") for name in ("ragged", "coarse normaliser")]
)
def test_the_kernels_equal_the_reference(monkeypatch, name, tiles):
    from ssa.ops.triton import decode as kernels

    if tiles == "small":  # many spans and parts in rows that the interpreter gets through
        monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
        monkeypatch.setattr(kernels, "PART_KEYS", 16)
    check_kernels(a_cache(**CASES[name]))


@either
@pytest.mark.parametrize("name", ["windows", "importance", "coarse"])
def test_decoding_is_the_end_of_a_whole_pass(impl, name):
    """The last 1 to 8 queries at every length, across blocks that begin and windows that end."""
    selection = {
        "windows": windows(4, 8, 4, 2), "importance": windows(5, 8, 4, 2, 1, 1, 1), "coarse": windows(5, 8, 4, 2, lse="coarse"),
    }[name]  # fmt: skip
    whole = a_cache(selection, [70], columns=70, queries=70, kv_heads=1, heads=2)
    out, _, index = row_alone(whole, 0)
    for queries in range(1, 9):
        length = 71 - queries if impl == "triton" else None  # the interpreter takes its time: one length each
        for tokens in [length] if length else range(max(queries, 40), 71, 3):
            cache = a_cache(selection, [tokens], columns=70, queries=queries, kv_heads=1, heads=2)
            full = a_cache(selection, [70], columns=70, queries=1, kv_heads=1, heads=2)
            means = window_means(full["k"][:, :tokens], 4, 2)
            cache["k"][:, :tokens], cache["v"][:, :tokens] = full["k"][:, :tokens], full["v"][:, :tokens]
            cache["bias"][:, :tokens], cache["block_means"][:, : means.shape[1]] = full["bias"][:, :tokens], means
            coarse = window_means(full["k"][:, :tokens], 16, 8)
            cache["coarse_means"][:, : coarse.shape[1]] = coarse
            candidates = (tokens - 1) // 8 - 1
            cache["importance"][:, :candidates] = full["importance"][:, :candidates]
            cache["q"] = whole["q"][:, tokens - queries : tokens]
            found, _, chosen = decode_attention(**cache, impl=impl)
            assert torch.equal(chosen, index[:, :, tokens - queries : tokens])
            torch.testing.assert_close(found, out[:, tokens - queries : tokens], rtol=1e-4, atol=1e-5)


@either
def test_fault_1_the_bias_is_added_after_scaling(impl):
    """softmax(q.k / sqrt(D) + bias), not softmax((q.k + bias) / sqrt(D)), at D = 64."""
    cache = a_cache(windows(5, 8, 4, 2, 1, 1, 1), [60], columns=60, size=64)
    cache["bias"] *= 2
    out, lse, index = decode_attention(**cache, impl=impl)
    q, k, v = (cache[name].double() for name in ("q", "k", "v"))
    wanted, wanted_lse, _ = attention_oracle(q, k, v, index, block_size=8, bias=cache["bias"])
    wrong, _, _ = attention_oracle(q, k, v, index, block_size=8, bias=cache["bias"] / 8)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    assert (wrong - wanted).abs().max() > 0.1


@either
def test_fault_2_rows_of_a_batch_rank_by_their_own_importance_and_windows(impl):
    cache = a_cache(windows(5, 8, 4, 2, 1, 1, 1), [60, 60, 45], columns=60)
    _, _, index = decode_attention(**cache, impl=impl)
    for b in range(3):
        own = {n: x if n == "selection" or x is None else x[b : b + 1] for n, x in cache.items()}
        assert torch.equal(decode_attention(**own, impl=impl)[2], index[b : b + 1])
    swapped = cache | {"importance": cache["importance"].roll(1, 0)}
    assert not torch.equal(decode_attention(**swapped, impl=impl)[2][:1], index[:1])


@either
def test_a_row_with_as_many_blocks_as_it_has_reads_everything(impl):
    cache = a_cache(windows(12, 8, 4, 2, 1, 1, 2), [90, 60], [0, 5], columns=92, queries=2, row_blocks=[12, 7])
    out, _, index = decode_attention(**cache, impl=impl)
    assert index.shape[3] == 12 and (index >= 0).sum(-1)[:, 0].tolist() == [[12, 12], [7, 7]]
    for b, dense in enumerate((True, False)):  # the second has 8
        cut = slice(int(cache["starts"][b]), int(cache["starts"][b] + cache["lengths"][b]))
        k, v, bias = (cache[name][b : b + 1, cut] for name in ("k", "v", "bias"))
        everything = dense_attention(cache["q"][b : b + 1], k, v, bias=bias)
        assert torch.allclose(out[b], everything[0], rtol=1e-4, atol=1e-5) == dense


@needs_triton
def test_row_blocks_out_of_range_stay_within_the_rows_places():
    """On a GPU nobody looks at them."""
    from ssa.ops.triton import decode_windows as kernels

    cache = a_cache(windows(6, 8, 4, 2, 1, 1, 1), [90] * 4, columns=90)
    rows = torch.tensor([-5, 3, 6, 2**31 - 1], dtype=torch.int32)
    tensors = (cache[name] for name in ("q", "block_means", "coarse_means", "importance", "lengths"))
    with poisoned_empty():
        index = kernels.decode_select_windows(*tensors, 8, 6, 6, [4, 2, 1, 1, 1, 0], "group", "softmax", 0.25, rows)
    assert (index >= 0).sum(-1)[:, :, 0].tolist() == [[3, 3], [3, 3], [6, 6], [6, 6]]


@needs_triton
def test_ties_go_to_the_lower_block(monkeypatch):
    from ssa.ops.triton import decode as kernels

    monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
    cache = a_cache(windows(8, 4, 4, 2, 1, 1, 3), [120], columns=120)
    for name in ("block_means", "importance"):
        cache[name][:] = 1.0
    assert choose(cache, "triton")[0].tolist() == [[[0, 1, 2, 3, 4, 5, 28, 29]]] * 2


@needs_triton
def test_long_rows():
    cache = a_cache(windows(6, 4, 4, 2, 1, 1, 2), [2100, 640], columns=2100, heads=2, kv_heads=1)
    check_kernels(cache)


@needs_triton
def test_fault_15_results_do_not_depend_on_room_neighbours_or_repetition():
    """Splits of a row go by its blocks, never by the memory that a cache has taken."""
    cache = a_cache(windows(6, 8, 4, 2, 1, 1, 1), [57, 40], [2, 20], columns=60, queries=2)
    once, again = (decode_attention(**cache, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    rows = ("k", "v", "bias", "block_means", "coarse_means", "importance")
    wider = {n: torch.cat([x, x[:, :37]], 1) if n in rows else x for n, x in cache.items()}
    second = {n: x if n == "selection" else x[1:] for n, x in cache.items()}
    for a, b, c in zip(once, decode_attention(**wider, impl="triton"), decode_attention(**second, impl="triton"), strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


@needs_triton
def test_any_strides():
    cache = a_cache(windows(6, 8, 4, 2, 1, 1, 1, lse="coarse"), [57, 40], columns=60)
    expected = decode_attention(**cache, impl="triton")
    for name in ("q", "k", "v", "bias", "block_means", "coarse_means", "importance"):
        cache[name] = cache[name].transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(expected, decode_attention(**cache, impl="triton"), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_the_operators_are_good_citizens_of_pytorch():
    from ssa.ops.triton.decode_windows import decode_select_windows_op, decode_windows_op

    cache = a_cache(windows(5, 4, 4, 2, 1, 1, 1), [30, 9], [0, 20], columns=30)
    q, k, v, means, coarse, importance, lengths, starts, bias = (
        cache[n] for n in ("q", "k", "v", "block_means", "coarse_means", "importance", "lengths", "starts", "bias")
    )
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for rows in (None, torch.tensor([5, 4], dtype=torch.int32)):
        choice = (lengths, 4, 5, 5, [4, 2, 1, 1, 1, 0], "group", "softmax", 0.25, rows)
        torch.library.opcheck(decode_select_windows_op, (q, means, coarse, importance, *choice), test_utils=checks)
        torch.library.opcheck(decode_windows_op, (q, means, None, importance, *choice, k, v, starts, bias), test_utils=checks)


@needs_triton
def test_it_compiles_into_one_graph():
    cache = a_cache(windows(5, 8, 4, 2, 1, 1, 1, lse="coarse"), [60, 20], columns=60, queries=2)
    selection = cache.pop("selection")

    def call(**x):
        return *decode_attention(**x, selection=selection, impl="triton"), *in_two(x | {"selection": selection}, "triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**cache), call(**cache), strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_reach_in():
    cache = a_cache(**CASES["coarse normaliser"])
    expected = decode_attention(**cache, impl="reference")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        for a, b in zip(expected, decode_attention(**cache, impl="reference"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not on_gpu, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("more", [{}, {"lse": "coarse"}, {"dense_length": 600}], ids=str)
def test_a_captured_graph_serves_other_lengths(more):
    selection = windows(12, 16, 8, 4, 1, 2, 3, **more)
    cache = a_cache(selection, [1000, 600], columns=1200, queries=2, size=64, dtype=torch.bfloat16)
    # of any length: a shorter row's candidates are among the longest's
    lengths = cache["lengths"].clone()

    def step():
        return *decode_attention(**cache, impl="triton"), *in_two(cache, "triton")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for shorter in (0, 3, 130, 499):
        cache["lengths"].copy_(lengths - shorter)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
        expected = decode_attention(**cache, impl="reference")[2]
        assert (captured[2][..., : expected.shape[3]] == expected).double().mean() > 0.98


@pytest.mark.skipif(not on_gpu, reason="of a size for a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
def test_the_released_sizes_on_a_gpu(dtype, size):
    selection = windows(64, 64, 32, 16, 1, 16, 15)
    check_kernels(a_cache(selection, [20_480, 20_011, 4031, 900], columns=20_500, heads=32, queries=2, size=size, dtype=dtype))


@pytest.mark.skipif(not on_gpu, reason="of a size for a GPU")
def test_fault_8_offsets_beyond_31_bits():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU of 40 GB")
    selection, rows, columns, kv_heads, size = windows(64, 64, 32, 16, 1, 16, 15), 9, 131_072, 8, 256
    k, v = (torch.randn(rows, columns, kv_heads, size, dtype=torch.bfloat16) for _ in range(2))
    assert k.numel() > 1 << 31
    bias = torch.randn(rows, columns, kv_heads)
    worth = block_importance(window_means(bias[..., None], 32, 16)[..., 0], 4, 1)
    means = torch.cat([window_means(k[b : b + 1], 32, 16) for b in range(rows)])
    q, lengths = torch.randn(rows, 1, 32, size, dtype=torch.bfloat16), torch.full((rows,), columns)
    whole = decode_attention(q, k, v, means, lengths, selection, bias=bias, importance=worth, impl="triton")
    last = [x[-1:] for x in (q, k, v, means, lengths)]
    for impl in ("triton", "reference"):
        alone = decode_attention(*last, selection, bias=bias[-1:], importance=worth[-1:], impl=impl)
        torch.testing.assert_close(whole[0][-1:], alone[0], rtol=2e-2, atol=2e-2)
        assert (whole[2][-1:] == alone[2]).double().mean() > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_means": torch.zeros(2, 28, 2, 16)}, r"block_means \(2, 28, 2, 16\) .* each of 29 blocks or windows"),
        ({"coarse_means": None}, "lse = 'coarse' needs coarse_means of every coarse window"),
        ({"coarse_means": torch.zeros(2, 1, 2, 16)}, "lse = 'coarse' needs coarse_means of every coarse window"),
        ({"importance": None}, "query_blocks choose the other blocks by importance: pass importance"),
        ({"importance": torch.zeros(2, 6, 2)}, r"importance \(2, 6, 2\) is not \[B, N, K\] = \[2, at least 7, 2\]"),
        ({"importance": torch.zeros(1, 9, 2)}, r"importance \(1, 9, 2\) is not \[B, N, K\]"),
        ({"q": torch.zeros(2, 9, 4, 16)}, "9 queries"),
        ({"row_blocks": torch.tensor([6, 3], dtype=torch.int32)}, r"row_blocks \[6, 3\] must lie between 4, .*, and 6"),
        ({"row_blocks": torch.tensor([6, 4])}, "row_blocks .2,. of torch.int64"),
    ],
)
def test_errors(change, message):
    if on_gpu and "must lie" in message:
        pytest.skip("row_blocks are not looked at on a GPU")
    cache = a_cache(windows(6, 8, 4, 2, 1, 1, 1, lse="coarse"), [60, 30], columns=60)
    decode_attention(**cache)
    with pytest.raises(UserError, match=message) as error:
        decode_attention(**(cache | change))
    assert "\n" not in str(error.value)
