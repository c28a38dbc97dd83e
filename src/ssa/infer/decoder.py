"""The tokens of a batch, step by step: prompts in chunks, then one token a row, chosen on the device.

On a GPU a step is one CUDA graph that feeds itself (`ssa.model.step`), and the host looks at a step's tokens while the next is under way.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa.budget import FULL, AttentionMode, Reading
from ssa.errors import UserError
from ssa.model import BlockCache, SSAForCausalLM

PREFILL_CHUNK = 8192
"""Tokens of a prompt computed at once."""


@dataclass(frozen=True)
class Draw:
    """How a token is drawn; temperature 0: the likeliest. top_k 0 and top_p 1: from the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]; -1 where logits are NaN or infinite, so that every choice would be arbitrary."""
        highest_B, likeliest_B = _largest(logits_BV)
        finite_B = highest_B.isfinite()
        if self.temperature == 0:
            return torch.where(finite_B, likeliest_B, -1)
        return torch.where(finite_B, drawn(self.probabilities(logits_BV)), -1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """fp32, of logits [..., V]: among the `top_k` likeliest, and of these among the likeliest that reach `top_p` together."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], float("-inf"))
        if self.top_p < 1:
            ordered, index = logits.sort(descending=True, stable=True)
            probs = ordered.softmax(-1)
            before = probs.cumsum(-1) - probs
            ordered = ordered.masked_fill(before >= self.top_p, float("-inf"))
            logits = torch.empty_like(logits).scatter_(-1, index, ordered)
        return logits.softmax(-1)


