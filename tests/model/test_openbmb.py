"""NOSA and MiniCPM4 against transformers' Llama with what they add, random weights under their names; there and back."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import softplus
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from ssa.errors import UserError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.convert import convert
from ssa.model.openbmb import NOSA_OPTIONS

TOKENS = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(7))
FACTORS = [1.0 + 0.1 * i for i in range(4)]
LONGROPE = {
    "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "original_max_position_embeddings": 32768,
}  # fmt: skip
TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": [2, 256], "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SPARSE = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64, "use_nope": False, "dense_len": 8192}  # fmt: skip


def write(path: Path, tensors, config) -> Path:
    path.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def read(path: Path):
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(TOKENS, **kwargs).logits


def ours(path: Path, **kwargs):
    return logits(SSAForCausalLM.from_pretrained(path), **kwargs)


def assert_same_tensors(one: Path, other: Path):
    a, b = read(one)[0], read(other)[0]
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def random_llama(**changes):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


# NOSA


def biased_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """q [B, H, T, D], k and v [B, K, T, D]; causal, with A * softplus(V delta) in the logits of keys."""
    group = query.shape[1] // key.shape[1]
    bias = module.A * softplus(module.delta(value.transpose(1, 2).flatten(2)))  # [B, T, K]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scaling + bias.mT.repeat_interleave(group, 1)[:, :, None]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("nosa_oracle", biased_attention)


def save_nosa(path: Path, dtype=torch.float32, delta_bias=False, head_dtype=None, **config):
    """(directory with random weights under NOSA's names and a config.json like the released one's, the model that computes it)."""
    model = random_llama(rope_parameters=LONGROPE | {"rope_theta": 1e4, "attention_factor": 1.19})
    model.set_attn_implementation("nosa_oracle")
    for layer in model.model.layers:
        layer.self_attn.A = nn.Parameter(torch.randn(2))
        layer.self_attn.delta = nn.Linear(16, 2, bias=delta_bias)
    model.to(dtype)
    tensors = {n: t.to(head_dtype or dtype) if ".A" in n or "delta" in n else t for n, t in model.state_dict().items()}
    values = TINY | {
        "model_type": "llama", "architectures": ["SparseLlamaForCausalLM"], "hidden_act": "silu", "pretraining_tp": 1,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_long_infllmv2.SparseLlamaForCausalLM"}, "rope_theta": 1e4,
        "rope_scaling": LONGROPE | {"attention_factor": 1.19}, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return write(path, tensors, values | config), model


@pytest.mark.parametrize("delta_bias", [False, True])
@pytest.mark.parametrize("method", [None, "ssa"])
def test_nosa_computes_the_biased_llama(tmp_path, delta_bias, method):
    source, oracle = save_nosa(tmp_path / "nosa", delta_bias=delta_bias)
    report = convert(source, tmp_path / "ours", method=method)
    torch.testing.assert_close(ours(tmp_path / "ours", attention_mode="full"), logits(oracle), rtol=0, atol=1e-5)
    # 64 blocks of 64 hold all 70 tokens
    torch.testing.assert_close(ours(tmp_path / "ours"), logits(oracle), rtol=0, atol=1e-5)
    tensors, config = read(tmp_path / "ours")
    assert (config["method"], config["selector"], config["attention_gate"]) == (method or "moba", "eviction", False)
    wanted = NOSA_OPTIONS | ({"delta_bias": True} if delta_bias else {})
    assert (config["block_size"], config["num_selected_blocks"], config["selector_options"]) == (64, 64, wanted)
    assert config["eos_token_id"] == [2, 256] and config["rope_parameters"]["attention_factor"] == 1.19
    assert ("model.layers.1.self_attn.selector.delta.bias" in tensors) == delta_bias
    assert (
        "read" in str(report) and "(nosa)" in str(report) and f"method {method or 'moba'}+eviction, budget 64x64" in str(report)
    )
    assert "computes what the source computes" not in str(report)  # the source's own attention is sparse


def test_nosa_is_not_the_llama_without_its_bias(tmp_path):
    source, oracle = save_nosa(tmp_path / "nosa")
    without = random_llama(rope_parameters=LONGROPE | {"rope_theta": 1e4, "attention_factor": 1.19})
    assert not torch.allclose(logits(oracle), logits(without), atol=1e-2)
    tensors, config = read(source)
    for name in tensors:
        if name.endswith(".A"):
            tensors[name].zero_()
    convert(write(tmp_path / "zero", tensors, config), tmp_path / "ours")
    torch.testing.assert_close(ours(tmp_path / "ours", attention_mode="full"), logits(without), rtol=0, atol=1e-5)
    plain = random_llama(rope_parameters=LONGROPE | {"rope_theta": 1e4})  # attention_factor counts
    assert not torch.allclose(logits(without), logits(plain), atol=1e-2)


@pytest.mark.parametrize("dtype, head", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("delta_bias", [False, True])
def test_nosa_there_and_back_is_bitwise(tmp_path, dtype, head, delta_bias):
    source, _ = save_nosa(tmp_path / "nosa", getattr(torch, dtype), delta_bias, getattr(torch, head))
    if head != dtype:  # what bfloat16 does not hold
        tensors, _ = read(source)
        own = [name for name in tensors if name.endswith((".A", "delta.weight", "delta.bias"))]
        save_file(tensors | {name: tensors[name] + 0.001 for name in own}, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "ours")
    for name, tensor in read(tmp_path / "ours")[0].items():
        assert tensor.dtype == (torch.float32 if ".selector." in name else getattr(torch, dtype)), name
    report = convert(tmp_path / "ours", tmp_path / "back", to="nosa")
    assert_same_tensors(source, tmp_path / "back")
    assert "drops A and delta" in str(report) and "built in" not in str(report)
    had, has = (read(path)[1] for path in (source, tmp_path / "back"))
    same = ("model_type", "architectures", "rope_scaling", "rope_theta", "torch_dtype", "eos_token_id", "max_position_embeddings", "hidden_size", "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
    assert {n: had[n] for n in same} == {n: has[n] for n in same} and "auto_map" not in has
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")
    assert read(tmp_path / "ours")[1] == read(tmp_path / "again")[1]


def test_nosa_keeps_a_and_delta_in_float32(tmp_path):
    source, _ = save_nosa(tmp_path / "nosa")
    convert(source, tmp_path / "ours", dtype="bfloat16")
    tensors, config = read(tmp_path / "ours")
    assert config["dtype"] == "bfloat16" and tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    for name, tensor in read(source)[0].items():
        if name.endswith((".A", "delta.weight")):
            assert torch.equal(tensors[name.replace("self_attn.", "self_attn.selector.")], tensor)


def test_a_model_loaded_in_bfloat16_keeps_a_and_delta_in_float32(tmp_path):
    convert(save_nosa(tmp_path / "nosa")[0], tmp_path / "ours", dtype="bfloat16")
    model = SSAForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if ".selector." in name} == {torch.float32}


def test_nosa_is_known_by_its_tensors(tmp_path):
    source, _ = save_nosa(tmp_path / "nosa", architectures=["LlamaForCausalLM"])
    assert convert(source, tmp_path / "ours").method == "moba+eviction"


def test_nosa_of_another_selection_says_so(tmp_path):
    convert(save_nosa(tmp_path / "nosa")[0], tmp_path / "ours", num_selected_blocks=80, method="ssa")
    config = read(tmp_path / "ours")[1]
    (tmp_path / "ours" / "config.json").write_text(
        json.dumps(config | {"selector_options": NOSA_OPTIONS | {"local_blocks": 8}, "attention_mode": "full"})
    )
    report = convert(tmp_path / "ours", tmp_path / "back", to="nosa")
    assert "budget 80x64, local_blocks = 8: their code has NOSA's released selection built in" in str(report)
    convert(tmp_path / "back", tmp_path / "again")  # ours reads what theirs ignores
    assert read(tmp_path / "again")[1]["selector_options"] == NOSA_OPTIONS | {"local_blocks": 8}
    fields = ("method", "selector", "block_size", "num_selected_blocks", "attention_mode")
    assert [read(tmp_path / "again")[1][name] for name in fields] == ["ssa", "eviction", 64, 80, "full"]
    convert(tmp_path / "back", tmp_path / "moba", method="moba")  # which reads its budget, whatever ssa did
    assert [read(tmp_path / "moba")[1][name] for name in fields] == ["moba", "eviction", 64, 80, "sparse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "llama"}, "selector eviction adds a bias"),
        ({"to": "llama-nsa"}, "eviction cannot be exported to llama-nsa, which knows means alone"),
        ({"to": "minicpm"}, "eviction cannot be exported to minicpm, which knows windows alone"),
        ({"selector": "windows"}, "A and delta belong to the selector eviction; windows has no place"),
        ({"method": "infllmv2"}, "A and delta belong to the selector eviction; windows has no place"),
        ({"method": "nosa", "selector": "windows"}, "method nosa is moba over the selector eviction, not over 'windows'"),
        ({"method": "nsa"}, "cannot start as the same function"),
    ],
)
def test_what_nosa_cannot_become(tmp_path, arguments, message):
    source, _ = save_nosa(tmp_path / "nosa")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.A"), r"no tensor 'model\.layers\.1\.self_attn\.A'"),
        (lambda t: t.update({"model.layers.1.self_attn.A": torch.ones(3)}), r"'model\.layers\.1\.self_attn\.A' has shape \[3\]"),
        (lambda t: t.update({"model.layers.1.self_attn.B": torch.ones(2)}), r"'model\.layers\.1\.self_attn\.B', for which a nosa"),
        (lambda t: t.update({"model.layers.1.self_attn.delta.bias": torch.ones(2)}), r"no tensor 'model\.layers\.0\.self_attn\.delta\.bias'"),
        (lambda t: t.update({"model.layers.1.self_attn.selector.A": torch.ones(2)}), "under NOSA's names and under ours"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), r"no tensor 'model\.layers\.0\.mlp\.up_proj"),
    ],
)  # fmt: skip
def test_tensors_of_nosa_are_accounted_for(tmp_path, change, message):
    tensors, config = read(save_nosa(tmp_path / "nosa")[0])
    change(tensors)
    with pytest.raises(UserError, match=message):
        convert(write(tmp_path / "changed", tensors, config), tmp_path / "out")


# A selector that is new to the source


@pytest.mark.parametrize("method, trained", [("nosa", "moba"), ("ssa", "ssa")])
def test_a_llama_becomes_nosa_and_keeps_its_function(tmp_path, method, trained):
    random_llama().save_pretrained(tmp_path / "llama")
    report = convert(tmp_path / "llama", tmp_path / "ours", method=method, selector="eviction", dtype="bfloat16")
    assert "new selector eviction: its weights (A, delta.weight) start fresh in each layer" in str(report)
    assert "attention_mode='full' computes what the source computes" in str(report)
    tensors, config = read(tmp_path / "ours")
    assert [config[n] for n in ("method", "selector", "block_size", "num_selected_blocks")] == [trained, "eviction", 64, 64]
    for layer in range(2):
        a, delta = (tensors[f"model.layers.{layer}.self_attn.selector.{name}"] for name in ("A", "delta.weight"))
        assert (a.tolist(), bool(delta.any()), delta.shape) == ([1, 1], False, (2, 16))
        assert a.dtype == delta.dtype == torch.float32
    convert(tmp_path / "llama", tmp_path / "float", method=method, selector="eviction")
    expected = logits(LlamaForCausalLM.from_pretrained(tmp_path / "llama"))
    torch.testing.assert_close(ours(tmp_path / "float", attention_mode="full"), expected, rtol=0, atol=1e-5)
    # and out: the constant gate folds into NOSA's o_proj
    convert(tmp_path / "float", tmp_path / "theirs", to="nosa")
    theirs, llama = read(tmp_path / "theirs")[0], load_file(tmp_path / "llama" / "model.safetensors")
    assert {n for n in theirs if n not in llama} == {
        f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("A", "delta.weight")
    }
    assert all(torch.equal(theirs[name], llama[name]) for name in llama)


def test_a_new_nosa_starts_as_unbiased_attention():
    model = SSAForCausalLM(SSAConfig(**TINY, method="nosa", block_size=64, num_selected_blocks=64))
    for layer in model.model.layers:  # nothing has drawn them anew since their class made them
        assert layer.self_attn.selector.A.tolist() == [1, 1] and not layer.self_attn.selector.delta.weight.any()


def test_our_own_gets_another_selector_only_where_nothing_is_lost(tmp_path):
    random_llama().save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "means", block_size=64, num_selected_blocks=64)
    convert(tmp_path / "means", tmp_path / "nosa", selector="eviction")
    assert read(tmp_path / "nosa")[0]["model.layers.1.self_attn.selector.A"].tolist() == [1, 1]
    torch.testing.assert_close(ours(tmp_path / "nosa", attention_mode="full"), ours(tmp_path / "means", attention_mode="full"), rtol=0, atol=1e-5)  # fmt: skip
    convert(tmp_path / "nosa", tmp_path / "moba", method="moba")  # keeps its selector and A
    assert read(tmp_path / "moba")[1]["selector"] == "eviction"
    assert_same_tensors(tmp_path / "nosa", tmp_path / "moba")
    with pytest.raises(UserError, match=r"selector\.A', for which a ssa with the selector means has no place"):
        convert(tmp_path / "nosa", tmp_path / "out", selector="means")
    tensors, config = read(tmp_path / "nosa")
    del tensors["model.layers.1.self_attn.selector.A"]
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.1\.self_attn\.selector\.A'"):
        convert(write(tmp_path / "damaged", tensors, config), tmp_path / "out")


def test_a_released_checkpoint_gets_another_selector(tmp_path):
    random_llama().save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "theirs", to="llama-nsa", block_size=64, num_selected_blocks=64)
    report = convert(tmp_path / "theirs", tmp_path / "ours", method="ssa", selector="eviction", selection_rule="exact")
    assert "new selector eviction" in str(report)
    tensors = read(tmp_path / "ours")[0]
    assert tensors["model.layers.1.self_attn.selector.A"].tolist() == [1, 1]
    with pytest.raises(UserError, match="eviction cannot be exported to llama-nsa"):
        convert(tmp_path / "ours", tmp_path / "out", to="llama-nsa")


# MiniCPM4


def save_minicpm(path: Path, dtype=torch.float32, tied=False, scales=(12, 1.4, 8), **config):
    """(directory with random weights under MiniCPM4's names, the model that computes it: a Llama whose scales are hooks)."""
    model = random_llama(tie_word_embeddings=tied, rope_parameters=LONGROPE | {"rope_theta": 1e4}).to(dtype)
    embedding, depth, base = scales
    add_scales(model, embedding, depth, base)
    values = {name: value for name, value in TINY.items() if name != "tie_word_embeddings"}
    values |= {
        "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "hidden_act": "silu", "rope_theta": 1e4,
        "rope_scaling": LONGROPE, "scale_emb": embedding, "scale_depth": depth, "dim_model_base": base, "mup_denominator": 32,
        "torch_dtype": str(dtype).removeprefix("torch."), "sparse_config": SPARSE,
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    } | ({} if tied else {"tie_word_embeddings": False})  # fmt: skip
    tensors = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return write(path, tensors, {name: value for name, value in (values | config).items() if value is not None}), model


def add_scales(model, embedding, depth, base):
    branch = depth / math.sqrt(len(model.model.layers))
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out * embedding)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / (model.config.hidden_size / base),))
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, out: out * branch)
        layer.mlp.register_forward_hook(lambda module, args, out: out * branch)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [None, "ssa"])
