"""The training loop.

One step = one batch of packed rows (a pure function of seed and step), cut over ranks and into `accumulation` micro-batches each; one
stream for all of its layers (a pure function of the same); one loss, a mean over the whole step; one gradient norm; one optimizer
step. Nothing is drawn from a global generator, so a run that was killed and resumed repeats what an uninterrupted one does, on as many
ranks as are at hand.

The host does not wait for a GPU between two log lines: values stay on the device until `_flush`, and a step that must not count is
skipped there (`ssa.train.skip_step`).
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssa.collectives import Ranks
from ssa.config import Recipe
from ssa.data.loader import PackedLoader
from ssa.data.prefetch import Prefetcher
from ssa.device import device_name, resolve_dtype
from ssa.errors import UserError
from ssa.methods import method_named
from ssa.model import SSAForCausalLM
from ssa.model.stored import check_weights, read_config
from ssa.model.streams import draw_stream
from ssa.ops.documents import cu_seqlens_from_positions
from ssa.ranks import SharedError, disk_error
from ssa.runs.checkpoints import newest_checkpoint, verify_checkpoint
from ssa.terminal import say
from ssa.train.activation_checkpoint import prepare_layers
from ssa.train.build import build_model, check_inputs, open_data
from ssa.train.checkpoint import load_checkpoint
from ssa.train.context_parallel import ContextParallel
from ssa.train.deterministic import deterministic
from ssa.train.distributed import open_ranks
from ssa.train.flops import flops_record, run_peak_flops, training_flops
from ssa.train.header import model_line, run_line, waiting_line
from ssa.train.interrupt import StopRequest
from ssa.train.loss import StepLoss, alignment_share, is_target
from ssa.train.metrics import Metrics
from ssa.train.optim import build_optimizer, learning_rate
from ssa.train.parallel import distribute, gradient_norm, micro_batch, reshard, resolve_parallel
from ssa.train.probe import probe, probe_batch
from ssa.train.run_directory import check_progress, open_run, record_start, rows_per_step, start_record
from ssa.train.saver import Saver
from ssa.train.skip_step import SkipStep, described
from ssa.train.validation import validation_losses


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind."""

    out: Path
    """The run directory."""
    checkpoint: Path
    """The newest checkpoint."""
    step: int
    """Optimizer steps done."""
    validation: dict[str, float] | None
    """Final losses in nats a token under {"full", "sparse"} attention; None if the run was stopped by a signal."""
    stopped_by: str | None = None
    """"SIGTERM", "SIGINT" or "SIGHUP" where a signal, to any rank, ended the run early."""


