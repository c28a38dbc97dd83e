import re

import numpy as np
import pytest
import torch

from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.errors import UserError
from ssa.eval.needle import Haystack, make_case, needle_grid, score
from ssa.infer.engine import Sampling, complete
from ssa.testing import tiny_model

PROSE = "".join(f"Sentence {i} of a long story says very little. " for i in range(300))
TOKENIZERS = {"byte": byte_tokenizer, "bpe": lambda: train_bpe([PROSE, "the special magic number mentioned in the text is"], 400)}


class Oracle:
    """Reads the value in the text before the question, and says it with certainty."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers=True):
        self.tokenizer, self.answers = tokenizer, answers

    def __call__(self, input_ids, logits_to_keep, **_):
        logits = torch.zeros(*input_ids.shape, 500)
        for row, ids in enumerate(input_ids):
            values = re.findall(r"is: (\d{7})\.", self.tokenizer.decode(ids.tolist()))
            assert len(values) == 1
            value = values[0] if self.answers else str((int(values[0]) + 1 - 10**6) % (9 * 10**6) + 10**6)
            said = self.tokenizer(" " + value, add_special_tokens=False).input_ids
            logits[row, len(ids) - len(said) - 1 : -1].scatter_(1, torch.tensor(said)[:, None], 50.0)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("length", [480, 611, 1500])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_cases_are_exactly_as_long_and_deep_as_asked(tokenizer, length, depth):
    haystack = Haystack([PROSE], tokenizer, length)
    case = make_case(haystack, tokenizer, length, depth, (0, 1))
    assert len(case.token_ids) == length
    text = tokenizer.decode(case.token_ids.tolist())
    assert tokenizer.decode(case.token_ids[-case.answer_length :].tolist()) == f" {case.value}"
    assert re.fullmatch(r"\d{7}", case.value)
    assert text.count(case.value) == 2
    needle = re.search(rf" One of the special magic numbers for (\S+) is: {case.value}\.", text)
    assert text.endswith(f"The special magic number for {needle[1]} mentioned in the provided text is {case.value}")
    begin, end = text.index("afterwards.\n") + 12, text.index("\nWhat is the special")
    room = end - begin - len(needle[0])
    assert abs((needle.start() - begin) / room - depth) <= 60 / room  # sentences have under 60 characters
    if depth == 0.3 and needle.start() > begin:
        assert text[needle.start() - 1] == "."  # between sentences


def test_cells_do_not_depend_on_the_rest_of_the_grid():
    tokenizer = byte_tokenizer()
    small, large = (Haystack([PROSE[:9000], PROSE], tokenizer, longest) for longest in (600, 1200))
    a, b = (make_case(h, tokenizer, 600, 0.5, (3, 600, 500, 7)) for h in (small, large))
    assert len(large.tokens) > len(small.tokens)
    assert np.array_equal(a.token_ids, b.token_ids)
    assert not np.array_equal(a.token_ids, make_case(small, tokenizer, 600, 0.5, (3, 600, 500, 8)).token_ids)


def test_a_short_text_is_repeated():
    tokenizer = byte_tokenizer()
    case = make_case(Haystack(["Very short. Indeed."], tokenizer, 900), tokenizer, 900, 0.5, (0,))
    assert len(case.token_ids) == 900 and tokenizer.decode(case.token_ids.tolist()).count("Very short.") > 5


def test_an_oracle_finds_everything_and_a_liar_nothing(tokenizer):
    haystack = Haystack([PROSE], tokenizer, 700)
    settings = {"lengths": [500, 700], "depths": [0, 0.5, 1], "cases": 3, "seed": 1, "batch_tokens": 1500}
    seen = []
    cells = needle_grid(Oracle(tokenizer), tokenizer, haystack, progress=seen.append, **settings)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (500, 700) for d in (0, 0.5, 1)]
    assert all(c.accuracy == 1 and c.log_probability == pytest.approx(0, abs=1e-6) and c.cases == 3 for c in cells)
    assert sum(seen) == 18
    assert all(c.accuracy == 0 for c in needle_grid(Oracle(tokenizer, answers=False), tokenizer, haystack, **settings))


@pytest.mark.parametrize("mode, budget", [("full", None), ("sparse", "3x8")])
def test_a_random_model_finds_nothing_and_its_log_probability_is_the_models(mode, budget):
    tokenizer, model = byte_tokenizer(), tiny_model()
    haystack = Haystack([PROSE], tokenizer, 500)
    cases = [make_case(haystack, tokenizer, 500, 0.5, (i,)) for i in range(3)]
    found, log_p = score(model, cases, mode, budget)
    assert not found.any()
    for case, value in zip(cases, log_p, strict=True):
        with torch.no_grad():
            nll = model.token_nll(torch.from_numpy(case.token_ids)[None], attention_mode=mode, budget=budget)[0]
        assert value == pytest.approx(-nll[-case.answer_length :].sum().item(), abs=1e-4)


@pytest.mark.parametrize("mode, budget", [("full", None), ("sparse", "2x4"), ("sparse", "4x16")])
def test_teacher_forcing_equals_greedy_generation(mode, budget):
    """Answers that the model itself wrote are found; the same with one token changed are not."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    haystack = Haystack([PROSE], tokenizer, 480)
    for seed in range(3):
        case = make_case(haystack, tokenizer, 480, 0.5, (seed,))
        prompt = tokenizer.decode(case.token_ids[: -case.answer_length].tolist())
        written = complete(model, tokenizer, [prompt], Sampling(case.answer_length), mode=mode, budget=budget)[0].token_ids
        assert len(written) == case.answer_length
        own = case.token_ids.copy()
        own[-case.answer_length :] = written
        other = own.copy()
        other[-1] = (other[-1] + 1) % 256
        cases = [type(case)(ids, case.answer_length, case.value) for ids in (own, other, case.token_ids)]
        assert score(model, cases, mode, budget)[0].tolist() == [True, False, False]


def test_rows_with_answers_of_different_lengths():
    tokenizer = TOKENIZERS["bpe"]()
    haystack = Haystack([PROSE], tokenizer, 400)
    cases = [make_case(haystack, tokenizer, 400, 0.5, (i,)) for i in range(6)]
    cases.append(type(cases[0])(cases[0].token_ids, cases[0].answer_length - 2, cases[0].value))
    model = tiny_model(vocab_size=400)
    together = score(model, cases)[1]
    alone = np.concatenate([score(model, [c])[1] for c in cases])
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[-1] > together[0]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"lengths": [300]}, "length 300 is too short: .* use at least"),
        ({"lengths": []}, "grid is empty"),
        ({"depths": [1.5]}, "depth 1.5"),
        ({"depths": [float("nan")]}, "depth nan"),
        ({"cases": 0}, "cases = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_grids(change, match):
    tokenizer = byte_tokenizer()
    settings = {"lengths": [500], "depths": [0.5], "cases": 1, "seed": 0} | change
    with pytest.raises(UserError, match=match):
        needle_grid(Oracle(tokenizer), tokenizer, Haystack([PROSE], tokenizer, 500), **settings)


def test_an_empty_haystack():
    with pytest.raises(UserError, match="haystack is empty"):
        Haystack([""], byte_tokenizer(), 100)
