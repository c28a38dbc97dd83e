import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssa.model import safetensors_file
from ssa.model.safetensors_file import write_safetensors


@pytest.mark.parametrize("piece", [7, 1 << 24])
def test_the_library_reads_what_was_written(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(safetensors_file, "PIECE", piece)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "c": torch.randn(4, 6).T,
        "empty": torch.empty(0, 3),
        "step": torch.tensor(3.0),
        "wide": torch.tensor([1, 2**40]),
        "yes": torch.tensor([True, False]),
    }
    path = tmp_path / "x.safetensors"
    size, digest = write_safetensors(path, tensors, {"format": "pt"})
    assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name
    assert safe_open(path, "pt").metadata() == {"format": "pt"}
