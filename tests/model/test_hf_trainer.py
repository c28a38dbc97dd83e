"""transformers' Trainer trains the model as it is."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler

from ssa.model.streams import StreamCallback, draw_stream
from ssa.testing import tiny_model

pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")
from step_gradients import SSA_WEIGHT, TakeGradients, alignment_gradients, assert_same_gradients, step_gradients
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TARGETS = (3, 9, 47, 47)


class Rows(Dataset):
    def __init__(self, count=32, length=24):
        generator = torch.Generator().manual_seed(3)
        start = torch.randint(0, 100, (count, 1), generator=generator)
        self.rows = (start + torch.arange(length)) % 100  # counting upwards: easy to learn

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Uneven(Rows):
    """Rows of 3, 9, 47 and 47 targets: of as many tokens, or of 48 tokens whose rest is not to be learnt."""

    def __init__(self, whole_rows, times=1):
        generator = torch.Generator().manual_seed(4)
        self.documents = []
        for targets in TARGETS * times:
            ids = torch.randint(0, 256, (48 if whole_rows else targets + 1,), generator=generator)
            self.documents.append((ids, torch.where(torch.arange(len(ids)) <= targets, ids, -100)))

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, i):
        ids, labels = self.documents[i]
        return {"input_ids": ids, "labels": labels}


def padded(side):
    """A collator that pads on the given side."""

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            missing = length - len(row["input_ids"])
            pads = (missing, 0) if side == "left" else (0, missing)
            for name, x, fill in (
                ("input_ids", row["input_ids"], 257), ("labels", row["labels"], -100), ("attention_mask", torch.ones_like(row["labels"]), 0),
            ):  # fmt: skip
                batch[name].append(torch.nn.functional.pad(x, pads, value=fill))
        if side == "left":
            for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
                labels[mask.argmax()] = -100
        return {name: torch.stack(rows) for name, rows in batch.items()}

    return collate


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def gradients_of_trainer(folder, model, rows, per_pass, accumulation, steps=1, **options):
    """Gradients of each step, and the logged losses."""
    arguments = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
    take = TakeGradients()
    callbacks = [take, *options.pop("callbacks", [])]
    run = InOrder(
        model,
        TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=per_pass, gradient_accumulation_steps=accumulation,
            learning_rate=0.0, max_grad_norm=0, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, **arguments,
        ),
        train_dataset=rows, callbacks=callbacks, **options,
    )  # fmt: skip
    run.train()
    return take.steps, [line["loss"] for line in run.state.log_history if "loss" in line]


def trainer(folder, steps, method="ssa", **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to=[],
        logging_steps=1, save_steps=5, seed=1, disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(tiny_model(method), arguments, train_dataset=Rows(), eval_dataset=Rows(8))


@pytest.mark.parametrize("method", ["ssa", "moba"])
def test_it_learns_and_evaluates(tmp_path, method):
    run = trainer(tmp_path, 25, method)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.5


def test_its_loss_includes_the_alignment(tmp_path, monkeypatch):
    run = trainer(tmp_path, 1)
    seen = []
    real = type(run.model).forward

    @functools.wraps(real)  # Trainer reads forward's signature
    def watch(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        seen.append(out)
        return out

    monkeypatch.setattr(type(run.model), "forward", watch)
    run.train()
    out = seen[0]
    expected = out.cross_entropy + run.model.config.alignment_weight * (out.sparsity_loss + out.commitment_loss)
    torch.testing.assert_close(out.loss.detach(), expected)
    torch.testing.assert_close(torch.tensor(run.state.log_history[0]["loss"]), expected.cpu(), rtol=1e-3, atol=1e-3)


def test_a_resumed_run_draws_the_same_streams(tmp_path):
    whole = trainer(tmp_path / "a", 10)
    whole.train()
    trainer(tmp_path / "b", 5).train()
    resumed = trainer(tmp_path / "b", 10)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


DISTILLED = {
    "selector": "eviction", "num_selected_blocks": 5,
    "selector_options": {
        "mean_size": 4, "mean_stride": 2, "local_blocks": 1, "query_blocks": 1, "eviction_loss_weight": 5.0, "eviction_loss_every": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("method, fields", [("ssa", {}), ("full", {}), ("moba", DISTILLED), ("ssa", DISTILLED)])
def test_uneven_micro_batches_add_up_to_the_batch(tmp_path, method, fields):
    """Targets count alike wherever they stand, and so do the tokens of the alignment and of a selector's loss, equally many in each row here."""
    rows, losses, found = Uneven(whole_rows=True), [], []
    for per_pass, accumulation in ((4, 1), (1, 4)):
        gradients, loss = gradients_of_trainer(tmp_path, tiny_model(method, **fields), rows, per_pass, accumulation)
        found.append(gradients[0]), losses.append(loss[0])
    assert_same_gradients(found[1], found[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_gradients(found[0], step_gradients(tiny_model(method, **fields), [[document] for document in rows.documents]))


COLLATORS = {
    "right": padded("right"),
    "left": padded("left"),
    "positions": DataCollatorWithFlattening(),
    "cu_seq_lens": DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    "seq_idx": DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("collator", COLLATORS)
def test_ragged_rows_give_what_ssa_train_gives(tmp_path, collator, accumulation):
    """Three steps, of different streams. Each micro-batch's alignment has the same weight, as in `ssa train`."""
    model, rows = tiny_model(stream_seed=1), Uneven(whole_rows=False, times=3)
    found, _ = gradients_of_trainer(tmp_path, model, rows, 4 // accumulation, accumulation, 3, data_collator=COLLATORS[collator])
    assert [draw_stream(1, step, 0.5) for step in (2, 3)] == ["full", "sparse"]
    for step, gradients in enumerate(found):
        step_rows = rows.documents[4 * step : 4 * step + 4]
        micro = [step_rows[i : i + 4 // accumulation] for i in range(0, 4, 4 // accumulation)]
        assert_same_gradients(gradients, step_gradients(tiny_model(stream_seed=1), micro, step))


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    rows = Uneven(whole_rows=False, times=2)  # 8 rows in steps of 3
    found, _ = gradients_of_trainer(tmp_path, tiny_model(stream_seed=1), rows, 1, 3, 4)
    for step, (first, last) in enumerate([(0, 3), (3, 6), (6, 8), (0, 3)]):
        micro = [[document] for document in rows.documents[first:last]]
        assert_same_gradients(found[step], step_gradients(tiny_model(stream_seed=1), micro, step))


def mean_of_all(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_items_in_batch


CLIENTS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "own loss function": {"compute_loss_func": mean_of_all},
    "own loss function, checkpointing": {"compute_loss_func": mean_of_all, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("client", CLIENTS)
def test_other_losses_train_the_alignment(tmp_path, client, accumulation):
    """What they train without it, and the alignment of `ssa train`."""
    rows, per_pass = Uneven(whole_rows=False), 4 // accumulation
    options = {"data_collator": padded("right"), **CLIENTS[client]}
    found, plain = (
        gradients_of_trainer(tmp_path, tiny_model(alignment_weight=weight), rows, per_pass, accumulation, **options)[0][0]
        for weight in (SSA_WEIGHT, 0.0)
    )
    micro = [rows.documents[i : i + per_pass] for i in range(0, 4, per_pass)]
    alignment = alignment_gradients(tiny_model(), micro)
    assert_same_gradients(found, {name: plain[name] + alignment[name] for name in plain})
    if "compute_loss_func" in options:
        assert_same_gradients(found, step_gradients(tiny_model(), micro))


def test_label_smoothing_predicts_the_next_token(tmp_path):
    """Trainer shifts the labels of models that it knows to be causal."""
    rows = Uneven(whole_rows=True)
    found, _ = gradients_of_trainer(tmp_path, tiny_model("full"), rows, 4, 1, label_smoothing_factor=1e-7)
    assert_same_gradients(found[0], step_gradients(tiny_model("full"), [rows.documents]))


def test_bfloat16_with_an_own_loss_function(tmp_path):
    rows = Uneven(whole_rows=False)
    options = {"data_collator": padded("right"), "compute_loss_func": mean_of_all}
    found, _ = gradients_of_trainer(tmp_path, tiny_model(), rows, 1, 4, bf16=True, **options)
    micro = [[document] for document in rows.documents]
    expected, alignment = step_gradients(tiny_model(), micro), alignment_gradients(tiny_model(), micro)
    off = torch.stack([(found[0][name] - expected[name]).norm() for name in expected]).norm()
    assert off < 0.5 * torch.stack([x.norm() for x in alignment.values()]).norm()


def test_labels_that_trainer_counts_and_the_loss_leaves_out_are_said(tmp_path):
    def flattened(rows):
        batch = DataCollatorWithFlattening()(rows)
        return batch | {"labels": torch.cat([row["labels"] for row in rows])[None]}

    with pytest.warns(UserWarning, match="3 labels are padding or the first token of a document"):
        gradients_of_trainer(tmp_path, tiny_model(), Uneven(whole_rows=False), 4, 1, data_collator=flattened)


def test_trainers_of_other_models_are_left_alone(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    trainer(tmp_path, 1)
    gradients, _ = gradients_of_trainer(tmp_path, llama, Rows(4), 4, 1)
    assert len(gradients) == 1
    with pytest.raises(TypeError, match="StreamCallback needs an SSAForCausalLM"):
        gradients_of_trainer(tmp_path, llama, Rows(4), 4, 1, callbacks=[StreamCallback()])


def test_two_ranks_give_what_one_gives(tmp_path, run_on_two_ranks):
    """Two passes of one row on each rank; the loss of the model, and one that is computed outside."""
    rows = Uneven(whole_rows=False)
    run_on_two_ranks(Path(__file__).with_name("trainer_rank.py"), tmp_path)
    expected = step_gradients(tiny_model(), [[document] for document in rows.documents])
    for client in ("model", "outside", "local count"):
        found = [load_file(tmp_path / f"{client}-{rank}.safetensors") for rank in (0, 1)]
        if client != "local count":
            for gradients in found:
                assert_same_gradients(gradients, expected)
    # without a count over ranks each rank's mean counts alike, and the alignment has its weight all the same
    ranks = [[[rows.documents[i]] for i in part] for part in ((0, 2), (1, 3))]
    plain = [step_gradients(tiny_model(), micro, weight=0.0) for micro in ranks]
    alignment = alignment_gradients(tiny_model(), [[document] for document in rows.documents])
    assert_same_gradients(found[0], {name: (plain[0][name] + plain[1][name]) / 2 + alignment[name] for name in alignment})
