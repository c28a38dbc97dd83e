import json

import pytest

from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval.long.longeval import LongEvalTask, find_files

LINES = {
    "random_idx": ["torpid-kid", 7],
    "expected_number": 2416,
    "prompt": "... Tell me what is the number in line torpid-kid? ",
}
TOPICS = {"prompt": "... What is the first topic?", "topics": "['The psychology of creativity', 'Another']"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "longeval").mkdir()
    for name, case in {"200_lines": LINES, "30_lines": LINES, "5_topics": TOPICS}.items():
        (tmp_path / "longeval" / f"{name}.jsonl").write_text((json.dumps(case) + "\n") * 3)
    return tmp_path


def test_files_by_size(folder):
    for place in (folder, folder / "longeval"):
        assert [path.name for path in find_files(place, "lines")] == ["30_lines.jsonl", "200_lines.jsonl"]
    assert [path.name for path in find_files(folder, "topics")] == ["5_topics.jsonl"]


def test_lines(folder):
    tokenizer = byte_tokenizer()
    task = LongEvalTask(folder / "longeval" / "200_lines.jsonl", tokenizer)
    item = task.item(2)
    assert len(task) == 3 and len(LongEvalTask(folder / "longeval" / "200_lines.jsonl", tokenizer, 2)) == 2
    assert tokenizer.decode(item.prompt.tolist()) == (
        "... Tell me what is the number in line torpid-kid?\n ASSISTANT: The <REGISTER_CONTENT> in line torpid-kid is <"
    )
    assert item.answers == ["2416"] and item.stop == ("\n",)
    assert [task.score(item, text) for text in ("2416>.", " 02416", "24160>", "it is 2416 or 7", "7, 2416", "none")] == [
        1,
        1,
        0,
        1,
        0,
        0,
    ]


def test_topics(folder):
    task = LongEvalTask(folder / "longeval" / "5_topics.jsonl", byte_tokenizer())
    item = task.item(0)
    assert item.answers == ["The psychology of creativity"]
    assert [task.score(item, text) for text in (" psychology of Creativity.", "the psychology", "Another")] == [1, 0, 0]
    assert item.max_new_tokens >= len("the psychology of creativity")


def test_errors(folder):
    tokenizer, place = byte_tokenizer(), folder / "longeval"
    with pytest.raises(UserError, match="--data-dir"):
        find_files(None, "lines")
    with pytest.raises(UserError, match=r"no N_topics\.jsonl"):
        find_files(place / "none", "topics")
    (place / "9_lines.jsonl").write_text(json.dumps(TOPICS))
    with pytest.raises(UserError, match="line 1, is no LongEval case of lines"):
        LongEvalTask(place / "9_lines.jsonl", tokenizer)
    (place / "8_topics.jsonl").write_text(json.dumps({**TOPICS, "topics": "[__import__('os')]"}))
    with pytest.raises(UserError, match="line 1, is no LongEval case of topics"):
        LongEvalTask(place / "8_topics.jsonl", tokenizer)
    for name, wrong in (
        ("lines", {"random_idx": "torpid-kid"}), ("lines", {"random_idx": []}), ("lines", {"expected_number": "many"}),
        ("lines", {"prompt": ["p"]}), ("topics", {"topics": "'one topic'"}), ("topics", {"topics": "[1]"}), ("topics", {"topics": [["a"]]}),
        ("topics", {"topics": "[" * 5000}), ("topics", {"topics": []}), ("topics", {"topics": ["a", "b"], "prompt": 1}),
    ):  # fmt: skip
        case = {**(LINES if name == "lines" else TOPICS), **wrong}
        (place / f"6_{name}.jsonl").write_text(json.dumps(case))
        with pytest.raises(UserError, match=f"line 1, is no LongEval case of {name}: "):
            LongEvalTask(place / f"6_{name}.jsonl", tokenizer)
    (place / "7_lines.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        LongEvalTask(place / "7_lines.jsonl", tokenizer)
    with pytest.raises(UserError, match="its name should be"):
        LongEvalTask(place / "lines.jsonl", tokenizer)
