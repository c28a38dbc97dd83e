"""Model directories that other people wrote: what config.json may decide, and what it may not."""

import json
import struct
import sys
import types

import pytest
import torch

from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.infer.load import load_model
from ssa.model.convert import convert
from ssa.model.stored import check_weights, parameter_shapes, read_config
from ssa.testing import tiny_model


@pytest.fixture
def directory(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def refused(directory, match, load=load_model):
    with pytest.raises(UserError, match=match) as caught:
        load(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "keys",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel", "_experts_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel", "use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernel:Norm"}},
        {"text_config": {"_attn_implementation": "evil/kernel"}, "decoder": {"attn_implementation": "evil/kernel"}},
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}, "trust_remote_code": True},
    ],
)
def test_nothing_in_a_config_names_code_to_run(directory, tmp_path, monkeypatch, keys):
    asked = []

    def ask(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("no kernels here")

    from transformers.integrations import hub_kernels

    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_kernel=ask, __version__="9"))
    monkeypatch.setattr(hub_kernels, "get_kernel", ask, raising=False)
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", ask, raising=False)
    (directory / "evil.py").write_text("raise SystemExit('executed')\n")
    edit(directory, **keys)
    model, _ = load_model(directory)
    convert(directory, tmp_path / "converted")
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, tiny_model().eval()(ids).logits)
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    ours = {"_attn_implementation_internal", "_experts_implementation_internal"}
    assert asked == [] and not {*keys} & ({*written, *vars(model.config)} - ours - {"auto_map"})
    assert "evil" not in json.dumps(written) and "evil" not in str(vars(model.config))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_hidden_layers": 10**6}, "1000000 layers, but there are only"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, but there are only"),
        ({"hidden_size": 10**9}, r"config\.json: hidden_size = 1000000000 is not in 1\.\."),
        ({"hidden_size": 1 << 17}, r"tensor model\.embed_tokens\.weight has shape \[258, 64\]|has shape"),
        ({"vocab_size": 1 << 34}, "vocab_size"),
        ({"vocab_size": 1 << 23}, r"asks for \[8388608, "),
        ({"vocab_size": -5}, "vocab_size = -5"),
        ({"max_position_embeddings": 10**13}, "max_position_embeddings"),
        ({"hidden_size": "256"}, "hidden_size = '256' is not int"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"block_size": 0}, "at least 1 key"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps = \[1\] is not float"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta = -1"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "makes no model"),
        ({"rope_parameters": 3}, r"config\.json"),
        ({"hidden_act": "nope"}, "makes no model"),
        ({"dtype": "load"}, "dtype = 'load'"),
        ({"torch_dtype": "int8"}, "dtype = 'int8'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised weights"),
        ({"attention_gate": "no"}, "attention_gate = 'no' is not bool"),
        ({"eos_token_id": {}}, "eos_token_id"),
        ({"model_type": "llama"}, "type 'llama'"),
        ({"model_type": ["ssa"]}, "is of type"),
        ({"rms_norm_eps": float("nan")}, "a number is not finite"),
        ({"initializer_range": float("inf")}, "a number is not finite"),
    ],
)
def test_configurations_of_no_model_are_one_line_at_once(directory, changes, says):
    edit(directory, **changes)
    refused(directory, says)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ['{"x":' + "[" * 10**5 + "]" * 10**5 + "}", "[]", "", '{"x": "\xff"}'])
def test_files_that_are_no_settings_are_one_line(directory, file, text):
    (directory / file).write_bytes(text.encode("latin1"))
    refused(directory, file if file != "tokenizer_config.json" else "tokenizer")


def test_an_adapter_is_not_applied_by_accident(directory):
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"}))
    refused(directory, "adapter_config.json")


@pytest.mark.parametrize(
    "header, length, says",
    [
        (b"{}", 1 << 62, "damaged or incomplete"),
        (json.dumps({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}).encode(), None, "damaged or incomplete"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}}).encode(), None, "damaged or incomplete"),
        (b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}", None, "damaged or incomplete"),
        (json.dumps({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(99)}).encode(), None, "missing tensor"),
        (json.dumps({"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}).encode(), None, "quantised"),
    ],
)  # fmt: skip
def test_headers_of_weights_that_lie(directory, header, length, says):
    body = b"" if b"[0, 0]" in header else bytes(8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    refused(directory, says)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..\\x.safetensors", "sub/x.safetensors", 5, None, "x.safetensors\0"]
)
def test_an_index_does_not_lead_out_of_the_directory(directory, name):
    (directory / "model.safetensors").rename(directory.parent / "secret.safetensors")
    (directory / "other.safetensors").touch()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
    refused(directory, "only .*safetensors beside the index")


def test_more_layers_than_make_sense_are_not_laid_out(directory):
    from ssa.model.stored import MAX_LAYERS, check_layers
    from ssa.model.weights import Weights

    edit(directory, num_hidden_layers=5000)
    many = Weights({f"x{i}": None for i in range(6000)}, None, 1)
    with pytest.raises(UserError, match=f"5000 layers; {MAX_LAYERS} are the most"):
        check_layers(read_config(directory), many)


def test_what_is_whole_is_accepted(directory):
    config = read_config(directory)
    check_weights(directory, config)
    assert {*parameter_shapes(config)} == {*dict(tiny_model().named_parameters())}
    edit(directory, mine="a note", tie_word_embeddings=False)
    refused(directory, "missing tensor lm_head.weight")
