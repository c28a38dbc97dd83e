"""Outputs in transformers' order, as tuples and by the configuration's switches, and what Trainer makes of them."""

import pytest
import torch

from ssa.model import SSAForCausalLM
from ssa.testing import tiny_model

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def tokens(batch=2, length=12):
    return torch.randint(0, 256, (batch, length))


def names(output):
    """Keys of an output, the cache under one name on every release."""
    return ["cache" if name == "past_key_values" else name for name in output.keys()]  # noqa: SIM118 (an OrderedDict of its own)


def test_fields_come_in_transformers_order_ours_last():
    model, x = tiny_model(), tokens()
    out = model(x, labels=x, output_hidden_states=True)
    assert names(out) == ["loss", "logits", "cache", "hidden_states", "cross_entropy"]
    assert out[0] is out.loss and out[1] is out.logits
    assert names(model(x)) == ["logits", "cache"] and names(model(x, use_cache=False)) == ["logits"]
    assert names(model.model(x, output_hidden_states=True)) == ["last_hidden_state", "cache", "hidden_states"]
    trained = model.train()(x, labels=x, stream="sparse")
    assert names(trained)[0] == "loss" and trained[0] is trained.loss


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_tuples(how):
    model, x = tiny_model(), tokens()
    loss, logits = model(x, labels=x)[:2]
    argument = {"return_dict": False} if how == "argument" else {}
    model.config.return_dict = how == "argument"
    assert [type(part) for part in (model(x, labels=x, **argument), model.model(x, **argument))] == [tuple, tuple]
    found = model(x, labels=x, **argument)
    assert torch.equal(found[0], loss) and torch.equal(found[1], logits)
    assert torch.equal(model(x, **argument)[0], model(x, return_dict=True).logits)
    assert torch.equal(model.model(x, **argument)[0], model.model(x, return_dict=True).last_hidden_state)
    assert model.token_nll(x).shape == (2, 11)
    assert model.generate(x, max_new_tokens=2, eos_token_id=None).shape == (2, 14)


def test_hidden_states_as_the_configuration_says_unless_told_otherwise():
    model, x = tiny_model(), tokens()
    assert model(x).hidden_states is None
    model.config.output_hidden_states = True
    for out in (model(x), model.model(x)):
        assert [tuple(states.shape) for states in out.hidden_states] == [(2, 12, 32)] * 3
    assert torch.equal(model.lm_head(model(x).hidden_states[-1]), model(x).logits)
    assert model(x, output_hidden_states=False).hidden_states is None


def test_the_package_reads_fields_of_a_model_that_was_saved_to_give_tuples(tmp_path):
    from ssa.data.tokenizer import byte_tokenizer
    from ssa.infer.load import load_model

    model = tiny_model()
    model.config.return_dict = False
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert not SSAForCausalLM.from_pretrained(tmp_path).config.return_dict
    loaded, _ = load_model(tmp_path, device="cpu")
    assert loaded(tokens()).logits.shape == (2, 12, 258)


@pytest.mark.parametrize("labelled", [True, False])
def test_trainer_predicts_one_array_of_logits(tmp_path, labelled):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} if labelled else {"input_ids": row} for row in tokens(5)]
    seen = []
    trainer = Trainer(
        tiny_model(), TrainingArguments(tmp_path, use_cpu=True, report_to=[], per_device_eval_batch_size=2, disable_tqdm=True),
        compute_metrics=(lambda found: seen.append(found.predictions) or {}) if labelled else None,
    )  # fmt: skip
    found = trainer.predict(rows).predictions
    assert found.shape == (5, 12, 258)
    logits = trainer.model(torch.stack([row["input_ids"] for row in rows])).logits
    torch.testing.assert_close(torch.as_tensor(found), logits, rtol=1e-5, atol=1e-5)
    assert [x.shape for x in seen] == ([(5, 12, 258)] if labelled else [])


@pytest.mark.parametrize("training", [False, True])
def test_shifted_labels_are_taken_as_they_are(training):
    model, x = tiny_model().train(training), tokens()
    shifted = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100)
    shifted[0, :5] = -100  # what labels cannot say: the same label stands at another place
    said = model(x, shift_labels=shifted, labels=torch.zeros_like(x), stream="sparse" if training else None)
    labels = x.clone()
    labels[0, :6] = -100
    wanted = model(x, labels=labels, stream="sparse" if training else None)
    torch.testing.assert_close(said.loss, wanted.loss)
    assert said.loss.item() != pytest.approx(model(x, labels=x, stream="sparse" if training else None).loss.item(), abs=1e-3)
