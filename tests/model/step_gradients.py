"""What `ssa train` computes for an optimizer step, which other people's trainers are held against."""

import torch
from transformers import TrainerCallback

from ssa.model.streams import draw_stream
from ssa.testing import document_positions
from ssa.train.loss import StepLoss, is_target

SSA_WEIGHT = 10.0


def step_gradients(model, micro_batches, step=0, weight=SSA_WEIGHT, world=1):
    """Gradients by parameter of `StepLoss` over `micro_batches`, those of all `world` ranks.

    micro_batches: lists of documents (ids, labels), which are packed into one row.
    """
    stream = draw_stream(model.config.stream_seed, step, model.config.full_ratio) if model.config.method == "ssa" else None
    rows = [
        {
            "input_ids": torch.cat([ids for ids, _ in documents])[None],
            "labels": torch.cat([labels for _, labels in documents])[None],
            "position_ids": document_positions([len(ids) for ids, _ in documents]),
        }
        for documents in micro_batches
    ]
    loss, targets = StepLoss(model.train(), weight, len(rows)), sum(is_target(row).sum() for row in rows)
    model.zero_grad()
    for row in rows:
        loss(row, stream, targets)[0].backward()
    return take_gradients(model)


def take_gradients(model):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def alignment_gradients(model, micro_batches, step=0):
    """The alignment's part of `step_gradients`."""
    with_it, without = (step_gradients(model, micro_batches, step, weight) for weight in (SSA_WEIGHT, 0.0))
    return {name: with_it[name] - without[name] for name in with_it}


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        off, size = (found[name] - gradient).norm(), gradient.norm()
        assert off <= tolerance * max(size, 0.05), (name, off, size)


class TakeGradients(TrainerCallback):
    """Gradients of each step of a Trainer, as the optimizer gets them (with `max_grad_norm=0`)."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
