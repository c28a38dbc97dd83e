"""transformers' Trainer trains the model as it is."""

import functools

import pytest
import torch
from torch.utils.data import Dataset

from ssa.testing import tiny_model
from ssa.train.streams import StreamCallback

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments


class Rows(Dataset):
    def __init__(self, count=32, length=24):
        generator = torch.Generator().manual_seed(3)
        start = torch.randint(0, 100, (count, 1), generator=generator)
        self.rows = (start + torch.arange(length)) % 100  # counting upwards: easy to learn

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(folder, steps, method="ssa", **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to=[],
        logging_steps=1, save_steps=5, seed=1, disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(tiny_model(method), arguments, train_dataset=Rows(), eval_dataset=Rows(8), callbacks=[StreamCallback()])


@pytest.mark.parametrize("method", ["ssa", "moba"])
def test_it_learns_and_evaluates(tmp_path, method):
    run = trainer(tmp_path, 25, method)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.5


def test_its_loss_includes_the_alignment(tmp_path, monkeypatch):
    run = trainer(tmp_path, 1)
    seen = []
    real = type(run.model).forward

    @functools.wraps(real)  # Trainer reads forward's signature
    def watch(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        seen.append(out)
        return out

    monkeypatch.setattr(type(run.model), "forward", watch)
    run.train()
    out = seen[0]
    expected = out.cross_entropy + run.model.config.alignment_weight * (out.sparsity_loss + out.commitment_loss)
    torch.testing.assert_close(out.loss.detach(), expected)
    torch.testing.assert_close(torch.tensor(run.state.log_history[0]["loss"]), expected.cpu(), rtol=1e-3, atol=1e-3)


def test_a_resumed_run_draws_the_same_streams(tmp_path):
    whole = trainer(tmp_path / "a", 10)
    whole.train()
    trainer(tmp_path / "b", 5).train()
    resumed = trainer(tmp_path / "b", 10)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """Trainer hands `num_items_in_batch` to the model; the draw is one per step in both."""
    one = trainer(tmp_path / "a", 3)
    one.train()
    four = trainer(tmp_path / "b", 3, gradient_accumulation_steps=4)
    four.args.per_device_train_batch_size = 2
    four._train_batch_size = 2
    four.train()
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
