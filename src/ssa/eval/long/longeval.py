"""LongEval (Li et al. 2023): a number out of many lines, and the first of several topics of a conversation, from its data files."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssa.checked_json import typed
from ssa.data.lines import read_objects
from ssa.errors import UserError, one_line
from ssa.eval.long.fill import encode
from ssa.eval.long.items import Item
from ssa.eval.long.longbench_metrics import normalize_answer
from ssa.files import sha256_of_file
from ssa.infer.engine import first_ids

LINES_LEAD = "\n ASSISTANT: The <REGISTER_CONTENT> in line {line} is <"
TOPICS_LEAD = "\n ASSISTANT: The first topic we discussed is"
MAX_NEW_TOKENS = {"lines": 16, "topics": 50}
_FILE = re.compile(r"(\d+)_(lines|topics)\.jsonl")


class LongEvalTask:
    """The cases of one file, "200_lines.jsonl" for instance; a `GenerationTask`."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> None:
        """The first `limit` cases. Raises `UserError` for a file that does not hold LongEval's."""
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path} is no LongEval file: its name should be N_lines.jsonl or N_topics.jsonl")
        self.size, self.kind = int(match[1]), match[2]
        self.name, self._tokenizer = f"longeval_{self.kind}", tokenizer
        refusal = f"{{file}}, line {{line}}, is no LongEval case of {self.kind}"
        self._cases = list(read_objects(path, partial(_case, self.kind), refusal))
        if not self._cases:
            raise UserError(f"{path} is empty")
        self.setting: dict[str, Any] = {"task": self.name, "size": self.size, "records_sha256": sha256_of_file(path)}
        self._count = len(self._cases) if limit is None else min(limit, len(self._cases))

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> Item:
        text, answer = self._cases[index]
        prompt = np.concatenate([np.array(first_ids(self._tokenizer), np.int64), encode(self._tokenizer, text)])
        return Item(prompt, self.max_new_tokens, [answer], ("\n",))

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest answer, also where every byte is a token."""
        return max(MAX_NEW_TOKENS[self.kind], *(len(encode(self._tokenizer, answer)) + 8 for _, answer in self._cases))

    def score(self, item: Item, prediction: str) -> float:
        if self.kind == "lines":
            found = re.search(r"\d+", prediction)
            return float(found is not None and int(found[0]) == int(item.answers[0]))
        return float(normalize_answer(item.answers[0]) in normalize_answer(prediction))


def find_files(data_dir: Path | None, kind: str) -> list[Path]:
    """The files of "lines" or "topics" in DATA_DIR or DATA_DIR/longeval, by size.

    Raises:
        UserError: No directory or no such file.
    """
    if data_dir is None:
        raise UserError("LongEval is read from local files; name their directory with --data-dir")
    for folder in (data_dir, data_dir / "longeval"):
        sizes = {
            int(match[1]): path for path in folder.glob("*.jsonl") if (match := _FILE.fullmatch(path.name)) and match[2] == kind
        }
        if sizes:
            return [sizes[size] for size in sorted(sizes)]
    raise UserError(f"no N_{kind}.jsonl in {data_dir}; put LongEval's test cases there")


class _Lines(TypedDict):
    prompt: str
    random_idx: list[Any]
    expected_number: int | str


class _Topics(TypedDict):
    prompt: str
    topics: list[str] | str


def _case(kind: str, record: dict[str, Any]) -> tuple[str, str]:
    """(prompt with the beginning of the answer, answer)."""
    try:
        if kind == "lines":
            line: _Lines = typed(record, _Lines)
            return line["prompt"].rstrip() + LINES_LEAD.format(line=line["random_idx"][0]), str(int(line["expected_number"]))
        case: _Topics = typed(record, _Topics)
        # the release has both: a list, and a list written into a text
        topics = (
            case["topics"] if isinstance(case["topics"], list) else typed(ast.literal_eval(case["topics"]), list[str], "topics")
        )
        if not normalize_answer(topics[0]):
            raise UserError("its first topic is empty")
        return case["prompt"].rstrip() + TOPICS_LEAD, topics[0]
    except UserError:
        raise
    except (ValueError, IndexError, SyntaxError, RecursionError, MemoryError) as error:  # of literal_eval, too
        raise UserError(one_line(error)) from None
