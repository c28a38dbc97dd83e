"""Text generation: prompts in, completions out, with the block cache, streaming and stop strings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

import torch
from transformers import PreTrainedTokenizerFast

from ssa.budget import FULL, AttentionMode, Reading, parse_reading
from ssa.config import check_seed
from ssa.data.lines import read_text, without_surrogates
from ssa.data.tokenizer import encoded
from ssa.device import device_name
from ssa.errors import UserError, one_line
from ssa.infer.batch import end_ids_of, generate_batch, pad_id_of
from ssa.infer.crossover import Auto, auto_for
from ssa.infer.decoder import PREFILL_CHUNK, Draw
from ssa.infer.load import attention_choice, check_budgets, load_model
from ssa.infer.speculate import Speculation
from ssa.infer.transcript import FinishReason, Transcript
from ssa.model import SSAForCausalLM


@dataclass(frozen=True)
class Completion:
    prompt: str
    text: str
    """What the model wrote, without the prompt, the end token and the stop string."""
    token_ids: list[int]
    """The generated tokens without the end token; those of a stop string included."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop. temperature 0 = greedy; top_k 0 and top_p 1 = from the whole vocabulary."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must lie in 0..1, 0 excluded")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            which = f"--top-k {self.top_k}" if self.top_k else f"--top-p {self.top_p}"
            raise UserError(f"{which} has no effect without sampling: add --temperature 1, or leave it out to decode greedily")
        check_seed(self.seed, "seed")
        if any(not s for s in self.stop):
            raise UserError("a --stop string is empty")


@dataclass(frozen=True)
class Prompt:
    """How prompts are read: in which mode, where it is not that of what follows, and how many tokens at once."""

    mode: AttentionMode | None = None
    chunk: int = PREFILL_CHUNK
    auto: Auto | None = None
    """Where mode auto goes from full to sparse attention, for the prompt and for what follows."""

    def __post_init__(self) -> None:
        if self.mode not in (None, "sparse", "full"):
            raise UserError(f"--prefill-mode {self.mode!r} is neither 'sparse' nor 'full'")
        if self.chunk < 1:
            raise UserError(f"--prefill-chunk {self.chunk} must be at least 1 token")


def generate(
    run: Path | str,
    prompts: Sequence[str],
    *,
    mode: AttentionMode | Literal["auto"] | None = None,
    budget: Reading | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    prefill_mode: AttentionMode | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    speculate: int | str = 0,
    graphs: bool = True,
    stream: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> list[Completion]:
    """Continue each prompt with the model of `run` (a run, a checkpoint or a model directory).

    Args:
        prompts: An empty one starts from the tokenizer's first-token (bos or, without one, the end of a document).
        mode: "sparse" or "full"; "auto" = full up to the context where sparse is no slower on this device, sparse beyond; None = the model's own.
        budget: `Budget` or "kxs", also one the model was not trained with; alone it means sparse. "full" is mode "full". None = the model's own.
        max_new_tokens ... stop: See `Sampling`. `seed` decides all draws of the call; with another `batch_size` or other prompts
            beside it, a prompt gets other draws. Greedy completions do not depend on their neighbours.
        batch_size: Prompts computed together, left-padded.
        prefill_mode: "sparse" or "full": the prompts' attention, where it is not that of what follows.
        prefill_chunk: Tokens of a prompt computed at once: less memory, the same tokens.
        speculate: Tokens that sparse attention drafts for full attention to verify in one pass, 1 to 7; "auto": where it is faster; 0 = none. Needs
            mode "full"; `budget` is then the drafts'.
        graphs: On a GPU launch a step as one CUDA graph.
        stream: With one prompt, write to `out` while generating.
        out: Where completions are written, None = nowhere. One prompt: its bare text. Several: each under a heading.
        err: Where the summary (tokens per second) is written, None = nowhere.

    Returns:
        One `Completion` per prompt, in order.

    Raises:
        UserError: Anything a user can get wrong, before any token is generated.
    """
    auto = mode == "auto"
    if auto and budget is not None and parse_reading(budget) is FULL:
        raise UserError("mode 'auto' and budget 'full' contradict each other; drop one of them")
    speculation, budget = Speculation.chosen(speculate, mode, budget)
    chosen, budget = attention_choice(None if mode == "auto" else mode, budget)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop))
    if not prompts:
        raise UserError("no prompt given; pass at least one (an empty one is fine)")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be at least 1")
    prompt = Prompt(prefill_mode, prefill_chunk)
    model, tokenizer = load_model(run, device, dtype, chosen, budget)
    if auto:
        prompt = replace(prompt, auto=auto_for(device_name(model.device), model.config, min(batch_size, len(prompts))))
    if speculation is not None:
        speculation.check(model, None)
    model.model.steps.graphs = graphs
    live = out if stream and len(prompts) == 1 else None
    clock = _Clock()
    completions = []
    for group in _complete(model, tokenizer, prompts, sampling, batch_size, live, clock, prompt=prompt, speculation=speculation):
        for completion in group:
            completions.append(completion)
            if out is not None and live is None:
                out.write(_shown(completion, len(completions), len(prompts)))
                out.flush()
    if live is not None:
        live.write("\n")
        live.flush()
    if err is not None:
        print(_summary(model, completions, clock, prompt.auto, speculation), file=err, flush=True)
    return completions


