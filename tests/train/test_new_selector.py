"""Going on from a checkpoint with a selector that it did not have."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ssa.attention.selectors.means import MeansSelector
from ssa.errors import UserError
from ssa.methods import SelectorKind, register_selector, unregister
from ssa.model.stored import load_pretrained, read_config
from ssa.train.trainer import train


class Weighted(MeansSelector):
    """Block means, and a bias of which only its class knows where it starts."""

    adds_bias = True

    def __init__(self, shape):
        super().__init__(shape)
        self.scale = nn.Parameter(torch.full((shape.kv_heads,), 0.25))
        self.inner = nn.Linear(shape.head_dim, 1, bias=False)
        nn.init.constant_(self.inner.weight, 0.5)

    def key_bias(self, k, v):
        return self.scale * self.inner(v).squeeze(-1).float()


@pytest.fixture(autouse=True)
def weighted():
    register_selector(SelectorKind("weighted", "weighted", f"{__name__}:Weighted"))
    yield
    unregister("weighted")


def test_a_new_selector_starts_fresh_and_it_is_said(recipe, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    base = train(recipe(steps=1, method="moba"), tmp_path / "base")
    assert "new selector" not in capfd.readouterr().out
    asked = recipe(steps=1, method="ssa", init_from=str(base.out), selector="weighted", lr=1e-4)
    result = train(asked, tmp_path / "more")
    assert capfd.readouterr().out.count("new selector weighted: its weights (inner.weight, scale) start fresh in each layer") == 1
    assert "MISSING" not in caplog.text  # transformers would report them as random
    assert json.loads((result.checkpoint / "config.json").read_text())["selector"] == "weighted"
    start, end = (load_file(run.checkpoint / "model.safetensors") for run in (base, result))
    new = {name: tensor for name, tensor in end.items() if name not in start}
    assert len(new) == 4 and all(".self_attn.selector." in name for name in new)
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.25 if "scale" in name else 0.5), rtol=0, atol=1e-3)
    assert all((end[name] - start[name]).abs().max() < 1e-3 for name in start)  # one small step away, not a new model
    train(recipe(steps=2, method="ssa", init_from=str(base.out), selector="weighted", lr=1e-4), tmp_path / "more", resume=True)
    assert "new selector" not in capfd.readouterr().out


def test_nothing_else_may_be_missing(recipe, tmp_path):
    base = train(recipe(steps=1, method="moba"), tmp_path / "base").checkpoint
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")

    def attempt(selector, **changes):
        save_file({name: t for name, t in (tensors | changes).items() if t is not None}, model / "model.safetensors")
        train(recipe(steps=1, method="moba", init_from=str(model), selector=selector), tmp_path / "out", overwrite=True)

    with pytest.raises(UserError, match=r"init_from.*missing tensor model\.norm\.weight"):
        attempt("weighted", **{"model.norm.weight": None})
    with pytest.raises(UserError, match=r"unexpected tensor 'model\.layers\.0\.self_attn\.selector\.scale'.* selector means"):
        attempt("means", **{"model.layers.0.self_attn.selector.scale": torch.ones(1)})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"selector": "weighted"}))
    with pytest.raises(UserError, match=r"missing tensor model\.layers\.0\.self_attn\.selector\."):
        attempt("weighted")  # its own, which it says it has
    with pytest.raises(UserError, match="missing tensor"):
        load_pretrained(model, read_config(model), torch.float32)
