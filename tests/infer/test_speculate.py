"""Speculation against full decoding: token for token where it is greedy, in distribution where it samples. Rows that end apart go by captured steps,
which the interpreter launches here."""

import copy
import functools
import gc
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from marks import needs_gpu, needs_triton, on_gpu
from ssa.attention import AttentionCall
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.infer import speculate as module
from ssa.infer.decoder import Attention, Draw, decoded_tokens
from ssa.infer.engine import Sampling, complete, generate
from ssa.infer.speculate import Rounds, Speculation, speculated_tokens
from ssa.testing import tiny_model

PROMPTS = ["A prompt of some length that spans several blocks of keys.", "x", "", "Zwölf Boxkämpfer", "x" * 33]
WINDOWS = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1}
EVICTION = {
    "method": "moba",
    "selector": "eviction",
    "num_selected_blocks": 5,
    "selector_options": WINDOWS | {"query_blocks": 1},
}
KINDS = {"ssa": {"method": "ssa"}, "nsa": {"method": "nsa"}, "eviction": EVICTION}
FULL = Attention("full", "full")


def a_model(kind, **changes):
    model = tiny_model(**(KINDS[kind] | changes))
    if kind == "eviction":
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.selector.delta.weight)
    return model


def small_model(kind, **changes):
    return a_model(kind, **({"vocab_size": 60, "bos_token_id": 57, "eos_token_id": 57, "pad_token_id": 58} | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_full_attention(tokenizer, kind):
    model = a_model(kind)
    plain = complete(model, tokenizer, PROMPTS, Sampling(15), mode="full")
    assert plain != complete(
        model, tokenizer, PROMPTS, Sampling(15), mode="sparse", budget="5x2" if kind == "eviction" else "1x2"
    )
    for drafts, batch_size, budget in ((1, 5, None), (3, 1, "5x2"), (7, 3, "5x2")):
        how = Speculation(drafts, budget=budget)
        assert complete(model, tokenizer, PROMPTS, Sampling(15), mode="full", batch_size=batch_size, speculate=how) == plain
        assert 0 < how.accepted < how.tested and how.by_own_passes == (model.device.type == "cpu")


@pytest.mark.parametrize("drafts", [3, 7])
def test_ends_stop_strings_and_limits_within_a_round(tokenizer, drafts):
    model = a_model("ssa")
    plain = complete(model, tokenizer, PROMPTS, Sampling(20), mode="full")
    for most in range(1, 9):
        found = complete(model, tokenizer, PROMPTS, Sampling(most), mode="full", speculate=drafts)
        assert [c.token_ids for c in found] == [c.token_ids[:most] for c in plain]
    model.config.eos_token_id = [256, *{c.token_ids[6] for c in plain}]
    ended = complete(model, tokenizer, PROMPTS, Sampling(20), mode="full")
    assert {c.finish_reason for c in ended} == {"end"}
    assert complete(model, tokenizer, PROMPTS, Sampling(20), mode="full", speculate=drafts) == ended
    model.config.eos_token_id = 256
    text = plain[0].text
    stopping = Sampling(20, stop=(text[5:8],))
    stopped = complete(model, tokenizer, PROMPTS, stopping, mode="full")
    assert stopped[0].finish_reason == "stop" and stopped[0].text != text
    assert complete(model, tokenizer, PROMPTS, stopping, mode="full", speculate=drafts) == stopped


def greedy(model, prompts, most, speculation=None):
    """Tokens of each row; of speculation each round's, too."""
    how = {"pad_id": 58, "attention": FULL, "draw": Draw()}
    if speculation is None:
        return [[step[0] for step in decoded_tokens(model, [prompt], most, **how)] for prompt in prompts]
    rounds = list(speculated_tokens(model, prompts, most, speculation=speculation, **how))
    return [list(itertools.chain(*tokens)) for tokens in zip(*rounds, strict=True)], rounds


@needs_triton
@pytest.mark.parametrize("kind, drafts", [("ssa", 2), ("eviction", 3)])
def test_rows_of_captured_steps_keep_what_each_accepted(kind, drafts):
    model, prompts = small_model(kind, num_hidden_layers=1), [torch.randint(0, 57, (width,)).tolist() for width in (37, 25)]
    wanted = greedy(model, prompts, 10)
    model.model.impl = "triton"
    how = Speculation(drafts, budget=None if kind == "eviction" else "1x4")
    found, rounds = greedy(model, prompts, 10, how)
    assert found == wanted
    assert any(len({len(tokens) for tokens in new}) > 1 for new in rounds), "no round left the rows apart"
    assert not how.by_own_passes


class Chain:
    """Stands in for a model and its batch: what follows a token depends on it alone, by one table in full and another in sparse attention."""

    def __init__(self, stepped):
        self.tables = {mode: 1.5 * torch.randn(VOCABULARY, VOCABULARY) for mode in ("full", "sparse")}
        self.model = self.steps = self
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.cache, self.layers, self.starts_B = self, [], None
        self.by_steps, self.length = stepped, 0
        if stepped:
            self.count, self.take_back, self.part_rows = lambda length: None, lambda tokens: None, lambda: None

    def stepped(self, attention, tokens=1):
        return self.by_steps

    def decoding_calls(self, attention_mode, budget):
        return [AttentionCall(attention_mode, Selection(1, 1))]

    def get_seq_length(self):
        return self.length

    def passed(self, ids_BT, arguments, logits=1):
        self.length += ids_BT.shape[1]
        return SimpleNamespace(logits=self.tables[arguments["attention_mode"]][ids_BT][:, -logits:])

    def crop(self, tokens):
        self.length += tokens

    def run(self, model, ids_BT, cache, starts_B, calls, choose):
        return choose(self.tables[calls[0].mode][ids_BT])


VOCABULARY, LENGTH = 4, 3


def chain_draws(chain, draw, rows, batches, drafts, imposed=None):
    """int64 [rows * batches, LENGTH], all after token 0."""
    found = []
    for _ in range(batches):
        chain.length, chain.layers = 0, [SimpleNamespace(end=torch.zeros(rows))]
        rounds = Rounds(chain, torch.zeros(rows, dtype=torch.int64), LENGTH, FULL, draw, Speculation(drafts, imposed=imposed))
        tokens = [[] for _ in range(rows)]
        while max(rounds.left):
            for row, new in zip(tokens, rounds.next(), strict=True):
                row += new
        found += tokens
    return torch.tensor(found)


def excess(found, probabilities):
    """By how many standard deviations chi-square exceeds what it is expected to be; probabilities over all sequences, in order."""
    length, vocabulary = found.shape[1], round(len(probabilities) ** (1 / found.shape[1]))
    cells = (found * vocabulary ** torch.arange(length - 1, -1, -1)).sum(1)
    expected = probabilities.double() * len(found)
    counts = torch.bincount(cells, minlength=len(probabilities)).double()
    often = expected >= 5
    assert not counts[expected == 0].any()
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("draw", [Draw(1.0), Draw(0.7, top_k=3), Draw(1.3, top_p=0.8)])
@pytest.mark.parametrize("stepped, rows, batches", [(True, 4000, 1), (False, 2, 800)])
@pytest.mark.parametrize("drafts", [1, 2])
def test_samples_have_full_attentions_distribution(draw, stepped, rows, batches, drafts):
    chain = Chain(stepped)
    following = draw.probabilities(chain.tables["full"]).double()
    whole = following[0]
    for _ in range(LENGTH - 1):
        whole = (whole.view(-1, VOCABULARY)[..., None] * following).flatten()
    found = chain_draws(chain, draw, rows, batches, drafts)
    assert excess(found, whole) < 4
    if draw.temperature == 1:  # where drafts are always accepted it is another
        assert excess(chain_draws(chain, draw, rows, batches, drafts, imposed=1.0), whole) > 20


def of_five_tokens():
    """What it reads matters to what it says."""
    model = tiny_model(vocab_size=5, bos_token_id=3, eos_token_id=3, pad_token_id=4, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(30)
    return model


def test_a_models_samples_have_full_attentions_distribution():
    model = of_five_tokens()
    prompts, draw = [torch.randint(0, 5, (width,)).tolist() for width in (12, 9)], Draw(1.0)
    budget, pairs = "1x1", torch.cartesian_prod(torch.arange(5), torch.arange(5))
    wholes = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt).expand(25, -1), pairs[:, :1]], 1), attention_mode="full").logits
        p = draw.probabilities(logits[:, -2:])
        wholes.append(p[:, 0].gather(1, pairs[:, :1]).squeeze(1) * p[torch.arange(25), 1, pairs[:, 1]])

    def sampled(batches, imposed):
        found = []
        for _ in range(batches):
            how = Speculation(2, budget=budget, imposed=imposed)
            rounds = speculated_tokens(model, prompts, 2, pad_id=4, attention=FULL, draw=draw, speculation=how)
            found.append([list(itertools.chain(*row)) for row in zip(*rounds, strict=True)])
        return torch.tensor(found)

    true, wrong = sampled(400, None), sampled(300, 1.0)
    assert all(excess(true[:, row], whole) < 4 for row, whole in enumerate(wholes))
    assert any(excess(wrong[:, row], whole) > 8 for row, whole in enumerate(wholes))


