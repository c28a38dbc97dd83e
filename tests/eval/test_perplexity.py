import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.errors import UserError
from ssa.eval.perplexity import Document, perplexity, windows
from ssa.testing import tiny_model

CALLS = [
    ("ssa", "full", None),
    ("ssa", "sparse", None),
    ("ssa", "sparse", "2x6"),
    ("nsa", "full", None),
    ("nsa", "sparse", "2x4"),
]


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, 256, n).astype(np.uint16), 2 * n, n // 3) for n in lengths]


def naive(model, docs, context, stride, mode, budget):
    """One token at a time: (sum of nats, tokens). The window of target t is found by counting, not by `windows`."""
    total, count = 0.0, 0
    for doc in docs:
        tokens = doc.tokens.astype(np.int64)
        for target in range(1, len(tokens)):
            late = max(0, target - context)  # targets beyond the first window
            start = stride * math.ceil(late / stride)
            with torch.no_grad():
                logits = model(
                    input_ids=torch.from_numpy(tokens[None, start:target]), attention_mode=mode, budget=budget, use_cache=False
                ).logits[0, -1]
            total -= logits.double().log_softmax(-1)[tokens[target]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("method, mode, budget", CALLS)
@pytest.mark.parametrize("context, stride", [(16, 16), (16, 5), (64, 64)])
def test_equals_a_naive_loop(method, mode, budget, context, stride):
    model, docs = tiny_model(method), documents(38, 1, 17, 2)
    measured = perplexity(model, docs, context=context, stride=stride, attention_mode=mode, budget=budget, batch_size=3)
    nats, tokens = naive(model, docs, context, stride, mode, budget)
    assert measured.tokens == tokens == 37 + 16 + 1
    assert measured.nats == pytest.approx(nats, rel=1e-5)


@given(tokens=st.integers(0, 200), context=st.integers(1, 50), data=st.data())
def test_windows_score_every_token_but_the_first_exactly_once(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for number, w in enumerate(windows(tokens, context, stride)):
        assert 0 <= w.start < w.first < w.stop <= tokens
        assert w.stop - w.start - 1 <= context
        assert w.stop - w.first <= (context if number == 0 else stride)
        if number:
            assert w.first - w.start - 1 >= context - stride
        else:
            assert (w.start, w.first) == (0, 1)
        scored += range(w.first, w.stop)
    assert scored == list(range(1, tokens))


@given(tokens=st.integers(2, 200), context=st.integers(1, 50))
def test_stride_of_a_whole_context_reads_every_input_once(tokens, context):
    read = [t for w in windows(tokens, context, context) for t in range(w.start, w.stop - 1)]
    assert read == list(range(tokens - 1))


@pytest.mark.parametrize("mode", ["full", "sparse"])
@settings(deadline=None, max_examples=5)
@given(batch_size=st.integers(1, 40))
def test_does_not_depend_on_the_batch(mode, batch_size):
    model, docs = tiny_model(), documents(50, 9, 31, 2)
    alone = perplexity(model, docs, context=12, stride=4, attention_mode=mode, batch_size=1)
    together = perplexity(model, docs, context=12, stride=4, attention_mode=mode, batch_size=batch_size)
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)


def test_documents_are_apart():
    model = tiny_model()
    first, second = documents(30, seed=1), documents(25, seed=2)
    both = perplexity(model, first + second, context=20, stride=7)
    parts = [perplexity(model, docs, context=20, stride=7) for docs in (first, second)]
    assert both.nats == pytest.approx(sum(p.nats for p in parts), rel=1e-6)
    assert both.tokens == sum(p.tokens for p in parts)


def test_more_context_sees_farther():
    """A model's prediction in the second window changes with tokens that only a smaller stride lets it see."""
    model = tiny_model()
    docs = documents(40)
    changed = [docs[0]._replace(tokens=docs[0].tokens.copy())]
    changed[0].tokens[18] = (int(changed[0].tokens[18]) + 1) % 256
    tail = [  # the last token's share: all minus all but the last
        [
            perplexity(model, [d._replace(tokens=d.tokens[:n]) for d in x], context=20, stride=s).nats
            for x in (docs, changed)
            for n in (40, 39)
        ]
        for s in (20, 1)
    ]
    disjoint, sliding = ([a - b, c - d] for a, b, c, d in tail)
    assert disjoint[0] == pytest.approx(disjoint[1], abs=1e-4)
    # position 39 with stride 1 reads 20..39: still not 18, so compare with a longer context too
    assert sliding[0] == pytest.approx(sliding[1], abs=1e-4)
    longer = [
        perplexity(model, x, context=30, stride=1).nats
        - perplexity(model, [x[0]._replace(tokens=x[0].tokens[:39])], context=30, stride=1).nats
        for x in (docs, changed)
    ]
    assert abs(longer[0] - longer[1]) > 1e-4


def test_units():
    model, docs = tiny_model(), documents(90, 60)
    measured = perplexity(model, docs, context=64)
    nats = measured.nats
    assert measured.documents == 2
    assert measured.perplexity == pytest.approx(math.exp(nats / 148))
    assert measured.word_perplexity == pytest.approx(math.exp(nats / 50))
    assert measured.byte_perplexity == pytest.approx(math.exp(nats / 300))
    assert measured.bits_per_byte == pytest.approx(nats / 300 / math.log(2))


def test_a_perplexity_beyond_floats_is_none():
    docs = [documents(400)[0]._replace(num_words=1)]
    measured = perplexity(tiny_model(), docs, context=64)
    assert measured.word_perplexity is None and measured.perplexity is not None


@pytest.mark.parametrize("context, stride, match", [(0, 1, "context = 0"), (8, 9, "stride = 9"), (8, 0, "stride = 0")])
def test_impossible_windows(context, stride, match):
    with pytest.raises(UserError, match=match):
        perplexity(tiny_model(), documents(20), context=context, stride=stride)


def test_nothing_to_score():
    with pytest.raises(UserError, match="nothing to score"):
        perplexity(tiny_model(), documents(1, 0), context=8)


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        perplexity(model, documents(20), context=8)


def test_progress_adds_up():
    seen = []
    measured = perplexity(tiny_model(), documents(50, 20), context=8, stride=3, batch_size=4, progress=seen.append)
    assert sum(seen) == measured.tokens and len(seen) > 1
