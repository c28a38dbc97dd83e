"""What a saved model says for itself: its card, the file that `auto_map` names, and who may read them."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from ssa.data.tokenizer import byte_tokenizer
from ssa.infer.load import load_model
from ssa.model.card import STUB, write_card
from ssa.model.convert import convert
from ssa.runs.checkpoints import verify_checkpoint
from ssa.testing import save_checkpoint, tiny_config, tiny_model

LOAD = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

directory = sys.argv[1]
ids = AutoTokenizer.from_pretrained(directory)("abc", return_tensors="pt").input_ids
assert "ssa" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(directory)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without the package")
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
assert type(model).__module__ == "ssa.model.modeling" and isinstance(model, GenerationMixin)
assert model.generate(ids, budget="2x4", max_new_tokens=3, eos_token_id=None).shape[1] == ids.shape[1] + 3
assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == "SSAModel"
model.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    tiny_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_a_process_that_has_not_imported_the_package_loads_it_through_the_stub(saved, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD, saved, tmp_path / "again"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_ssa.py"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names  # and no copy of the package's files
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "again" / name).read_text() == (saved / name).read_text()


def test_where_the_package_is_missing_the_stub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssa.model", None)
    with pytest.raises(ImportError, match="pip install sparse-sparse-attention"):
        exec(STUB, {})


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_no_code_of_the_directory_is_run(saved, trust):
    (saved / "modeling_ssa.py").write_text("raise SystemExit('run')")
    assert load_model(saved, device="cpu")[0].config.method == "ssa"
    assert AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=trust).config.method == "ssa"


def test_the_card_names_method_budget_and_how_to_load(saved):
    card = (saved / "README.md").read_text()
    for part in (
        "`ssa`",
        "`3x4`",
        "3 blocks of 4 keys",
        "pip install sparse-sparse-attention",
        "import ssa.model",
        "trust_remote_code",
    ):
        assert part in card
    tiny_model("full").save_pretrained(saved)  # over the other model: the card goes with it
    assert "`full`" in (saved / "README.md").read_text() and "`ssa`" not in (saved / "README.md").read_text()


def test_a_card_that_somebody_wrote_stays(saved, tmp_path):
    (saved / "README.md").write_text("# Mine\n")
    tiny_model("moba").save_pretrained(saved)
    write_card(saved, tiny_config())
    assert (saved / "README.md").read_text() == "# Mine\n"
    convert(saved, tmp_path / "out")
    assert "`moba`" in (tmp_path / "out" / "README.md").read_text()  # a new model's, not the source's
    (tmp_path / "out" / "README.md").write_text("# Of the result\n")
    convert(saved, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "# Of the result\n"


def test_conversions_to_other_models_carry_neither(tmp_path):
    tiny_model("full", attention_gate=False).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "llama", to="llama")
    assert not {"README.md", "modeling_ssa.py"} & {path.name for path in (tmp_path / "llama").iterdir()}
    assert "auto_map" not in json.loads((tmp_path / "llama" / "config.json").read_text())


def test_checkpoints_carry_both_and_their_hashes(tmp_path):
    path = save_checkpoint(tmp_path, 3, tiny_model("nsa"), byte_tokenizer(), None, {})
    assert {"README.md", "modeling_ssa.py"} <= verify_checkpoint(path)["files"].keys()
    assert "`nsa`" in (path / "README.md").read_text() and (path / "modeling_ssa.py").read_text() == STUB


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_directories_have_the_modes_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        tiny_model().save_pretrained(tmp_path / "whole")
        tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        convert(tmp_path / "whole", tmp_path / "converted")
        save_checkpoint(tmp_path / "run", 1, tiny_model(), byte_tokenizer(), None, {})
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {"whole/model.safetensors", "shards/model-00002-of-00005.safetensors", "converted/model.safetensors"} <= modes.keys()
    wanted = {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in modes}
    assert modes == wanted
