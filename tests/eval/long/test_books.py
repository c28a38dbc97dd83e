import numpy as np
import pytest
import torch

from ssa.budget import FULL, Budget
from ssa.errors import UserError
from ssa.eval.long.books import BookWindows, target_nll
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather
from ssa.eval.perplexity import Document
from ssa.ranks import Shard
from ssa.testing import LargestTensor, tiny_model


def books(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, 256, n).astype(np.uint16), n, 1) for n in lengths]


def records_of(windows, model, budget, directory, tokens=10**6):
    log = ItemLog(directory)
    windows.measure(model, budget, log, Shard(), tokens=tokens)
    return gather(log, len(windows.places))


@pytest.mark.parametrize("scored", ["last", "half"])
@pytest.mark.parametrize(
    "method, budget", [("full", FULL), ("ssa", FULL), ("ssa", Budget(2, 4)), ("nsa", Budget(2, 4)), ("moba", Budget(3, 8))]
)
def test_one_pass_is_every_window_from_scratch(method, budget, scored, tmp_path):
    """The definition: a window of each length on its own, all logits, the last tokens scored."""
    documents, model = books(150, 40, 101), tiny_model(method)
    windows = BookWindows(documents, [24, 57, 96], stride=7, samples=5, scored=scored)
    records = records_of(windows, model, budget, tmp_path, tokens=2 * 96)
    for place, record in zip(windows.places, records, strict=True):
        for length in windows.lengths:
            tokens = torch.from_numpy(documents[place.document].tokens[place.start : place.start + length].astype(np.int64))[None]
            mode = {"attention_mode": "full"} if budget is FULL else {"attention_mode": "sparse", "budget": budget}
            with torch.no_grad():
                log_p = model(input_ids=tokens, use_cache=False, **mode).logits.double().log_softmax(-1)
            count = 7 if scored == "last" else length // 2
            expected = -sum(log_p[0, t - 1, tokens[0, t]].item() for t in range(length - count, length))
            assert record["nats"][str(length)] == pytest.approx(expected, rel=1e-5)
            assert len(windows.targets(length)) == count


def test_places_are_multiples_of_the_stride_that_fit():
    documents = books(100, 63, 64, 10)
    windows = BookWindows(documents, [32, 64], stride=16, samples=1000)
    found = sorted((place.document, place.start) for place in windows.places)
    assert found == [(0, 0), (0, 16), (0, 32), (2, 0)]
    fewer = BookWindows(documents, [64], stride=16, samples=3)
    assert fewer.places == windows.places[:3]  # more samples contain fewer
    order = [BookWindows(documents, [64], stride=16, seed=seed).places for seed in range(6)]
    assert any(places != order[0] for places in order)


def test_interrupted_and_shared(tmp_path):
    documents, model = books(300), tiny_model("ssa")
    windows = BookWindows(documents, [32], stride=16, samples=9)
    alone = records_of(windows, model, FULL, tmp_path / "alone")
    calls = []

    def stop(done):
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    log = ItemLog(tmp_path / "shared", 1)
    with pytest.raises(KeyboardInterrupt):
        windows.measure(model, FULL, log, Shard(1, 2), tokens=32, progress=stop)
    assert sorted(log.records()) == [1, 3]
    windows.measure(model, FULL, log, Shard(1, 2), tokens=64)
    windows.measure(model, FULL, ItemLog(tmp_path / "shared", 0), Shard(0, 2), tokens=64)
    together = gather(log, 9)
    assert [r["nats"] for r in together] == [pytest.approx(r["nats"], rel=1e-5) for r in alone]
    assert len(log.path.read_text().splitlines()) == 4


def test_logits_are_held_for_scored_tokens_only(monkeypatch):
    model = tiny_model("full", vocab_size=4000)
    input_BT = torch.randint(0, 4000, (2, 120))
    targets = torch.arange(100, 120)
    with torch.no_grad():
        expected = model.token_nll(input_BT, attention_mode="full")[:, 99:]
        with LargestTensor() as seen:
            assert torch.allclose(target_nll(model, input_BT, targets, FULL), expected, atol=1e-5)
        assert seen.elements <= 2 * 20 * 4000
        monkeypatch.setattr("ssa.eval.long.books.LOGIT_ELEMENTS", 3 * 2 * 4000)
        with LargestTensor() as seen:
            assert torch.allclose(target_nll(model, input_BT, targets, FULL), expected, atol=1e-5)
        assert seen.elements <= 4000 * 32  # the embedding


@pytest.mark.parametrize(
    "change, match",
    [
        ({"lengths": []}, "no length"),
        ({"lengths": [8, 64]}, "below the shortest length, 8"),
        ({"stride": 0}, "stride = 0"),
        ({"samples": 0}, "samples = 0"),
        ({"scored": "all"}, "scored = 'all'"),
        ({"lengths": [500]}, "no document has 500 tokens: the longest has 120"),
    ],
)
def test_errors(change, match):
    options = {"lengths": [32], "stride": 8} | change
    with pytest.raises(UserError, match=match):
        BookWindows(books(120), options.pop("lengths"), **options)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        records_of(BookWindows(books(60), [32], stride=8), model, FULL, tmp_path)
