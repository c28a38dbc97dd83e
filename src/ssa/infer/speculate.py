"""Self-speculation: sparse attention drafts a few tokens, full attention verifies them in one pass over the same cache, of the same model.

What is written is what full attention alone writes: its likeliest tokens, or draws from its distribution. A drafted token x, drawn from q(x), stays
with probability min(1, p(x) / q(x)), p being full attention's; the first that does not is drawn anew from max(0, p - q), and where all stay one
more is drawn from p (Leviathan et al. 2023, Chen et al. 2023).

Rows accept different numbers of drafts. By captured steps each keeps its own, and the rows of the cache end apart. The model's own passes know
rows that end together alone, so all rows keep as many as the one that accepted the fewest, and its first rejection. That leaves the distribution as it
is: what the others lose lies behind a place that every row had reached, and nothing at that place or before it looked at what came behind.

Legend: B rows, n drafts of a round, T = n + 1 tokens that are verified, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ssa.budget import FULL, AttentionMode, Reading, parse_reading
from ssa.errors import UserError
from ssa.infer.decoder import PREFILL_CHUNK, Attention, Draw, Rows, checked, drawn, next_tokens
from ssa.infer.load import check_budgets
from ssa.model import SSAForCausalLM
from ssa.model.step import MOVING_ROPE
from ssa.ops.decode import MAX_QUERIES

AUTO_DRAFTS = 4
WARM_UP, TRIED = 3, 8
"""Rounds, and plain steps, that `auto` lets go by (they compile and capture), and those that it times."""


@dataclass
class Speculation:
    """How many tokens are drafted at a time and by which budget, and how it went in all batches since this was made."""

    drafts: int = AUTO_DRAFTS
    auto: bool = False
    """Goes on only where it is faster than plain steps."""
    budget: Reading | None = None
    """What drafting reads; None = the model's own budget."""
    imposed: float | None = None
    """For timing alone: a coin with this probability accepts, whatever was drafted."""
    rounds: int = 0
    accepted: int = 0
    tested: int = 0
    """Drafts that were accepted, or the first of their row's round not to be."""
    rates: tuple[float, float] | None = None
    """Tokens a second of each row, by speculation and by plain steps, where `auto` has timed both."""
    by_own_passes: bool = False
    """The model's step could not be captured."""

    def __post_init__(self) -> None:
        if not 1 <= self.drafts < MAX_QUERIES:
            raise UserError(f"--speculate {self.drafts} must be auto, 0 (off) or 1 to {MAX_QUERIES - 1} drafts")

    @classmethod
    def chosen(
        cls, speculate: int | str, mode: str | None, budget: Reading | str | None
    ) -> tuple[Speculation | None, Reading | str | None]:
        """(as a user writes it, with the budget for the drafts; None for 0), and the budget that is left for everything else."""
        text = str(speculate).strip()
        if text == "0":
            return None, budget
        if text != "auto" and not text.isdecimal():
            raise UserError(f"--speculate {text} must be auto, 0 (off) or 1 to {MAX_QUERIES - 1} drafts")
        reading = None if budget is None else parse_reading(budget)
        if mode in ("sparse", "auto"):
            raise UserError(
                f"--speculate drafts by sparse attention for full attention to verify, and the mode is {mode}: take --mode full"
            )
        if reading is FULL:
            raise UserError(
                "--speculate drafts by sparse attention, and --budget full leaves nothing out: name a budget of blocks, or none"
            )
        return cls(AUTO_DRAFTS if text == "auto" else int(text), text == "auto", reading), None

    def check(self, model: SSAForCausalLM, mode: AttentionMode | None) -> None:
        """Raises `UserError` where the model's own mode is sparse and no other is named, or it cannot verify several tokens at once."""
        if (mode or model.config.attention_mode) != "full":
            raise UserError("--speculate verifies by full attention, and the model's own mode is sparse: take --mode full")
        kind = model.config.rope_parameters.get("rope_type")
        if kind in MOVING_ROPE:
            raise UserError(
                f"--speculate: the model's RoPE ({kind}) turns a token by the length so far, so several at once are not the same as one by one: "
                "leave it out"
            )
        check_budgets(model.config, [self.budget])

    @property
    def pays(self) -> bool | None:
        """None before `auto` knows."""
        return None if self.rates is None else self.rates[0] > self.rates[1]

    @property
    def acceptance(self) -> float | None:
        """Of a draft whose predecessors were accepted."""
        return self.accepted / self.tested if self.tested else None

    def summary(self) -> str:
        """For a user."""
        acceptance = "none verified" if self.acceptance is None else f"{self.acceptance:.0%} accepted"
        said = f"speculation: {self.drafts} drafts a round, {acceptance}"
        if self.rates is not None:
            said += f", {self.rates[0]:.1f} tokens/s a row against {self.rates[1]:.1f} of plain steps: {'kept' if self.pays else 'left off'}"
        elif self.auto:
            said += ", too short to time it against plain steps"
        return said + (", by the model's own passes" if self.by_own_passes else "")


