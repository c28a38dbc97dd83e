"""What the ranks of a measurement tell each other, where none can go on without the others."""

from __future__ import annotations

import atexit
import functools
from datetime import timedelta
from typing import Any, TypeVar

from ssa.errors import UserError
from ssa.eval.long.item_log import Shard

Value = TypeVar("Value")
MEETING = timedelta(minutes=10)
"""How long a rank waits for the others at first: all of them have just been started."""
TIMEOUT = timedelta(days=1)
"""How long a rank that has met the others waits for what they say: they may still be at work, and one that ends is noticed at once."""


def meet() -> None:
    """Wait until all ranks are here. Whoever will `exchange` something after long work does this before it, so that a rank that never comes is
    noticed in minutes. Nothing where there is one rank, or where they have met.

    Raises:
        UserError: The ranks were not started by torchrun, or one of them does not come or cannot be reached.
    """
    if Shard.from_environment().world > 1:
        _group()


def exchange(value: Value) -> list[Value]:
    """The `value` of every rank, in the order of ranks, on each of them; waits for all. `[value]` where there is one rank.

    Raises:
        UserError: They cannot `meet`, or one of them has ended.
    """
    shard = Shard.from_environment()
    if shard.world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * shard.world
    group = _group()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:  # connections to the others are lost
        raise UserError(f"rank {shard.rank} of {shard.world} waited for a rank that has ended; see what that one says") from error
    return values


@functools.cache
def _group() -> Any:
    """Through the hosts' memory: what is exchanged is small, and devices may have no backend of their own."""
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=MEETING)
            atexit.register(dist.destroy_process_group)
        return dist.new_group(backend="gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is set, but the ranks cannot meet ({error}); use torchrun, or unset it") from error
    except RuntimeError as error:  # one does not come, the port is taken, a host cannot be reached
        shard, why = Shard.from_environment(), str(error).partition("\n")[0]
        raise UserError(f"rank {shard.rank} of {shard.world} cannot meet the others ({why}); see what those say") from error
