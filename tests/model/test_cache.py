"""Token by token == one pass: any chunking, any left padding, both modes; the cache's own bookkeeping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssa.attention.state import CachedRows, RowBounds
from ssa.errors import UserError
from ssa.methods import methods
from ssa.model import BlockCache
from ssa.model.cache import CACHE_FIELD, BlockLayer
from ssa.testing import rms_ratio, tiny_model


def in_chunks(model, x, cuts, max_length=None, **kwargs):
    cache, outs = BlockCache(max_length) if max_length else None, []
    mask = kwargs.pop("attention_mask", None)
    for a, b in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if mask is not None:
            kwargs["attention_mask"] = mask[:, :b]
        out = model(x[:, a:b], cache=cache, use_cache=True, **kwargs)
        cache = out.cache
        outs.append(out.logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("cuts", [list(range(1, 50)), [17], [1, 2, 30, 31, 48]], ids=["tokens", "two", "ragged"])
@torch.no_grad()
def test_any_chunking_equals_one_pass(method, mode, cuts):
    model, x = tiny_model(method), torch.randint(0, 256, (2, 50))
    whole = model(x, attention_mode=mode).logits
    torch.testing.assert_close(in_chunks(model, x, cuts, attention_mode=mode), whole, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    pads=st.lists(st.integers(0, 20), min_size=2, max_size=3), cuts=st.sets(st.integers(1, 44), max_size=6),
    tail=st.integers(0, 10), method=st.sampled_from(["ssa", "nsa"]), mode=st.sampled_from(["sparse", "full"]),
    max_length=st.sampled_from([None, 45]),
)  # fmt: skip
@torch.no_grad()
def test_left_padding_and_chunks(pads, cuts, tail, method, mode, max_length):
    length = 45
    model, x = tiny_model(method), torch.randint(0, 256, (len(pads), length))
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    cuts = sorted(cuts | set(range(length - tail, length)))
    out = in_chunks(model, x, cuts, max_length, attention_mode=mode, attention_mask=mask)
    for row, pad in enumerate(pads):
        alone = model(x[row : row + 1, pad:], attention_mode=mode).logits
        torch.testing.assert_close(out[row : row + 1, pad:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_at_other_budgets_than_the_models():
    model, x = tiny_model(), torch.randint(0, 256, (2, 40))
    for budget in ("1x4", "2x8", "5x3", "40x1", "999999999x4", "1x999999999"):
        whole = model(x, budget=budget).logits
        torch.testing.assert_close(in_chunks(model, x, list(range(1, 40)), budget=budget), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_cache_serves_both_modes_and_changing_budgets():
    model, x = tiny_model(), torch.randint(0, 256, (1, 40))
    cache = model(x[:, :20], use_cache=True, attention_mode="full").cache
    # keys and values of later tokens depend on earlier modes, so compare with a cache that saw the same modes and no means
    for t in range(20, 40):
        kwargs = [{"attention_mode": "full"}, {"budget": "2x4"}, {"budget": "3x8"}][t % 3]
        fresh = BlockCache()
        for layer, old in enumerate(cache.layers):
            fresh.update(old.keys.clone(), old.values.clone(), layer)
        a = model(x[:, t : t + 1], cache=cache, use_cache=True, **kwargs).logits
        b = model(x[:, t : t + 1], cache=fresh, use_cache=True, **kwargs).logits
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


WINDOWS = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1}


def decode(model, prompts, readings, tokens=1, mask=None, max_length=None):
    """Logits of five steps after prompts that are read in full, [B, 5 * tokens, V]; `readings` are those of the steps."""
    cache, out = BlockCache(max_length), []
    model(prompts, cache=cache, attention_mode="full", attention_mask=mask)
    for t in range(5):
        new = torch.arange(tokens).expand(len(prompts), -1) + 7 * t
        mask = None if mask is None else torch.cat([mask, torch.ones_like(new)], 1)
        out.append(model(new, cache=cache, attention_mask=mask, **readings).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("selector", "options", "rows"),
    [("means", {}, [1, 2, 99]), ("windows", WINDOWS, [3, 5, 99]), ("eviction", WINDOWS | {"query_blocks": 1}, [4, 5, 99])],
)
@torch.no_grad()
def test_every_row_decodes_by_its_own_budget(selector, options, rows, max_length):
    model = tiny_model("moba", selector=selector, selector_options=options, num_selected_blocks=99)
    if selector == "eviction":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.selector.delta.weight)
    prompts = [torch.randint(0, 256, (n,)) for n in (45, 31, 38)]
    ids, mask = torch.full((3, 45), 257), torch.zeros(3, 45, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
    counts = []
    readings = {
        "row_blocks": torch.tensor(rows, dtype=torch.int32),
        "observer": lambda layer, seen: counts.append((seen.block_indices >= 0).sum(-1)[:, 0, 0].tolist()),
    }
    together = decode(model, ids, readings, mask=mask, max_length=max_length)
    assert counts[0] == [*rows[:2], 10] and len(counts) == 10
    for i, (prompt, count) in enumerate(zip(prompts, rows, strict=True)):
        alone = decode(model, prompt[None], {"budget": f"{count}x4"})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        full = decode(model, prompt[None], {"attention_mode": "full"})
        assert torch.allclose(together[i : i + 1], full, rtol=1e-5, atol=1e-5) == (count == 99)


@pytest.mark.parametrize("method", methods())
@torch.no_grad()
def test_every_row_decodes_several_tokens_by_its_own_budget(method):
    model, prompts = tiny_model(method), torch.randint(0, 256, (3, 38))
    rows = torch.tensor([1, 4, 12], dtype=torch.int32)
    together = decode(model, prompts, {"budget": ["full", "12x4"], "row_blocks": rows}, tokens=3)
    for i, count in enumerate(rows.tolist()):
        alone = decode(model, prompts[i : i + 1], {"budget": ["full", f"{count}x4"]}, tokens=3)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_budgets_of_rows_are_refused_where_nothing_decodes_by_them(monkeypatch):
    model, x = tiny_model(), torch.randint(0, 256, (2, 30))
    rows = torch.tensor([1, 3], dtype=torch.int32)

    def refused(match, tokens, past=20, mask=None, **kwargs):
        cache = BlockCache()
        if past:
            model(x[:, :past], cache=cache, attention_mask=None if mask is None else mask[:, :past])
        with pytest.raises(UserError, match=match) as error:
            model(x[:, past : past + tokens], cache=cache, attention_mask=mask, **({"row_blocks": rows} | kwargs))
        assert "\n" not in str(error.value)

    elsewhere = "row_blocks are for decoding, 1 to 8 tokens after cached ones, by a selector that is fused, and here are "
    refused(elsewhere + "8 of 8 tokens by MeansSelector", 8, past=0)
    refused(elsewhere + "9 of 29 tokens", 9)
    left = torch.ones(2, 22, dtype=torch.long)
    left[0, :3] = 0
    refused(elsewhere + "2 of 22 tokens", 2, mask=left)
    refused("row_blocks say how many blocks a row reads, and full attention reads all", 1, attention_mode="full")
    if x.device.type == "cpu":  # on a GPU nobody looks
        refused("row_blocks .* must lie between 1, what is always read, and 2", 1, budget="2x4")
    refused("row_blocks .* of torch.int64", 1, row_blocks=rows.long())
    with pytest.raises(UserError, match=elsewhere):
        model.generate(x, max_new_tokens=2, row_blocks=rows)
    with pytest.raises(UserError, match="row_block is no keyword of the model: row_blocks"):
        model(x, row_block=rows)
    released = tiny_model(selection_rule="released", num_selected_blocks=4)
    cache = released(x[:, :20], use_cache=True).cache
    with pytest.raises(UserError, match="use rule 'exact'"):
        released(x[:, 20:21], cache=cache, row_blocks=rows)
    cache = model(x[:, :20], use_cache=True).cache
    with pytest.raises(UserError, match=elsewhere + "1 of 21 tokens"):
        model.train()(x[:, 20:21], cache=cache, row_blocks=rows, stream="sparse")
    model.eval()
    monkeypatch.setattr(type(model.model.selector), "fused", False)
    refused(elsewhere + "1 of 21 tokens by MeansSelector", 1)


@torch.no_grad()
def test_bfloat16_decoding_stays_near_one_pass():
    model, x = tiny_model().bfloat16(), torch.randint(0, 256, (2, 40))
    exact = tiny_model()(x, attention_mode="full").logits
    whole = model(x, attention_mode="full").logits
    decoded = in_chunks(model, x, list(range(1, 40)), attention_mode="full")
    assert rms_ratio(decoded, exact) <= 1.5 * rms_ratio(whole, exact) + 2e-3


@pytest.fixture(params=[None, 800], ids=["growing", "of fixed length"])
def max_length(request):
    return request.param


def append(layer, tokens, rows=2, heads=2, size=8):
    layer.update(torch.randn(rows, heads, tokens, size), torch.randn(rows, heads, tokens, size))


def rows_of(layer, starts):
    return CachedRows(layer, RowBounds(starts, layer.end - starts), layer.get_seq_length(), True)


def filled(lengths, max_length=None, block_size=4, rows=2):
    layer, starts = BlockLayer(max_length=max_length), torch.tensor([0, 3][:rows])
    for n in lengths:
        append(layer, n, rows)
        rows_of(layer, starts).means(block_size)
    return layer, starts


def check_means(layer, starts, block_size=4):
    seen = rows_of(layer, starts)
    means, room, all_means = seen.means(block_size), seen.buffers(), seen.means(block_size, room=True)
    length = layer.get_seq_length()
    assert torch.equal(room.lengths_B, length - starts) and torch.equal(room.starts_B, starts)
    assert all_means.keys.shape[1] == room.k_BSKD.shape[1] // block_size
    for row, start in enumerate(starts.tolist()):
        for n in range((length - start) // block_size):
            cut = slice(start + n * block_size, start + (n + 1) * block_size)
            for set_, means_, cached, buffer in zip(means, all_means, (layer.keys, layer.values), room[:2], strict=True):
                mean = cached[row, :, cut].mean(1)
                torch.testing.assert_close(set_[row, n], mean)
                torch.testing.assert_close(means_[row, n], mean)
                assert torch.equal(buffer[row, cut].transpose(0, 1), cached[row, :, cut])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 40, 90]), min_size=1, max_size=12), length=st.sampled_from([None, 1080])
)
def test_block_means_grow_with_the_cache(lengths, length):
    layer, starts = filled(lengths, length)
    assert layer.get_seq_length() == sum(lengths)
    check_means(layer, starts)


@torch.no_grad()
def test_where_there_is_room_a_token_moves_nothing():
    model, cache, moved = tiny_model(), BlockCache(), 0
    model(torch.zeros(1, 5, dtype=torch.int64), cache=cache, use_cache=True)
    for _ in range(150):
        room, before = cache.get_seq_length() + 1 <= cache.room, cache.addresses()
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache, use_cache=True)
        assert (cache.addresses() == before) == room
        moved += not room
    assert moved == 1 and 6 <= cache.room - cache.get_seq_length() < 600


def test_crop_reorder_repeat_select_and_reset_keep_the_means_right(max_length):
    layer, starts = filled([30, 1, 1, 9, 1], max_length)
    layer.crop(-6)
    append(layer, 1)
    check_means(layer, starts)
    append(layer, 10)
    append(layer, 1)
    check_means(layer, starts)
    layer.crop(-1)
    append(layer, 1)
    check_means(layer, starts)
    layer.reorder_cache(torch.tensor([1, 0]))
    for tokens in (1, 1, 1, 1, 5):
        append(layer, tokens)
        check_means(layer, starts.flip(0))
    layer.batch_repeat_interleave(2)
    check_means(layer, starts.flip(0).repeat_interleave(2))
    append(layer, 1, rows=4)
    layer.batch_select_indices(torch.tensor([0, 3]))
    for tokens in (1, 5, 1, 1):
        append(layer, tokens)
        check_means(layer, starts.flip(0))
    layer.reset()
    assert layer.get_seq_length() == 0
    append(layer, 9)
    check_means(layer, starts)


def test_a_cache_of_fixed_length_stays_where_it_is():
    def addresses(layer):
        room, means = rows_of(layer, starts).buffers(), rows_of(layer, starts).means(4, room=True)
        return [x.data_ptr() for x in (*room[:2], *means, layer._end)]

    layer, starts = filled([30], 60)
    before = addresses(layer)
    for change in (lambda: append(layer, 1), lambda: layer.crop(-9), lambda: layer.reorder_cache(torch.tensor([1, 1])), lambda: append(layer, 30)):  # fmt: skip
        change()
        assert addresses(layer) == before
    layer.batch_select_indices(torch.tensor([0, 0]))
    assert addresses(layer) == before and layer.get_max_length() == 60
    with pytest.raises(UserError, match="the cache is full: 61 tokens in a BlockCache of max_length = 60"):
        append(layer, 9)
    layer.reset()
    append(layer, 60)
    assert addresses(layer) == before
    with pytest.raises(UserError, match="max_length = 0"):
        BlockCache(0)


def test_a_step_is_in_place_and_costs_one_block(max_length):
    layer, starts = filled([500, 1], max_length)
    new = torch.randn(2, 2, 1, 8)
    with LargestNew() as seen:
        layer.update(new, new)
        rows_of(layer, starts).means(4, room=True)
    assert seen.elements <= 4 * new.numel()  # of a cache of 501 tokens


class LargestNew(TorchDispatchMode):
    """The largest tensor that an operation within it makes anew, views and results in place left out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.numel())
        return result


