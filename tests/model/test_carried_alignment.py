"""The alignment in losses that are computed outside the model."""

import warnings

import pytest
import torch
from step_gradients import SSA_WEIGHT, alignment_gradients, assert_same_gradients, step_gradients, take_gradients
from torch.nn.functional import cross_entropy

from ssa.errors import UserError
from ssa.model.streams import draw_stream
from ssa.testing import document_positions, tiny_model


def documents(*lengths):
    ids = [torch.randint(0, 256, (n,)) for n in lengths]
    return [(x, x) for x in ids]


def own_loss(logits, ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_logits(model, ids, **options):
    return own_loss(model(ids, **options).logits, ids)


def by_hidden_states(model, ids):
    """As TRL's trainers do: the backbone, and a product with the head's weight."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return own_loss(hidden @ model.lm_head.weight.T, ids)


def by_last_of_all_hidden_states(model, ids):
    return own_loss(model.lm_head(model(ids, output_hidden_states=True).hidden_states[-1]), ids)


def by_token_nll(model, ids):
    return model.token_nll(ids).mean()


def by_labels(model, ids):
    return model(ids, labels=ids).loss


@pytest.mark.parametrize("full_ratio", [0.0, 1.0])
@pytest.mark.parametrize("loss", [by_logits, by_hidden_states, by_last_of_all_hidden_states, by_token_nll, by_labels])
def test_whoever_computes_the_loss_trains_the_alignment(loss, full_ratio):
    model, rows = tiny_model(full_ratio=full_ratio), documents(37, 37)
    expected = step_gradients(model, [rows])
    loss(model, torch.stack([ids for ids, _ in rows])).backward()
    assert_same_gradients(take_gradients(model), expected)
    assert max(g.norm() for g in alignment_gradients(model, [rows]).values()) > 1e-3  # it is not lost in the tolerance


@pytest.mark.parametrize("loss", [by_logits, by_labels])
def test_accumulation_in_a_loop_of_ones_own(loss):
    """The caller divides its loss; the alignment is as much smaller, and all micro-batches follow one draw."""
    model, rows = tiny_model(stream_seed=1), documents(*[30] * 4)  # the first steps' streams: full, full, full, sparse
    model.train().train_step.micro_batches = 2
    model.stream_step = 2
    for step, pair in ((2, rows[:2]), (3, rows[2:])):
        expected = step_gradients(model, [[row] for row in pair], step)
        for ids, _ in pair:
            (loss(model, ids[None]) / 2).backward()
        assert_same_gradients(take_gradients(model), expected)
    assert model.stream_step == 4 and [draw_stream(1, step, 0.5) for step in (2, 3)] == ["full", "sparse"]


def test_both_parts_of_a_composed_loss_train_it_once():
    """Labels and hidden states, whose loss includes it; or logits and hidden states, which carry it."""
    model, rows = tiny_model(stream_seed=1), documents(30, 30)
    ids = torch.stack([ids for ids, _ in rows])
    expected = step_gradients(model, [rows])
    out = model(ids, output_hidden_states=True, stream="full")
    (own_loss(out.logits, ids) + 0 * out.hidden_states[-1].sum()).backward()
    assert_same_gradients(take_gradients(model), expected)
    out = model(ids, labels=ids, output_hidden_states=True, stream="full")
    (out.loss + 0 * out.hidden_states[-1].sum()).backward()
    assert_same_gradients(take_gradients(model), expected)


def test_gradient_checkpointing_and_bfloat16():
    model, rows = tiny_model(), documents(40)
    ids, expected, alignment = rows[0][0][None], step_gradients(model, [rows]), alignment_gradients(model, [rows])
    stream = draw_stream(0, 0, 0.5)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        by_logits(model, ids, stream=stream).backward()
        assert_same_gradients(take_gradients(model), expected)
    with torch.autocast(ids.device.type, torch.bfloat16):
        by_logits(model, ids, stream=stream).backward()
    low = take_gradients(model)

    def size(gradients):
        return torch.stack([x.norm() for x in gradients]).norm()

    assert size(low[name] - expected[name] for name in low) < 0.5 * size(alignment.values())  # bfloat16, not without it


def test_where_its_weight_cannot_be_known_the_first_step_stops():
    model, ids = tiny_model().train(), torch.randint(0, 256, (1, 20))
    by_logits(model, ids).backward()
    with pytest.raises(UserError, match=r"set model\.train_step\.micro_batches") as error:
        by_logits(model, ids).backward()
    assert "\n" not in str(error.value)
    for p in model.parameters():
        p.grad.zero_()
    by_logits(model, ids).backward()  # gradients that are zero are none
    with torch.autocast(ids.device.type, torch.float16), pytest.raises(UserError, match="bfloat16"):
        model(ids)
    with pytest.raises(UserError, match="bfloat16"):
        model.half()(ids)
    with pytest.raises(UserError, match=r"num_items_in_batch = 76 .*this one has 19.*micro_batches"):
        model.float()(ids, labels=ids, num_items_in_batch=76)
    model(ids, labels=ids, num_items_in_batch=torch.tensor(19)).loss.backward()


def test_without_gradients_a_model_in_training_mode_reads_as_in_inference():
    """A policy that generates, a reference, a metric: no alignment, no draw, the configuration's attention."""
    model, ids = tiny_model(attention_mode="full"), torch.randint(0, 256, (2, 40))
    expected = model(ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257)
    model.train()
    with torch.no_grad():
        out = model(ids, labels=ids)
        assert torch.equal(out.loss, expected.loss) and out.sparsity_loss is None
        assert torch.equal(model(ids).logits, expected.logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257), generated)
    assert model.stream_step == 0
    with torch.no_grad():
        assert model(ids, labels=ids, stream="full").sparsity_loss > 0  # asked for


def test_training_in_eval_mode_is_said():
    model, ids = tiny_model(), torch.randint(0, 256, (1, 20))
    with pytest.warns(UserWarning, match=r"call model\.train\(\)"):
        by_logits(model, ids).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids, attention_mode="full").loss.backward()  # asked for
        tiny_model("moba")(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model(ids)


def test_the_alignment_weight_is_that_of_the_documents_of_a_packed_row():
    model, rows = tiny_model(stream_seed=1), documents(5, 1, 31)
    ids = torch.cat([ids for ids, _ in rows])[None]
    expected = step_gradients(model, [rows])
    model(ids, labels=ids, position_ids=document_positions([5, 1, 31])).loss.backward()
    assert_same_gradients(take_gradients(model), expected)
    assert model.config.alignment_weight == SSA_WEIGHT
