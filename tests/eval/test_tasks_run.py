import io
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from rich.console import Console

from ssa.cli import main
from ssa.errors import UserError
from ssa.eval import choices, loglikelihood, scored
from ssa.eval.evaluate import evaluate
from ssa.eval.loglikelihood import Score, encode_pairs, log_likelihoods
from ssa.eval.questions import CHOICE_TASKS, is_right, read_questions
from ssa.eval.results import add_results, read_results, result_key
from ssa.eval.tasks import PAPER_SHOTS, parse_shots, parse_tasks
from ssa.infer.load import load_model

WORDS = ["stone", "river", "cloud", "paper", "window", "garden", "candle", "bridge"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)

    def text(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    piqa = [{"goal": f"{i} {text(1, 4)}", "choices": [text(1, 3), text(2, 3)], "label": i % 2} for i in range(12)]
    hellaswag = [
        {"query": f"{i} {text(1, 4)}", "choices": [f"{word} {text(1, 2)}" for word in draw.sample(WORDS, 4)], "label": i % 4}
        for i in range(400)
    ]
    for name, records in (("piqa_val", piqa), ("hellaswag_val", hellaswag)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "wiki.test.raw").write_text(" \n = One = \n \n The stone , it fell . \n = Two = \n \n A river . \n")
    return directory


def add_many(path, worker):
    for number in range(20):
        add_results(path, {"setting": {"worker": worker, "number": number}, "budgets": {}})


def run_tasks(run, data_dir, tasks, **arguments):
    return evaluate(run, perplexity=False, tasks=tasks, data_dir=data_dir, **arguments)["tasks"]


def test_figures_are_those_of_the_questions_one_by_one(make_run, data_dir):
    run = make_run()
    entry = run_tasks(run, data_dir, ["piqa"], budgets="2x4,full", num_fewshot=1, seeds=[1, 12], max_length=200)["piqa"]
    model, tokenizer = load_model(run)
    questions = read_questions(CHOICE_TASKS["piqa"], data_dir)
    for name, how in {"2x4": {"attention_mode": "sparse", "budget": "2x4"}, "full": {"attention_mode": "full"}}.items():
        for metric in ("acc", "acc_norm"):
            expected = {}
            for seed in (1, 12):
                right = []
                for question, before in zip(questions.questions, questions.examples(1, seed, 12), strict=True):
                    requests = encode_pairs(tokenizer, question.pairs(before))
                    scores = [log_likelihoods(model, [r], max_length=200, **how)[0].log_likelihood for r in requests]
                    right.append(is_right(question, scores, metric))
                expected[seed] = sum(right) / 12
            figures = entry["budgets"][name]["metrics"][metric]
            assert figures["by_seed"] == {str(seed): value for seed, value in expected.items()}
            assert figures["mean"] == pytest.approx((expected[1] + expected[12]) / 2)
            assert figures["std"] == pytest.approx(abs(expected[1] - expected[12]) / math.sqrt(2))
    assert entry["setting"]["seeds"] == [1, 12] and choices.OWN_POOL_NOTE in entry["notes"]
    file = read_results(run / "eval" / "tasks.json")
    assert file["results"][file["latest"]] == entry


@pytest.mark.parametrize("who, expected", [("oracle", 1.0), ("random", 0.25), ("wrong", 0.0)])
def test_an_oracle_scores_one_and_chance_is_chance(make_run, data_dir, monkeypatch, who, expected):
    draw = random.Random(5)
    run = make_run()
    _, tokenizer = load_model(run)
    questions = read_questions(CHOICE_TASKS["hellaswag"], data_dir).questions
    right = {str(encode_pairs(tokenizer, [q.pairs("")[q.gold]])[0]) for q in questions}

    def scorer(model, requests, *, deliver, **_):
        def value(request):
            if who == "random":
                return -draw.random() * len(request.continuation)
            return -1e-3 if (str(request) in right) == (who == "oracle") else -1e3

        deliver([(i, Score(value(request), False)) for i, request in enumerate(requests)])

    monkeypatch.setattr(scored, "log_likelihoods", scorer)
    metrics = run_tasks(run, data_dir, ["hellaswag"], budgets="full")["hellaswag"]["budgets"]["full"]["metrics"]
    for figures in metrics.values():
        sampling = math.sqrt(0.25 * 0.75 / 400) if who == "random" else 0
        assert abs(figures["mean"] - expected) <= 4 * sampling
        assert figures["stderr"] == pytest.approx(sampling, rel=0.15)


def test_an_interrupted_evaluation_goes_on(make_run, data_dir, monkeypatch):
    run, other = make_run(), make_run(name="other")
    whole = run_tasks(other, data_dir, ["piqa"], budgets="full,2x4", batch_tokens=100)["piqa"]
    monkeypatch.setattr(loglikelihood, "DELIVERY_SECONDS", 0)
    computed = []
    score_batch = loglikelihood._score_batch

    def interrupted(model, rows, *rest):
        if len(computed) == 7:
            raise KeyboardInterrupt
        computed.append(len(rows))
        return score_batch(model, rows, *rest)

    monkeypatch.setattr(loglikelihood, "_score_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(run, data_dir, ["piqa"], budgets="full,2x4", batch_tokens=100)
    (log,) = (run / "eval" / "items").glob("piqa-full-*/rank-0000.jsonl")
    kept = {json.loads(line)["index"] for line in log.read_text().splitlines()}
    assert 3 <= len(kept) < 12
    with log.open("a") as file:
        file.write('{"index": 11, "log_li')  # what a kill in the middle of a write leaves
    again = []
    monkeypatch.setattr(
        loglikelihood, "_score_batch", lambda model, rows, *rest: again.append(len(rows)) or score_batch(model, rows, *rest)
    )
    resumed = run_tasks(run, data_dir, ["piqa"], budgets="full,2x4", batch_tokens=100)["piqa"]
    assert sum(again) == 2 * (12 - len(kept)) + 2 * 12  # what was missing of full, and all of 2x4
    for name in ("full", "2x4"):
        assert resumed["budgets"][name]["metrics"] == whole["budgets"][name]["metrics"]
    assert sum(again) == resumed["budgets"]["full"]["scored"] + resumed["budgets"]["2x4"]["scored"]
    again.clear()
    assert run_tasks(run, data_dir, ["piqa"], budgets="full,2x4")["piqa"]["budgets"] == resumed["budgets"] and not again
    run_tasks(run, data_dir, ["piqa"], budgets="full", limit=5)  # the first five questions are among those
    assert not again


def test_ranks_share_the_items(make_run, data_dir, monkeypatch):
    run, other = make_run(), make_run(name="other")
    whole = run_tasks(other, data_dir, ["piqa", "wikitext"], budgets="full", max_length=32, num_fewshot=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    text = io.StringIO()
    first = run_tasks(
        run, data_dir, ["piqa", "wikitext"], budgets="full", max_length=200, limit=2, console=Console(file=text, width=100)
    )
    assert first["piqa"]["budgets"] == {} and "this rank is done, others are not" in text.getvalue()
    run_tasks(run, data_dir, ["piqa", "wikitext"], budgets="full", max_length=200)
    monkeypatch.setenv("RANK", "0")
    both = run_tasks(run, data_dir, ["piqa", "wikitext"], budgets="full", max_length=200)
    assert both["piqa"]["budgets"]["full"]["scored"] == 12 and both["wikitext"]["budgets"]["full"]["scored"] == 1
    assert whole["piqa"]["items"] == both["piqa"]["items"] == 12


def test_wikitext_by_hand(make_run, data_dir):
    run = make_run()
    entry = run_tasks(run, data_dir, ["wikitext"], budgets="full", max_length=16)["wikitext"]
    model, tokenizer = load_model(run)
    nats = 0.0
    texts = [" = One =\n\nThe stone, it fell. ", " = Two =\n\nA river.\n"]
    for text in texts:
        ids = [256, *tokenizer(text).input_ids]
        for start in range(1, len(ids), 16):
            end = min(start + 16, len(ids))
            (score,) = log_likelihoods(
                model, [loglikelihood.Request(*map(list, (ids[max(0, end - 17) : start], ids[start:end])))], max_length=16, attention_mode="full"
            )  # fmt: skip
            nats -= score.log_likelihood
    metrics = entry["budgets"]["full"]["metrics"]
    words = 2 * 2 + len(["=", "One", "=", "The", "stone", ",", "it", "fell", ".", "=", "Two", "=", "A", "river", "."])
    size = len(" = One = \n \n The stone , it fell . ") + len(" = Two = \n \n A river . \n")
    assert metrics["word_perplexity"]["mean"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert metrics["byte_perplexity"]["mean"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert metrics["bits_per_byte"]["mean"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_the_rank_that_finishes_last_writes_the_whole_table(make_run, data_dir, monkeypatch):
    run = make_run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    ask = scored.score_items

    def with_the_other_rank_behind(request, what, items, log, budget, max_length):
        """Rank 0 finishes piqa before rank 1, and hellaswag after it."""
        took = ask(request, what, items, log, budget, max_length)
        if what == "hellaswag" and log.path.name == "rank-0000.jsonl":
            monkeypatch.setattr(scored, "score_items", ask)
            monkeypatch.setenv("RANK", "1")
            other = run_tasks(run, data_dir, ["piqa", "hellaswag"], budgets="full", limit=9)
            assert other["piqa"]["budgets"].keys() == other["hellaswag"]["budgets"].keys() == {"full"}
            (run / "eval" / "table1.md").unlink()
            monkeypatch.setenv("RANK", "0")
        return took

    monkeypatch.setattr(scored, "score_items", with_the_other_rank_behind)
    monkeypatch.setenv("RANK", "0")
    found = run_tasks(run, data_dir, ["piqa", "hellaswag"], budgets="full", limit=9)
    assert [len(entry["budgets"]) for entry in found.values()] == [1, 1]
    assert "| inference | method | PIQA | HellaSwag |" in (run / "eval" / "table1.md").read_text()


def test_a_rank_that_is_not_the_last_writes_no_table(make_run, data_dir, monkeypatch):
    run = make_run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run_tasks(run, data_dir, ["piqa"], budgets="full")["piqa"]["budgets"] == {}
    assert not (run / "eval" / "table1.md").exists()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"limit": 3}, "limit = 3 belongs to tasks"),
        ({"beside": ["x"]}, "beside = .* belongs to tasks"),
        ({"tasks": ["copa"], "perplexity": False, "num_fewshot": {"cop": 1}}, "is given for cop, which"),
        ({"tasks": ["piqa"], "perplexity": False, "max_tokens": 9}, "max_tokens = 9 belongs to perplexity"),
        ({"tasks": ["piqa"], "perplexity": False, "data": "x"}, "data = x belongs to perplexity and needles"),
    ],
)
def test_options_of_what_is_not_measured_are_refused(make_run, options, match):
    with pytest.raises(UserError, match=match):
        evaluate(make_run(), **options)


def test_evaluations_of_one_run_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "eval" / "tasks.json"
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(add_many, [path] * 4, range(4)))
    assert len(read_results(path)["results"]) == 4 * 20


def test_other_checkpoints_shots_and_lengths_are_other_settings(make_run, data_dir):
    run = make_run()
    for arguments in ({}, {"num_fewshot": 1}, {"num_fewshot": {"piqa": 2}}, {"max_length": 150}, {"limit": 3}):
        run_tasks(run, data_dir, ["piqa"], budgets="full", **arguments)
    make_run(step=9)
    run_tasks(run, data_dir, ["piqa"], budgets="full")
    assert len(read_results(run / "eval" / "tasks.json")["results"]) == 6


def test_the_command_line(make_run, data_dir, capsys):
    run = make_run()
    arguments = ["eval", str(run), "--tasks", "piqa,wikitext", "--data-dir", str(data_dir), "--budgets", "full,2x4"]
    assert main([*arguments, "--shots", "piqa=2", "--seeds", "1,12", "--limit", "5", "--max-length", "300"]) == 0
    shown = capsys.readouterr().out
    for expected in ("piqa, 2-shot", "acc_norm", "word_perplexity", "5 items (limited)", "drawn from the questions"):
        assert expected in shown
    assert not (run / "eval" / "perplexity.json").exists()
    table = (run / "eval" / "table1.md").read_text()
    assert "| full | SSA |" in table and "| sparse 8 (2x4) | SSA |" in table and "PIQA: 2-shot, 5 items" in table


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--tasks", "pika", "--data-dir", "."], "no task 'pika' for local files"),
        (["--tasks", ","], "names none"),
        (["--tasks", "piqa", "--data-dir", "/nowhere"], "no directory /nowhere"),
        (["--tasks", "piqa", "--seeds", ""], "one or more numbers"),
        (["--tasks", "piqa", "--shots", "many"], "shots 'many'"),
        (["--tasks", "piqa", "--limit", "-1"], "limit = -1"),
        (["--tasks", "piqa", "--max-length", "99999999"], "= 99999999 must lie in"),
        (["--tasks", "piqa", "--shots", "12", "--max-length", "64"], "more than the 12"),
    ],
)
def test_errors(make_run, data_dir, capsys, arguments, match):
    if "--data-dir" not in arguments:
        arguments = [*arguments, "--data-dir", str(data_dir)]
    assert main(["eval", str(make_run()), *arguments]) == 2
    assert match in capsys.readouterr().err


