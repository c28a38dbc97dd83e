import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ssa.collectives import Ranks
from ssa.config import TrainRecipe
from ssa.errors import UserError
from ssa.model import SSAForCausalLM
from ssa.runs.checkpoints import find_checkpoints, resolve_checkpoint
from ssa.train import trainer as module
from ssa.train.header import run_line, waiting_line
from ssa.train.loss import StepLoss, alignment_share, is_target
from ssa.train.trainer import train


def state(checkpoint):
    """Every tensor of a checkpoint, and its generators' JSON."""
    tensors = {f"{f.name}/{n}": t for f in checkpoint.glob("*.safetensors") for n, t in load_file(f).items()}
    return tensors, json.loads((checkpoint / "trainer.json").read_text())


def assert_same_state(a, b):
    (tensors, values), (others, other_values) = state(a), state(b)
    assert tensors.keys() == others.keys() and values == other_values
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def lines(out, kind="train"):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def timeless(rows):
    measured = {"tokens_per_second", "data_wait", "mfu", "peak_memory_gb"}
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def test_a_run_learns_and_leaves_what_it_promises(recipe, tmp_path, capsys):
    result = train(recipe(steps=30, eval_every=10), tmp_path / "run")
    assert result.step == 30 and result.stopped_by is None and result.checkpoint.name == "step-00000030"
    rows = lines(result.out)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {row["stream"] for row in rows} == {"full", "sparse"}
    assert rows[-1]["cross_entropy"] < 0.9 * rows[0]["cross_entropy"]
    for row in rows:
        assert row["sparsity_loss"] == pytest.approx(row["commitment_loss"], rel=1e-5)  # SmoothL1 is symmetric in value
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 10 * (row["sparsity_loss"] + row["commitment_loss"]), rel=1e-5)
        assert row["tokens"] == row["step"] * 64
    valid = lines(result.out, "valid")
    assert [row["step"] for row in valid] == [10, 20, 30]
    assert result.validation == {mode: valid[-1][mode] for mode in ("full", "sparse")}
    assert json.loads((result.out / "recipe.json").read_text()) == json.loads(recipe(steps=30, eval_every=10).to_json())
    environment = json.loads((result.out / "environment.json").read_text())["starts"][0]
    assert environment["versions"]["torch"] == torch.__version__ and environment["seed"] == 1
    work = environment["flops_per_token"]
    assert 0 < work["sparse"] < work["dense"] < work["matmul"] and work["compression"] == 0 and environment["peak_flops"] is None
    assert work["total"] == pytest.approx(sum(value for name, value in work.items() if name != "total"))
    assert "step 30/30" in capsys.readouterr().out
    card = (result.checkpoint / "README.md").read_text()
    losses = f"{result.validation['full']:.4f} full, {result.validation['sparse']:.4f} sparse"
    assert "| 30 of 30 steps, 1,920 tokens |" in card and f"| {losses} (nats a token) |" in card


def test_a_run_says_what_it_is_before_it_works_and_reports_its_first_step(recipe, tmp_path, capsys, monkeypatch):
    texts = tmp_path / "te\x1b[2Jxts"  # a name that clears a terminal is shown to it
    texts.mkdir()
    (texts / "text.txt").write_text("select, attend and align " * 200)
    (texts / "valid.txt").write_text("another document " * 20)
    r = recipe(steps=6, accumulation=2, method="moba")
    r = dataclasses.replace(r, data=dataclasses.replace(r.data, path=str(texts / "*.txt")))
    prepare, said_before = module.open_data, []
    monkeypatch.setattr(module, "open_data", lambda *a: said_before.append(capsys.readouterr().out) or prepare(*a))
    train(r, tmp_path / "run")
    assert said_before == [f"run {tmp_path / 'run'}: method moba, budget 2x4, 6 steps x 128 tokens in rows of 32, cpu, float32\n"]
    said = capsys.readouterr().out.splitlines()
    (model,) = [i for i, line in enumerate(said) if line.startswith("model: ")]
    count = sum(
        p.numel() for p in SSAForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000006").parameters()
    )
    assert (
        said[0].startswith("preparing ")
        and "/te\\x1b[2Jxts/*.txt into" in said[0]
        and said[model].startswith(f"model: {count:,} parameters, 2 layers of 32, 2 query and 1 key")
    )
    steps = [line for line in said[model:] if line.startswith("step ") and "loss" in line and "validation" not in line]
    assert [line.split()[1] for line in steps] == ["1/6", "4/6", "6/6"]
    assert ["eta" in line for line in steps] == [False, True, True]  # one step, the slowest, foretells nothing
    train(dataclasses.replace(r, train=dataclasses.replace(r.train, steps=8)), tmp_path / "run", resume=True)
    again = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in again if line.startswith("step ") and "lr" in line] == ["7/8", "8/8"]
    assert "8 steps x 128" in said_before[1] and [line.split()[0] for line in again[:2]] == ["model:", "resuming"]


