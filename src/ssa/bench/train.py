"""`ssa bench train`: tokens a second of each method in this project's engine, and of transformers' Llama, in one run.

The model, its layers' preparation, the loss, the optimizer and the sharing between ranks are those of `ssa train`; a step is forward,
backward, clipping and the optimizer over one micro-batch. Under torchrun every variant is measured on one rank first, then on all, once
for each way to share the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ssa.bench.llama import LlamaLoss, llama_like
from ssa.bench.report import Deadline, Report, environment
from ssa.bench.rows import Layout, make_rows, vocabulary
from ssa.bench.shapes import parse_list
from ssa.bench.train_bars import train_bars
from ssa.collectives import Ranks
from ssa.config import Recipe
from ssa.device import resolve_dtype
from ssa.errors import UserError
from ssa.methods import method_named, methods, selector_named, split_name
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.activation_checkpoint import prepare_layers
from ssa.train.context_parallel import ContextParallel
from ssa.train.deterministic import deterministic
from ssa.train.distributed import open_ranks
from ssa.train.flops import run_peak_flops, training_flops
from ssa.train.loss import StepLoss
from ssa.train.optim import build_optimizer
from ssa.train.parallel import distribute, gradient_norm, resolve_parallel

LLAMAS = ("llama", "llama-bf16")
"""llama: float32 weights under autocast, as ours; llama-bf16: weights and optimizer in bfloat16."""
SHARINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "reshard_after_forward": True},
    "fsdp-kept": {"parallel": "fsdp", "reshard_after_forward": False},
    "hsdp": {"parallel": "hsdp"},
}
"""How several ranks can share the model: fields of `TrainRecipe`."""
MIN_STEPS, MAX_STEPS = 4, 400
CPU_PARAMETERS = 100_000_000
"""A larger model takes minutes a step there, and most of the memory."""
PAIR = 2  # steps are counted in pairs: SSA's streams take turns


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    variants: tuple[str, ...]
    layouts: tuple[Layout, ...]
    seconds: float
    """Of measured steps for each variant."""
    data: Path | None
    """A prepared directory; None = random tokens."""
    sharings: tuple[str, ...] = ()
    """Of `SHARINGS`; none = as the recipe says."""


def plan(variants: str, rows: str, seconds: float, data: str, sharing: str = "") -> Plan:
    """The command line's words, understood.

    Raises:
        UserError: a name that does not exist, or no seconds.
    """
    names, layouts = parse_list(variants, "--variants"), parse_list(rows, "--rows")
    sharings = parse_list(sharing, "--sharing") if sharing else []
    for flag, given, known in (
        ("--rows", layouts, get_args(Layout)), ("--sharing", sharings, tuple(SHARINGS)),
    ):  # fmt: skip
        for name in given:
            if name not in known:
                raise UserError(f"{flag} {name!r} is not one of {', '.join(known)}")
    for name in names:
        if name not in LLAMAS:
            try:
                method, selector = split_name(name)
                method_named(method), selector_named(selector)
            except UserError:
                there_are = ", ".join([*methods(), *LLAMAS])
                raise UserError(f"--variants {name!r} is not one of {there_are}, or METHOD+SELECTOR") from None
    if not seconds > 0:
        raise UserError(f"--seconds {seconds} must be positive")
    return Plan(
        tuple(names), tuple(cast(Layout, name) for name in layouts), seconds, Path(data) if data else None, tuple(sharings)
    )


def bench_train(recipe: Recipe, plan: Plan, out: Path | None, budget_seconds: float) -> int:
    """Measure, write, print; 1 where a variant failed.

    Raises:
        UserError: a recipe that starts from a checkpoint, ways to share a model on one rank, or data that does not fit.
    """
    if recipe.model.init_from:
        raise UserError(f"model.init_from = {recipe.model.init_from!r}: ssa bench train builds new models; leave it out")
    with open_ranks(recipe.train) as ranks:
        if plan.sharings and ranks.world == 1:
            raise UserError(
                f"--sharing {','.join(plan.sharings)} needs several ranks; start with torchrun --nproc-per-node 2 -m ssa bench train"
            )
        size = _parameters(_config(recipe, "full", vocabulary(recipe, plan.data)))
        if ranks.device.type == "cpu" and size > CPU_PARAMETERS:
            raise UserError(
                f"{size / 1e6:,.0f}M parameters are too many to time on a CPU; name a smaller recipe: ssa bench train tiny"
            )
        device = str(ranks.device) if ranks.device.index is not None or ranks.device.type != "cuda" else "cuda:0"
        report = None
        if ranks.main:
            report = Report(
                out, Deadline(budget_seconds), suite="train", recipe=recipe.to_dict(), ranks=ranks.world,
                data=str(plan.data) if plan.data else "random tokens", **environment(device),
            )  # fmt: skip
        for layout in plan.layouts:
            for variant in plan.variants:
                _measure_all(recipe, plan, variant, layout, ranks, report)
    if report is None:
        return 0
    rows = report.data["rows"]
    report.finish(train_bars(rows))
    return 1 if any("error" in row for row in rows) else 0


def _measure_all(recipe: Recipe, plan: Plan, variant: str, layout: Layout, ranks: Ranks, report: Report | None) -> None:
    """On rank 0 alone, then on all ranks in every way asked for (Llama: alone only)."""
    alone = dataclasses.replace(ranks, rank=0, world=1, node_ranks=1, context_ranks=1, context_group=None)
    groups: list[tuple[Ranks, str, dict[str, Any]]] = [(alone, "", {"parallel": "auto", "context_parallel": 1})]
    if ranks.world > 1 and variant not in LLAMAS:
        groups += [(ranks, f", {name}", SHARINGS[name]) for name in plan.sharings] or [(ranks, "", {})]
    for group, how, fields in groups:
        what = f"{variant}, {layout} rows, {group.world} rank{'s' if group.world > 1 else ''}{how}"
        skip = report is not None and report.out_of_time(what)
        if any(ranks.all_max(int(skip))):
            continue
        row = None
        if group.world > 1 or ranks.main:
            own = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **fields))
            row = attempt(own, plan, variant, layout, group)
        if report is not None and row is not None:
            report.add(row)
            print(described(row), flush=True)
        release()
        ranks.all_max(0)  # the others wait here for rank 0


def attempt(recipe: Recipe, plan: Plan, variant: str, layout: Layout, ranks: Ranks) -> dict[str, Any]:
    """One variant's row, or the error that it ended in on a single rank; `release` belongs behind it."""
    head = {"variant": variant, "rows": layout, "ranks": ranks.world}
    try:
        with deterministic(recipe.train.deterministic, ranks.device):
            return head | measure(recipe, plan, variant, layout, ranks)
    except UserError:
        raise
    except (RuntimeError, ValueError, ArithmeticError) as error:  # out of memory, or a backend that refuses
        if ranks.world > 1:  # an error here ends all ranks
            raise
        return head | {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300]}


