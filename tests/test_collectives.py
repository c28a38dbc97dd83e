"""Ranks that wait for each other."""

import socket

import pytest

from ssa.collectives import gather
from ssa.errors import UserError

RANK = """
import os
from ssa.errors import UserError
from ssa.collectives import gather
rank = int(os.environ["RANK"])
print(gather({"of": rank}), gather(rank * 10))
if not rank:
    try:
        gather("anybody there?")
    except UserError as error:
        print(error)
"""


def test_every_rank_has_what_all_say_and_the_end_of_one_ends_the_others(run_on_two_ranks):
    (first, _), (second, _) = run_on_two_ranks("-c", RANK)
    assert second == "[{'of': 0}, {'of': 1}] [0, 10]\n"
    assert first == second + "rank 0 of 2 waited for a rank that has ended; see what that one says\n"


NEVER = """
import contextlib, os, sys, time
from datetime import timedelta
from pathlib import Path
from ssa.errors import UserError
from ssa import collectives
comes, here, over = sys.argv[1], Path(sys.argv[2]) / "here", Path(sys.argv[2]) / "over"
def wait(path):
    while not path.exists():
        time.sleep(0.01)
if os.environ["RANK"] == "0":
    wait(here)
    collectives.MEETING = timedelta(seconds=2)
    try:
        collectives.meet()
    except UserError as error:
        print(error)
    over.touch()
else:
    from torch.distributed import TCPStore
    here.touch()
    with contextlib.suppress(RuntimeError):  # rank 0 may have given up
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, 2, timeout=timedelta(seconds=10)) if comes == "store" else None
    wait(over)
"""


@pytest.mark.parametrize("comes", ["nowhere", "store"])
def test_a_rank_that_never_comes_is_noticed(run_on_two_ranks, tmp_path, comes):
    """Whether or not it has reached the place where the ranks find each other."""
    (first, _), _ = run_on_two_ranks("-c", NEVER, comes, tmp_path)
    assert first.startswith("rank 0 of 2 cannot meet the others (") and first.count("\n") == 1


def test_a_port_that_is_taken_is_named_as_such(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in {
            "WORLD_SIZE": 2,
            "RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": taken.getsockname()[1],
        }.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=r"rank 0 of 2 cannot meet the others \(.*address already in use"):
            gather("nobody")


def test_one_rank_and_ranks_that_cannot_meet(monkeypatch):
    assert gather("alone") == ["alone"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"MASTER_ADDR.*; use torchrun, or unset it"):
        gather("nobody")
