"""Conversion: exact both ways, exact about what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.methods import methods
from ssa.model import SSAConfig, SSAForCausalLM, sources, weights
from ssa.model.card import AUTO_MAP, STUB
from ssa.model.convert import convert

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


def save_source(path: Path, config=None, **fields) -> Path:
    config = config or LlamaConfig(**(TINY | fields))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def llama(tmp_path) -> Path:
    return save_source(tmp_path / "llama")


def save_released(path: Path, gates: dict[int, torch.Tensor] | None = None, **changes) -> Path:
    """The authors' layout as transformers 4 wrote it: three gate rows a head, old names in config.json."""
    save_source(path, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        gate = torch.randn(12, 32, generator=torch.Generator().manual_seed(layer))
        tensors[f"model.layers.{layer}.self_attn.g_proj.weight"] = gate if gates is None else gates[layer]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = {k: v for k, v in TINY.items()} | {
        "architectures": ["LlamaNSAForCausalLM"], "model_type": "llama-nsa", "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
        "rope_scaling": None, "tie_word_embeddings": True, "torch_dtype": "float32", "pretraining_tp": 1,
        "block_size": 4, "block_counts": 4, "window_size": 0,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_nsa.LlamaNSAForCausalLM"},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values | changes))
    return path


def edit_config(path: Path, **changes) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))


def logits(path: Path, **kwargs) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(TOKENS, **kwargs).logits.float()


def same_tensors(one: Path, other: Path) -> bool:
    a, b = ({k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in (one, other))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# From a Llama


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-3},
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_llama_keeps_its_function(tmp_path, fields, gate):
    source = save_source(tmp_path / "llama", **fields)
    report = convert(source, tmp_path / "ssa", gate=gate)
    torch.testing.assert_close(logits(tmp_path / "ssa", attention_mode="full"), logits(source), rtol=0, atol=1e-5)
    model = SSAForCausalLM.from_pretrained(tmp_path / "ssa")
    assert (model.config.attention_gate, model.config.method, model.config.attention_mode) == (gate, "ssa", "sparse")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert "'full' computes what the source computes" in str(report)


def test_llama_keeps_its_function_token_by_token(tmp_path, llama):
    convert(llama, tmp_path / "ssa")
    model = SSAForCausalLM.from_pretrained(tmp_path / "ssa").eval()
    cache, steps = None, []
    with torch.no_grad():
        for t in range(20):
            output = model(TOKENS[:, t : t + 1], cache=cache, use_cache=True, attention_mode="full")
            cache = output.cache
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(llama)[:, :20], rtol=0, atol=1e-5)


def test_sparse_at_a_budget_that_covers_everything_is_the_source(tmp_path, llama):
    convert(llama, tmp_path / "ssa", block_size=4, num_selected_blocks=10)
    torch.testing.assert_close(logits(tmp_path / "ssa"), logits(llama), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tmp_path / "ssa", budget="2x4"), logits(llama), atol=1e-3)


def test_mistral_and_qwen2(tmp_path):
    mistral = save_source(tmp_path / "mistral", MistralConfig(**TINY, sliding_window=None))
    qwen2 = save_source(tmp_path / "qwen2", Qwen2Config(**TINY))
    for source in (mistral, qwen2):
        convert(source, tmp_path / f"{source.name}-ssa")
        torch.testing.assert_close(
            logits(tmp_path / f"{source.name}-ssa", attention_mode="full"), logits(source), rtol=0, atol=1e-5
        )


def test_rope_names_of_transformers_4(tmp_path, llama):
    values = json.loads((llama / "config.json").read_text())
    del values["rope_parameters"], values["dtype"]
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (llama / "config.json").write_text(
        json.dumps(values | {"rope_theta": 500.0, "rope_scaling": scaling, "torch_dtype": "float32"})
    )
    convert(llama, tmp_path / "ssa")
    rope = SSAConfig.from_pretrained(tmp_path / "ssa").rope_parameters
    assert rope == scaling | {"rope_theta": 500.0}
    torch.testing.assert_close(logits(tmp_path / "ssa", attention_mode="full"), logits(llama), rtol=0, atol=1e-5)
    # and out again in both spellings
    convert(tmp_path / "ssa", tmp_path / "back", to="llama")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"], written["rope_parameters"]) == (500.0, scaling, rope)
    torch.testing.assert_close(logits(tmp_path / "back"), logits(llama), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [True, False])
