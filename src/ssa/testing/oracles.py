"""Helpers for tests of this library and of code built on it: oracles, yardsticks, tiny models and their checkpoints, random documents.

Legend: B batch, T queries, S keys, H query heads, K kv heads, R = K or H (who selects), D head size, M selected blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.attention import AttentionInputs, HeadShape
from ssa.attention.selectors.means import MeansSelector
from ssa.collectives import Ranks
from ssa.methods import method_named
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.ops.documents import document_starts, query_positions
from ssa.train.saver import Saver

RMS_RATIO = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest ||actual - exact|| / ||exact|| by dtype."""


def readable_keys(q: Tensor, k: Tensor, positions: Tensor | None, block_indices: Tensor | None, block_size: int) -> Tensor:
    """Which keys each query may read, bool [B, R or 1, T, S], from the definitions and with no regard to memory."""
    position_BT = query_positions(q, k, positions)
    start_BT = document_starts(position_BT, k.shape[1])
    column = torch.arange(k.shape[1], device=q.device)
    allowed = (column >= start_BT[..., None]) & (column <= (start_BT + position_BT)[..., None])
    if block_indices is None:
        return allowed[:, None]
    block_BTS = (column - start_BT[..., None]).div(block_size, rounding_mode="floor")
    chosen = (block_indices[:, :, :, None, :] == block_BTS[:, None, :, :, None]).any(-1)
    return chosen & allowed[:, None]


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None = None, *, block_size: int = 1,
    positions: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Masked softmax attention, literally: (out [B, T, H, D], lse [B, T, H], weights [B, H, T, S]) in the inputs' dtype; 0, -inf and 0
    for a query that has no key or whose keys all have a bias of -inf."""
    heads, kv_heads = q.shape[2], k.shape[2]
    allowed = readable_keys(q, k, positions, block_indices, block_size)
    allowed = allowed.repeat_interleave(heads // allowed.shape[1], 1)
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.repeat_interleave(heads // kv_heads, 2).permute(0, 2, 1)[:, :, None].to(logits.dtype)
    logits = logits.masked_fill(~allowed, float("-inf"))
    peak = logits.detach().amax(-1, keepdim=True)
    none = peak == float("-inf")
    logits = (logits - peak).masked_fill(none, 0.0)  # relative: beside a bias of -1e38 not even fp64 holds the rest
    weights = logits.softmax(-1).masked_fill(none, 0.0)
    lse = logits.logsumexp(-1) + peak[..., 0]
    return torch.einsum("bhts,bshd->bthd", weights, v), lse.transpose(1, 2), weights


def rms_ratio(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, in fp64; 0 where both are zero."""
    actual, exact = actual.double(), exact.double()
    norm = exact.norm().item()
    return (actual - exact).norm().item() / norm if norm else (actual - exact).norm().item()


def assert_near_exact(actual: Tensor, eager: Tensor, exact: Tensor, factor: float, what: str = "value") -> None:
    """`actual` is as good as its precision allows: its largest error against the fp64 result is at most `factor` times that of
    plain eager code in the same precision, and its RMS ratio is below `RMS_RATIO`."""
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    error, allowed = (actual.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()
    if actual.dtype != torch.float64:  # where eager code is itself the yardstick
        # an exact zero is the difference of sums over D terms (the gradient through a softmax over one key)
        floor = torch.finfo(actual.dtype).eps * (exact.abs().max().item() or exact.shape[-1])
        assert error <= factor * allowed + floor, f"{what}: error {error:.3g} > {factor} x eager's {allowed:.3g}"
    _assert_small_rms_ratio(actual, exact, what)


def assert_rounded(actual: Tensor, exact: Tensor, magnitude: Tensor, units: float, what: str = "value") -> None:
    """Each element of `actual` is within `units` units in the last place of its `magnitude`, fp64, of the fp64 result, and the RMS ratio
    is below `RMS_RATIO`.

    The magnitude is what the result would be if all the terms that enter it were positive: rounding errors are relative to that,
    whereas the error of eager code, which adds up in an order of its own, may be small by luck.
    """
    error = (actual.double() - exact).abs() / (torch.finfo(actual.dtype).eps * magnitude)
    error = error.nan_to_num(0.0)  # 0 / 0 where nothing enters
    assert error.max() <= units, f"{what}: an error of {error.max():.3g} units, more than {units}"
    _assert_small_rms_ratio(actual, exact, what)


def _assert_small_rms_ratio(actual: Tensor, exact: Tensor, what: str) -> None:
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    ratio = rms_ratio(actual, exact)
    assert ratio <= RMS_RATIO[actual.dtype], f"{what}: RMS ratio {ratio:.3g} > {RMS_RATIO[actual.dtype]:.3g}"


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, memory from `torch.empty` and its relatives holds NaN (or a huge integer): reading what nobody wrote shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    real_new = Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

    with contextlib.ExitStack() as stack:
        for name, function in real.items():
            stack.enter_context(mock.patch.object(torch, name, lambda *a, _f=function, **kw: poison(_f(*a, **kw))))
        stack.enter_context(mock.patch.object(Tensor, "new_empty", lambda *a, **kw: poison(real_new(*a, **kw))))
        yield


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation within it returns: `with LargestTensor() as seen: ...`."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                # an expanded view holds no memory of its own
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def document_positions(lengths: list[int], batch: int = 1) -> Tensor:
    """[2, 3] -> [[0, 1, 0, 1, 2]] * batch, int64."""
    return torch.cat([torch.arange(n) for n in lengths])[None].repeat(batch, 1)


def random_qkv(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf tensors q [B, T, H, D], k and v [B, S, K, D] that require gradients, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(torch.get_default_device(), dtype).requires_grad_()

    return draw(batch, queries, heads, size), draw(batch, keys, kv_heads, size), draw(batch, keys, kv_heads, size)


def attend(
    method: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    call: Any,
    selector: Any = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """What one layer's method computes, an `ssa.attention.MethodOutput`.

    Args:
        method: A name, to be made with `options`, or an `ssa.attention.AttentionMethod`.
        q, k, v, gates, bias, call: see `ssa.attention.AttentionInputs` and `AttentionCall`.
        selector: An `ssa.attention.Selector`; by block means as long as none is given.
    """
    method = method_named(method).load()(**options) if isinstance(method, str) else method
    selector = selector or MeansSelector(HeadShape(q.shape[2], k.shape[2], q.shape[3]))
    return method(selector, AttentionInputs(q, k, v, gates, bias), call)


def tiny_config(method: str = "ssa", **changes: Any) -> Any:
    """An `SSAConfig` of two layers that runs in milliseconds; byte vocabulary, blocks of 4, 3 selected."""
    fields: dict[str, Any] = {
        "method": method, "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "block_size": 4, "num_selected_blocks": 3,
        "window_size": 6, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
    }  # fmt: skip
    return SSAConfig(**(fields | changes))


def tiny_model(method: str = "ssa", seed: int = 0, **changes: Any) -> Any:
    """A seeded `SSAForCausalLM` of `tiny_config`, in eval mode."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = SSAForCausalLM(tiny_config(method, **changes))
    return model.to(torch.get_default_device()).eval()


def save_checkpoint(
    run_dir: Path, step: int, model: Any, tokenizer: Any, optimizer: Any, extra: dict[str, Any], keep_last: int = 2
) -> Path:
    """A checkpoint as training on one rank writes it; returns its directory. See `ssa.train.saver.Saver`."""
    saver = Saver(run_dir, Ranks(torch.device("cpu")), tokenizer, keep_last)
    saver.save(step, model, optimizer, extra)
    assert saver.newest is not None
    return saver.newest
