"""The model as a transformers model: losses, documents, padding, modes, saving, training."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ssa.errors import UserError
from ssa.methods import methods
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.streams import draw_stream
from ssa.ops import cross_entropy
from ssa.testing import LargestTensor, document_positions, tiny_config, tiny_model


def tokens(batch=2, length=40):
    return torch.randint(0, 256, (batch, length))


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_packed_equals_separate_documents(method, mode):
    model, lengths = tiny_model(method), [9, 1, 25]
    x = tokens(1, 35)
    packed = model(x, position_ids=document_positions(lengths), attention_mode=mode).logits
    start = 0
    for n in lengths:
        alone = model(x[:, start : start + n], attention_mode=mode).logits
        torch.testing.assert_close(packed[:, start : start + n], alone, rtol=1e-5, atol=1e-5)
        start += n


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_nothing(method, mode, side):
    model, x = tiny_model(method), tokens(1, 30)
    alone = model(x, attention_mode=mode).logits
    pads = torch.full((1, 7), 257)
    ids, mask = [x, pads], [torch.ones_like(x), torch.zeros_like(pads)]
    if side == "left":
        ids.reverse(), mask.reverse()
    padded = model(torch.cat(ids, 1), attention_mask=torch.cat(mask, 1), attention_mode=mode).logits
    real = padded[:, 7:] if side == "left" else padded[:, :30]
    torch.testing.assert_close(real, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_target_and_shifts_no_loss(side):
    """Rows of 30 and 23 tokens, the shorter one padded; labels are the tokens, those of the padding included."""
    model, x = tiny_model().train(), tokens(2, 30)
    real = torch.arange(30) < 23 if side == "right" else torch.arange(30) >= 7
    short = x[1:, real]
    mask = torch.stack([torch.ones_like(real), real]).to(torch.int64)
    padded = torch.where(mask == 1, x, 257)
    nll = model.token_nll(padded, attention_mask=mask, stream="sparse")
    assert (nll != 0).sum(1).tolist() == [29, 22]
    alone = [model.token_nll(row, stream="sparse") for row in (x[:1], short)]
    torch.testing.assert_close(nll.sum(1), torch.stack([n.sum() for n in alone]), rtol=1e-5, atol=1e-5)
    out = model(padded, attention_mask=mask, labels=padded, stream="sparse")
    torch.testing.assert_close(out.cross_entropy, torch.cat(alone, 1).mean(), rtol=1e-5, atol=1e-5)
    packed = torch.cat([x[:1], short], 1)
    same = model(packed, position_ids=document_positions([30, 23]), labels=packed, stream="sparse")
    torch.testing.assert_close(out.loss, same.loss, rtol=1e-5, atol=1e-5)


def test_loss_is_cross_entropy_plus_alpha_times_alignment():
    model, x = tiny_model(alignment_weight=3.0).train(), tokens()
    out = model(x, labels=x, stream="sparse")
    logits = model.eval()(x, attention_mode="sparse").logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.cross_entropy, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, out.cross_entropy + 3.0 * (out.sparsity_loss + out.commitment_loss))
    assert out.sparsity_loss > 0 and out.logits is None
    assert not out.cross_entropy.requires_grad and not out.sparsity_loss.requires_grad


@pytest.mark.parametrize(("method", "mode"), [("full", "full"), ("moba", "sparse"), ("nsa", "sparse")])
def test_single_stream_methods_train_on_their_own_stream(method, mode):
    model, x = tiny_model(method).train(), tokens()
    out = model(x, labels=x)
    torch.testing.assert_close(out.loss, model(x, labels=x, attention_mode=mode).loss)
    other = "sparse" if mode == "full" else "full"
    assert (out.loss - model(x, labels=x, attention_mode=other).loss).abs() > 1e-6
    assert out.sparsity_loss is None


@pytest.mark.parametrize("stream", ["sparse", "full"])
def test_the_alignment_is_the_mean_over_layers(stream):
    model, x = tiny_model(alignment_weight=3.0, num_hidden_layers=3).train(), tokens()
    of_layers = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, result: of_layers.append(result[1].detach()))
    out = model(x, labels=x, stream=stream)
    sparsity, commitment = torch.stack(of_layers).unbind(1)
    assert len(sparsity) == 3 and (sparsity.max() - sparsity.min()) > 0.05 * sparsity.mean()
    torch.testing.assert_close(out.sparsity_loss, sparsity.mean())
    torch.testing.assert_close(out.commitment_loss, commitment.mean())
    torch.testing.assert_close(out.loss.detach(), out.cross_entropy + 3.0 * (sparsity.mean() + commitment.mean()))


def test_streams_are_drawn_from_seed_and_step():
    model, x = tiny_model(stream_seed=5).train(), tokens(1, 40)
    by_stream = {s: model(x, labels=x, stream=s).cross_entropy for s in ("full", "sparse")}
    model.stream_step = 3
    for step in range(3, 15):
        assert model.stream_step == step
        assert model(x, labels=x).cross_entropy == by_stream[draw_stream(5, step, 0.5)]
    assert by_stream["full"] != by_stream["sparse"]


def test_no_alignment_is_an_ablation_with_the_same_draws():
    model, x = tiny_model(alignment_loss="none").train(), tokens()
    out = model(x, labels=x, stream="full")
    assert out.sparsity_loss is None and out.loss == out.cross_entropy


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_activation_checkpointing_changes_nothing(stream):
    x = tokens()
    grads = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(x, labels=x, stream=stream).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_document_starts_are_no_targets():
    model, x = tiny_model(), tokens(1, 12)
    positions = document_positions([5, 7])
    nll = model.token_nll(x, position_ids=positions)
    assert nll.shape == (1, 11) and nll.dtype == torch.float32
    assert nll[0, 4] == 0 and (nll[0, torch.arange(11) != 4] > 0).all()
    labels = x.clone()
    labels[0, 8] = -100
    assert model.token_nll(x, labels, positions)[0, 7] == 0


DOCUMENTS = {
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 5, 6, 40], dtype=torch.int32)},
    "all of flash attention's": {
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 40], dtype=torch.int32), "cu_seq_lens_k": torch.tensor([0, 5, 6, 40], dtype=torch.int32),
        "max_length_q": 34, "max_length_k": 34, "position_ids": document_positions([5, 1, 34]),
    },
    "seq_idx": {"seq_idx": torch.tensor([0] * 5 + [1] + [2] * 34)[None]},
    "positions that run on": {"seq_idx": torch.tensor([0] * 5 + [1] + [2] * 34)[None], "position_ids": torch.arange(40)[None]},
    "positions alone restart": {"cu_seq_lens_q": torch.tensor([0, 6, 40]), "position_ids": document_positions([5, 35])},
}  # fmt: skip


@pytest.mark.parametrize("said", DOCUMENTS)
@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_documents_in_the_words_of_collators(said, stream):
    model, x = tiny_model().train(), tokens(1, 40)
    words = {name: value.to(x.device) if isinstance(value, torch.Tensor) else value for name, value in DOCUMENTS[said].items()}
    expected = model(x, labels=x, position_ids=document_positions([5, 1, 34]), stream=stream)
    out = model(x, labels=x, stream=stream, cache_position=torch.arange(40), **words)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(model.token_nll(x, stream=stream, **words).sum() / 37, expected.cross_entropy)
    hidden = model.model(x, stream=stream, **words).last_hidden_state  # as TRL calls it
    torch.testing.assert_close(
        hidden, model.model(x, stream=stream, position_ids=document_positions([5, 1, 34])).last_hidden_state
    )


def test_rows_of_a_batch_have_documents_of_their_own():
    model, x = tiny_model().train(), tokens(2, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    positions = torch.cat([document_positions([5, 7]), document_positions([9, 3])])
    torch.testing.assert_close(
        model(x, labels=x, seq_idx=seq_idx, stream="full").loss, model(x, labels=x, position_ids=positions, stream="full").loss
    )


FOREIGN = ["cache_position", "token_type_ids", "output_router_logits", "max_length_q", "cu_seq_lens_k", "num_logits",
           "is_causal", "position_embeddings", "decoder_input_ids", "head_mask", "use_kernels", "fused_lm_head"]  # fmt: skip


def test_unknown_keywords_are_ignored_and_typos_are_not():
    model, x = tiny_model(), tokens()
    expected = model(x).logits
    assert torch.equal(model(x, **dict.fromkeys(FOREIGN, 1)).logits, expected)
    model.model(x, **dict.fromkeys(FOREIGN, 1))
    for typo, meant in (
        ("attention_mod", "attention_mode"),
        ("budgets", "budget"),
        ("lables", "labels"),
        ("position_id", "position_ids"),
    ):
        with pytest.raises(UserError, match=f"^{typo} is no keyword of the model: {meant}\\?$"):
            model(x, **{typo: None})
    with pytest.raises(UserError, match=r"^stream_ is no keyword"):
        model.model(x, stream_="full")


def test_generate_refuses_padding_where_tokens_would_follow():
    model, x = tiny_model(), tokens(2, 12)
    x[1, 9:] = 257
    for options in ({}, {"attention_mask": (x != 257).long()}, {"attention_mask": (x != 257).long(), "use_cache": False}):
        with pytest.raises(UserError, match="padding_side='left'") as error:
            model.generate(x, max_new_tokens=2, **options)
        assert "\n" not in str(error.value)
    x = tokens(1, 12)
    x[0, 5] = 257
    with pytest.raises(UserError, match=r"pad token \(id 257\) .* pass attention_mask"):
        model.generate(x, max_new_tokens=2)
    assert model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=2).shape == (1, 14)
    left = torch.cat([torch.full((1, 3), 257), tokens(1, 12)], 1)
    alone = model.generate(left[:, 3:], max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(left, max_new_tokens=4, do_sample=False)[:, 3:], alone)


@pytest.mark.parametrize("change", ["bias", "hook", "weight", "module", "forward"])
def test_the_loss_goes_through_a_head_that_is_more_than_its_weight(change):
    """Quantized and adapted heads, and those that offloading or a profiler hooks into."""
    model, x = tiny_model(tie_word_embeddings=False), tokens()
    if change == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(258))
    elif change == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, out: 2 * out)
    elif change == "weight":
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        torch.nn.init.uniform_(model.lm_head.parametrizations.weight.original0)
    elif change == "module":
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), model.lm_head)
    else:
        model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T + 1.0 * torch.arange(258)
    out = model(x, labels=x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(model.train()(x, labels=x, attention_mode="sparse").loss, out.loss)


@pytest.mark.parametrize("grad", [True, False])
def test_loss_in_slices_equals_the_whole_and_never_holds_all_logits(monkeypatch, grad):
    model, x = tiny_model(vocab_size=2000).train(), tokens(2, 100)

    def run():
        with torch.set_grad_enabled(grad):
            loss = model(x, labels=x, stream="sparse").loss
        if grad:
            model.zero_grad()
            loss.backward()
        return [loss.detach(), *([p.grad.clone() for p in model.parameters()] if grad else [])]

    whole = run()
    monkeypatch.setitem(cross_entropy.SLICE_ELEMENTS, x.device.type, 20 * 2000)
    with LargestTensor() as seen:
        sliced = run()
    for a, b in zip(sliced, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert seen.elements < 198 * 2000 / 2


def test_token_weighted_accumulation():
    model, x = tiny_model(alignment_weight=1.0).train(), tokens(4, 30)
    model(x, labels=x, stream="full").loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.train_step.micro_batches = 4
    for row in x:
        model(row[None], labels=row[None], stream="full", num_items_in_batch=4 * 29).loss.backward()
    for p, g in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_mode_and_budget_change_per_call_without_reloading():
    model, x = tiny_model("ssa"), tokens(1, 60)
    default = model(x).logits
    assert torch.equal(default, model(x, attention_mode="sparse", budget="3x4").logits)
    assert not torch.equal(default, model(x, budget="1x4").logits)
    torch.testing.assert_close(model(x, budget="15x4").logits, model(x, attention_mode="full").logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, budget="4x16").logits, model(x, attention_mode="full").logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", methods())
def test_save_and_load(tmp_path, method):
    model, x = tiny_model(method, attention_mode="sparse"), tokens()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors", ".md", ".py"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(x.device)
    assert type(loaded) is SSAForCausalLM and loaded.config.method == method
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_without_gate_and_with_every_block_the_model_is_llama():
    model, x = tiny_model("full", attention_gate=False, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}), tokens()  # fmt: skip
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    from transformers import LlamaConfig

    llama = LlamaForCausalLM(LlamaConfig(**config)).to(x.device).eval()
    llama.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x).logits, llama(x).logits, rtol=1e-5, atol=1e-5)


def test_gate_is_one_scalar_per_token_and_query_head():
    model, x = tiny_model("full"), tokens()
    seen = {}
    model(x, observer=lambda layer, record: seen.setdefault(layer, record))
    assert sorted(seen) == [0, 1] and seen[0].gates_BTH.shape == (2, 40, 4)
    for layer in model.model.layers:
        layer.self_attn.g_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data *= 2
    halved = model(x).logits
    ungated = tiny_model("full", attention_gate=False)
    ungated.load_state_dict({k: v for k, v in model.state_dict().items() if "g_proj" not in k})
    for layer in ungated.model.layers:
        layer.self_attn.o_proj.weight.data /= 2
    torch.testing.assert_close(halved, ungated(x).logits)


def test_half_precision_stays_near_float32():
    model, x = tiny_model(), tokens()
    exact = model(x).logits
    for run in (lambda m: m.bfloat16()(x).logits, lambda m: _autocast(m, x)):
        low = run(copy.deepcopy(model)).float()
        assert (low - exact).norm() / exact.norm() < 0.05


def _autocast(model, x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x).logits


def test_initial_loss_is_that_of_a_uniform_guess():
    model = SSAForCausalLM(tiny_config(initializer_range=0.02)).to(tokens().device).train()
    x = tokens()
    assert abs(model(x, labels=x).cross_entropy.item() - torch.log(torch.tensor(258.0)).item()) < 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"attention_mode": "dense"}, "attention_mode"),
        ({"stream": "both"}, "stream"),
        ({"budget": "16"}, "budget"),
        ({"budget": "0x16"}, "budget"),
        ({"position_ids": torch.arange(5, 45)[None]}, "position_ids"),
        ({"attention_mask": torch.ones(2, 1, 40, 40)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 39)}, "attention_mask"),
        ({"cache": object()}, "BlockCache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.tensor([0, 40])}, "cu_seq_lens_q describes one flattened row, not a batch of 2"),
    ],
)
def test_wrong_calls_are_one_line(call, words):
    call = {k: v.to(torch.get_default_device()) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(UserError, match=words) as error:
        tiny_model()(tokens(), **call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["method", "attention_mode", "selection_scope", "selection_rule", "alignment_loss"])
def test_wrong_configurations_are_one_line(field):
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: "nonsense"})


def test_configuration_survives_json(tmp_path):
    config = tiny_config("nsa", selection_rule="released", num_selected_blocks=4, full_ratio=0.25)
    config.save_pretrained(tmp_path)
    loaded = SSAConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and str(loaded.budget) == "4x4"
