import re
from collections import Counter
from functools import cache
from unittest import mock

import numpy as np
import pytest
from solvers import NEEDLE, Writer, candidates, final_question, guesser, liar, oracle, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ssa.budget import FULL
from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.errors import UserError
from ssa.eval import long
from ssa.eval.long.fill import largest
from ssa.eval.long.item_log import ItemLog
from ssa.eval.long.measure import gather, generate_items
from ssa.eval.long.ruler import TASKS, RulerTask, string_match_all
from ssa.eval.long.ruler_needles import NOISE
from ssa.eval.long.words import words
from ssa.eval.needle import Haystack
from ssa.ranks import Shard

PROSE = "".join(f"Sentence {i} of a long story says very little. " for i in range(900))


def spaced_tokenizer():
    """As Llama 2's: a piece for each word with its space, one put before every text, and a bos token."""
    alphabet = [chr(c) for c in range(32, 127)] + ["\n", "▁"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "byte": byte_tokenizer(),
    "bpe": train_bpe([PROSE, NOISE, " ".join(words()[::9]), " ".join(map(str, range(3000)))], 3000),
    "spaced": spaced_tokenizer(),
}


@cache
def haystack(tokenizer, length):
    return Haystack([PROSE], TOKENIZERS[tokenizer], length)


def make(name, length, tokenizer="bpe", cases=3, seed=0):
    return RulerTask(name, length, cases, seed, TOKENIZERS[tokenizer], haystack(tokenizer, length))


def text_of(task, item, tokenizer="bpe"):
    return TOKENIZERS[tokenizer].decode(item.prompt.tolist())


def test_every_task_is_known_to_the_command():
    assert tuple(TASKS) == long.RULER


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [7993, 8192])
def test_prompt_and_room_for_the_answer_are_exactly_as_long_as_asked(name, tokenizer, length):
    task = make(name, length, tokenizer)
    for index in range(3):
        item = task.item(index)
        assert len(item.prompt) + item.max_new_tokens == length
        assert item.max_new_tokens == task.max_new_tokens >= TASKS[name].tokens_to_generate
    if tokenizer == "bpe" and name != "vt":  # random capitals are a token each to this one
        assert task.max_new_tokens == TASKS[name].tokens_to_generate
    if tokenizer == "spaced":
        assert item.prompt[0] == 0 and 0 not in item.prompt[1:]


def scores_of(name, answer, tmp_path, cases, length=3000, tokenizer="bpe"):
    task, log = make(name, length, tokenizer, cases), ItemLog(tmp_path / name)
    model = Writer(TOKENIZERS[tokenizer], answer)
    with mock.patch("ssa.infer.batch.decoded_tokens", model.tokens):
        generate_items(task, model, TOKENIZERS[tokenizer], FULL, log, Shard(), tokens=4 * length)
    assert sum(rows for rows, _ in model.batches) == cases and max(rows for rows, _ in model.batches) == 4
    return [record["score"] for record in gather(log, cases)]


@pytest.mark.parametrize("tokenizer, length", [("bpe", 3000), ("bpe", 4096), ("byte", 9000)])
@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_scores_one_and_a_liar_nothing(name, tokenizer, length, tmp_path):
    assert scores_of(name, oracle, tmp_path / "oracle", 5, length, tokenizer) == [1.0] * 5
    assert scores_of(name, liar, tmp_path / "liar", 4, length, tokenizer) == [0.0] * 4


@pytest.mark.parametrize("name", TASKS)
def test_one_who_guesses_among_the_candidates_scores_chance(name, tmp_path):
    cases = 40
    scores = scores_of(name, guesser(1), tmp_path, cases, 2000)
    chances = []
    task = make(name, 2000, cases=cases)
    for index in range(cases):
        prompt = text_of(task, task.item(index))
        chances.append(len(read(prompt)) / len(candidates(prompt)))
    chance = float(np.mean(chances))
    # short words occur in longer ones, which a match by substring counts
    assert abs(np.mean(scores) - chance) < 3 * (chance * (1 - chance) / cases) ** 0.5 + 0.02
    if name == "niah_multikey_1":
        assert chance == 0.25
    if name.startswith("niah_single") or name in ("niah_multivalue", "niah_multiquery"):
        assert chance == 1 and scores == [1.0] * cases  # all that is hidden is asked for
    elif name != "niah_multikey_1":
        assert chance <= 0.5
    if name == "vt":
        assert chance == 0.5  # the worked example has a chain of its own


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_one_who_has_not_read_the_text_finds_no_needle(name, tmp_path):
    """Random values of the right form; where all that is hidden is asked for, guessing among it says nothing."""
    rng = np.random.default_rng(2)

    def invent(prompt):
        return ", ".join(re.sub(r"[0-9a-f]", lambda _: "0123456789"[rng.integers(10)], answer) for answer in read(prompt))

    assert scores_of(name, invent, tmp_path, 8, 2000) == [0.0] * 8


