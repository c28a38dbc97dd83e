"""A package outside of this one adds methods and selectors: nothing here knows of them before they register."""

import importlib.metadata
import json

import learned
import pytest
import streaming
import torch

from ssa import methods
from ssa.budget import FULL
from ssa.cli import main
from ssa.config import TrainRecipe
from ssa.errors import UserError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.testing import check_method, check_selector, tiny_config, tiny_model
from ssa.train.optim import build_optimizer, parameter_groups


@pytest.fixture(autouse=True)
def registered():
    streaming.register()
    learned.register()
    yield
    for name in ("streaming", "plain", "streamingllm", "learned"):
        methods.unregister(name)


@pytest.mark.parametrize("method", ["ssa", "moba", "nsa", "plain", "full"])
def test_streaming_does_what_a_selector_must(method):
    check_selector("streaming", {"sinks": 1}, method=method)


@pytest.mark.parametrize("method", ["ssa", "moba", "plain", "full"])
def test_a_selector_with_weights_does_what_it_must(method):
    check_selector("learned", method=method)


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_ours_do_what_they_must(method):
    check_method(method)
    if method != "nsa":
        check_method(method, selection_scope="head", num_key_value_heads=1)


SHAPE = ["--model.hidden-size", "32", "--model.intermediate-size", "48", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2",
         "--model.head-dim", "16", "--model.block-size", "4", "--model.num-selected-blocks", "3", "--data.context", "64"]  # fmt: skip


def test_every_verb_takes_a_run_of_it(prepared, tmp_path, capsys):
    """Trained under an alias, evaluated, generated from, analysed, reported, benched: nothing in the library names it."""
    run, page = tmp_path / "run", tmp_path / "page.html"
    arguments = ["--model.method", "streamingllm", "--model.selector-options", "sinks", "1", "--data.path", str(prepared)]
    assert main(["train", "tiny", "--out", str(run), *SHAPE, *arguments, "--train.steps", "3", "--train.device", "cpu"]) == 0
    config = json.loads((next((run / "checkpoints").iterdir()) / "config.json").read_text())
    assert (config["method"], config["selector"], config["selector_options"]) == ("plain", "streaming", {"sinks": 1})
    assert json.loads((run / "environment.json").read_text())["starts"][0]["flops_per_token"]["sparse"] > 0
    assert main(["eval", str(run), "--budgets", "2x4,full", "--max-tokens", "200", "--device", "cpu"]) == 0
    assert (
        main(["generate", str(run), "--prompt", "A prompt", "--max-new-tokens", "5", "--budget", "2x4", "--device", "cpu"]) == 0
    )
    assert main(["analyze", str(run), "--data", str(prepared), "--max-tokens", "128", "--context", "64", "--device", "cpu"]) == 0
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert "plain+streaming" in page.read_text()
    bench = ["bench", "train", "tiny", *SHAPE, "--variants", "plain+streaming", "--train.device", "cpu", "--seconds", "0.01"]
    assert main([*bench, "--out", str(tmp_path / "bench.json")]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["variant"] == "plain+streaming" and row["tokens_per_second"] > 0
    capsys.readouterr()
    assert main(["eval", str(run), "--budgets", "1x4", "--max-tokens", "200", "--device", "cpu"]) == 2
    assert "num_selected_blocks = 1 must be more than sinks = 1" in capsys.readouterr().err


def test_an_entry_point_registers_before_the_first_list_is_read(monkeypatch):
    for name in ("streaming", "plain", "streamingllm"):
        methods.unregister(name)
    point = importlib.metadata.EntryPoint("streaming", "streaming:register", methods.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == methods.GROUP else [])
    monkeypatch.setattr(methods, "_loaded", False)
    assert SSAConfig(method="streamingllm").attention_name == "plain+streaming"
    broken = importlib.metadata.EntryPoint("broken", "streaming:nothing", methods.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken])
    monkeypatch.setattr(methods, "_loaded", False)
    with pytest.raises(
        UserError, match=r"the entry point broken = streaming:nothing of ssa.methods does not work: AttributeError"
    ):
        methods.methods()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "sas"}, "method = 'sas' is not one of full, moba, nsa, ssa"),
        ({"method": ["moba"]}, "method"),
        ({"selector": "nearest"}, "selector = 'nearest' is not one of means"),
        (
            {"method": "streamingllm", "selector": "learned"},
            "method streamingllm is plain over the selector streaming, not over 'learned'",
        ),
        ({"selector": "streaming", "selector_options": {"sink": 1}}, r"selector_options.sink is no option of streaming: sinks"),
        ({"selector": "streaming", "selector_options": {"sinks": "one"}}, r"selector_options.sinks = 'one' is not int"),
        ({"selector": "streaming", "selector_options": {"sinks": 9}}, "num_selected_blocks = 3 must be more than sinks = 9"),
        ({"selector": "learned", "method": "nsa"}, "learned adds a bias, which the branches of method nsa do not have"),
    ],
)
def test_what_does_not_go_is_one_line(fields, message):
    with pytest.raises(Exception, match=message) as error:
        SSAForCausalLM(tiny_config(**fields))
    assert isinstance(error.value, UserError) or fields == {"method": ["moba"]}