def test_a_captured_step_can_be_replayed():
    """A traced graph, like a CUDA graph, repeats the operations on the tensors and nothing that Python counted."""
    layer, starts = filled([37, 1], 100)
    twin, _ = filled([], 100)
    twin.update(layer.keys.clone(), layer.values.clone())

    def step(keys, values):
        layer.update(keys, values)
        rows_of(layer, starts).means(4)
        return rows_of(layer, starts).buffers().lengths_B

    new = [torch.randn(2, 2, 1, 8) for _ in range(2)]
    graph = make_fx(step)(*new)  # runs the step once
    twin.update(*new)
    for count in range(1, 12):
        new = [torch.randn(2, 2, 1, 8) for _ in range(2)]
        lengths = graph(*new)
        assert torch.equal(lengths, 38 + 1 + count - starts)
        layer.advance(1)
        twin.update(*new)
        assert torch.equal(layer.keys, twin.keys) and torch.equal(layer.values, twin.values)
        if count % 4 == 0:
            check_means(layer, starts)
    append(layer, 1)
    append(layer, 6)
    check_means(layer, starts)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_generate_with_cache_equals_without(method, mode):
    model, x = tiny_model(method), torch.randint(0, 256, (2, 20))
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mode": mode, "eos_token_id": None}
    cached = model.generate(x, **options)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    # token by token, by hand
    ids = x
    for _ in range(20):
        ids = torch.cat([ids, model(ids, attention_mode=mode).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"budget": "2x8"}])