def test_minicpm_computes_the_scaled_llama(tmp_path, tied, method):
    source, oracle = save_minicpm(tmp_path / "source", tied=tied)
    report = convert(source, tmp_path / "ours", method=method)
    expected = logits(oracle)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tmp_path / "ours", attention_mode="full"), expected, rtol=0, atol=2e-5)
    tensors, config = read(tmp_path / "ours")
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in tensors)
    assert (config["method"], config["selector"], config["attention_gate"]) == (method or "moba", "windows", False)
    assert (config["block_size"], config["num_selected_blocks"]) == (64, 96)
    assert config["selector_options"] == {"mean_size": 32, "mean_stride": 16, "sink_blocks": 1, "local_blocks": 32, "dense_length": 8192}  # fmt: skip
    assert config["eos_token_id"] == [2, 256]
    assert "dense_len = 8192: queries at positions below it read everything" in str(report)
    for to in ("llama", "minicpm"):
        convert(tmp_path / "ours", tmp_path / to, to=to)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "llama")), expected, rtol=0, atol=2e-5)
    # out again: neutral scales, so that their code computes what the weights say
    values = read(tmp_path / "minicpm")[1]
    assert values["sparse_config"] == SPARSE and values["rope_scaling"] == LONGROPE and values["rope_theta"] == 1e4
    assert values["model_type"] == "minicpm" and not {"rope_parameters", "mlp_bias", "auto_map"} & values.keys()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    add_scales(again, values["scale_emb"], values["scale_depth"], values["dim_model_base"])
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-5)
    assert "scales" not in str(convert(tmp_path / "minicpm", tmp_path / "again", method=method))
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")
    assert read(tmp_path / "ours")[1] == read(tmp_path / "again")[1]