def test_of_several_ranks_one_speaks(capsys):
    run = module._Run.__new__(module._Run)
    run.metrics = None
    for rank in (0, 1):
        run.ranks = Ranks(torch.device("cpu"), rank=rank, world=2)
        run._say(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


def test_why_the_first_step_takes_long_is_said(recipe):
    assert waiting_line(recipe(compile=True), torch.device("cpu")).startswith("compiling the model")
    assert waiting_line(recipe(), torch.device("cuda")).startswith("compiling the kernels")
    assert waiting_line(recipe(), torch.device("cpu")) is None
    two = run_line(recipe(batch_size=3), "runs/x", Ranks(torch.device("cuda"), world=4), "NVIDIA H200", torch.bfloat16)
    assert two == "run runs/x: method ssa, budget 2x4, 6 steps x 384 tokens in rows of 32, 4 x NVIDIA H200, bfloat16"


@pytest.mark.parametrize("method", ["full", "moba", "nsa"])
def test_other_methods_train_without_alignment(recipe, tmp_path, method):
    result = train(recipe(steps=2, method=method), tmp_path / "run")
    assert all(row["stream"] is None and row["sparsity_loss"] is None for row in lines(result.out))
    assert all(value > 0 for value in result.validation.values())


KILLED = """
import os, signal, sys, torch
sys.modules["torch.utils.tensorboard"] = None  # as in this process
from ssa.config import read_recipe
from ssa.data.prefetch import Prefetcher
from ssa.train.trainer import train
torch.set_num_threads(1)
get = Prefetcher.get
def kill_at_7(self, step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, step)
Prefetcher.get = kill_at_7
train(read_recipe(open(sys.argv[1]).read()), sys.argv[2])
"""


def test_killed_and_resumed_is_bitwise_uninterrupted(recipe, tmp_path):
    """Weights, optimizer, generators, data order and metrics, with accumulation."""
    r = recipe(steps=10, save_every=3, log_every=2, eval_every=5, accumulation=2)
    whole = train(r, tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(r.to_json())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.json"), str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert [p.name for p in find_checkpoints(tmp_path / "killed")] == ["step-00000003", "step-00000006"]
    resumed = train(r, tmp_path / "killed", resume=True)
    assert_same_state(whole.checkpoint, resumed.checkpoint)
    assert timeless(lines(whole.out)) == timeless(lines(resumed.out))
    assert lines(whole.out, "valid") == lines(resumed.out, "valid")
    assert len(json.loads((resumed.out / "environment.json").read_text())["starts"]) == 2


def test_sigterm_saves_and_resumes(recipe, tmp_path, monkeypatch, capsys):
    from ssa.data.prefetch import Prefetcher

    r = recipe(steps=6)
    whole = train(r, tmp_path / "whole")
    get = Prefetcher.get

    def signalled(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, step)

    monkeypatch.setattr(Prefetcher, "get", signalled)
    stopped = train(r, tmp_path / "run")
    assert (stopped.stopped_by, stopped.step, stopped.validation) == ("SIGTERM", 3, None)
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same_state(whole.checkpoint, train(r, tmp_path / "run", resume=True).checkpoint)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resuming_nothing_is_one_line(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "prepared" / "data").mkdir(parents=True)
    for name, why in (
        ("empty", "it is empty"),
        ("none", "no such directory"),
        ("prepared", "it holds nothing but prepared data"),
    ):
        with pytest.raises(UserError, match=f"no run to resume in .*{name}: {why}"):
            train(recipe(), tmp_path / name, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_mixture_is_what_the_model_reads(recipe, shards, tmp_path):
    """Rows of the mixture and no others; its shares are part of the run's data."""
    from ssa.data.prepare import prepare

    (tmp_path / "zeros.jsonl").write_text("".join(json.dumps({"text": "z" * 60}) + "\n" for _ in range(40)))
    prepare([tmp_path / "zeros.jsonl"], tmp_path / "zeros", valid_fraction=0, workers=1, show_progress=False)

    def of(**mixture):
        r = recipe(steps=12)
        return dataclasses.replace(r, data=dataclasses.replace(r.data, mixture={f"{tmp_path}/zeros": 1.0, **mixture}))

    alone = train(of(), tmp_path / "alone")
    losses = [row["cross_entropy"] for row in lines(alone.out)]
    assert losses[-1] < 0.5 * lines(train(recipe(steps=12), tmp_path / "plain").out)[-1]["cross_entropy"]
    assert alone.validation["full"] > 2 * losses[-1]  # validation text is data.path's
    mixed = of(**{str(shards): 1.0})
    assert train(mixed, tmp_path / "mixed").step == 12
    (tmp_path / "zeros.jsonl").write_text("".join(json.dumps({"text": "z" * 61}) + "\n" for _ in range(40)))
    prepare([tmp_path / "zeros.jsonl"], tmp_path / "zeros", valid_fraction=0, workers=1, show_progress=False, overwrite=True)
    with pytest.raises(UserError, match="is not what"):
        train(dataclasses.replace(mixed, train=dataclasses.replace(mixed.train, steps=13)), tmp_path / "mixed", resume=True)


@pytest.mark.parametrize("method", ["full", "ssa"])
def test_micro_batches_add_up_to_the_batch(recipe, tmp_path, method):
    """4 x 1 equals 1 x 4: rows have different numbers of targets, so the means must be weighted."""
    one = train(recipe(steps=3, batch_size=4, method=method), tmp_path / "one")
    four = train(recipe(steps=3, batch_size=1, accumulation=4, method=method), tmp_path / "four")
    for a, b in zip(lines(one.out), lines(four.out), strict=True):
        for name in ("loss", "cross_entropy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])


def test_the_rise_of_the_alignment_is_linear_from_0():
    def shares(warmup, steps=10):
        return [alignment_share(step, TrainRecipe(steps=steps, alignment_warmup=warmup)) for step in range(steps)]

    assert shares(0.4) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert shares(1.0) == pytest.approx([i / 10 for i in range(10)])
    assert shares(0.01) == [0] + [1] * 9  # some rise, however short
    assert shares(0.0, 1) == [1] and alignment_share(12, TrainRecipe(steps=10, alignment_warmup=1.0)) == 1


def test_without_a_warm_up_the_alignment_weighs_what_it_did(recipe, tmp_path, monkeypatch):
    """Bit for bit what a loss with a constant weight trains."""

    def constant(self, rows, stream, targets):
        inputs = {name: rows[name] for name in ("input_ids", "position_ids")}
        output = self.model.model(**inputs, use_cache=False, stream=stream, carry_alignment=False)
        own = torch.where(is_target(rows), rows["labels"][:, 1:], -100)
        nll = self.model.summed_nll(output.last_hidden_state, own) / targets
        loss = nll + self.alignment_weight / self.parts * output.alignment.sum()
        return loss, torch.cat([nll.detach().view(1), output.alignment.detach() / self.parts, nll.new_zeros(1)])

    now = train(recipe(steps=4, accumulation=2), tmp_path / "now")
    monkeypatch.setattr(StepLoss, "forward", constant)
    before = train(recipe(steps=4, accumulation=2), tmp_path / "before")
    assert_same_state(now.checkpoint, before.checkpoint)
    assert timeless(lines(now.out)) == timeless(lines(before.out))


def test_the_weight_of_the_alignment_rises(recipe, tmp_path):
    """In the logged loss and in the gradients, and however a step is cut."""
    how = {"steps": 5, "alignment_warmup": 0.8, "save_every": 1, "keep_last": 9}
    rising = train(recipe(**how), tmp_path / "rising")
    for row, share in zip(lines(rising.out), (0, 0.25, 0.5, 0.75, 1), strict=True):
        alignment = row["sparsity_loss"] + row["commitment_loss"]
        assert alignment > 0
        assert row["loss"] == pytest.approx(row["cross_entropy"] + share * 10 * alignment, rel=1e-5), row["step"]
    none = train(recipe(steps=5, alignment_weight=0.0, save_every=1, keep_last=9), tmp_path / "none")
    first, second, unaligned, later = (
        load_file(find_checkpoints(run.out)[i] / "model.safetensors") for run in (rising, none) for i in (0, 1)
    )
    assert all(torch.allclose(first[name], unaligned[name], rtol=1e-5, atol=1e-7) for name in first)
    assert not all(torch.allclose(second[name], later[name], rtol=1e-5, atol=1e-7) for name in first)
    cut = train(recipe(**how, batch_size=1, accumulation=2), tmp_path / "cut")
    for a, b in zip(lines(rising.out), lines(cut.out), strict=True):
        for name in ("loss", "sparsity_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])


def test_a_resumed_run_goes_on_with_the_rise(recipe, tmp_path):
    import shutil

    r = recipe(steps=6, alignment_warmup=1.0, save_every=3)
    whole = train(r, tmp_path / "whole")
    shutil.copytree(whole.out, tmp_path / "run")
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    resumed = train(r, tmp_path / "run", resume=True)
    assert_same_state(whole.checkpoint, resumed.checkpoint)
    assert timeless(lines(whole.out)) == timeless(lines(resumed.out))
    with pytest.raises(UserError, match=r"train.alignment_warmup = 0.5 differs from the run's 1.0"):
        train(recipe(steps=6, alignment_warmup=0.5, save_every=3), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change, said",
    [({"method": "moba"}, True), ({"alignment_loss": "none"}, True), ({"alignment_weight": 0.0}, True), ({}, False)],
)
def test_a_warm_up_of_no_alignment_is_said_to_have_no_effect(recipe, tmp_path, capsys, change, said):
    train(recipe(steps=1, alignment_warmup=0.5, **change), tmp_path / "run")
    assert ("train.alignment_warmup = 0.5 has no effect" in capsys.readouterr().out) is said


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_moves_nothing(recipe, tmp_path, monkeypatch, accumulation):
    from ssa.model import SSAForCausalLM

    moves = []
    optimizer_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (moves.append(1), optimizer_step(self, *a)))
    summed_nll, calls = SSAForCausalLM.summed_nll, []

    def poisoned(self, *args):
        calls.append(1)
        return summed_nll(self, *args) * (float("nan") if len(calls) == 3 * accumulation else 1)

    monkeypatch.setattr(SSAForCausalLM, "summed_nll", poisoned)
    with pytest.raises(UserError, match=r"loss is nan at step 3 .*before the weights moved") as caught:
        train(recipe(steps=6, save_every=2, accumulation=accumulation), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert len(moves) == 2
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    assert resolve_checkpoint(tmp_path / "run").name == "step-00000002"
    monkeypatch.undo()
    assert train(recipe(steps=6, save_every=2, accumulation=accumulation), tmp_path / "run", resume=True).step == 6


def test_a_gradient_that_is_not_finite_stops_too(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Run, "_gradient_norm", lambda self, clip: torch.tensor(float("inf")))
    with pytest.raises(UserError, match="grad_norm is inf at step 1 "):
        train(recipe(), tmp_path / "run")


def test_on_a_device_the_optimizer_itself_skips_from_the_bad_step_on(recipe, tmp_path, monkeypatch):
    """What CUDA does, acted out on the CPU: nobody looks at step 3's loss before step 6's log, and yet the weights stay those of step 2."""
    init, runs = module._Run.__init__, []

    def on_device(self, *args):
        init(self, *args)
        self.found_inf = self.optimizer.found_inf = torch.zeros(())
        runs.append(self)

    step = module._Run._step

    def poisoned(self, number):
        if number == 2:
            with monkeypatch.context() as patch:
                patch.setattr(self, "_gradient_norm", lambda clip: torch.tensor(float("nan")))
                return step(self, number)
        return step(self, number)

    monkeypatch.setattr(module._Run, "__init__", on_device)
    monkeypatch.setattr(module._Run, "_step", poisoned)
    with pytest.raises(UserError, match="grad_norm is nan at step 3 "):
        train(recipe(steps=8, log_every=6), tmp_path / "run")
    monkeypatch.undo()
    clean = train(recipe(steps=8, log_every=6, save_every=2, keep_last=9), tmp_path / "clean")
    weights = load_file(clean.out / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(weights[name], p) for name, p in runs[0].model.named_parameters())


@pytest.mark.gpu
def test_a_gpu_run_resumes(recipe, tmp_path):
    r = recipe(steps=6, save_every=3, device="cuda", log_every=5)
    whole = train(r, tmp_path / "run")
    rows = lines(whole.out)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]
    assert json.loads((whole.out / "environment.json").read_text())["starts"][0]["dtype"] == "bfloat16"
    import shutil

    shutil.rmtree(whole.checkpoint)
    again = train(r, tmp_path / "run", resume=True)
    assert lines(again.out)[-1]["cross_entropy"] == pytest.approx(rows[-1]["cross_entropy"], rel=1e-2)


def test_directories_that_are_not_free(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe(steps=1), out)
    with pytest.raises(UserError, match="pass --resume or --overwrite"):
        train(recipe(steps=1), out)
    with pytest.raises(UserError, match="exclude each other"):
        train(recipe(steps=1), out, resume=True, overwrite=True)
    with pytest.raises(UserError, match=r"model.hidden_size = 64 differs from the run's 32"):
        train(recipe(steps=1, hidden_size=64), out, resume=True)
    with pytest.raises(UserError, match=r"train.lr = 0.5 differs"):
        train(recipe(steps=1, lr=0.5), out, resume=True)
    assert train(recipe(steps=2, save_every=1, eval_every=1, log_every=1), out, resume=True).step == 2
    with pytest.raises(UserError, match=r"train.steps = 1 lies before the run's step 2"):
        train(recipe(steps=1), out, resume=True)
    assert train(recipe(steps=1, lr=0.5), out, overwrite=True).step == 1
    assert [p.name for p in find_checkpoints(out)] == ["step-00000001"]
    for change in ({"init_from": str(out)}, {"init_from": str(out / "checkpoints" / "step-00000001")}):
        with pytest.raises(UserError, match="which --overwrite would empty"):
            train(dataclasses.replace(recipe(), model=dataclasses.replace(recipe().model, **change)), out, overwrite=True)
    assert [p.name for p in find_checkpoints(out)] == ["step-00000001"]
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="no run"):
            train(recipe(), foreign, **flags)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="cannot be written"):
        train(recipe(), foreign / "thesis.tex")


@pytest.mark.parametrize(
    "table, change, says",
    [
        ("train", {"track": "wandb"}, 'train.track = "wandb" needs wandb'),
        ("data", {"path": "nowhere.txt"}, "no such file or directory: nowhere.txt"),
        ("data", {"path": "builtin:python", "tokenizer": "nowhere"}, "no tokenizer at nowhere"),
        ("model", {"init_from": "nowhere"}, "no model at nowhere"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_deleted_or_written(recipe, tmp_path, monkeypatch, table, change, says):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = train(recipe(steps=1), tmp_path / "run")
    r = recipe(steps=1)
    r = dataclasses.replace(r, **{table: dataclasses.replace(getattr(r, table), **change)})
    for name, overwrite in (("run", True), ("new", False)):
        with pytest.raises(UserError, match=says):
            train(r, tmp_path / name, overwrite=overwrite)
    assert resolve_checkpoint(tmp_path / "run") == done.checkpoint and not (tmp_path / "new").exists()


def test_one_process_says_that_it_shares_nothing(recipe, tmp_path, capsys):
    train(recipe(steps=1, parallel="fsdp"), tmp_path / "run")
    assert "one process: train.parallel = 'fsdp' has no effect" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][0]["parallel"] == "none"
    train(recipe(steps=2), tmp_path / "run", resume=True)
    assert "no effect" not in capsys.readouterr().out


def test_a_second_writer_is_refused(recipe, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            train(recipe(), tmp_path / "run")


def test_resume_notices_other_data(recipe, shards, tmp_path):
    import shutil

    shutil.copytree(shards, tmp_path / "data")
    r = recipe(steps=1)
    r = dataclasses.replace(r, data=dataclasses.replace(r.data, path=str(tmp_path / "data")))
    train(r, tmp_path / "run")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    (tmp_path / "data" / "index.json").write_text(json.dumps(index, indent=7))
    with pytest.raises(UserError, match="is not what"):
        train(dataclasses.replace(r, train=dataclasses.replace(r.train, steps=2)), tmp_path / "run", resume=True)


def test_a_full_disk_while_logging_is_one_line(recipe, tmp_path, monkeypatch):
    from ssa.train.metrics import Metrics

    def full(self, lines):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Metrics, "_write", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        train(recipe(), tmp_path / "run")


def test_going_on_from_a_checkpoint_with_another_method(recipe, tmp_path, capsys):
    base = train(recipe(steps=2, method="full"), tmp_path / "base")
    r = recipe(steps=1, method="ssa", init_from=str(base.out), hidden_size=64, num_selected_blocks=3, rope_factor=4.0)
    result = train(r, tmp_path / "more")
    assert f"model.rope_factor = 4 scales the positions of {base.out}; 1 keeps them as they are" in capsys.readouterr().out
    config = json.loads((result.checkpoint / "config.json").read_text())
    assert (config["method"], config["hidden_size"], config["num_selected_blocks"]) == ("ssa", 32, 3)
    assert config["rope_parameters"]["factor"] == 4.0 and config["attention_mode"] == "sparse"
    start, end = (load_file(run.checkpoint / "model.safetensors") for run in (base, result))
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (start[name] - end[name]).abs().max() < 0.05  # one step away, not a new model
    with pytest.raises(UserError, match=r"gates differ|cannot be loaded"):
        train(recipe(method="nsa", init_from=str(base.out)), tmp_path / "nsa")
    with pytest.raises(UserError, match="not a directory"):
        train(recipe(init_from="nowhere"), tmp_path / "none")


def test_activation_checkpointing_changes_nothing(recipe, tmp_path):
    plain = train(recipe(steps=2), tmp_path / "plain")
    saving = train(recipe(steps=2, activation_checkpointing=True), tmp_path / "saving")
    assert_same_state(plain.checkpoint, saving.checkpoint)


def test_bfloat16_keeps_weights_in_float32(recipe, tmp_path):
    result = train(recipe(steps=2, dtype="bfloat16"), tmp_path / "run")
    assert {t.dtype for t in load_file(result.checkpoint / "model.safetensors").values()} == {torch.float32}
    assert lines(result.out)[0]["loss"] != lines(train(recipe(steps=2), tmp_path / "exact").out)[0]["loss"]


def test_bad_device_and_vocabulary(recipe, tmp_path):
    with pytest.raises(UserError, match="tpu"):
        train(recipe(device="tpu"), tmp_path / "a")
    with pytest.raises(UserError, match=r"model.vocab_size = 100 is smaller"):
        train(recipe(vocab_size=100), tmp_path / "b")
    assert train(recipe(steps=1), tmp_path / "b").step == 1  # the failed start left nothing in the way


def test_probes_and_verified_data(recipe, shards, tmp_path):
    import shutil

    shutil.copytree(shards, tmp_path / "data")
    r = recipe(steps=4, probe_every=2, verify_data=True)
    r = dataclasses.replace(r, data=dataclasses.replace(r.data, path=str(tmp_path / "data")))
    result = train(r, tmp_path / "run")
    probes = lines(result.out, "probe")
    assert [line["step"] for line in probes] == [2, 4] and 0 < probes[0]["kept_mass_full"] <= 1
    assert all(row["data_wait"] >= 0 for row in lines(result.out))
    (damaged,) = (tmp_path / "data").glob("valid-*.tokens.npy")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        train(r, tmp_path / "again")
    train(
        dataclasses.replace(r, train=dataclasses.replace(r.train, verify_data=False, probe_every=0, steps=1)), tmp_path / "again"
    )


def test_a_spike_is_skipped_and_said(recipe, tmp_path, monkeypatch, capsys):
    """The weights of the skipped step are those before it, and its optimizer state, too."""
    from ssa.train import skip_step

    monkeypatch.setattr(skip_step, "WARMUP", 2)
    norm, calls = module._Run._gradient_norm, []

    def spiked(self, clip):
        calls.append(1)
        return norm(self, clip) * (1e6 if len(calls) == 4 else 1)

    monkeypatch.setattr(module._Run, "_gradient_norm", spiked)
    r = recipe(steps=4, skip_spikes=6.0, save_every=3, keep_last=9)
    result = train(r, tmp_path / "run")
    assert [row["step"] for row in lines(result.out)] == [1, 2, 3]
    assert "step 4 skipped: spike" in capsys.readouterr().out
    before, after = (state(checkpoint)[0] for checkpoint in find_checkpoints(result.out))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
