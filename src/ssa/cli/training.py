"""The verbs that make data and models. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ssa.cli.inputs import check_data
from ssa.cli.metavars import DIRECTORY, INPUT, NAME, RECIPE, TOKENIZER
from ssa.config import Recipe, check_seed, load_recipe
from ssa.data.lines import MAX_LINE_BYTES
from ssa.errors import UserError
from ssa.methods import method_named
from ssa.ranks import SharedError
from ssa.runs.checkpoints import resolve_checkpoint
from ssa.terminal import lasting_output, say, warn

PATIENCE = 5.0
"""Seconds that a rank stays when rank 0 has an error to tell: torchrun stops all ranks as soon as one has ended, and the message would be
lost."""


def prepare(
    inputs: tuple[INPUT, ...],
    /,
    out: DIRECTORY,
    tokenizer: TOKENIZER = "",
    train_bpe: int = 0,
    valid_fraction: float = 0.01,
    document_bytes: int = 256 << 10,
    max_line_bytes: int = MAX_LINE_BYTES,
    text_field: NAME = "text",
    split: NAME = "",
    workers: int = 0,
    overwrite: bool = False,
) -> None:
    """Turn text into memory-mapped token shards.

    Args:
        inputs: Files, directories or globs of .txt .md .jsonl(.gz .xz .zst) .parquet; or builtin:python; or hf:NAME[:CONFIG][:SPLIT].
        out: Directory for the shards. A killed run goes on where it was.
        tokenizer: byte, a tokenizer.json or a tokenizer directory; byte if left out.
        train_bpe: Train a byte-level BPE of this many tokens on the text instead (0 = do not).
        valid_fraction: Share of the documents set apart for validation.
        document_bytes: Text files of more bytes are cut into documents at line ends.
        max_line_bytes: A longer line of .jsonl, or row of .parquet, is an error; encoding one takes up to 300 times its size in memory.
        text_field: Field or column of .jsonl and .parquet that holds the text.
        split: Put everything into this one split, beside those that the directory has; e.g. valid.
        workers: Processes; 0 = one a CPU core.
        overwrite: Replace what is in the directory.
    """
    from ssa.data.prepare import prepare as prepare_data

    summary = prepare_data(
        list(inputs), out, tokenizer=tokenizer or None, train_bpe=train_bpe, valid_fraction=valid_fraction,
        document_bytes=document_bytes, max_line_bytes=max_line_bytes, text_field=text_field, split=split or None, workers=workers, overwrite=overwrite,
    )  # fmt: skip
    say(summary)


@lasting_output()
def train(config: RECIPE, /, out: DIRECTORY = "", resume: bool = False, overwrite: bool = False, *, overrides: list[str]) -> int:
    """Train a model; on several devices with torchrun --nproc-per-node N -m ssa train CONFIG.

    Args:
        config: A recipe file, or a preset: tiny, 33m, 60m, 300m, 1b, servable-1b, adapt.
        out: Run directory; runs/CONFIG-METHOD if left out.
        resume: Go on from the run's newest checkpoint; the run directory may stand in CONFIG's place.
        overwrite: Delete the run that is there and start again.
    """
    rank = int(os.environ.get("RANK", 0))  # torchrun's
    if resume and not out and os.path.isfile(os.path.join(config, "recipe.json")):
        config, out = os.path.join(config, "recipe.json"), config
    try:
        recipe = load_recipe(config, overrides)
        run = Path(out) if out else Path("runs") / f"{Path(config).stem}-{recipe.model.method}"
        if not resume and (overwrite or not (run / "data").is_dir()):
            check_data(recipe.data.path)
        if not resume and recipe.model.init_from:
            resolve_checkpoint(recipe.model.init_from)
    except UserError:
        if rank:  # all ranks read the same words: one of them complains
            return _after_the_first_rank()
        raise
    _check_started(overrides, recipe)
    if warning := _covered(recipe):
        warn(warning)
    from ssa.train.trainer import train as train_model

    try:
        result = train_model(recipe, run, resume=resume, overwrite=overwrite)
    except SharedError:
        if rank:
            return _after_the_first_rank()
        raise
    if result.validation is not None and rank == 0:
        losses = ", ".join(f"{mode} {loss:.4f}" for mode, loss in result.validation.items())
        say(f"done: step {result.step}, validation loss {losses} nats a token; model in {result.checkpoint}")
    return 128 + signal.SIGINT if result.stopped_by == "SIGINT" else 0


def _after_the_first_rank() -> int:
    """The status of a rank that leaves an error to rank 0."""
    time.sleep(PATIENCE)
    return 2


@lasting_output()
def demo(out: DIRECTORY = "runs/demo", steps: int = 0, seed: int = 1, overwrite: bool = False) -> None:
    """Train full, moba and ssa models on this machine, compare them, and write a report.

    Args:
        out: Directory for data, runs and report. A demo that was interrupted goes on.
        steps: Training steps for each model; 0 = the preset's.
        seed: Seed of weights and data order.
        overwrite: Start again.
    """
    check_seed(seed, "seed")
    from ssa.demo import run_demo

    run_demo(Path(out), steps=steps or None, seed=seed, overwrite=overwrite)


def _check_started(overrides: list[str], recipe: Recipe) -> None:
    """A way to share the model that was asked for here and now must not be ignored; in a recipe file it waits for more processes."""
    asked = any(word.partition("=")[0] == "--train.parallel" for word in overrides)
    if asked and recipe.train.parallel != "auto" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"--train.parallel {recipe.train.parallel} needs several processes and this is one: start it with "
            "torchrun --nproc-per-node N -m ssa train ..., or leave it out"
        )


def _covered(recipe: Recipe) -> str:
    """Where the budget holds the whole context, selection selects nothing."""
    m, context = recipe.model, recipe.data.context
    if method_named(m.method).streams == "full" or m.num_selected_blocks * m.block_size < context:
        return ""
    return (
        f"{m.num_selected_blocks} blocks of {m.block_size} keys hold the whole context of {context}: nothing is left out, sparse attention is full "
        "attention; lower model.num_selected_blocks or raise data.context"
    )
