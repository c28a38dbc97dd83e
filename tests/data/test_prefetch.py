import threading
import types

import pytest
import torch

from ssa.data import prefetch as module
from ssa.data.prefetch import Prefetcher


def batch_of(step):
    return {"input_ids": torch.full((2, 3), step)}


def test_batches_come_in_order_and_never_more_than_the_depth_ahead():
    made, room = [], threading.Semaphore(0)

    def make(step):
        made.append(step)
        room.release()
        return batch_of(step)

    with Prefetcher(make, 5, 40, depth=3) as ahead:
        for step in range(5, 40):
            assert ahead.get(step)["input_ids"].eq(step).all()
            # those handed out, those in the queue, and the one that waits for room in it
            assert max(made) <= step + 1 + 3
    assert made == list(range(5, 40))


def test_it_works_ahead_while_nobody_asks():
    reached = threading.Event()

    def make(step):
        if step == 2:
            reached.set()
        return batch_of(step)

    with Prefetcher(make, 0, 100, depth=2) as ahead:
        assert reached.wait(1000)
        assert ahead.get(0)["input_ids"][0, 0] == 0


def test_waiting_is_counted(monkeypatch):
    now, waiting = [0.0], threading.Event()

    def clock():
        value = now[0]
        waiting.set()
        return value

    def make(step):
        assert waiting.wait(1000)
        now[0] += 5 if step == 0 else 0
        return batch_of(step)

    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock))
    with Prefetcher(make, 0, 3) as ahead:
        ahead.get(0)
        assert ahead.take_wait() == 5
        assert ahead.take_wait() == 0


def test_an_error_is_raised_at_its_step_and_again():
    def make(step):
        if step == 2:
            raise OSError("shard is gone")
        return batch_of(step)

    with Prefetcher(make, 0, 9, depth=4) as ahead:
        ahead.get(0), ahead.get(1)
        for _ in range(2):
            with pytest.raises(OSError, match="shard is gone"):
                ahead.get(2)


@pytest.mark.parametrize("taken", [0, 3])
def test_closing_ends_the_thread(taken):
    with Prefetcher(batch_of, 0, 10**9, depth=2) as ahead:
        for step in range(taken):
            ahead.get(step)
    assert not ahead._thread.is_alive()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        ahead.get(taken)


def test_steps_out_of_order_are_refused():
    with Prefetcher(batch_of, 3, 5) as ahead:
        for wrong in (2, 4, 5):
            with pytest.raises(ValueError, match=f"step {wrong} asked for"):
                ahead.get(wrong)
        ahead.get(3), ahead.get(4)
        with pytest.raises(ValueError, match="step 5"):
            ahead.get(5)
