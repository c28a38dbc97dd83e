"""This project's models in lm-evaluation-harness, unpatched: `--model ssa`.

lm-eval's main branch reads the entry point "lm_eval.models", which makes the name known to its own command. Releases up to 0.4.13 (and
0.5.0.dev1) look at no entry points; there this module stands in for the command, with `ssa` as its default model:

    python -m ssa.eval.harness --model_args pretrained=RUN,attention_mode=sparse,budget=16x16 --tasks piqa --batch_size auto

Under torchrun the ranks share the batches and tell each other the answers, so lm-eval sees one model that has all of them on every rank:
its own way (`rank` and `world_size` of the model) shares documents before few-shot examples are drawn, and so draws others.

This module imports lm-eval (extra "eval"); nothing else of the package does.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f'ssa: error: this is lm-evaluation-harness ({error}): pip install "sparse-sparse-attention[eval]"', file=sys.stderr)
    sys.exit(2)

from transformers import PreTrainedTokenizerFast

from ssa.budget import AttentionMode, Reading
from ssa.collectives import gather, meet
from ssa.device import local_device
from ssa.errors import UserError, one_line
from ssa.eval.loglikelihood import (
    Request,
    Score,
    check_max_length,
    encode,
    encode_pairs,
    log_likelihoods,
    prefix_token,
    rolling_requests,
)
from ssa.eval.long.item_log import ItemLog
from ssa.infer.batch import end_ids_of, generate_batch, pad_id_of
from ssa.infer.decoder import Draw
from ssa.infer.load import attention_choice, check_budgets, load_model
from ssa.infer.transcript import Transcript
from ssa.model import SSAForCausalLM
from ssa.ranks import Shard
from ssa.terminal import tell

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook
Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)
MAX_GENERATED = 256
"""Tokens, where a task does not say; lm-eval's default."""
DEFAULT_DEVICE = "cuda:0"
"""What lm-eval's command passes where the user names no device."""
AUTO_ROWS = 32
"""Prompts continued at once under batch_size "auto"."""


