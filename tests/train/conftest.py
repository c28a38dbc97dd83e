import sys

import pytest

from ssa.config import DataRecipe, ModelRecipe, Recipe, TrainRecipe


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Importing it costs seconds; one test puts a stand-in back."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A prepared directory of some 8,000 tokens in documents of 1 to 200 bytes."""
    import json
    import random

    from ssa.data.prepare import prepare

    directory = tmp_path_factory.mktemp("corpus")
    source, words = random.Random(0), ["select", "attend", "align", "stream", "block", "query", "key", "value", "gate"]
    texts = [" ".join(source.choices(words, k=source.randint(1, 30)))[: source.randint(1, 200)] for _ in range(100)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([directory / "text.jsonl"], directory / "data", valid_fraction=0.1, workers=1, show_progress=False)
    return directory / "data"


@pytest.fixture
def recipe(shards):
    """recipe(steps=..., ...): two layers of 32, context 32; names of [train] and, else, of [model]."""

    def make(**changes):
        train = {"steps": 6, "batch_size": 2, "lr": 1e-2, "warmup": 0.2, "log_every": 4, "device": "cpu"}
        model = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
                 "block_size": 4, "num_selected_blocks": 2}  # fmt: skip
        for name, value in changes.items():
            (train if name in TrainRecipe.__dataclass_fields__ else model)[name] = value
        return Recipe(ModelRecipe(**model), DataRecipe(str(shards), context=32), TrainRecipe(**train))

    return make
