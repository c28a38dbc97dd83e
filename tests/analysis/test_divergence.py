"""KL, agreement and losses of two streams against the dense formula."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from ssa.analysis.divergence import DivergenceSums, token_divergence


def streams(vocabulary=11, tokens=9, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(6, vocabulary, bias=False)
    full, sparse = torch.randn(2, tokens, 6), torch.randn(2, tokens, 6)
    return head, full, sparse, torch.randint(vocabulary, (2, tokens))


@pytest.mark.parametrize("rows", [1, 4, 18, 100])
def test_divergence_equals_the_dense_formula(rows):
    head, full, sparse, ids = streams()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))])
    each = token_divergence(full, sparse, head, ids, positions, rows=rows)
    log_p, log_q = (head(x).double().log_softmax(-1) for x in (full, sparse))
    torch.testing.assert_close(
        each.kl.double(), kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(each.agree, log_p.argmax(-1) == log_q.argmax(-1))
    nll = cross_entropy(head(full)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 8)
    assert each.target[0].tolist() == [True, True, True, False, True, True, True, True, False]
    torch.testing.assert_close(each.nll_full[:, :-1], torch.where(positions[:, 1:] == 0, 0, nll))
    assert (each.nll_full[:, -1] == 0).all() and (each.kl >= 0).all()


def test_identical_streams_have_no_divergence():
    head, full, _, ids = streams()
    each = token_divergence(full, full.clone(), head, ids)
    assert (each.kl == 0).all() and each.agree.all() and torch.equal(each.nll_full, each.nll_sparse)


def test_sums_are_means_over_tokens_and_targets_and_restricted_ones():
    head, full, sparse, ids = streams()
    each = token_divergence(full, sparse, head, ids)
    positions = torch.arange(9).expand(2, 9)
    sums, other = DivergenceSums(), DivergenceSums()
    for row, part in enumerate((sums, other)):  # row by row equals both at once
        one = token_divergence(full[row : row + 1], sparse[row : row + 1], head, ids[row : row + 1])
        part.add(one, positions[row : row + 1], 4)
    sums.join(other)
    means, late = sums.means(False), sums.means(True)
    assert means["tokens"] == 18 and late["tokens"] == 10
    at = sums.by_position()
    assert (at["first_position"], at["tokens"]) == ([0, 1, 2, 4, 8], [2, 2, 4, 8, 2])
    assert at["kl_nats"][3] == pytest.approx(float(each.kl[:, 4:8].mean()), rel=1e-5)
    assert means["kl_nats"] == pytest.approx(float(each.kl.mean()), rel=1e-5)
    assert late["kl_nats"] == pytest.approx(float(each.kl[:, 4:].mean()), rel=1e-5)
    assert means["cross_entropy_full"] == pytest.approx(float(each.nll_full.sum() / 16), rel=1e-5)
    assert means["gap_nats"] == pytest.approx(means["cross_entropy_sparse"] - means["cross_entropy_full"])
    assert late["top1_agreement"] == pytest.approx(float(each.agree[:, 4:].float().mean()))


def test_no_token_beyond_the_receptive_field_gives_no_means():
    head, full, sparse, ids = streams()
    sums = DivergenceSums()
    sums.add(token_divergence(full, sparse, head, ids), torch.arange(9).expand(2, 9), 9)
    assert sums.means(True) is None and sums.means(False)["tokens"] == 18
