"""Log-likelihoods of continuations after contexts, by lm-evaluation-harness's rules and at a GPU's pace.

Requests are sorted by length, so that rows padded on the right to a common length waste next to nothing (the caller can read how
much); padded rows need no mask, because attention is causal in every mode. Logits exist for continuation positions alone.

Legend: B rows, T tokens of a row, P scored positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Reading
from ssa.data.tokenizer import encoded
from ssa.errors import UserError
from ssa.ranks import ALONE, Shard

BATCH_TOKENS = 65536
"""Tokens in a batch on a GPU, about, where the caller does not say."""
BATCH_TOKENS_CPU = 4096
LOGIT_ELEMENTS = 1 << 26
"""fp32 logits held at once: 256 MiB."""
ENCODED_AT_ONCE = 2048
"""Texts given to the tokenizer at a time; its answer is Python lists, fifty bytes a token."""
DELIVERY_SECONDS = 5.0
"""How often results leave the device, at most: each time waits for the work that is under way."""


class Request(NamedTuple):
    """What is scored: log p(continuation | context), both token ids [T], neither empty."""

    context: np.ndarray
    continuation: np.ndarray


class Score(NamedTuple):
    log_likelihood: float
    """Natural logarithm, summed over the continuation's tokens in fp64; each token's is computed in fp32."""
    is_greedy: bool
    """Every token of the continuation is the most likely one at its place."""


@dataclass
class Effort:
    """What a scoring pass computed, for the record."""

    tokens: int = 0
    """Real tokens that went through the model."""
    padded_tokens: int = 0
    """Places in the batches, padding included."""


def prefix_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """What stands before a text that has no context: bos, or else eos."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a bos nor an eos token to put before a text without context")


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids as lm-eval's `hf` model makes them: with whatever special tokens the tokenizer adds by itself, unless the text
    brings its own bos."""
    bos = tokenizer.decode(prefix_token(tokenizer))
    begun = [text.startswith(bos) for text in texts]
    if not any(begun):
        return _encode(tokenizer, texts, None)
    return [_encode(tokenizer, [text], False if has else None)[0] for text, has in zip(texts, begun, strict=True)]


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """(context, continuation) texts as requests: both are encoded together and cut where the context alone ends.

    Spaces at the context's end go to the continuation. An empty context becomes the prefix token, unless the continuation starts
    with that token already.

    Raises:
        UserError: A continuation that has no tokens of its own.
    """
    requests: list[Request] = []
    for at in range(0, len(pairs), ENCODED_AT_ONCE):
        requests += _encode_block(tokenizer, pairs[at : at + ENCODED_AT_ONCE])
    return requests


def _encode_block(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> Iterator[Request]:
    moved: list[tuple[str, str]] = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    encoded = {c: np.array(ids, np.int32) for c, ids in zip(contexts, encode(tokenizer, contexts), strict=True)}
    wholes = iter(encode(tokenizer, [context + continuation for context, continuation in moved if context]))
    alone = iter(_encode(tokenizer, [continuation for context, continuation in moved if not context], False))
    for context, continuation in moved:
        if context:
            head = encoded[context]
            tail = np.array(next(wholes)[len(head) :], np.int32)
        else:
            tail = np.array(next(alone), np.int32)
            head = np.array([prefix_token(tokenizer)], np.int32)
            if len(tail) and tail[0] == head[0]:
                tail = tail[1:]
        if not len(head) or not len(tail):
            raise UserError(
                f"nothing to score: {(context + continuation)[-60:]!r} leaves no token for the context or the continuation"
            )
        yield Request(head, tail)


def rolling_requests(token_ids: Sequence[int], prefix: int, max_length: int) -> list[Request]:
    """A whole text as requests that score each of its tokens once, each window reading as much as `max_length` allows.

    The first window starts from the prefix token; the last one is moved back so that it is full, and scores only what is left.
    """
    ids = np.concatenate([[prefix], token_ids]).astype(np.int32)
    requests = []
    for start in range(1, len(ids), max_length):
        end = min(start + max_length, len(ids))
        requests.append(Request(ids[max(0, end - max_length - 1) : start], ids[start:end]))
    return requests


def check_max_length(config: Any, max_length: int | None) -> int:
    """The longest input in tokens: what was asked for, else the model's positions."""
    limit = int(config.max_position_embeddings)
    if max_length is None:
        return limit
    if not 1 <= max_length <= limit:
        raise UserError(f"max_length = {max_length} must lie in 1..{limit}, the model's positions")
    return max_length


