"""Token by token == one pass: any chunking, any left padding, both modes; the cache's own bookkeeping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.attention import METHODS
from ssa.errors import UserError
from ssa.model import BlockCache
from ssa.model.cache import BlockLayer
from ssa.testing import rms_ratio, tiny_model


def in_chunks(model, x, cuts, **kwargs):
    cache, outs = None, []
    mask = kwargs.pop("attention_mask", None)
    for a, b in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if mask is not None:
            kwargs["attention_mask"] = mask[:, :b]
        out = model(x[:, a:b], past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        outs.append(out.logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("method", METHODS)
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
)  # fmt: skip
@torch.no_grad()
def test_left_padding_and_chunks(pads, cuts, tail, method, mode):
    length = 45
    model, x = tiny_model(method), torch.randint(0, 256, (len(pads), length))
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    cuts = sorted(cuts | set(range(length - tail, length)))
    out = in_chunks(model, x, cuts, attention_mode=mode, attention_mask=mask)
    for row, pad in enumerate(pads):
        alone = model(x[row : row + 1, pad:], attention_mode=mode).logits
        torch.testing.assert_close(out[row : row + 1, pad:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_at_other_budgets_than_the_models():
    model, x = tiny_model(), torch.randint(0, 256, (2, 40))
    for budget in ("1x4", "2x8", "5x3", "40x1"):
        whole = model(x, budget=budget).logits
        torch.testing.assert_close(in_chunks(model, x, list(range(1, 40)), budget=budget), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_cache_serves_both_modes_and_changing_budgets():
    model, x = tiny_model(), torch.randint(0, 256, (1, 40))
    cache = model(x[:, :20], use_cache=True, attention_mode="full").past_key_values
    # keys and values of later tokens depend on earlier modes, so compare with a cache that saw the same modes and no means
    for t in range(20, 40):
        kwargs = [{"attention_mode": "full"}, {"budget": "2x4"}, {"budget": "3x8"}][t % 3]
        fresh = BlockCache()
        for layer, old in enumerate(cache.layers):
            fresh.update(old.keys.clone(), old.values.clone(), layer)
        a = model(x[:, t : t + 1], past_key_values=cache, use_cache=True, **kwargs).logits
        b = model(x[:, t : t + 1], past_key_values=fresh, use_cache=True, **kwargs).logits
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_decoding_stays_near_one_pass():
    model, x = tiny_model().bfloat16(), torch.randint(0, 256, (2, 40))
    exact = tiny_model()(x, attention_mode="full").logits
    whole = model(x, attention_mode="full").logits
    decoded = in_chunks(model, x, list(range(1, 40)), attention_mode="full")
    assert rms_ratio(decoded, exact) <= 1.5 * rms_ratio(whole, exact) + 2e-3


def filled(lengths, block_size=4, rows=2):
    layer, starts = BlockLayer(), torch.tensor([0, 3][:rows])
    for n in lengths:
        layer.update(torch.randn(rows, 2, n, 8), torch.randn(rows, 2, n, 8))
        layer.block_means(block_size, starts)
    return layer, starts


def check_means(layer, starts, block_size=4):
    means = layer.block_means(block_size, starts)
    for row, start in enumerate(starts.tolist()):
        for n in range((layer.get_seq_length() - start) // block_size):
            cut = slice(start + n * block_size, start + (n + 1) * block_size)
            torch.testing.assert_close(means.keys[row, n], layer.keys[row, :, cut].mean(1))
            torch.testing.assert_close(means.values[row, n], layer.values[row, :, cut].mean(1))


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_block_means_grow_with_the_cache(lengths):
    layer, starts = filled(lengths)
    assert layer.get_seq_length() == sum(lengths)
    check_means(layer, starts)


def test_crop_reorder_repeat_select_and_reset_keep_the_means_right():
    layer, starts = filled([30, 1, 1, 9])
    layer.crop(-6)
    layer.update(torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8))
    check_means(layer, starts)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    check_means(layer, starts.flip(0))
    layer.batch_repeat_interleave(2)
    check_means(layer, starts.flip(0).repeat_interleave(2))
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    check_means(layer, starts.flip(0))
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8))
    check_means(layer, starts)


def test_a_decoding_step_computes_only_the_block_it_completes(monkeypatch):
    layer, starts = filled([500])
    seen = []
    real = torch.Tensor.mean
    monkeypatch.setattr(torch.Tensor, "mean", lambda x, *a, **kw: seen.append(x.numel()) or real(x, *a, **kw))
    layer.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    layer.block_means(4, starts)
    assert max(seen) <= 2 * 2 * 8 * 4  # rows x heads x size x one block


@pytest.mark.parametrize("method", METHODS)
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
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


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
    cache = model(x, attention_mask=right, use_cache=True).past_key_values
    with pytest.raises(UserError, match="padding between"):
        model(x[:, :1], attention_mask=torch.cat([right, torch.ones(1, 1, dtype=torch.long)], 1), past_key_values=cache)
    left = torch.cat([torch.zeros(1, 3), torch.ones(1, 11)], 1).long()
    with pytest.raises(UserError, match="padding between"):
        model(x, attention_mask=left, position_ids=torch.arange(14)[None])


def test_other_caches_are_refused():
    model, x = tiny_model(), torch.randint(0, 256, (1, 5))
    with pytest.raises(UserError, match="cache_implementation"):
        model.generate(x, max_new_tokens=2, cache_implementation="static")
