"""The model on the transformers that is installed: its passes, its cache, its files, beside that release's own Llama."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ssa.model import BlockCache
from ssa.model.convert import convert
from ssa.testing import tiny_model

MODES = ({"attention_mode": "full"}, {"attention_mode": "sparse"}, {"budget": "2x8"})
TOKENS = torch.arange(60).reshape(2, 30) * 37 % 256


@pytest.mark.parametrize("stream", ["full", "sparse"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients(stream, checkpointing):
    model = tiny_model().train()
    if checkpointing:  # transformers 5.17 has the second name alone
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    out = model(TOKENS, labels=TOKENS, stream=stream)
    out.loss.backward()
    with torch.no_grad():
        logits = model.eval()(TOKENS, attention_mode=stream, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(
        out.cross_entropy, torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    )
    assert out.sparsity_loss > 0 and out.commitment_loss > 0
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_passes_through_the_cache_equal_one_pass(mode, name):
    model, parts = tiny_model(), []
    cache = BlockCache()
    for a, b in ((0, 7), (7, 8), (8, 22), (22, 30)):
        out = model(TOKENS[:, a:b], use_cache=True, **{name: cache}, **mode)
        assert out.cache is cache and out.past_key_values is cache and cache.get_seq_length() == b
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(TOKENS, **mode).logits, rtol=1e-5, atol=1e-5)
    cache.crop(20)
    again = model(TOKENS[:, 20:], use_cache=True, **{name: cache}, **mode).logits
    torch.testing.assert_close(again, model(TOKENS, **mode).logits[:, 20:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_files_and_auto_classes(tmp_path):
    model = tiny_model("nsa")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.method == "nsa"
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_a_converted_llama_is_that_llama(tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    llama.save_pretrained(tmp_path / "llama")
    convert(str(tmp_path / "llama"), tmp_path / "ours", block_size=4, num_selected_blocks=2)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours(TOKENS, attention_mode="full").logits, llama(TOKENS).logits, rtol=0, atol=1e-5)
