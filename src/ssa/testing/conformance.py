"""What a method or a selector must do to work everywhere in this package: `check_selector` and `check_method`, for its author's tests.

Each builds tiny models of it on the CPU and raises an AssertionError that says what is wrong. With `TRITON_INTERPRET=1` in the
environment the kernels are tried, too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.attention import AttentionCall, AttentionInputs, AttentionRecord
from ssa.methods import method_named, selector_named
from ssa.model import BlockCache, SSAForCausalLM
from ssa.ops.documents import query_positions
from ssa.testing.oracles import document_positions, tiny_model
from ssa.train.flops import training_flops

CHUNKS = (1, 17, 64, 1000)
TOKENS = 70
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
LOOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
"""Of kernels against the reference, in fp32."""


def check_selector(
    name: str, options: Mapping[str, Any] | None = None, *, method: str = "ssa", budget: str = "3x4", **fields: Any
) -> None:
    """Check the selector registered as `name`.

    Args:
        options: The selector's own.
        method: Over which it is tried; one that trains sparse attention.
        budget: A budget that leaves blocks out in rows of 70 tokens.
        fields: Further ones of `SSAConfig`.

    Raises:
        AssertionError: What is wrong.
    """
    blocks, size = map(int, budget.split("x"))
    known: dict[str, Any] = {
        "selector": name,
        "selector_options": dict(options or {}),
        "num_selected_blocks": blocks,
        "block_size": size,
    } | fields
    selector_named(name)
    check_method(method, **known)
    model = _moved(tiny_model(method, **known))
    _check_choices(model)
    _check_records(model)


def check_method(name: str, **fields: Any) -> None:
    """Check the method registered as `name`; `fields` are further ones of `SSAConfig`.

    Raises:
        AssertionError: What is wrong.
    """
    method_named(name)
    model = _moved(tiny_model(name, **fields))
    _check_weights(model)
    _check_flops(model)
    _check_saved(model)
    for mode in ("sparse", "full"):
        _check_chunks(model, mode)
        _check_documents(model, mode)
        _check_padding(model, mode)
        _check_cache(model, mode)
    _check_everything_selected(model)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _check_kernels(model)


@torch.no_grad()
def _moved(model: Any) -> Any:
    """Selectors may start as if they had no weights; here they are as training may leave them."""
    generator = torch.Generator("cpu").manual_seed(11)
    for layer in model.model.layers:
        for parameter in layer.self_attn.selector.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def _check_choices(model: Any) -> None:
    """Of each query: the contract of `block_indices`, in whole rows, in parts of rows, and in packed rows."""
    selection, selector = model.config.selection(), model.model.layers[0].self_attn.selector
    heads, kv_heads, size = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator("cpu").manual_seed(3)
    q, k, v = (torch.randn(2, TOKENS, n, size, generator=generator) for n in (heads, kv_heads, kv_heads))
    with torch.no_grad():
        bias = selector.key_bias(k, v)
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == k.shape[:3]), "key_bias must be fp32 [B, T, K]"
    assert (bias is not None) == selector.adds_bias, (
        f"{type(selector).__name__}.adds_bias does not say whether key_bias gives one"
    )
    for positions in (None, document_positions([9, 1, 33, 27], 2)):
        call = AttentionCall("sparse", selection, positions_BT=positions)
        index = selector.select(AttentionInputs(q, k, v, bias_BSK=bias), call)
        _check_index(index, q, k, positions, selector.rule(selection))
        for first in (1, 40, TOKENS - 1):  # as ranks that share a row, and chunks of a prompt, see it
            part = AttentionCall("sparse", selection, positions_BT=None if positions is None else positions[:, first:])
            rest = selector.select(AttentionInputs(q[:, first:], k, v, bias_BSK=bias), part)
            width = min(rest.shape[3], index.shape[3])
            assert torch.equal(rest[..., :width], index[:, :, first:, :width]), (
                f"the last {TOKENS - first} queries of a row choose otherwise alone than with the others"
            )


def _check_index(index: Tensor, q: Tensor, k: Tensor, positions: Tensor | None, selection: Any) -> None:
    assert index.dtype == torch.int32, f"block_indices are {index.dtype}, not int32"
    batch, queries, heads = q.shape[:3]
    assert index.shape[:3] in ((batch, k.shape[2], queries), (batch, heads, queries)), (
        f"block_indices {tuple(index.shape)} are not [B, K or H, T, M] with B = {batch}, T = {queries}"
    )
    assert index.shape[3] <= selection.places, f"{index.shape[3]} blocks, more than the budget"
    own = (query_positions(q, k, positions) // selection.block_size)[:, None, :, None]
    real = index >= 0
    assert bool((real[..., 1:] <= real[..., :-1]).all()), "-1 stands before a chosen block: pad to the right"
    assert bool(((index[..., 1:] > index[..., :-1]) | ~real[..., 1:]).all()), "blocks of a query are not ascending and unique"
    assert bool((index <= own).all()), "a block starts after its query"
    assert bool((index == own).any(-1).all()), "a query's own block is missing"


def _check_records(model: Any) -> None:
    """What an observer sees has the bias, with which analyses compute."""
    seen: list[AttentionRecord] = []
    with torch.no_grad():
        model(_tokens(1), observer=lambda layer, record: seen.append(record), use_cache=False)
    adds = model.model.layers[0].self_attn.selector.adds_bias
    assert all((record.bias_BSK is not None) == adds for record in seen), "an observer does not see the bias"


def _check_weights(model: Any) -> None:
    model.train()
    model(_tokens(), labels=_tokens()).loss.backward()
    without = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.isfinite().all()))
    ]
    model.zero_grad()
    model.eval()
    assert not without, f"training gives no finite gradient to {', '.join(without)}"


def _check_flops(model: Any) -> None:
    figures = training_flops(model.config, torch.arange(TOKENS)[None])
    assert all(x >= 0 for x in figures.values()) and figures["dense"] + figures["sparse"] > 0, f"FLOPs of a token: {figures}"


@torch.no_grad()
def _check_saved(model: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory))
        again = SSAForCausalLM.from_pretrained(Path(directory)).eval()
    x = _tokens()
    assert torch.equal(model(x).logits, again(x).logits), "a model that was saved and loaded computes something else"


@torch.no_grad()
def _check_chunks(model: Any, mode: str) -> None:
    x = _tokens()
    whole = model(x, attention_mode=mode, use_cache=False).logits
    for chunk in CHUNKS:
        for fixed in (None, TOKENS):
            cache, outs = BlockCache(fixed), []
            for t in range(0, TOKENS, chunk):
                outs.append(model(x[:, t : t + chunk], attention_mode=mode, cache=cache, use_cache=True).logits)
            _close(torch.cat(outs, 1), whole, f"{mode}: chunks of {chunk} tokens with a cache differ from one pass")


@torch.no_grad()
def _check_documents(model: Any, mode: str) -> None:
    x, lengths, start = _tokens(1), [9, 1, 33, 27], 0
    packed = model(x, position_ids=document_positions(lengths), attention_mode=mode, use_cache=False).logits
    for length in lengths:
        cut = slice(start, start + length)
        alone = model(x[:, cut], attention_mode=mode, use_cache=False).logits
        _close(packed[:, cut], alone, f"{mode}: a packed document of {length} tokens differs from the document alone")
        start += length


@torch.no_grad()
def _check_padding(model: Any, mode: str) -> None:
    x, pads = _tokens(), (0, 13)
    alone = [model(x[row : row + 1, pad:], attention_mode=mode, use_cache=False).logits for row, pad in enumerate(pads)]
    for side in ("left", "right"):
        mask = torch.ones(2, TOKENS, dtype=torch.int64)
        ids = x.clone()
        for row, pad in enumerate(pads):
            if side == "left":
                mask[row, :pad] = 0
            else:
                mask[row, TOKENS - pad :] = 0
                ids[row] = ids[row].roll(-pad)
        out = model(ids, attention_mask=mask, attention_mode=mode, use_cache=False).logits
        for row, pad in enumerate(pads):
            kept = out[row : row + 1, pad:] if side == "left" else out[row : row + 1, : TOKENS - pad]
            _close(kept, alone[row], f"{mode}: {pad} tokens of {side} padding change a row")
        if side == "left":  # token by token, too
            cache, outs = BlockCache(), []
            for t in range(40, TOKENS + 1):
                step = model(
                    ids[:, t - 1 if t > 40 else 0 : t],
                    attention_mask=mask[:, :t],
                    attention_mode=mode,
                    cache=cache,
                    use_cache=True,
                )
                outs.append(step.logits[:, -1:])
            _close(torch.cat(outs, 1), out[:, 39:], f"{mode}: decoding rows with left padding differs from one pass")


@torch.no_grad()
def _check_cache(model: Any, mode: str) -> None:
    """Cropped, reordered, repeated, reset: as a cache that never saw anything else."""
    x = _tokens()

    def decode(cache: Any, ids: Tensor, first: int) -> Tensor:
        outs = [
            model(ids[:, t : t + 1], attention_mode=mode, cache=cache, use_cache=True).logits for t in range(first, ids.shape[1])
        ]
        return torch.cat(outs, 1)

    for fixed in (None, TOKENS):
        cache = BlockCache(fixed)
        model(x[:, :45], attention_mode=mode, cache=cache, use_cache=True)
        decode(cache, x[:, :60], 45)
        cache.crop(-23)
        other = torch.cat([x[:, :37], x[:, 37:].flip(1)], 1)
        whole = model(other, attention_mode=mode, use_cache=False).logits
        _close(
            decode(cache, other[:, :52], 37), whole[:, 37:52], f"{mode}: a cache that was cropped remembers what it should not"
        )
        cache.reorder_cache(torch.tensor([1, 0]))
        _close(
            decode(cache, other.flip(0)[:, :60], 52), whole.flip(0)[:, 52:60], f"{mode}: reordered rows of a cache are mixed up"
        )
        cache.batch_repeat_interleave(2)
        twice = whole.flip(0).repeat_interleave(2, 0)[:, 60:65]
        _close(
            decode(cache, other.flip(0).repeat_interleave(2, 0)[:, :65], 60),
            twice,
            f"{mode}: repeated rows of a cache are mixed up",
        )
        cache.reset()
    cache = BlockCache(TOKENS)
    model(x, attention_mode=mode, cache=cache, use_cache=True)
    cache.reset()
    again = model(other, attention_mode=mode, cache=cache, use_cache=True).logits
    _close(again, whole, f"{mode}: a cache that was reset remembers what it should not")


def _check_everything_selected(model: Any) -> None:
    """A budget that holds the row is full attention, bias included, in values and gradients (but for what branches add)."""
    if model.config.attends.branches:
        return
    x, results = _tokens(), []
    for mode in ("sparse", "full"):
        loss = model(x, labels=x, attention_mode=mode, budget=f"1000x{model.config.block_size}", use_cache=False).loss
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        results.append([loss, *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]), "a budget that holds the row trains other weights than full attention"
    for sparse, full in zip(*results, strict=True):
        _close(sparse, full, "a budget that holds the row is not full attention (is the bias in both streams?)")


@torch.no_grad()
def _check_kernels(model: Any) -> None:
    """Triton's interpreter against the reference, in one pass and decoding."""
    x = _tokens(1)[:, :14]
    wanted = model(x, use_cache=False).logits
    model.model.impl = "triton"
    try:
        _close(model(x, use_cache=False).logits, wanted, "the kernels compute something else in one pass", LOOSE)
        cache = BlockCache(14)
        outs = [model(x[:, :11], cache=cache, use_cache=True).logits]
        outs += [model(x[:, t : t + 2], cache=cache, use_cache=True).logits for t in (11, 13)]
        _close(torch.cat(outs, 1), wanted, "the kernels compute something else when they decode", LOOSE)
    finally:
        model.model.impl = "auto"


def _tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, 256, (rows, TOKENS), generator=torch.Generator("cpu").manual_seed(5), device="cpu")


def _close(actual: Tensor, expected: Tensor, what: str, tolerance: dict[str, Any] = CLOSE) -> None:
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{what}: {text}")
