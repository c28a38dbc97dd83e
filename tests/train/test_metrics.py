import json
import sys
import types

import pytest
import torch

from ssa.errors import UserError
from ssa.train.metrics import Metrics

VALUES = [2.0, 1.5, 0.02, 0.03, 0.7]


def add(metrics, step, values=VALUES):
    metrics.add(torch.tensor(values), step=step, stream="full", lr=0.1, tokens=step * 64, new_tokens=64)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_nothing_is_fetched_before_it_is_asked_for(tmp_path):
    metrics = Metrics(tmp_path, 0, 10, aligned=True)
    add(metrics, 1), add(metrics, 2)
    assert rows(tmp_path) == []
    metrics.fetch()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert rows(tmp_path)[0]["sparsity_loss"] == pytest.approx(0.02)


def test_resuming_cuts_later_and_torn_lines(tmp_path):
    metrics = Metrics(tmp_path, 0, 10, aligned=False)
    for step in (1, 2, 3):
        add(metrics, step)
    metrics.fetch()
    metrics.valid(3, {"full": 1.0, "sparse": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert Metrics(tmp_path, 3, 10, aligned=False).validation_at(3) == {"full": 1.0, "sparse": 2.0}
    assert len(rows(tmp_path)) == 4
    Metrics(tmp_path, 2, 10, aligned=False)
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == [("train", 1), ("train", 2)]
    assert rows(tmp_path)[0]["commitment_loss"] is None


@pytest.mark.parametrize("place, name", [(0, "loss"), (4, "grad_norm")])
def test_the_first_value_that_is_not_finite_is_named(tmp_path, place, name):
    metrics = Metrics(tmp_path, 0, 10, aligned=True)
    bad = [*VALUES]
    bad[place] = float("nan")
    add(metrics, 1), add(metrics, 2, bad), add(metrics, 3, bad)
    with pytest.raises(UserError, match=f"{name} is nan at step 2 "):
        metrics.fetch()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            written.append(purge_step)

        def add_scalar(self, name, value, step):
            written.append((name, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    metrics = Metrics(tmp_path, 4, 10, aligned=True)
    add(metrics, 5)
    metrics.fetch()
    metrics.valid(5, {"full": 1.0, "sparse": 2.0})
    assert written[0] == 5  # events of steps that are trained again are dropped
    assert {("train/loss", 5), ("train/lr", 5), ("valid/sparse", 5)} <= set(written)
