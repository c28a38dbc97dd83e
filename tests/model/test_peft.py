"""Adapters by PEFT: the alignment trains them, and the loss is that of the adapted model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from ssa.errors import UserError
from ssa.ops import cross_entropy as slices
from ssa.testing import LargestTensor, tiny_model

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from step_gradients import assert_same_gradients, step_gradients, take_gradients
from test_hf_trainer import Uneven, gradients_of_trainer, mean_of_all, padded

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def adapted(seed=3, **options):
    model = tiny_model(stream_seed=1)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))


def own_loss(logits, ids):
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def expected_gradients(model, micro_batches):
    """Those of `ssa train` on the adapted model within PEFT's, under PEFT's names."""
    found = step_gradients(model.get_base_model(), micro_batches)
    return {f"base_model.model.{name}": gradient for name, gradient in found.items()}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "lm_head"]])
def test_trainer_gives_what_ssa_train_gives(tmp_path, targets, outside):
    rows = Uneven(whole_rows=False)
    options = {"data_collator": padded("right")} | ({"compute_loss_func": mean_of_all} if outside else {})
    found, _ = gradients_of_trainer(tmp_path, adapted(target_modules=targets), rows, 1, 4, **options)
    expected = expected_gradients(adapted(target_modules=targets), [[document] for document in rows.documents])
    assert_same_gradients(found[0], expected)
    assert any("q_proj" in name for name in expected) and all("lora" in name for name in expected)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_the_loss_sees_the_adapted_head(monkeypatch, options):
    model, ids = adapted(**options), torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name and p.requires_grad:
                p.add_(torch.randn_like(p))
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(out.loss, own_loss(out.logits, ids))
    own_loss(model(input_ids=ids, attention_mode="full").logits, ids).backward()
    expected = take_gradients(model)
    monkeypatch.setitem(slices.SLICE_ELEMENTS, "cpu", 20 * 258)
    with LargestTensor() as seen:
        model(input_ids=ids, labels=ids, attention_mode="full", logits_to_keep=1).loss.backward()
    assert_same_gradients(take_gradients(model), expected)
    assert any("lm_head" in name for name in expected)
    assert seen.elements < 98 * 258 / 2, "logits of all tokens were held"


def test_an_adapter_in_a_loop_of_ones_own_is_told_to_accumulate():
    """The first parameter that is trained is an adapter's, not the model's."""
    model, ids = adapted(target_modules=["v_proj"]).train(), torch.randint(0, 256, (1, 20))
    own_loss(model(input_ids=ids).logits, ids).backward()
    with pytest.raises(UserError, match="micro_batches"):
        own_loss(model(input_ids=ids).logits, ids).backward()
    model.zero_grad()
    model.train_step.micro_batches = 2  # reaches the model through PEFT's wrapper
    for _ in range(2):
        (own_loss(model(input_ids=ids).logits, ids) / 2).backward()


def test_prompt_tuning_trains_and_prefix_tuning_is_refused():
    ids = torch.randint(0, 256, (2, 20))
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    out = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    out.loss.backward()
    assert out.sparsity_loss > 0 and [name for name in take_gradients(model)] == ["prompt_encoder.default.embedding.weight"]
    with pytest.raises(UserError, match=r"no weight of the model is trained, and .*micro_batches"):
        model(input_ids=ids).logits.sum().backward()
    model.train_step.micro_batches = 1
    model(input_ids=ids).logits.sum().backward()
    model = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    with pytest.raises(UserError, match="DynamicCache") as error:
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert "\n" not in str(error.value)
