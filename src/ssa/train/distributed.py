"""The ranks of a run: who takes part, and on which device.

`torchrun --nproc-per-node N -m ssa train CONFIG` starts N processes, one a device; without torchrun there is one rank and nothing
communicates (`ssa.collectives`). With `context_parallel` = c, c neighbouring ranks share the same rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ssa.collectives import Ranks
from ssa.config import TrainRecipe
from ssa.device import resolve_device
from ssa.errors import UserError
from ssa.ranks import SharedError


@contextlib.contextmanager
def open_ranks(recipe: TrainRecipe) -> Iterator[Ranks]:
    """This process's place in the run, from the variables that torchrun sets; connections are closed at the end.

    Raises:
        UserError: `recipe.device` or `recipe.context_parallel` does not go with the number of ranks.
    """
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
