import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssa.errors import UserError
from ssa.methods import methods
from ssa.model.streams import StreamCallback, TrainStep, draw_stream


@given(st.integers(0, 2**70), st.integers(0, 2**40))
def test_extreme_ratios_leave_no_choice(seed, step):
    assert draw_stream(seed, step, 0.0) == "sparse"
    assert draw_stream(seed, step, 1.0) == "full"


def test_draw_depends_on_seed_and_step_alone():
    before = [draw_stream(3, step, 0.5) for step in range(64)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    assert [draw_stream(3, step, 0.5) for step in reversed(range(64))] == before[::-1]
    assert [draw_stream(4, step, 0.5) for step in range(64)] != before
    torch.set_rng_state(states[0])
    draw_stream(3, 0, 0.5)
    assert torch.equal(torch.get_rng_state(), states[0])


def test_the_draw_never_changes():
    """Checkpoints of older versions must resume with the draws they began with."""
    drawn = "".join(draw_stream(1, step, 0.5)[0] for step in range(24))
    assert drawn == "fffsssssssfsssssfssssfsf"


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_share_of_full_steps(ratio):
    n = 4000
    share = sum(draw_stream(7, step, ratio) == "full" for step in range(n)) / n
    assert abs(share - ratio) < 5 * (ratio * (1 - ratio) / n) ** 0.5


class Arguments:
    """What the callback reads of `TrainingArguments`."""

    def __init__(self, gradient_accumulation_steps=1, world_size=1, average_tokens_across_devices=True, n_gpu=0):
        self.gradient_accumulation_steps, self.world_size, self.n_gpu = gradient_accumulation_steps, world_size, n_gpu
        self.average_tokens_across_devices = average_tokens_across_devices


class State:
    def __init__(self, global_step=0, epoch=0.0):
        self.global_step, self.epoch = global_step, epoch


class Model(torch.nn.Module):
    def __init__(self, method="ssa"):
        super().__init__()
        self.train_step = TrainStep()
        self.config = type("Config", (), {"attends": methods()[method]})


def test_callback_tells_the_step_through_wrappers():
    model, wrapped = Model(), torch.nn.Sequential()
    wrapped.module = model
    callback = StreamCallback()
    callback.on_step_begin(Arguments(4, world_size=2), State(17), None, model=wrapped)
    assert model.train_step == TrainStep(17, micro_batches=4, count_ranks=2, followed=True)
    # a policy that passes twice in each micro-batch, too
    assert {model.train_step.draw(seed, 0.5) == draw_stream(seed, 17, 0.5) for seed in range(9)} == {True}
    callback.on_step_begin(Arguments(4, 2, average_tokens_across_devices=False), State(18), None, model=wrapped)
    assert model.train_step == TrainStep(18, micro_batches=4, count_ranks=1, followed=True)
    callback.on_train_end(None, None, None, model=wrapped)
    assert model.train_step == TrainStep(18)
    with pytest.raises(TypeError, match="SSAForCausalLM"):
        callback.on_step_begin(Arguments(), State(), None, model=torch.nn.Linear(1, 1))


def test_several_gpus_in_one_process_are_refused():
    with pytest.raises(UserError, match="torchrun --nproc-per-node 3"):
        StreamCallback().on_step_begin(Arguments(n_gpu=3), State(), None, model=Model())
    StreamCallback().on_step_begin(Arguments(n_gpu=3), State(), None, model=Model("moba"))  # has nothing to weigh


def test_the_last_step_of_an_epoch_has_the_rest_of_it():
    model, callback = Model(), StreamCallback()

    def passes(epoch, batches, accumulation=4):
        loader = range(batches) if batches is not None else iter(())
        callback.on_step_begin(Arguments(accumulation), State(epoch=epoch), None, model=model, train_dataloader=loader)
        return model.train_step.micro_batches

    assert [passes(done / 10, 10) for done in (0, 4, 8, 10, 14, 18, 20)] == [4, 4, 2, 4, 4, 2, 4]
    assert [passes(2 + done / 7, 7, 3) for done in (0, 3, 6)] == [3, 3, 1]
    assert passes(0.9999999999, 10) == 4 and passes(0.7, 3) == 1 and passes(0.0, 2) == 2
    assert passes(0.3, None) == 4  # a stream has no length


def test_where_nobody_tells_passes_make_steps():
    step = TrainStep(micro_batches=3)
    drawn = [step.draw(1, 0.5) for _ in range(30)]
    assert drawn == [draw_stream(1, i // 3, 0.5) for i in range(30)] and step.number == 10
    step = TrainStep(2)
    assert [step.draw(1, 0.5) for _ in range(9)] == [draw_stream(1, i, 0.5) for i in range(2, 11)]
