"""`ssa doctor RUN`."""

import json
import os
import shutil

import pytest

from ssa.cli import main
from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.testing import save_checkpoint, tiny_model
from ssa.train.run_directory import record_start


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints on data beside it."""
    from ssa.config import DataRecipe, Recipe
    from ssa.data.prepare import prepare
    from ssa.files import sha256_of_file

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 5}) + "\n" for i in range(30)))
    prepare([tmp_path / "text.jsonl"], tmp_path / "data", valid_fraction=0.2, workers=1, show_progress=False)
    index = sha256_of_file(tmp_path / "data" / "index.json")
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", step, tiny_model(seed=step), byte_tokenizer(), None, {"data": index})
    environment = {"data": {"path": str(tmp_path / "data"), "fingerprint": index, "index": index}}
    record_start(tmp_path / "run", Recipe(data=DataRecipe(path=str(tmp_path / "data"))), environment)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    return tmp_path / "run"


def examined(capsys, path):
    status = main(["doctor", str(path)])
    return status, capsys.readouterr().out.splitlines()


def test_a_run_in_order(run, capsys):
    status, lines = examined(capsys, run)
    assert status == 0 and lines[-1] == "all well"
    for part in ("recipe.json: method ssa", "environment.json: starts recorded: 1", "metrics.jsonl: lines: 1", "step-00000001: ", "step-00000002: ",
                 "latest: leads to step-00000002", "model: method ssa", "tokenizer: 258 ids", f"data: {run.parent / 'data'}: shards: 2"):  # fmt: skip
        assert any(line.startswith(f"  {part}") for line in lines), part
    assert examined(capsys, run / "latest")[1][1:] == lines[1:]


def test_names_are_shown_to_a_terminal_not_obeyed_by_it(run, capsys):
    named = run.rename(run.parent / "r\x1b[2Jun")
    (named / "recipe.json").write_text('{"model": {"method": "\\u001b[2Jssa"}}')
    status, lines = examined(capsys, named)
    assert status == 1 and lines[0].endswith("r\\x1b[2Jun") and any("\\x1b[2Jssa" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def harm_tokenizer(run):
    checkpoint = run / "checkpoints" / "step-00000002"
    (checkpoint / "checkpoint.json").unlink()
    shutil.copytree(checkpoint, run.parent / "model")
    train_bpe(["many different words " * 3, "".join(map(chr, range(300, 600)))], 400).save_pretrained(run.parent / "model")
    return run.parent / "model"


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda run: flip(run / "checkpoints" / "step-00000001" / "model.safetensors"), "step-00000001: FAILED: .*model.safetensors does not match"),
        (lambda run: (run / "checkpoints" / "step-00000002" / "trainer.json").unlink(), "step-00000002: FAILED: .*trainer.json is missing"),
        (lambda run: flip(next((run.parent / "data").glob("train-*.tokens.npy"))), "data: FAILED: .*train-00000.tokens.npy"),
        (lambda run: flip(next((run.parent / "data").glob("valid-*.docs.npy"))), "data: FAILED: .*valid-00000.docs.npy"),
        (lambda run: (run.parent / "data" / "index.json").write_text("{}"), "data: FAILED: the data in .*data is not what"),
        (lambda run: shutil.rmtree(run.parent / "data"), r"data: FAILED: .*not there any more .tried .*data"),
        (lambda run: (run / "recipe.json").write_text("{"), "recipe.json: FAILED: .*recipe.json"),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json: FAILED: .*environment.json"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl: FAILED: .*metrics.jsonl, line 1"),
        (lambda run: (os.unlink(run / "latest"), os.symlink("checkpoints/step-00000001", run / "latest")), "latest: FAILED: .*step-00000001"),
        (lambda run: (os.unlink(run / "latest"), os.symlink("checkpoints/none", run / "latest")), "latest: FAILED: "),
        (harm_tokenizer, "tokenizer: FAILED: .*tokenizer.json has 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(run, capsys, harm, says):
    import re

    other = harm(run)
    status, lines = examined(capsys, other if isinstance(other, type(run)) else run)
    assert status == 1 and lines[-1].startswith("something is wrong")
    assert any(re.match(f"  {says}", line) for line in lines), lines


def test_model_directories_and_what_is_none(run, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, lines = examined(capsys, tmp_path / "model")
    assert status == 0 and "  files: no checkpoint.json, so there are no hashes to compare" in lines
    status, lines = examined(capsys, run / "checkpoints" / "step-00000001")
    assert status == 0 and len(lines) == 5 and "every hash as recorded" in lines[1]
    assert main(["doctor", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert examined(capsys, tmp_path / "empty")[0] == 1


def test_a_run_before_its_first_checkpoint(run, capsys):
    shutil.rmtree(run / "checkpoints")
    os.unlink(run / "latest")
    status, lines = examined(capsys, run)
    assert status == 0 and "  checkpoints: none yet" in lines
