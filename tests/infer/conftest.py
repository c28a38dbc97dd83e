import pytest

from ssa.data.tokenizer import byte_tokenizer
from ssa.testing import tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A directory with a tiny model of random weights and the byte tokenizer."""

    def save(method="ssa", name="model", **changes):
        tiny_model(method, **changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
