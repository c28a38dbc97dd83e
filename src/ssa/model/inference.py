"""Layers without gradients beside a cache, as a GPU does them fastest: the model's own weights and methods, with the kernels of
`ssa.ops.triton.layer` around them.

Models and layers are those of `ssa.model.modeling`, which imports this.

Legend: B batch, T queries, R = B * T tokens, C hidden size, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ssa.attention import AttentionCall, AttentionInputs
from ssa.model.cache import BlockCache
from ssa.ops.implementations import resolve

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_fused(model: Any, x_BTC: Tensor, call: AttentionCall) -> bool:
    """Whether `fused_layers` does what the layers' own code would: nobody looks or learns, and no part is another than the model was made of
    (an adapter, a quantized product, a hook, a share of tensor parallelism)."""
    return (
        call.bounds is not None
        and model.steps.fused
        and not torch.is_grad_enabled()
        and call.observer is None
        and not (call.align or call.train)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x_BTC.device.type)
        and not torch._C._len_torch_dispatch_stack()
        and x_BTC.dtype in DTYPES
        and model.config.hidden_act == "silu"
        and resolve(call.impl, x_BTC) == "triton"
        and all(
            plain(part) and vars(part)["_parameters"]["weight"].dtype == x_BTC.dtype
            for layer in model.layers
            for part in _parts(layer)
        )
    )


def plain(part: Any) -> bool:
    """A product with its weight, or RMS norm, is all that it does."""
    if type(part) not in (nn.Linear, LlamaRMSNorm):
        return False
    weight = vars(part)["_parameters"].get("weight")  # past nn.Module's search for names, which takes most of a layer's time here
    return type(weight) is nn.Parameter and weight.is_contiguous() and unwatched(part)


def unwatched(module: nn.Module) -> bool:
    """No hook, and no forward put in the place of its own."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _parts(layer: Any) -> Iterator[Any]:
    """What has a weight; None for what is not as it was made."""
    inside = vars(layer)["_modules"]
    attention, mlp = inside["self_attn"], inside["mlp"]
    of_attention, of_mlp = vars(attention)["_modules"], vars(mlp)["_modules"]
    watched = type(mlp) is not LlamaMLP or not all(unwatched(x) for x in (layer, attention, of_attention["selector"], mlp))
    yield inside["input_layernorm"]
    yield inside["post_attention_layernorm"]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield of_attention[name]
    if attention.g_proj is not None:
        yield attention.g_proj
    yield from (None,) if watched else (of_mlp["gate_proj"], of_mlp["up_proj"], of_mlp["down_proj"])


def _projections(attention: Any) -> list[nn.Linear]:
    found = [attention.q_proj, attention.k_proj, attention.v_proj]
    return found if attention.g_proj is None else [*found, attention.g_proj]


def fused_layers(
    model: Any, x_BTC: Tensor, rope: tuple[Tensor, Tensor], calls: Sequence[AttentionCall], cache: BlockCache
) -> Tensor:
    """The hidden states after all layers, [B, T, C], in the place of those before; keys and values are in the cache.

    rope: cos and sin in fp32.
    """
    queries = x_BTC.shape[1]
    cache.open(len(model.layers), queries)
    x_RC = x_BTC.flatten(0, 1)
    for layer, call in zip(model.layers, calls, strict=True):
        x_RC = _layer(layer, x_RC, rope, call, cache, queries)
    return x_RC.view(x_BTC.shape)


def last_norm(model: Any, x_BTC: Tensor) -> Tensor:
    """The model's, before its head."""
    return kernels().normed(x_BTC.flatten(0, 1), model.norm).view(x_BTC.shape) if plain(model.norm) else model.norm(x_BTC)


def kernels() -> Any:
    """Imported where there is triton."""
    from ssa.ops.triton import layer

    return layer


def _layer(layer: Any, x_RC: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall, cache: BlockCache, queries: int) -> Tensor:
    fused, attention, mlp = kernels(), layer.self_attn, layer.mlp
    index, size = attention.layer_idx, attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    entry, keep = cache.layers[index], attention.selector.adds_bias
    entry.reserve(queries, len(x_RC) // queries, kv_heads, size, x_RC, keep)
    y_RN = fused.project(x_RC, layer.input_layernorm, _projections(attention))
    gates = 0 if attention.g_proj is None else attention.g_proj.out_features
    q, gates_RG, k, v = fused.rope_and_append(
        y_RN, rope, entry.end, entry.buffers(), (queries, heads, kv_heads, size), gates, keep
    )  # fmt: skip
    if k is not None and v is not None:
        entry.write_bias(attention.selector.key_bias(k, v))
    assert call.bounds is not None
    k, v, bias, cached = cache.rows(index, queries, call.positions_BT, call.bounds)
    gates_BTHG = None if gates_RG is None else gates_RG.view(len(q), queries, heads, -1)
    inputs = AttentionInputs(q, k, v, gates_BTHG, bias, cached)
    attended_RC = attention.method(attention.selector, inputs, call).out_BTHD.reshape(len(x_RC), -1)
    x_RC = fused.project_back(attended_RC, attention.o_proj, x_RC)
    return fused.mlp(x_RC, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
