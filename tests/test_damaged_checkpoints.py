"""Any byte of a checkpoint changed: every verb that has to do with it says which file."""

import json
import random
import shutil

import pytest

from ssa.cli import main
from ssa.config import DataRecipe, ModelRecipe, Recipe, TrainRecipe
from ssa.data.prepare import prepare
from ssa.train.trainer import train

VERBS = {
    "generate": (2, "generate {run} --prompt a --max-new-tokens 1"),
    "eval": (2, "eval {run} --budgets full --max-tokens 20 --out {out}"),
    "analyze": (2, "analyze {run} --max-tokens 32 --decode-steps 0 --no-html --out {out}"),
    "convert": (2, "convert {run} {out}/model"),
    "init_from": (2, "train {run}/recipe.json --model.init-from {run} --out {out}/new"),
    "resume": (2, "train --resume {run} --train.steps 3"),
    "report": (0, "report {run} --out {out}/r.html"),
    "doctor": (1, "doctor {run}"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on a corpus beside it, with one checkpoint."""
    home = tmp_path_factory.mktemp("trained")
    (home / "text.jsonl").write_text("".join(json.dumps({"text": f"to select is to attend {i}" * 4}) + "\n" for i in range(60)))
    prepare([home / "text.jsonl"], home / "data", valid_fraction=0.1, workers=1, show_progress=False)
    model = ModelRecipe(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        block_size=4,
        num_selected_blocks=2,
    )
    recipe = Recipe(
        model, DataRecipe(str(home / "data"), context=32), TrainRecipe(steps=2, batch_size=1, device="cpu", keep_last=1)
    )
    return train(recipe, home / "run").out


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_damaged_file(run, tmp_path, capfd, verb):
    status, words = VERBS[verb]
    words = words.format(run=run, out=tmp_path / "out").split()
    (checkpoint,) = (run / "checkpoints").iterdir()
    source = random.Random(1)
    files = sorted(checkpoint.iterdir())
    assert {"checkpoint.json", "config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer.json"} <= {
        file.name for file in files
    }
    for file in files:
        whole = file.read_bytes()
        at = source.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << source.randrange(8)]) + whole[at + 1 :])
        assert main(words) == status, file.name
        told, error = capfd.readouterr()
        said = told + error
        assert str(file) in said and "no complete checkpoint yet" not in said, (file.name, said)
        if status == 2:
            assert error.startswith("ssa: error: ") and error.count("\n") == 1, said
        file.write_bytes(whole)
    assert not (tmp_path / "out" / "new").exists() and not (tmp_path / "out" / "model").exists()
    assert main(words) == 0


@pytest.mark.parametrize("name", ["latest", "checkpoints/step-00000002", "copy"])
def test_a_checkpoint_is_checked_under_any_of_its_names(run, capsys, name):
    (checkpoint,) = (run / "checkpoints").iterdir()
    if name == "copy":
        shutil.copytree(checkpoint, run / name)
    file = run / name / "model.safetensors"
    whole = file.read_bytes()
    assert main(["generate", str(run / name), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["generate", str(run / name), "--prompt", "a", "--max-new-tokens", "1"]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors does not match its hash" in said and ("checkpoint.json, and nothing is compared" in said) == (
        name == "copy"
    )


def test_a_model_directory_without_hashes_is_read_as_it_is(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_selected_blocks": 1}))
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    said = capsys.readouterr().err
    assert "1x4" in said and "hash" not in said and "warning" not in said


def test_lm_evals_adapter_checks_hashes(run):
    pytest.importorskip("lm_eval")
    from ssa.errors import UserError
    from ssa.eval.harness import SSALM

    (checkpoint,) = (run / "checkpoints").iterdir()
    (checkpoint / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match=r"trainer\.json has 2 bytes"):
        SSALM(str(run))


def test_going_back_to_an_older_step_is_said(run, tmp_path, capsys):
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert main(["train", "--resume", str(run), "--train.steps", "4", "--train.keep-last", "2"]) == 0
    newest = run / "checkpoints" / "step-00000004"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    for words in (["convert", str(run), str(tmp_path / "out")], ["train", "--resume", str(run), "--train.steps", "3"]):
        from ssa.runs import checkpoints as module

        module._say.cache_clear()  # a process says it once
        assert main(words) == 0
        said = capsys.readouterr()
        assert f"ssa: warning: checkpoint is damaged: {weights} has" in said.err
        assert f"taking the checkpoint before it, {checkpoint}" in said.err and said.err.count("warning") == 1