def test_sampling_repeats_itself(tokenizer):
    model = a_model("ssa")
    draw = functools.partial(complete, model, tokenizer, PROMPTS, mode="full", speculate=3)
    assert draw(Sampling(9, 1.0, seed=1)) == draw(Sampling(9, 1.0, seed=1)) != draw(Sampling(9, 1.0, seed=2))
    assert draw(Sampling(9, 1.0, top_k=1)) == draw(Sampling(9))


@pytest.mark.skipif(on_gpu, reason="a clock of the model's own passes, which captured steps do not move")
@pytest.mark.parametrize("cost, kept", [(0.01, True), (3.0, False)])
def test_auto_goes_on_where_it_is_faster(tokenizer, monkeypatch, cost, kept):
    """A clock that passes take forward: a full one by 1 s, a sparse one by `cost`."""
    model, passes = a_model("ssa"), []
    plain = complete(model, tokenizer, PROMPTS, Sampling(90), mode="full", batch_size=3)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **kw: passes.append(kw["attention_mode"]) or forward(*a, **kw))
    seconds = {"full": 1.0, "sparse": cost}
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: sum(seconds[mode] for mode in passes)))
    how = Speculation(auto=True, budget="9x4")
    assert complete(model, tokenizer, PROMPTS, Sampling(90), mode="full", batch_size=3, speculate=how) == plain
    assert how.pays is kept and (passes[-9:].count("sparse") > 0) == kept
    assert f"of plain steps: {'kept' if kept else 'left off'}, by the model's own passes" in how.summary()
    assert how.rates[1] == 1


