"""TRL's trainers compute their losses outside the model; what they train is what `ssa train` does, alignment included."""

from itertools import pairwise

import pytest

from ssa.testing import tiny_model

pytest.importorskip("accelerate", reason="accelerate, which TRL needs, is not installed")
pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")
from datasets import Dataset
from step_gradients import SSA_WEIGHT, TakeGradients, alignment_gradients, assert_same_gradients, step_gradients
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<eos>": 256, "<pad>": 257}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"
    )
    return wrapped


def common(folder, per_pass, accumulation, **options):
    return dict(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=per_pass, gradient_accumulation_steps=accumulation, learning_rate=0.0,
        max_grad_norm=0, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip


class WatchBatches:
    """A collator, and the documents (ids, labels) of each batch it made."""

    def __init__(self, collator):
        self.collator, self.documents = collator, []

    def __call__(self, rows):
        batch = self.collator(rows)
        documents = []
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row] == 1 if "attention_mask" in batch else slice(None)
            ids, labels = (batch[name][row][real] for name in ("input_ids", "labels"))
            starts = [0]
            if "position_ids" in batch:
                starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            bounds = [*starts, len(ids)]
            documents += [(ids[a:b], labels[a:b]) for a, b in pairwise(bounds)]
        self.documents.append(documents)
        return batch


TEXT = {"text": [f"{i} abcdef " * (1 + i % 4) for i in range(12)]}
COMPLETION = {"prompt": [f"say {i} " for i in range(12)], "completion": ["yes " * (1 + i % 4) for i in range(12)]}
CHAT = {
    "messages": [
        [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes " * (1 + i % 4)}, {"role": "user", "content": "and?"},
         {"role": "assistant", "content": "no"}] for i in range(12)
    ]
}  # fmt: skip
SFT = {
    "padded": (TEXT, {}),
    "bfd": (TEXT, {"packing": True, "packing_strategy": "bfd", "max_length": 48}),
    "bfd_split": (TEXT, {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}),
    "wrapped": (TEXT, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "padding_free": (TEXT, {"padding_free": True, "max_length": None}),
    "padding_free, multiple of 16": (TEXT, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}),
    "completion only": (COMPLETION, {"completion_only_loss": True}),
    "completion only, bfd": (COMPLETION, {"completion_only_loss": True, "packing": True, "max_length": 48}),
    "assistant only": (CHAT, {"assistant_only_loss": True}),
    "assistant only, bfd": (CHAT, {"assistant_only_loss": True, "packing": True, "max_length": 64}),
    "checkpointing off": (TEXT, {"gradient_checkpointing": False}),
    "label smoothing": (TEXT, {"label_smoothing_factor": 0.1}),
    "dft": (TEXT, {"loss_type": "dft"}),
}


def sft_gradients(folder, tokenizer, data, per_pass, accumulation, model, **options):
    """(gradients of the first step, documents of its micro-batches)."""
    take = TakeGradients()
    run = SFTTrainer(
        model, args=SFTConfig(**common(folder, per_pass, accumulation, **options)), train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer, callbacks=[take],
    )  # fmt: skip
    run.data_collator = watch = WatchBatches(run.data_collator)
    run._get_train_sampler = lambda *args: SequentialSampler(run.train_dataset)
    run.train()
    return take.steps[0], watch.documents[:accumulation]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", SFT)
def test_sft(tmp_path, tokenizer, case, accumulation):
    data, options = SFT[case]
    model = tiny_model(stream_seed=accumulation)  # full attention drives the first step, then sparse attention
    found, micro = sft_gradients(tmp_path, tokenizer, data, 4 // accumulation, accumulation, model, **options)
    if case in ("label smoothing", "dft"):  # another loss: what it trains without the alignment, and the alignment
        plain = tiny_model(stream_seed=accumulation, alignment_weight=0.0)
        plain, _ = sft_gradients(tmp_path, tokenizer, data, 4 // accumulation, accumulation, plain, **options)
        alignment = alignment_gradients(tiny_model(stream_seed=accumulation), micro)
        expected = {name: plain[name] + alignment[name] for name in plain}
    else:
        expected = step_gradients(tiny_model(stream_seed=accumulation), micro)
    assert_same_gradients(found, expected)
    if "only" in case:
        assert any((labels == -100).sum() > 1 for documents in micro for _, labels in documents)


def test_sft_evaluates_and_trains_in_bfloat16(tmp_path, tokenizer):
    arguments = SFTConfig(
        **common(tmp_path, 4, 2, packing=True, max_length=48) | {"bf16": True, "learning_rate": 1e-2, "max_steps": 12}
    )
    data = Dataset.from_dict({"text": TEXT["text"] * 8})
    run = SFTTrainer(tiny_model(), args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.5


PAIRS = {
    "prompt": [f"say {i} " for i in range(8)],
    "chosen": ["yes " * (1 + i % 3) for i in range(8)],
    "rejected": ["no " * (1 + i % 2) for i in range(8)],
}


def dpo_gradients(folder, tokenizer, accumulation, weight, reference, **options):
    take, model, passes = TakeGradients(), tiny_model(alignment_weight=weight), []
    run = DPOTrainer(
        model, ref_model=reference, args=DPOConfig(**common(folder, 4 // accumulation, accumulation, **options)),
        train_dataset=Dataset.from_dict(PAIRS), processing_class=tokenizer, callbacks=[take],
    )  # fmt: skip
    collate = run.data_collator

    def watch(rows):
        batch = collate(rows)
        documents = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        passes.append([(ids, ids) for ids in documents])
        return batch

    run.data_collator = watch
    run._get_train_sampler = lambda *args: SequentialSampler(run.train_dataset)
    run.train()
    return take.steps[0], passes[:accumulation]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_aligns_the_policy_alone(tmp_path, tokenizer, accumulation, precomputed):
    reference = None if precomputed else tiny_model(seed=1).train()
    options = {"precompute_ref_log_probs": precomputed}
    found, micro = dpo_gradients(tmp_path, tokenizer, accumulation, SSA_WEIGHT, reference, **options)
    plain, _ = dpo_gradients(tmp_path, tokenizer, accumulation, 0.0, reference, **options)
    alignment = alignment_gradients(tiny_model(), micro)
    assert_same_gradients(found, {name: plain[name] + alignment[name] for name in plain})
    if reference is not None:
        assert all(p.grad is None for p in reference.parameters()) and reference.stream_step == 0
