import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssa.train.streams import StreamCallback, draw_stream


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


def test_callback_sets_the_step_through_wrappers():
    class Model(torch.nn.Module):
        stream_step = 0

    class State:
        global_step = 17

    model = Model()
    wrapped = torch.nn.Sequential()
    wrapped.module = model
    StreamCallback().on_step_begin(None, State, None, model=wrapped)
    assert model.stream_step == 17
    model.stream_step = 18  # a micro-batch has passed
    StreamCallback().on_substep_end(None, State, None, model=model)
    assert model.stream_step == 17
    with pytest.raises(TypeError, match="SSAForCausalLM"):
        StreamCallback().on_step_begin(None, State, None, model=torch.nn.Linear(1, 1))
