"""Two ranks (gloo, CPU), and four, against one: the same run, however it is cut."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from ssa.runs.checkpoints import find_checkpoints, verify_checkpoint
from ssa.train.trainer import train

STEPS = 10


def weights(out, step=STEPS):
    directory = out / "checkpoints" / f"step-{step:08d}"
    verify_checkpoint(directory)
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: x for name, x in tensors.items() if name != "torch_cpu"}


def lines(out, kind="train"):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def assert_same_run(a, b, tolerance=1e-5, step=STEPS):
    """Weights within the tolerance of their size, and every logged value."""
    mine, others = weights(a, step), weights(b, step)
    assert mine.keys() == others.keys()
    for name, x in mine.items():
        if name.startswith("model."):
            assert (x - others[name]).norm() <= tolerance * x.norm(), name
    for one, other in zip(lines(a), lines(b), strict=True):
        assert (one["stream"], one["lr"], one["tokens"]) == (other["stream"], other["lr"], other["tokens"])
        for name in ("loss", "cross_entropy", "sparsity_loss", "commitment_loss", "grad_norm"):
            if one[name] is None:  # a method without alignment
                assert other[name] is None
                continue
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=1e-9), (name, one["step"])


def assert_bitwise(a, b):
    mine, others = weights(a), weights(b)
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """The recipe of these tests: a step is 4 rows of 32 tokens, cut as `changes` say."""
    from ssa.config import DataRecipe, ModelRecipe, Recipe, TrainRecipe
    from ssa.data.prepare import prepare

    directory = tmp_path_factory.mktemp("words")
    source, words = random.Random(0), ["select", "attend", "align", "stream", "block", "query", "key", "value", "gate"]
    texts = [" ".join(source.choices(words, k=source.randint(1, 30))) for _ in range(60)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([directory / "text.jsonl"], directory / "data", valid_fraction=0.02, workers=1, show_progress=False)

    def recipe(**changes):
        train_fields = {"steps": STEPS, "batch_size": 4, "lr": 3e-3, "warmup": 0.2, "log_every": 4, "device": "cpu"}
        model = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
                 "block_size": 4, "num_selected_blocks": 2}  # fmt: skip
        for name, value in changes.items():
            (train_fields if name in TrainRecipe.__dataclass_fields__ else model)[name] = value
        return Recipe(ModelRecipe(**model), DataRecipe(str(directory / "data"), context=32), TrainRecipe(**train_fields))

    return recipe


@pytest.fixture(scope="module")
def outs(make, tmp_path_factory):
    """(directory of the runs, name -> each rank's result), all made by one pair of ranks but for those of `single`."""
    base = tmp_path_factory.mktemp("runs")
    single = {
        "single": make(save_every=5),
        "muon": make(optimizer="muon", steps=4),
        "nsa": make(method="nsa", steps=3),
        "rising": make(alignment_warmup=1.0, steps=4),
        "half precision": make(dtype="bfloat16", steps=3),
    }
    for name, recipe in single.items():
        train(recipe, base / name)
    twice = {"batch_size": 1, "accumulation": 2, "save_every": 5}
    half = {"batch_size": 2}
    fsdp = {"parallel": "fsdp"}
    jobs = {
        "ddp": {"recipe": make(**twice, parallel="ddp")},
        "ddp again": {"recipe": make(**twice, parallel="ddp"), "half_of": "ddp", "resume": True},
        "fsdp": {"recipe": make(**twice, **fsdp), "file_bytes": 1000},
        "1 to 2": {"recipe": make(**half, **fsdp), "half_of": "single", "resume": True},
        "hsdp": {"recipe": make(**half, parallel="hsdp", shard_ranks=1)},
        "context": {"recipe": make(context_parallel=2)},
        "context of fsdp": {
            "recipe": make(context_parallel=2, **fsdp, **half, accumulation=2, reshard_after_forward=False,
                           reduce_every_micro_batch=True, activation_checkpointing=True)
        },
        "rising ddp": {"recipe": make(**twice | {"save_every": 0}, parallel="ddp", alignment_warmup=1.0, steps=4)},
        "rising context of fsdp": {"recipe": make(context_parallel=2, **fsdp, alignment_warmup=1.0, steps=4)},
        "context of nsa": {"recipe": make(context_parallel=2, method="nsa", steps=3)},
        "half precision fsdp": {"recipe": make(**half, **fsdp, dtype="bfloat16", steps=3)},
        "muon fsdp": {"recipe": make(**half, **fsdp, optimizer="muon", steps=4)},
        "nan": {"recipe": make(**half, **fsdp, save_every=2), "at_step": 3, "nan": 1},
        "skipped": {"recipe": make(**half, skip_nonfinite=1, steps=3), "at_step": 1, "nan": 1},
        "stopped": {"recipe": make(**twice | {"save_every": 2}, **fsdp, async_save=True), "at_step": 4, "signal": 1},
        "stopped again": {"recipe": make(**twice | {"save_every": 2}, **fsdp, async_save=True), "out": "stopped", "resume": True},
        "signalled at its end": {"recipe": make(**half, steps=3), "at_step": 2, "signal": 1},
        "resumed at its end": {"recipe": make(**half, steps=3), "out": "signalled at its end", "resume": True},
        "full disk": {"recipe": make(**half, **fsdp, save_every=2), "disk_full": 1, "file_bytes": 1000},
    }  # fmt: skip
    for name, job in jobs.items():
        job["recipe"], job["out"] = job["recipe"].to_json(), str(base / job.get("out", name))
        if "half_of" in job:
            job["half_of"] = str(base / job["half_of"])
    results = run_ranks(list(jobs.values()))
    return base, {name: [rank[i] for rank in results] for i, name in enumerate(jobs)}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "context", "context of fsdp"])
