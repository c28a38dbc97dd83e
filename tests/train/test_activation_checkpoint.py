"""Checkpointed and compiled layers compute what plain ones do."""

import pytest
import torch

from ssa.testing import tiny_model
from ssa.train import activation_checkpoint
from ssa.train.activation_checkpoint import prepare_layers

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, 24)


def gradients(stream="full", layers=2, method="ssa", **how):
    model = tiny_model(num_hidden_layers=layers, method=method).train()
    prepare_layers(model, **({"activation_checkpointing": False, "recompute": "full", "compile": False} | how))
    output = model(IDS, position_ids=POSITIONS, labels=IDS, stream=stream)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("stream", ["full", "sparse"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_checkpointing_changes_no_bit(stream, recompute):
    loss, plain = gradients(stream)
    other, saved = gradients(stream, activation_checkpointing=True, recompute=recompute)
    assert torch.equal(loss, other) and plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        self.calls[name] = self.calls.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def test_selective_checkpointing_keeps_products_and_attention(monkeypatch):
    """Matrix products run as often as without it; what is cheap runs again. The package's own operations are kept by their namespace."""
    counts = {}
    for name, how in {
        "plain": {}, "selective": {"activation_checkpointing": True, "recompute": "selective"}, "full": {"activation_checkpointing": True}
    }.items():  # fmt: skip
        with Counted() as counted:
            gradients(**how)
        counts[name] = counted.calls
    assert counts["plain"]["aten::mm"] == counts["selective"]["aten::mm"] < counts["full"]["aten::mm"]
    assert counts["plain"]["aten::silu"] < counts["selective"]["aten::silu"] == counts["full"]["aten::silu"]

    @torch.library.custom_op("ssa::dear", mutates_args=())
    def dear(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    dear.register_autograd(lambda ctx, d: d * 2)
    forward = torch.nn.SiLU.forward
    monkeypatch.setattr(torch.nn.SiLU, "forward", lambda self, x: dear(forward(self, x)))
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.SiLU()
    prepare_layers(model, True, "selective", False)
    with Counted() as counted:
        model(IDS, labels=IDS, stream="full").loss.backward()
    assert counted.calls["ssa::dear"] == 2  # once a layer
    assert counted.calls["aten::silu"] == 4


@pytest.mark.parametrize("activation_checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_layers_share_a_graph(monkeypatch, activation_checkpointing):
    """Traced and differentiated by the compiler, without code generation, which takes a minute here."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    monkeypatch.setattr(activation_checkpoint, "COMPILER", backend)
    loss, plain = gradients("sparse")
    how = {"activation_checkpointing": activation_checkpointing, "recompute": "selective", "compile": True}
    other, compiled = gradients("sparse", **how)
    assert other == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in plain.items():
        assert (gradient - compiled[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    # without sparse attention, whose reference breaks graphs: under a checkpoint such layers run as they are
    torch._dynamo.reset()
    graphs.clear()
    gradients(method="full", **how)
    once = len(graphs)
    gradients(layers=4, method="full", **how)
    assert len(graphs) == once > 0, "layers differ in their weights alone"
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    loss, plain = gradients("full")
    other, compiled = gradients("full", activation_checkpointing=True, recompute="selective", compile=True)
    assert other == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in plain.items():
        assert (gradient - compiled[name]).norm() <= 1e-3 * gradient.norm() + 1e-6, name
    torch._dynamo.reset()