def measure(recipe: Recipe, plan: Plan, variant: str, layout: Layout, ranks: Ranks) -> dict[str, Any]:
    """One variant's row.

    Raises:
        ArithmeticError: the loss is not finite; its speed would mean nothing.
    """
    device, t = ranks.device, recipe.train
    torch.manual_seed(t.seed)
    vocab_size = vocabulary(recipe, plan.data)
    batches = [
        {name: x.to(device) for name, x in rows.items()}
        for rows in make_rows(
            plan.data, vocab_size, recipe.data.context, t.batch_size, layout, t.seed, ranks.data_rank, ranks.data_world
        )
    ]
    method, selector = split_name("full" if variant in LLAMAS else variant)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, method=method, selector=selector))
    dtype = resolve_dtype(t.dtype, device)
    with torch.device(device):
        model, loss = _model(recipe, variant, layout, vocab_size, ranks)
    parallel = resolve_parallel(t, ranks, sum(p.numel() for p in model.parameters()))
    context = loss.context if isinstance(loss, StepLoss) else None
    module = loss.to(device) if variant in LLAMAS else distribute(loss, parallel, t, ranks, dtype)
    optimizer = build_optimizer(model, t)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)

    plain_BT = torch.arange(recipe.data.context, device=device).expand(t.batch_size, -1)
    positions = batches[0].get("position_ids", plain_BT).cpu()
    if context is not None:
        batches = [context.part({"position_ids": plain_BT} | rows) for rows in batches]
        bounds = [context.documents(rows["position_ids"]) for rows in batches]  # which a training loop finds on the CPU

    def step(i: int) -> Tensor:
        rows = batches[i % len(batches)]
        stream = stream_of(i, recipe.model.full_ratio) if method_named(method).draws_stream else None
        shared = None
        if context is not None:
            shared = context.sharing(rows["position_ids"], bounds[i % len(bounds)], plain=layout == "plain")
        with shared or contextlib.nullcontext():
            with autocast:
                # the other ranks' targets are about as many; what they count exactly does not change what a step costs
                share, _ = module(rows, stream, _targets(rows) * ranks.world)
            (share * ranks.world).backward()  # ranks average gradients where the loss wants their sum
        gradient_norm(list(model.parameters()), t.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return share.detach()

    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps, seconds, last = _timed(step, plan.seconds, ranks)
    last = ranks.all_sum(last.clone())  # of shares
    if not torch.isfinite(last):
        raise ArithmeticError(f"the loss is {last.item()} after {steps} steps")
    tokens = t.batch_size * recipe.data.context * ranks.data_world
    speed = tokens * steps / seconds
    flops = step_flops(_config(recipe, variant, vocab_size), positions)
    peak = run_peak_flops(device, dtype, ranks.world)
    return {
        "parallel": parallel, "reshard_after_forward": t.reshard_after_forward if parallel in ("fsdp", "hsdp") else None,
        "context_parallel": ranks.context_ranks, "compile": t.compile,
        "activation_checkpointing": t.recompute if t.activation_checkpointing else None, "dtype": str(dtype)[6:],
        "context": recipe.data.context, "batch_size": t.batch_size,
        "tokens_per_step": tokens, "steps": steps, "ms_per_step": 1000 * seconds / steps, "tokens_per_second": speed,
        "flops_per_token": flops, "mfu": None if peak is None else flops["total"] * speed / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None, "loss": last.item(),
    }  # fmt: skip


def _model(recipe: Recipe, variant: str, layout: Layout, vocab_size: int, ranks: Ranks) -> tuple[Any, Any]:
    """(the model in training mode, the module that gives a step's loss)."""
    t = recipe.train
    config = _config(recipe, variant, vocab_size)
    if variant in LLAMAS:
        llama = llama_like(config).train()
        if variant == "llama-bf16":
            llama.to(torch.bfloat16)
        prepare_layers(llama, t.activation_checkpointing, t.recompute, t.compile)
        return llama, LlamaLoss(llama)
    model = SSAForCausalLM(config).train()
    prepare_layers(model, t.activation_checkpointing, t.recompute, t.compile)
    context = None
    if ranks.context_ranks > 1:
        context = ContextParallel(model, ranks.context_group, ranks.context_rank, ranks.context_ranks)
    kind = StepLoss if layout == "packed" else PlainLoss
    return model, kind(model, recipe.model.alignment_weight, ranks.world, context)


def _parameters(config: SSAConfig) -> int:
    with torch.device("meta"):
        return SSAForCausalLM(config).num_parameters()


def _config(recipe: Recipe, variant: str, vocab_size: int) -> SSAConfig:
    """Llama has no gates."""
    gated = recipe.model.attention_gate and variant not in LLAMAS
    return SSAConfig.from_recipe(dataclasses.replace(recipe.model, attention_gate=gated), vocab_size)


def step_flops(config: SSAConfig, positions_BT: Tensor) -> dict[str, float]:
    """Per token; the mean of SSA's streams in their shares."""
    full, sparse = (training_flops(config, positions_BT, stream) for stream in ("full", "sparse"))
    return {part: config.full_ratio * full[part] + (1 - config.full_ratio) * sparse[part] for part in full}


class PlainLoss(StepLoss):
    """The step's loss of rows without positions, one document each: attention then knows that they are plain."""

    def forward(self, rows: dict[str, Tensor], stream: str | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.context is not None:
            return super().forward(rows, stream, targets)
        output = self.model(**rows, use_cache=False, stream=stream)
        loss = output.loss / self.parts
        return loss, loss.detach()


def stream_of(step: int, full_ratio: float) -> str:
    """SSA's stream, dealt out evenly instead of drawn, so that few steps have the right share of each."""
    return "full" if int((step + 1) * full_ratio) > int(step * full_ratio) else "sparse"


def _targets(rows: dict[str, Tensor]) -> Tensor:
    if "targets" in rows:  # a part of a row, see `ContextParallel.part`
        return (rows["targets"] != -100).sum()
    labels = rows["labels"][:, 1:] != -100
    if "position_ids" in rows:
        labels = labels & (rows["position_ids"][:, 1:] != 0)
    return labels.sum()


def _timed(step: Callable[[int], Tensor], seconds: float, ranks: Ranks) -> tuple[int, float, Tensor]:
    """(measured steps, their seconds, the last loss). Before them: each stream once to compile, and once to see how long it takes."""
    for i in range(PAIR):
        step(i)
    _synchronize(ranks.device)
    begin = time.perf_counter()
    for i in range(PAIR):
        step(i)
    _synchronize(ranks.device)
    estimate = (time.perf_counter() - begin) / PAIR
    wanted = min(MAX_STEPS, max(MIN_STEPS, int(seconds / estimate)))
    steps = ranks.all_max(wanted // PAIR * PAIR)[0]
    begin = time.perf_counter()
    for i in range(steps):
        last = step(i)
    _synchronize(ranks.device)
    return steps, time.perf_counter() - begin, last


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """The next variant's compiled code and memory must not meet this one's."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def described(row: dict[str, Any]) -> str:
    """One line a row for the terminal."""
    head = f"{row['variant']}, {row['rows']} rows, {row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    if row["ranks"] > 1:
        kept = ", weights kept" if row["reshard_after_forward"] is False else ""
        shared = ", sharing rows" if row["context_parallel"] > 1 else ""
        head += f" ({row['parallel']}{kept}{shared})"
    head += ": "
    if "error" in row:
        return head + row["error"]
    text = f"{row['tokens_per_second']:,.0f} tokens/s, {row['ms_per_step']:.1f} ms/step"
    if row["mfu"] is not None:
        text += f", MFU {row['mfu']:.1%}"
    return head + text + ("" if row["peak_memory_gb"] is None else f", peak {row['peak_memory_gb']:.1f} GB")