def test_names_are_taken_once():
    with pytest.raises(UserError, match="there is a SelectorKind 'streaming' already"):
        streaming.register()
    with pytest.raises(UserError, match="'a b' is no name for a SelectorKind"):
        methods.register_selector(methods.SelectorKind("a b", "", "x:Y"))


def test_optimizers_leave_alone_what_a_selector_says():
    model, recipe = tiny_model("moba", selector="learned"), TrainRecipe(optimizer="muon")
    scores = {id(layer.self_attn.selector.score.weight) for layer in model.model.layers}
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert not scores & decayed and id(model.lm_head.weight) in decayed
    muon, adamw = build_optimizer(model, recipe).parts
    assert not scores & {id(p) for group in muon.param_groups for p in group["params"]}
    assert scores <= {id(p) for group in adamw.param_groups for p in group["params"]}


def test_full_attention_keeps_nothing_for_a_selection():
    model, x = tiny_model("ssa"), torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        cache = model(x[:, :30], use_cache=True, attention_mode="full").cache
        for t in range(30, 39):
            model(x[:, t : t + 1], cache=cache, use_cache=True, attention_mode="full")
        assert not any(layer._states for layer in cache.layers)
        model(x[:, 39:], cache=cache, use_cache=True)  # the first sparse reading makes them at once
    assert all(state.length == 40 for layer in cache.layers for state in layer._states.values()) and cache.layers[0]._states


def test_layers_may_read_differently():
    model, x = tiny_model("ssa"), torch.randint(0, 256, (1, 40))
    seen = []
    with torch.no_grad():
        both = model(
            x, budget=["full", "2x4"], observer=lambda layer, record: seen.append((record.mode, str(record.selection.budget)))
        ).logits
        assert seen == [("full", "3x4"), ("sparse", "2x4")]
        assert torch.equal(model(x, budget=["2x4", "2x4"]).logits, model(x, budget="2x4").logits)
        assert torch.equal(model(x, budget=FULL).logits, model(x, attention_mode="full").logits)
        assert not torch.equal(both, model(x, budget="2x4").logits) and not torch.equal(both, model(x, budget="full").logits)
        for wrong, message in (
            ({"budget": ["full"] * 3}, "names 3 layers, and the model has 2"),
            ({"budget": "full", "attention_mode": "sparse"}, "contradicts"),
            ({"budget": ["full", "2x4"], "attention_mode": "full"}, "leave out attention_mode"),
        ):
            with pytest.raises(UserError, match=message):
                model(x, **wrong)


def test_a_cache_belongs_to_one_kind_of_selector():
    x = torch.randint(0, 256, (1, 20))
    cache = tiny_model("moba", selector="learned")(x, use_cache=True).cache
    with pytest.raises(UserError, match="another selector: start with a new one"):
        tiny_model("moba")(x[:, :1], cache=cache, use_cache=True)
