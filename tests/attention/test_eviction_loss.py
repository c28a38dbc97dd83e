"""The importance's own loss: what it is, that parts add up to it, that only A and delta learn from it, that it is never silently absent."""

from dataclasses import replace

import pytest
import torch

from ssa.attention import AttentionCall, AttentionInputs, HeadShape, MethodOutput
from ssa.attention.method import with_selection_loss
from ssa.attention.selectors.eviction import EvictionSelector
from ssa.budget import FULL, Budget, Selection
from ssa.errors import UserError
from ssa.infer.load import check_budgets
from ssa.ops import select_blocks
from ssa.testing import document_positions, random_qkv, tiny_config, tiny_model

OPTIONS = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1, "query_blocks": 1}
LOSS = OPTIONS | {"eviction_loss_weight": 0.5, "eviction_loss_every": 8}
TOKENS, BUDGET = 96, Selection(5, 4)


def selector(**more):
    torch.manual_seed(0)
    made = EvictionSelector(HeadShape(4, 2, 8), lse="exact", dense_length=0, **(LOSS | more))
    with torch.no_grad():
        made.delta.weight.normal_(0, 0.3)
        made.A.copy_(torch.tensor([0.7, 1.4]))
    return made.double()


def inputs(rows=2):
    q, k, v = (x.detach() for x in random_qkv(rows, TOKENS, TOKENS, 4, 2, 8, seed=5))
    return AttentionInputs(q, k, v)


def gradients(made, loss):
    return [loss, *torch.autograd.grad(loss, [made.A, made.delta.weight])]