def test_summary(tmp_path, tokenizer, capsys):
    from ssa.cli import main

    a_model("ssa").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "hello", "--max-new-tokens", "9", "--mode", "full", "--device", "cpu"]
    assert main(words) == 0
    plain = capsys.readouterr()
    assert main([*words, "--speculate", "3", "--budget", "2x8"]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out and "speculation" not in plain.err
    assert "full attention, cpu float32); speculation: 3 drafts a round, " in found.err and "% accepted" in found.err
    assert main([*words, "--speculate", "auto"]) == 0
    assert "too short to time it against plain steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"mode": "sparse"}, "the mode is sparse: take --mode full"),
        ({"mode": None}, "the model's own mode is sparse: take --mode full"),
        ({"mode": None, "budget": "2x8"}, "the model's own mode is sparse: take --mode full"),
        ({"budget": "full"}, "--budget full leaves nothing out"),
        ({"budget": "2"}, "budget '2' is not"),
        ({"speculate": 8}, "--speculate 8 must be auto, 0 .off. or 1 to 7"),
        ({"speculate": "-1"}, "--speculate -1 must be"),
        ({"speculate": "some"}, "--speculate some must be"),
    ],
)
def test_errors(saved, arguments, match):
    with pytest.raises(UserError, match=match):
        generate(saved(), **({"prompts": ["hello"], "mode": "full", "speculate": 3} | arguments))


def test_rope_that_moves_is_refused(tokenizer):
    model = a_model("ssa", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UserError, match=r"RoPE \(dynamic\) turns a token by the length so far"):
        complete(model, tokenizer, ["hello"], mode="full", speculate=2)


def test_logits_that_are_no_numbers(tokenizer):
    model = a_model("ssa")
    passes, head = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden) * (math.nan if passes.append(1) or len(passes) > 4 else 1)
    with pytest.raises(UserError, match="logits are nan or infinite"):
        complete(model, tokenizer, ["hello"], Sampling(20), mode="full", speculate=3)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [1, 4, 7])
def test_graphs_give_the_tokens_of_launches_and_of_full_decoding(kind, drafts):
    model, prompts = small_model(kind), [torch.randint(0, 57, (width,)).tolist() for width in (60, 3, 31)]
    wanted = greedy(model, prompts, 100)
    found = []
    for graphs in (True, False):
        model.model.steps.graphs = graphs
        found.append(greedy(model, prompts, 100, Speculation(drafts))[0])
        found.append(greedy(model, prompts, 100, Speculation(drafts, auto=True))[0])
    assert found == [wanted] * 4
    gc.collect()
    assert not model.model.steps._of_cache, "graphs keep their cache alive"


@needs_gpu
def test_graphs_draw_from_full_attentions_distribution():
    model = of_five_tokens()
    prompt, draw = torch.randint(0, 5, (9,)).tolist(), Draw(1.0)
    gold = copy.deepcopy(model)
    gold.model.impl = "reference"
    rows = 512
    followed = [[] for _ in range(rows)]
    for new in speculated_tokens(
        model, [prompt] * rows, 24, pad_id=4, attention=FULL, draw=draw, speculation=Speculation(2, budget="1x4")
    ):
        for row, tokens in zip(followed, new, strict=True):
            row += tokens
    ids = torch.tensor(followed)
    with torch.no_grad():
        p = draw.probabilities(
            gold(torch.cat([torch.tensor([prompt] * rows), ids], 1), attention_mode="full").logits[:, 8:-1]
        ).cpu()
    # of each token the mean of its probability is the sum of squares, if it was drawn from them
    got, squares = p.gather(2, ids.cpu()[..., None]).squeeze(-1)[:, 12:].double(), (p**2).sum(-1)[:, 12:].double()
    spread = ((p**3).sum(-1)[:, 12:].double() - squares**2).sum().sqrt()
    assert abs(got.sum() - squares.sum()) < 4 * spread