def test_llama_there_and_back_is_bitwise(tmp_path, dtype, gate):
    source = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(**TINY, attention_bias=True)).to(dtype).save_pretrained(source)
    convert(source, tmp_path / "ssa", gate=gate)
    assert SSAForCausalLM.from_pretrained(tmp_path / "ssa").dtype == dtype
    convert(tmp_path / "ssa", tmp_path / "back", to="llama")
    assert same_tensors(source, tmp_path / "back")
    assert torch.equal(logits(source), logits(tmp_path / "back"))


def test_dtype_is_converted(tmp_path, llama):
    convert(llama, tmp_path / "ssa", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "ssa" / "model.safetensors").values()} == {torch.bfloat16}
    assert SSAForCausalLM.from_pretrained(tmp_path / "ssa").dtype == torch.bfloat16


def test_doubling_that_overflows_is_refused(tmp_path, llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 4e4  # 8e4 is beyond float16
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj\.weight .* float32"):
        convert(llama, tmp_path / "ssa", dtype="float16")
    assert not (tmp_path / "ssa").exists()


def test_tokenizer_and_generation_settings_travel(tmp_path, llama):
    (llama / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true, "eos_token_id": [255, 256]}')
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    report = convert(llama, tmp_path / "ssa")
    assert "auto_map removed" in str(report)
    assert AutoTokenizer.from_pretrained(tmp_path / "ssa").decode([104, 105]) == "hi"
    model = SSAForCausalLM.from_pretrained(tmp_path / "ssa")
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, [255, 256])
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 256)


