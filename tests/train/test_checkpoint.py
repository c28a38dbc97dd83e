import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ssa.collectives import Ranks
from ssa.errors import UserError
from ssa.model import safetensors_file as module
from ssa.runs import checkpoints as checkpoint_module
from ssa.runs.checkpoints import (
    find_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    read_metadata,
    resolve_checkpoint,
    verify_checkpoint,
)
from ssa.testing import save_checkpoint, tiny_model
from ssa.train import checkpoint
from ssa.train import saver as saver_module
from ssa.train.checkpoint import file_names, load_checkpoint, writer_of
from ssa.train.saver import Saver


def trained(seed=0, steps=2, **changes):
    """A tiny model and its optimizer after a few steps."""
    model = tiny_model(seed=seed, **changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_everything_comes_back(tmp_path, tied):
    model, optimizer = trained(tie_word_embeddings=tied)
    path = save_checkpoint(tmp_path, 2, model, None, optimizer, {"note": [1, "x"]})
    drawn = torch.rand(3), np.random.rand(3)
    other, blank = trained(seed=5, steps=0, tie_word_embeddings=tied)
    assert load_checkpoint(path, other, blank) == {"note": [1, "x"], "step": 2}
    again = torch.rand(3), np.random.rand(3)
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, blank.state[b][key]), (name, key)


def test_it_is_a_model_directory_without_pickles(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ssa.model  # noqa: F401  (registers the model)
    from ssa.data.tokenizer import byte_tokenizer

    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 2, model, byte_tokenizer(), optimizer, {})
    ids = torch.arange(12)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(path).decode(AutoTokenizer.from_pretrained(path).encode("añ")) == "añ"
    assert {p.suffix for p in path.iterdir()} <= {".json", ".safetensors", ".md", ".py"}


def test_only_the_last_are_kept_and_foreign_directories_stay(tmp_path):
    model, optimizer = trained()
    (tmp_path / "checkpoints" / "mine").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000001.tmp-99999").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, None, optimizer, {}, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["mine", "step-00000002", "step-00000003"]
    with pytest.raises(UserError, match="exists already"):
        save_checkpoint(tmp_path, 3, model, None, optimizer, {})


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named_and_changes_nothing(tmp_path, damage):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 2, model, None, optimizer, {})
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink() if damage == "delete" else file.write_bytes(content if damage == "flip" else content[:-1])
    other, blank = trained(seed=5, steps=0)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match=r"damaged: .*optimizer\.safetensors") as caught:
        load_checkpoint(path, other, blank)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 2, model, None, optimizer, {})
    with pytest.raises(UserError, match="does not fit the model"):
        load_checkpoint(path, tiny_model(hidden_size=64, head_dim=16))
    with pytest.raises(UserError, match=r"has no tensor 'model.layers.2"):
        load_checkpoint(path, tiny_model(num_hidden_layers=3))


