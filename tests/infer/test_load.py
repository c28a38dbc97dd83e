import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssa.budget import FULL, Budget
from ssa.data.tokenizer import train_bpe
from ssa.device import resolve_device
from ssa.errors import UserError
from ssa.infer.load import attention_choice, load_model
from ssa.testing import tiny_model


def test_the_model_that_was_saved(saved):
    model, tokenizer = load_model(saved(), "cpu")
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[name].cpu()) for name, value in model.state_dict().items())
    assert not model.training and model.dtype == torch.float32 and tokenizer.eos_token_id == 256
    assert model.config.attention_mode == "sparse" and model.config.budget == Budget(3, 4)


def test_mode_budget_and_dtype(saved):
    path = saved()
    model, _ = load_model(path, dtype="bfloat16", mode="full")
    assert model.dtype == torch.bfloat16 and model.config.attention_mode == "full"
    model, _ = load_model(path, budget="2x8")
    assert model.config.budget == Budget(2, 8)
    assert load_model(saved("full", "other"), budget="2x8")[0].config.attention_mode == "sparse"
    assert load_model(path, budget="full")[0].config.attention_mode == "full"


@pytest.mark.parametrize(
    "mode, budget, expected",
    [
        (None, None, (None, None)),
        ("full", None, ("full", FULL)),
        ("full", FULL, ("full", FULL)),
        ("sparse", None, ("sparse", None)),
        (None, "4x16", ("sparse", Budget(4, 16))),
        (None, " full", ("full", FULL)),
    ],
)
def test_attention_choice(mode, budget, expected):
    assert attention_choice(mode, budget) == expected


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"mode": "dense"}, "mode 'dense'"),
        ({"budget": "4*16"}, "budget '4\\*16'"),
        ({"mode": "sparse", "budget": "full"}, "contradict"),
        ({"device": "cuda:77"}, "'cuda:77' does not exist"),
        ({"device": "quantum"}, "'quantum' is unknown"),
        ({"device": "meta"}, "'meta' is not supported"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_bad_arguments(saved, arguments, match):
    with pytest.raises(UserError, match=match) as caught:
        load_model(saved(), **arguments)
    assert "\n" not in str(caught.value)


def test_mps_only_where_it_exists():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    with pytest.raises(UserError, match="'mps' does not exist"):
        resolve_device("mps")


def rename_type(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def truncate(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_tensor(path):
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.g_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def cut_tensor(path):
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(path):
    train_bpe(["many different words " * 3, "".join(map(chr, range(300, 600)))], 400).save_pretrained(path)


@pytest.mark.parametrize(
    "harm, match",
    [
        (rename_type, "type 'llama'.* ssa convert"),
        (truncate, "cannot be loaded"),
        (drop_tensor, r"missing tensor model\.layers\.1\.self_attn\.g_proj"),
        (cut_tensor, r"norm\.weight|cannot be loaded"),
        (other_tokenizer, "do not belong together"),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["type", "truncated", "missing", "mismatched", "tokenizer", "config", "no-tokenizer"],
)
def test_damaged_models_are_one_line(saved, harm, match):
    path = saved()
    harm(path)
    with pytest.raises(UserError, match=match) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_budget_that_the_released_rule_cannot_serve(saved):
    path = saved(selection_rule="released", num_selected_blocks=4)
    with pytest.raises(UserError, match="'released'"):
        load_model(path, budget="3x4")
    load_model(path, budget="2x4")


def test_full_attention_has_no_budget():
    with pytest.raises(UserError, match="contradict"):
        attention_choice("full", "4x16")
