"""Distances and overlap of selections against plain loops."""

import pytest
import torch

from ssa.analysis.decode import decode_overlap
from ssa.analysis.selection import bit_length, distance_histogram, selection_overlap
from ssa.budget import Budget, Selection
from ssa.ops import select_blocks
from ssa.testing import document_positions, random_qkv, tiny_model


def selected(tokens=60, heads=4, kv_heads=2, documents=None, scope="group", budget=(3, 4)):
    q, k, _ = (x.detach() for x in random_qkv(2, tokens, tokens, heads, kv_heads, 8))
    positions = document_positions(documents or [tokens], 2)
    index, _ = select_blocks(q, k, Selection(budget[0], budget[1], scope=scope), positions=positions)
    return index, positions


@pytest.mark.parametrize("scope", ["group", "head"])
def test_overlap_equals_set_arithmetic_within_documents_beyond_the_receptive_field(scope, monkeypatch):
    index, positions = selected(documents=[5, 33, 22], scope=scope)
    lags = (1, 3, 16)
    sums, pairs = selection_overlap(index, positions, 12, lags)
    expected, counted = torch.zeros(index.shape[1], 3, dtype=torch.float64), [0, 0, 0]
    for i, lag in enumerate(lags):
        for b in range(2):
            for t in range(60):
                if t < lag or int(positions[b, t]) - lag < 12:
                    continue
                counted[i] += 1
                for r in range(index.shape[1]):
                    now, before = ({int(n) for n in index[b, r, at] if n >= 0} for at in (t, t - lag))
                    expected[r, i] += len(now & before) / len(now)
    assert pairs.tolist() == counted and counted[2] > 0
    torch.testing.assert_close(sums, expected)
    assert (sums[:, 0] / pairs[0] < 1).all()
    monkeypatch.setattr("ssa.analysis.selection.PAIR_ELEMENTS", 100)
    torch.testing.assert_close(selection_overlap(index, positions, 12, lags)[0], expected)


def test_a_selection_that_never_changes_overlaps_entirely():
    index = torch.tensor([0, 5, -1], dtype=torch.int32).expand(1, 2, 9, 3)
    sums, pairs = selection_overlap(index, torch.arange(100, 109)[None], 8, (1, 8, 20))
    assert pairs.tolist() == [8, 1, 0] and sums.tolist() == [[8.0, 1.0, 0.0]] * 2


def test_distances_are_counted_by_selector_and_power_of_two(monkeypatch):
    index, positions = selected(documents=[7, 53])
    counts = torch.zeros(2, 64, dtype=torch.int64)
    for b, r, t in ((b, r, t) for b in range(2) for r in range(2) for t in range(60)):
        for n in index[b, r, t].tolist():
            if n >= 0:
                counts[r, (int(positions[b, t]) - 4 * n).bit_length()] += 1
    assert torch.equal(distance_histogram(index, positions, 4), counts)
    monkeypatch.setattr("ssa.analysis.selection.PAIR_ELEMENTS", 50)
    assert torch.equal(distance_histogram(index, positions, 4), counts)
    assert bit_length(torch.tensor([0, 1, 2, 3, 4, 2**40 - 1, 2**40])).tolist() == [0, 1, 2, 2, 3, 40, 41]


@pytest.mark.parametrize("method", ["moba", "nsa", "ssa"])
def test_decode_steps_overlap_as_neighbouring_queries_of_the_same_text_do(method):
    model, budget, prompt = tiny_model(method).double().eval(), Budget(2, 4), torch.randint(258, (30,))
    found = decode_overlap(model, prompt, budget, 9)
    assert (found["prompt_tokens"], found["steps"]) == (30, 9)
    with torch.no_grad():
        ids = prompt[None]
        for _ in range(9):
            logits = model(input_ids=ids, attention_mode="sparse", budget=budget).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        indices = []
        model(input_ids=ids, attention_mode="sparse", budget=budget, observer=lambda _, r: indices.append(r.block_indices))
    for layer, index in enumerate(indices):
        sums, pairs = selection_overlap(index[:, :, 30:], torch.arange(30, 39)[None], 8, (1,))
        assert found["gamma"][layer] == pytest.approx((sums[:, 0] / pairs[0]).tolist())


def test_too_short_a_prompt_or_walk_has_no_decode_overlap():
    model = tiny_model("ssa")
    assert decode_overlap(model, torch.arange(7), Budget(2, 4), 9) is None
    assert decode_overlap(model, torch.arange(8), Budget(2, 4), 1) is None


def test_decoding_stays_within_the_positions_of_the_model():
    model = tiny_model("ssa", max_position_embeddings=40).eval()
    assert decode_overlap(model, torch.arange(40), Budget(2, 4), 9)["prompt_tokens"] == 31
