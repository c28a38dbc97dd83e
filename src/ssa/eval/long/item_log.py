"""Finished items on disk, so that an interrupted evaluation goes on where it was, on as many ranks as there are then.

DIRECTORY/rank-0000.jsonl, one JSON object a line with the item's "index"; a rank appends to its own file only. Whoever has finished
reads all of them: the last rank to finish sees every item.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from ssa.checked_json import parse_json
from ssa.errors import UserError


class _Record(TypedDict):
    """Of an item, as far as the log itself reads it."""

    index: int


class ItemLog:
    """The records of one task at one setting and budget."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory = directory
        self.path = directory / f"rank-{rank:04}.jsonl"

    def records(self) -> dict[int, dict[str, Any]]:
        """{index: record} of every rank. A line that a crash cut off does not count.

        Raises:
            UserError: A file that is no such log.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    record = parse_json(line, f"{path}, line {number},", _Record, largest=None)
                except UserError:
                    raise UserError(f"{path}, line {number}, is no record of a finished item; move the file away") from None
                found[record["index"]] = record
        return found

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """All of `records` in one write, on disk when this returns.

        Raises:
            UserError: The directory cannot be written, or the disk is full.
        """
        data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                self._drop_torn_line(file)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    @staticmethod
    def _drop_torn_line(file: Any) -> None:
        """Cut off what a crash left of a line, or the next record would be glued to it."""
        size = file.seek(0, os.SEEK_END)
        step, end = 1 << 16, size
        while end:
            begin = max(0, end - step)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)
        file.seek(0, os.SEEK_END)
