"""Decoding steps and fused layers against the model's own layers: every method and selector, ragged rows, any number of tokens a step. On a GPU
(SSA_TEST_DEVICE) steps are captured, and a replay is the step launched without a graph, bitwise."""

import copy
import gc

import pytest
import torch
from torch import nn

from marks import needs_gpu, needs_triton
from ssa.model import BlockCache
from ssa.testing import tiny_model

pytestmark = needs_triton
WINDOWS = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1}
KINDS = {
    "full": {"method": "full"}, "moba": {"method": "moba", "attention_bias": True}, "nsa": {"method": "nsa"}, "ssa": {"method": "ssa"},
    "no gate": {"method": "ssa", "attention_gate": False, "tie_word_embeddings": True},
    "heads choose": {"method": "moba", "selection_scope": "head", "selection_scoring": "logit"},
    "windows": {"method": "ssa", "selector": "windows", "num_selected_blocks": 4, "selector_options": WINDOWS},
    "eviction": {"method": "moba", "selector": "eviction", "num_selected_blocks": 5, "selector_options": WINDOWS | {"query_blocks": 1}},
    "longrope": {"method": "ssa", "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2048,
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4,
    }},
}  # fmt: skip


def a_model(kind, impl="triton", **changes):
    small = {"vocab_size": 60, "bos_token_id": 57, "eos_token_id": 57, "pad_token_id": 58}
    model = tiny_model(**(KINDS[kind] | small | changes))
    if kind == "eviction":
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.selector.delta.weight)
    model.model.impl = impl
    return model


def filled(model, x, pads, mode, width, max_length=64):
    cache = BlockCache(max_length)
    mask = (torch.arange(width) >= torch.tensor(pads)[:, None]).long()
    impl, model.model.impl = model.model.impl, "auto"  # in the interpreter a pass of many tokens takes long; one test has it
    with torch.no_grad():
        logits = model(x[:, :width], attention_mask=mask, cache=cache, use_cache=True, attention_mode=mode).logits
    model.model.impl = impl
    return cache, torch.tensor(pads), logits


@pytest.mark.parametrize(
    "kind, mode", [(kind, "sparse") for kind in KINDS] + [(kind, "full") for kind in ("ssa", "nsa", "eviction")]
)
@torch.no_grad()
def test_steps_equal_the_model_without_a_cache(kind, mode):
    model, x, pads, width = a_model(kind), torch.randint(0, 57, (2, 22)), [0, 3], 17
    gold = copy.deepcopy(model)
    gold.model.impl = "reference"
    wanted = [gold(x[row : row + 1, pad:], attention_mode=mode, use_cache=False).logits[0] for row, pad in enumerate(pads)]
    cache, starts, logits = filled(model, x, pads, mode, width)
    calls, steps = model.model.decoding_calls(mode), model.model.steps
    assert steps.applies(model, calls, model.model.embed_tokens.weight[:1, None], 1)
    found = [logits]
    for cut in (2, 1):
        ids = x[:, width : width + cut]
        found.append(steps.run(model, ids.clone(), cache, starts, calls).clone())
        width += cut
    for row, pad in enumerate(pads):
        torch.testing.assert_close(
            torch.cat(found, 1)[row, pad:],
            wanted[row][: width - pad],
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, row=row: f"row {row}: {m}",
        )


@pytest.mark.parametrize("kind", ["ssa", "eviction", "nsa"])
@torch.no_grad()
def test_modes_and_budgets_may_change_between_steps(kind):
    model, x = a_model(kind), torch.randint(0, 57, (1, 34))
    gold = copy.deepcopy(model)
    gold.model.impl = "reference"
    cache, starts, _ = filled(model, x, [0], "full", 20)
    kept = BlockCache(64)
    gold(x[:, :20], cache=kept, use_cache=True, attention_mode="full")
    for at, (mode, budget) in enumerate([("full", None), ("full", None), ("sparse", None), ("sparse", "6x4"), ("full", None), ("sparse", None), (None, ["full", "7x4"])]):  # fmt: skip
        ids = x[:, 20 + at : 21 + at]
        logits = model.model.steps.run(model, ids.clone(), cache, starts, model.model.decoding_calls(mode, budget))
        wanted = gold(ids, cache=kept, use_cache=True, attention_mode=mode, budget=budget).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, pads", [("ssa", [0]), ("eviction", [0, 9])])
