"""What the ranks of a measurement or a run tell each other, where none can go on without the others.

An error that one rank of a run meets must end all of them, or the others wait for it: code that can fail on one rank runs inside
`Ranks.raise_on_all`, which raises the error everywhere and lets rank 0 alone speak.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ssa.errors import UserError
from ssa.ranks import Shard, SharedError, disk_error

Value = TypeVar("Value")
MEETING = timedelta(minutes=10)
"""How long a rank waits for the others at first: all of them have just been started."""
TIMEOUT = timedelta(days=1)
"""How long a rank that has met the others waits for what they say: they may still be at work, and one that ends is noticed at once."""


def meet() -> None:
    """Wait until all ranks are here. Whoever will `gather` something after long work does this before it, so that a rank that never comes is
    noticed in minutes. Nothing where there is one rank, or where they have met.

    Raises:
        UserError: The ranks were not started by torchrun, or one of them does not come or cannot be reached.
    """
    if Shard.from_environment().world > 1:
        _group()


def gather(value: Value) -> list[Value]:
    """The `value` of every rank, in the order of ranks, on each of them; waits for all. `[value]` where there is one rank.

    Raises:
        UserError: They cannot `meet`, or one of them has ended.
    """
    shard = Shard.from_environment()
    if shard.world == 1:
        return [value]

    values: list[Any] = [None] * shard.world
    group = _group()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:  # connections to the others are lost
        raise UserError(f"rank {shard.rank} of {shard.world} waited for a rank that has ended; see what that one says") from error
    return values


@functools.cache
def _group() -> Any:
    """Through the hosts' memory: what is gathered is small, and devices may have no backend of their own."""

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


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    node_ranks: int = 1
    """Ranks on this machine."""
    context_ranks: int = 1
    """Ranks that share each row."""
    context_group: Any = None
    """Process group of those; None for one."""

    @property
    def main(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of a step's rows this rank reads, of `data_world`."""
        return self.rank // self.context_ranks

    @property
    def data_world(self) -> int:
        return self.world // self.context_ranks

    @property
    def context_rank(self) -> int:
        return self.rank % self.context_ranks

    def all_sum(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, on this rank's device, summed over all ranks in place; the host does not wait for a GPU."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def all_max(self, *values: int) -> list[int]:
        """For each value the largest of all ranks. The hosts wait for each other, not for their GPUs."""
        if self.world == 1:
            return list(values)

        x = torch.tensor(values, dtype=torch.int64)  # also where one rank has a bool: what the ranks give must be of one type
        dist.all_reduce(x, dist.ReduceOp.MAX)  # a CPU tensor goes through gloo
        return x.tolist()

    @contextlib.contextmanager
    def raise_on_all(self, path: object = "") -> Iterator[None]:
        """A block, free of communication, whose `UserError` (or disk error, about `path`) on any rank is raised on all of them.

        Raises:
            UserError: The first rank's that failed, if this is the only rank.
            SharedError: That error, on all ranks.
        """
        failed: UserError | None = None
        cause: BaseException | None = None
        try:
            yield
        except UserError as error:
            failed = cause = error
        except OSError as error:
            cause, failed = error, disk_error(error, path)
            if failed is None:
                raise
        if self.world == 1:
            if failed is not None:
                raise failed from (None if cause is failed else cause)
            return
        first = self.world - self.all_max(0 if failed is None else self.world - self.rank)[0]
        if first == self.world:
            return
        text = self._said_by(first, "" if failed is None else str(failed))
        raise SharedError(text if first == 0 else f"{text} (rank {first})") from (None if cause is failed else cause)

    def number(self, value: int) -> int:
        """Rank 0's `value`."""
        return self.all_max(value if self.main else -1)[0]

    def text(self, value: str) -> str:
        """Rank 0's `value`."""
        return value if self.world == 1 else self._said_by(0, value)

    def _said_by(self, rank: int, text: str) -> str:

        said = text.encode()
        length = self.all_max(len(said) if rank == self.rank else 0)[0]
        if not length:
            return ""
        buffer = torch.frombuffer(bytearray(said if rank == self.rank else length), dtype=torch.uint8)
        dist.broadcast(buffer, rank)
        return bytes(buffer.tolist()).decode(errors="replace")
