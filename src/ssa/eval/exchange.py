"""What the ranks of a measurement tell each other, where none can go on without the others."""

from __future__ import annotations

import atexit
import functools
from datetime import timedelta
from typing import Any, TypeVar

from ssa.errors import UserError
from ssa.eval.long.item_log import Shard

Value = TypeVar("Value")
TIMEOUT = timedelta(days=1)
"""How long a rank waits: another one may still be at work, and one that has died is noticed at once."""


def exchange(value: Value) -> list[Value]:
    """The `value` of every rank, in the order of ranks, on each of them; waits for all. `[value]` where there is one rank.

    Raises:
        UserError: The ranks were not started by torchrun, or one of them has ended.
    """
    shard = Shard.from_environment()
    if shard.world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * shard.world
    try:
        dist.all_gather_object(values, value, group=_group())
    except RuntimeError as error:  # connections to the others are lost
        raise UserError(f"rank {shard.rank} of {shard.world} waited for a rank that has ended; see what that one says") from error
    return values


@functools.cache
def _group() -> Any:
    """Through the hosts' memory: what is exchanged is small, and devices may have no backend of their own."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is set, but the ranks cannot meet ({error}); use torchrun, or unset it") from error
    atexit.register(dist.destroy_process_group)
    return dist.group.WORLD