@pytest.mark.parametrize("where", ["config", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_error_and_costs_nothing(tmp_path, monkeypatch, where, number):
    model, optimizer = trained()
    kept = save_checkpoint(tmp_path, 1, model, None, optimizer, {})

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    if where == "config":
        monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    else:
        monkeypatch.setattr(module.os, where, fail)
    with pytest.raises(UserError, match=rf"step 2 cannot be written .*{os.strerror(number)}"):
        save_checkpoint(tmp_path, 2, model, None, optimizer, {}, keep_last=1)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [kept.name]
    verify_checkpoint(kept)
    assert save_checkpoint(tmp_path, 2, model, None, optimizer, {}).name == "step-00000002"


KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
from ssa.testing import save_checkpoint, tiny_model
from ssa.runs.checkpoints import find_checkpoints
from ssa.train.checkpoint import load_checkpoint
from ssa.collectives import Ranks
from ssa.train.saver import Saver

torch.set_num_threads(1)
run, background = Path(sys.argv[1]), sys.argv[2] == "background"
model = tiny_model(hidden_size=128, intermediate_size=256)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
optimizer.step()
save_checkpoint(run, 1, model, None, optimizer, {})
clock = time.perf_counter()
save_checkpoint(run, 2, model, None, optimizer, {})
duration = time.perf_counter() - clock
source = random.Random(0)
def unfinished():
    return {p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")}
torn = 0
for trial in range(10):
    before = unfinished()
    child = os.fork()
    if child == 0:
        step = int(find_checkpoints(run)[-1].name[5:])
        saver = Saver(run, Ranks(torch.device("cpu")), background=background)
        while True:
            step += 1
            saver.save(step, model, optimizer, {"trial": trial})
    while True:  # hold it at any moment until that is one within a save
        time.sleep(duration * source.uniform(0, 1))
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if unfinished() - before:
            break
        os.kill(child, signal.SIGCONT)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += bool(unfinished() - before)
    load_checkpoint(find_checkpoints(run)[-1], model, optimizer)
print("survived", trial + 1, "torn", torn)
"""


@pytest.mark.parametrize("how", ["at once", pytest.param("background", marks=pytest.mark.slow)])
def test_ten_kills_while_saving(tmp_path, how):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), how], capture_output=True, text=True)
    assert done.stdout == "survived 10 torn 10\n", done.stderr


def test_resolve(tmp_path):
    model, optimizer = trained()
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", step, model, None, optimizer, {})
    first, second = find_checkpoints(tmp_path / "run")
    assert resolve_checkpoint(tmp_path / "run") == second
    assert resolve_checkpoint(str(first)) == first
    model.save_pretrained(tmp_path / "plain")
    assert resolve_checkpoint(tmp_path / "plain") == tmp_path / "plain"
    (second / "checkpoint.json").unlink()
    assert resolve_checkpoint(tmp_path / "run") == first
    with pytest.raises(UserError, match="incomplete"):
        resolve_checkpoint(second)
    shutil.rmtree(first)
    with pytest.raises(UserError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        resolve_checkpoint(tmp_path / "empty")
    with pytest.raises(UserError, match="not a directory"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "plain" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        resolve_checkpoint(tmp_path / "plain")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
        "[" * 10**5,
        '{"format": 1, "step": 1, "versions": {}, "files": {"..": {"bytes": 4096, "sha256": "' + "0" * 64 + '"}}}',
    ],
)
def test_hostile_metadata_is_an_incomplete_checkpoint(tmp_path, text):
    path = tmp_path / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text(text)
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(UserError, match="incomplete"):
        verify_checkpoint(path)


def test_every_byte_of_the_metadata_counts(tmp_path):
    path = save_checkpoint(tmp_path, 2, tiny_model(), None, None, {})
    file = path / "checkpoint.json"
    whole = file.read_bytes()
    assert read_metadata(path)["step"] == 2
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"checkpoint\.json"):
            read_metadata(path)


def test_metadata_of_old_has_no_hash_of_its_own(tmp_path):
    path = save_checkpoint(tmp_path, 2, tiny_model(), None, None, {})
    metadata = json.loads((path / "checkpoint.json").read_text())
    del metadata["sha256"]
    (path / "checkpoint.json").write_text(json.dumps(metadata))
    assert verify_checkpoint(path)["step"] == 2
    (path / "checkpoint.json").write_text(json.dumps(metadata | {"format": 9}))
    with pytest.raises(UserError, match="has format 9; this version reads format 1"):
        verify_checkpoint(path)


def test_files_are_hashed_once_unless_they_change(tmp_path, monkeypatch, capsys):
    path = save_checkpoint(tmp_path, 2, tiny_model(), None, None, {})
    hashed = []
    monkeypatch.setattr(
        checkpoint_module,
        "sha256_of_file",
        lambda file, real=checkpoint_module.sha256_of_file: hashed.append(file.name) or real(file),
    )
    written = sorted(file.stat().st_ctime_ns for file in path.iterdir())
    monkeypatch.setattr(checkpoint_module.time, "time_ns", lambda: written[0] + 10**9)
    for _ in range(2):  # written a moment ago: they could change once more without its showing
        hashed.clear()
        verify_checkpoint(path)
        assert sorted(hashed) == sorted(read_metadata(path)["files"])
    monkeypatch.setattr(checkpoint_module.time, "time_ns", lambda: written[-1] + 3 * 10**9)
    verify_checkpoint(path)
    hashed.clear()
    verify_checkpoint(path)
    assert hashed == []
    content = (path / "config.json").read_bytes()
    (path / "config.json").write_bytes(content[:-2] + b" }")
    with pytest.raises(UserError, match=r"config\.json does not match its hash"):
        verify_checkpoint(path)
    assert hashed == ["config.json"]
    (path / "config.json").write_bytes(content)
    monkeypatch.setattr(checkpoint_module, "SAID_BYTES", 1)
    checkpoint_module._say.cache_clear()
    verify_checkpoint(path)
    assert "ssa: checking the hashes of 0.0 GB in" in capsys.readouterr().err


def test_latest_leads_to_the_newest_and_goes_where_the_run_goes(tmp_path):
    from transformers import AutoModelForCausalLM

    import ssa.model  # noqa: F401  (registers the model)

    model, optimizer = trained()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run", step, model, None, optimizer, {}, keep_last=1)
        assert os.readlink(tmp_path / "run" / "latest") == os.path.join("checkpoints", f"step-0000000{step}")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "latest"}
    (tmp_path / "run").rename(tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "latest")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    newest = tmp_path / "moved" / "checkpoints" / "step-00000003"
    assert open_checkpoint(tmp_path / "moved" / "latest") == newest == newest_checkpoint(tmp_path / "moved")
    (tmp_path / "moved" / "latest").unlink()
    (tmp_path / "moved" / "latest").mkdir()
    (tmp_path / "moved" / "latest" / "mine").touch()
    save_checkpoint(tmp_path / "moved", 4, model, None, optimizer, {})
    assert (tmp_path / "moved" / "latest" / "mine").exists()


def test_where_no_links_can_be_made_there_is_none(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", fail)
    path = save_checkpoint(tmp_path, 1, tiny_model(), None, None, {})
    assert open_checkpoint(tmp_path) == path and [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_hostile_state_is_one_line(tmp_path):
    """Hashes fit, content does not: whoever wrote the checkpoint wrote the hashes."""
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 2, model, None, optimizer, {})
    state = json.loads((path / "trainer.json").read_text())
    for change, says in (
        ({"step": "2"}, "step = '2' is not int"),
        ({"extra": []}, "extra = \\[\\] is not an object"),
        ({"rng": {"numpy": ["MT19937", [1e300]]}}, "no state of the random generators"),
        ({"rng": {}}, "no state of the random generators"),
    ):
        (path / "trainer.json").write_text(json.dumps(state | change))
        metadata = read_metadata(path)
        metadata["files"]["trainer.json"] = {
            "bytes": (path / "trainer.json").stat().st_size, "sha256": checkpoint_module.sha256_of_file(path / "trainer.json")
        }  # fmt: skip
        del metadata["sha256"]
        (path / "checkpoint.json").write_text(checkpoint_module.metadata_text(metadata))
        with pytest.raises(UserError, match=says) as caught:
            load_checkpoint(path, *trained(steps=0))
        assert "\n" not in str(caught.value)


def test_metadata_names_versions(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 7, model, None, optimizer, {})
    metadata = json.loads((path / "checkpoint.json").read_text())
    assert metadata["step"] == 7 and metadata["versions"]["torch"] == torch.__version__
    assert set(metadata["files"]) == {p.name for p in path.iterdir()} - {"checkpoint.json"}


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    model, optimizer = trained()
    before = [p.clone() for p in model.parameters()]
    saver = Saver(tmp_path, Ranks(torch.device("cpu")), background=True)
    saver.save(2, model, optimizer, {})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert saver.pending == 2
    saver.finish()
    assert (saver.pending, saver.newest) == (None, tmp_path / "checkpoints" / "step-00000002")
    load_checkpoint(saver.newest, model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_background_failure_is_told_when_the_save_is_finished(tmp_path, monkeypatch):
    model, optimizer = trained()
    saver = Saver(tmp_path, Ranks(torch.device("cpu")), background=True)
    saver.save(1, model, optimizer, {})

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    while saver.writing:
        time.sleep(0.01)
    monkeypatch.setattr(saver_module, "write_safetensors", fail)
    saver.save(2, model, optimizer, {})  # completes the first
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step-00000001"]
    with pytest.raises(UserError, match=r"step 2 cannot be written .*No space left"):
        saver.finish()
    monkeypatch.undo()
    saver.save(3, model, optimizer, {})
    saver.finish()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def test_files_of_a_large_state(monkeypatch):
    tensors = {name: torch.empty(size) for name, size in [("a", 100), ("b", 50), ("c", 60), ("d", 90), ("e", 1)]}
    assert set(file_names("model", tensors, 4).values()) == {"model.safetensors"}
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 400)
    names = file_names("model", tensors, 2)
    assert names == {n: f"model-0000{1 if n in 'ab' else 2}-of-00002.safetensors" for n in "abcde"}
    assert [writer_of(names[n]) for n in "ae"] == [0, 1] and writer_of("model.safetensors") == 0
    lopsided = file_names("m", {"huge": torch.empty(1000), "x": torch.empty(2), "y": torch.empty(2)}, 3)
    assert sorted(set(lopsided.values())) == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]


@pytest.mark.slow
def test_sigterm_and_the_command_line_under_torchrun(tmp_path):
    """`torchrun -m ssa train`: rank 0 alone speaks; a signal to one rank ends all of them with a checkpoint and status 0."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ssa",
        "train",
        "tiny",
    ]
    small = ["--train.device", "cpu", "--data.context", "64", "--train.batch-size", "1", "--train.log-every", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "a"), *small, "--train.steps", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: step 3") == 1 and done.stdout.count("validation loss") == 2
    assert [f"\n{done.stdout}".count(f"\n{line}") for line in ("run ", "model: ", "step 1/3 ")] == [1, 1, 1]
    wrong = subprocess.run([*command, "--train.steps", "0"], capture_output=True, text=True)
    assert wrong.returncode != 0 and wrong.stderr.count("train.steps = 0") == 1
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path / "b"), *small, "--train.steps", "100000"], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in running.stdout:
            if line.startswith("step 4/"):
                break
        children = subprocess.run(["ps", "--ppid", str(running.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
        os.kill(int(children[1]), signal.SIGTERM)
        rest = running.communicate()[0]
    finally:
        running.kill()
    assert running.returncode == 0 and rest.count("stopped by SIGTERM") == 1
    verify_checkpoint(find_checkpoints(tmp_path / "b")[-1])