def test_beams_and_budgets_in_generate(options):
    model, x = tiny_model(), torch.randint(0, 256, (2, 20))
    options = {"max_new_tokens": 12, "do_sample": False} | options
    expected = model.generate(x, use_cache=False, **options)
    assert torch.equal(model.generate(x, **options), expected)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), expected)


def test_generate_with_a_cache_of_fixed_length():
    model, x = tiny_model(), torch.randint(0, 256, (2, 20))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(x, cache_implementation="static", **options)
    cache = out[CACHE_FIELD]
    assert cache.max_length == 32 and cache.layers[0].buffers()[0].shape[2] == 32
    assert torch.equal(out.sequences, model.generate(x, **options).sequences)
    assert torch.equal(out.sequences, model.generate(x, cache=BlockCache(32), **options).sequences)
    with pytest.raises(UserError, match="the cache is full"):
        model.generate(x, cache=BlockCache(30), **options)


def test_generate_with_left_padding_equals_alone():
    model = tiny_model()
    rows = [torch.randint(0, 256, (n,)) for n in (5, 19, 12)]
    ids = torch.full((3, 19), 257)
    mask = torch.zeros(3, 19, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 19 - len(row) :], mask[i, 19 - len(row) :] = row, 1
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)[:, 19:]
    for i, row in enumerate(rows):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], together[i])