def test_two_ranks_train_what_one_trains(outs, name):
    base, _ = outs
    assert_same_run(base / "single", base / name)
    valid, expected = lines(base / name, "valid")[0], lines(base / "single", "valid")[0]
    assert [valid[mode] for mode in ("full", "sparse")] == pytest.approx(
        [expected[mode] for mode in ("full", "sparse")], rel=1e-5
    )


def test_other_methods_share_a_context_too(outs):
    base, _ = outs
    assert_same_run(base / "nsa", base / "context of nsa", step=3)


@pytest.mark.parametrize("name", ["rising ddp", "rising context of fsdp"])
def test_the_weight_of_the_alignment_rises_on_all_ranks(outs, name):
    base, _ = outs
    assert_same_run(base / "rising", base / name, step=4)
    one = lines(base / "rising")[2]
    assert one["loss"] == pytest.approx(one["cross_entropy"] + 5 * (one["sparsity_loss"] + one["commitment_loss"]), rel=1e-5)


def test_half_precision_rounds_the_same_weights(outs):
    """FSDP gathers in bfloat16 what autocast rounds to it; norms' weights, which autocast leaves alone, are rounded too."""
    base, _ = outs
    assert_same_run(base / "half precision", base / "half precision fsdp", tolerance=5e-2, step=3)
    assert {x.dtype for name, x in weights(base / "half precision fsdp", 3).items()} == {torch.float32}


def test_muon_too(outs):
    """It orthogonalises in bfloat16, so rounding shows earlier."""
    base, _ = outs
    assert_same_run(base / "muon", base / "muon fsdp", tolerance=1e-2, step=4)


def test_ranks_draw_the_same_streams_and_rank_0_alone_writes(outs):
    base, results = outs
    first, second = results["ddp"]
    assert first["streams"] == second["streams"] and set(first["streams"]) == {"full", "sparse"}
    assert first["validation"] == pytest.approx(second["validation"])
    assert [line["step"] for line in lines(base / "ddp")] == list(range(1, STEPS + 1))
    start = json.loads((base / "hsdp" / "environment.json").read_text())["starts"][0]
    assert (start["ranks"], start["parallel"], start["tokens_per_step"]) == (2, "hsdp", 128)


def test_a_state_in_parts_is_a_model_directory(outs):
    """Files of both ranks, whole tensors, transformers' index."""
    from ssa.infer.load import load_model

    base, _ = outs
    directory = find_checkpoints(base / "fsdp")[-1]
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    assert "model-00002-of-00002.safetensors" in files and "optimizer-00001-of-00002.safetensors" in files
    model, _ = load_model(base / "fsdp", device="cpu")
    stored = weights(base / "fsdp")
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    assert {p.suffix for p in directory.iterdir()} <= {".json", ".safetensors", ".md", ".py"}


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(outs):
    base, results = outs
    for result in results["nan"]:
        assert "is nan at step 4 " in result["error"] and result["shared"] and result["moves"] == 3
    assert [p.name for p in find_checkpoints(base / "nan")] == ["step-00000002"]


def test_a_step_can_be_skipped_on_all_ranks(outs):
    base, results = outs
    assert [result["step"] for result in results["skipped"]] == [3, 3]
    assert [result["moves"] for result in results["skipped"]] == [2, 2]
    assert [line["step"] for line in lines(base / "skipped")] == [1, 3]


def test_sigterm_to_one_rank_stops_all_after_the_same_step_and_resumes_bitwise(outs):
    base, results = outs
    assert [(r["step"], r["stopped_by"]) for r in results["stopped"]] == [(5, "SIGTERM")] * 2
    assert_bitwise(base / "fsdp", base / "stopped")


def test_a_run_is_signalled_and_resumed_at_its_end(outs):
    """There the ranks have to agree on who knows the validation losses."""
    _, results = outs
    signalled, resumed = results["signalled at its end"], results["resumed at its end"]
    assert [(r["step"], r["stopped_by"]) for r in signalled + resumed] == [(3, None)] * 4
    assert set(resumed[0]["validation"]) == {"full", "sparse"}
    assert all(r["validation"] == resumed[0]["validation"] for r in signalled + resumed)


