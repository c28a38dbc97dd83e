"""Training: one function, one loop, one device.

Every step is a pure function of (weights, optimizer state, random generators, step number): the batch and the stream come from
(seed, step), so a resumed run repeats an uninterrupted one bit by bit on the CPU.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa.config import Recipe
from ssa.errors import UserError

if TYPE_CHECKING:
    import torch


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
    """"SIGTERM" or "SIGINT" where a signal ended the run early."""


def train(recipe: Recipe, out: Path | str, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train as `recipe` says, in the run directory `out`.

    Args:
        recipe: The run, see `ssa.config.Recipe`.
        out: Directory for recipe, metrics and checkpoints; new or empty unless one of the next two is set.
        resume: Go on from the newest checkpoint (from step 0 where there is none). Only the recipe's step counts and intervals may differ.
        overwrite: Delete the run that is there.

    Raises:
        UserError: Bad input, a directory that is not free, a full disk, or a loss that is not finite (the weights have not moved then).
    """
    from ssa.train.run_directory import open_run

    out = Path(out)
    try:
        with open_run(out, recipe, resume, overwrite):
            return _Run(recipe, out, resume).go()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"{error.filename or out} cannot be written: {error.strerror}; complete checkpoints are intact"
            ) from error
        raise


class _Run:
    """The state of one `train` call."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool) -> None:
        import torch

        from ssa.data.loader import PackedLoader
        from ssa.infer.load import resolve_device, resolve_dtype
        from ssa.train.build import build_model, open_data
        from ssa.train.checkpoint import find_checkpoints, load_checkpoint
        from ssa.train.metrics import Metrics
        from ssa.train.optim import build_optimizer
        from ssa.train.run_directory import record_start

        t = recipe.train
        self.recipe, self.out = recipe, out
        self.device = resolve_device(t.device)
        dtype = resolve_dtype(t.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
        self.data = open_data(recipe, out)
        # One loader batch is one step: the same rows whatever the split into micro-batches.
        self.loader = PackedLoader(self.data.train, recipe.data.context, t.batch_size * t.accumulation, t.seed)

        _seed_everything(t.seed)
        found = find_checkpoints(out) if resume else []
        self.model = self._resumed_model(found[-1]) if found else build_model(recipe, self.data.tokenizer)
        self.model.to(self.device).train()
        if t.activation_checkpointing:
            # transformers renamed it (and warns under the old name); both recompute without re-entrant autograd by default
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable()
        self.optimizer = build_optimizer(self.model, t)
        self.start_step = 0
        if found:
            extra = load_checkpoint(found[-1], self.model, self.optimizer)
            if extra["data"] != self.data.fingerprint:
                raise UserError(
                    f"the data in {self.data.path} is not what {found[-1]} was trained on; restore it, or start a new run"
                )
            self.start_step = extra["step"]
            if self.start_step > t.steps:
                raise UserError(f"train.steps = {t.steps} lies before the run's step {self.start_step}; ask for more steps")
        self.checkpoint: Path | None = found[-1] if found else None
        if t.compile:
            self.model.compile(dynamic=False)

        # Where the optimizer is fused on the device, a step that is not finite is skipped there, and every one after it,
        # until `Metrics.fetch` raises: no step waits for the device to find out.
        self.found_inf = None
        if self.device.type == "cuda":
            self.found_inf = torch.zeros((), device=self.device)
            self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        record_start(out, recipe, self._environment(dtype))
        aligned = recipe.model.method == "ssa" and recipe.model.alignment_loss != "none"
        self.metrics = Metrics(out, self.start_step, t.steps, aligned)
        if resume:
            self.metrics.say(f"resuming from {found[-1]}" if found else f"nothing to resume in {out}: starting at step 0")

    def go(self) -> TrainResult:
        from ssa.train.interrupt import StopRequest

        t = self.recipe.train
        try:
            with StopRequest() as stop:
                done, losses = self.start_step, None
                for step in range(self.start_step, t.steps):
                    self._step(step)
                    done = step + 1
                    validate = (bool(t.eval_every) and done % t.eval_every == 0) or done == t.steps
                    save = (bool(t.save_every) and done % t.save_every == 0) or done == t.steps or stop.name is not None
                    if validate or save or done % t.log_every == 0:
                        self.metrics.fetch()
                    if validate and stop.name is None:
                        losses = self._validate(done)
                    if save:
                        self._save(done)
                    if stop.name is not None and done < t.steps:
                        self.metrics.say(
                            f"stopped by {stop.name} after step {done}; {self.checkpoint} is complete, go on with --resume"
                        )
                        return TrainResult(self.out, self._newest(), done, None, stop.name)
            if losses is None:  # resumed at its end, or signalled in its last step
                losses = self.metrics.validation_at(done) or self._validate(done)
            return TrainResult(self.out, self._newest(), done, losses)
        finally:
            self.metrics.close()

    def _step(self, step: int) -> None:
        """One optimizer step over `accumulation` micro-batches; the loop itself does not wait for a CUDA device (packed rows still do, in
        the attention layers, to learn where their documents start)."""
        import torch

        from ssa.train.optim import learning_rate
        from ssa.train.streams import draw_stream

        t, m = self.recipe.train, self.recipe.model
        stream = draw_stream(t.seed, step, m.full_ratio) if m.method == "ssa" else None
        batch = self.loader.batch(step)
        tokens = batch["input_ids"].numel()
        targets = int(_is_target(batch).sum())
        lr = learning_rate(step, t)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(3, device=self.device)
        for i in range(t.accumulation):
            rows = slice(i * t.batch_size, (i + 1) * t.batch_size)
            sums += self._backward({name: x[rows] for name, x in batch.items()}, stream, targets)
        norm = self._gradient_norm(t.clip)
        loss = sums[0] + m.alignment_weight * (sums[1] + sums[2])
        values = torch.stack([loss, *sums, norm.float()])
        self.metrics.add(values, step=step + 1, stream=stream, lr=lr, tokens=(step + 1) * tokens, new_tokens=tokens)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self.found_inf is not None:
            self.found_inf.copy_(torch.maximum(self.found_inf, (~finite).float()))
        elif not finite:
            self.metrics.fetch()  # raises, naming the step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, rows: dict[str, torch.Tensor], stream: str | None, targets: int) -> torch.Tensor:
        """Gradients of one micro-batch's share of the step's loss; returns that share, fp32 [3]: cross-entropy, sparsity, commitment.

        Cross-entropy is a mean over the step's targets and alignment a mean over its tokens, so micro-batches weigh by their
        targets in the one and equally in the other.
        """
        import torch

        m, accumulation = self.recipe.model, self.recipe.train.accumulation
        share = int(_is_target(rows).sum()) / max(1, targets)
        pinned = self.device.type == "cuda"
        rows = {name: (x.pin_memory() if pinned else x).to(self.device, non_blocking=True) for name, x in rows.items()}
        with self.autocast:
            output = self.model(**rows, use_cache=False, stream=stream, num_items_in_batch=max(1, targets))
        loss = output.loss
        if output.alignment is not None:  # the model weighs it by targets, too
            loss = loss + (1 / accumulation - share) * m.alignment_weight * output.alignment.sum()
        loss.backward()
        parts = torch.zeros(3, device=self.device)
        parts[0] = output.cross_entropy * share
        if output.sparsity_loss is not None:
            parts[1], parts[2] = output.sparsity_loss / accumulation, output.commitment_loss / accumulation
        return parts

    def _gradient_norm(self, clip: float) -> torch.Tensor:
        """The norm of all gradients before clipping them to `clip` (0 = leave them)."""
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if clip:
            clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def _validate(self, done: int) -> dict[str, float]:
        from ssa.train.validation import validation_losses

        context, batch_size = self.recipe.data.context, self.recipe.train.batch_size
        losses = validation_losses(self.model, self.data.valid, context, batch_size, self.autocast)
        self.metrics.valid(done, losses)
        return losses

    def _save(self, done: int) -> None:
        from ssa.train.checkpoint import save_checkpoint

        extra = {"data": self.data.fingerprint}
        keep = self.recipe.train.keep_last
        self.checkpoint = save_checkpoint(self.out, done, self.model, self.data.tokenizer, self.optimizer, extra, keep)
        self.metrics.restart_clock()

    def _newest(self) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint

    def _resumed_model(self, checkpoint: Path) -> Any:
        """Built from the checkpoint's configuration; `load_checkpoint` brings the weights."""
        from ssa.model import SSAConfig, SSAForCausalLM

        return SSAForCausalLM(SSAConfig.from_pretrained(checkpoint))

    def _environment(self, dtype: torch.dtype) -> dict[str, Any]:
        import torch

        from ssa.train.environment import git_state, versions

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "step": self.start_step,
            "versions": versions(),
            "device": name,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "seed": self.recipe.train.seed,
            "parameters": self.model.num_parameters(),
            "git": git_state(),
            "data": {
                "path": str(self.data.path),
                "fingerprint": self.data.fingerprint,
                "train_tokens": self.data.train.num_tokens,
            },
        }


def _is_target(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [B, T-1]: the next token is to be predicted; a document's first token never is."""
    return (rows["labels"][:, 1:] != -100) & (rows["position_ids"][:, 1:] != 0)


def _seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