def complete(
    model: SSAForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    mode: AttentionMode | None = None,
    budget: Reading | str | None = None,
    batch_size: int = 16,
    live: TextIO | None = None,
    speculate: int | str | Speculation = 0,
) -> list[Completion]:
    """`generate` for a model in memory; `live` receives the text of the first row of each batch as it comes. A `Speculation` knows afterwards how
    it went."""
    speculation: Speculation | None
    if isinstance(speculate, Speculation):
        speculation = speculate
    else:
        speculation, budget = Speculation.chosen(speculate, mode, budget)
    mode, chosen = attention_choice(mode, budget)
    check_budgets(model.config, [chosen])
    groups = _complete(
        model, tokenizer, prompts, sampling or Sampling(), batch_size, live, _Clock(), mode, chosen, speculation=speculation
    )
    return [completion for group in groups for completion in group]


def read_prompts(prompts: Sequence[str], file: str | Path | None, stdin: TextIO | None) -> list[str]:
    """The prompts of a command line: those given, then the text of `file` ("-" = standard input) as one more.

    With neither, standard input is the prompt if it is no terminal. A file's last line break is not part of the prompt: editors and
    shells put it there. Raises `UserError` where there is nothing, or the file is empty or cannot be read as UTF-8.
    """
    found = list(prompts)
    if not found and file is None and stdin is not None and not stdin.isatty():
        file = "-"
    if file is not None:
        try:
            text = stdin.read().removeprefix("\ufeff") if str(file) == "-" and stdin is not None else read_text(Path(file))
        except (OSError, ValueError) as error:
            raise UserError(f"prompt file {file} cannot be read: {one_line(error)}") from None
        text = text.replace("\r\n", "\n")
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            where = "standard input" if str(file) == "-" else f"prompt file {file}"
            raise UserError(f"{where} is empty: write the prompt there or give --prompt TEXT ('' starts from nothing)")
        found.append(text)
    if not found:
        raise UserError("no prompt: give --prompt TEXT, a prompt file, or text on standard input")
    return found


def first_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer itself puts before a text: [bos] for Llama's, nothing for this project's own."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and encoded(tokenizer, "").input_ids[:1] == [bos] else []


@dataclass
class _Clock:
    """Seconds and tokens of prefill and decoding, over all batches."""

    prefill: float = 0.0
    decode: float = 0.0
    decoded: int = 0


