import io
import json

import numpy as np
import pytest
from rich.console import Console

from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.eval.long import RUNNERS
from ssa.eval.tasks import TASKS, parse_tasks
from ssa.testing import tiny_model

LINES = {"random_idx": ["torpid-kid", 7], "expected_number": 2416, "prompt": "Some lines. Tell me the number in torpid-kid."}
NEWS = {"context": "News. " * 30, "input": "", "answers": ["A summary."], "all_classes": None}


@pytest.fixture
def model(tmp_path):
    tiny_model("ssa").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("longbench", "longeval", "books"):
        (folder / name).mkdir(parents=True)
    (folder / "longbench" / "hotpotqa.jsonl").write_text((json.dumps(NEWS) + "\n") * 3)
    (folder / "longeval" / "20_lines.jsonl").write_text((json.dumps(LINES) + "\n") * 3)
    for i in range(2):
        (folder / "books" / f"{i}.txt").write_text("".join(f"Sentence {j} of book {i}. " for j in range(60)))
    return folder


@pytest.fixture
def computed(monkeypatch):
    """How many prompts were given to the model."""
    from ssa.eval.long import measure

    seen, write = [], measure.write
    monkeypatch.setattr(measure, "write", lambda m, t, items, *how: seen.extend(items) or write(m, t, items, *how))
    return seen


def run(model, tasks, data, **options):
    out = io.StringIO()
    options = {"budgets": "3x4,full", "limit": 2, "perplexity": False} | options
    result = evaluate(model, tasks=parse_tasks(tasks, data), data_dir=data, console=Console(file=out, width=80), **options)
    return result["tasks"], out.getvalue()


def test_the_commands_tasks():
    assert RUNNERS.items() <= TASKS.items() and {"ruler", "cwe", "longbench_trec", "longeval", "books_half"} < RUNNERS.keys()


def test_prompts_in_a_mode_of_their_own(model, data, monkeypatch):
    from ssa.eval.long import measure

    asked, batch = [], measure.generate_batch
    monkeypatch.setattr(measure, "generate_batch", lambda *a, **how: asked.append(how["prefill_mode"]) or batch(*a, **how))
    plain, _ = run(model, "longbench_hotpotqa", data, lengths=(600,), budgets="3x4")
    entries, shown = run(model, "longbench_hotpotqa", data, lengths=(600,), budgets="3x4", prefill_mode="full")
    assert set(asked) == {None, "full"} and "prompts read by full attention" in shown
    entry = entries["longbench_hotpotqa"]
    assert entry["setting"] == plain["longbench_hotpotqa"]["setting"] | {"prefill_mode": "full"}
    assert len(json.loads((model / "eval" / "longbench.json").read_text())["results"]) == 2
    with pytest.raises(UserError, match=r"--prefill-mode is for tasks that generate .*, and books does not"):
        run(model, "books", data, prefill_mode="full")