def test_minicpm_scales_are_rounded_once_and_it_is_said(tmp_path):
    source, _ = save_minicpm(tmp_path / "source", torch.bfloat16)
    report = convert(source, tmp_path / "ours")
    theirs, tensors = read(source)[0], read(tmp_path / "ours")[0]
    assert "the scales in the weights of down_proj, embed_tokens, o_proj are rounded once to bfloat16, not exact" in str(report)
    branch = 1.4 / math.sqrt(2)
    for name, factor in (
        ("model.embed_tokens.weight", 12),
        ("model.norm.weight", 0.25),
        ("model.layers.1.self_attn.o_proj.weight", branch),
        ("model.layers.1.mlp.down_proj.weight", branch),
    ):
        assert torch.equal(tensors[name], (theirs[name].double() * factor).bfloat16()), name
    scaled = ("embed_tokens.weight", "model.norm.weight", "o_proj.weight", "down_proj.weight")
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs if not name.endswith(scaled))
    exact, _ = save_minicpm(tmp_path / "exact", torch.bfloat16, scales=(4, math.sqrt(2) * 0.5, 8))
    assert "rounded" not in str(convert(exact, tmp_path / "ours2"))
    assert "--dtype" not in str(convert(source, tmp_path / "ours3", dtype="float32"))
    large, _ = save_minicpm(tmp_path / "large", scales=(1e6, 1.4, 8))
    with pytest.raises(UserError, match=r"embed_tokens\.weight times 1e\+06 is beyond torch\.float16"):
        convert(large, tmp_path / "out", dtype="float16")


