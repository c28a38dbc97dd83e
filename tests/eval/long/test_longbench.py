import dataclasses
import hashlib
import json
import zipfile

import numpy as np
import pytest

from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.errors import UserError
from ssa.eval import long
from ssa.eval.long import longbench
from ssa.eval.long.items import Item
from ssa.eval.long.longbench import TASKS, LongBenchTask, cut_middle, read_records


def record(**changes):
    return {"_id": "x1", "context": "Some {context}.", "input": "Who?", "answers": ["Anna"], "all_classes": None} | changes


def test_the_sixteen_tasks_and_their_answer_lengths():
    assert tuple(TASKS) == long.LONGBENCH and len(TASKS) == 16
    lengths = {"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "trec": 64, "samsum": 128, "lcc": 64, "repobench-p": 64}
    lengths |= dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512)
    assert {name: kind.max_new_tokens for name, kind in TASKS.items()} == {**dict.fromkeys(TASKS, 32), **lengths}
    assert [name for name, kind in TASKS.items() if kind.first_line] == ["trec", "triviaqa", "samsum"]


def test_prompts_are_the_releases_to_the_letter():
    """Against dataset2prompt.json and dataset2maxlen.json of THUDM/LongBench at 2e00731."""
    rows = json.dumps([[name, kind.prompt, kind.max_new_tokens] for name, kind in TASKS.items()])
    assert hashlib.sha256(rows.encode()).hexdigest() == "2dfbfdff52dcf9de5b552342e63d8e665f0b1f885918cb9ccaa173698c71e0d9"
    assert TASKS["narrativeqa"].prompt.count("asconcisely") == 2


def test_answers_to_another_prompt_are_not_taken_for_these(monkeypatch):
    before = LongBenchTask("trec", [record(all_classes=["A"])], 4000, byte_tokenizer()).setting
    assert before == LongBenchTask("trec", [record(all_classes=["A"])], 4000, byte_tokenizer()).setting
    monkeypatch.setitem(TASKS, "trec", dataclasses.replace(TASKS["trec"], prompt=TASKS["trec"].prompt + " "))
    assert before != LongBenchTask("trec", [record(all_classes=["A"])], 4000, byte_tokenizer()).setting


@pytest.mark.parametrize("name", TASKS)
def test_prompts_hold_context_and_question_and_nothing_unfilled(name):
    tokenizer = byte_tokenizer()
    task = LongBenchTask(name, [record(context="CON{input}TEXT {0}", input="IN{context}PUT")], 4000, tokenizer)
    item = task.item(0)
    prompt = tokenizer.decode(item.prompt.tolist())
    assert prompt.count("CON{input}TEXT {0}") == 1
    has_question = name not in ("gov_report", "multi_news", "passage_count", "lcc")
    assert prompt.count("IN{context}PUT") == has_question
    assert prompt == TASKS[name].prompt.replace("{context}", "\0").replace("{input}", "IN{context}PUT").replace(
        "\0", "CON{input}TEXT {0}"
    )
    assert item.max_new_tokens == TASKS[name].max_new_tokens and item.answers == ["Anna"] and not item.about["truncated"]


def test_the_middle_is_cut_out():
    tokenizer = byte_tokenizer()
    text = "".join(f"{i} " for i in range(1000))
    ids, truncated = cut_middle(tokenizer, text, 101)
    assert truncated and tokenizer.decode(ids.tolist()) == text[:50] + text[-50:]
    assert cut_middle(tokenizer, "short", 5)[1] is False
    task = LongBenchTask("hotpotqa", [record(context=text)], 400, tokenizer)
    assert len(task.item(0).prompt) == 368 and task.item(0).about["truncated"]


def test_a_character_cut_in_two_does_not_overflow():
    tokenizer = byte_tokenizer()
    for room in range(20, 32):
        ids, _ = cut_middle(tokenizer, "日本語" * 40, room)
        assert room - 8 < len(ids) <= room  # half a character comes back as the three bytes of a replacement
    bpe = train_bpe(["the words of a text " * 20], 300)
    for room in range(4, 30):
        assert len(cut_middle(bpe, "the words of a text " * 30, room)[0]) <= room


def score(name, prediction, answers, **changes):
    task = LongBenchTask(name, [record(answers=answers, **changes)], 4000, byte_tokenizer())
    return task.score(Item(np.zeros(1, np.int64), 1, answers), prediction)


F1 = 2 * (1 / 4) * 1 / (1 / 4 + 1)  # one word of four is the answer: precision 1/4, recall 1
ROUGE = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3 + 1e-8)  # "the cat" of "the cat ran home" and "the cat sat"


