import contextlib

import pytest

from ssa.device import local_device
from ssa.errors import UserError
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import Mean, gather, run_items
from ssa.ranks import Shard


def one_by_one(pending):
    return [[index] for index in pending]


def work(log, count, shard=Shard(), batches=one_by_one, stop_after=None, progress=None):  # noqa: B008
    done = []

    def compute(batch):
        if stop_after is not None and len(done) >= stop_after:
            raise KeyboardInterrupt
        done.extend(batch)
        return [{"index": index, "square": index**2} for index in batch]

    with contextlib.suppress(KeyboardInterrupt):
        run_items(count, batches, compute, log, shard, progress)
    return done


def test_an_interrupted_run_goes_on_without_repeating(tmp_path):
    log = ItemLog(tmp_path / "log")
    assert work(log, 10, stop_after=4) == [0, 1, 2, 3] and gather(log, 10) is None
    seen = []
    assert work(log, 10, progress=seen.append) == [4, 5, 6, 7, 8, 9]
    assert seen == [4, 1, 1, 1, 1, 1, 1]
    records = gather(log, 10)
    assert [record["square"] for record in records] == [i * i for i in range(10)] and all(r["seconds"] >= 0 for r in records)
    assert work(log, 10) == [] and work(log, 12) == [10, 11]
    assert len(gather(log, 7)) == 7


def test_ranks_share_and_the_last_one_finds_everything(tmp_path):
    logs = [ItemLog(tmp_path, rank) for rank in range(3)]
    for rank in (1, 0):
        assert work(logs[rank], 8, Shard(rank, 3)) == list(range(rank, 8, 3))
        assert gather(logs[rank], 8) is None
    work(logs[2], 8, Shard(2, 3))
    for log in logs:
        assert [record["index"] for record in gather(log, 8)] == list(range(8))


def test_another_number_of_ranks_goes_on(tmp_path):
    for rank in range(3):
        work(ItemLog(tmp_path, rank), 12, Shard(rank, 3), stop_after=2)
    assert work(ItemLog(tmp_path), 12) == [6, 7, 8, 9, 10, 11]
    assert gather(ItemLog(tmp_path), 12) is not None


@pytest.mark.parametrize("torn", [b'{"index": 3, "squ', b"{", b'{"index": 3, "square": 9}', b"x" * 200_000])
def test_a_torn_last_line_does_not_count_and_spoils_nothing(tmp_path, torn):
    log = ItemLog(tmp_path)
    work(log, 3)
    with log.path.open("ab") as file:
        file.write(torn)
    assert sorted(log.records()) == [0, 1, 2]
    assert work(log, 5) == [3, 4]
    assert sorted(log.records()) == [0, 1, 2, 3, 4]
    assert log.path.read_bytes().count(b"\n") == 5
    (tmp_path / "rank-0007.jsonl").write_bytes(torn)  # of a rank that crashed and is not back
    assert sorted(ItemLog(tmp_path, 7).records()) == [0, 1, 2, 3, 4]
    ItemLog(tmp_path, 7).append([{"index": 9}])
    assert (tmp_path / "rank-0007.jsonl").read_bytes() == b'{"index": 9}\n'


def test_damage_elsewhere_is_an_error(tmp_path):
    log = ItemLog(tmp_path)
    for damage in (
        b"nonsense",
        b"[1]",
        b'{"index": "1"}',
        b'{"index": 1.5}',
        b'{"score": 1}',
        b"[" * 100_000,
        b'{"index": 1, "x": "\xe9"}',
    ):
        log.path.write_bytes(b'{"index": 0}\n' + damage + b'\n{"index": 1}\n')
        with pytest.raises(UserError, match="line 2, is no record"):
            log.records()


def test_a_failing_batch_maker_is_not_swallowed(tmp_path):
    def batches(pending):
        yield [0]
        raise UserError("too short")

    log = ItemLog(tmp_path)
    with pytest.raises(UserError, match="too short"):
        work(log, 3, batches=batches)
    assert sorted(log.records()) == [0]


def test_shards_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Shard.from_environment() == Shard(0, 1) and local_device("auto") == "auto"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK = 3 is not below WORLD_SIZE = 1"):
        Shard.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.from_environment() == Shard(3, 4)
    assert local_device("cpu") == "cpu" and local_device("cuda:5") == "cuda:5"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert local_device("auto") == local_device("cuda") == "cuda:1"
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="RANK = 'one'"):
        Shard.from_environment()


def test_means_by_hand():
    mean = Mean.of([0.0, 1.0, 1.0, 0.0])
    assert (mean.value, mean.items) == (0.5, 4) and mean.standard_error == pytest.approx((1 / 3 / 4) ** 0.5)
    assert Mean.of([0.25]) == Mean(0.25, 0.0, 1)
