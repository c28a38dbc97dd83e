import contextlib

import pytest
import torch

from ssa.data.shards import TokenShards
from ssa.testing import tiny_model
from ssa.train.validation import validation_losses


@pytest.mark.parametrize("max_tokens", [100, 300])
def test_equals_token_by_token_means(shards, max_tokens):
    """Against rows one at a time with logits held in full; the limit cuts the last row short."""
    data, model = TokenShards(shards, "valid"), tiny_model().train()
    losses = validation_losses(model, data, 32, 4, contextlib.nullcontext(), max_tokens)
    assert model.training
    model.eval()
    available = min(max_tokens, data.num_tokens)
    for mode in ("full", "sparse"):
        total, count = 0.0, 0
        for start in range(0, available, 32):
            stop = min(start + 32, available)
            ids = torch.from_numpy(data.read(start, stop).astype("int64"))[None]
            positions = torch.from_numpy(data.positions(start, stop))[None]
            logits = model(ids, position_ids=positions, attention_mode=mode).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[positions[0, 1:] != 0]
            total, count = total + nll.sum().item(), count + len(nll)
        assert losses[mode] == pytest.approx(total / count, rel=1e-5)
