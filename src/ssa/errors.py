"""The one exception that is the user's business rather than a bug, and what to say about the machine's."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one line that names the value and the fix.

    The command line prints it as ``ssa: error: <message>`` and exits with status 2; library callers catch it as `ValueError`.
    """


def one_line(error: BaseException | str) -> str:
    """What another library said, for the inside of a `UserError`: without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def described(error: BaseException) -> str | None:
    """One line about an error of the machine (files, memory, text that is none); None for any other, which is a bug."""
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names[:1], error.strerror or one_line(error)])
    if isinstance(error, UnicodeEncodeError):  # a name, mostly, that came from the system as bytes
        return f"{error.object[:200]!r} cannot be written: {one_line(error)}"
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written: {one_line(error)}"
    out_of_memory = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"  # PyTorch's, CPU and GPU
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return f"out of memory: {one_line(error)}"
    return None
