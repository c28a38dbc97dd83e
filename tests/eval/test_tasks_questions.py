import json
import math
import random

import pytest

from ssa.errors import UserError
from ssa.eval.questions import CHOICE_TASKS, Question, is_right, read_questions
from ssa.eval.wikitext import detokenized, read_pages, split_pages

LINES = {
    "piqa": {"goal": "Open a jar.", "choices": ["Twist the lid.", "Paint it."], "label": 0},
    "hellaswag": {"query": "Cooking: A man cuts.", "choices": ["He eats.", "He flies.", "It sinks.", "We go."], "label": 2},
    "arc_easy": {"question": "What is wet?", "choices": ["sand", "water", "salt"], "label": 1},
    "openbookqa": {"query": "Predators eat", "choices": ["bunnies", "grass"], "gold": 0},
    "winogrande": {"context_options": ["Ann met Eve so Ann", "Ann met Eve so Eve"], "continuation": "smiled.", "gold": 1},
    "copa": {"query": "The glass fell, therefore", "choices": ["it broke.", "it sang."], "gold": 0},
}


def written(directory, name, records):
    path = directory / CHOICE_TASKS[name].files[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_questions(CHOICE_TASKS[name], directory)


@pytest.mark.parametrize(
    "name, context, endings",
    [
        ("piqa", "Question: Open a jar.\nAnswer:", [" Twist the lid.", " Paint it."]),
        ("hellaswag", "Cooking: A man cuts.", [" He eats.", " He flies.", " It sinks.", " We go."]),
        ("arc_easy", "Question: What is wet?\nAnswer:", [" sand", " water", " salt"]),
        ("openbookqa", "Predators eat", [" bunnies", " grass"]),
        ("copa", "The glass fell therefore", ["  it broke.", "  it sang."]),
    ],
)
def test_prompts(tmp_path, name, context, endings):
    (question,) = written(tmp_path, name, [LINES[name]]).questions
    assert question.pairs("") == [(context, ending) for ending in endings]
    assert question.pairs("Before.\n\n")[0] == ("Before.\n\n" + context, endings[0])
    assert question.example == context + endings[question.gold] + "\n\n"


def test_winogrande_has_its_choices_in_the_context(tmp_path):
    (question,) = written(tmp_path, "winogrande", [LINES["winogrande"]]).questions
    assert question.pairs("") == [("Ann met Eve so Ann", " smiled."), ("Ann met Eve so Eve", " smiled.")]
    assert question.example == "Ann met Eve so Eve smiled.\n\n" and question.num_choices == 2


def test_metrics_by_hand():
    question = Question(("q",), ("ab", "abcd", "éè"), 1)  # characters 2, 4, 2; bytes 2, 4, 4
    assert is_right(question, [-3.0, -2.0, -9.0], "acc")
    assert is_right(question, [-3.0, -4.0, -2.1], "acc_norm")  # -1.5, -1.0, -1.05
    assert is_right(question, [-3.0, -4.0, -2.0], "acc_norm")  # -1.0 twice: the first counts, which is gold
    assert not is_right(question, [-3.0, -4.0, -1.9], "acc_norm")  # -1.5, -1.0, -0.95
    assert not is_right(question, [-1.9, -4.0, -3.9], "acc_norm")  # -0.95, -1.0, -1.95; by bytes -0.975 for the last
    assert is_right(Question(("q",), ("a", "b"), 0), [-1.0, -1.0], "acc") and not is_right(question, [-1, -1, -1], "acc")


def test_examples_leave_the_question_out_and_depend_on_the_seed(tmp_path):
    records = [{"query": f"Q{i}", "choices": [f"A{i}", "B"], "gold": 0} for i in range(9)]
    questions = written(tmp_path, "openbookqa", records)
    assert questions.is_own_pool
    texts = questions.examples(3, 12, 9)
    for i, text in enumerate(texts):
        assert text.count("\n\n") == 3 and f"Q{i} " not in text
    assert texts == questions.examples(3, 12, 9) != questions.examples(3, 13, 9)
    assert texts[:4] == questions.examples(3, 12, 4)  # a limit asks the first questions in the same way
    assert questions.examples(0, 12, 2) == ["", ""]
    with pytest.raises(UserError, match="9 examples a question are more than the 9"):
        questions.examples(9, 0, 1)


@pytest.mark.parametrize("name, draws", [("arc_easy", 2), ("piqa", 3)])
def test_examples_come_from_a_training_file_where_there_is_one(tmp_path, name, draws):
    """And the generator goes on as lm-eval's does, which draws one more where the task has no test split."""
    train = [{**LINES[name], "question": f"T{i}", "goal": f"T{i}"} for i in range(20)]
    (tmp_path / CHOICE_TASKS[name].train_files[0]).write_text("".join(json.dumps(record) + "\n" for record in train))
    questions = written(tmp_path, name, [LINES[name]] * 3)
    generator = random.Random(1)
    expected = [f"T{generator.sample(range(20), draws)[0]}" for _ in range(3)]
    texts = questions.examples(2, 1, 3)
    assert not questions.is_own_pool and [text.split("Question: ")[1].split("\n")[0] for text in texts] == expected


def test_a_question_that_is_there_twice_is_no_example_of_itself(tmp_path):
    records = [{"query": f"Q{i // 2}", "choices": ["A", "B"], "gold": 0} for i in range(8)]
    questions = written(tmp_path, "openbookqa", records)
    for seed in range(20):
        for i, text in enumerate(questions.examples(3, seed, 8)):
            assert f"Q{i // 2} " not in text and text.count("\n\n") == 3


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"goal": "g", "choices": ["a", "b"]}', '{"goal": "g", "choices": ["a", "b"], "label": 2}',
     '{"goal": "g", "choices": ["a", 3], "label": 0}', '{"goal": "g", "choices": ["a", ""], "label": 0}',
     '{"goal": "g", "choices": "AB", "label": 0}', '{"goal": ["g"], "choices": ["a", "b"], "label": 0}',
     '{"goal": "g", "choices": ["a", "b"], "label": "0"}', '{"goal": "g", "choices": ["a", "b"], "label": -1}', '{"goal": "caf\udce9"}',
     '{"goal": "g", "choices": ["a"], "label": 0}', '{"goal": "g", "choices": ["a", "b"], "label": true}'],
)  # fmt: skip
def test_lines_that_are_no_questions(tmp_path, line):
    content = json.dumps(LINES["piqa"]) + "\n" + line + "\n"
    (tmp_path / "piqa_val.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"piqa_val\.jsonl:2 is no question of piqa"):
        read_questions(CHOICE_TASKS["piqa"], tmp_path)


@pytest.mark.parametrize("name", LINES)
def test_a_text_where_a_list_belongs_is_no_question(tmp_path, name):
    """It would be a list of letters."""
    written(tmp_path, name, [LINES[name]])
    for field, value in LINES[name].items():
        wrong = "".join(value) if isinstance(value, list) else [value]
        with pytest.raises(UserError, match=rf":2 is no question of {name}: {field} = .* is not"):
            written(tmp_path, name, [LINES[name], {**LINES[name], field: wrong}])


def test_task_files_are_read_as_prepare_reads(tmp_path):
    line = json.dumps({**LINES["piqa"], "goal": "one\u2028two\x85"}, ensure_ascii=False).encode()
    (tmp_path / "piqa_val.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    first, second = read_questions(CHOICE_TASKS["piqa"], tmp_path).questions
    assert first == second and first.contexts == ("Question: one\u2028two\x85\nAnswer:",)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"has no piqa_val\.jsonl"):
        read_questions(CHOICE_TASKS["piqa"], tmp_path)
    with pytest.raises(UserError, match=r"has no wiki\.test\.raw"):
        read_pages(tmp_path)


RAW = ' \n = Bob = \n \n He @-@ she said " hi " ( there ) . \n = = Life = = \n 1 @,@ 000 \'s \n = Eve = \n It ; that \n'


def test_pages_of_the_raw_file(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(RAW)
    found = read_pages(tmp_path)
    assert [page.text for page in found.pages] == [
        ' = Bob =\n\nHe-she said "hi" (there).\n== Life ==\n1,000\'s ',
        " = Eve =\nIt; that\n",
    ]
    assert [page.num_bytes for page in found.pages] == [len(page.encode()) for page in split_pages(RAW)]
    # words by white space, one more at each end where the page begins or ends with it
    assert [page.num_words for page in found.pages] == [len(page.split()) + 2 for page in split_pages(RAW)]
    assert found.notes == []
    (tmp_path / "wiki.test.raw").write_bytes(b"\xef\xbb\xbf" + RAW.replace("\n", "\r\n").encode())
    assert read_pages(tmp_path).pages == found.pages
    (tmp_path / "wiki.test.raw").write_bytes(b"one\ncaf\xe9")
    with pytest.raises(UserError, match=r"wiki\.test\.raw:2 is not UTF-8 at byte 7"):
        read_pages(tmp_path)
    (tmp_path / "wiki.test.raw").write_bytes(b" \n")
    with pytest.raises(UserError, match=r"wiki\.test\.raw holds no text"):
        read_pages(tmp_path)


def test_detokenised_pages_say_that_bytes_are_counted_elsewhere(tmp_path):
    (tmp_path / "test_pages_detok.jsonl").write_text('{"text": "= Bob =\\nHe.", "words": 9}\n')
    found = read_pages(tmp_path)
    assert found.pages == [("= Bob =\nHe.", 9, 11)] and "bytes are counted" in found.notes[0]
    for wrong in ('{"text": "a"}', '{"text": ["a"], "words": 1}', '{"text": "a", "words": "1"}', '{"text": "a", "words": -1}'):
        (tmp_path / "test_pages_detok.jsonl").write_text(wrong + "\n")
        with pytest.raises(UserError, match=r"jsonl:1 is no page"):
            read_pages(tmp_path)


def test_detokenising_by_hand():
    assert detokenized("the dogs ' bone N of 5 ° C") == "the dogs' bone 1 of 5°C"
    assert math.prod(len(detokenized(f"a {mark} b")) for mark in ":;.!?,") == 4**6