@torch.no_grad()
def speculated_tokens(
    model: SSAForCausalLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    most: int,
    *,
    pad_id: int,
    attention: Attention,
    draw: Draw,
    speculation: Speculation,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[list[list[int]]]:
    """As `ssa.infer.decoder.decoded_tokens`, a round at a time: a list of tokens for each row, `most` in all, none where a row has them.

    Args:
        attention: of mode "full".

    Raises:
        UserError: As `decoded_tokens`, and where `Speculation.check` does.
    """
    speculation.check(model, attention.mode)
    n = speculation.drafts
    trial = speculation.auto and speculation.rates is None
    # plain steps take rows along that have what they need
    room = most + n + (n + 1) * (WARM_UP + TRIED) * trial
    rows = Rows(model, prompts, room, pad_id)
    chosen_B = draw(rows.prefill(attention, prefill_chunk))
    yield [[token] for token in checked(chosen_B.tolist())]
    if speculation.pays is False:
        stepped = chosen_B.is_cuda and rows.stepped(attention)
        for tokens in next_tokens(rows, chosen_B[:, None].clone(), most - 1, attention, draw, stepped):
            yield [[token] for token in tokens]
        return
    rounds = Rounds(rows, chosen_B, most - 1, attention, draw, speculation)
    if trial:
        yield from _tried(rounds, speculation)
    if speculation.pays is False:
        yield from rounds.plain(max(rounds.left))
    while max(rounds.left) > 0:
        yield rounds.next()


def _tried(rounds: Rounds, speculation: Speculation) -> Iterator[list[list[int]]]:
    """Rounds and plain steps, timed; `speculation.rates` afterwards, unless the tokens came to an end."""
    rates = []
    for source in (rounds.several(WARM_UP + TRIED), rounds.plain(WARM_UP + TRIED)):
        seconds = tokens = 0.0
        started = time.perf_counter()
        for number, new in enumerate(source):
            if number >= WARM_UP:
                seconds += time.perf_counter() - started
                tokens += sum(map(len, new)) / len(new)
            yield new
            started = time.perf_counter()
        if min(rounds.left) < rounds.width:  # rows that have all their tokens would be timed, too
            return
        rates.append(tokens / seconds)
    speculation.rates = rates[0], rates[1]


class Rounds:
    """The rounds of a batch of rows whose prompts are cached."""

    def __init__(
        self, rows: Rows, chosen_B: Tensor, left: int, attention: Attention, draw: Draw, speculation: Speculation
    ) -> None:  # fmt: skip
        """chosen_B: int64 [B], each row's newest token, not in the cache yet. left: tokens that each row will get."""
        model, n = rows.model.model, speculation.drafts
        self.rows, self.attention, self.draw, self.speculation = rows, attention, draw, speculation
        self.width, self.left = n + 1, [left] * len(chosen_B)
        self._drafting = Attention("sparse", speculation.budget)
        self.draft_calls = model.decoding_calls(**self._drafting.arguments())
        self.calls = [
            replace(full, keep_for=call.selection if call.mode == "sparse" else None)
            for full, call in zip(model.decoding_calls(**attention.arguments()), self.draft_calls, strict=True)
        ]
        self.stepped = rows.stepped(attention, self.width)
        speculation.by_own_passes |= not self.stepped
        ends: list[Tensor] | None = None
        if self.stepped:
            rows.cache.part_rows()
            ends = [layer.end for layer in rows.cache.layers]
        self._filled = [rows.cache.get_seq_length()] * len(chosen_B)
        self._choices = _Choices(chosen_B, left, draw, n, rows.model.config.vocab_size, ends, speculation.imposed)

    def next(self) -> list[list[int]]:
        """A round's tokens of each row, none of rows that have all of theirs."""
        cache, n = self.rows.cache, self.width - 1
        length = max(self._filled)
        for _ in range(n):
            self._draft()
        if self.stepped:
            cache.take_back(n)
            cache.count(length)
        else:
            cache.crop(-n)
        found = self._verify().tolist()  # the round's one wait
        kept, accepted, tokens = [row[0] for row in found], [row[1] for row in found], [row[2 : 2 + row[0]] for row in found]
        for row in tokens:
            checked(row or [0])
        going = [count for count, left in zip(accepted, self.left, strict=True) if left > 0]
        self.speculation.rounds += 1
        self.speculation.accepted += sum(going)
        self.speculation.tested += sum(min(count + 1, n) for count in going)
        self._filled = [a + b for a, b in zip(self._filled, kept, strict=True)]
        self.left = [a - b for a, b in zip(self.left, kept, strict=True)]
        if self.stepped:
            cache.count(max(self._filled))
        else:
            cache.crop(max(kept) - self.width)
        return tokens

    def several(self, count: int) -> Iterator[list[list[int]]]:
        """At most so many rounds."""
        for _ in range(count):
            if max(self.left) > 0:
                yield self.next()

    def plain(self, count: int) -> Iterator[list[list[int]]]:
        """The tokens of so many steps of full attention."""
        ids_B1 = self._choices.ids_B1
        for number, tokens in enumerate(next_tokens(self.rows, ids_B1, count, self.attention, self.draw, self.stepped)):
            yield [[token] if number < left else [] for token, left in zip(tokens, self.left, strict=True)]
        self._choices.went(count)
        self._filled = [a + count for a in self._filled]
        self.left = [max(0, a - count) for a in self.left]

    def _draft(self) -> Tensor:
        choices, rows = self._choices, self.rows
        if self.stepped:
            steps = rows.model.model.steps
            return steps.run(rows.model, choices.ids_B1, rows.cache, rows.starts_B, self.draft_calls, choices.draft)
        return choices.draft(rows.passed(choices.ids_B1, self._drafting.arguments()).logits)

    def _verify(self) -> Tensor:
        choices, rows = self._choices, self.rows
        if self.stepped:
            steps = rows.model.model.steps
            return steps.run(rows.model, choices.ids_BT, rows.cache, rows.starts_B, self.calls, choices.verify)
        return choices.verify(rows.passed(choices.ids_BT, self.attention.arguments(), self.width).logits)


class _Choices:
    """What becomes of a round's logits, on the device alone. Knows no cache: graphs know this, and would keep their cache alive by it."""

    def __init__(
        self, chosen_B: Tensor, left: int, draw: Draw, drafts: int, vocabulary: int, ends: list[Tensor] | None, imposed: float | None
    ) -> None:  # fmt: skip
        """ends: int64 [B] of each layer of a cache whose rows end apart; None: rows go on together."""
        self.draw, self.ends, self.imposed = draw, ends, imposed
        self.ids_B1 = chosen_B[:, None].clone()
        """What the next step takes."""
        self.ids_BT = chosen_B[:, None].repeat(1, drafts + 1)
        """The newest token of each row, then its drafts."""
        self.left_B = torch.full_like(chosen_B, left)
        self._at = torch.ones_like(chosen_B[:1])
        """Where the next draft goes."""
        self._q_BTV = None
        if draw.temperature:
            self._q_BTV = torch.zeros(len(chosen_B), drafts + 1, vocabulary, device=chosen_B.device)
            """What drafts were drawn from; 0 behind the last."""

    def draft(self, logits_BTV: Tensor) -> Tensor:
        """The next draft, int64 [B]. Where logits are no numbers it is any token, which verification does not accept."""
        if self._q_BTV is None:
            draft_B = logits_BTV[:, -1].argmax(-1)
        else:
            q_BV = self.draw.probabilities(logits_BTV[:, -1])
            self._q_BTV.index_copy_(1, self._at - 1, q_BV[:, None])
            draft_B = drawn(q_BV)
        self.ids_B1.copy_(draft_B[:, None])
        self.ids_BT.index_copy_(1, self._at, draft_B[:, None])
        self._at += 1
        return draft_B

    def verify(self, logits_BTV: Tensor) -> Tensor:
        """int64 [B, 2 + T]: tokens that each row keeps, drafts that were accepted, and the tokens, -1 where logits are no numbers."""
        draft_Bn = self.ids_BT[:, 1:]
        batch, n = draft_Bn.shape
        every_B = torch.arange(batch, device=draft_Bn.device)
        if self._q_BTV is None:
            best_BT = logits_BTV.argmax(-1)
            accepted_Bn = best_BT[:, :n] == draft_Bn
        else:
            p_BTV = self.draw.probabilities(logits_BTV)
            p_Bn, q_Bn = (x[:, :n].gather(2, draft_Bn[..., None]).squeeze(-1) for x in (p_BTV, self._q_BTV))
            accepted_Bn = torch.rand_like(q_Bn) * q_Bn < p_Bn
        if self.imposed is not None:
            accepted_Bn = torch.rand(batch, n, device=draft_Bn.device) < self.imposed
        accepted_B = accepted_Bn.long().cumprod(1).sum(1)
        kept_B = accepted_B + 1
        if self.ends is None:
            kept_B = kept_B.amin().expand(batch)
        kept_B = torch.minimum(kept_B, self.left_B)
        last_B = (kept_B - 1).clamp(min=0)
        # the last token that a row keeps: a draft, or what full attention says in the place of the first that was not accepted
        if self._q_BTV is None:
            last_token_B = best_BT[every_B, last_B]
        else:
            p_BV = p_BTV[every_B, last_B]
            rest_BV = (p_BV - self._q_BTV[every_B, last_B]).clamp(min=0)
            # nothing is left where q is p but for its rounding, or is not a number
            rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
            last_token_B = torch.where(last_B < accepted_B, self.ids_BT[every_B, (last_B + 1).clamp(max=n)], drawn(rest_BV))
        newest_B = torch.where(kept_B > 0, last_token_B, self.ids_BT[:, 0])
        last_token_B = torch.where(logits_BTV[every_B, last_B].amax(-1).isfinite(), last_token_B, -1)
        tokens_BT = draft_Bn[:, torch.arange(n + 1, device=draft_Bn.device).clamp(max=n - 1)]
        tokens_BT = tokens_BT.scatter(1, last_B[:, None], last_token_B[:, None])
        result = torch.cat([kept_B[:, None], accepted_B[:, None], tokens_BT], 1)
        self._start(newest_B)
        self.left_B -= kept_B
        self._at.fill_(1)
        if self.ends is not None:
            torch._foreach_sub_(self.ends, [n + 1 - kept_B] * len(self.ends))
        return result

    def went(self, count: int) -> None:
        """Plain steps have written so many tokens, the last of which is in `ids_B1`."""
        self._start(self.ids_B1[:, 0])
        self.left_B.sub_(count).clamp_(min=0)

    def _start(self, newest_B: Tensor) -> None:
        self.ids_B1.copy_(newest_B[:, None])
        self.ids_BT[:, :1].copy_(newest_B[:, None])