def _complete(
    model: SSAForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], sampling: Sampling, batch_size: int,
    live: TextIO | None, clock: _Clock, mode: AttentionMode | None = None, budget: Reading | None = None, prompt: Prompt = Prompt(),
    speculation: Speculation | None = None,
) -> Iterator[list[Completion]]:  # fmt: skip
    """The completions, a batch at a time."""
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    longest, limit = max(map(len, encoded)), model.config.max_position_embeddings
    if longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's {limit} positions; "
            + (f"set --max-new-tokens to {limit - longest} or less" if longest < limit else "shorten the prompt")
        )
    # A random state of our own, from the seed and the batch's first prompt: the caller's stays as it is.
    devices = [model.device] if model.device.type == "cuda" else []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed + start)
            group = _batch(
                model, tokenizer, prompts[rows], encoded[rows], sampling, live, clock, mode, budget, prompt, speculation
            )
        yield group


def _batch(
    model: SSAForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], encoded: list[list[int]],
    sampling: Sampling, live: TextIO | None, clock: _Clock, mode: AttentionMode | None, budget: Reading | None, prompt: Prompt,
    speculation: Speculation | None,
) -> list[Completion]:  # fmt: skip
    end_ids = end_ids_of(model, tokenizer)
    transcripts = [Transcript(tokenizer, end_ids, sampling.stop) for _ in encoded]

    def show(row: int, text: str) -> None:
        if live is not None and row == 0 and text:
            live.write(text)
            live.flush()

    draw = Draw(float(sampling.temperature), sampling.top_k, float(sampling.top_p))
    started = time.perf_counter()
    first = generate_batch(
        model, encoded, transcripts, [sampling.max_new_tokens] * len(encoded), pad_id=pad_id_of(tokenizer, end_ids),
        attention_mode=mode, budget=budget, prefill_mode=prompt.mode, prefill_chunk=prompt.chunk,
        sparse_from=None if prompt.auto is None else prompt.auto.tokens, draw=draw, show=show, speculation=speculation,
    )  # fmt: skip
    clock.prefill += first - started
    clock.decode += time.perf_counter() - first
    clock.decoded += sum(max(0, len(t.token_ids) - 1) for t in transcripts)
    return [Completion(prompt, t.text, t.token_ids, t.reason or "length") for prompt, t in zip(prompts, transcripts, strict=True)]


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    if prompt != without_surrogates(prompt):
        raise UserError(f"the prompt {prompt[:60]!r} is no text: it has bytes that are not UTF-8; convert it (iconv -t utf-8)")
    ids = first_ids(tokenizer) + encoded(tokenizer, prompt, add_special_tokens=False).input_ids
    if ids:
        return ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError("the prompt is empty and the tokenizer has neither a bos nor an eos token to start from")
    return [first]


def _shown(completion: Completion, number: int, total: int) -> str:
    if total == 1:
        return completion.text + "\n"
    heading = " ".join(completion.prompt.split())
    heading = heading if len(heading) <= 60 else heading[:59] + "…"
    return f"[{number}/{total}] {heading}\n{completion.text}\n" + ("\n" if number < total else "")


def _summary(
    model: SSAForCausalLM,
    completions: list[Completion],
    clock: _Clock,
    auto: Auto | None = None,
    speculation: Speculation | None = None,
) -> str:
    tokens = sum(len(c.token_ids) for c in completions)
    how = "full attention" if model.config.attention_mode == "full" else f"sparse attention, {model.config.budget}"
    how = how if auto is None else f"{auto.why}, {model.config.budget}"
    speed = f", decoding {clock.decoded / clock.decode:.1f} tokens/s" if clock.decoded and clock.decode else ""
    several = f"{len(completions)} completions, " if len(completions) > 1 else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{several}{tokens} tokens, first after {clock.prefill:.2f} s{speed} ({how}, {model.device.type} {dtype})" + (
        "" if speculation is None else f"; {speculation.summary()}"
    )
