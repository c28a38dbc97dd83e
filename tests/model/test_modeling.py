"""The model as a transformers model: losses, documents, padding, modes, saving, training."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ssa.attention import METHODS
from ssa.errors import UserError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.ops import cross_entropy
from ssa.testing import LargestTensor, document_positions, tiny_config, tiny_model
from ssa.train.streams import draw_stream


def tokens(batch=2, length=40):
    return torch.randint(0, 256, (batch, length))


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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


def test_padded_and_unpadded_training_losses_agree():
    model, x = tiny_model().train(), tokens(1, 30)
    loss = model(x, labels=x, stream="sparse").loss
    pads = torch.full((1, 7), 257)
    padded = model(
        torch.cat([x, pads], 1), attention_mask=torch.cat([torch.ones_like(x), torch.zeros_like(pads)], 1),
        labels=torch.cat([x, torch.full_like(pads, -100)], 1), stream="sparse",
    ).loss  # fmt: skip
    torch.testing.assert_close(padded, loss, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(tmp_path, method):
    model, x = tiny_model(method, attention_mode="sparse"), tokens()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
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