@register_model("ssa")
class SSALM(TemplateLM):
    """An `SSAForCausalLM` as lm-eval sees it: log-likelihoods, rolling log-likelihoods and generation with the block cache."""

    def __init__(
        self,
        pretrained: Any = None,
        attention_mode: str | None = None,
        budget: Reading | str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_batch_size: int | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: A run, a checkpoint or a model directory; or a model in memory, together with `tokenizer`.
            attention_mode: "sparse" or "full"; the model's own by default.
            budget: "kxs" or "full"; the model's own by default.
            batch_size: Rows computed at once; "auto" packs as many as have about a fixed number of tokens.
            device, dtype: See `ssa.infer.load.load_model`; "cuda:0", lm-eval's default, is the GPU of the local rank under torchrun.
            max_length: Longest input in tokens; the model's positions by default.
            max_batch_size: Accepted because lm-eval passes it; batches are never searched for here.
        """
        super().__init__()
        if unknown:
            known = ", ".join(list(inspect.signature(SSALM).parameters)[:-1])
            raise UserError(f"the model ssa has no argument {next(iter(unknown))!r}; it has {known}")
        if pretrained is None:
            raise UserError("the model ssa needs --model_args pretrained=RUN: a run, a checkpoint or a model directory")
        meet()
        mode, chosen = attention_choice(attention_mode, budget)
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():
            logger.warning("no CUDA device: %s, which lm-eval asks for by default, becomes auto", device)
            device = None
        if tokenizer is None:
            open_device = "auto" if device in (None, DEFAULT_DEVICE) else str(device)
            self.model, self.tokenizer = load_model(pretrained, local_device(open_device), dtype)
        else:
            self.model, self.tokenizer = cast("SSAForCausalLM", pretrained), tokenizer
        check_budgets(self.model.config, [chosen])
        self.attention_mode: AttentionMode | None = mode
        self.budget = chosen
        self.batch_rows = _rows(batch_size)
        self.max_length = check_max_length(self.model.config, None if max_length is None else int(max_length))
        self.log: ItemLog | None = None
        """Where finished log-likelihoods are kept and looked up, for evaluations that may be interrupted."""
        self.shard = Shard.from_environment()
        self._device = self.model.device  # lm-eval's property `device` reads it

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """What lm-eval calls where it has a cache of answers (--use_cache), one a rank: each is given what any of them has.

        Otherwise lm-eval would ask the ranks different questions, or some of them none. So a cache that one process has made serves
        several, and so do those that an interruption has left.
        """
        super().set_cache_hook(cache_hook)
        cache = cache_hook.dbdict
        if cache is None or self.shard.world == 1:
            return
        own: dict[str, Any] = dict(cache.items())
        united: dict[str, Any] = {}
        for of_rank in reversed(gather(own)):  # where two differ, the lower rank's counts, for all
            united |= of_rank
        cache.update({name: answer for name, answer in united.items() if name not in own or own[name] != answer})
        cache.commit()

    @property
    def attention(self) -> dict[str, Any]:
        """The arguments of the model's call."""
        return {"attention_mode": self.attention_mode, "budget": self.budget}

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        return prefix_token(self.tokenizer) if token is None else int(token)

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def batch_size(self) -> int | str:
        return self.batch_rows or "auto"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, [string])[0]
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, token_ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        answers = [(s.log_likelihood, s.is_greedy) for s in self._scores(encode_pairs(self.tokenizer, pairs))]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scores([Request(_ids(context), _ids(continuation)) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        encoded = encode(self.tokenizer, texts)
        windows = [rolling_requests(ids, self.prefix_token_id, self.max_length) for ids in encoded]
        scores = iter(self._scores([window for of_text in windows for window in of_text]))
        sums = [sum(next(scores).log_likelihood for _ in of_text) for of_text in windows]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations cut at the first stop string; requests with equal settings are computed together, longest first.

        Samples depend on the draws before them, so rank 0 makes all of those.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        rows = self.batch_rows or AUTO_ROWS
        batches = []
        for members in groups.values():
            encoded = dict(zip(members, encode(self.tokenizer, [requests[i].args[0] for i in members]), strict=True))
            members.sort(key=lambda i: -len(encoded[i]))
            batches += [{i: encoded[i] for i in members[at : at + rows]} for at in range(0, len(members), rows)]
        own: dict[tuple[int, str], str] = {}
        for number, batch in enumerate(batches):
            settings = requests[next(iter(batch))].args[1]
            if self.shard.rank != (0 if _options(settings)["do_sample"] else number % self.shard.world):
                continue
            for i, text in zip(batch, self._generate(list(batch.values()), settings), strict=True):
                own[i, requests[i].args[0]] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return self._united(own, [(i, request.args[0]) for i, request in enumerate(requests)], {})

    def _scores(self, requests: Sequence[Request]) -> list[Score]:
        """`log_likelihoods` over all ranks, but for what the log has already. Equal requests are computed once."""
        names = [_name(request) for request in requests]
        logged: dict[int, Score] = {}
        if self.log is not None and self.shard.rank == 0:  # a rank that reads later may find more, and would cut other batches
            logged = {name: Score(*record["score"]) for name, record in self.log.records().items()}
        known = gather(logged)[0]
        new = {name: request for name, request in zip(names, requests, strict=True) if name not in known}
        order = list(new)
        own: dict[int, Score] = {}

        def deliver(done: list[tuple[int, Score]]) -> None:
            own.update((order[i], score) for i, score in done)
            if self.log is not None:
                self.log.append([{"index": order[i], "score": list(score)} for i, score in done])

        self._compute(list(new.values()), deliver)
        return self._united(own, names, known)

    def _united(self, own: dict[Key, Answer], wanted: Sequence[Key], known: dict[Key, Answer]) -> list[Answer]:
        """The answers to `wanted`: `known`, and what any rank has of its own.

        Raises:
            UserError: One is nowhere: this rank was asked what no other was.
        """
        found = dict(known)
        for of_rank in gather(own):
            found |= of_rank
        if any(key not in found for key in wanted):
            raise UserError(
                f"rank {self.shard.rank} was asked other questions than the other ranks: all of them must read the same task files"
            )
        return [found[key] for key in wanted]

    def _compute(self, requests: Sequence[Request], deliver: Any) -> None:
        """`deliver` this rank's share of the scores."""
        log_likelihoods(
            self.model, requests, max_length=self.max_length, batch_rows=self.batch_rows, deliver=deliver, shard=self.shard,
            **self.attention,
        )  # fmt: skip

    def _generate(self, contexts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        options = _options(settings)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(options.pop("until", None), eos=end)
        count = int(options.pop("max_gen_toks"))
        options.pop("max_length", None)
        room = self.max_length - count
        if room < 1:
            raise UserError(f"{count} generated tokens leave no room for a prompt in max_length = {self.max_length}")
        begun = [ids[-room:] or [self.prefix_token_id] for ids in contexts]
        # A stop text that is a special token of the tokenizer never shows in decoded text.
        special = (self.tokenizer.convert_tokens_to_ids(text) for text in stop if text in self.tokenizer.all_special_tokens)
        end_ids = end_ids_of(self.model, self.tokenizer) | {self.eot_token_id, *special}
        transcripts = [Transcript(self.tokenizer, end_ids, [text for text in stop if text]) for _ in begun]
        draw = Draw()
        if options["do_sample"]:
            draw = Draw(float(options.get("temperature", 1.0)), int(options.get("top_k", 0)), float(options.get("top_p", 1.0)))
        generate_batch(
            self.model, begun, transcripts, [count] * len(begun), pad_id=pad_id_of(self.tokenizer, end_ids),
            draw=draw, **self.attention,
        )  # fmt: skip
        texts = (self.tok_decode(transcript.token_ids) for transcript in transcripts)
        return [str(postprocess_generated_text(text, stop, None)) for text in texts]


def _rows(batch_size: int | str) -> int | None:
    if str(batch_size).startswith("auto"):
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise UserError(f"batch_size = {batch_size!r} is neither a number of rows nor auto")
    return rows


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """A request's, under lm-eval's own names."""
    return cast("dict[str, Any]", normalize_gen_kwargs(settings, MAX_GENERATED))


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def _name(request: Request) -> int:
    """A number that stands for the request in a log."""
    digest = hashlib.sha256(len(request.context).to_bytes(8, "little"))
    digest.update(request.context.astype("<i4").tobytes())
    digest.update(request.continuation.astype("<i4").tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments of lm-eval's command, with our model where they name none.

    Raises:
        UserError: Nothing to evaluate, or on.
    """
    arguments = list(arguments)
    if arguments[:1] in (["ls"], ["validate"]) or {"-h", "--help"}.intersection(arguments):
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--model", "-M"), ("--model_args", "-a"), ("--tasks", "-t"), ("--config", "-C")):
        parser.add_argument(*names, nargs="+")
    given, _ = parser.parse_known_args(arguments)
    if given.config:  # a file that can say all of it
        return arguments
    if given.model is None and given.model_args is None:
        raise UserError("which model? Add --model_args pretrained=RUN: a run, a checkpoint or a model directory")
    if given.tasks is None:
        raise UserError("which tasks? Add --tasks with their names; python -m ssa.eval.harness ls tasks lists them")
    options = arguments[1:] if arguments[:1] == ["run"] else arguments
    return ["run", *([] if given.model else ["--model", "ssa"]), *options]


def main(arguments: Sequence[str]) -> int:
    """lm-eval's command with these arguments; returns the exit status, 2 for bad input."""
    try:
        sys.argv[1:] = with_defaults(arguments)
        try:
            cli_evaluate()
        except ValueError as error:
            if not str(error).startswith("Tasks not found"):
                raise
            raise UserError(f"{one_line(error)}; python -m ssa.eval.harness ls tasks lists them") from None
    except UserError as error:
        tell(f"ssa: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
