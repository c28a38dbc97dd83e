"""Writing files that a crash cannot halve."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ssa.errors import UserError


def write_atomically(path: Path, text: str) -> Path:
    """`text` under the name `path`: the whole of it or, after a crash, the file that was there before.

    Raises:
        UserError: the directory cannot be written, or the disk is full; the old file is untouched.
    """
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
