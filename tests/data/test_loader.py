import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.data.loader import PackedLoader
from ssa.data.prepare import prepare
from ssa.data.shards import TokenShards
from ssa.errors import UserError

CONTEXT = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader")
    texts = [chr(97 + i % 26) * (1 + i * 5 % 23) for i in range(50)]
    (directory / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([directory / "in.jsonl"], directory / "out", valid_fraction=0, shard_tokens=90)
    return TokenShards(directory / "out")


def test_a_batch_is_its_rows_with_restarting_positions(shards):
    loader = PackedLoader(shards, CONTEXT, 3, seed=1)
    batch = loader.batch(5)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert all(t.shape == (3, CONTEXT) and t.dtype == torch.int64 for t in batch.values())
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
    for i, row in enumerate(loader.rows(5).tolist()):
        assert np.array_equal(batch["input_ids"][i], shards.read(row * CONTEXT, (row + 1) * CONTEXT))
        after_end = torch.cat([torch.tensor([True]), batch["input_ids"][i, :-1] == shards.end_id])
        assert torch.equal(batch["position_ids"][i] == 0, after_end)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-5, 2**40), batch=st.integers(1, 9), ranks=st.integers(1, 4), epoch=st.integers(0, 3))
def test_all_ranks_read_every_row_once_an_epoch(shards, seed, batch, ranks, epoch):
    loaders = [PackedLoader(shards, CONTEXT, batch, seed, rank, ranks) for rank in range(ranks)]
    rows, size = loaders[0].num_rows, batch * ranks
    first, last = epoch * rows // size, -(-(epoch + 1) * rows // size)
    order = np.concatenate([loader.rows(step) for step in range(first, last) for loader in loaders])
    begin = epoch * rows - first * size
    assert Counter(order[begin : begin + rows].tolist()) == Counter(range(rows))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), step=st.integers(0, 10**6))
def test_the_global_batch_depends_on_its_size_alone(shards, seed, step):
    one = PackedLoader(shards, CONTEXT, 4, seed).rows(step)
    two = [PackedLoader(shards, CONTEXT, 2, seed, rank, 2).rows(step) for rank in (0, 1)]
    assert np.array_equal(one, np.concatenate(two))


def test_batches_are_stateless_and_epochs_differ(shards):
    loader = PackedLoader(shards, CONTEXT, 4, seed=3)
    forwards = [loader.rows(step).tolist() for step in range(40)]
    fresh = PackedLoader(shards, CONTEXT, 4, seed=3)
    assert [fresh.rows(step).tolist() for step in reversed(range(40))] == forwards[::-1]
    whole = PackedLoader(shards, CONTEXT, loader.num_rows, seed=3)
    assert whole.rows(0).tolist() != whole.rows(1).tolist()
    assert whole.rows(0).tolist() != PackedLoader(shards, CONTEXT, loader.num_rows, seed=4).rows(0).tolist()


def test_a_batch_may_hold_more_than_an_epoch(shards):
    loader = PackedLoader(shards, shards.num_tokens // 2, 5, seed=0)
    assert loader.num_rows == 2
    rows = loader.rows(0).tolist()
    assert sorted(rows[:2]) == sorted(rows[2:4]) == [0, 1]


def test_bad_arguments_are_one_line_errors(shards):
    with pytest.raises(UserError, match=f"{shards.num_tokens} tokens, fewer than one row of context 100000"):
        PackedLoader(shards, 100_000, 1, 0)
    with pytest.raises(UserError, match="too short"):
        PackedLoader(shards, 1, 1, 0)
    with pytest.raises(UserError, match="rank 2 of 2"):
        PackedLoader(shards, CONTEXT, 1, 0, 2, 2)
