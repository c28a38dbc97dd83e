"""`ssa bench train` with a tiny recipe on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssa.bench import train
from ssa.bench.llama import LlamaLoss, llama_like
from ssa.bench.rows import make_rows
from ssa.bench.train import PlainLoss, plan, step_flops, stream_of
from ssa.bench.train_bars import train_bars
from ssa.cli import main
from ssa.testing import tiny_config, tiny_model
from ssa.train.flops import training_flops

TINY = ["tiny", "--data.context", "48", "--train.batch-size", "1", "--model.num-hidden-layers", "2", "--model.hidden-size", "32",
        "--model.head-dim", "8", "--model.intermediate-size", "48", "--train.device", "cpu"]  # fmt: skip


def test_every_variant_in_one_run(tmp_path, capsys):
    out = tmp_path / "train.json"
    status = main(
        ["bench", "train", *TINY, "--variants", "full,moba,nsa,ssa,llama,llama-bf16", "--seconds", "0.001", "--out", str(out)]
    )
    data = json.loads(out.read_text())
    assert status == 0, data["rows"]
    assert len(data["rows"]) == 6 and data["recipe"]["data"]["context"] == 48
    for row in data["rows"]:
        assert row["tokens_per_second"] == pytest.approx(48 * 1000 / row["ms_per_step"])
        assert row["flops_per_token"]["total"] == sum(n for part, n in row["flops_per_token"].items() if part != "total")
        assert row["tokens_per_step"] == 48 and row["steps"] >= 4 and row["steps"] % 2 == 0 and row["mfu"] is None
        assert 4 < row["loss"] < 8 or row["variant"] == "ssa"
    matmul = {row["variant"]: row["flops_per_token"]["matmul"] for row in data["rows"]}
    assert matmul["nsa"] > matmul["full"] > matmul["llama"] == matmul["llama-bf16"]  # three gates, one, none
    assert [bar["value"] is not None for bar in data["bars"]] == [True, True, True, False]
    assert "ssa's tokens/s / full's" in capsys.readouterr().out


def test_packed_rows(tmp_path):
    out = tmp_path / "train.json"
    assert (
        main(["bench", "train", *TINY, "--variants", "ssa,llama", "--rows", "packed", "--seconds", "0.001", "--out", str(out)])
        == 0
    )
    data = json.loads(out.read_text())
    assert [(row["variant"], row["rows"]) for row in data["rows"]] == [("ssa", "packed"), ("llama", "packed")]
    assert all(bar["value"] is None for bar in data["bars"])  # they are about plain rows


def test_a_loss_that_is_not_finite_has_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "gradient_norm", lambda parameters, clip: [p.data.fill_(math.nan) for p in parameters])
    out = tmp_path / "train.json"
    assert main(["bench", "train", *TINY, "--variants", "full", "--seconds", "0.001", "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert "loss is nan" in row["error"] and "tokens_per_second" not in row


def test_a_spent_budget_skips_and_says_so(tmp_path):
    out = tmp_path / "train.json"
    main(["bench", "train", *TINY, "--variants", "full,ssa", "--budget-seconds", "1e-9", "--out", str(out)])
    data = json.loads(out.read_text())
    assert not data["rows"] and data["skipped"][1].startswith("ssa, plain rows, 1 rank")


@pytest.mark.parametrize(
    "words, says",
    [
        (("full,fool", "plain", 1.0, ""), "fool"),
        (("full", "packt", 1.0, ""), "packt"),
        (("full", "plain", 0.0, ""), "--seconds"),
        (("", "plain", 1.0, ""), "--variants"),
        (("full", "plain", 1.0, "", "fsdp,zero"), "--sharing 'zero'"),
    ],
)
def test_words_that_mean_nothing(words, says):
    with pytest.raises(ValueError, match=says):
        plan(*words)


def test_it_builds_new_models_only(capsys):
    assert main(["bench", "train", *TINY, "--model.init-from", "x"]) == 2
    assert "init_from" in capsys.readouterr().err


def test_one_rank_has_nobody_to_share_with(capsys):
    assert main(["bench", "train", *TINY, "--sharing", "fsdp"]) == 2
    assert "--sharing fsdp needs several ranks; start with torchrun" in capsys.readouterr().err


def ranks_bench(tmp_path, *arguments):
    """The JSON of `torchrun --nproc-per-node 2 -m ssa bench train` on the CPU."""
    out = tmp_path / "train.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ssa",
        "bench",
        "train",
    ]
    source = str(Path(train.__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, *TINY, "--seconds", "0.001", "--out", str(out), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_ranks_share_the_model_in_every_way_asked_for(tmp_path):
    data = ranks_bench(tmp_path, "--variants", "ssa", "--sharing", "fsdp-kept,fsdp,ddp")
    assert [(r["variant"], r["ranks"], r["parallel"], r["reshard_after_forward"]) for r in data["rows"]] == [
        ("ssa", 1, "none", None), ("ssa", 2, "fsdp", False), ("ssa", 2, "fsdp", True), ("ssa", 2, "ddp", None)
    ]  # fmt: skip
    assert [r["tokens_per_step"] for r in data["rows"]] == [48, 96, 96, 96]
    first, *others = (r["loss"] for r in data["rows"][1:])
    assert others == pytest.approx([first] * 2, rel=1e-4)  # the same rows and weights, however they are kept
    (bar,) = [bar for bar in data["bars"] if "FSDP2" in bar["name"]]
    speeds = [r["tokens_per_second"] for r in data["rows"]]
    assert bar["value"] == pytest.approx(max(speeds[1:3]) / speeds[0])
    assert data["command"].startswith("torchrun --nproc-per-node 2 -m ssa bench train tiny")


@pytest.mark.slow
def test_two_ranks_share_each_row(tmp_path):
    data = ranks_bench(
        tmp_path, "--variants", "ssa", "--rows", "plain,packed", "--train.context-parallel", "2", "--sharing", "ddp"
    )
    assert [(r["rows"], r["ranks"], r["context_parallel"], r["tokens_per_step"]) for r in data["rows"]] == [
        ("plain", 1, 1, 48), ("plain", 2, 2, 48), ("packed", 1, 1, 48), ("packed", 2, 2, 48)
    ]  # fmt: skip
    for alone, shared in zip(data["rows"][::2], data["rows"][1::2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=0.02)  # each rank's mean counts half, whatever its targets
    assert all(bar["value"] is None for bar in data["bars"])


def test_streams_take_turns():
    assert [stream_of(i, 0.5) for i in range(4)] == ["sparse", "full"] * 2
    assert [stream_of(i, 0.25) for i in range(8)].count("full") == 2
    assert {stream_of(i, 1.0) for i in range(5)} == {"full"} and {stream_of(i, 0.0) for i in range(5)} == {"sparse"}


def test_llama_is_the_same_model_and_its_chunked_loss_the_same_loss(monkeypatch):
    """Full attention without a gate is a Llama: with one's weights the other has the same loss and gradients."""
    monkeypatch.setattr("ssa.bench.llama.LOSS_TOKENS", 7)
    ours = tiny_model("full", attention_gate=False).train()
    llama = llama_like(tiny_config("full"))
    llama.load_state_dict(ours.state_dict())
    for layout in ("plain", "packed"):
        rows = make_rows(None, 258, 40, 2, layout, seed=3)[0]
        targets = train._targets(rows)
        wanted = ours(**rows, use_cache=False).loss
        loss, _ = LlamaLoss(llama)(rows, None, targets)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        grads = [torch.autograd.grad(x, m.model.layers[0].mlp.up_proj.weight)[0] for x, m in ((loss, llama), (wanted, ours))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_plain_loss_is_the_packed_loss_of_one_document():
    model = tiny_model("ssa").train()
    rows = make_rows(None, 258, 40, 2, "plain", seed=3)[0]
    packed = rows | {"position_ids": torch.arange(40).expand(2, 40)}
    plain, _ = PlainLoss(model, model.config.alignment_weight, 1)(rows, "full", train._targets(rows))
    whole, _ = train.StepLoss(model, model.config.alignment_weight, 1)(packed, "full", train._targets(packed))
    assert plain.item() == pytest.approx(whole.item(), rel=1e-5)


def test_random_rows():
    packed, plain = make_rows(None, 100, 512, 3, "packed", seed=1), make_rows(None, 100, 512, 3, "plain", seed=1)
    assert len(packed) == 4 and "position_ids" not in plain[0]
    assert torch.equal(packed[0]["input_ids"], plain[0]["input_ids"]) and packed[0]["input_ids"].max() < 100
    positions = torch.cat([batch["position_ids"] for batch in packed])
    assert (positions[:, 0] == 0).all() and ((positions == 0).sum(1) > 1).any()  # several documents in some row
    assert not torch.equal(packed[0]["input_ids"], make_rows(None, 100, 512, 3, "packed", seed=1, rank=1)[0]["input_ids"])


def test_flops_are_the_mean_of_the_streams_in_their_shares():
    position = torch.arange(10)[None]
    ablated = {"alignment_loss": "none", "full_ratio": 0.25}
    flops = step_flops(tiny_config("ssa", **ablated), position)
    full, sparse = (training_flops(tiny_config("ssa", **ablated), position, stream) for stream in ("full", "sparse"))
    assert flops["dense"] == pytest.approx(full["dense"] / 4) and flops["sparse"] == pytest.approx(0.75 * sparse["sparse"])
    aligned = tiny_config("ssa")
    assert step_flops(aligned, position) == pytest.approx(training_flops(aligned, position))


def test_bars_from_rows():
    def row(variant, speed, ranks=1, parallel="none", layout="plain"):
        return {"variant": variant, "rows": layout, "ranks": ranks, "parallel": parallel, "tokens_per_second": speed}

    rows = [row("full", 105.0), row("moba", 90.0), row("ssa", 92.4), row("llama", 100.0), row("ssa", 171.0, 2, "fsdp"), row("full", 190.0, 2, "ddp"),
            {"variant": "nsa", "rows": "plain", "ranks": 1, "error": "out of memory"}]  # fmt: skip
    bars = {bar.name: bar.to_dict() for bar in train_bars(rows)}
    assert [round(bar["value"], 3) for bar in bars.values()] == [0.88, 1.027, 1.05, 1.851]
    assert all(bar["reached"] for bar in bars.values())
    faster = [*rows, row("ssa", 180.0, 2, "fsdp"), row("ssa", 500.0, 2, "fsdp") | {"context_parallel": 2}]
    assert train_bars(faster)[-1].value == pytest.approx(180 / 92.4)  # the better setting; shared rows are another matter
    without = train_bars(rows[:2])
    assert [bar.value for bar in without] == [None] * 4