def test_shards_in_and_out(tmp_path, llama, monkeypatch):
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 30_000)
    convert(sharded, tmp_path / "ssa")
    assert len(list((tmp_path / "ssa").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits(tmp_path / "ssa", attention_mode="full"), logits(llama), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sliding", [64, None])
def test_a_window_shorter_than_the_context_is_refused(tmp_path, sliding):
    source = save_source(
        tmp_path / "source", Qwen2Config(**TINY, use_sliding_window=True, sliding_window=64, max_window_layers=1)
    )
    if sliding is None:  # mistral's class defaults to a window of 4096 where config.json is silent
        edit_config(source, model_type="mistral", max_position_embeddings=8192)
        values = json.loads((source / "config.json").read_text())
        del values["sliding_window"]
        (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="sliding_window = "):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "'qwen3' normalises queries and keys"),
        ({"model_type": "bert"}, "not Llama's architecture"),
        ({"model_type": None}, "names no architecture"),
        ({"model_type": ["llama"]}, "names no architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, but there are only"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
        ({"num_hidden_layers": 1}, "has a tensor 'model.layers.1.* no place"),
        ({"hidden_size": "32"}, "hidden_size = '32' is not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"intermediate_size": 52}, r"has shape \[48, 32\]; its config.json asks for \[52, 32\]"),
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "makes no model: KeyError: 'bogus'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta = 'x'"),
        ({"hidden_act": "nope"}, "makes no model"),
        ({"rms_norm_eps": [1]}, "does not make a llama configuration"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"attention_bias": True}, "no tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_configurations_that_cannot_be_are_one_line(tmp_path, llama, changes, message):
    edit_config(llama, **changes)
    with pytest.raises(UserError, match=message) as caught:
        convert(llama, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nsa"}, "cannot start as the same function"),
        ({"method": "bogus"}, "method = 'bogus'"),
        ({"to": "gguf"}, "to = 'gguf'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"block_size": 0}, "budget 16x0"),
        ({"selection_rule": "released", "num_selected_blocks": 12}, "power of two"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, llama, arguments, message):
    with pytest.raises(UserError, match=message):
        convert(llama, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# The authors' layout


def test_released_ssa_takes_the_selection_gate(tmp_path):
    source = save_released(tmp_path / "released")
    report = convert(source, tmp_path / "ssa", method="ssa")
    model = SSAForCausalLM.from_pretrained(tmp_path / "ssa").eval()
    gate = load_file(source / "model.safetensors")["model.layers.1.self_attn.g_proj.weight"]
    assert torch.equal(model.model.layers[1].self_attn.g_proj.weight, gate.view(4, 3, 32)[:, 1])
    assert (str(model.config.budget), model.config.selection_rule, model.config.attention_mode) == ("4x4", "released", "sparse")
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    assert "selection rule kept" in str(report)
    # no code of the source's: the one file is the package's own
    assert {path.name: path.read_text() for path in (tmp_path / "ssa").glob("*.py")} == {"modeling_ssa.py": STUB}
    assert json.loads((tmp_path / "ssa" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_released_layout_computes_the_gated_llama(tmp_path):
    """Against transformers' own Llama with the gate put before o_proj by a hook."""
    source = save_released(tmp_path / "released")
    convert(source, tmp_path / "full", method="full")
    tensors = load_file(source / "model.safetensors")
    gates = [tensors.pop(f"model.layers.{i}.self_attn.g_proj.weight").view(4, 3, 32)[:, 1] for i in range(2)]
    values = LlamaConfig(**TINY, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    reference = LlamaForCausalLM(values).eval()
    reference.load_state_dict(tensors, strict=False)
    for layer, gate in zip(reference.model.layers, gates, strict=True):
        seen = {}
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, out, seen=seen: seen.update(x=args[0]))

        def gated(module, args, seen=seen, gate=gate):
            scale = (seen["x"] @ gate.T).sigmoid().repeat_interleave(8, -1)
            return (args[0] * scale,)

        layer.self_attn.o_proj.register_forward_pre_hook(gated)
    with torch.no_grad():
        expected = reference(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "full"), expected, rtol=0, atol=1e-5)


def test_released_nsa_takes_all_three_gates(tmp_path):
    source = save_released(tmp_path / "released", window_size=8)
    report = convert(source, tmp_path / "nsa")
    assert (report.method, "because window_size = 8" in str(report)) == ("nsa", True)
    model = SSAForCausalLM.from_pretrained(tmp_path / "nsa")
    assert model.config.window_size == 8
    gate = load_file(source / "model.safetensors")["model.layers.0.self_attn.g_proj.weight"]
    assert torch.equal(model.model.layers[0].self_attn.g_proj.weight, gate)
    # our model views the rows as the layout does: heads, then (compression, selection, window)
    assert methods()["nsa"].num_gates == 3
    seen = {}
    model.eval()(TOKENS, observer=lambda layer, record: seen.setdefault(layer, record))
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS))
    torch.testing.assert_close(seen[0].gates_BTH, (x @ gate.T).sigmoid().view(2, 40, 4, 3)[..., 1])


def test_released_method_is_never_guessed(tmp_path):
    source = save_released(tmp_path / "released")
    with pytest.raises(UserError, match="add --method ssa, moba, full or nsa"):
        convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="method nsa needs a sliding window"):
        convert(source, tmp_path / "out", method="nsa")


@pytest.mark.parametrize(
    ("changes", "arguments", "rule", "budget", "mode"),
    [
        ({"block_counts": 12, "block_size": 16}, {}, "exact", "12x16", "sparse"),
        ({"block_counts": 64, "block_size": 16}, {}, "exact", "64x16", "sparse"),
        ({}, {"selection_rule": "exact"}, "exact", "4x4", "sparse"),
        ({"inference_mode": "full"}, {"num_selected_blocks": 2}, "released", "2x4", "full"),
    ],
)
def test_released_rule_where_it_exists(tmp_path, changes, arguments, rule, budget, mode):
    source = save_released(tmp_path / "released", **changes)
    convert(source, tmp_path / "ssa", method="ssa", **arguments)
    config = SSAConfig.from_pretrained(tmp_path / "ssa")
    assert (config.selection_rule, str(config.budget), config.attention_mode) == (rule, budget, mode)


def test_entmax_is_not_softmax(tmp_path):
    source = save_released(tmp_path / "released", entmax_alpha=1.5)
    with pytest.raises(UserError, match="entmax"):
        convert(source, tmp_path / "out", method="ssa")


@pytest.mark.parametrize(("method", "window"), [("ssa", 0), ("moba", 0), ("full", 0), ("nsa", 8)])
def test_ours_to_released_and_back_is_bitwise(tmp_path, method, window):
    source = save_released(tmp_path / "released", window_size=window)
    convert(source, tmp_path / "ours", method=method)
    convert(tmp_path / "ours", tmp_path / "theirs", to="llama-nsa")
    report = convert(tmp_path / "theirs", tmp_path / "again")  # the method travels in config.json
    assert report.method == method
    assert same_tensors(tmp_path / "ours", tmp_path / "again")
    assert SSAConfig.from_pretrained(tmp_path / "ours").to_dict() == SSAConfig.from_pretrained(tmp_path / "again").to_dict()
    gate, original = (
        load_file(tmp_path / d / "model.safetensors")["model.layers.0.self_attn.g_proj.weight"].view(4, 3, 32)
        for d in ("theirs", "released")
    )
    assert torch.equal(gate[:, 1], original[:, 1])
    assert torch.equal(gate, original) if method == "nsa" else not gate[:, ::2].any()
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    wanted = {"model_type": "llama-nsa", "block_size": 4, "block_counts": 4, "window_size": window, "rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}  # fmt: skip
    assert {k: written[k] for k in wanted} == wanted and "rope_parameters" not in written


def test_export_warns_where_their_kernel_selects_otherwise(tmp_path, llama):
    convert(llama, tmp_path / "ssa")
    assert "not an exact top-k at 16x16" in str(convert(tmp_path / "ssa", tmp_path / "theirs", to="llama-nsa"))
    edit_config(tmp_path / "ssa", selection_scope="head")
    with pytest.raises(UserError, match="selection by head and softmax"):
        convert(tmp_path / "ssa", tmp_path / "other", to="llama-nsa")


# Ours


def test_only_a_constant_gate_folds(tmp_path, llama):
    convert(llama, tmp_path / "ssa")
    convert(tmp_path / "ssa", tmp_path / "open", gate=False)
    assert same_tensors(tmp_path / "open", llama)
    tensors = load_file(tmp_path / "ssa" / "model.safetensors")
    tensors["model.layers.1.self_attn.g_proj.weight"][3, 5] = 1e-3
    save_file(tensors, tmp_path / "ssa" / "model.safetensors", metadata={"format": "pt"})
    for arguments in ({"to": "llama"}, {"gate": False}):
        with pytest.raises(UserError, match=r"layers\.1\.self_attn\.g_proj\.weight is not 0"):
            convert(tmp_path / "ssa", tmp_path / "back", **arguments)


def test_nsa_stays_nsa(tmp_path):
    convert(save_released(tmp_path / "released", window_size=8), tmp_path / "nsa")
    for arguments, message in (({"to": "llama"}, "sums gated branches"), ({"gate": False}, "sums gated branches"), ({"method": "ssa"}, "nsa cannot become ssa")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "nsa", tmp_path / "out", **arguments)


def test_our_own_can_change_method_and_budget(tmp_path, llama):
    convert(llama, tmp_path / "ssa")
    report = convert(tmp_path / "ssa", tmp_path / "moba", method="moba", block_size=8)
    config = SSAConfig.from_pretrained(tmp_path / "moba")
    assert (report.method, config.method, str(config.budget)) == ("moba", "moba", "16x8")
    assert same_tensors(tmp_path / "ssa", tmp_path / "moba")


# Hostile and broken inputs


def test_pickles_are_refused(tmp_path, llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path) + b"/owned'\ntR.")
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*safetensors"):
        convert(llama, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", 3, "gone.safetensors"]
)
def test_an_index_cannot_leave_its_directory(tmp_path, llama, file):
    shutil.copy(llama / "model.safetensors", tmp_path / "secret.safetensors")
    names = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(UserError, match=r"only .*beside the index|is incomplete"):
        convert(llama, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "[" * 100_000])
def test_a_broken_index_is_one_line(tmp_path, llama, text):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json") as caught:
        convert(llama, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_one_line(tmp_path, llama, keep):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or incomplete") as caught:
        convert(llama, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_tensors_are_accounted_for(tmp_path, llama):
    tensors = load_file(llama / "model.safetensors")

    def attempt(changed: dict) -> None:
        save_file(changed, llama / "model.safetensors", metadata={"format": "pt"})
        convert(llama, tmp_path / "out", overwrite=True)

    with pytest.raises(UserError, match=r"'model\.layers\.0\.self_attn\.q_norm\.weight', for which a llama has no place"):
        attempt(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(UserError, match=r"no tensor 'model\.norm\.weight'"):
        attempt({k: v for k, v in tensors.items() if k != "model.norm.weight"})
    with pytest.raises(UserError, match="is I8; quantised"):
        attempt(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    attempt(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # old releases store it


def test_out_is_never_half_written_nor_overwritten_by_chance(tmp_path, llama, monkeypatch):
    out = tmp_path / "out"
    convert(llama, out)
    with pytest.raises(UserError, match="exists"):
        convert(llama, out)
    before = (out / "config.json").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ssa.model.weights.write_safetensors", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            convert(llama, out, block_size=8, overwrite=True)
    assert (out / "config.json").read_bytes() == before
    convert(llama, out, block_size=8, overwrite=True)
    assert SSAConfig.from_pretrained(out).block_size == 8
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    for place in (precious, llama, tmp_path):
        with pytest.raises(UserError, match=r"not a model directory|holds the source"):
            convert(llama, place, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out", "precious"]


def test_sources_that_are_not_there(tmp_path, llama):
    for source, message in (
        (tmp_path / "nowhere", "no model at"),
        ("owner/model", "cannot be fetched from the hub"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "new" / "out")
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        convert(llama, tmp_path / "out")


def test_hub_fetches_neither_code_nor_pickles_and_knows_the_published_names(tmp_path, monkeypatch):
    source, asked = save_released(tmp_path / "released"), {}

    def snapshot_download(name, **kwargs):
        asked[name] = kwargs
        return str(source)

    monkeypatch.setattr("ssa.model.sources.snapshot_download", snapshot_download)
    assert convert("zen-E/MoBA-1B", tmp_path / "moba").method == "moba"
    with pytest.raises(UserError, match="add --method"):
        convert("someone/else", tmp_path / "out")
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "modeling_x.py", "pytorch_model.bin", "original/a.safetensors", "consolidated.safetensors"]  # fmt: skip
    kept = list(filter_repo_objects(files, **asked["zen-E/MoBA-1B"]))
    assert kept == ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]


def test_broken_gguf_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match="cannot be read as GGUF") as caught:
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_gguf_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"sparse-sparse-attention\[gguf\]"):
        sources.open_source(tmp_path / "model.gguf")


# A real model


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("SSA_TEST_SMOLLM2") and os.environ.get("SSA_TEST_WIKITEXT")),
    reason="needs SSA_TEST_SMOLLM2 (a directory with SmolLM2-135M as GGUF) and SSA_TEST_WIKITEXT (test_pages_detok.jsonl)",
)
def test_smollm2_is_unchanged(tmp_path):
    directory = Path(os.environ["SSA_TEST_SMOLLM2"])
    file = next(directory.glob("*.gguf"))
    convert(file, tmp_path / "ssa")
    model = SSAForCausalLM.from_pretrained(tmp_path / "ssa").eval()
    original = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ssa")
    pages = [json.loads(line) for line in Path(os.environ["SSA_TEST_WIKITEXT"]).read_text().splitlines()][:7]
    ids = [tokenizer(page["text"], add_special_tokens=False).input_ids for page in pages]
    windows = [torch.tensor([page[i : i + 2048]]) for page in ids for i in range(0, len(page), 2048)]
    with torch.inference_mode():
        first = windows[0][:, :512]
        wanted = original(first).logits
        got = model(first, attention_mode="full").logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        nll = torch.cat([model.token_nll(w, attention_mode="full").flatten() for w in windows])
    assert nll.numel() == 36156
    assert nll.mean().exp().item() == pytest.approx(18.54, rel=0.01)
