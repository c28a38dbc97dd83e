"""The text of one sequence while its tokens arrive: only complete characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerFast

FinishReason = Literal["end", "stop", "length"]
"""end: the model ended the document; stop: a stop string came; length: no room for more tokens."""

_INCOMPLETE = "\ufffd"  # what decoding puts for bytes that are no character (yet)


class Transcript:
    """Push the generated tokens one by one; what each call returns can be printed at once and adds up to `text`.

    Text is held back while its last character is incomplete, and while it may be the beginning of a stop string. Tokens pushed after
    the end are ignored: in a batch, finished rows go on until the last one has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: frozenset[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self.end_ids, self._stop = tokenizer, end_ids, tuple(stop)
        self.token_ids: list[int] = []
        """Every token generated but the end token; those of a stop string included."""
        self.reason: FinishReason | None = None
        self._parts: list[str] = []
        # Tokens are decoded from `_context` on, which is one step behind `_printed`: some decoders treat a text's first token differently.
        self._context = self._printed = 0
        self._held = ""

    @property
    def text(self) -> str:
        """What has been released so far; all of it once `finish` was called."""
        return "".join(self._parts)

    def push(self, token_id: int) -> str:
        """The text that this token completes, "" for none."""
        if self.reason is not None:
            return ""
        if token_id in self.end_ids:
            self.reason = "end"
            return self._release(self._decoded(last=True), last=True)
        self.token_ids.append(token_id)
        return self._release(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """The rest of the text, where the tokens have run out."""
        if self.reason is not None:
            return ""
        released = self._release(self._decoded(last=True), last=True)
        self.reason = self.reason or "length"
        return released

    def _decoded(self, last: bool) -> str:
        before = self._decode(self.token_ids[self._context : self._printed])
        text = self._decode(self.token_ids[self._context :])
        if not last and (len(text) <= len(before) or text.endswith(_INCOMPLETE)):
            return ""
        self._context, self._printed = self._printed, len(self.token_ids)
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.reason = "stop"
            text, self._held = text[: min(found)], ""
        elif not last:
            hold = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self._parts.append(text)
        return text
