"""Mode auto: which measurement it goes by, and that it reads what it says."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from ssa.errors import UserError
from ssa.infer import crossover
from ssa.infer.crossover import Crossover, Shape, auto_for, save_crossovers
from ssa.infer.decoder import Attention, Draw, decoded_tokens
from ssa.infer.engine import generate
from ssa.testing import tiny_model

H200, SHAPE = "NVIDIA H200", Shape(32, 2, 64, "16x16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "SHIPPED", tmp_path / "shipped.json")
    shipped = [
        {"device": H200, "shape": SHAPE, "batch": batch, "tokens": tokens}
        for batch, tokens in ((1, 65536), (16, 8192), (64, None))
    ]
    (tmp_path / "shipped.json").write_text(json.dumps(shipped))


def config(heads=32, kv_heads=2, size=64, budget="16x16"):
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size, budget=budget)


def test_the_nearest_measurement_decides_and_the_summary_says_whose_it_is():
    assert auto_for(H200, config(), 1) == crossover.Auto(65536, "auto: sparse from 65536 tokens on")
    assert auto_for(H200, config(), 12).tokens == 8192
    assert auto_for(H200, config(), 64) == crossover.Auto(float("inf"), "auto: full")
    assert "measured on NVIDIA H200, `ssa bench decode --model --save`" in auto_for("A new GPU", config(), 1).why
    assert "of 32/2 heads of 64, 16x16" in auto_for(H200, config(heads=16), 1).why


def test_this_devices_own_measurements_go_first():
    mine = Crossover("A new GPU", SHAPE, 1, 4096)
    path = save_crossovers([mine, Crossover("A new GPU", SHAPE, 16, 1024)])
    assert auto_for("A new GPU", config(), 1) == crossover.Auto(4096, "auto: sparse from 4096 tokens on")
    assert auto_for(H200, config(), 1).tokens == 65536
    save_crossovers([Crossover("A new GPU", SHAPE, 1, 2048)])  # in the place of the older one
    assert auto_for("A new GPU", config(), 1).tokens == 2048 and len(json.loads(path.read_text())) == 2
    path.write_text("[{}]")
    with pytest.raises(UserError, match=r"crossovers.json holds no measurements .*: delete it"):
        auto_for(H200, config(), 1)


def test_what_the_package_ships_can_be_read(monkeypatch):
    monkeypatch.undo()
    assert all(one.batch >= 1 and len(one.shape) == 4 for one in crossover._read(crossover.SHIPPED))


@pytest.mark.parametrize("kind", ["ssa", "nsa"])
@torch.no_grad()
def test_full_before_and_sparse_beyond(kind):
    model, prompt = tiny_model(kind), torch.randint(0, 256, (21,)).tolist()
    for sparse_from in (0, 25, 10**9):
        steps = decoded_tokens(model, [prompt], 9, pad_id=0, attention=Attention(sparse_from=sparse_from), draw=Draw())
        found = [tokens[0] for tokens in steps]
        wanted, cache = [], None
        ids = torch.tensor([prompt])
        for length in range(21, 30):
            mode = "full" if length < sparse_from else "sparse"
            out = model(ids, cache=cache, use_cache=True, attention_mode=mode)
            cache, ids = out.cache, out.logits[:, -1:].argmax(-1)
            wanted.append(int(ids))
        assert found == wanted


def test_generate_says_what_auto_did(saved):
    err = io.StringIO()
    generate(saved(), ["hello"], mode="auto", max_new_tokens=3, device="cpu", err=err)
    assert "auto: sparse from 65536 tokens on (of 32/2 heads of 64, 16x16); measured on NVIDIA H200" in err.getvalue()
    with pytest.raises(UserError, match="mode 'auto' and budget 'full' contradict"):
        generate(saved(), ["hello"], mode="auto", budget="full")
