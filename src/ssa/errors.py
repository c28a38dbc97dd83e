"""The one exception that is the user's business rather than a bug."""


class UserError(ValueError):
    """Bad input, told in one line that names the value and the fix.

    The command line prints it as ``ssa: error: <message>`` and exits with status 2; library callers catch it as `ValueError`.
    """
