import json

import pytest
import torch

from ssa.analysis.attention_stats import SparsityMeter, mean_figures
from ssa.attention import AttentionCall, AttentionInputs
from ssa.budget import Budget, Selection
from ssa.data.shards import TokenShards
from ssa.errors import UserError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train import probe as module
from ssa.train.loss import StepLoss
from ssa.train.probe import probe, probe_batch

BUDGET = Budget(2, 4)


@pytest.fixture
def valid(shards):
    return TokenShards(shards, "valid")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SSAForCausalLM(
        SSAConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, block_size=4, num_selected_blocks=3, method="ssa",
        )
    )  # fmt: skip


def test_the_batch_is_fixed_and_has_the_longest_documents(valid, monkeypatch):
    monkeypatch.setattr(module, "PROBE_TOKENS", 128)
    batch = probe_batch(valid, 64, BUDGET)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, 64)
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64
    beyond = [(torch.from_numpy(valid.positions(i, i + 64)) >= 8).sum() for i in range(0, valid.num_tokens - 63, 64)]
    assert (batch["position_ids"] >= 8).sum() == sum(sorted(beyond)[-2:])
    for row, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        start = next(i for i in range(0, valid.num_tokens, 64) if valid.read(i, i + 64).tolist() == row.tolist())
        assert positions.tolist() == valid.positions(start, start + 64).tolist()
    again = probe_batch(valid, 64, BUDGET)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert probe_batch(valid, 10**6, BUDGET)["input_ids"].shape == (1, 128)


def test_nothing_beyond_the_budget_is_an_error(valid):
    with pytest.raises(
        UserError, match=r"train.probe_every measures what 16x16 leaves out, but no document .* beyond 256 tokens"
    ):
        probe_batch(valid, 64, Budget(16, 16))


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_figures_are_those_of_the_analysis(valid, model, method):
    config = SSAConfig(**(model.config.to_dict() | {"method": method, "attention_mode": None}))
    torch.manual_seed(0)
    model = SSAForCausalLM(config).train()
    batch = probe_batch(valid, 64, BUDGET)
    found = probe(StepLoss(model, 10.0, 1), batch, BUDGET)
    assert model.training and json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["budget"] == "2x4" and found["queries"] == (batch["position_ids"] >= 8).sum()

    def select(layer, record):
        call = AttentionCall("sparse", Selection(BUDGET.num_selected_blocks, BUDGET.block_size), positions_BT=record.positions_BT)
        inputs = AttentionInputs(record.q_BTHD, record.k_BSKD, record.v_BSKD)
        return model.model.layers[layer].self_attn.selector.select(inputs, call)

    for mode in ("full", "sparse"):
        meter = SparsityMeter(select)
        with torch.no_grad():
            model.eval()
            nll = model.token_nll(**batch, attention_mode=mode, budget=BUDGET, observer=meter)
        expected = mean_figures(meter.layers(), beyond=True)
        assert found[f"kept_mass_{mode}"] == pytest.approx(expected["kept_mass"], rel=1e-5)
        assert found[f"entropy_bits_{mode}"] == pytest.approx(expected["entropy_bits"], rel=1e-5)
        layers = [sum(layer.beyond_receptive_field.kept_mass) / 4 for layer in meter.layers()]
        assert found[f"kept_mass_{mode}_by_layer"] == pytest.approx(layers, rel=1e-5)
        assert found[f"nll_{mode}"] == pytest.approx((nll.sum() / (batch["position_ids"][:, 1:] != 0).sum()).item(), rel=1e-5)
        assert 0 < found[f"kept_mass_{mode}"] < 1


def test_a_model_and_the_loss_around_it_give_the_same_and_nothing_changes(valid, model):
    batch = probe_batch(valid, 64, BUDGET)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random, step = torch.get_rng_state(), model.stream_step
    assert probe(model.eval(), batch, BUDGET) == probe(StepLoss(model, 10.0, 1).eval(), batch, BUDGET)
    assert not model.training and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model.stream_step == step
    assert all(p.grad is None for p in model.parameters())
    with_autocast = probe(model, batch, BUDGET, torch.autocast("cpu", dtype=torch.bfloat16))
    assert with_autocast["kept_mass_full"] == pytest.approx(probe(model, batch, BUDGET)["kept_mass_full"], abs=0.02)
