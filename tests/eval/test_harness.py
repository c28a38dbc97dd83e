"""This project's model inside lm-evaluation-harness, and lm-eval's own tasks and `hf` model as the yardstick."""

import functools
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.eval.questions import CHOICE_TASKS, read_questions
from ssa.eval.results import read_results
from ssa.eval.wikitext import read_pages
from ssa.testing import tiny_model

pytest.importorskip("lm_eval", reason='needs pip install "sparse-sparse-attention[eval]"')

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM, hash_args
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from ssa.eval import harness
from ssa.eval.harness import SSALM
from ssa.eval.harness_tasks import DEFINITIONS, write_tasks
from ssa.ranks import Shard

RECORDS = {
    "piqa_val": [{"goal": f"Open {i}.", "choices": [f"Twist {i}", "Paint é it."], "label": i % 2} for i in range(8)],
    "hellaswag_val": [{"query": f"Cook: {i} {{x}}", "choices": ["a b", "c", "d", f"{i}"], "label": i % 4} for i in range(8)],
    "arc_easy_test": [{"question": f"What is {i}? ", "choices": ["s", "2", "w"], "label": i % 3} for i in range(8)],
    "openbookqa_test": [{"query": f"Eat {i}", "choices": ["x", "y", "z", "u"], "gold": i % 4} for i in range(8)],
    "winogrande_val": [{"context_options": [f"{i} so A_n", f"{i} so Eve"], "continuation": "ran.", "gold": i % 2} for i in range(8)],
    "copa": [{"query": f"It fell {i}, {c}", "choices": ["it b.", "we s."], "gold": i % 2} for i, c in enumerate(["because", "therefore"] * 4)],
}  # fmt: skip
TEXTS = ["ab", "A text of some length, éü, which needs several windows of thirty-two tokens to be read. " * 2, "x" * 32, "y" * 33]