def train(recipe: Recipe, out: Path | str, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train as `recipe` says, in the run directory `out`; started by torchrun, as one of its ranks.

    Args:
        recipe: The run, see `ssa.config.Recipe`.
        out: Directory for recipe, metrics and checkpoints; new or empty unless one of the next two is set.
        resume: Go on from the newest checkpoint (from step 0 where there is none). See `ssa.train.run_directory.RESUMABLE` for what may differ.
        overwrite: Delete the run that is there.

    Raises:
        UserError: Bad input, a directory that is not free, a full disk, or a loss that is not finite (the weights have not moved then).
            With several ranks it is a `SharedError` on all of them.
    """
    out = Path(out)
    try:
        with (
            open_ranks(recipe.train) as ranks,
            contextlib.ExitStack() as stack,
            deterministic(recipe.train.deterministic, ranks.device),
        ):
            with ranks.raise_on_all(out):
                if ranks.main:
                    check_inputs(recipe, out, resume, overwrite)
                    stack.enter_context(open_run(out, recipe, resume, overwrite))
            return _Run(recipe, out, resume, ranks).go()
    except OSError as error:
        if (told := disk_error(error, out)) is not None:
            raise told from error
        raise


class _Run:
    """The state of one `train` call on one rank."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, ranks: Ranks) -> None:
        t = recipe.train
        self.recipe, self.out, self.ranks, self.device = recipe, out, ranks, ranks.device
        dtype = resolve_dtype(t.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
        self.metrics: Metrics | None = None
        self._say(run_line(recipe, out, ranks, device_name(self.device), dtype))
        for turn in (True, False):  # rank 0 may have text to prepare, which the others then find
            with ranks.raise_on_all(out):
                if ranks.main is turn:
                    self.data = open_data(recipe, out, resume)
        with ranks.raise_on_all(out):
            if t.verify_data and ranks.main:
                self._say(f"verifying the hash of every shard in {self.data.path}")
                self.data.train.verify()
                self.data.valid.verify()
        with ranks.raise_on_all(out):
            found = newest_checkpoint(out) if resume else None
            if found is not None:
                verify_checkpoint(found, ranks.rank, ranks.world)
        with ranks.raise_on_all(out):
            # One loader batch is one step: the same rows whatever the split over ranks and micro-batches.
            rows = t.batch_size * t.accumulation
            self.loader = PackedLoader(self.data.train, recipe.data.context, rows, t.seed, ranks.data_rank, ranks.data_world)
            _seed_everything(t.seed)
            notes: list[str] = []
            if found is None:
                self.model, notes = build_model(recipe, self.data.tokenizer)
            else:
                config = read_config(found)
                check_weights(found, config)
                self.model = SSAForCausalLM(config)
            prepare_layers(self.model, t.activation_checkpointing, t.recompute, t.compile)
            self.context = None
            if ranks.context_ranks > 1:
                self.context = ContextParallel(self.model, ranks.context_group, ranks.context_rank, ranks.context_ranks)
            self.loss = StepLoss(self.model, recipe.model.alignment_weight, t.accumulation * ranks.world, self.context)
            self.num_parameters = self.model.num_parameters()
            self.parallel = resolve_parallel(t, ranks, self.num_parameters)
            self.probed = None
            if t.probe_every:
                self.probed = probe_batch(self.data.valid, recipe.data.context, self.model.config.uniform_budget)
        self.module = distribute(self.loss, self.parallel, t, ranks, dtype).train()
        self.optimizer = build_optimizer(self.model, t)
        self.guard = SkipStep(self.device, t.skip_nonfinite, t.skip_spikes)
        self.start_step = 0
        if found is not None:
            extra = load_checkpoint(found, self.model, self.optimizer, ranks)
            with ranks.raise_on_all():
                check_progress(extra, recipe, self.data, ranks, found)
            self.start_step = extra["step"]
            if "guard" in extra:
                self.guard.restore(extra["guard"])
        self.saver = Saver(out, ranks, self.data.tokenizer, t.keep_last, t.async_save)
        self.saver.newest = found

        # Where the optimizer is fused on the device it can skip a step there, and no step waits for the host to hear of it.
        self.found_inf = None
        if self.device.type == "cuda" and t.optimizer == "adamw":
            self.found_inf = torch.zeros((), device=self.device)
            self.optimizer.found_inf = self.found_inf  # type: ignore[union-attr]
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        aligned = self.model.config.aligns
        with ranks.raise_on_all(out):
            if ranks.main:
                environment = start_record(recipe, self.data, ranks, self.parallel, dtype, self.num_parameters)
                peak = run_peak_flops(self.device, dtype, ranks.world)
                positions = self.loader.batch(self.start_step)["position_ids"]
                work = {"flops_per_token": flops_record(self.model.config, positions), "peak_flops": peak}
                record_start(out, recipe, {"step": self.start_step} | environment | work)
                distils = self.model.model.selector.loss_weight > 0
                self.metrics = Metrics(
                    out, self.start_step, t.steps, aligned, distils=distils, track=t.track, peak_flops=peak, device=self.device
                )
        if self.parallel == "none" and t.parallel != "auto":
            self._say(f"one process: train.parallel = {t.parallel!r} has no effect (torchrun --nproc-per-node N starts N)")
        if t.alignment_warmup and not (aligned and recipe.model.alignment_weight):
            self._say(f"no alignment to warm up: train.alignment_warmup = {t.alignment_warmup} has no effect")
        for note in notes:
            self._say(note)
        self._say(model_line(self.model, self.data))
        if resume:
            self._say(f"resuming from {found}" if found is not None else f"nothing to resume in {out}: starting at step 0")
        if waiting := waiting_line(recipe, self.device):
            self._say(waiting)

    def go(self) -> TrainResult:
        ahead = Prefetcher(self.loader.batch, self.start_step, self.recipe.train.steps, device=self.device)
        try:
            with ahead as self.batches, StopRequest() as stop:
                return self._loop(stop)
        except UserError as error:
            if self.ranks.world == 1 or isinstance(error, SharedError):
                self.saver.finish()  # a checkpoint from before the error is worth having
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _loop(self, stop: StopRequest) -> TrainResult:
        t, saver = self.recipe.train, self.saver
        done, losses = self.start_step, None
        for step in range(self.start_step, t.steps):
            self._step(step)
            stop.worth_saving = True
            done = step + 1
            number, writing = self.ranks.all_max(stop.number, int(saver.writing))
            name = signal.Signals(number).name if number else None
            if saver.pending is not None and not writing:
                saver.finish()
            validate = (bool(t.eval_every) and done % t.eval_every == 0) or done == t.steps
            probing = self.probed is not None and done % t.probe_every == 0
            save = (bool(t.save_every) and done % t.save_every == 0) or done == t.steps or name is not None
            if validate or save or probing or done % t.log_every == 0 or step == self.start_step:
                self._flush()
            if validate and name is None:
                losses = self._validate(done)
            if probing and name is None:
                self._probe(done)
            if save:
                self._save(done)
            if name is not None and done < t.steps:
                saver.finish()
                self._say(f"stopped by {name} after step {done}; {self._newest()} is complete, go on with --resume")
                return TrainResult(self.out, self._newest(), done, None, name)
        saver.finish()
        if losses is None:  # resumed at its end, or signalled in its last step
            known = self.metrics.validation_at(done) if self.metrics is not None else None
            said = self.ranks.text("" if known is None else json.dumps(known))
            losses = json.loads(said) if said else self._validate(done)
        return TrainResult(self.out, self._newest(), done, losses)

    def _step(self, step: int) -> None:
        """One optimizer step over `accumulation` micro-batches; on CUDA nothing here waits for the device."""
        t, m = self.recipe.train, self.recipe.model
        stream = draw_stream(t.seed, step, m.full_ratio) if method_named(m.method).draws_stream else None
        batch = self.batches.get(step)
        waited = self.batches.take_wait()
        flops = self._flops(batch, stream) if self.metrics is not None and self.metrics.peak_flops else None
        if self.context is not None:
            batch = self.context.part(batch)
        own = (batch["targets"] != -100) if "targets" in batch else is_target(batch)
        targets = self.ranks.all_sum(own.sum().to(self.device, non_blocking=True))
        lr = learning_rate(step, t)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.loss.alignment_share = alignment_share(step, t)
        sums = torch.zeros(4, device=self.device)
        for i in range(t.accumulation):
            rows = {name: x[i * t.batch_size : (i + 1) * t.batch_size] for name, x in batch.items()}
            with micro_batch(self.module, i == t.accumulation - 1, t.reduce_every_micro_batch):
                sums += self._backward(rows, stream, targets)
        self.ranks.all_sum(sums)
        norm = self._gradient_norm(t.clip).float()
        loss = (
            sums[0] + self.loss.alignment_share * m.alignment_weight * (sums[1] + sums[2]) + self.loss.selection_weight * sums[3]
        )
        verdict = self.guard.judge(loss, norm)
        tokens = self.loader.tokens_per_step
        known = {
            "step": step + 1, "stream": stream, "lr": lr, "tokens": (step + 1) * tokens, "new_tokens": tokens, "flops": flops,
            "data_wait": waited,
        }  # fmt: skip
        self._pending.append((known, torch.cat([torch.stack([loss, *sums, norm]), verdict])))
        if self.found_inf is not None:
            self.found_inf.copy_(verdict[0])
            self.optimizer.step()
        elif not verdict[0]:
            self.optimizer.step()
        elif verdict[1]:
            self._flush()  # raises, naming the step
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, rows: dict[str, torch.Tensor], stream: str | None, targets: torch.Tensor) -> torch.Tensor:
        """Gradients of one micro-batch's share of the step's loss; returns its shares, fp32 [4]: cross-entropy, sparsity, commitment, the selectors' loss."""
        pinned = self.device.type == "cuda"
        if pinned:  # here it costs nothing to find out; on the device it would have to be waited for
            find = cu_seqlens_from_positions if self.context is None else self.context.documents
            rows["cu_seqlens"] = find(rows["position_ids"])
        rows = {name: (x.pin_memory() if pinned else x).to(self.device, non_blocking=True) for name, x in rows.items()}
        shared = None if self.context is None else self.context.sharing(rows["position_ids"], rows.get("cu_seqlens"))
        with shared or contextlib.nullcontext():
            with self.autocast:
                loss, shares = self.module(rows, stream, targets)
            (loss * self.ranks.world).backward()  # DDP and FSDP average over ranks; shares are to be summed
        return shares

    def _gradient_norm(self, clip: float) -> torch.Tensor:
        return gradient_norm(list(self.model.parameters()), clip)

    def _flush(self) -> None:
        """Bring the steps since the last time over from the device, and report them.

        Raises:
            UserError: One of them ended the run.
        """
        if not self._pending:
            return
        rows = torch.stack([values for _, values in self._pending]).tolist()
        pending, self._pending = self._pending, []
        halted = False
        with self.ranks.raise_on_all(self.out):
            for (known, _), (*values, skipped, stopped) in zip(pending, rows, strict=True):
                halted = halted or bool(stopped)
                if self.metrics is None:
                    continue
                if skipped and not stopped:
                    self.metrics.say(f"step {known['step']} skipped: {described(values[0], values[-1])}")
                    continue
                self.metrics.add(torch.tensor(values), **known)
                if stopped:
                    break
            if self.metrics is not None:
                self.metrics.fetch()  # raises for the value that is not finite
        assert not halted, "metrics accepted a step that is not finite"

    def _flops(self, batch: dict[str, torch.Tensor], stream: str | None) -> float:
        """What the step computes on all ranks; their rows are taken to be like this rank's."""
        return training_flops(self.model.config, batch["position_ids"], stream)["total"] * self.loader.tokens_per_step

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Passes without gradients, the same on every rank: FSDP needs all of them for each."""
        # the compiler would work on shapes and modes that occur a few times
        with torch.compiler.set_stance("force_eager") if self.recipe.train.compile else contextlib.nullcontext():
            yield
        reshard(self.loss)

    def _validate(self, done: int) -> dict[str, float]:
        with self._measuring():
            losses = validation_losses(
                self.loss, self.data.valid, self.recipe.data.context, self.recipe.train.batch_size, self.autocast
            )
        with self.ranks.raise_on_all(self.out):
            if self.metrics is not None:
                self.metrics.valid(done, losses)
        return losses

    def _probe(self, done: int) -> None:
        assert self.probed is not None
        with self._measuring():
            figures = probe(self.loss, self.probed, self.model.config.uniform_budget, self.autocast)
        with self.ranks.raise_on_all(self.out):
            if self.metrics is not None:
                self.metrics.probe(done, figures)

    def _save(self, done: int) -> None:
        extra = {
            "data": self.data.fingerprint,
            "rows_per_step": rows_per_step(self.recipe, self.ranks),
            "guard": self.guard.state(),
        }
        self.saver.save(done, self.model, self.optimizer, extra, self._figures(done))
        if self.metrics is not None:
            self.metrics.restart_clock()

    def _figures(self, done: int) -> dict[str, str]:
        """What the model's card says of its training."""
        figures = {"training": f"{done:,} of {self.recipe.train.steps:,} steps, {done * self.loader.tokens_per_step:,} tokens"}
        losses = None if self.metrics is None else self.metrics.validation_at(done)
        if losses is not None:
            figures["validation loss"] = ", ".join(f"{loss:.4f} {mode}" for mode, loss in losses.items()) + " (nats a token)"
        return figures

    def _newest(self) -> Path:
        assert self.saver.newest is not None
        return self.saver.newest

    def _say(self, text: str) -> None:
        """Once, by rank 0; before there are metrics as a plain line."""
        if self.metrics is not None:
            self.metrics.say(text)
        elif self.ranks.main:
            say(text)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