def test_ruler_goes_on_and_keeps_its_results(model, data, computed):
    haystack = str(data / "books")
    entries, shown = run(model, "vt,niah_single_2", data, lengths=(1800,), haystack=haystack, limit=1)
    entry = entries["vt"]
    assert entries["niah_single_2"] == entry and len(computed) == 2 * 2
    assert list(entry["budgets"]) == ["3x4", "full"] and entry["setting"]["tasks"] == ["niah_single_2", "vt"]
    for figures in entry["budgets"].values():
        assert [(cell["task"], cell["length"], cell["items"]) for cell in figures["cells"]] == [
            ("niah_single_2", 1800, 1),
            ("vt", 1800, 1),
        ]
        assert figures["average"] == figures["average_by_length"]["1800"] == np.mean([cell["score"] for cell in figures["cells"]])
    directory = model / "eval"
    assert json.loads((directory / "ruler.json").read_text())["results"].popitem()[1] == entry
    table = (directory / "ruler.md").read_text()
    assert table in shown and "| 3x4 vt | 0.0 |" in table and "| **full average** | **0.0** |" in table
    records = [json.loads(line) for path in directory.glob("items/ruler/*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(records) == 4 and all(len(record["answers"]) in (1, 5) and record["tokens"] < 1800 for record in records)
    del computed[:]
    run(model, "vt,niah_single_2", data, lengths=(1800,), haystack=haystack, limit=1)
    assert not computed
    run(model, "vt", data, lengths=(1800,), limit=2)  # fewer tasks, more cases: one new case each
    assert len(computed) == 2
    results = json.loads((directory / "ruler.json").read_text())["results"]
    assert len(results) == 2


def test_two_ranks_share_the_work(model, data, computed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, number, found in (("1", 2, 0), ("0", 6, 2)):
        monkeypatch.setenv("RANK", rank)
        entries, shown = run(model, "longbench_hotpotqa", data, lengths=(700,), limit=None)
        assert len(entries["longbench_hotpotqa"]["budgets"]) == found and len(computed) == number
        assert ("rank 1 is done" in shown) == (found == 0) and (model / "eval" / "longbench.json").exists() == (found > 0)
    assert entries["longbench_hotpotqa"]["budgets"]["full"]["cells"][0]["items"] == 3


def test_longeval_is_lines_and_topics_by_any_name(model, data, computed):
    topics = {"prompt": "We spoke of two things.", "topics": ["the sea", "bread"]}
    (data / "longeval" / "5_topics.jsonl").write_text((json.dumps(topics) + "\n") * 2)
    for names in ("longeval", "longeval_lines,longeval_topics", "longeval_topics,longeval_lines"):
        entries, _ = run(model, names, data)
        assert len(computed) == 2 * 2 * 2
    assert len(json.loads((model / "eval" / "longeval.json").read_text())["results"]) == 1
    assert [cell["task"] for cell in entries["longeval_lines"]["budgets"]["full"]["cells"]] == ["20 lines", "5 topics"]
    run(model, "longeval_lines", data)
    assert len(computed) == 8 and len(json.loads((model / "eval" / "longeval.json").read_text())["results"]) == 2


def test_longeval_and_books(model, data):
    entries, shown = run(model, "longeval_lines,books,books_half", data, lengths=(300, 700))
    assert entries["longeval_lines"]["budgets"]["full"]["cells"][0]["task"] == "20 lines"
    assert "| attention | 20 lines (" in shown
    for name, scored in (("books", 256), ("books_half", None)):
        for figures in entries[name]["budgets"].values():
            for cell in figures["cells"]:
                assert cell["task"] == name and cell["windows"] == 2
                assert cell["tokens"] == 2 * (scored or cell["length"] // 2)
                assert cell["perplexity"] == pytest.approx(np.exp(cell["nats_per_token"]))
        assert (model / "eval" / f"{name}.md").read_text() in shown
    assert "perplexity of the last 256 tokens of 2 windows of 2 books" in shown and "of the second half of 2 windows" in shown


def test_scaled_rope_reads_further_and_is_kept_apart(tmp_path, data):
    path = tmp_path / "short"
    tiny_model("ssa", max_position_embeddings=512).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    with pytest.raises(UserError, match=r"length 700 exceeds the model's 512 positions; --rope-factor 2 makes"):
        run(path, "books", data, lengths=(700,))
    near, _ = run(path, "books", data, lengths=(400,))
    far, _ = run(path, "books", data, lengths=(400,), rope_factor=2.0)
    run(path, "books", data, lengths=(400, 700), rope_factor=2.0)
    assert len(json.loads((path / "eval" / "books.json").read_text())["results"]) == 3
    figures = [entry["books"]["budgets"]["full"]["cells"][0]["nats_per_token"] for entry in (near, far)]
    assert figures[0] != figures[1]


def test_errors(model, data, tmp_path):
    for tasks, options, match in [
        ("ruler", {"lengths": (300,)}, "too short"),
        ("vt", {"lengths": (1800,), "seeds": (1, 2)}, "one seed, not 1, 2"),
        ("longbench_trec", {}, "trec.jsonl does not exist"),
        ("longeval_topics", {}, "no N_topics"),
        ("books", {"lengths": (5000,)}, "no document has 5000 tokens"),
        ("books", {"lengths": (200,)}, "below the shortest length"),
        ("vt", {"lengths": (200_000,)}, "exceeds the model's 131072 positions"),
    ]:
        with pytest.raises(UserError, match=match):
            run(model, tasks, data, haystack=str(data / "books"), **options)
    assert not (model / "eval").exists()
    with pytest.raises(UserError, match="--data-dir"):
        run(model, "books", None)
