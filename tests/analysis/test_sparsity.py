"""Figures of attention against a naive dense computation in fp64."""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.analysis.attention_stats import LayerSums, SparsityMeter, mean_figures, selection_by_rule
from ssa.analysis.dense_pass import tile_shape
from ssa.analysis.sparsity import AttentionFigures, attention_figures
from ssa.attention import AttentionRecord
from ssa.budget import Budget, Selection
from ssa.ops import block_sparse_attention, dense_attention, select_blocks


def tensors(batch=2, tokens=37, heads=4, kv_heads=2, size=8, dtype=torch.float64, seed=0, keys=None):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, heads, size, generator=g, dtype=dtype)
    k, v = (torch.randn(batch, keys or tokens, kv_heads, size, generator=g, dtype=dtype) for _ in range(2))
    return q * 2, k, v


def packed(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def naive(q, k, v, index, block_size, positions):
    """Every figure by plain loops over (row, query, head); independent of the chunked code."""
    batch, queries, heads, size = q.shape
    keys, group, per_selector = k.shape[1], heads // k.shape[2], heads // index.shape[1]
    names = ("kept", "dropped", "entropy", "sink_first", "sink_first_4", "first_block", "own_block", "error", "bound")
    out = {name: torch.zeros(batch, queries, heads, dtype=torch.float64) for name in names}
    for b in range(batch):
        for t in range(queries):
            p = int(positions[b, t])
            start = keys - queries + t - p
            for h in range(heads):
                k_doc, v_doc = (x[b, start : start + p + 1, h // group].double() for x in (k, v))
                a = (k_doc @ q[b, t, h].double() / math.sqrt(size)).softmax(0)
                blocks = [int(n) for n in index[b, h // per_selector, t] if n >= 0]
                chosen = torch.tensor([j // block_size in blocks for j in range(p + 1)])
                full = a @ v_doc
                sparse = (a * chosen / a[chosen].sum()) @ v_doc
                largest = max((float(v_doc[j].norm()) for j in range(p + 1) if not chosen[j]), default=0.0)
                values = {
                    "kept": a[chosen].sum(), "dropped": a[~chosen].sum(), "entropy": torch.special.entr(a).sum(),
                    "sink_first": a[0], "sink_first_4": a[:4].sum(), "first_block": a[:block_size].sum(), "own_block": a[p // block_size * block_size :].sum(),
                    "error": (full - sparse).norm(), "bound": a[~chosen].sum() * (largest + sparse.norm()),
                }  # fmt: skip
                for name, value in values.items():
                    out[name][b, t, h] = value
    return out


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (3, 1), (2, 2)])
def test_figures_equal_the_naive_computation_on_packed_documents(scope, heads, kv_heads):
    q, k, v = tensors(heads=heads, kv_heads=kv_heads)
    positions = torch.stack([packed(1, 19, 17), packed(30, 3, 4)])
    index, _ = select_blocks(q, k, Selection(2, 4, scope=scope), positions=positions)
    figures = attention_figures(q, k, v, index, block_size=4, positions=positions)
    for name, expected in naive(q, k, v, index, 4, positions).items():
        torch.testing.assert_close(getattr(figures, name), expected, rtol=1e-9, atol=1e-12, msg=name)
    assert not figures.violated.any()
    assert (figures.kept < 0.99).any()  # the selection leaves something out, or nothing was tested


def test_figures_of_the_last_queries_over_cached_keys_equal_those_of_the_whole_row():
    q, k, v = tensors()
    index, _ = select_blocks(q, k, Selection(2, 4))
    whole = attention_figures(q, k, v, index, block_size=4)
    last = attention_figures(q[:, -5:], k, v, index[:, :, -5:], block_size=4)
    torch.testing.assert_close(last.kept, whole.kept[:, -5:])
    torch.testing.assert_close(last.bound, whole.bound[:, -5:])


@pytest.mark.parametrize("tile", [1, 40, 150, 700, 1 << 20])
def test_the_tile_size_changes_nothing(tile):
    q, k, v = tensors()
    positions = torch.stack([packed(10, 27), packed(37)])
    index, _ = select_blocks(q, k, Selection(3, 4), positions=positions)
    figures = attention_figures(q, k, v, index, block_size=4, positions=positions, tile=tile)
    for name, expected in naive(q, k, v, index, 4, positions).items():
        torch.testing.assert_close(getattr(figures, name), expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "heads,queries,keys,block_size", [(1, 1, 1, 1), (4, 37, 37, 4), (32, 9000, 9000, 16), (32, 8, 9000, 128)]
)
@pytest.mark.parametrize("tile", [1, 1000, 1 << 20])
def test_tiles_hold_whole_blocks_and_no_more_than_they_may(tile, heads, queries, keys, block_size):
    chunk, width = tile_shape(tile, heads, queries, keys, block_size)
    assert 1 <= chunk <= queries and width % block_size == 0 and 0 < width < keys + block_size
    assert heads * chunk * width <= max(tile, heads * block_size)  # one query and one block there must be


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_logits_neither_overflow_nor_vanish(shift):
    q, k, v = tensors(1, 40, 2, 1, 8)
    q[..., 0], k[..., 0] = 100.0, torch.linspace(0, 1, 40, dtype=torch.float64)[None, :, None] * shift
    index, _ = select_blocks(q, k, Selection(2, 4))
    figures = attention_figures(q, k, v, index, block_size=4, tile=64)
    for name, expected in naive(q, k, v, index, 4, torch.arange(40)[None]).items():
        torch.testing.assert_close(getattr(figures, name), expected, rtol=1e-7, atol=1e-12, msg=name)


def test_entropy_of_uniform_attention_is_log2_of_the_visible_keys():
    q, k, v = tensors(dtype=torch.float32)
    record = record_of(torch.zeros_like(q), k, v, "full", Budget(2, 4))
    meter = SparsityMeter()
    meter(0, record)
    (layer,) = meter.layers()
    expected = sum(math.log2(n) for n in range(1, 38)) / 37
    assert layer.all_queries.entropy_bits == pytest.approx([expected] * 4, rel=1e-6)
    assert layer.all_queries.entropy_nats == pytest.approx([expected * math.log(2)] * 4, rel=1e-6)
    assert layer.all_queries.sink_mass_first == pytest.approx([sum(1 / n for n in range(1, 38)) / 37] * 4, rel=1e-6)
    # exactly, where the number of keys is a power of two
    figures = attention_figures(torch.zeros_like(q), k, v, torch.zeros(2, 2, 37, 1, dtype=torch.int32), block_size=64)
    torch.testing.assert_close(figures.entropy[:, 15] / math.log(2), torch.full((2, 4), 4.0), rtol=0, atol=1e-6)


def test_selecting_everything_drops_nothing():
    q, k, v = tensors(dtype=torch.float32)
    positions = torch.stack([packed(10, 27), packed(37)])
    index, _ = select_blocks(q, k, Selection(10, 4), positions=positions)
    figures = attention_figures(q, k, v, index, block_size=4, positions=positions)
    assert (figures.dropped == 0).all() and (figures.bound == 0).all()
    assert figures.error.max() < 1e-5 and not figures.violated.any()
    torch.testing.assert_close(figures.kept, torch.ones_like(figures.kept))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), tokens=st.integers(1, 40), group=st.integers(1, 3), block_size=st.integers(1, 9),
    num_selected=st.integers(1, 5), spread=st.floats(0.0, 30.0), scope=st.sampled_from(["group", "head"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_theorem_1_holds_on_random_attention(seed, tokens, group, block_size, num_selected, spread, scope, dtype):
    q, k, v = tensors(1, tokens, 2 * group, 2, 4, dtype, seed)
    q, v = q * spread, v * 10 ** torch.randn(v.shape[:3], dtype=dtype)[..., None]
    index, _ = select_blocks(q, k, Selection(num_selected, block_size, scope=scope))
    figures = attention_figures(q, k, v, index, block_size=block_size)
    assert not figures.violated.any()
    # the outputs compared are those of the model's own ops
    full = dense_attention(q, k, v)
    sparse, _ = block_sparse_attention(q, k, v, index, block_size=block_size)
    scale = v.norm(dim=-1).max().item()
    torch.testing.assert_close(figures.error, (full - sparse).norm(dim=-1), rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(figures.kept + figures.dropped, torch.ones_like(figures.kept))


def test_theorem_1_is_tight_when_dropped_values_oppose_the_output():
    # Two blocks of one key, values +e and -e, equal weights: error = 1, bound = 0.5 * (1 + 1).
    q, k = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    v = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    index = torch.tensor([0, 1], dtype=torch.int32).view(1, 1, 2, 1)
    figures = attention_figures(q, k, v, index, block_size=1)
    assert figures.error.flatten().tolist() == [0.0, 1.0]
    assert figures.bound.flatten().tolist() == [0.0, 1.0]
    assert not figures.violated.any()


def test_an_error_that_is_not_below_the_bound_counts_as_a_violation_even_as_nan():
    q, k, v = tensors(1, 12, 1, 1, 4)
    v[0, 0] = float("nan")
    index, _ = select_blocks(q, k, Selection(1, 2))
    assert attention_figures(q, k, v, index, block_size=2).violated.any()


def record_of(q, k, v, mode, budget, positions=None, scope="group"):
    index = None
    if mode == "sparse":
        index, _ = select_blocks(q, k, Selection(budget.num_selected_blocks, budget.block_size, scope), positions=positions)
    return AttentionRecord(
        q, k, v, None, positions, index, mode, Selection(budget.num_selected_blocks, budget.block_size), torch.zeros_like(q)
    )


@pytest.mark.parametrize("scope", ["group", "head"])
def test_the_meter_averages_over_all_queries_and_over_those_beyond_the_receptive_field(scope):
    q, k, v = tensors()
    positions = torch.stack([packed(10, 27), packed(37)])
    budget = Budget(3, 4)
    index = record_of(q, k, v, "sparse", budget, positions, scope).block_indices
    meter = SparsityMeter(selection_by_rule(scope))
    meter(5, record_of(q[:1], k[:1], v[:1], "sparse", budget, positions[:1], scope))
    meter(5, record_of(q[1:], k[1:], v[1:], "full", budget, positions[1:], scope))  # the meter selects by the same rule
    (layer,) = meter.layers()
    expected = naive(q, k, v, index, 4, positions)
    beyond = positions >= 12
    assert layer.layer == 5
    assert layer.all_queries.queries == 74 and layer.beyond_receptive_field.queries == int(beyond.sum()) == 15 + 25
    assert layer.all_queries.kept_mass == pytest.approx(expected["kept"].mean((0, 1)).tolist())
    assert layer.beyond_receptive_field.kept_mass == pytest.approx(expected["kept"][beyond].mean(0).tolist())
    assert layer.beyond_receptive_field.entropy_nats == pytest.approx(expected["entropy"][beyond].mean(0).tolist())
    assert min(layer.all_queries.kept_mass) > max(layer.beyond_receptive_field.kept_mass)
    torch.testing.assert_close(expected["kept"][~beyond], torch.ones_like(expected["kept"][~beyond]))
    means = mean_figures(meter.layers(), beyond=True)
    assert means["own_block_mass"] == pytest.approx(float(expected["own_block"][beyond].mean()))
    assert layer.theorem_1.checked == 74 * 4 and layer.theorem_1.violations == 0
    assert layer.beyond_receptive_field.output_error == pytest.approx(expected["error"][beyond].mean(0).tolist())
    at = layer.by_position
    assert at.first_position == [0, 1, 2, 4, 8, 16, 32] and sum(at.queries) == 74
    last = positions >= 32
    assert at.queries[-1] == int(last.sum())
    assert at.kept_mass[-1] == pytest.approx(float(expected["kept"][last].mean()))
    assert at.entropy_bits[-1] == pytest.approx(float(expected["entropy"][last].mean()) / math.log(2))
    # at lag 1, every query beyond the first such one of its document
    assert layer.overlap.lags[:2] == [1, 2] and layer.overlap.pairs[0] == 14 + 24
    assert layer.distance_histogram == [sum(column) for column in zip(*layer.distance_histogram_by_selector, strict=True)]


def test_distances_own_share_and_number_of_selected_blocks():
    q, k, v = tensors(1, 9, 1, 1)
    index = torch.tensor([[[[0, -1]] * 4 + [[0, 1]] * 4 + [[0, 2]]]], dtype=torch.int32)  # own block and the first
    meter = SparsityMeter()
    meter(0, AttentionRecord(q, k, v, None, None, index, "sparse", Selection(2, 4), torch.zeros_like(q)))
    (layer,) = meter.layers()
    # to block 0: 0..8; to the second block 0..3; to the third 0
    distances = [*range(9), 0, 1, 2, 3, 0]
    bins = [0] * 5
    for d in distances:
        bins[d.bit_length()] += 1
    assert layer.distance_histogram == bins
    assert layer.selected_blocks_mean == pytest.approx(14 / 9)
    assert layer.own_block_share == pytest.approx(9 / 14)


def test_the_sample_of_points_is_bounded_seeded_and_from_beyond_the_receptive_field():
    q, k, v = tensors(1, 60)

    def run(seed, tile):
        meter = SparsityMeter(points=30, seed=seed, tile=tile)
        for _ in range(2):
            meter(0, record_of(q, k, v, "full", Budget(2, 4)))
        return meter.layers()[0].theorem_1.points

    assert len(run(0, None)) == 30
    assert all(delta > 0 and error <= bound for delta, error, bound in run(0, None))
    for point, again in zip(run(0, None), run(0, 7), strict=True):
        assert point == pytest.approx(again, rel=1e-5)
    assert run(0, None) != run(1, None)


def test_no_two_points_of_a_large_text_draw_the_same_key():
    """Their order would depend on who read which row."""
    sums = LayerSums(1, 1, 200, (0, 0))
    for row in range(8):
        sums._draw(torch.zeros(1 << 18, 3), row)
    assert len(sums.sample_keys.unique()) == 200


@pytest.mark.parametrize("cuts", [(1,), (0,), (2,), (1, 2)])
def test_meters_of_some_rows_each_join_into_one_of_all(cuts):
    """The sample of points too, whoever reads which row."""
    q, k, v = tensors(3, 50)
    budget = Budget(2, 4)
    one = SparsityMeter(points=25, seed=5)
    one(0, record_of(q, k, v, "full", budget))
    meters = []
    for begin, end in zip((0, *cuts), (*cuts, 3), strict=True):
        meters.append(SparsityMeter(points=25, seed=5))
        meters[-1].skip(begin)
        for row in range(begin, end):
            meters[-1](0, record_of(*(x[row : row + 1] for x in (q, k, v)), "full", budget))
    for other in meters[1:]:
        meters[0].add(other.sums)
    (joined,), (whole,) = meters[0].layers(), one.layers()
    assert (
        joined.theorem_1.points == [pytest.approx(point) for point in whole.theorem_1.points]
        and len(whole.theorem_1.points) == 25
    )
    assert joined.theorem_1.checked == whole.theorem_1.checked
    for name in ("all_queries", "beyond_receptive_field", "by_position", "overlap"):
        ours, theirs = asdict(getattr(joined, name)), asdict(getattr(whole, name))
        assert all(ours[key] == pytest.approx(theirs[key]) for key in theirs if key != "gamma")
    torch.testing.assert_close(torch.tensor(joined.overlap.gamma), torch.tensor(whole.overlap.gamma))
    assert joined.distance_histogram_by_selector == whole.distance_histogram_by_selector
    assert (joined.selected_blocks_mean, joined.own_block_share) == (whole.selected_blocks_mean, whole.own_block_share)


def test_without_queries_beyond_the_receptive_field_there_are_no_such_means():
    q, k, v = tensors(1, 8)
    meter = SparsityMeter()
    meter(0, record_of(q, k, v, "sparse", Budget(2, 4)))
    assert meter.layers()[0].beyond_receptive_field is None
    assert mean_figures(meter.layers(), beyond=True) is None
    assert mean_figures(meter.layers(), beyond=False)["kept_mass"] == pytest.approx(1.0)


def test_bfloat16_is_measured_in_fp32():
    q, k, v = (x.bfloat16() for x in tensors(1, 20))
    index, _ = select_blocks(q, k, Selection(2, 4))
    figures = attention_figures(q, k, v, index, block_size=4)
    assert isinstance(figures, AttentionFigures) and figures.kept.dtype == torch.float32
    expected = naive(q, k, v, index, 4, torch.arange(20)[None])
    torch.testing.assert_close(figures.kept.double(), expected["kept"], rtol=1e-5, atol=1e-6)
