"""The one exception that is the user's business rather than a bug."""


class UserError(ValueError):
    """Bad input, told in one line that names the value and the fix.

    The command line prints it as ``ssa: error: <message>`` and exits with status 2; library callers catch it as `ValueError`.
    """


def one_line(error: BaseException | str) -> str:
    """What another library said, for the inside of a `UserError`: without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