def assert_equal(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # scores of windows are fp32


def call_of(positions, align):
    return AttentionCall("sparse", BUDGET, align=align, train=True, positions_BT=positions)


def by_hand(made, given, align):
    """Of plain rows, query by query and block by block."""
    bias, total = made.key_bias(given.k_BSKD, given.v_BSKD), 0.0
    for b in range(len(given.q_BTHD)):
        for t in range(4, TOKENS, 8):
            for kv in range(2):
                own, keys = t // 4, given.k_BSKD[b, :, kv]
                blocks = list(range(1, own - 1))
                if len(blocks) < 2:
                    continue
                mass = torch.zeros(len(blocks), dtype=torch.float64)
                windows = [(2 * j, 2 * j + 4) for j in range((t - 1) // 2) if 2 * j + 3 <= t]
                votes = torch.zeros(len(windows), dtype=torch.float64)
                for head in (2 * kv, 2 * kv + 1):
                    logits = given.q_BTHD[b, t, head] @ keys[: t + 1].T * 8**-0.5
                    weights = logits.softmax(0)
                    mass += torch.stack([weights[4 * n : 4 * n + 4].sum() for n in blocks]) / 2
                    means = torch.stack([keys[i:j].mean(0) for i, j in windows])
                    votes += (given.q_BTHD[b, t, head] @ means.T * 8**-0.5).softmax(0)
                worth = torch.stack([bias[b, i:j, kv].mean() for i, j in windows])
                touch = [[i for i, (a, z) in enumerate(windows) if a < 4 * n + 4 and z > 4 * n] for n in blocks]
                target = mass if align else torch.stack([votes[t].max() for t in touch])
                target = (target / target.sum()).detach()
                mine = torch.stack([worth[t].max() for t in touch]).log_softmax(0)
                total = total + (target * (target.log() - mine)).sum()
    return total / (len(given.q_BTHD) * TOKENS / 8 * 2)


@pytest.mark.parametrize("align", [False, True])
def test_it_is_the_divergence_of_importance_from_attention(align):
    made, given = selector(), inputs()
    found = made.loss(given, call_of(None, align))
    # scores of windows are ranked in fp32
    torch.testing.assert_close(found, by_hand(made, given, align), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 1, 33, 53]])
def test_micro_batches_and_parts_of_rows_add_up_to_the_whole(align, lengths):
    made, given = selector(), inputs()
    positions = None if lengths is None else document_positions(lengths, 2)
    whole = gradients(made, made.loss(given, call_of(positions, align)))
    rows = [
        made.loss(AttentionInputs(*(x[b : b + 1] for x in (given.q_BTHD, given.k_BSKD, given.v_BSKD))),
                  call_of(None if positions is None else positions[b : b + 1], align))
        for b in range(2)
    ]  # fmt: skip
    assert_equal(gradients(made, sum(rows) / 2), whole)
    for parts in (2, 3, 4):  # of 48, 32 and 24 tokens: as ranks that share rows see them
        size = TOKENS // parts
        losses = [
            made.loss(
                AttentionInputs(given.q_BTHD[:, i * size : (i + 1) * size], given.k_BSKD[:, : (i + 1) * size], given.v_BSKD[:, : (i + 1) * size]),
                call_of(None if positions is None else positions[:, i * size : (i + 1) * size], align),
            )
            for i in range(parts)
        ]  # fmt: skip
        assert_equal(gradients(made, sum(losses) / parts), whole)


@pytest.mark.parametrize("align", [False, True])
def test_queries_in_slices_change_nothing(align, monkeypatch):
    made, given = selector(), inputs()
    whole = gradients(made, made.loss(given, call_of(None, align)))
    monkeypatch.setattr("ssa.attention.selectors.eviction.LOSS_ELEMENTS", 3 * 2 * 2 * TOKENS)
    assert_equal(gradients(made, made.loss(given, call_of(None, align))), whole)


def test_half_precision_around_it_changes_nothing():
    made, given = selector().float(), inputs()
    given = AttentionInputs(given.q_BTHD.float(), given.k_BSKD.float(), given.v_BSKD.float())
    for align in (False, True):
        plain = made.loss(given, call_of(None, align))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(made.loss(given, call_of(None, align)), plain)


def test_only_a_and_delta_learn_from_it_and_they_learn():
    model = tiny_model("moba", selector="eviction", selector_options=LOSS, num_selected_blocks=5).train()
    x = torch.randint(0, 256, (2, 96), generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(
        torch.get_default_device()
    )
    mine = [p for layer in model.model.layers for p in layer.self_attn.selector.parameters()]
    others = [p for p in model.parameters() if all(p is not own for own in mine)]
    optimizer, losses = torch.optim.Adam(mine, lr=0.03), []
    for _ in range(25):
        out = model(x, labels=x)
        losses.append(out.selection_loss.item())
        assert all(g is None for g in torch.autograd.grad(out.selection_loss, others, allow_unused=True, retain_graph=True))
        optimizer.zero_grad()
        out.selection_loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert out.loss.item() == pytest.approx((out.cross_entropy + 0.5 * out.selection_loss).item(), rel=1e-6)


def test_a_loss_of_ones_own_trains_it_too():
    model = tiny_model("ssa", selector="eviction", selector_options=LOSS, num_selected_blocks=5).train()
    x = torch.randint(0, 256, (2, 96), generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(
        torch.get_default_device()
    )
    model.train_step.micro_batches = 1
    weights = [p for layer in model.model.layers for p in layer.self_attn.selector.parameters()]
    wanted = torch.autograd.grad(model(x, labels=x, stream="full").loss, weights)
    logits = model(x, stream="full").logits[:, :-1]
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    for a, b in zip(torch.autograd.grad(own, weights), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_in_eval_mode_its_absence_is_said():
    model = tiny_model("moba", selector="eviction", selector_options=LOSS, num_selected_blocks=5)
    x = torch.randint(0, 256, (1, 40), generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(
        torch.get_default_device()
    )
    with pytest.warns(UserWarning, match="neither an alignment nor a selector's loss"):
        model(x, labels=x).loss.backward()


def test_it_is_asked_for_in_training_alone_and_once():
    made, given = selector(), inputs()
    out = MethodOutput(given.q_BTHD, given.q_BTHD, None, None)
    assert with_selection_loss(out, made, given, replace(call_of(None, False), train=False)).selection_loss is None
    first = with_selection_loss(out, made, given, call_of(None, False))
    assert with_selection_loss(first, made, given, call_of(None, False)) is first
    made.loss = lambda *_: None
    assert with_selection_loss(out, made, given, call_of(None, False)).selection_loss == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eviction_loss_weight": float("inf")}, "eviction_loss_weight = inf must be 0 or more and finite"),
        ({"eviction_loss_weight": -1.0}, "eviction_loss_weight = -1.0"),
        ({"eviction_loss_every": 0}, "eviction_loss_every = 0 at least 1"),
        ({"mean_size": 0, "mean_stride": 0, "sink_blocks": 0, "local_blocks": 0}, "mean_size = 0 must be at least 1"),
    ],
)
def test_options_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        tiny_model("moba", selector="eviction", selector_options=LOSS | change, num_selected_blocks=5)


def test_budgets_are_checked_before_anything_is_computed():
    config = tiny_config("moba", selector="eviction", selector_options=OPTIONS, num_selected_blocks=5)
    check_budgets(config, [Budget(4, 4), FULL, None])
    with pytest.raises(UserError, match="budget 3x4 is less than what is always read"):
        check_budgets(config, [Budget(5, 4), Budget(3, 4)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bias": torch.zeros(1, 39, 2)}, r"bias \(1, 39, 2\) is not \[B, S, K\] = \[1, 40, 2\]"),
        ({"importance": torch.zeros(1, 9, 2)}, r"importance \(1, 9, 2\) is not \[B, N, K\] = \[1, at least 10, 2\]"),
        ({"importance": torch.zeros(2, 10, 2)}, r"importance \(2, 10, 2\)"),
        ({"importance": torch.zeros(1, 10, 2, dtype=torch.bfloat16)}, "importance of torch.bfloat16 must be float32"),
    ],
)
def test_what_orders_blocks_is_checked(change, message):
    q, k, _ = (x.detach() for x in random_qkv(1, 40, 40, 4, 2, 8))
    with pytest.raises(UserError, match=message):
        select_blocks(q, k, Selection(5, 4, mean_size=4, mean_stride=2, local_blocks=1, query_blocks=1), **change)
