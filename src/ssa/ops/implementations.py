"""Which implementation computes an operation: `impl="auto" | "reference"`."""

from __future__ import annotations

import functools
import logging

import torch

from ssa.errors import UserError

logger = logging.getLogger("ssa")


def chosen_implementation(device: torch.device | str) -> tuple[str, str]:
    """What `impl="auto"` takes on `device`, and why: ("reference", "plain PyTorch is ...")."""
    kind = torch.device(device).type
    return "reference", f"plain PyTorch is the only implementation of this version (device {kind})"


def resolve(impl: str, device: torch.device) -> str:
    """The implementation for `impl`. An explicit request is honoured or refused, never replaced."""
    if impl == "reference":
        return impl
    if impl == "auto":
        return _announce(device.type)
    raise UserError(f"impl = {impl!r} does not exist; use 'auto' or 'reference'")


@functools.cache
def _announce(kind: str) -> str:
    name, reason = chosen_implementation(kind)
    logger.info("impl='auto' on %s: %s, because %s", kind, name, reason)
    return name