def test_masks_that_cannot_be_honoured_are_refused():
    model, x = tiny_model(), torch.randint(0, 256, (1, 14))
    hole = torch.ones(1, 14, dtype=torch.long)
    hole[:, 5:7] = 0
    with pytest.raises(UserError, match="padding between"):
        model(x, attention_mask=hole)
    right = torch.cat([torch.ones(1, 11), torch.zeros(1, 3)], 1).long()
    cache = model(x, attention_mask=right, use_cache=True).cache
    with pytest.raises(UserError, match="padding between"):
        model(x[:, :1], attention_mask=torch.cat([right, torch.ones(1, 1, dtype=torch.long)], 1), cache=cache)
    left = torch.cat([torch.zeros(1, 3), torch.ones(1, 11)], 1).long()
    with pytest.raises(UserError, match="padding between"):
        model(x, attention_mask=left, position_ids=torch.arange(14)[None])


def test_other_caches_are_refused():
    model, x = tiny_model(), torch.randint(0, 256, (1, 5))
    with pytest.raises(UserError, match="cache_implementation"):
        model.generate(x, max_new_tokens=2, cache_implementation="quantized")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_in_the_callers_cache_under_either_name(name):
    model, x = tiny_model(), torch.arange(20)[None] * 7 % 250 + 1
    mine = BlockCache()
    whole = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False, eos_token_id=None)
    again = model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False, eos_token_id=None, **{name: mine}
    )
    assert torch.equal(again, whole) and mine.get_seq_length() == 24
    with pytest.raises(UserError, match="two different caches"):
        model(x, cache=BlockCache(), past_key_values=BlockCache())


def test_crop_takes_what_to_drop_or_what_to_keep():
    model, cache = tiny_model(), BlockCache()
    x = torch.arange(20)[None] * 7 % 250
    model(x, cache=cache)
    for tokens, length in ((0, 20), (-3, 17), (90, 17), (12, 12), (-90, 0)):
        cache.crop(tokens)
        assert cache.get_seq_length() == length == int(cache.layers[0]._end)