@torch.no_grad()
def test_many_tokens_through_fused_layers(kind, pads):
    model, x = a_model(kind), torch.randint(0, 57, (len(pads), 30))
    mask = (torch.arange(30) >= torch.tensor(pads)[:, None]).long()
    outs = []
    for impl in ("triton", "reference"):
        model.model.impl, cache = impl, BlockCache()
        outs.append(
            torch.cat(
                [
                    model(x[:, a:b], attention_mask=mask[:, :b], cache=cache, use_cache=True).logits
                    for a, b in ((0, 18), (18, 30))
                ],
                1,
            )
        )
    torch.testing.assert_close(outs[0][mask == 1], outs[1][mask == 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["adapter", "hook", "forward", "observer", "foreign method"])
@torch.no_grad()
def test_what_is_not_as_it_was_made_is_left_to_its_own_code(what):
    model, x = a_model("ssa"), torch.randint(0, 57, (1, 9))
    plain = model(x, use_cache=True).logits
    attention, seen = model.model.layers[1].self_attn, []
    how = {}
    if what == "adapter":
        attention.v_proj = nn.Sequential(attention.v_proj, nn.Hardtanh(-0.01, 0.01))
    elif what == "hook":
        attention.o_proj.register_forward_hook(lambda module, given, out: out * 2)
    elif what == "forward":
        layer = model.model.layers[1]
        layer.mlp.forward = lambda hidden: seen.append(hidden) or hidden
    elif what == "observer":
        how["observer"] = lambda layer, record: seen.append(record)
    else:
        kind = type("Mine", (type(attention.method),), {"__call__": lambda self, *given: seen.append(1) or type(self).__base__.__call__(self, *given)})  # fmt: skip
        attention.method.__class__ = kind
        assert not kind.graphed
        assert not model.model.steps.applies(model, model.model.decoding_calls(), plain[:1], 1)
    changed = model(x, use_cache=True, **how).logits
    assert seen or not torch.equal(changed, plain)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["sparse", "full"])
@torch.no_grad()
def test_a_replay_is_the_step_without_a_graph(kind, mode):
    changes = {"head_dim": 32, "hidden_size": 128} | ({} if kind != "longrope" else {"head_dim": 8, "hidden_size": 32})
    model, x, pads, width = a_model(kind, **changes).bfloat16(), torch.randint(0, 57, (3, 60)), [0, 5, 11], 30
    runs = []
    for graphs in (True, False):
        cache, starts, _ = filled(model, x, pads, mode, width, 80)
        model.model.steps.graphs, calls = graphs, model.model.decoding_calls(mode)
        ids, found = x[:, :1].clone(), []
        for at in range(width, 60):
            ids.copy_(x[:, at : at + 1])
            found.append(model.model.steps.run(model, ids, cache, starts, calls).clone())
            if at == 40:  # what was thrown away must leave nothing behind
                cache.crop(-3)
        runs.append(torch.stack(found))
    assert torch.equal(*runs)


@needs_gpu
@torch.no_grad()
def test_a_replay_never_writes_beyond_a_cache_that_grows():
    model, x = a_model("ssa", head_dim=32, hidden_size=128), torch.randint(0, 57, (3, 130))
    runs = []
    for graphs in (True, False):
        cache, starts, _ = filled(model, x, [0, 5, 11], "sparse", 30, None)  # has room for 64 more
        model.model.steps.graphs, calls = graphs, model.model.decoding_calls("sparse")
        ids, found = x[:, :1].clone(), []
        for at in range(30, 130):
            ids.copy_(x[:, at : at + 1])
            found.append(model.model.steps.run(model, ids, cache, starts, calls).clone())
        assert cache.get_seq_length() == 130
        runs.append(torch.stack(found))
    assert torch.equal(*runs)


@needs_gpu
@torch.no_grad()
def test_generate_through_graphs_equals_generate_without():
    for kind in KINDS:
        model, x = a_model(kind), torch.randint(0, 57, (2, 33))
        mask = (torch.arange(33) >= torch.tensor([[0], [7]])).long()
        outs = []
        for graphs in (True, False):
            model.model.steps.graphs = graphs
            for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
                tokens = model.generate(x, attention_mask=mask, max_new_tokens=70, do_sample=False, eos_token_id=None, **more)
                outs.append(tokens[:, 33:].tolist())
        assert outs[:3] == outs[3:] and outs[0] == outs[1], kind


@needs_gpu
@torch.no_grad()
def test_graphs_die_with_their_cache_and_their_model():
    def used():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = used()
    models = [a_model("ssa", head_dim=64, hidden_size=256, vocab_size=5000) for _ in range(2)]
    for model in models:
        for _ in range(2):
            model.generate(torch.randint(0, 57, (2, 20)), max_new_tokens=20, do_sample=False, eos_token_id=None)
        gc.collect()
        assert not model.model.steps._of_cache
    del models, model
    assert used() <= before + (4 << 20)


@torch.no_grad()
def test_a_model_that_has_decoded_is_saved_as_before(tmp_path):
    model = a_model("ssa")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model(torch.randint(0, 57, (1, 6)), use_cache=True)  # which puts weights side by side
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in loaded.items())
