"""Files and directories that a crash cannot halve and two writers cannot share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ssa.errors import UserError
from ssa.terminal import tell

LOCK = ".lock"
"""The file by which `sole_writer` holds a directory."""


def check_directory(path: Path) -> None:
    """Complain before long work, not after it.

    Raises:
        UserError: `path` is no directory, or cannot be made or written.
    """
    nearest = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if not nearest.is_dir():
        raise UserError(f"{path} cannot be written: {nearest} is no directory; name another place with --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {nearest}; name another place with --out")


def write_atomically(path: Path, text: str) -> Path:
    """`text` under the name `path`: the whole of it or, after a crash, the file that was there before.

    Raises:
        UserError: the directory cannot be written, the disk is full, or `path` names no file; the old file is untouched.
    """
    if not path.name:
        raise UserError(f"{str(path)!r} cannot be written: it names no file")
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, scratch, text)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def replace_file(path: Path, scratch: Path, text: str) -> None:
    """`text` on the disk under the name `scratch`, then under `path`. Raises `OSError`."""
    with open_new(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def open_new(path: Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """An empty file in the place of any that is there, through no link that somebody put there; `mode` is that of "w"."""
    path.unlink(missing_ok=True)
    return path.open(mode.replace("w", "x"), encoding=encoding)


def is_plain_name(name: object) -> bool:
    """Whether `name` is that of a file right in a directory, and no path that leads out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and not set(name) & set("\\\0")


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on the disk before going on."""
    if sys.platform == "win32" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(*paths: Path) -> None:
    """Give files the mode that `open` gives new ones: some libraries write through temporary files that only their owner can read."""
    for path in paths:
        probe = path.with_name(
            f".{path.name}.mode-{os.getpid()}"
        )  # os.umask tells its value only by changing it, for all threads
        with probe.open("x") as file:
            mode = os.fstat(file.fileno()).st_mode
        probe.unlink()
        path.chmod(mode & 0o777)


def sha256_of_file(path: Path) -> str:
    """In hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def sole_writer(directory: Path, busy: str) -> Iterator[None]:
    """Hold a directory against every other `sole_writer` of it. The lock goes with the process, however that ends.

    Args:
        directory: It exists; a file `LOCK` lies in it meanwhile (and after a kill, where it bars nobody).
        busy: What to tell the one who comes second.

    Raises:
        UserError: `busy`, where another process holds it.
        OSError: the directory cannot be written.
    """
    path = directory / LOCK
    for _ in range(100):  # holders who come and go
        with _open_lock(path) as file:
            if not _locked(file):
                break
            # Its last holder may have removed the file in between: then the lock on it is worth nothing.
            try:
                named = path.stat()
            except FileNotFoundError:
                continue
            if not os.path.samestat(os.fstat(file.fileno()), named):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink()
            return
    raise UserError(busy)


@contextlib.contextmanager
def writer_in_turn(directory: Path) -> Iterator[None]:
    """Wait until nobody else holds the directory this way, and hold it: for a moment, to read a file and write it anew. A file `LOCK` stays.

    Raises:
        OSError: the directory cannot be written.
    """
    with _open_lock(directory / LOCK) as file:
        while not _locked(file, wait=True):  # Windows waits for ten seconds only
            pass
        yield


def _open_lock(path: Path) -> IO[str]:
    """Through no link: the file that it leads to would be made."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(path, "a", opener=opener)


def _locked(file: IO[str], wait: bool = False) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        tell(f"ssa: warning: {file.name} cannot be locked ({error.strerror}): let one process at a time write there")
    return True
