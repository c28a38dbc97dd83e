"""A conversation over one cache: each turn computes only what the cache does not hold of the conversation yet."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, TextIO

import torch
from transformers import PreTrainedTokenizerFast

from ssa.budget import FULL, AttentionMode, LayerBudgets, Reading
from ssa.data.lines import without_surrogates
from ssa.data.tokenizer import encoded
from ssa.device import device_name
from ssa.errors import UserError, described, one_line
from ssa.infer.batch import end_ids_of
from ssa.infer.crossover import Auto, auto_for
from ssa.infer.decoder import PREFILL_CHUNK, Attention, Draw, Rows, checked, next_tokens
from ssa.infer.engine import Prompt, Sampling, first_ids
from ssa.infer.load import attention_choice, check_budgets, load_model
from ssa.infer.transcript import FinishReason, Transcript
from ssa.model import SSAForCausalLM
from ssa.terminal import visible

HELP = """\
/budget 32x16      read 32 blocks of 16 keys a token from now on; /budget full reads all
/mode full|sparse  read everything, or blocks within the budget; /mode auto takes what is faster at the length so far
/system TEXT       what the model is told first; without TEXT nothing
/undo              take back the last question and its answer
/reset             start a new conversation; the system text stays
/help              this list
/quit              leave; so does the end of input
Ctrl-C stops an answer, and leaves at the prompt. A message that begins with / is written //."""

_USER, _ANSWER = "User:", "Assistant:"
_MARK = "x7q"
"""An answer that a template leaves as it is, to see what it puts behind one."""


@dataclass(frozen=True)
class Answer:
    text: str
    """Without the end token and the stop string."""
    reason: FinishReason | Literal["interrupted"]
    tokens: int
    """Tokens generated, the end token among them."""
    prefilled: int
    """Tokens of the conversation that were computed before the first of them."""
    tokens_per_s: float | None
    """After the first; None where there was no second."""


