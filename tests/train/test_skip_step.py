import json

import torch

from ssa.train.skip_step import WARMUP, WINDOW, SkipStep, described

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def verdicts(guard, losses, norm=1.0):
    """What the guard says of each step: "." go on, "s" skip, "H" halt."""
    said = ""
    for loss in losses:
        skip, halt = guard.judge(torch.tensor(float(loss)), torch.tensor(norm)).tolist()
        said += "H" if halt else "s" if skip else "."
        assert skip or not halt
    return said


def test_by_default_the_first_step_that_is_not_finite_halts_for_good():
    assert verdicts(SkipStep(CPU), [1, 2, NAN, 1, 1]) == "..HHH"
    assert verdicts(SkipStep(CPU), [1, 2], norm=INF) == "HH"


def test_steps_in_a_row_are_skipped_up_to_the_limit():
    assert verdicts(SkipStep(CPU, 2), [1, NAN, INF, 1, NAN, 1, NAN, NAN, NAN, 1]) == ".ss.s.ssHH"


def test_a_spike_is_skipped_and_a_new_level_accepted():
    torch.manual_seed(0)
    calm = (4 + 0.1 * torch.randn(WARMUP + 40)).tolist()
    assert verdicts(SkipStep(CPU, 0, 6.0), [9, *calm, 4.1]).count("s") == 0, "nothing is a spike before enough has been seen"
    guard = SkipStep(CPU, 0, 6.0)
    assert "s" not in verdicts(guard, calm)
    assert verdicts(guard, [4.2, 5.5, 4.0, -9]) == ".s..", "only upwards"
    assert verdicts(guard, [4.0], norm=9.0) == "s"
    assert verdicts(guard, [9.0] * WINDOW).endswith("." * (WINDOW // 2))
    assert "s" not in verdicts(SkipStep(CPU), [*calm, 50.0])


def test_what_is_not_finite_never_enters_the_statistics():
    guard = SkipStep(CPU, 10**6, 6.0)
    verdicts(guard, [1.0, 1.1] * WARMUP + [NAN, INF] * 3)
    assert verdicts(guard, [1.05, 30.0]) == ".s"


def test_its_memory_survives_json():
    torch.manual_seed(1)
    first = SkipStep(CPU, 3, 3.0)
    verdicts(first, [*torch.rand(WINDOW + 9).tolist(), NAN, NAN])
    second = SkipStep(CPU, 3, 3.0)
    second.restore(json.loads(json.dumps(first.state())))
    future = [NAN, *(3 * torch.rand(40)).tolist(), NAN, NAN, NAN, NAN]
    assert verdicts(first, future) == verdicts(second, future)


def test_a_skipped_step_is_described():
    assert described(NAN, 1.0) == "loss is nan" and described(1.0, INF) == "grad_norm is inf"
    assert described(9.0, 2.0) == "spike, loss 9.0000, grad_norm 2"
