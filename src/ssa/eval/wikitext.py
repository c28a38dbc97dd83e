"""WikiText's pages as lm-evaluation-harness's `wikitext` task reads them: detokenised to score, in the original to count."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ssa.checked_json import typed
from ssa.data.lines import read_objects, read_text
from ssa.errors import UserError
from ssa.eval.loglikelihood import Request, encode, prefix_token, rolling_requests
from ssa.eval.questions import LM_EVAL_VERSION
from ssa.eval.results import TASKS_FILE, read_results
from ssa.eval.scored import Records, base_setting, data_directory, limited, metric, new_entry, run_scored
from ssa.eval.tasks import TaskRequest
from ssa.files import sha256_of_file

VERSION = "2.0"
"""lm-eval's, of its `wikitext` task."""
RAW_FILES = ("wiki.test.raw", "wikitext2/wiki.test.raw", "wikitext-2-raw/wiki.test.raw")
PAGE_FILES = ("test_pages_detok.jsonl", "wikitext2/test_pages_detok.jsonl")
PAGES_NOTE = "from detokenised pages: bytes are counted in them, not in the original text as lm-eval counts"


class Page(NamedTuple):
    text: str
    """Detokenised, which is what is scored."""
    num_words: int
    """Of the original."""
    num_bytes: int
    """Of the original in UTF-8."""


class Pages(NamedTuple):
    pages: list[Page]
    notes: list[str]
    sha256: str


def read_pages(data_dir: Path) -> Pages:
    """The test set's pages, from its raw file or, without one, from detokenised pages with word counts.

    Raises:
        UserError: Neither is there, or a line is not {"text", "words"}.
    """
    found = [data_dir / name for name in (*RAW_FILES, *PAGE_FILES) if (data_dir / name).is_file()]
    if not found:
        raise UserError(f"{data_dir} has no {RAW_FILES[0]}, the text of wikitext")
    file = found[0]
    if file.name == Path(RAW_FILES[0]).name:
        # \s+ at a page's ends counts as a word boundary there, too: lm-eval's own count
        texts = raw_pages(file)
        pages, notes = [Page(detokenized(t), len(re.split(r"\s+", t)), len(t.encode())) for t in texts], []
    else:
        pages, notes = list(read_objects(file, _page, '{file}:{line} is no page {{"text", "words"}} of wikitext')), [PAGES_NOTE]
    if not any(page.text.strip() and page.num_words for page in pages):
        raise UserError(f"{file} holds no text")
    return Pages(pages, notes, sha256_of_file(file))


def raw_pages(file: Path) -> list[str]:
    """The pages of a raw file as they are, but that every line ends in a line feed alone."""
    return split_pages(read_text(file).replace("\r\n", "\n"))


def split_pages(text: str) -> list[str]:
    """The raw file cut before each title line, " = Title = "."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        shape = line.replace("= = =", "===").replace("= =", "==").strip()
        if shape.startswith("= ") and shape.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for lines in pages if (page := "\n".join(lines)).strip()]


def detokenized(text: str) -> str:
    """WikiText's tokens as ordinary text, by lm-eval's rules in lm-eval's order."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark in ("-", ",", "."):
        text = text.replace(f" @{mark}@ ", mark)
    for mark in (":", ";", ".", "!", "?", ","):
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, inside, closing in (
        ("\\(", "[^\\)]", "\\)"),
        ("\\[", "[^\\]]", "\\]"),
        ("{", "[^}]", "}"),
        ('"', '[^"]', '"'),
        ("'", "[^']", "'"),
    ):
        text = re.sub(rf"({opening})\s*({inside}*?)\s*({closing})", r"\1\2\3", text)
    for heading in ("= = = =", "= = =", "= ="):
        text = text.replace(heading, heading.replace(" ", ""))
    text = text.replace(" " + chr(176) + " ", chr(176)).replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


class _PageRecord(TypedDict):
    text: str
    words: int


def _page(record: dict[str, Any]) -> Page:
    page: _PageRecord = typed(record, _PageRecord)
    if page["words"] < 0:
        raise UserError(f"words = {page['words']} is no number of words")
    return Page(page["text"], page["words"], len(page["text"].encode()))


def run(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """Word and byte perplexity by lm-eval's rolling windows; see `ssa.eval.tasks`."""
    read_results(request.directory / TASKS_FILE)
    subject, (pages, notes, sha256) = request.subject, read_pages(data_directory(request))
    pages = pages[: limited(len(pages), request.limit)]
    setting = {**base_setting(request, "wikitext"), "version": VERSION, "lm_eval": LM_EVAL_VERSION, "data_sha256": sha256}
    prefix = prefix_token(subject.tokenizer)

    def requests(numbers: list[int], seed: int | None) -> dict[int, list[Request]]:
        texts = encode(subject.tokenizer, [pages[i].text for i in numbers])
        return {i: rolling_requests(ids, prefix, setting["max_length"]) for i, ids in zip(numbers, texts, strict=True)}

    def figures(records: Records) -> dict[str, Any]:
        return _figures(-sum(sum(record["log_likelihoods"]) for record in records[None]), pages)

    return {"wikitext": run_scored(request, new_entry(request, setting, len(pages), notes), setting, [None], requests, figures)}


def _figures(nats: float, pages: Sequence[Page]) -> dict[str, Any]:
    words, size = sum(page.num_words for page in pages), sum(page.num_bytes for page in pages)
    values = {
        "word_perplexity": math.exp(min(nats / words, 700)), "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }  # fmt: skip
    return {name: metric({None: value}) for name, value in values.items()}