class Chat:
    """One conversation with a model.

    What is cached stays as it was read: another mode or budget counts for the tokens that come after.
    """

    def __init__(
        self, model: SSAForCausalLM, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, *, mode: str | None = None,
        budget: Reading | str | None = None, prompt: Prompt | None = None, system: str = "",
    ) -> None:  # fmt: skip
        """`sampling.seed` decides the draws of all answers; `sampling.stop` ends each. `prompt` says how questions are read.

        Raises:
            UserError: A mode or budget that the model cannot serve, or a system text that its template does not take.
        """
        self.model, self.tokenizer, self.sampling, self.prompt = model, tokenizer, sampling, prompt or Prompt()
        self.turns: list[tuple[str, str]] = []
        """Questions and answers."""
        self.system = ""
        self.mode: AttentionMode = model.config.attention_mode
        self.auto: Auto | None = None
        """Where mode auto goes from full to sparse attention, whatever `mode` is."""
        self.budget: Reading | None = None
        """In sparse mode; None = the model's own."""
        self.cached: list[int] = []
        """The tokens whose keys and values the cache holds."""
        self._asked = 0
        self._start_cache()
        self.read(mode, budget)
        self.instruct(system)
        self._end_ids = end_ids_of(model, tokenizer) | self._turn_ends()
        self._stop = sampling.stop if tokenizer.chat_template else (*sampling.stop, f"\n{_USER}")

    def read(self, mode: str | None, budget: Reading | str | None) -> None:
        """How tokens are read from now on; None leaves the mode or the budget as it is. Raises `UserError`, and changes nothing then."""
        auto = mode == "auto"
        chosen, reading = attention_choice("sparse" if auto else mode, budget)
        check_budgets(self.model.config, [reading])
        if chosen is not None:
            self.auto = auto_for(device_name(self.model.device), self.model.config, 1) if auto else None
        self.mode = chosen or self.mode
        if reading is not None and reading is not FULL:
            self.budget = reading

    def instruct(self, system: str) -> None:
        """Another system text, "" for none. Raises `UserError`, and keeps the old one, where the template takes none."""
        before, self.system = self.system, system
        try:
            self.rendered("?")
        except UserError:
            self.system = before
            raise

    def undo(self) -> None:
        """Takes back the last question and its answer. Raises `UserError` where there is none."""
        if not self.turns:
            raise UserError("there is nothing to take back")
        self.turns.pop()

    def reset(self) -> None:
        """Forgets all turns and gives back the cache's memory."""
        self.turns.clear()
        self._start_cache()

    @property
    def reading(self) -> Reading:
        """What a token reads."""
        full = self.mode == "full" if self.auto is None else len(self.cached) < self.auto.tokens
        return FULL if full else self.budget or self.model.config.budget

    @property
    def keys_read(self) -> float:
        """Keys that a token after the cached ones reads, the mean over layers."""
        readings = list(self.reading) if isinstance(self.reading, LayerBudgets) else [self.reading]
        return sum(min(len(self.cached), reading.tokens) for reading in readings) / len(readings)

    def rendered(self, question: str) -> list[int]:
        """The conversation with a question more, in tokens, up to where its answer begins.

        Raises:
            UserError: The question is no text, or the template or the tokenizer cannot take it.
        """
        for text in (self.system, question):
            if text != without_surrogates(text):
                raise UserError(f"{text[:60]!r} is no text: it has bytes that are not UTF-8")
        return self._encoded(self._text([*self.turns, (question, None)]))

    def answer(self, question: str, show: Callable[[str], None] = lambda text: None) -> Answer:
        """The model's answer, shown as it comes and kept with the question. On Ctrl-C it ends where it is, and is kept as far as it came; one
        of which nothing has come, or which fails, leaves the conversation as it was.

        Raises:
            UserError: The context is full, the question cannot be encoded, or logits are NaN or infinite.
        """
        ids, limit = self.rendered(question), self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise UserError(
                f"the context is full: with this message the conversation has {len(ids)} tokens, and the model reads {limit}; "
                + ("/undo takes back the last turn, /reset starts anew" if self.turns else "send a shorter one")
            )
        transcript, new, interrupted = Transcript(self.tokenizer, self._end_ids, self._stop), [], False
        kept = self._keep(ids)
        arrivals: list[float] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _noticed_interrupts() as asked:
            torch.manual_seed(self.sampling.seed + self._asked)
            self._asked += 1
            tokens = self._tokens(ids, kept, min(self.sampling.max_new_tokens, limit - len(ids)), asked)
            try:
                for token in tokens:
                    arrivals.append(time.perf_counter())
                    new.append(token)
                    show(transcript.push(token))
                    if transcript.reason is not None or asked():
                        break
                interrupted = asked() and transcript.reason is None
            except KeyboardInterrupt:
                interrupted = True
            finally:
                tokens.close()
                self._settle([*ids, *new])
        show(transcript.finish())
        if transcript.text or not interrupted:
            self.turns.append((question, transcript.text))
        speed = (len(new) - 1) / (arrivals[-1] - arrivals[0]) if len(new) > 1 else None
        reason: FinishReason | Literal["interrupted"] = "interrupted" if interrupted else transcript.reason or "length"
        return Answer(transcript.text, reason, len(new), len(ids) - kept, speed)

    def _start_cache(self) -> None:
        # The cache grows: a chat's length is not known, and the most that the model reads may be more than there is memory for.
        self._rows = Rows(self.model, [[]], None, 0)
        self._newest_B1 = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.cached = []

    def _keep(self, ids: list[int]) -> int:
        """Crops the cache to what it has of the beginning of `ids`, all but the last at most, whose logits are needed; the number of these."""
        same = (a == b for a, b in zip(self.cached, ids[:-1], strict=False))
        kept = next((i for i, equal in enumerate(same) if not equal), min(len(self.cached), len(ids) - 1))
        self._settle(self.cached[:kept])
        return kept

    def _settle(self, ids: list[int]) -> None:
        """The cache holds the first of these tokens, and may hold others behind them, which are dropped."""
        cache = self._rows.cache
        held = cache.get_seq_length()
        if held > len(ids):
            cache.crop(len(ids) - held)
        self.cached = ids[: min(held, len(ids))]

    @torch.no_grad()
    def _tokens(self, ids: list[int], kept: int, most: int, asked: Callable[[], bool]) -> Generator[int]:
        """The tokens after `ids`, of which the cache holds the first `kept`; none where somebody has asked to stop before the first."""
        sampling = self.sampling
        attention = Attention(self.mode, self.budget, self.prompt.mode, None if self.auto is None else self.auto.tokens)
        draw = Draw(float(sampling.temperature), sampling.top_k, float(sampling.top_p))
        rows, logits = self._rows, None
        try:
            for start in range(kept, len(ids), self.prompt.chunk):
                if asked():
                    return
                part_BT = torch.tensor([ids[start : start + self.prompt.chunk]], device=self.model.device)
                logits = rows.passed(part_BT, attention.arguments(len(ids), prompt=True)).logits
            assert logits is not None
            self._newest_B1.copy_(draw(logits[:, -1])[:, None])
            yield from checked(self._newest_B1[0].tolist())
            for tokens in next_tokens(rows, self._newest_B1, most - 1, attention, draw):
                yield from tokens
        except GeneratorExit:
            raise
        except BaseException:  # amid a pass: some layers may have its tokens and others not
            self._start_cache()
            raise

    def _text(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """The conversation as the model reads it; a last answer that is None is the model's to give."""
        open_end = bool(turns) and turns[-1][1] is None
        if not self.tokenizer.chat_template:
            system = f"{self.system}\n\n" if self.system else ""
            parts = [f"{_USER} {question}\n{_ANSWER}" + ("" if answer is None else f"{answer}\n") for question, answer in turns]
            return system + "".join(parts)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end))
        except Exception as error:  # a template raises what it likes
            raise UserError(f"the model's chat template does not take this conversation: {one_line(error)}") from error

    def _encoded(self, text: str) -> list[int]:
        if self.tokenizer.chat_template:  # which writes special tokens by their names
            return list(encoded(self.tokenizer, text, add_special_tokens=False, split_special_tokens=False).input_ids)
        return first_ids(self.tokenizer) + list(encoded(self.tokenizer, text, add_special_tokens=False).input_ids)

    def _turn_ends(self) -> frozenset[int]:
        """The special token that the template puts behind an answer, which may be no end of a document."""
        if not self.tokenizer.chat_template:
            return frozenset()
        _, found, behind = self._text([("?", _MARK)]).rpartition(_MARK)
        special = set(self.tokenizer.all_special_ids) | {i for i, x in self.tokenizer.added_tokens_decoder.items() if x.special}
        return frozenset([i for i in self._encoded(behind) if i in special][:1] if found else ())