def test_minicpm_without_sparse_config_is_dense(tmp_path):
    source, oracle = save_minicpm(tmp_path / "source", sparse_config=None)
    report = str(convert(source, tmp_path / "ours"))
    assert "no sparse_config: the source attends to everything" in report and "attention_mode='full' computes" in report
    assert (read(tmp_path / "ours")[1]["num_selected_blocks"], read(tmp_path / "ours")[1]["selector"]) == (96, "windows")
    convert(source, tmp_path / "means", selector="means", block_size=16, num_selected_blocks=16, gate=True)
    config = SSAConfig.from_pretrained(tmp_path / "means")
    assert (config.attention_name, config.attention_gate, str(config.budget)) == ("moba", True, "16x16")
    torch.testing.assert_close(ours(tmp_path / "means", attention_mode="full"), logits(oracle), rtol=0, atol=2e-5)


def test_another_selector_does_not_inherit_options(tmp_path):
    source, oracle = save_minicpm(tmp_path / "source")
    convert(source, tmp_path / "nosa", selector="eviction")
    convert(source, tmp_path / "windows")
    convert(tmp_path / "windows", tmp_path / "own", selector="eviction", gate=False)
    assert_same_tensors(tmp_path / "nosa", tmp_path / "own")
    for name in ("nosa", "own"):
        assert read(tmp_path / name)[1]["selector_options"] is None
        torch.testing.assert_close(ours(tmp_path / name, attention_mode="full"), logits(oracle), rtol=0, atol=2e-5)


