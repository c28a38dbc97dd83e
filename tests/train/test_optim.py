import itertools

import pytest
import torch

from ssa.config import TrainRecipe
from ssa.testing import tiny_model
from ssa.train.optim import build_optimizer, learning_rate, parameter_groups


def test_schedule_rises_then_falls_to_min_lr():
    recipe = TrainRecipe(steps=100, lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)  # half-way down the cosine
    assert learning_rate(100, recipe) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_schedule_at_its_edges(warmup, steps):
    recipe = TrainRecipe(steps=steps, lr=1.0, warmup=warmup)
    assert all(0 < learning_rate(step, recipe) <= 1 for step in range(steps))


def test_matrices_decay_and_vectors_do_not():
    model = tiny_model()
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert {id(p) for p in others["params"]} == norms
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_found_inf_skips_the_update_of_the_fused_optimizer():
    """The trainer relies on it on CUDA: no step waits for the device to learn that a gradient is not finite."""
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, TrainRecipe(warmup=0.0))
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.found_inf.zero_()
    optimizer.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