@contextlib.contextmanager
def _noticed_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came, to be asked between two passes, where the cache is whole; a second Ctrl-C is a KeyboardInterrupt at once.

    Signals belong to the main thread; elsewhere it is never asked.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if in_main else None
    try:
        yield lambda: bool(asked)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def talk(chat: Chat, read: Callable[[str], str], out: TextIO, err: TextIO, prompts: bool) -> None:
    """Reads messages and commands, and answers them, until the end of input or /quit.

    Args:
        read: A line of the user's, who may see its argument; raises EOFError at the end.
        out: Where answers are written.
        err: What else there is to say, a line each.
        prompts: The user sees `read`'s argument, which has the figures; otherwise they go to `err` after each answer.
    """
    figures, speed = _figures(chat, None), None
    while True:
        try:
            line = read(f"[{figures}] > ").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if prompts:
                _say("", err)
            raise
        try:
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                _obey(chat, line, err)
                figures = _figures(chat, speed)
            elif line:
                speed = _answer(chat, line.removeprefix("/"), out, err)
                figures = _figures(chat, speed)
                if not prompts:
                    _say(figures, err)
        except Exception as error:
            told = str(error) if isinstance(error, UserError) else described(error)
            if told is None or isinstance(error, OSError):
                raise
            _say(told, err)
    if prompts:
        _say("", err)  # the shell's prompt begins a line


