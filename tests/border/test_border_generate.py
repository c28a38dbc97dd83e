"""Every way of transformers' `generate` gives the tokens that the model gives without a cache."""

import pytest
import torch

from ssa.model import BlockCache
from ssa.testing import tiny_model

PROMPTS = torch.arange(46).reshape(2, 23) * 37 % 250 + 1
NEW = 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 257}
MODES = ({"attention_mode": "full"}, {"attention_mode": "sparse"}, {"budget": "2x8"})


def generate(model, ids, **options):
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **GREEDY, **options})


@torch.no_grad()
def by_hand(model, ids, **mode):
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False, **mode).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"attention_mask": None}],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_greedy(mode, options):
    model = tiny_model()
    assert torch.equal(generate(model, PROMPTS, **mode, **options), by_hand(model, PROMPTS, **mode))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_guessing_ahead(mode):
    """With an assistant of other weights, with the model itself, and from the prompt's own words: guesses are taken back, too."""
    model, repeating = tiny_model(), PROMPTS[:1, :6].repeat(1, 4)
    for options in ({"assistant_model": tiny_model(seed=1)}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generate(model, repeating, **mode, **options), by_hand(model, repeating, **mode)), options


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("length", [None, 2 * NEW + PROMPTS.shape[1]])
def test_goes_on_in_the_callers_cache(name, length):
    model, cache = tiny_model(), BlockCache(length)
    first = generate(model, PROMPTS, **{name: cache})
    assert torch.equal(first, by_hand(model, PROMPTS)) and cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, first, **{name: cache}), by_hand(model, first))
    assert cache.get_seq_length() == first.shape[1] + NEW - 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 2.0, "top_k": 20},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [{}, {"cache_implementation": "static"}], ids=str)
def test_beams_and_samples(options, cached):
    model, results = tiny_model(), []
    for how in (cached, {"use_cache": False}):
        torch.manual_seed(5)
        results.append(generate(model, PROMPTS, **options, **how))
    assert torch.equal(*results) and not torch.equal(results[0][: len(PROMPTS)], by_hand(model, PROMPTS))


def test_rows_of_a_batch_are_as_alone():
    model, lengths = tiny_model(), (5, 23, 14)
    ids, mask = torch.full((3, 23), 257), torch.zeros(3, 23, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = PROMPTS[0, :length], 1
    together = generate(model, ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True)
    for row, length in enumerate(lengths):
        assert torch.equal(together.sequences[row, 23 - length :], by_hand(model, PROMPTS[:1, :length])[0])
    assert torch.equal(together.scores[-1].argmax(-1), together.sequences[:, -1])
