"""Ranks that wait for each other."""

import pytest

from ssa.errors import UserError
from ssa.eval.exchange import exchange

RANK = """
import os
from ssa.errors import UserError
from ssa.eval.exchange import exchange
rank = int(os.environ["RANK"])
print(exchange({"of": rank}), exchange(rank * 10))
if not rank:
    try:
        exchange("anybody there?")
    except UserError as error:
        print(error)
"""


def test_every_rank_has_what_all_say_and_the_end_of_one_ends_the_others(run_on_two_ranks):
    (first, _), (second, _) = run_on_two_ranks("-c", RANK)
    assert second == "[{'of': 0}, {'of': 1}] [0, 10]\n"
    assert first == second + "rank 0 of 2 waited for a rank that has ended; see what that one says\n"


def test_one_rank_and_ranks_that_cannot_meet(monkeypatch):
    assert exchange("alone") == ["alone"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"MASTER_ADDR.*; use torchrun, or unset it"):
        exchange("nobody")
