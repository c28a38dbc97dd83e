"""How several ranks share one model: PyTorch's DDP, or FSDP2 (`fully_shard`), over one dimension of ranks or two (hybrid).

Gradients are *sums* over ranks, since every rank computes its share of one loss (`ssa.train.loss`). DDP and FSDP both average, so the loss
is multiplied by the number of ranks before the backward pass.

Precision is that of one device: float32 weights under autocast. FSDP gathers a layer's weights in bfloat16, as autocast would round them
anyway, while the embedding, whose output is the float32 residual stream, travels in float32; gradients are summed in float32.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ssa.collectives import Ranks
from ssa.config import TrainRecipe
from ssa.errors import UserError
from ssa.train.loss import StepLoss

BYTES_A_PARAMETER = 16
"""float32 weight, gradient and AdamW's two moments: what each rank of DDP holds."""


def resolve_parallel(recipe: TrainRecipe, ranks: Ranks, num_parameters: int) -> str:
    """ "none" for one rank, else what `recipe.parallel` says; "auto" is "ddp" where a copy takes less than a tenth of a device, else
    "fsdp", which takes less memory and is faster with large models (measured at 1.3B parameters)."""
    if ranks.world == 1:
        return "none"
    if recipe.parallel != "auto":
        return recipe.parallel
    if ranks.device.type != "cuda":
        return "ddp"
    return "ddp" if num_parameters * BYTES_A_PARAMETER < torch.cuda.mem_get_info(ranks.device)[1] / 10 else "fsdp"


def shard_ranks(recipe: TrainRecipe, ranks: Ranks) -> int:
    """Ranks in a sharding group of "hsdp"."""
    size = recipe.shard_ranks or ranks.node_ranks
    if ranks.world % size or size > ranks.world:
        raise UserError(f"train.shard_ranks = {size} does not divide the {ranks.world} ranks; name a divisor")
    return size


def distribute(loss: StepLoss, parallel: str, recipe: TrainRecipe, ranks: Ranks, dtype: torch.dtype) -> torch.nn.Module:
    """The module to call for a step, on the device. `loss.model`, whose parameters may now be DTensors, stays the model.

    Args:
        loss: The step loss around a model on the CPU, its layers prepared.
        parallel: What `resolve_parallel` said.
        dtype: That of autocast.
    """
    if parallel == "none":
        return loss.to(ranks.device)
    if parallel == "ddp":
        loss.to(ranks.device)
        ids = [ranks.device] if ranks.device.type == "cuda" else None
        # the buffers (RoPE's frequencies) are computed, the same everywhere; PyTorch 2.13 gave the option a new name
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers": False
        }
        return DistributedDataParallel(loss, device_ids=ids, gradient_as_bucket_view=True, **sync_buffers)

    if parallel == "hsdp":
        size = shard_ranks(recipe, ranks)
        mesh = init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("copies", "shards"))
    else:
        mesh = init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shards",))
    layers = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype is torch.bfloat16:
        layers = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in loss.model.model.layers:  # each is moved to the device and cut before the next: the whole never lies there
        fully_shard(layer, mesh=mesh, mp_policy=layers, reshard_after_forward=recipe.reshard_after_forward)
    fully_shard(loss, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(loss, "token_nll")
    return loss


@contextlib.contextmanager
def micro_batch(module: Any, last: bool, reduce_every: bool) -> Iterator[None]:
    """One micro-batch's forward and backward pass. Gradients are summed over ranks in the `last` of a step.

    `reduce_every`: FSDP sums within a sharding group every time, so that only parts of gradients are kept in between.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or reduce_every)
        module.set_requires_all_reduce(last)
    yield


def reshard(module: torch.nn.Module) -> None:
    """Back to parts, after a pass without a backward pass: FSDP leaves what it gathered until then."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gradient_norm(parameters: list[torch.nn.Parameter], clip: float) -> torch.Tensor:
    """The norm of all gradients, over all ranks, before they are clipped to `clip` (0 = left as they are)."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip:
        clip_grads_with_norm_(parameters, clip, norm)
    return norm
