import json
import sys
import types

import pytest
import torch

from ssa.errors import UserError
from ssa.train import metrics as module
from ssa.train.metrics import Metrics, SpikeDetector

VALUES = [2.0, 1.5, 0.02, 0.03, 0.4, 0.7]


def common(step):
    return {"step": step, "stream": "full", "lr": 0.1, "tokens": step * 64, "new_tokens": 64}


def add(metrics, step, values=VALUES):
    metrics.add(torch.tensor(values), **common(step))


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_nothing_is_fetched_before_it_is_asked_for(tmp_path):
    metrics = Metrics(tmp_path, 0, 10, aligned=True)
    add(metrics, 1), add(metrics, 2)
    assert rows(tmp_path) == []
    metrics.fetch()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert rows(tmp_path)[0]["sparsity_loss"] == pytest.approx(0.02)
    assert "selection_loss" not in rows(tmp_path)[0]


def test_a_selectors_loss_is_written_where_it_is_trained(tmp_path):
    metrics = Metrics(tmp_path, 0, 10, aligned=False, distils=True)
    add(metrics, 1)
    metrics.fetch()
    assert rows(tmp_path)[0]["selection_loss"] == pytest.approx(0.4)


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


@pytest.mark.parametrize("place, name", [(0, "loss"), (5, "grad_norm")])
def test_the_first_value_that_is_not_finite_is_named(tmp_path, place, name):
    metrics = Metrics(tmp_path, 0, 10, aligned=True)
    bad = [*VALUES]
    bad[place] = float("nan")
    add(metrics, 1), add(metrics, 2, bad), add(metrics, 3, bad)
    with pytest.raises(UserError, match=f"{name} is nan at step 2 "):
        metrics.fetch()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_speed_and_utilisation_are_of_all_steps_since_the_last_report(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    metrics = Metrics(tmp_path, 0, 10, aligned=True, peak_flops=1000.0)
    for step, wait in ((1, 0.5), (2, 0.25)):
        metrics.add(torch.tensor(VALUES), **common(step), flops=400.0, data_wait=wait)
    now[0] += 4
    metrics.fetch()
    assert [row["tokens_per_second"] for row in rows(tmp_path)] == [32.0, 32.0]
    assert [row["mfu"] for row in rows(tmp_path)] == [0.2, 0.2]
    assert [row["data_wait"] for row in rows(tmp_path)] == [0.5, 0.25]
    now[0] += 50
    metrics.probe(2, {"kept_mass_full": 0.5, "kept_mass_sparse": 0.75, "queries": 3})  # does not count as training time
    now[0] += 1
    metrics.add(torch.tensor(VALUES), **common(3))  # FLOPs not counted: no MFU, rather than one that is too low
    metrics.fetch()
    assert rows(tmp_path)[2] == {"kind": "probe", "step": 2, "kept_mass_full": 0.5, "kept_mass_sparse": 0.75, "queries": 3}
    assert rows(tmp_path)[3]["tokens_per_second"] == 64.0
    assert rows(tmp_path)[3]["mfu"] is rows(tmp_path)[3]["peak_memory_gb"] is rows(tmp_path)[3]["data_wait"] is None
    metrics.add(torch.tensor(VALUES), **common(4), flops=500.0)
    now[0] += 2
    metrics.fetch()
    assert rows(tmp_path)[4]["mfu"] == 0.25


def test_no_utilisation_without_a_known_peak(tmp_path):
    metrics = Metrics(tmp_path, 0, 10, aligned=True)
    metrics.add(torch.tensor(VALUES), **common(1), flops=1e9)
    metrics.fetch()
    assert rows(tmp_path)[0]["mfu"] is None


def test_peak_memory_is_that_of_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000 if device.index == 1 else 0)
    metrics = Metrics(tmp_path, 0, 10, aligned=True, device=torch.device("cuda", 1))
    add(metrics, 1)
    metrics.fetch()
    assert rows(tmp_path)[0]["peak_memory_gb"] == 2.5


def losses(count, seed=0):
    return (3 + 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_a_spike_is_a_loss_far_above_the_usual_of_its_stream():
    detector = SpikeDetector()
    for sparse, full in zip(losses(200), losses(200, 1), strict=True):
        assert not detector.is_spike("sparse", sparse)
        assert not detector.is_spike("full", full - 2)
    assert detector.is_spike("full", 1.5) and not detector.is_spike("sparse", 2.9)
    assert detector.usual("sparse") == pytest.approx(3, abs=0.01)
    assert [detector.is_spike("sparse", 3.3) for _ in range(20)] == [True] * 20  # spikes do not raise the bar
    assert not any(detector.is_spike("full", loss) for loss in [0.1, 1.0, 1.05])  # lower is no spike


def test_few_or_constant_losses_make_no_spikes():
    detector = SpikeDetector()
    assert not any(detector.is_spike(None, loss) for loss in [*losses(SpikeDetector.WARMUP - 1), 100.0])
    constant = SpikeDetector()
    assert not any(constant.is_spike(None, loss) for loss in [2.0] * 100 + [2.001])
    assert constant.is_spike(None, 2.01)


def test_spikes_are_flagged_and_said_and_known_after_resuming(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, 100, aligned=True)
    for step, loss in enumerate(losses(50), start=1):
        add(metrics, step, [loss, loss, 0, 0, 0, 1])
    metrics.fetch()
    metrics.probe(50, {"kept_mass_full": 0.5, "kept_mass_sparse": 0.75})
    metrics.close()
    resumed = Metrics(tmp_path, 50, 100, aligned=True)
    add(resumed, 51, [3.5, 3.5, 0, 0, 0, 1]), add(resumed, 52, [3.0, 3.0, 0, 0, 0, 1])
    resumed.fetch()
    assert [row["loss_spike"] for row in rows(tmp_path) if row["kind"] == "train"] == [False] * 50 + [True, False]
    assert "step 51: loss spike, cross-entropy 3.5000 where 3.0" in capsys.readouterr().out


def test_a_tracker_gets_every_number(tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            written.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    Metrics(tmp_path, 0, 10, aligned=True).close()
    assert written == []
    metrics = Metrics(tmp_path, 4, 10, aligned=True, track="tensorboard")
    add(metrics, 5)
    metrics.fetch()
    metrics.valid(5, {"full": 1.0, "sparse": 2.0})
    metrics.close()
    assert written[0] == (str(tmp_path / "tensorboard"), 5)  # events of steps that are trained again are dropped
    assert {("train/loss", 2.0, 5), ("train/loss_spike", 0.0, 5), ("valid/sparse", 2.0, 5)} <= set(written)
    assert closed == [True]
