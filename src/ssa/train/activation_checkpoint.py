"""How the decoder layers run in training: checkpointed, compiled, or as they are.

Both replace a layer's `forward`, so module and parameter names stay, and what FSDP hooks onto a layer stays outside the compiled code.
The order matters: the checkpoint lies inside the compiled region, where the compiler's partitioner honours its policy.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

COMPILER = "inductor"

_KEPT = {
    "aten": (
        "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "torch_attn": ("_varlen_attn",),
}  # fmt: skip
"""Operations whose results selective checkpointing keeps, beside all of this package's own (attention, selection): what is expensive.
Not `bmm`, which is where plain-PyTorch attention has its T x S scores."""


def prepare_layers(model: Any, activation_checkpointing: bool, recompute: str, compile: bool) -> None:
    """Give every decoder layer of an `SSAForCausalLM` the `forward` that the recipe asks for.

    Args:
        activation_checkpointing: Hold less for the backward pass, compute it again there.
        recompute: "selective" or "full", what is computed again.
        compile: Compile each layer. All layers share one compiled graph a stream, since they differ in their weights alone.
    """
    for layer in model.model.layers:
        if activation_checkpointing:
            layer.forward = types.MethodType(_selective if recompute == "selective" else _full, layer)
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=COMPILER)
    if compile:
        # It would cut graphs at DDP's bucket borders; layers are small enough, and it refuses checkpoints in a graph.
        torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]


def _full(layer: Any, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return type(layer).forward(layer, *args, **kwargs)
    # nothing in a layer draws random numbers
    return checkpoint(type(layer).forward, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _selective(layer: Any, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return type(layer).forward(layer, *args, **kwargs)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(
        type(layer).forward, layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
    )


def _policy(context: Any, operation: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> torch.utils.checkpoint.CheckpointPolicy:
    space, name = operation.namespace, operation._schema.name.partition("::")[2]
    kept = space == "ssa" or name in _KEPT.get(space, ())
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
