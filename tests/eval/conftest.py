"""A run directory as training leaves it, with a model of random weights."""

import pytest

from ssa.config import DataRecipe, Recipe
from ssa.data.prepare import prepare
from ssa.data.tokenizer import byte_tokenizer
from ssa.testing import save_checkpoint, tiny_model

TEXTS = [f"Document {i}. " + "It has a few words, é and ü among them. " * (i + 2) + "\n" for i in range(6)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for i, text in enumerate(TEXTS):
        (directory / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare([str(directory)], directory / "shards", valid_fraction=0.5, workers=1)
    return directory / "shards"


@pytest.fixture
def make_run(tmp_path, prepared):
    def make(method="ssa", step=7, data=prepared, name="run"):
        run = tmp_path / name
        save_checkpoint(run, step, tiny_model(method, seed=step), byte_tokenizer(), None, {})
        (run / "recipe.json").write_text(Recipe(data=DataRecipe(path=str(data), context=64)).to_json())
        return run

    return make