def test_a_case_depends_on_nothing_but_its_number():
    for name in TASKS:
        long_run, alone = make(name, 4500, cases=9), make(name, 4500, cases=5)
        all_of_it = [long_run.item(index) for index in range(4)]
        assert np.array_equal(all_of_it[3].prompt, alone.item(3).prompt)
        assert not np.array_equal(all_of_it[3].prompt, all_of_it[2].prompt)
        assert not np.array_equal(all_of_it[3].prompt, make(name, 4500, seed=1).item(3).prompt)


@pytest.mark.parametrize(
    "name, needles, keys, asked, value",
    [
        ("niah_single_1", 1, 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 1, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, 4, r"\d{7}"),
    ],
)
def test_needles(name, needles, keys, asked, value):
    task = make(name, 5000)
    for index in range(3):
        item = task.item(index)
        text, question = final_question(text_of(task, item))
        found = re.findall(NEEDLE, text)
        assert len(found) == needles == len(item.about["depths"]) and len({key for key, _ in found}) == keys
        assert len(item.answers) == asked and all(re.fullmatch(value, answer) for answer in item.answers)
        kind = "uuid" if "uuid" in text else "number"
        if asked == 1:
            assert text.startswith(f"A special magic {kind} is hidden within the following text. Make sure to memorize it.")
            assert question.startswith(f"\nWhat is the special magic {kind} for ")
            assert question.endswith(" mentioned in the provided text is")
        else:
            assert text.startswith("Some special magic numbers are hidden within the following text.")
            assert question.startswith("\nWhat are all the special magic numbers for ") and question.endswith("text are")
        assert question.count(" mentioned in the provided text") == 2
    if name == "niah_multiquery":
        assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned", question)