def test_parsing():
    assert parse_tasks("piqa, wikitext,piqa", "d") == ["piqa", "wikitext"]
    assert parse_tasks("piqa,mmlu", None) == ["piqa", "mmlu"]  # lm-eval may know it
    assert parse_shots("5") == 5 and parse_shots("piqa=3,hellaswag=10") == {"piqa": 3, "hellaswag": 10}
    assert parse_shots("paper") == PAPER_SHOTS == {"piqa": 3, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 5}
    for wrong in ("-1", "piqa", "piqa=3,piqa=4", "3,piqa=3", "piqa=x"):
        with pytest.raises(UserError, match="neither a number"):
            parse_shots(wrong)


def test_gaps_count_what_another_rank_wrote_meanwhile(tmp_path):
    """`finish` sees every budget that is in the file when it is this one's turn."""
    path = tmp_path / "perplexity.json"
    add_results(path, {"setting": {}, "budgets": {"full": {"nats_per_token": 2.0}}})
    entry = add_results(
        path,
        {"setting": {}, "budgets": {"4x16": {"nats_per_token": 3.0}}},
        lambda budgets: {n: {**f, "all": sorted(budgets)} for n, f in budgets.items()},
    )
    assert entry["budgets"] == read_results(path)["results"][result_key({})]["budgets"]
    assert all(figures["all"] == ["4x16", "full"] for figures in entry["budgets"].values())