def test_a_full_disk_on_one_rank_is_one_error_on_all(outs):
    base, results = outs
    for result in results["full disk"]:
        assert "step 2 cannot be written" in result["error"] and "No space left" in result["error"] and result["shared"]
    assert list((base / "full disk" / "checkpoints").iterdir()) == []


def test_a_killed_run_goes_on_bitwise(outs):
    base, _ = outs
    assert_bitwise(base / "ddp", base / "ddp again")


def test_one_rank_goes_on_as_two_and_two_as_one(outs, make, tmp_path):
    base, results = outs
    assert [result["step"] for result in results["1 to 2"]] == [STEPS, STEPS]
    assert_same_run(base / "single", base / "1 to 2")
    shutil.copytree(base / "fsdp", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    train(make(), tmp_path / "run", resume=True)
    assert_same_run(base / "single", tmp_path / "run")


def test_other_rows_a_step_are_refused(outs, make):
    from ssa.errors import UserError

    base, _ = outs
    with pytest.raises(UserError, match=r"a step has 2 rows .* and had 4"):
        train(make(batch_size=2, steps=STEPS + 1), base / "ddp", resume=True)


def test_ranks_that_do_not_fit(monkeypatch):
    from ssa.collectives import Ranks
    from ssa.config import TrainRecipe
    from ssa.errors import UserError
    from ssa.train.distributed import open_ranks
    from ssa.train.parallel import resolve_parallel, shard_ranks

    with (
        pytest.raises(UserError, match="context_parallel = 2 does not divide the 1 ranks"),
        open_ranks(TrainRecipe(context_parallel=2)),
    ):
        pass
    two = Ranks(torch.device("cpu"), 1, 4, 2)
    assert (two.main, two.data_rank, two.data_world, shard_ranks(TrainRecipe(), two)) == (False, 1, 4, 2)
    pairs = dataclasses.replace(two, rank=3, context_ranks=2)
    assert (pairs.data_rank, pairs.data_world, pairs.context_rank) == (1, 2, 1)
    with pytest.raises(UserError, match="shard_ranks = 3 does not divide"):
        shard_ranks(TrainRecipe(shard_ranks=3), two)
    assert resolve_parallel(TrainRecipe(), two, 10) == "ddp"
    on_gpu = dataclasses.replace(two, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80_000_000_000))
    assert [resolve_parallel(TrainRecipe(), on_gpu, n) for n in (60_000_000, 1_300_000_000)] == ["ddp", "fsdp"]
    assert resolve_parallel(TrainRecipe(parallel="fsdp"), Ranks(torch.device("cpu")), 10) == "none"


@pytest.mark.slow
def test_copies_of_parts_train_what_one_trains(make, tmp_path):
    """Four ranks as two groups of two; what they save, a file of each rank, goes on with one."""
    train(make(), tmp_path / "single")
    how = {"batch_size": 1, "parallel": "hsdp", "shard_ranks": 2, "save_every": 5}
    cuts = {
        "hsdp": {},
        "micro-batches": {"accumulation": 2, "batch_size": 1, "context_parallel": 2, "reduce_every_micro_batch": True},
    }
    jobs = [
        {"recipe": make(**how | cut).to_json(), "out": str(tmp_path / name), "file_bytes": 1000} for name, cut in cuts.items()
    ]
    results = run_ranks(jobs, world=4)
    assert [[job["step"] for job in rank] for rank in results] == [[STEPS] * 2] * 4
    for name in cuts:
        assert_same_run(tmp_path / "single", tmp_path / name)
        start = json.loads((tmp_path / name / "environment.json").read_text())["starts"][0]
        assert (start["ranks"], start["parallel"], start["tokens_per_step"]) == (4, "hsdp", 128)
    newest = find_checkpoints(tmp_path / "hsdp")[-1]
    assert (newest / "model-00004-of-00004.safetensors").is_file()
    shutil.rmtree(newest)
    assert train(make(), tmp_path / "hsdp", resume=True).step == STEPS
    assert_same_run(tmp_path / "single", tmp_path / "hsdp")


@pytest.mark.slow
def test_compiled_and_checkpointed_layers_on_two_ranks(make, tmp_path):
    """Traced and differentiated by the compiler, without code generation."""
    train(make(steps=3), tmp_path / "single")
    how = {"steps": 3, "batch_size": 2, "compile": True, "activation_checkpointing": True}
    recipes = {
        "ddp": make(**how),
        "fsdp": make(**how, parallel="fsdp"),
        "full": make(**how | {"recompute": "full"}, parallel="fsdp"),
        "context": make(**how | {"batch_size": 4}, context_parallel=2),
    }
    jobs = [{"recipe": r.to_json(), "out": str(tmp_path / name), "compiler": "aot_eager"} for name, r in recipes.items()]
    run_ranks(jobs)
    for name in recipes:
        assert_same_run(tmp_path / "single", tmp_path / name, step=3)
