import numpy as np
import pytest
import torch

from ssa.budget import FULL, Budget
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval.long.items import Item
from ssa.eval.long.measure import write
from ssa.eval.long.rope import scale_rope, scaled
from ssa.eval.model_under_test import load_model_under_test
from ssa.infer.engine import Sampling, complete
from ssa.testing import tiny_config, tiny_model

PROMPTS = ["A long haystack with several blocks of text in it.", "Short.", "x" * 37]


def items(tokenizer, max_new_tokens=12, stop=()):
    return [Item(np.array(tokenizer(p).input_ids), max_new_tokens, ["a"], stop) for p in PROMPTS]


@pytest.mark.parametrize("budget", [FULL, Budget(2, 4), Budget(4, 16)])
def test_batches_write_what_the_engine_writes(budget):
    tokenizer, model = byte_tokenizer(), tiny_model("ssa", seed=3)
    expected = [c.text for c in complete(model, tokenizer, PROMPTS, Sampling(12), budget=budget, batch_size=1)]
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0  # saved with a model, and not to be used
    assert write(model, tokenizer, items(tokenizer), budget) == expected
    assert model.generation_config.temperature == 9.0
    assert [write(model, tokenizer, [item], budget)[0] for item in items(tokenizer)] == expected


def test_rows_end_at_their_own_length_and_stop():
    tokenizer, model = byte_tokenizer(), tiny_model("ssa", seed=3)
    whole = write(model, tokenizer, items(tokenizer, 12), FULL)
    mixed = [Item(item.prompt, n, item.answers) for item, n in zip(items(tokenizer), (3, 12, 1), strict=True)]
    rows = write(model, tokenizer, mixed, FULL)
    ids = [complete(model, tokenizer, [p], Sampling(n), mode="full")[0] for p, n in zip(PROMPTS, (3, 12, 1), strict=True)]
    assert rows == [completion.text for completion in ids]
    stop = whole[1][4]
    cut = write(model, tokenizer, items(tokenizer, 12, (stop,)), FULL)
    assert cut == [text.split(stop)[0] for text in whole]


def test_finished_rows_take_nothing_in():
    """Where the tokenizer has no end, rows that are done go on until the last one is."""
    tokenizer, model = byte_tokenizer(), tiny_model("ssa", seed=3, eos_token_id=None, pad_token_id=None)
    tokenizer.eos_token = tokenizer.pad_token = None
    mixed = [Item(item.prompt, n, item.answers) for item, n in zip(items(tokenizer), (3, 12, 1), strict=True)]
    assert write(model, tokenizer, mixed, FULL) == [write(model, tokenizer, [item], FULL)[0] for item in mixed]


def test_scaled_rope_is_the_recipes():
    """The same tables as a model that was built with the scaling, and as many more positions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = tiny_model("ssa", rope_parameters=rope, max_position_embeddings=256)
    scaled = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    built = tiny_model("ssa", rope_parameters={**scaled, "rope_theta": 10000.0}, max_position_embeddings=1024)
    tokens = torch.randint(0, 256, (1, 600))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        scale_rope(model, 4)
        after, expected = model(input_ids=tokens).logits, built(input_ids=tokens).logits
    assert torch.equal(after, expected) and not torch.allclose(before, after, atol=1e-3)
    assert model.config.max_position_embeddings == 1024 and model.config.rope_parameters == built.config.rope_parameters
    scale_rope(model, 2)  # again: from the same original
    assert model.config.rope_parameters["original_max_position_embeddings"] == 256 and model.config.rope_parameters["factor"] == 2
    assert model.config.max_position_embeddings == 512
    scale_rope(model, 1)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)
    assert model.config.max_position_embeddings == 256


def test_a_run_was_trained_on_its_own_context(make_run):
    subject = load_model_under_test(make_run(), "cpu", "auto")
    further = scaled(subject, 2)
    assert further.model.config.rope_parameters["original_max_position_embeddings"] == 64  # the recipe's
    assert further.sha256 != subject.sha256 != scaled(subject, 3).sha256 != further.sha256


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf"), -1])
def test_wrong_factors(factor):
    with pytest.raises(UserError, match="rope_factor = "):
        scale_rope(tiny_model(), factor)


def test_other_scalings_are_not_overwritten():
    model = tiny_model()
    model.config.rope_parameters = {**tiny_config().rope_parameters, "rope_type": "yarn", "factor": 2.0}
    with pytest.raises(UserError, match="already scaled by 'yarn'"):
        scale_rope(model, 4)
