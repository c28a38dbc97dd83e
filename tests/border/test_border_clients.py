"""Who else drives the model: transformers' Trainer and lm-evaluation-harness, in the releases that are installed."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from transformers import Trainer, TrainingArguments

from ssa.data.tokenizer import byte_tokenizer
from ssa.eval.harness import SSALM
from ssa.model.streams import StreamCallback
from ssa.testing import tiny_model

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 24).reshape(16, 24) * 37 % 256]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_steps_of_trainer_are_two_steps_by_hand(tmp_path, accumulation):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], logging_steps=1,
        save_steps=2, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(tiny_model(), arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[StreamCallback()])
    trainer.train()
    model = tiny_model().train()
    losses = []
    for step in range(2):
        model.stream_step = step
        batch = torch.stack([row["input_ids"] for row in ROWS[8 * step : 8 * step + 8]])
        loss = model(batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-3)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    few = torch.stack([row["input_ids"] for row in ROWS[:4]])
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model.eval()(few, labels=few).loss.item(), rel=1e-3)


TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{answers}}", "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "continuation": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answers[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}  # fmt: skip
ITEMS = [
    {"question": f"What is {'so ' * i}{i}?", "answers": [f" It is {i}.", " é", " Nothing"], "right": i % 3} for i in range(6)
]


def test_a_harness_reports_of_our_class_what_it_reports_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for all packages
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, task in TASKS.items():
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": f"border_{name}", **where, **task}))  # JSON is YAML
    model, tokenizer = tiny_model(attention_mode="full", max_position_embeddings=64), byte_tokenizer()
    reports = []
    for kind in (
        get_model("hf")(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=64, device="cpu"),
        SSALM(model, "full", batch_size=2, max_length=64, tokenizer=tokenizer),
    ):
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        reports.append(
            simple_evaluate(
                kind, tasks=[f"border_{name}" for name in TASKS], task_manager=tasks, log_samples=True, bootstrap_iters=0
            )
        )
    theirs, ours = reports
    for name in ours["samples"]:
        assert len(ours["samples"][name]) == len(ITEMS)
        for a, b in zip(theirs["samples"][name], ours["samples"][name], strict=True):
            assert a["doc"] == b["doc"] and numbers(a["filtered_resps"]) == pytest.approx(numbers(b["filtered_resps"]), abs=1e-3)
            if name == "border_continuation":
                assert a["filtered_resps"] == b["filtered_resps"] and len(b["filtered_resps"][0]) > 0
    assert ours["results"].keys() == theirs["results"].keys() == {f"border_{name}" for name in TASKS}


def numbers(answers):
    """Of nested lists and tuples, in their order."""
    return (
        [answers]
        if isinstance(answers, float)
        else []
        if isinstance(answers, str | bool)
        else [n for part in answers for n in numbers(part)]
    )
