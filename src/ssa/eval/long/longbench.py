"""LongBench's 16 English tasks (Bai et al. 2024, arXiv 2308.14508): prompts, answer lengths, truncation and metrics of its release."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

import numpy as np
from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerFast

from ssa.checked_json import typed
from ssa.data.lines import objects, read_objects
from ssa.errors import UserError, one_line
from ssa.eval.long import longbench_metrics as metrics
from ssa.eval.long.fill import encode
from ssa.eval.long.items import Item
from ssa.infer.engine import first_ids

HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"


@dataclass(frozen=True)
class Kind:
    """One LongBench task."""

    prompt: str
    """With {context} and {input}."""
    max_new_tokens: int
    metric: Callable[..., float]
    first_line: bool = False
    """Only the first line of the prediction is scored."""


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation."
)

TASKS: dict[str, Kind] = {
    "narrativeqa": Kind(  # "asconcisely" is the release's
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you "
        "can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based "
        "on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Question: {input}\n\nAnswer:", 128, metrics.qa_f1,
    ),
    "qasper": Kind(
        f"You are given a scientific article and a question. Answer the question {_QASPER}\n\nArticle: {{context}}\n\n Answer the "
        f"question based on the above article {_QASPER}\n\nQuestion: {{input}}\n\nAnswer:", 128, metrics.qa_f1,
    ),
    "multifieldqa_en": Kind(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, only "
        "give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:", 64, metrics.qa_f1,
    ),
    "hotpotqa": Kind(_PASSAGES, 32, metrics.qa_f1),
    "2wikimqa": Kind(_PASSAGES, 32, metrics.qa_f1),
    "musique": Kind(_PASSAGES, 32, metrics.qa_f1),
    "gov_report": Kind(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:", 512, metrics.rouge_l,
    ),
    "qmsum": Kind(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more "
        "sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: {input}\nAnswer:", 512, metrics.rouge_l,
    ),
    "multi_news": Kind(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:", 512, metrics.rouge_l,
    ),
    "trec": Kind(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64, metrics.classification, first_line=True,
    ),
    "triviaqa": Kind(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are "
        "some examples.\n\n{context}\n\n{input}", 32, metrics.qa_f1, first_line=True,
    ),
    "samsum": Kind(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128, metrics.rouge_l, first_line=True,
    ),
    "passage_count": Kind(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs "
        "and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating "
        "paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. "
        "The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ", 32, metrics.count,
    ),
    "passage_retrieval_en": Kind(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n"
        "{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. "
        'The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ', 32, metrics.retrieval,
    ),
    "lcc": Kind("Please complete the code given below. \n{context}Next line of code:\n", 64, metrics.code_similarity),
    "repobench-p": Kind("Please complete the code given below. \n{context}{input}Next line of code:\n", 64, metrics.code_similarity),
}  # fmt: skip


class LongBenchTask:
    """The items of one task, prompts cut in the middle to `length` tokens with the answer; a `GenerationTask`."""

    def __init__(
        self,
        name: str,
        records: Sequence[dict[str, Any]],
        length: int,
        tokenizer: PreTrainedTokenizerFast,
        limit: int | None = None,
    ) -> None:
        """`records` are LongBench's, see `read_records`; the first `limit` are used. Raises `UserError` for a length without room."""
        if name not in TASKS:
            raise UserError(f"no LongBench task {name!r}; there are {', '.join(TASKS)}")
        self.name, self._kind, self._records, self._tokenizer = name, TASKS[name], list(records), tokenizer
        self._room = length - self._kind.max_new_tokens - len(first_ids(tokenizer))
        if self._room < 2:
            raise UserError(f"length {length} is too short for {name}, whose answers may take {self._kind.max_new_tokens} tokens")
        asked = json.dumps([self._kind.prompt, self._records], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        self.setting: dict[str, Any] = {"task": name, "length": length, "items_sha256": digest}
        self._count = len(self._records) if limit is None else min(limit, len(self._records))

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> Item:
        record, kind = self._records[index], self._kind
        # by replacing, not str.format: contexts are full of braces
        before, _, after = kind.prompt.partition("{context}")
        text = before + record["context"] + after.replace("{input}", record["input"])
        ids, truncated = cut_middle(self._tokenizer, text, self._room)
        prompt = np.concatenate([np.array(first_ids(self._tokenizer), np.int64), ids])
        about = {"id": record.get("_id"), "truncated": truncated}
        return Item(prompt, kind.max_new_tokens, record["answers"], about=about)

    def score(self, item: Item, prediction: str) -> float:
        if self._kind.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if self._kind.metric is metrics.classification:
            return max(metrics.classification(prediction, answer, self._classes) for answer in item.answers)
        return max(self._kind.metric(prediction, answer) for answer in item.answers)

    @property
    def _classes(self) -> Sequence[str]:
        return self._records[0]["all_classes"]


def cut_middle(tokenizer: PreTrainedTokenizerFast, text: str, room: int) -> tuple[np.ndarray, bool]:
    """(token ids of `text`, whether its middle was cut out to make them at most `room`), by way of text as the release does it."""
    ids = encode(tokenizer, text)
    if len(ids) <= room:
        return ids, False
    half = room // 2
    while True:
        halves = (ids[:half], ids[len(ids) - half :])
        joined = "".join(
            str(tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)) for part in halves
        )
        again = encode(tokenizer, joined)
        if len(again) <= room:  # else a character or word that was cut in two takes more tokens now
            return again, True
        half -= 1


def read_records(name: str, data_dir: Path | None) -> list[dict[str, Any]]:
    """The records of a task from DATA_DIR/NAME.jsonl (or DATA_DIR/longbench/NAME.jsonl), or from the hub's archive if that is None.

    Raises:
        UserError: No such file, the hub cannot be reached, or lines that are no LongBench records.
    """
    if name not in TASKS:
        raise UserError(f"no LongBench task {name!r}; there are {', '.join(TASKS)}")
    if data_dir is None:
        source, found = f"{HUB_REPOSITORY} on the hub", list(_from_hub(name))
    else:
        candidates = [folder / f"{name}.jsonl" for folder in (data_dir, data_dir / "longbench")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(
                f"{candidates[0]} does not exist; put LongBench's data files there, or leave the directory out to use the hub"
            )
        source, found = str(path), list(read_objects(path, _checked(name), _REFUSAL))
    if not found:
        raise UserError(f"{source} is empty")
    return found


_REFUSAL = "{file}, line {line}, is no LongBench record"


class _Record(TypedDict):
    """A line of a data file, as far as it is read."""

    context: str
    input: str
    answers: list[str]


class _Classified(_Record):
    all_classes: list[str]


def _checked(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    kind = _Classified if TASKS[name].metric is metrics.classification else _Record

    def record(line: dict[str, Any]) -> dict[str, Any]:
        typed(line, kind)
        if not line["answers"]:
            raise UserError("it has no answers")
        return {key: line.get(key) for key in ("_id", "context", "input", "answers", "all_classes")}

    return record


def _from_hub(name: str) -> Iterator[dict[str, Any]]:
    try:
        archive = hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset")
        # read, not unpacked: nothing is written by names that an archive gives
        with zipfile.ZipFile(archive) as content, content.open(f"data/{name}.jsonl") as lines:
            yield from objects(cast("BinaryIO", lines), f"{HUB_REPOSITORY} on the hub, {name}", _checked(name), _REFUSAL)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"LongBench cannot be had from the hub ({one_line(error)[:150]}); download it and name its directory with --data-dir"
        ) from error