def _largest(x_BV: Tensor, parts: int = 64) -> tuple[Tensor, Tensor]:
    """(values, indices) of the largest, NaN before all, the first of equals; in two steps, since one row of a vocabulary keeps a GPU's reduction
    to one multiprocessor."""
    rows, width = x_BV.shape
    if width % parts or width < 4096:
        best = x_BV.max(-1)
        return best.values, best.indices
    parts_BPV = x_BV.view(rows, parts, -1).max(-1)
    best = parts_BPV.values.max(-1)
    index_B = parts_BPV.indices.gather(1, best.indices[:, None])[:, 0] + best.indices * (width // parts)
    return best.values, index_B


def drawn(weights_BV: Tensor) -> Tensor:
    """int64 [B], a draw with probabilities in proportion to the weights."""
    # argmax w / e with e exponential is such a draw, and needs no look from the host
    return (weights_BV / torch.empty_like(weights_BV).exponential_()).argmax(-1)


@dataclass(frozen=True)
class Attention:
    """What a decoder reads: `mode` and `budget` as the model's call takes them, and the prompt's mode where it is another."""

    mode: AttentionMode | None = None
    budget: Reading | None = None
    prefill_mode: AttentionMode | None = None
    sparse_from: float | None = None
    """Everything before so many cached tokens, the chosen blocks from then on, whatever `mode` says (`ssa.infer.crossover`)."""

    def arguments(self, tokens: int = 0, prompt: bool = False) -> dict[str, Any]:
        """Of a pass after which so many tokens are cached."""
        mode = self.prefill_mode if prompt else None
        if mode is None and self.sparse_from is not None:
            mode = "full" if tokens < self.sparse_from else "sparse"
        if mode is None:
            return {"attention_mode": self.mode, "budget": self.budget}
        sparse = mode == "sparse" and self.budget is not FULL
        return {"attention_mode": mode, "budget": self.budget if sparse else None}


class Rows:
    """A batch of sequences, padded on the left, in one cache."""

    def __init__(
        self, model: SSAForCausalLM, prompts: Sequence[Sequence[int] | np.ndarray], room: int | None, pad_id: int
    ) -> None:
        """`room`: tokens that will follow the longest prompt, at most; None = nobody knows, the cache grows."""
        self.model, self.width = model, max(map(len, prompts))
        input_BT = torch.full((len(prompts), self.width), pad_id, dtype=torch.int64, device="cpu")
        for row, ids in enumerate(prompts):
            input_BT[row, self.width - len(ids) :] = torch.as_tensor(ids, device="cpu")
        pads_B = torch.tensor([self.width - len(ids) for ids in prompts], device="cpu")
        self.input_BT, self.starts_B = input_BT.to(model.device), pads_B.to(model.device)
        self.padded = bool(pads_B.any())
        self.cache = BlockCache(None if room is None else self.width + room)

    def prefill(self, attention: Attention, chunk: int = PREFILL_CHUNK) -> Tensor:
        """The logits after the prompts, [B, V]."""
        if chunk < 1:
            raise UserError(f"prefill chunk {chunk} must be at least 1 token")
        logits: Any = None
        for start in range(0, self.width, chunk):
            part_BT = self.input_BT[:, start : start + chunk]
            logits = self.passed(part_BT, attention.arguments(self.width, prompt=True)).logits
        return logits[:, -1]

    def stepped(self, attention: Attention, tokens: int = 1) -> bool:
        """Whether so many tokens at once go by the captured step."""
        inner = self.model.model
        calls = inner.decoding_calls(**attention.arguments())
        return inner.steps.applies(self.model, calls, inner.embed_tokens.weight[:1, None], tokens)

    def passed(self, ids_BT: Tensor, arguments: dict[str, Any], logits: int = 1) -> Any:
        """The model's output for tokens after those in the cache; logits of the last so many."""
        end = self.cache.get_seq_length() + ids_BT.shape[1]
        mask_BS = (torch.arange(end, device=ids_BT.device) >= self.starts_B[:, None]).long() if self.padded else None
        return self.model(
            input_ids=ids_BT, attention_mask=mask_BS, cache=self.cache, use_cache=True, logits_to_keep=logits, **arguments
        )


@torch.no_grad()
def decoded_tokens(
    model: SSAForCausalLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    most: int,
    *,
    pad_id: int,
    attention: Attention,
    draw: Draw,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[list[int]]:
    """The tokens of every row after its prompt, a step at a time, `most` steps at most. The caller knows when to stop.

    Raises:
        UserError: The model's logits are NaN or infinite, or `prefill_chunk` is no number of tokens.
    """
    rows = Rows(model, prompts, most, pad_id)
    chosen_B = draw(rows.prefill(attention, prefill_chunk))
    yield checked(chosen_B.tolist())
    yield from next_tokens(rows, chosen_B[:, None].clone(), most - 1, attention, draw)


class _Choose:
    """What a step does with its logits: draws a token for each row, and puts it where the next step reads it. Those that do the same are equal,
    so that a captured step serves whoever decodes on from the same memory."""

    def __init__(self, draw: Draw, ids_B1: Tensor) -> None:
        self._draw, self._ids_B1 = draw, ids_B1

    def __call__(self, logits_BTV: Tensor) -> Tensor:
        drawn_B = self._draw(logits_BTV[:, -1])
        self._ids_B1.copy_(drawn_B.clamp(min=0)[:, None])
        return drawn_B

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Choose) and self._draw == other._draw and self._ids_B1 is other._ids_B1

    def __hash__(self) -> int:
        return hash((self._draw, id(self._ids_B1)))


@torch.no_grad()
def next_tokens(
    rows: Rows, ids_B1: Tensor, count: int, attention: Attention, draw: Draw, stepped: bool | None = None
) -> Iterator[list[int]]:  # fmt: skip
    """So many tokens after `ids_B1`, which holds each row's newest, not in the cache yet, and afterwards the last of these.

    On a GPU the cache may hold a token more than were seen when the caller stops early.

    Args:
        stepped: By captured steps, not by the model's own passes; None = where there is a GPU and they apply.
    """
    model, calls_of, choose = rows.model, dict[Any, Any](), _Choose(draw, ids_B1)
    if stepped is None:
        stepped = ids_B1.is_cuda and rows.stepped(attention)

    def step() -> Tensor:
        arguments = attention.arguments(rows.cache.get_seq_length() + 1)
        if not stepped:
            return choose(rows.passed(ids_B1, arguments).logits)
        mode = arguments["attention_mode"]
        if mode not in calls_of:
            calls_of[mode] = model.model.decoding_calls(**arguments)
        return model.model.steps.run(model, ids_B1, rows.cache, rows.starts_B, calls_of[mode], choose)

    if not (stepped and ids_B1.is_cuda):
        for _ in range(count):
            yield checked(step().tolist())
        return
    under_way: list[tuple[Tensor, torch.cuda.Event]] = []
    places = [torch.empty(len(ids_B1), dtype=torch.int64, device="cpu", pin_memory=True) for _ in range(2)]
    for number in range(count):
        place, event = places[number % 2], torch.cuda.Event()
        place.copy_(step(), non_blocking=True)
        event.record(torch.cuda.current_stream(ids_B1.device))
        under_way.append((place, event))
        if len(under_way) == 2:
            yield _arrived(*under_way.pop(0))
    for last in under_way:
        yield _arrived(*last)


def _arrived(place: Tensor, event: torch.cuda.Event) -> list[int]:
    event.synchronize()
    return checked(place.tolist())


def checked(tokens: list[int]) -> list[int]:
    """Them. Raises `UserError` where one could not be chosen (`Draw`)."""
    if min(tokens) < 0:
        raise UserError(
            "the model's logits are nan or infinite, so no token can be chosen: its weights hold such values, or overflow in "
            "this precision; take another checkpoint, or dtype float32"
        )
    return tokens
