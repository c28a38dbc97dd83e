import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.config import load_recipe, read_recipe
from ssa.data.loader import PackedLoader
from ssa.data.mixture import BLOCK_SLOTS, Interleave, Mixture, open_mixture
from ssa.data.prepare import prepare
from ssa.data.shards import TokenShards
from ssa.errors import UserError

CONTEXT = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with splits train, valid and books; and a second one, "web"."""
    root = tmp_path_factory.mktemp("mixture")
    for name, letter, count in (("home", "h", 30), ("books", "b", 12), ("web", "w", 20)):
        lines = [json.dumps({"text": f"{letter * (10 + i % 7)} {i}"}) + "\n" for i in range(count)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    prepare([root / "home.jsonl"], root / "data", valid_fraction=0.1)
    prepare([root / "books.jsonl"], root / "data", split="books")
    prepare([root / "web.jsonl"], root / "other", valid_fraction=0)
    return root


@pytest.fixture(scope="module")
def mixture(home):
    return open_mixture({f"{home}/data:books": 3, f"{home}/other": 1.0}, home / "data")


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9), seed=st.integers(-5, 2**40), block=st.integers(0, 10**9))
def test_every_stretch_has_the_shares(weights, seed, block):
    interleave = Interleave(weights, seed)
    first = block * BLOCK_SLOTS
    sources, counts = interleave.places(np.arange(first, first + BLOCK_SLOTS))
    expected = np.array(weights) / sum(weights) * BLOCK_SLOTS
    found = np.bincount(sources, minlength=len(weights))
    assert (abs(found - expected) <= len(weights)).all()
    for source, before in enumerate(interleave.counts(first).tolist()):
        assert counts[sources == source].tolist() == list(range(before, before + found[source]))
    assert (interleave.counts(first + BLOCK_SLOTS) == interleave.counts(first) + found).all()


def test_the_order_within_a_stretch_is_mixed():
    sources, _ = Interleave([1, 1], 0).places(np.arange(BLOCK_SLOTS))
    assert BLOCK_SLOTS * 0.4 < np.count_nonzero(np.diff(sources)) < BLOCK_SLOTS * 0.6
    assert not np.array_equal(sources, Interleave([1, 1], 1).places(np.arange(BLOCK_SLOTS))[0])


def test_rows_of_a_source_come_once_an_epoch_and_each_epoch_has_its_order(mixture):
    loader = PackedLoader(mixture, CONTEXT, 8, seed=7)
    books, web = (source.num_tokens // CONTEXT for source in mixture.sources)
    assert loader.num_rows == books + web
    rows = np.concatenate([loader.rows(step) for step in range(40)])
    for low, count in ((0, books), (books, web)):
        own = rows[(rows >= low) & (rows < low + count)] - low
        whole = len(own) // count * count
        assert whole > count
        assert set(Counter(own[:whole].tolist()).values()) == {whole // count}
        assert own[:count].tolist() != own[count : 2 * count].tolist()
    expected = [np.count_nonzero(rows < books) / books, np.count_nonzero(rows >= books) / web]
    assert loader.epochs(40) == pytest.approx(expected)


def test_sources_of_one_size_are_shuffled_apart(home):
    source = TokenShards(home / "data")
    loader = PackedLoader(Mixture([source, source], [1, 1]), CONTEXT, 16, seed=7)
    rows, count = np.concatenate([loader.rows(step) for step in range(20)]), source.num_tokens // CONTEXT
    assert rows[rows < count][:count].tolist() != (rows[rows >= count] - count)[:count].tolist()


def test_the_map_is_stateless_and_the_same_for_any_number_of_ranks(mixture):
    steps = [0, 1, 700, 10**9, 1, 3]
    one = [PackedLoader(mixture, CONTEXT, 6, seed=3).rows(step) for step in steps]
    ranks = [PackedLoader(mixture, CONTEXT, 2, 3, rank, 3) for rank in range(3)]
    assert all(np.array_equal(rows, np.concatenate([r.rows(s) for r in ranks])) for rows, s in zip(one, steps, strict=True))
    kept = PackedLoader(mixture, CONTEXT, 6, seed=3)
    assert all(np.array_equal(rows, kept.rows(step)) for rows, step in zip(one, steps, strict=True))


def test_a_batch_holds_the_rows_of_its_sources(mixture):
    loader = PackedLoader(mixture, CONTEXT, 8, seed=1)
    batch = loader.batch(2)
    assert all(x.shape == (8, CONTEXT) and x.dtype == torch.int64 for x in batch.values())
    books = mixture.sources[0].num_tokens // CONTEXT
    seen = set()
    for row, ids, positions in zip(loader.rows(2).tolist(), batch["input_ids"], batch["position_ids"], strict=True):
        source = mixture.sources[row >= books]
        start = (row - books * (row >= books)) * CONTEXT
        seen.add(row >= books)
        assert np.array_equal(ids, source.read(start, start + CONTEXT))
        assert np.array_equal(positions, source.positions(start, start + CONTEXT))
    assert seen == {False, True}


def test_the_order_of_a_single_corpus_never_changes(home):
    """Runs that were started with an earlier version must go on with the same rows."""
    loader = PackedLoader(TokenShards(home / "data"), CONTEXT, 5, seed=11)
    key = int.from_bytes(hashlib.blake2b(b"11/0", digest_size=16).digest(), "little")
    order = np.random.Generator(np.random.Philox(key=key)).permutation(loader.num_rows)
    assert loader.rows(1).tolist() == order[5:10].tolist()
    assert loader.epochs(4) == [20 / loader.num_rows]


def test_the_fingerprint_follows_content_and_shares(home, mixture):
    def fingerprint(**weights):
        return open_mixture(
            {f"{home}/data:books": weights["books"], f"{home}/other": weights["web"]}, home / "data"
        ).fingerprint()

    assert fingerprint(books=6, web=2) == mixture.fingerprint()
    assert fingerprint(books=6, web=3) != mixture.fingerprint()
    assert open_mixture({f"{home}/data:train": 3, f"{home}/other": 1}, home / "data").fingerprint() != mixture.fingerprint()


def test_bad_mixtures_are_one_line_errors(home, tmp_path):
    prepare([home / "web.jsonl"], tmp_path / "bpe", train_bpe=300, valid_fraction=0.2)
    for mixture, message in (
        ({str(home / "nowhere"): 1}, "no prepared corpus"),
        ({f"{home}/data:nosplit": 1}, "no split"),
        ({str(home / "other"): 1, str(tmp_path / "bpe"): 1}, "different tokenizers"),
        ({str(tmp_path / "bpe"): 1}, "not that of data.path"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_mixture(mixture, home / "data")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a positive number"):
        Mixture([TokenShards(home / "data")], [0.0])
    with pytest.raises(UserError, match="1 to 64"):
        Mixture([], [])
    with pytest.raises(UserError, match=r'"train" of .*other has .* fewer than one row'):
        PackedLoader(open_mixture({f"{home}/data:train": 1, f"{home}/other": 1}, home / "data"), 350, 1, 0)


def test_a_recipe_carries_a_mixture(home):
    recipe = read_recipe('[data]\nmixture = { "data/a" = 1, "data/b:recent" = 0.5 }')
    assert recipe.data.mixture == {"data/a": 1.0, "data/b:recent": 0.5}
    assert read_recipe(recipe.to_json()) == recipe
    assert load_recipe("tiny", ["--data.mixture", "a", "2", "b", "1"]).data.mixture == {"a": 2.0, "b": 1.0}
    for text, message in (
        ('{ "a" = 0 }', "data.mixture.a = 0.0 must be a positive"),
        ('{ "a" = "x" }', "is not float"),
        ("3", "is not dict"),
    ):
        with pytest.raises(UserError, match=message):
            read_recipe(f"[data]\nmixture = {text}")


@pytest.mark.parametrize("kind", ["corpus", "mixture"])
def test_a_loader_reads_the_same_after_pickling(home, mixture, kind):
    loader = PackedLoader(mixture if kind == "mixture" else TokenShards(home / "data"), CONTEXT, 3, 5, 1, 2)
    before = loader.batch(4)
    again = pickle.loads(pickle.dumps(loader))
    assert all(torch.equal(again.batch(4)[name], rows) for name, rows in before.items())
    assert again.rows(4000).tolist() == loader.rows(4000).tolist()
