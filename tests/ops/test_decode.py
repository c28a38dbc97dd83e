"""Decoding: the reference against selection and attention of every row alone, the Triton kernels against the reference (on the CPU
by Triton's interpreter, or on the GPU named by SSA_TEST_DEVICE)."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from marks import either, needs_triton, on_gpu
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import (
    block_means,
    block_sparse_attention,
    decode_attend,
    decode_attention,
    decode_select,
    dense_attention,
    select_blocks,
)
from ssa.testing import assert_near_exact, poisoned_empty


def a_cache(lengths, starts=None, *, columns, queries=1, heads=4, kv_heads=2, size=16, block_size=4, dtype=torch.float32, biased=False, seed=0):  # fmt: skip
    """Queries and a cache whose unused columns and incomplete blocks hold NaN."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)

    rows, nan = len(lengths), float("nan")
    k, v = (torch.full((rows, columns, kv_heads, size), nan, dtype=dtype) for _ in range(2))
    means = torch.full((rows, columns // block_size + 1, kv_heads, size), nan, dtype=dtype)
    bias = torch.full((rows, columns, kv_heads), nan, dtype=dtype) if biased else None
    for b, length in enumerate(lengths):
        cut = slice(starts[b] if starts else 0, (starts[b] if starts else 0) + length)
        k[b, cut], v[b, cut] = draw(length, kv_heads, size), draw(length, kv_heads, size)
        if bias is not None:
            bias[b, cut] = draw(length, kv_heads)
        means[b, : length // block_size] = block_means(k[b : b + 1, cut], block_size)[0]
    tensors = {"lengths": torch.tensor(lengths, dtype=torch.int32), "bias": bias}
    if starts:
        tensors["starts"] = torch.tensor(starts)
    return {"q": draw(rows, queries, heads, size), "k": k, "v": v, "block_means": means} | tensors


def row_alone(cache, b, options):
    """Row b by the public operations, by a budget of its own where the options have one for each: out, lse, block_indices of the queries that
    the row is long enough for."""
    start, length = int(cache["starts"][b]) if "starts" in cache else 0, int(cache["lengths"][b])
    cut = slice(start, start + length)
    q = cache["q"][b : b + 1, max(0, cache["q"].shape[1] - length) :]
    k, v = cache["k"][b : b + 1, cut], cache["v"][b : b + 1, cut]
    bias = None if cache["bias"] is None else cache["bias"][b : b + 1, cut]
    scale, selection = options.get("scale"), options["selection"]
    own = int(options["row_blocks"][b]) if "row_blocks" in options else selection.num_selected_blocks
    index, _ = select_blocks(q, k, replace(selection, num_selected_blocks=own), scale=scale, impl="reference")
    out, lse = block_sparse_attention(q, k, v, index, block_size=selection.block_size, bias=bias, scale=scale, impl="reference")
    return out, lse, pad(index, (0, selection.num_selected_blocks - own), value=-1)


def in_two(cache, options, impl):
    """(out, lse, block_indices), chosen first and attended to then."""
    selection, scale = options["selection"], options.get("scale")
    index = decode_select(cache["q"], cache["block_means"], cache["lengths"], **options, impl=impl)
    rest = {name: x for name, x in cache.items() if name != "block_means"}
    return *decode_attend(**rest, block_indices=index, block_size=selection.block_size, scale=scale, impl=impl), index


def paged(cache, index, block_size, shift=0):
    """What `decode_attend` takes where nothing but the chosen blocks is at hand, shuffled, and NaN between them. `shift`: by so many blocks the
    slots are wrong."""
    (rows, selectors, queries, count), kv_heads = index.shape, cache["k"].shape[2]
    sharing = selectors // kv_heads
    places = [torch.randperm(sharing * queries * count + 2) for _ in range(rows * kv_heads)]
    slots = torch.stack([p[:-2] for p in places]).view(index.shape)
    pages = sharing * queries * count + 2
    place = torch.arange(block_size)
    token = index[..., None] * block_size + place
    there = (index[..., None] >= 0) & (token < cache["lengths"].view(-1, 1, 1, 1, 1))
    start = cache["starts"].view(-1, 1, 1, 1, 1) if "starts" in cache else 0
    b, r = there.nonzero()[:, 0], there.nonzero()[:, 1] // sharing
    moved = {}
    for name in ("k", "v", "bias"):
        x = cache[name]
        if x is not None:
            x = x.new_full((rows, pages * block_size, *x.shape[2:]), float("nan"))
            x[b, (slots[..., None] * block_size + place)[there], r] = cache[name][b, (start + token)[there], r]
        moved[name] = x
    slots = ((slots + shift) % pages).masked_fill(index < 0, -1).to(torch.int32)
    return moved | {
        "q": cache["q"],
        "lengths": cache["lengths"],
        "block_indices": index,
        "slots": slots,
        "block_size": block_size,
    }


# what the cache is like, what the call asks
CASES = {
    "ragged": (dict(lengths=[60, 37, 4, 1], columns=60), dict(num_selected_blocks=4)),
    "several queries, left padding, bias, odd sizes": (
        dict(lengths=[45, 2, 30], starts=[3, 46, 18], columns=51, queries=3, heads=6, size=24, biased=True),
        dict(num_selected_blocks=5),
    ),
    "heads choose by logits": (
        dict(lengths=[50, 23], columns=64, queries=2, block_size=3),
        dict(num_selected_blocks=3, scope="head", scoring="logit"),
    ),
    "group of logits, own scale": (dict(lengths=[50], columns=50), dict(num_selected_blocks=3, scoring="logit", scale=0.7)),
    "a span that only the last query sees": (
        dict(lengths=[68, 132, 64], columns=140, queries=3),
        dict(num_selected_blocks=4),
    ),
    "released rule": (dict(lengths=[100, 15], columns=100, queries=2), dict(num_selected_blocks=4, rule="released")),
    "own block only": (dict(lengths=[17, 9], columns=20, heads=2), dict(num_selected_blocks=1)),
    "fewer columns than a block": (dict(lengths=[5, 3], columns=6, block_size=16), dict(num_selected_blocks=2)),
    "more blocks asked for than there are": (dict(lengths=[30, 11], columns=40, queries=3), dict(num_selected_blocks=20)),
    "one head, one key a block": (
        dict(lengths=[90, 33], columns=100, heads=1, kv_heads=1, block_size=1),
        dict(num_selected_blocks=7),
    ),
    "half precision": (dict(lengths=[80, 31], columns=80, dtype=torch.float16), dict(num_selected_blocks=6)),
    "eight queries": (dict(lengths=[70, 6], columns=70, queries=8, kv_heads=1), dict(num_selected_blocks=5)),
    "an empty row": (dict(lengths=[0, 31], columns=40, queries=2), dict(num_selected_blocks=3)),
    "a budget a row": (dict(lengths=[60, 37, 61, 50], columns=62), dict(num_selected_blocks=16, row_blocks=[16, 3, 1, 7])),
    "a budget a row, several queries, left padding, bias": (
        dict(lengths=[45, 2, 30], starts=[3, 46, 18], columns=51, queries=3, biased=True),
        dict(num_selected_blocks=9, row_blocks=[2, 1, 9]),
    ),
    "a budget a row, heads choose by logits": (
        dict(lengths=[50, 63, 31], columns=64, queries=3, block_size=3),
        dict(num_selected_blocks=6, scope="head", scoring="logit", row_blocks=[5, 1, 6]),
    ),
}


def case(name):
    cache, options = CASES[name]
    more = {"scale": options["scale"]} if "scale" in options else {}
    if "row_blocks" in options:
        more["row_blocks"] = torch.tensor(options["row_blocks"], dtype=torch.int32)
    chosen = {key: x for key, x in options.items() if key not in more}
    return a_cache(**cache), {"selection": Selection(block_size=cache.get("block_size", 4), **chosen)} | more


@pytest.mark.parametrize("name", CASES)
def test_the_reference_equals_every_row_alone(name):
    cache, options = case(name)
    out, lse, index = decode_attention(**cache, **options, impl="reference")
    for a, b in zip((out, lse, index), in_two(cache, options, "reference"), strict=True):
        assert torch.equal(a, b)
    queries, tolerance = cache["q"].shape[1], 1e-5 if out.dtype == torch.float32 else 1e-3
    from_pages = decode_attend(
        **paged(cache, index, options["selection"].block_size), scale=options.get("scale"), impl="reference"
    )
    for a, b in zip(from_pages, (out, lse), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for b, length in enumerate(cache["lengths"].tolist()):
        missing = max(0, queries - length)
        assert (out[b, :missing] == 0).all() and (lse[b, :missing] == float("-inf")).all() and (index[b, :, :missing] == -1).all()
        if length:
            alone = row_alone(cache, b, options)
            assert torch.equal(index[b, :, missing:], alone[2][0])
            torch.testing.assert_close(out[b, missing:], alone[0][0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[b, missing:], alone[1][0], rtol=tolerance, atol=tolerance)


def check_kernels(cache, options):
    expected_out, expected_lse, expected = decode_attention(**cache, **options, impl="reference")
    with poisoned_empty():
        out, lse, index = decode_attention(**cache, **options, impl="triton")
        twice = in_two(cache, options, "triton")
        from_pages = decode_attend(
            **paged(cache, index, options["selection"].block_size), scale=options.get("scale"), impl="triton"
        )
    assert index.dtype == torch.int32 and index.shape == expected.shape
    assert all(torch.equal(a, b) for a, b in zip((out, lse, index), twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((out, lse), from_pages, strict=True))
    same = (index == expected).all(-1).all(1)  # near-ties flip
    assert same.double().mean() > (0.98 if on_gpu else 0.999)
    torch.testing.assert_close(lse[same], expected_lse[same], rtol=1e-4, atol=1e-4)
    exact_cache = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in cache.items()}
    exact, _, exact_index = decode_attention(**exact_cache, **options, impl="reference")
    same &= (exact_index == expected).all(-1).all(1)
    assert_near_exact(out[same], expected_out[same], exact[same], 3, "out")


@needs_triton
@pytest.mark.parametrize(
    ("name", "tiles"), [(name, "small") for name in CASES] + [(name, "as shipped") for name in ("ragged", "half precision")]
)
def test_the_kernels_equal_the_reference(monkeypatch, name, tiles):
    from ssa.ops.triton import decode as kernels

    if tiles == "small":  # many spans and parts in rows that the interpreter gets through
        monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
        monkeypatch.setattr(kernels, "PART_KEYS", 16)
    check_kernels(*case(name))


@needs_triton
@pytest.mark.parametrize("value", [float("-inf"), -1e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("part_keys", [16, 1024])
def test_a_bias_may_mask_every_key_of_a_block_and_of_a_row(monkeypatch, part_keys, value):
    from ssa.ops.triton import decode as kernels

    monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
    monkeypatch.setattr(kernels, "PART_KEYS", part_keys)
    cache = a_cache([55, 61, 38], columns=64, queries=2, biased=True)
    cache["bias"][0, :55] = value  # all that the row has, in its last block less than elsewhere
    cache["bias"][1, 56:61, 0] = value  # its last blocks, for one kv head
    cache["bias"][2, 1:38] = value
    options = {"selection": Selection(9, 4)}
    check_kernels(cache, options)
    out, lse, _ = decode_attention(**cache, **options, impl="triton")
    masked = value == float("-inf")
    assert (out[0] == 0).all() == masked and (lse[0] == float("-inf")).all() == masked and torch.isfinite(lse[1]).all()


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_slot_beside_the_right_one_is_seen(impl):
    cache, options = case("heads choose by logits")
    out, _, index = decode_attention(**cache, **options, impl=impl)
    for shift, same in ((0, True), (1, False)):
        pages = {n: x.nan_to_num(1.0) if n in ("k", "v") else x for n, x in paged(cache, index, 3, shift).items()}
        assert torch.allclose(decode_attend(**pages, impl=impl)[0], out, rtol=1e-4, atol=1e-5) == same


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_budget_beyond_the_rows_chooses_all_their_blocks(impl):
    cache = a_cache([150, 33], columns=152, block_size=4)
    _, _, fused = decode_attention(**cache, selection=Selection(100, 4), impl=impl)
    index = decode_select(cache["q"], cache["block_means"], cache["lengths"], Selection(100, 4), impl=impl)
    both = min(fused.shape[3], index.shape[3])
    assert (
        torch.equal(index[..., :both], fused[..., :both]) and (index[..., both:] == -1).all() and (fused[..., both:] == -1).all()
    )
    assert (index[0] >= 0).sum(-1).tolist() == [[38]] * 2


@either
def test_a_row_with_as_many_blocks_as_it_has_reads_everything(impl):
    cache = a_cache([60, 37, 61], [1, 20, 0], columns=61, queries=2, biased=True)
    out, _, index = decode_attention(
        **cache, selection=Selection(16, 4), row_blocks=torch.tensor([16, 10, 15], dtype=torch.int32), impl=impl
    )
    assert index.shape[3] == 16 and (index >= 0).sum(-1)[:, 0].tolist() == [[15, 15], [9, 10], [15, 15]]
    for b, dense in enumerate((True, True, False)):  # the last has 16
        start, length = int(cache["starts"][b]), int(cache["lengths"][b])
        k, v, bias = (cache[name][b : b + 1, start : start + length] for name in ("k", "v", "bias"))
        everything = dense_attention(cache["q"][b : b + 1], k, v, bias=bias)
        assert torch.allclose(out[b], everything[0], rtol=1e-4, atol=1e-5) == dense


@needs_triton
def test_row_blocks_out_of_range_stay_within_the_rows_places():
    """On a GPU nobody looks at them."""
    from ssa.ops.triton import decode as kernels

    q, _, _, means, lengths = (a_cache([60, 60, 60, 60], columns=60)[n] for n in ("q", "k", "v", "block_means", "lengths"))
    rows = torch.tensor([-3, 0, 5, 2**31 - 1], dtype=torch.int32)
    with poisoned_empty():
        index = kernels.decode_select(q, means, lengths, 4, 5, "group", "softmax", "exact", 0.25, rows)
    assert (index >= 0).sum(-1)[:, :, 0].tolist() == [[1, 1], [1, 1], [5, 5], [5, 5]]


@needs_triton
@pytest.mark.parametrize("options", [{}, {"rule": "released"}, {"scope": "head"}], ids=str)
def test_long_rows(options):
    cache = a_cache([4200, 2099, 640], columns=4200, heads=2, kv_heads=1, block_size=4)
    check_kernels(cache, {"selection": Selection(4, 4, **options)})


@needs_triton
@pytest.mark.parametrize("sharpness", [40.0, 1e-3])
def test_extreme_logits(sharpness):
    cache = a_cache([150], columns=150, block_size=2)
    cache["q"] *= sharpness
    options = {"selection": Selection(4, 2)}
    _, _, index = decode_attention(**cache, **options, impl="triton")
    index_all, score = select_blocks(cache["q"], cache["k"], Selection(75, 2), impl="reference")
    assert torch.equal(index_all[0, 0, 0], torch.arange(75, dtype=torch.int32))
    for head in range(2):
        picked = index[0, head, 0].long()
        rest = torch.ones(75, dtype=torch.bool).scatter(0, picked, False)
        assert picked[-1] == 74 and len(picked.unique()) == 4
        assert score[0, head, 0][picked].min() >= score[0, head, 0][rest].max() - 1e-6


@needs_triton
def test_ties_go_to_the_lower_block(monkeypatch):
    from ssa.ops.triton import decode as kernels

    monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
    cache = a_cache([200], columns=200, block_size=4)
    cache["block_means"][:] = 1.0
    _, _, index = decode_attention(**cache, selection=Selection(5, 4), impl="triton")
    assert index[0].tolist() == [[[0, 1, 2, 3, 49]]] * 2


@needs_triton
def test_a_length_beyond_the_cache_is_not_waited_for(monkeypatch):
    """Lengths on a GPU are not checked; spans that nobody computes would be waited for without end."""
    from ssa.ops.triton import decode as kernels

    monkeypatch.setattr(kernels, "_tile", lambda size, dtype: 16)
    q, k, v, means, lengths = (a_cache([140], columns=140)[n] for n in ("q", "k", "v", "block_means", "lengths"))
    room = (q, k[:, :128], v[:, :128], means[:, :32], lengths)  # of what is there
    _, _, index = kernels.decode_attention(*room, None, None, 4, 5, "group", "softmax", "exact", 0.25)
    assert (index[..., -1] == 34).all() and (index[..., :-1] < 32).all()


@needs_triton
def test_results_do_not_depend_on_room_neighbours_or_repetition():
    cache, options = (
        a_cache([57, 20], [2, 40], columns=60, queries=2),
        {"selection": Selection(4, 4), "impl": "triton"},
    )
    once, again = decode_attention(**cache, **options), decode_attention(**cache, **options)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    wider = {n: torch.cat([x, x[:, :37]], 1) if n in ("k", "v", "block_means") else x for n, x in cache.items()}
    second = {n: None if x is None else x[1:] for n, x in cache.items()}
    for a, b, c in zip(once, decode_attention(**wider, **options), decode_attention(**second, **options), strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


@needs_triton
def test_any_strides():
    cache, options = a_cache([57, 20], columns=60), {"selection": Selection(4, 4), "impl": "triton"}
    expected = decode_attention(**cache, **options)
    for name in ("q", "k", "v", "block_means"):
        cache[name] = cache[name].transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(expected, decode_attention(**cache, **options), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_the_operator_is_a_good_citizen_of_pytorch():
    from ssa.ops.triton.decode import decode_attend_op, decode_select_op
    from ssa.ops.triton.decode import decode_attention_op as operator

    cache = a_cache([30, 9], [0, 20], columns=30, biased=True)
    arguments = [cache[n] for n in ("q", "k", "v", "block_means", "lengths", "starts", "bias")]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    rows = torch.tensor([1, 3], dtype=torch.int32)
    for more in ((), (rows,)):
        torch.library.opcheck(operator, (*arguments, 4, 3, "head", "softmax", "exact", 0.25, *more), test_utils=checks)
    q, k, v, means, lengths, starts, bias = arguments
    for more in ((), (rows,)):
        choice = (q, means, lengths, 4, 3, "head", "softmax", "exact", 0.25, *more)
        torch.library.opcheck(decode_select_op, choice, test_utils=checks)
    index = torch.tensor([0, 1], dtype=torch.int32).expand(2, 4, 1, 2).contiguous()
    torch.library.opcheck(decode_attend_op, (q, k, v, index, lengths, starts, bias, None, 4, 0.25), test_utils=checks)
    k, v = k.nan_to_num(), v.nan_to_num()
    torch.library.opcheck(decode_attend_op, (q, k, v, index, lengths, None, None, index, 4, 0.25), test_utils=checks)


@needs_triton
def test_it_compiles_into_one_graph():
    cache, options = a_cache([30, 9], columns=30, queries=2), {"selection": Selection(3, 4), "impl": "triton"}
    selection = options["selection"]

    def again(**x):
        out, lse, index = in_two(x, {"selection": selection}, "triton")
        slots = torch.arange(3, dtype=torch.int32, device=index.device).expand(index.shape)
        pages = decode_attend(x["q"], x["k"], x["v"], index, x["lengths"], block_size=4, slots=slots, impl="triton")
        return out, lse, index, *pages

    def one_a_row(**x):
        rows = (x["lengths"] // 10).clamp(min=1)
        return *decode_attention(**x, **options, row_blocks=rows), *in_two(
            x, {"selection": selection, "row_blocks": rows}, "triton"
        )

    for call in (lambda **x: decode_attention(**x, **options), again, one_a_row):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(**cache), call(**cache), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not on_gpu, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_other_lengths():
    cache = a_cache([1000, 500], columns=1200, dtype=torch.bfloat16, size=64, block_size=16)
    options = {"selection": Selection(8, 16), "impl": "triton"}
    lengths = cache["lengths"].clone()

    def step():
        fused = decode_attention(**cache, **options)
        at_their_numbers = {name: cache[name] for name in ("q", "k", "v", "lengths")} | {
            "block_indices": fused[2],
            "slots": fused[2],
        }
        return (
            *fused,
            *in_two(cache, {"selection": Selection(8, 16)}, "triton"),
            *decode_attend(**at_their_numbers, block_size=16, impl="triton"),
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for shorter in (0, 3, 130, 499):
        cache["lengths"].copy_(lengths - shorter)
        graph.replay()
        for a, b, c in zip(captured, step(), captured[:3] * 3, strict=False):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.skipif(not on_gpu, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_other_row_blocks():
    cache = a_cache([1000, 500, 900], columns=1200, dtype=torch.bfloat16, size=64, block_size=16)
    rows = torch.tensor([70, 1, 8], dtype=torch.int32)
    options = {"selection": Selection(70, 16), "row_blocks": rows}

    def step():
        return *decode_attention(**cache, **options, impl="triton"), *in_two(cache, options, "triton")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for others in ([70, 1, 8], [2, 40, 63], [8, 8, 8]):
        rows.copy_(torch.tensor(others))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        has = [min(k, -(-n // 16)) for k, n in zip(others, cache["lengths"].tolist(), strict=True)]
        assert (captured[2] >= 0).sum(-1)[:, 0, 0].tolist() == has
        for b, k in enumerate(others):
            own = {n: None if x is None else x[b : b + 1] for n, x in cache.items()}
            alone = decode_attention(**own, selection=Selection(k, 16), impl="triton")
            assert torch.equal(captured[2][b, ..., :k], alone[2][0])
            torch.testing.assert_close(captured[0][b], alone[0][0], rtol=2e-2, atol=2e-2)


def test_autocast_does_not_reach_in():
    cache, options = a_cache([57, 20], columns=60), {"selection": Selection(4, 4), "impl": "reference"}
    expected = decode_attention(**cache, **options)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        for a, b in zip(expected, decode_attention(**cache, **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(2, 9, 4, 16)}, "9 queries over 30 columns: decoding takes 1 to 8"),
        ({"q": torch.zeros(2, 0, 4, 16)}, "0 queries"),
        ({"q": torch.zeros(2, 1, 3, 16)}, "do not fit"),
        ({"v": torch.zeros(2, 30, 2, 8)}, "do not fit"),
        ({"block_means": torch.zeros(2, 6, 2, 16)}, "with a mean for each of 7 blocks"),
        ({"q": torch.zeros(2, 1, 4, 16, dtype=torch.float64)}, "differ in dtype"),
        ({"lengths": torch.tensor([3])}, r"lengths \(1,\)"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "not int32 or int64"),
        ({"lengths": torch.tensor([3, 31])}, "within its 30 columns"),
        ({"starts": torch.tensor([0, 25])}, "within its 30 columns"),
        ({"starts": torch.tensor([-1, 0])}, "within its 30 columns"),
        ({"bias": torch.zeros(2, 29, 2)}, "bias"),
        ({"row_blocks": torch.tensor([3], dtype=torch.int32)}, r"row_blocks \(1,\) of torch.int32 on .* B = 2"),
        ({"row_blocks": torch.tensor([3, 1])}, "row_blocks .2,. of torch.int64"),
        ({"row_blocks": torch.ones(2, dtype=torch.int32, device="meta")}, "on meta is not"),
        ({"row_blocks": torch.tensor([3, 0], dtype=torch.int32)}, r"row_blocks \[3, 0\] must lie between 1, .*, and 3"),
        ({"row_blocks": torch.tensor([4, 1], dtype=torch.int32)}, r"row_blocks \[4, 1\] must lie between 1, .*, and 3"),
        ({"row_blocks": torch.tensor([1, 1], dtype=torch.int32), "selection": Selection(4, 4, rule="released")}, "use rule 'exact'"),
        ({"scale": -1.0}, "scale = -1"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
    ],
)  # fmt: skip
def test_errors(change, match):
    cache = a_cache([30, 9], columns=30)
    if on_gpu and ("within" in match or "must lie" in match):
        pytest.skip("lengths and row_blocks are not looked at on a GPU")
    with pytest.raises(UserError, match=match) as error:
        decode_attention(**(cache | {"selection": Selection(3, 4)} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(2, 9, 4, 16)}, "9 queries"),
        ({"q": torch.zeros(2, 1, 3, 16)}, "do not fit"),
        ({"block_means": torch.zeros(2, 7, 2, 8)}, "do not fit"),
        ({"block_means": torch.zeros(2, 7, 2, 16, dtype=torch.float64)}, "differ in dtype"),
        ({"lengths": torch.tensor([3, 32])}, "within its 31 columns"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "not int32 or int64"),
        ({"row_blocks": torch.tensor([3, 1])}, "row_blocks .2,. of torch.int64"),
        ({"scale": 0.0}, "scale = 0"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
    ],
)  # fmt: skip
def test_errors_of_the_choice(change, match):
    if on_gpu and "within" in match:
        pytest.skip("lengths are not looked at on a GPU")
    cache = a_cache([30, 9], columns=30)
    fits = {name: cache[name] for name in ("q", "lengths")} | {
        "block_means": cache["block_means"][:, :7],
        "selection": Selection(3, 4),
    }
    decode_select(**fits)
    with pytest.raises(UserError, match=match):
        decode_select(**(fits | change))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(2, 9, 4, 16), "block_indices": torch.zeros(2, 2, 9, 3, dtype=torch.int32)}, "9 queries"),
        ({"v": torch.zeros(2, 30, 2, 8)}, "do not fit"),
        ({"block_indices": torch.zeros(2, 2, 2, 3, dtype=torch.int32)}, "block_indices"),
        ({"block_indices": torch.zeros(2, 3, 1, 3, dtype=torch.int32)}, "chooses for 3 heads"),
        ({"block_indices": torch.zeros(2, 2, 1, 3)}, "must be int32"),
        ({"block_size": 0}, "block_size = 0"),
        ({"lengths": torch.tensor([3, 31])}, "within its 30 columns"),
        ({"lengths": torch.tensor([3, -1])}, "negative"),
        ({"bias": torch.zeros(2, 29, 2)}, "bias"),
        ({"q": torch.zeros(2, 1, 4, 16, dtype=torch.float64)}, "differ in dtype"),
        ({"slots": torch.zeros(2, 2, 1, 2, dtype=torch.int32)}, "slots"),
        ({"slots": torch.zeros(2, 2, 1, 3)}, "slots"),
        ({"slots": torch.full((2, 2, 1, 3), 8, dtype=torch.int32)}, "slots leave k"),
        ({"slots": torch.zeros(2, 2, 1, 3, dtype=torch.int32), "starts": torch.tensor([0, 0])}, "leave out starts"),
        ({"slots": torch.zeros(2, 2, 1, 3, dtype=torch.int32), "block_size": 31}, "whole blocks"),
        ({"scale": -1.0}, "scale = -1"),
    ],
)  # fmt: skip
def test_errors_of_the_attention(change, match):
    if on_gpu and ("within" in match or "negative" in match or "leave k" in match):
        pytest.skip("lengths and slots are not looked at on a GPU")
    cache = a_cache([30, 9], columns=30)
    index = torch.tensor([0, 1, -1], dtype=torch.int32).expand(2, 2, 1, 3)
    fits = {name: cache[name] for name in ("q", "k", "v", "lengths")} | {"block_indices": index, "block_size": 4}
    decode_attend(**fits)
    with pytest.raises(UserError, match=match) as error:
        decode_attend(**(fits | change))
    assert "\n" not in str(error.value)