def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    *,
    max_length: int,
    attention_mode: AttentionMode | None = None,
    budget: Reading | str | None = None,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
    deliver: Callable[[list[tuple[int, Score]]], None] | None = None,
    effort: Effort | None = None,
    shard: Shard = ALONE,
) -> list[Score]:
    """The score of every request, in their order.

    Args:
        model: An `SSAForCausalLM` in eval mode, or anything with its `model(...)`, `lm_head` and `config.vocab_size`.
        max_length: Tokens that go into the model at most; the context loses its beginning where that is too few.
        batch_tokens: Computed at once, padding included; by default `BATCH_TOKENS` (`BATCH_TOKENS_CPU` on a CPU).
        batch_rows: Requests computed at once, instead.
        deliver: Called now and then with [(number of the request, its score), ...] of those finished since; each comes once. After
            an exception all that was finished before it may not have been delivered.
        effort: Receives how many tokens were computed.
        shard: Compute and return only this rank's of the batches, which are the same for any number of ranks.

    Raises:
        UserError: A continuation longer than `max_length`, or a result that is not finite.
    """
    device = next(model.parameters()).device
    rows = [_row(request, max_length) for request in requests]
    every = list(_batches([len(row) for row in rows], batch_tokens or _default_tokens(device), batch_rows))
    batches = [every[i] for i in shard.share(len(every))]
    scores: list[Score | None] = [None] * len(requests)
    waiting: list[tuple[list[int], Tensor, Tensor]] = []

    def collect() -> None:
        done = []
        for members, sums, greedy in waiting:
            for member, value, found in zip(members, sums.tolist(), greedy.tolist(), strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        "a log-likelihood is not finite (NaN or infinity): the weights are damaged or the precision is too low; try --dtype float32"
                    )
                scores[member] = Score(value, found)
                done.append((member, Score(value, found)))
        waiting.clear()
        if deliver is not None and done:
            deliver(done)

    last = time.monotonic()
    with torch.inference_mode():
        for members in batches:
            width = max(len(rows[m]) for m in members)
            if effort is not None:
                effort.tokens += sum(len(rows[m]) for m in members)
                effort.padded_tokens += width * len(members)
            sums, greedy = _score_batch(
                model,
                [rows[m] for m in members],
                [requests[m].continuation for m in members],
                width,
                device,
                attention_mode,
                budget,
            )
            waiting.append((members, sums, greedy))
            if time.monotonic() - last >= DELIVERY_SECONDS:
                collect()
                last = time.monotonic()
        collect()
    return [score for score in scores if score is not None]


def _score_batch(
    model: Any, rows: Sequence[np.ndarray], continuations: Sequence[np.ndarray], width: int, device: torch.device,
    attention_mode: AttentionMode | None, budget: Reading | str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums fp64 [B], greedy bool [B]) on the device; nothing here waits for it."""
    lengths = np.array([len(c) for c in continuations])
    input_BT = np.zeros((len(rows), width), np.int64)
    position_P = np.empty(lengths.sum(), np.int64)  # of the token that predicts each scored one, in the flattened batch
    at = 0
    for row, (tokens, count) in enumerate(zip(rows, lengths, strict=True)):
        input_BT[row, : len(tokens)] = tokens
        position_P[at : at + count] = row * width + np.arange(len(tokens) - count, len(tokens))
        at += count
    target_P = np.concatenate(continuations).astype(np.int64)
    row_P = np.repeat(np.arange(len(rows)), lengths)
    inputs, positions, targets, owners = (_to(x, device) for x in (input_BT, position_P, target_P, row_P))
    hidden_BTC = model.model(input_ids=inputs, use_cache=False, attention_mode=attention_mode, budget=budget).last_hidden_state
    hidden_PC = hidden_BTC.flatten(0, 1)[positions]
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
    misses = torch.zeros(len(rows), dtype=torch.int64, device=device)
    step = max(1, LOGIT_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(target_P), step):
        part = slice(start, start + step)
        logits_PV = model.lm_head(hidden_PC[part]).float()
        sums.index_add_(0, owners[part], -cross_entropy(logits_PV, targets[part], reduction="none").double())
        misses.index_add_(0, owners[part], (logits_PV.argmax(-1) != targets[part]).to(torch.int64))
    return sums, misses == 0


def _row(request: Request, max_length: int) -> np.ndarray:
    """What goes into the model: context and continuation without its last token, cut on the left."""
    if not len(request.context) or not len(request.continuation):
        raise UserError("a request needs at least one token of context and one of continuation")
    if len(request.continuation) > max_length:
        raise UserError(
            f"a continuation of {len(request.continuation)} tokens does not fit into max_length = {max_length}; raise it"
        )
    return np.concatenate([request.context, request.continuation])[-(max_length + 1) :][:-1]


def _batches(lengths: Sequence[int], batch_tokens: int, batch_rows: int | None) -> Iterator[list[int]]:
    """Numbers of the requests by batch, longest first: memory that does not suffice shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at = 0
    while at < len(order):
        count = batch_rows or max(1, batch_tokens // lengths[order[at]])
        yield order[at : at + count]
        at += count


def _default_tokens(device: torch.device) -> int:
    return BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS_CPU


def _to(x: np.ndarray, device: torch.device) -> Tensor:
    """On the device; a GPU copies while the host goes on."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], add_special_tokens: bool | None) -> list[list[int]]:
    if not texts:
        return []
    special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    ids: list[list[int]] = encoded(
        tokenizer, list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False, **special
    ).input_ids
    return ids
