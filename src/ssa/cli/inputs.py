"""What an argument names has to be there, which is said before anything slow is imported. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable

from ssa.data.sources import expand_inputs
from ssa.runs.checkpoints import resolve_checkpoint


def check_data(data: str) -> None:
    """Raises `UserError` where `data` is no directory (which may be a prepared one) and nothing else that `ssa prepare` reads."""
    if not os.path.isdir(data):
        expand_inputs([data])


CHECKS: dict[str, Callable[[str], object]] = {"RUN": resolve_checkpoint, "DATA": check_data}
"""By the word for a value, see `ssa.cli.metavars`; they raise `UserError`."""