def test_minicpm_that_is_always_sparse(tmp_path):
    source, _ = save_minicpm(tmp_path / "source", sparse_config=SPARSE | {"dense_len": -1})
    assert "dense_len" not in str(convert(source, tmp_path / "ours"))
    assert read(tmp_path / "ours")[1]["selector_options"]["dense_length"] == 0
    convert(tmp_path / "ours", tmp_path / "back", to="minicpm")
    assert read(tmp_path / "back")[1]["sparse_config"]["dense_len"] == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_emb": None}, "scale_emb = None is not a positive number"),
        ({"scale_depth": "1.4"}, r"scale_depth = '1\.4' is not a positive"),
        ({"dim_model_base": 0}, "dim_model_base = 0 is not a positive"),
        ({"sparse_config": [1]}, "sparse_config = .* is not an object"),
        ({"sparse_config": SPARSE | {"use_nope": True}}, "use_nope selects by keys without RoPE"),
        ({"sparse_config": SPARSE | {"topk": 0}}, "topk = 0 is not an integer of at least 1"),
        ({"sparse_config": SPARSE | {"kernel_size": "32"}}, "kernel_size = '32' is not an integer"),
        ({"model_type": "minicpm3"}, "'minicpm3' compresses its keys and values"),
        ({"num_experts": 8, "model_type": "minicpm_sala"}, "'minicpm_sala' has layers of linear attention"),
    ],
)
def test_minicpm_configurations_that_cannot_be(tmp_path, changes, message):
    source, _ = save_minicpm(tmp_path / "source", **changes)
    with pytest.raises(UserError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "heads of hidden_size"),
        ({"mlp_bias": True}, "no biases in its MLP"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8192}}, "rope_type 'yarn'"),
        ({"rope_parameters": LONGROPE | {"rope_theta": 1e4, "short_factor": FACTORS, "attention_factor": 1.19}}, "attention_factor of longrope"),
    ],
)  # fmt: skip
def test_what_minicpm_has_no_place_for(tmp_path, changes, message):
    random_llama(**changes).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "llama", tmp_path / "out", selector="windows", to="minicpm")
    with pytest.raises(UserError, match="means cannot be exported to minicpm, which knows windows alone"):
        convert(tmp_path / "llama", tmp_path / "out", to="minicpm")


def test_their_longrope_goes_by_the_lengths(tmp_path):
    """Of 32k stretched to 64k: sqrt(1 + log 2 / log 32768), whatever factors config.json has besides."""
    source, _ = save_minicpm(
        tmp_path / "minicpm", max_position_embeddings=65536, rope_scaling=LONGROPE | {"attention_factor": 3.0}
    )
    convert(source, tmp_path / "ours")
    model = SSAForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.model.rotary_emb.attention_scaling == pytest.approx(math.sqrt(1 + math.log(2) / math.log(32768)))
    convert(tmp_path / "ours", tmp_path / "back", to="minicpm")
    assert read(tmp_path / "back")[1]["rope_scaling"] == LONGROPE
