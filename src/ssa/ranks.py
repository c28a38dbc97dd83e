"""Which rank this process is, without a word to the others (`ssa.collectives`), and the errors that end all of them."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from ssa.errors import UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG)


class SharedError(UserError):
    """An error that every rank raises. Rank 0 shows it."""


def disk_error(error: OSError, path: object) -> UserError | None:
    """A full, read-only or forbidden disk in one line; None for any other `OSError`."""
    if error.errno not in _DISK:
        return None
    return UserError(f"{error.filename or path} cannot be written: {error.strerror}; complete checkpoints are intact")


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `world` takes items rank, rank + world, ..."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Shard:
        """RANK and WORLD_SIZE, as torchrun sets them; one rank where they are not set."""
        found = []
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
            text = os.environ.get(name, default)
            if not text.isdecimal():
                raise UserError(f"{name} = {text!r} in the environment is not a number; unset it or use torchrun")
            found.append(int(text))
        rank, world = found
        if rank >= world:
            raise UserError(f"RANK = {rank} is not below WORLD_SIZE = {world}")
        return cls(rank, world)

    def share(self, count: int) -> range:
        return range(self.rank, count, self.world)


ALONE = Shard()
"""The one rank where there are no others."""
