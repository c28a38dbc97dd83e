"""A budget for each layer in the configuration: honoured by every pass, saved, loaded, converted, checked."""

import json

import pytest
import torch

from ssa.budget import FULL, Budget, LayerBudgets
from ssa.config import Recipe
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.infer.load import load_model
from ssa.model import SSAForCausalLM
from ssa.model.convert import convert
from ssa.model.stored import load_pretrained, read_config
from ssa.testing import tiny_config, tiny_model
from ssa.train.build import with_method

BUDGETS = ["1x4", "full"]


def ids(tokens=40):
    return torch.randint(258, (2, tokens), generator=torch.Generator().manual_seed(1))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(ids(), use_cache=False, **kwargs).logits


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    tiny_model("moba", layer_budgets=BUDGETS).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("budgets", [["1x4", "2x4"], ["2x8", "1x4"], BUDGETS, ["full", "full"]])
@pytest.mark.parametrize("method", ["moba", "nsa", "ssa"])
def test_a_sparse_pass_reads_what_its_layers_say(method, budgets):
    model, plain = tiny_model(method, layer_budgets=budgets), tiny_model(method)
    for asked in ({}, {"attention_mode": "sparse"}):
        own = logits(model, **asked)
        assert own.equal(logits(plain, budget=budgets))
        assert own.equal(logits(plain, **asked, budget=LayerBudgets.parse(budgets)))
    if method != "nsa":  # whose compressed branch stays, with the blocks' size
        assert logits(model, attention_mode="full").equal(logits(plain, attention_mode="full"))
    assert logits(model, budget="3x4").equal(logits(plain)), "a budget that is asked for replaces them"
    assert not logits(model).equal(logits(plain))


def test_a_model_that_reads_everything_by_itself_reads_them_where_sparse_is_asked_for():
    model, plain = tiny_model("full", layer_budgets=["1x4", "2x4"]), tiny_model("full")
    assert logits(model).equal(logits(plain))
    assert logits(model, attention_mode="sparse").equal(logits(plain, budget=["1x4", "2x4"]))


@pytest.mark.parametrize("budgets", [["1x4", "2x4"], BUDGETS])
def test_generated_tokens_are_those_of_the_same_budgets_by_hand(budgets):
    model, plain = tiny_model("moba", layer_budgets=budgets), tiny_model("moba")
    prompt = ids(21)
    found = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert found.equal(plain.generate(prompt, max_new_tokens=12, do_sample=False, budget=tuple(budgets)))
    assert not found.equal(plain.generate(prompt, max_new_tokens=12, do_sample=False))


def test_training_refuses_them_and_names_the_way_out():
    for method in ("moba", "ssa", "full"):
        model = tiny_model(method, layer_budgets=["1x4", "2x4"]).train()
        with pytest.raises(UserError, match=r"layer_budgets are not for training: set config\.layer_budgets = None"):
            model(ids(), labels=ids())
        with torch.no_grad():  # a policy that generates
            model(ids())
        model.config.layer_budgets = None
        model(ids(), labels=ids()).loss.backward()


def test_training_that_starts_from_such_a_model_takes_the_recipes_budget():
    recipe = Recipe()
    config = with_method(tiny_config(layer_budgets=BUDGETS), recipe)
    assert config.layer_budgets is None
    assert config.budget == Budget(recipe.model.num_selected_blocks, recipe.model.block_size)


def test_saved_and_loaded_they_are_the_same(saved):
    config = read_config(saved)
    assert config.layer_budgets == BUDGETS and config.budget == LayerBudgets((Budget(1, 4), FULL))
    assert str(config.budget) == "tuned-1x4+1full" and config.uniform_budget == Budget(3, 4)
    model, _ = load_model(saved, "cpu")
    assert logits(model).equal(logits(tiny_model("moba"), budget=BUDGETS))
    assert logits(SSAForCausalLM.from_pretrained(saved).eval()).equal(logits(model))
    card = (saved / "README.md").read_text()
    assert "by layer, 1x4, full" in card and "budget=" not in card


def test_a_budget_given_to_load_model_replaces_them(saved):
    plain = tiny_model("moba")
    assert logits(load_model(saved, "cpu", budget="2x4")[0]).equal(logits(plain, budget="2x4"))
    others = LayerBudgets.parse(["2x4", "1x4"])
    assert logits(load_model(saved, "cpu", budget=others)[0]).equal(logits(plain, budget=["2x4", "1x4"]))
    with pytest.raises(UserError, match="budget names 1 layers, and the model has 2"):
        load_model(saved, "cpu", budget=LayerBudgets.parse(["2x4"]))


def test_converted_they_stay_unless_another_budget_is_asked_for(saved, tmp_path):
    assert "tuned-1x4+1full" in str(convert(saved, tmp_path / "same"))
    assert read_config(tmp_path / "same").layer_budgets == BUDGETS
    report = convert(saved, tmp_path / "other", num_selected_blocks=2)
    config = read_config(tmp_path / "other")
    assert config.layer_budgets is None and config.budget == Budget(2, 4)
    assert any("budgets for each layer are not kept" in note for note in report.notes)
    report = convert(saved, tmp_path / "theirs", to="llama-nsa")
    assert "layer_budgets" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert any("llama-nsa knows one, 3x4" in note for note in report.notes) and "budget 3x4" in str(report)


@pytest.mark.parametrize(
    ("budgets", "changes", "words"),
    [
        (["1x4"], {}, "layer_budgets names 1 layers, and num_hidden_layers = 2"),
        (["1x4", "many"], {}, "'many' is not BLOCKSxSIZE"),
        (["1x4", "0x4"], {}, "needs at least 1 block"),
        (["1x4", f"1x{1 << 40}"], {}, "whose block_size is not in"),
        (["2x4", "3x4"], {"selection_rule": "released", "num_selected_blocks": 2}, "released"),
    ],
)
def test_budgets_that_cannot_be_are_refused_with_the_configuration(budgets, changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(layer_budgets=budgets, **changes)


def test_budgets_that_the_selector_cannot_serve_are_refused_with_the_model(tmp_path):
    windows = {"selector": "windows", "selector_options": {"mean_size": 4, "mean_stride": 2, "local_blocks": 1}}
    path = tmp_path / "model"
    tiny_model("moba", layer_budgets=["3x4", "4x4"], **windows).save_pretrained(path)
    with pytest.raises(UserError, match="less than what is always read"):
        tiny_model("moba", layer_budgets=["3x4", "2x4"], **windows)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"layer_budgets": ["3x4", "2x4"]}))
    with pytest.raises(UserError, match="less than what is always read"):
        load_pretrained(path, read_config(path), torch.float32)
    (path / "config.json").write_text(json.dumps(values | {"layer_budgets": [3, 4]}))
    with pytest.raises(UserError, match="layer_budgets"):
        read_config(path)


def test_the_model_compiles_with_them():
    model = tiny_model("moba", layer_budgets=BUDGETS)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))
