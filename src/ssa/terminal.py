"""What goes to a terminal: texts of other people without their control characters, and output that may be gone. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from rich.segment import Segment

from ssa.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

_LINES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {13: "\\r"}
_LINES |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_ONE_LINE = _LINES | {9: "\\t", 10: "\\n", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def visible(text: object) -> str:
    """The text with escapes for lone surrogates and for the control characters that a terminal would obey, tabs and line feeds apart."""
    return str(text).translate(_LINES)


def say(text: object) -> None:
    """Lines on stdout."""
    print(visible(text), flush=True)


def tell(text: object) -> None:
    """One line on stderr, if there still is one; line feeds and tabs are escaped, too."""
    try:
        print(str(text).translate(_ONE_LINE), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def warn(text: str) -> None:
    """`tell` a warning; of several ranks, rank 0 alone does."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"ssa: warning: {text}")


def console(**options: Any) -> Console:
    """rich's, but control characters in what it is given are made `visible`."""
    from rich.console import Console

    class VisibleConsole(Console):
        def render(self, *arguments: Any, **keywords: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **keywords):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    return VisibleConsole(**options)


class Visible:
    """A stream that writes texts as `visible` makes them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


class Output:
    """A standard stream that may fail once: what can no longer be written goes nowhere, and `failed` decides what becomes of the error."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            silence(self._stream)
            self._failed(error)


@contextlib.contextmanager
def named_output() -> Iterator[None]:
    """Errors of standard output say that they are."""

    def failed(error: OSError) -> None:
        error.filename = "standard output"
        raise error

    with _replaced(stdout=Output(sys.stdout, failed)):
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the interpreter would try again at its end, and complain
                sys.stdout.flush()
            raise
        sys.stdout.flush()


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """For work that goes on when its terminal, pipe or log file is gone or full."""

    def failed(error: OSError) -> None:
        warn(f"standard output is gone ({error.strerror or one_line(error)}): going on without it")

    with _replaced(stdout=Output(sys.stdout, failed), stderr=Output(sys.stderr, lambda error: None)):
        yield
        sys.stdout.flush()


@contextlib.contextmanager
def _replaced(**streams: Output) -> Iterator[None]:
    before = {name: getattr(sys, name) for name in streams}
    for name, stream in streams.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


def silence(stream: TextIO) -> None:
    """Send what is written from now on nowhere, and so what the stream could not get rid of."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system, as under test
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_standard_streams() -> None:
    """Where one was closed (`>&-`) the next file to be opened would get its number, and whatever is printed there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if number:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":  # a character that the terminal does not know is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
