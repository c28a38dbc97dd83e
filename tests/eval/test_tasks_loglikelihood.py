import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ssa.budget import Budget
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval import loglikelihood
from ssa.eval.loglikelihood import Effort, Request, encode_pairs, log_likelihoods, rolling_requests
from ssa.testing import tiny_model

BOS = 256


class Bigrams(nn.Module):
    """A language model whose next token depends on the last one alone, by a table of probabilities."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table).log())
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=64)

    def model(self, input_ids, **kwargs):
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def lm_head(self, hidden):
        return hidden


TABLE = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]


def request(context, continuation):
    return Request(np.array(context, np.int32), np.array(continuation, np.int32))


def test_by_hand():
    found = log_likelihoods(Bigrams(TABLE), [request([0], [1, 2]), request([0, 1], [2, 1]), request([2], [2])], max_length=8)
    assert [score.log_likelihood for score in found] == pytest.approx([math.log(0.3 * 0.8), math.log(0.8 * 0.5), math.log(0.25)])
    assert [score.is_greedy for score in found] == [False, True, False]  # 0 is likelier after 0 than 1 is


def test_the_context_loses_its_beginning():
    """`max_length` counts the tokens that are read, so one more fits together with the last one, which is only predicted."""
    model = tiny_model()
    long = list(range(20, 30))

    def value(context, max_length):
        return log_likelihoods(model, [request(context, [5, 6])], max_length=max_length)[0].log_likelihood

    for max_length, kept in ((11, 10), (10, 9), (2, 1)):
        assert value(long, max_length) == pytest.approx(value(long[-kept:], 64))
    assert value(long, 10) != pytest.approx(value(long, 11))


@pytest.mark.parametrize("method", ["ssa", "nsa"])
@pytest.mark.parametrize("how", [{"attention_mode": "full"}, {"attention_mode": "sparse", "budget": Budget(2, 4)}])
def test_equals_one_request_at_a_time_with_all_logits(method, how):
    model = tiny_model(method)
    generator = np.random.default_rng(0)
    requests = [
        request(generator.integers(0, 255, generator.integers(1, 40)), generator.integers(0, 255, generator.integers(1, 9)))
        for _ in range(17)
    ]
    effort = Effort()
    found = log_likelihoods(model, requests, max_length=64, batch_tokens=100, effort=effort, **how)
    for (context, continuation), score in zip(requests, found, strict=True):
        ids = torch.tensor([*context, *continuation])[None]
        with torch.no_grad():
            log_p = model(ids, use_cache=False, **how).logits[0, :-1].double().log_softmax(-1)[-len(continuation) :]
        target = torch.tensor(continuation).long()
        assert score.log_likelihood == pytest.approx(log_p[range(len(target)), target].sum().item(), abs=2e-5)
        assert score.is_greedy == bool((log_p.argmax(-1) == target).all())
    assert effort.tokens == sum(len(c) + len(t) - 1 for c, t in requests) <= effort.padded_tokens < 1.3 * effort.tokens


def test_batches_and_slices_of_logits_change_nothing(monkeypatch):
    model = tiny_model()
    requests = [request(range(i, i + 7), range(i, 2 * i + 1)) for i in range(1, 12)]
    usual = log_likelihoods(model, requests, max_length=64)
    monkeypatch.setattr(loglikelihood, "LOGIT_ELEMENTS", 3 * model.config.vocab_size)
    for arguments in ({"batch_tokens": 1}, {"batch_rows": 4}, {"batch_tokens": 1 << 20}):
        found = log_likelihoods(model, requests, max_length=64, **arguments)
        assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in usual], abs=1e-5)


def test_delivery_is_complete_and_once(monkeypatch):
    monkeypatch.setattr(loglikelihood, "DELIVERY_SECONDS", 0)
    parts = []
    found = log_likelihoods(
        Bigrams(TABLE), [request([0], [1] * n) for n in range(1, 8)], max_length=8, batch_rows=2, deliver=parts.append
    )
    assert len(parts) == 4 and sorted(i for part in parts for i, _ in part) == list(range(7))
    assert all(found[i] == score for part in parts for i, score in part)


@pytest.mark.parametrize("tail, match", [([0] * 9, "does not fit into max_length = 8"), ([], "at least one token")])
def test_bad_requests(tail, match):
    with pytest.raises(UserError, match=match):
        log_likelihoods(Bigrams(TABLE), [request([0], tail)], max_length=8)


def test_a_result_that_is_not_finite_is_an_error():
    with pytest.raises(UserError, match="not finite"):
        log_likelihoods(Bigrams([[1.0, 0.0], [0.5, 0.5]]), [request([0], [1])], max_length=8)


def test_pairs_are_cut_where_the_context_ends(monkeypatch):
    monkeypatch.setattr(loglikelihood, "ENCODED_AT_ONCE", 2)
    found = encode_pairs(byte_tokenizer(), [("ab", " c"), ("ab ", "c"), ("ab", " dé"), ("", "xy")])
    assert [(bytes(c.tolist()), bytes(t.tolist())) for c, t in found[:3]] == [
        (b"ab", b" c"),
        (b"ab", b" c"),  # a space at the context's end belongs to the continuation
        (b"ab", " dé".encode()),
    ]
    assert found[3].context.tolist() == [BOS] and bytes(found[3].continuation.tolist()) == b"xy"
    with pytest.raises(UserError, match="nothing to score"):
        encode_pairs(byte_tokenizer(), [("ab", "")])


def test_a_token_over_the_border_belongs_to_nobody():
    """lm-eval's rule: the pair is encoded as one text and cut after as many tokens as the context alone has."""

    class Pairs:
        """Two characters a token."""

        bos_token_id, eos_token_id = 0, None

        def decode(self, token):
            return "<s>"

        def __call__(self, texts, **_):
            return SimpleNamespace(input_ids=[[hash_of(t[i : i + 2]) for i in range(0, len(t), 2)] for t in texts])

    def hash_of(text):
        return 1 + sum(ord(c) * 256**i for i, c in enumerate(text))

    ((context, continuation),) = encode_pairs(Pairs(), [("abc", "def")])
    assert context.tolist() == [hash_of("ab"), hash_of("c")] and continuation.tolist() == [hash_of("ef")]


def test_rolling_windows_by_hand():
    """The example in lm-eval's documentation of loglikelihood_rolling."""
    windows = [(c.tolist(), t.tolist()) for c, t in rolling_requests(list(range(10)), BOS, 4)]
    assert windows == [([BOS], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert rolling_requests([], BOS, 4) == []
    assert [(c.tolist(), t.tolist()) for c, t in rolling_requests([7], BOS, 4)] == [([BOS], [7])]
