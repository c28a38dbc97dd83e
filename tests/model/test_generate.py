"""transformers' other ways to generate: each gives what it gives without a cache, or what greedy decoding gives."""

import pytest
import torch

from ssa.testing import tiny_model

pytestmark = pytest.mark.usefixtures("on_the_cpu")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("assistant", ["itself", "a smaller one", "the prompt"])
def test_assisted_decoding_equals_greedy_decoding_though_the_text_has_pad_tokens(assistant):
    few = {"vocab_size": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_model(**few)
    helper = {
        "itself": {"assistant_model": model},
        "a smaller one": {"assistant_model": tiny_model(seed=1, num_hidden_layers=1, **few)},
        "the prompt": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    x = torch.tensor([[3, 0, 5, 7, 0, 0, 4, 9, 11]])
    greedy = model.generate(x, attention_mask=torch.ones_like(x), **GREEDY)
    assert torch.equal(model.generate(x, attention_mask=torch.ones_like(x), **helper, **GREEDY), greedy)


def test_generation_from_embeddings_equals_generation_from_ids():
    model, x = tiny_model(), torch.randint(0, 256, (2, 20))
    texts = model.generate(x, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=model.model.embed_tokens(x), **GREEDY), texts[:, 20:])
