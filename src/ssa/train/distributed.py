"""The ranks of a run: who takes part, on which device, and how they agree.

`torchrun --nproc-per-node N -m ssa train CONFIG` starts N processes, one a device; without torchrun there is one rank and nothing
below communicates. With `context_parallel` = c, c neighbouring ranks share the same rows.

An error that one rank meets must end all of them, or the others wait for it: code that can fail on one rank runs inside
`Ranks.together`, which raises the error everywhere and lets rank 0 alone speak.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssa.errors import UserError

if TYPE_CHECKING:
    import torch

    from ssa.config import TrainRecipe

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG)


class SharedError(UserError):
    """An error that every rank raises. Rank 0 shows it."""


def disk_error(error: OSError, path: object) -> UserError | None:
    """A full, read-only or forbidden disk in one line; None for any other `OSError`."""
    if error.errno not in _DISK:
        return None
    return UserError(f"{error.filename or path} cannot be written: {error.strerror}; complete checkpoints are intact")


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

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, on this rank's device, summed over all ranks in place; the host does not wait for a GPU."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(x)
        return x

    def largest(self, *values: int) -> list[int]:
        """For each value the largest of all ranks. The hosts wait for each other, not for their GPUs."""
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        x = torch.tensor(values, dtype=torch.int64)  # also where one rank has a bool: what the ranks give must be of one type
        dist.all_reduce(x, dist.ReduceOp.MAX)  # a CPU tensor goes through gloo
        return x.tolist()

    @contextlib.contextmanager
    def together(self, path: object = "") -> Iterator[None]:
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
        first = self.world - self.largest(0 if failed is None else self.world - self.rank)[0]
        if first == self.world:
            return
        text = self._said_by(first, "" if failed is None else str(failed))
        raise SharedError(text if first == 0 else f"{text} (rank {first})") from (None if cause is failed else cause)

    def number(self, value: int) -> int:
        """Rank 0's `value`."""
        return self.largest(value if self.main else -1)[0]

    def text(self, value: str) -> str:
        """Rank 0's `value`."""
        return value if self.world == 1 else self._said_by(0, value)

    def _said_by(self, rank: int, text: str) -> str:
        import torch
        import torch.distributed as dist

        said = text.encode()
        length = self.largest(len(said) if rank == self.rank else 0)[0]
        if not length:
            return ""
        buffer = torch.frombuffer(bytearray(said if rank == self.rank else length), dtype=torch.uint8)
        dist.broadcast(buffer, rank)
        return bytes(buffer.tolist()).decode(errors="replace")


@contextlib.contextmanager
def open_ranks(recipe: TrainRecipe) -> Iterator[Ranks]:
    """This process's place in the run, from the variables that torchrun sets; connections are closed at the end.

    Raises:
        UserError: `recipe.device` or `recipe.context_parallel` does not go with the number of ranks.
    """
    import torch
    import torch.distributed as dist

    from ssa.infer.load import resolve_device

    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    shared = recipe.context_parallel
    if world % shared:
        raise UserError(
            f"train.context_parallel = {shared} does not divide the {world} ranks; start with torchrun --nproc-per-node"
        )
    if world == 1:
        yield Ranks(resolve_device(recipe.device))
        return
    if ":" in recipe.device:
        raise UserError(f"train.device = {recipe.device!r} names one device for {world} ranks; use auto, cpu or cuda")
    device = resolve_device(recipe.device)
    if device.type == "cuda":
        device = resolve_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"train.device = {recipe.device!r} does not work with several ranks; use cuda or cpu")
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    groups = [dist.new_group(list(range(i, i + shared))) for i in range(0, world, shared)] if shared > 1 else []
    rank = dist.get_rank()
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    try:
        yield Ranks(device, rank, world, node_ranks, shared, groups[rank // shared] if groups else None)
    except SharedError:
        if ours:
            dist.destroy_process_group()
        raise
    # After any other error the other ranks may be inside a collective operation: leaving ends them, waiting would not.
    if ours:
        dist.destroy_process_group()
