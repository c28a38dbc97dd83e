"""WikiText's pages as lm-evaluation-harness's `wikitext` task reads them: detokenised to score, in the original to count."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssa.errors import UserError
from ssa.eval.loglikelihood import encode, prefix_token, rolling_requests
from ssa.eval.long.measure import gather
from ssa.eval.questions import LM_EVAL_VERSION
from ssa.eval.results import read_results
from ssa.eval.scored import (
    TASKS_FILE,
    base_setting,
    data_directory,
    figures_of,
    item_log,
    keep_entry,
    limited,
    metric,
    missing,
    new_entry,
    score_items,
)
from ssa.eval.subject import budget_name, provenance
from ssa.eval.tasks import TaskRequest

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
    for name in RAW_FILES:
        if (data_dir / name).is_file():
            content = (data_dir / name).read_bytes()
            pages = [
                # \s+ at a page's ends counts as a word boundary there, too: lm-eval's own count
                Page(detokenized(page), len(re.split(r"\s+", page)), len(page.encode()))
                for page in split_pages(content.decode("utf-8"))
            ]
            return Pages(pages, [], hashlib.sha256(content).hexdigest())
    for name in PAGE_FILES:
        if (data_dir / name).is_file():
            content = (data_dir / name).read_bytes()
            return Pages(
                [_page(line, data_dir / name, i) for i, line in enumerate(content.decode("utf-8").splitlines(), start=1)],
                [PAGES_NOTE],
                hashlib.sha256(content).hexdigest(),
            )
    raise UserError(f"{data_dir} has no {RAW_FILES[0]}, the text of wikitext")


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


def _page(line: str, file: Path, number: int) -> Page:
    try:
        record = json.loads(line)
        text, words = record["text"], record["words"]
    except (ValueError, KeyError, TypeError):
        text = words = None
    if not isinstance(text, str) or type(words) is not int:
        raise UserError(f'{file}:{number} is no page {{"text", "words"}} of wikitext')
    return Page(text, words, len(text.encode()))


def run(names: Sequence[str], request: TaskRequest) -> dict[str, dict[str, Any]]:
    """Word and byte perplexity by lm-eval's rolling windows; see `ssa.eval.tasks`."""
    read_results(request.directory / TASKS_FILE)
    subject, (pages, notes, sha256) = request.subject, read_pages(data_directory(request))
    pages = pages[: limited(len(pages), request.limit)]
    setting = {**base_setting(request, "wikitext"), "version": VERSION, "lm_eval": LM_EVAL_VERSION, "data_sha256": sha256}
    max_length = setting["max_length"]
    entry = new_entry(request, setting, len(pages), notes)
    prefix = prefix_token(subject.tokenizer)
    windows = {
        i: rolling_requests(token_ids, prefix, max_length)
        for i, token_ids in enumerate(encode(subject.tokenizer, [page.text for page in pages]))
    }
    for budget in request.budgets:
        log = item_log(request, "wikitext", setting, budget, None)
        took = score_items(request, "wikitext", {i: windows[i] for i in missing(log, len(pages))}, log, budget, max_length)
        records = gather(log, len(pages))
        if records is not None:
            nats = -sum(sum(record["log_likelihoods"]) for record in records)
            new = {"metrics": _figures(nats, pages), **took, **provenance(subject)}
            entry["budgets"][budget_name(budget)] = figures_of(request, entry, budget, new)
    return {"wikitext": keep_entry(request, entry)}


def _figures(nats: float, pages: Sequence[Page]) -> dict[str, Any]:
    words, size = sum(page.num_words for page in pages), sum(page.num_bytes for page in pages)
    values = {
        "word_perplexity": math.exp(min(nats / words, 700)), "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }  # fmt: skip
    return {name: metric({None: value}) for name, value in values.items()}