def _answer(chat: Chat, question: str, out: TextIO, err: TextIO) -> float | None:
    """Writes the answer; its tokens/s."""

    def show(text: str) -> None:
        if text:
            out.write(text)
            out.flush()

    answer = chat.answer(question, show)
    show("\n")
    limit = chat.model.config.max_position_embeddings
    if answer.reason == "interrupted":
        _say("(stopped)" if answer.text else "(stopped before the first token: the message is not kept)", err)
    elif answer.reason == "length" and answer.tokens == chat.sampling.max_new_tokens:
        _say(f"(stopped after --max-new-tokens {answer.tokens})", err)
    elif answer.reason == "length":
        _say(f"(the context of {limit} tokens is full: /undo takes back the last turn, /reset starts anew)", err)
    return answer.tokens_per_s


def _obey(chat: Chat, line: str, err: TextIO) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/budget" and rest:
        chat.read(None, rest)
    elif command == "/mode" and rest:
        chat.read(rest, None)
    elif command == "/system":
        chat.instruct(rest)
    elif command == "/undo" and not rest:
        chat.undo()
    elif command == "/reset" and not rest:
        chat.reset()
    elif command == "/help":
        print(HELP, file=err, flush=True)
    elif command in ("/budget", "/mode"):
        raise UserError(f"{command} needs a value: {'/budget 32x16' if command == '/budget' else '/mode full, sparse or auto'}")
    elif command in ("/undo", "/reset", "/quit"):
        raise UserError(f"{command} takes no value, but has {rest!r}")
    else:
        raise UserError(f"no command {command!r}; /help lists them, and a message that begins with / is written //")


def _figures(chat: Chat, speed: float | None) -> str:
    """How it reads, how much, and how fast it was."""
    context, reading = len(chat.cached), chat.reading
    how = ("" if chat.auto is None else "auto: ") + ("full" if reading is FULL else f"sparse {reading}")
    much = f", {math.ceil(chat.keys_read):,} of {context:,} keys a token" if context else ""
    return how + much + ("" if speed is None else f", {speed:.1f} tokens/s")


def _say(text: str, err: TextIO) -> None:
    print(visible(text), file=err, flush=True)


def chat(
    run: Path | str,
    read: Callable[[str], str],
    *,
    mode: AttentionMode | Literal["auto"] | None = None,
    budget: Reading | str | None = None,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    prefill_mode: AttentionMode | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    graphs: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    out: TextIO,
    err: TextIO,
    prompts: bool = False,
) -> None:
    """A chat with the model of `run` (a run, a checkpoint or a model directory).

    Args:
        read, out, err, prompts: See `talk`.
        mode, budget, prefill_mode, prefill_chunk, graphs: As for `ssa.infer.engine.generate`.
        system: What the model is told first.
        max_new_tokens ... seed: See `ssa.infer.engine.Sampling`.

    Raises:
        UserError: Anything a user can get wrong before the first message; later it is a line on `err`.
    """
    attention_choice("sparse" if mode == "auto" else mode, budget)
    sampling, prompt = Sampling(max_new_tokens, temperature, top_k, top_p, seed), Prompt(prefill_mode, prefill_chunk)
    model, tokenizer = load_model(run, device, dtype)
    model.model.steps.graphs = graphs
    conversation = Chat(model, tokenizer, sampling, mode=mode, budget=budget, prompt=prompt, system=system)
    if not tokenizer.chat_template:
        _say(f"the model has no chat template: turns are written plainly, {_USER} ... {_ANSWER} ...", err)
    talk(conversation, read, out, err, prompts)