@pytest.mark.parametrize("name, form", [("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_a_haystack_of_needles(name, form):
    task = make(name, 5000)
    item = task.item(1)
    text, question = final_question(text_of(task, item))
    found = re.findall(NEEDLE, text)
    assert len(found) > 20 and all(re.fullmatch(form, key) for key, _ in found)
    asked = re.search(r"for (\S+) mentioned", question)[1]
    assert [value for key, value in found if key == asked] == item.answers


def test_no_other_needle_has_the_key_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("ssa.eval.long.words.words", lambda: ("ebb", "flow"))
    task = make("niah_multikey_2", 1500)
    for index in range(3):
        item = task.item(index)
        text, question = final_question(text_of(task, item))
        asked = re.search(r"for (\S+) mentioned", question)[1]
        assert len(re.findall(rf"for {asked} is", text)) == 1


def test_needles_lie_everywhere():
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        task = make(name, 3000, cases=60)
        depths = [task.item(index).about["depths"][0] for index in range(60)]
        assert min(depths) < 0.1 and max(depths) > 0.9 and 0.35 < np.mean(depths) < 0.65


def test_prose_needles_stand_between_sentences():
    task = make("niah_single_2", 3000, cases=8)
    for index in range(8):
        item = task.item(index)
        text = text_of(task, item)
        at = text.index(" One of the special")
        assert text[at - 1] in ".\n" or item.about["depths"] == [1.0]


def test_variable_tracking():
    task = make("vt", 5000)
    item = task.item(0)
    prompt = text_of(task, item)
    example, asked = prompt.split("\n\nMemorize and track")
    assert example.startswith("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n")
    assert re.search(r"they are:  ([A-Z]{3} ){4}[A-Z]{3}$", example)
    assert prompt.endswith(
        f"Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
        f"{item.about['value']}, they are: "
    )
    links = re.findall(r"VAR [A-Z]{5} = (?:\d{5}|VAR [A-Z]{5} )\n", asked)
    assert len(links) == 5 == len(set(item.answers)) and all(len(name) == 5 for name in item.answers)
    assert len(TOKENIZERS["bpe"](example + "\n\n").input_ids) <= 500


@pytest.mark.parametrize("length, common, uncommon, example", [(4096, 30, 3, (10, 3)), (4095, 6, 1, (3, 1))])
def test_common_words(length, common, uncommon, example):
    task = make("cwe", length)
    item = task.item(0)
    prompt = text_of(task, item)
    worked, asked = prompt.split("Below is a numbered list of words.")[1:]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", asked.split("\nQuestion")[0]))
    assert {counts[word] for word in item.answers} == {common} and len(set(item.answers)) == 10
    others = Counter(count for word, count in counts.items() if word not in item.answers)
    assert others.most_common(1)[0][0] == uncommon and max(others) <= uncommon + 1
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", asked.split("\nQuestion")[0])]
    assert numbers == list(range(1, len(numbers) + 1))
    shown, answer = worked.split("Answer: The top 10 words that appear most often in the list are: ")
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", shown))
    assert sorted(set(counts.values())) == sorted(example)
    assert re.findall(r"\d+\. ([a-z]+)", answer) == [
        word for word in re.findall(r"\d+\. ([a-z]+)", answer) if counts[word] == example[0]
    ]


def test_frequent_words_follow_the_zeta_law():
    task = make("fwe", 8192)
    item = task.item(0)
    text, _ = final_question(text_of(task, item))
    counts = Counter(text.split())
    ranked = [count for _, count in counts.most_common()]
    assert counts.most_common(1)[0][0] == "..." and [word for word, _ in counts.most_common(4)][1:] == item.answers
    total = counts.total()
    for rank, count in enumerate(ranked[:6], start=1):
        assert count == pytest.approx(total * rank**-2 / 1.645, rel=0.1, abs=2)


def test_scores_by_hand():
    assert string_match_all("It is 12 and ABC.", ["12", "abc", "zz", "7"]) == 0.5
    assert string_match_all("\x00 no\ttab \n", ["no\ntab"]) == 1.0
    assert string_match_all("", ["a"]) == 0.0 and string_match_all("abc", ["ABC"]) == 1.0


@pytest.mark.parametrize("guess", [1, 7, 50, 4000])
def test_the_largest_that_fits_whatever_is_guessed(guess):
    def tokens(n):
        return 3 + 2 * n + n % 2

    for room in (5, 6, 7, 8, 100, 3000):
        expected = max((n for n in range(1, 2000) if tokens(n) <= room), default=None)
        assert largest(tokens, room, 1, guess) == expected
    assert largest(lambda n: 10 + n, 10, 1, guess) is None


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_refused(name):
    with pytest.raises(UserError, match=r"length \d+ is too short"):
        make(name, 135).item(0)
    with pytest.raises(UserError, match=r"length \d+ is too short"):
        make(name, 20).item(0)


def test_the_length_that_is_named_is_about_what_it_takes():
    for name in ("vt", "cwe", "niah_single_2"):
        with pytest.raises(UserError) as error:
            make(name, 200).item(0)
        needed = int(re.search(r"about (\d+)", str(error.value))[1])
        make(name, round(1.1 * needed)).item(0)
        with pytest.raises(UserError):
            make(name, round(0.9 * needed)).item(0)


def test_wrong_settings():
    tokenizer = TOKENIZERS["byte"]
    with pytest.raises(UserError, match="no RULER task 'niah'"):
        make("niah", 1000)
    with pytest.raises(UserError, match="cases = 0"):
        make("vt", 1000, cases=0)
    with pytest.raises(UserError, match="give a text"):
        RulerTask("niah_single_2", 1000, 1, 0, tokenizer, None)
    RulerTask("niah_single_1", 1000, 1, 0, tokenizer, None).item(0)


def test_more_words_than_there_are(monkeypatch):
    monkeypatch.setattr("ssa.eval.long.ruler_lists.words", lambda: words()[:60])
    with pytest.raises(UserError, match="too long for cwe"):
        make("cwe", 9000).item(0)