@pytest.mark.parametrize(
    "name, prediction, answers, expected",
    [
        ("narrativeqa", "He lived in Paris.", ["London", "Paris"], F1),
        ("qasper", "Perhaps, yet we are unanswerable\nyes", ["unanswerable"], 2 * (1 / 6) / (1 / 6 + 1)),  # all lines count
        ("multifieldqa_en", "He lived in Paris.", ["paris"], F1),
        ("hotpotqa", "He lived in Paris.", ["paris"], F1),
        ("2wikimqa", "He lived in Paris.", ["paris"], F1),
        ("musique", "He lived in Paris.", ["the Paris"], F1),
        ("gov_report", "the cat ran home", ["the cat sat"], ROUGE),
        ("qmsum", "the cat ran home", ["the cat sat"], ROUGE),
        ("multi_news", "the cat\nran home", ["the cat sat"], ROUGE),
        ("trec", "\nCity Country\nFood", ["City"], 1 / 2),
        ("triviaqa", "He lived in Paris.\nPassage:", ["Rome", "Paris"], F1),
        ("samsum", "the cat ran home\nDialogue: it went on", ["the cat sat"], ROUGE),
        ("passage_count", "12 of 17, so 12", ["12"], 2 / 3),
        ("passage_retrieval_en", "Paragraph 3 or Paragraph 4", ["Paragraph 4"], 1 / 2),
        ("lcc", "# comment\nabcd\nef", ["bcde"], 0.75),
        ("repobench-p", "\nabcd", ["bcde"], 0.75),
    ],
)
def test_every_task_has_its_own_metric(name, prediction, answers, expected):
    records = [record(answers=answers) | {"all_classes": ["City", "Country", "Food"]}]
    task = LongBenchTask(name, records, 4096, byte_tokenizer())
    item = Item(np.zeros(1, np.int64), 9, answers)
    assert task.score(item, prediction) == pytest.approx(expected)
    assert task.score(item, answers[-1]) == pytest.approx(1)  # the oracle
    assert task.score(item, "") == 0


def test_the_best_answer_counts_and_few_shot_tasks_score_one_line():
    assert score("hotpotqa", "Anna Karenina", ["Boris", "Anna Karenina"]) == 1.0
    assert score("triviaqa", "\n\nAnna\nQuestion: more", ["Anna"]) == 1.0
    assert score("hotpotqa", "\n\nAnna\nQuestion: more", ["Anna"]) == 0.5
    assert score("trec", "City\nCountry", ["City"], all_classes=["City", "Country"]) == 1.0
    assert score("samsum", "Anna left\nDialogue", ["Anna left"]) == pytest.approx(1.0)
    assert score("passage_retrieval_en", "3", ["Paragraph 3"]) == 1.0
    assert score("passage_count", "3 4", ["3"]) == 0.5


def test_records_from_files(tmp_path):
    (tmp_path / "longbench").mkdir()
    path = tmp_path / "longbench" / "qasper.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record(answers=["a", "b"], length=7)) + "\n")
    first, second = read_records("qasper", tmp_path)
    assert first["answers"] == ["Anna"] and second["answers"] == ["a", "b"]
    assert read_records("qasper", tmp_path / "longbench") == [first, second]
    tasks = [LongBenchTask("qasper", [first, second], 4000, byte_tokenizer(), limit) for limit in (None, 1, 9)]
    assert [len(task) for task in tasks] == [2, 1, 2]
    assert tasks[0].setting == tasks[1].setting  # a limit that is raised later finds the items done


@pytest.mark.parametrize("line", ["{", "[]", '{"context": "a"}', json.dumps(record(answers=[])), json.dumps(record(answers=[1])),
                                  json.dumps(record(answers="Anna")), json.dumps(record(context=["a"])), '{"context": "caf\udce9"}'])  # fmt: skip
def test_damaged_records(tmp_path, line):
    (tmp_path / "qasper.jsonl").write_bytes((json.dumps(record()) + "\n" + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="line 2, is no LongBench record"):
        read_records("qasper", tmp_path)


def test_records_are_lines_that_end_in_line_feeds_alone(tmp_path):
    line = json.dumps(record(context="one\u2028two\x85"), ensure_ascii=False).encode()
    (tmp_path / "qasper.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n" + line)
    assert [found["context"] for found in read_records("qasper", tmp_path)] == ["one\u2028two\x85"] * 2


def test_records_from_the_hubs_archive(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(record(context="one\u2028two"), ensure_ascii=False) + "\n")
        archive.writestr("data/trec.jsonl", json.dumps(record(all_classes="AB")))
    monkeypatch.setattr(longbench, "hf_hub_download", lambda *a, **k: str(tmp_path / "data.zip"))
    assert [found["context"] for found in read_records("qasper", None)] == ["one\u2028two"]
    with pytest.raises(UserError, match="on the hub, trec, line 1, is no LongBench record: all_classes = 'AB' is not list"):
        read_records("trec", None)
    with pytest.raises(UserError, match="cannot be had from the hub"):
        read_records("samsum", None)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_records("qasper", tmp_path)
    (tmp_path / "qasper.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_records("qasper", tmp_path)
    (tmp_path / "trec.jsonl").write_text(json.dumps(record()))
    with pytest.raises(UserError, match="line 1, is no LongBench record"):
        read_records("trec", tmp_path)  # which needs the names of its classes
    with pytest.raises(UserError, match="no LongBench task 'dureader'"):
        read_records("dureader", tmp_path)
    with pytest.raises(UserError, match="length 500 is too short for multi_news"):
        LongBenchTask("multi_news", [record()], 500, byte_tokenizer())


def test_the_hubs_archive(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("data/qasper.jsonl", json.dumps(record()) + "\n")
    monkeypatch.setattr("ssa.eval.long.longbench.hf_hub_download", lambda *args, **keywords: str(archive))
    assert read_records("qasper", None)[0]["input"] == "Who?"
    with pytest.raises(UserError, match=r"cannot be had from the hub .* --data-dir"):
        read_records("trec", None)

    def offline(*args, **keywords):
        raise OSError("no network\nat all")

    monkeypatch.setattr(longbench.zipfile, "ZipFile", offline)
    with pytest.raises(UserError, match=r"\(no network at all\)"):
        read_records("qasper", None)