@pytest.fixture(scope="module", params=["own", "train"])
def data_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    for name, records in RECORDS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if request.param == "train":
            train = directory / (name.split("_val")[0].split("_test")[0] + "_train.jsonl")
            train.write_text("".join(json.dumps(r) + "\n" for r in records[3:] + records[:2]))
    (directory / "wiki.test.raw").write_text(' \n = One = \n \n He @-@ said " hi " , \'s \n = Two = \n It ; that . \n')
    return directory


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_prompts_are_lm_evals(data_dir, tmp_path):
    """Its own task definitions over the same items give the same (context, continuation) texts, few-shot draws included."""
    names = [name for name in DEFINITIONS if name != "arc_challenge"]  # the same definition as arc_easy
    written = write_tasks(names, data_dir, tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load(written)["tasks"]
    for name in names:
        task = tasks[f"local_{name}"]
        if name == "wikitext":
            task.set_config("num_fewshot", 0)
            task.build_all_requests()
            pages = read_pages(data_dir).pages
            assert [request.args for request in task.instances] == [(page.text,) for page in pages]
            counted = [task.process_results(request.doc, [-1.0]) for request in task.instances]
            assert [c["word_perplexity"][1] for c in counted] == [page.num_words for page in pages]
            assert [c["byte_perplexity"][1] for c in counted] == [page.num_bytes for page in pages]
            continue
        questions = read_questions(CHOICE_TASKS[name], data_dir)
        assert str(task.VERSION) == questions.task.version and tuple(task.aggregation()) == questions.task.metrics
        for num_fewshot in (0, 3):
            task.set_config("num_fewshot", num_fewshot)
            task.set_fewshot_seed(12)
            task.build_all_requests()
            before = questions.examples(num_fewshot, 12, 8)
            ours = [pair for q, text in zip(questions.questions, before, strict=True) for pair in q.pairs(text)]
            assert [request.args for request in task.instances] == ours, (name, num_fewshot)


def instances(kind, arguments):
    return [Instance(kind, {}, args, i, metadata=("task", i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def pair():
    """(lm-eval's `hf` around the model in full mode, ours)."""
    model, tokenizer = tiny_model("ssa", attention_mode="full", max_position_embeddings=64), byte_tokenizer()
    hf = get_model("hf")(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=32, device="cpu")
    return hf, SSALM(model, "full", batch_size=2, max_length=32, tokenizer=tokenizer)


def test_log_likelihoods_are_lm_evals(pair):
    hf, ours = pair
    requests = instances(
        "loglikelihood", [("Some", " word"), ("A é ", "b"), ("", "start"), ("long " * 20, "tail"), ("Some", " other")]
    )
    for theirs, mine in zip(hf.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert mine == (pytest.approx(theirs[0], abs=1e-4), theirs[1])
    encoded = [((c, t), hf._encode_pair(c, t)[0], hf._encode_pair(c, t)[1]) for c, t in [("Some", " word"), ("ab", "c")]]
    assert ours._loglikelihood_tokens(encoded) == [(pytest.approx(v, abs=1e-4), g) for v, g in hf._loglikelihood_tokens(encoded)]
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling), abs=1e-3)


def test_generation_is_lm_evals(pair):
    """Left-padded batches with the cache, stop texts, prompts that are cut on the left."""
    hf, ours = pair
    free = [("Some words", {"until": [], "max_gen_toks": 9}), ("A longer prompt, cut. " * 3, {"until": [], "max_gen_toks": 9})]
    whole = hf.generate_until(instances("generate_until", free))
    stop = whole[0][2:4]
    requests = [*free, ("Some words", {"until": [stop], "max_gen_toks": 9}), ("x", {"until": ["\n"], "max_gen_toks": 4})]
    theirs = hf.generate_until(instances("generate_until", requests))
    assert ours.generate_until(instances("generate_until", requests)) == theirs
    assert theirs[2] == whole[0].split(stop)[0] and stop in whole[0]
    with pytest.raises(UserError, match="leave no room"):
        ours.generate_until(instances("generate_until", [("x", {"max_gen_toks": 32})]))


def test_generation_ends_at_a_special_token_that_is_a_stop_text(pair, monkeypatch):
    """Decoding leaves special tokens out, so the text alone would never show it."""
    _, ours = pair
    seen, batch = [], harness.generate_batch
    monkeypatch.setattr(harness, "generate_batch", lambda *a, **how: (batch(*a, **how), seen.append(a[2][0].token_ids)))
    ours.generate_until(instances("generate_until", [("Some words", {"max_gen_toks": 6})]))
    token = ours.tokenizer.convert_ids_to_tokens(seen[0][-1])
    monkeypatch.setattr(type(ours.tokenizer), "all_special_tokens", [token])
    ours.generate_until(instances("generate_until", [("Some words", {"until": [token], "max_gen_toks": 6})]))
    assert len(seen[0]) == 6 and seen[1] == seen[0][: seen[0].index(seen[0][-1])]


def test_generation_ends_at_a_stop_text(pair):
    _, ours = pair
    calls = []
    forward = ours.model.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    (whole,) = ours.generate_until(instances("generate_until", [("Some words", {"max_gen_toks": 20})]))
    ours.model.forward = counted
    try:
        ours.generate_until(instances("generate_until", [("Some words", {"until": [whole[:2]], "max_gen_toks": 20})]))
    finally:
        del ours.model.forward
    assert 1 <= len(calls) <= 2 + 3  # a character may want three more bytes to be one


def test_model_arguments(make_run):
    run = make_run()
    sparse = SSALM(str(run), attention_mode="sparse", budget="1x4", max_length="16", device="cpu")
    full = get_model("ssa").create_from_arg_string(
        f"pretrained={run},budget=full", {"batch_size": "4", "max_batch_size": None, "device": None}
    )
    if not torch.cuda.is_available():  # what lm-eval's command passes by default
        assert SSALM(str(run), device="cuda:0").device.type == "cpu"
        with pytest.raises(UserError, match="cuda:1"):
            SSALM(str(run), device="cuda:1")
    requests = instances("loglikelihood", [("A few words of context here", " end")])
    assert sparse.attention == {"attention_mode": "sparse", "budget": sparse.budget} and str(sparse.budget) == "1x4"
    assert full.batch_size == 4 and full.max_length == full.model.config.max_position_embeddings
    assert sparse.loglikelihood(requests)[0][0] != pytest.approx(full.loglikelihood(requests)[0][0], abs=1e-6)
    for wrong, match in (
        ({"attention_mode": "dense"}, "dense"), ({"budget": "4by4"}, "4by4"), ({"batch_size": "many"}, "batch_size"),
        ({"attention_mode": "full", "budget": "1x4"}, "contradict"), ({"max_length": 1 << 30}, "max_length"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            SSALM(str(run), **wrong)


def test_the_entry_point_names_the_class():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["ssa"].partition(":")
    assert getattr(import_module(module), name) is SSALM is get_model("ssa")


@pytest.fixture
def local_manager(data_dir, tmp_path, monkeypatch):
    """lm-eval as `ssa eval` finds it, but with tasks "local_..." over local files only."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for all packages, each time
    write_tasks(["piqa", "wikitext"], data_dir, tmp_path / "tasks")
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda: TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    )


@pytest.mark.parametrize("data_dir", ["own"], indirect=True)
def test_ssa_eval_through_lm_eval_is_ssa_eval_on_files(make_run, data_dir, local_manager, monkeypatch):
    run = make_run()
    how = {"perplexity": False, "budgets": "2x4,full", "seeds": [1, 12], "max_length": 250}
    theirs = evaluate(run, tasks=["local_piqa", "local_wikitext"], num_fewshot={"local_piqa": 2}, **how)["tasks"]
    ours = evaluate(run, tasks=["piqa", "wikitext"], data_dir=data_dir, num_fewshot={"piqa": 2}, **how)["tasks"]
    for name in ("piqa", "wikitext"):
        for budget in ("2x4", "full"):
            a, b = (e["budgets"][budget]["metrics"] for e in (theirs[f"local_{name}"], ours[name]))
            assert set(a) == set(b)
            for metric in a:
                assert a[metric]["mean"] == pytest.approx(b[metric]["mean"], rel=1e-5)
                assert a[metric]["by_seed"] == pytest.approx(b[metric]["by_seed"]) and a[metric]["std"] == pytest.approx(
                    b[metric]["std"]
                )
    assert theirs["local_piqa"]["setting"]["num_fewshot"] == 2 and theirs["local_piqa"]["items"] == 8
    assert len(read_results(run / "eval" / "tasks.json")["results"]) == 4
    # what is in the log is not computed again
    monkeypatch.setattr(SSALM, "_compute", lambda self, requests, deliver: requests and pytest.fail("computed again"))
    again = evaluate(run, tasks=["local_piqa", "local_wikitext"], num_fewshot={"local_piqa": 2}, **how)["tasks"]
    assert again["local_piqa"]["budgets"]["full"]["metrics"] == theirs["local_piqa"]["budgets"]["full"]["metrics"]


@pytest.mark.parametrize("data_dir", ["own"], indirect=True)
def test_two_ranks_give_exactly_the_figures_of_one(make_run, data_dir, local_manager, tmp_path, monkeypatch, run_on_two_ranks):
    """Few-shot draws included; they compute different batches, and rank 0 alone writes and speaks. Generation alike, with caches of lm-eval's
    that differ: rank 0 finds all log-likelihoods and some texts in its own, rank 1 another text."""
    names = ["local_piqa", "local_wikitext"]
    how = {"perplexity": False, "tasks": names, "num_fewshot": {"local_piqa": 2}, "budgets": "2x4,full", "seeds": [1, 12],
           "max_length": 250}  # fmt: skip
    sampled = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 5}
    requests = [(f"{'Prompt ' * i}{i}", {"max_gen_toks": 5} if i % 2 else sampled) for i in range(1, 13)]
    monkeypatch.setattr("ssa.eval.loglikelihood.BATCH_TOKENS_CPU", 200)
    alone, shared = make_run(name="alone"), make_run(name="shared")
    entries = evaluate(alone, **how)["tasks"]
    torch.manual_seed(3)
    one = SSALM(str(alone), "full", batch_size=2, device="cpu")
    texts = one.generate_until(instances("generate_until", requests))
    caches = [tmp_path / f"lm_rank{rank}.db" for rank in (0, 1)]
    scored = CachingLM(one, str(caches[0])).loglikelihood(instances("loglikelihood", [(prompt, ".") for prompt, _ in requests]))
    for cache, cached in zip(caches, (0, 2), strict=True):
        CachingLM(one, str(cache)).generate_until(instances("generate_until", [requests[cached]]))
    rank = Path(__file__).with_name("harness_rank.py")
    said = run_on_two_ranks(rank, shared, tmp_path / "tasks", tmp_path / "lm", json.dumps(requests), json.dumps(how))
    results = [json.loads(output.rpartition("=")[2]) for output, _ in said]
    assert [r["texts"] for r in results] == [texts, texts]
    assert [r["scored"] for r in results] == [[list(score) for score in scored]] * 2
    kept = [dict(SqliteDict(str(cache)).items()) for cache in caches]
    assert kept[0] == kept[1] and len(kept[0]) == 2 * len(requests)
    assert [set(r["budgets"]["local_piqa"]) for r in results] == [{"2x4", "full"}, set()]
    assert "acc_norm" in said[0][0] and said[1][0].startswith("=")
    assert "it/s" in said[0][1] and "it/s" not in said[1][1]  # progress bars
    for entry in read_results(shared / "eval" / "tasks.json")["results"].values():
        task = entry["setting"]["task"]
        for budget, figures in entry["budgets"].items():
            assert figures["metrics"] == entries[task]["budgets"][budget]["metrics"]
    logs = [[json.loads(line)["index"] for line in path.read_text().splitlines()] for path in shared.rglob("rank-*.jsonl")]
    assert len(logs) == 4 and all(logs)  # two ranks at two budgets
    once = [json.loads(line)["index"] for path in alone.rglob("rank-*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(once) == sorted(index for of_rank in logs for index in of_rank)


def test_caches_of_ranks_that_were_interrupted_become_one(pair, monkeypatch, tmp_path):
    """What rank 1 had generated before an interruption is there on rank 0, which keeps its own answer where they differ."""
    _, ours = pair
    a, b, c = (hash_args("generate_until", (name, {})) for name in "abc")
    monkeypatch.setattr(ours, "shard", Shard(0, 2))
    monkeypatch.setattr(ours, "_generate", lambda *a: pytest.fail("generated again"))
    monkeypatch.setattr(harness, "gather", lambda own: [own, {b: "other", c: "3"}])
    with SqliteDict(str(tmp_path / "x.db"), autocommit=True) as before:
        before.update({a: "1", b: "2"})
    try:
        cached = CachingLM(ours, str(tmp_path / "x.db"))
        assert cached.generate_until(instances("generate_until", [(name, {}) for name in "abc"])) == ["1", "2", "3"]
    finally:
        ours.set_cache_hook(CacheHook(None))


def test_ranks_that_were_asked_differently_say_so(pair, monkeypatch):
    _, ours = pair
    monkeypatch.setattr(ours, "shard", Shard(1, 2))  # and nobody answers for rank 0
    with pytest.raises(UserError, match="rank 1 was asked other questions"):
        ours.loglikelihood(instances("loglikelihood", [("Some", " word"), ("A", "b"), ("c", "d")]))
    with pytest.raises(UserError, match="rank 1 was asked other questions"):
        ours.generate_until(instances("generate_until", [("x", {"max_gen_toks": 2})]))


@pytest.mark.parametrize("data_dir", ["own"], indirect=True)
def test_errors(make_run, data_dir, local_manager, monkeypatch):
    run = make_run()
    with pytest.raises(UserError, match="has no task 'nonsense'"):
        evaluate(run, perplexity=False, tasks=["nonsense"])
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(UserError, match="cannot load local_piqa: offline; without network use --data-dir"):
        evaluate(run, perplexity=False, tasks=["local_piqa"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"sparse-sparse-attention\[eval\]"):
        evaluate(run, perplexity=False, tasks=["piqa"])


def test_the_command_has_our_model_where_none_is_named():
    ask = ["--model_args", "pretrained=RUN", "--tasks", "piqa"]
    assert harness.with_defaults(ask) == harness.with_defaults(["run", *ask]) == ["run", "--model", "ssa", *ask]
    for other in (["--model", "hf", *ask], ["-M=hf", *ask]):
        assert harness.with_defaults(other) == ["run", *other]
    for left_alone in (["ls", "tasks"], ["validate", "--tasks", "piqa"], ["--help"], ["run", "-h"], ["--config", "all.yaml"]):
        assert harness.with_defaults(left_alone) == left_alone


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which model"),
        (["--tasks", "piqa"], "--model_args pretrained=RUN"),
        (["--model_args", "pretrained=RUN"], "which tasks"),
        (["--model", "ssa", "--model_args", "pretrained=RUN"], "which tasks"),
    ],
)
def test_the_command_says_what_is_missing(arguments, says):
    with pytest.raises(UserError, match=says):
        harness.with_defaults(arguments)


def test_an_unknown_task_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness"])
    assert harness.main(["--model_args", "pretrained=RUN", "--tasks", "nosuchtask,nor\x1b[2Jthat"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "ssa: " in line)
    assert line.startswith("ssa: error: Tasks not found: ") and "nosuchtask" in line and "ls tasks lists them" in line
    assert "\x1b" not in line


def test_model_arguments_that_are_missing_or_unknown_are_named():
    with pytest.raises(UserError, match="needs --model_args pretrained=RUN"):
        SSALM()
    with pytest.raises(UserError, match=r"no argument 'pretraned'; it has pretrained, .*max_batch_size, tokenizer$"):
        SSALM(pretraned="RUN")


def test_without_lm_eval_the_command_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "ssa.eval.harness"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "sparse-sparse-attention[eval]" in done.stderr
