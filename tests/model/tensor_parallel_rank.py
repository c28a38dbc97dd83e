"""One of two ranks that share a model's heads; test_tensor_parallel.py starts both. argv: a directory."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ssa.errors import UserError
from ssa.testing import tiny_model

place = Path(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
x = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))


def shared(name, model, **how):
    if dist.get_rank() == 0:
        model.save_pretrained(place / name)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(place / name, distributed_config=DistributedConfig(**how)).eval()


for method, tied in (("ssa", True), ("ssa", False), ("nsa", True)):
    whole = tiny_model(method, tie_word_embeddings=tied, attention_bias=True)
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    part = shared(f"{method}-{tied}", whole, tp_size=2)
    attention = part.model.layers[0].self_attn
    assert all(isinstance(p.weight, DTensor) for p in (attention.q_proj, attention.v_proj, attention.g_proj, attention.o_proj))
    for mode in ("sparse", "full"):
        torch.testing.assert_close(
            part(x, attention_mode=mode).logits, whole(x, attention_mode=mode).logits, rtol=1e-4, atol=1e-4
        )
        texts = [m.generate(x, attention_mode=mode, max_new_tokens=6, do_sample=False) for m in (part, whole)]
        assert torch.equal(*texts)
    torch.testing.assert_close(part.token_nll(x), whole.token_nll(x), rtol=1e-4, atol=1e-4)
    labels = x.clone()
    labels[0, :7] = -100
    losses = [m(x, labels=labels).loss for m in (part, whole)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    if method != "ssa":
        for loss in losses:
            loss.backward()
        there = dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(
                found, there[name].grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    if method == "ssa":
        with pytest.raises(UserError, match="alignment is a mean over all heads"):
            part.train()(x, labels=x)

with pytest.raises(UserError, match="must divide the 1 kv heads"):
    shared("one", tiny_model(num_key_value_heads=1), tp_size=2)(x)
with pytest.raises(UserError, match="pp_size = 2: the model runs in no pipeline"):
    shared("pipeline", tiny_model(), pp_size=2)
dist.destroy_process_group()
