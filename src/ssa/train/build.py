"""From a recipe to what training needs: data and model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ssa.config import Recipe, load_recipe
from ssa.data.mixture import Data, Mixture, open_mixture
from ssa.data.prepare import prepare
from ssa.data.shards import INDEX, TokenShards, is_begun
from ssa.data.sources import expand_inputs
from ssa.data.tokenizer import load_tokenizer, vocabulary_size
from ssa.errors import UserError
from ssa.files import sha256_of_file
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.configuration import METHOD_FIELDS
from ssa.model.stored import fresh_selector_note, load_pretrained, read_config
from ssa.runs.checkpoints import open_checkpoint
from ssa.runs.home import RECIPE, find_data, find_mixture, read_starts
from ssa.terminal import say
from ssa.train.run_directory import is_own
from ssa.train.trackers import check_tracker


def check_inputs(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> None:
    """Complain about input that is not there, or cannot be sent where it should go, before a run has deleted or written anything.

    A run that is resumed has its data, wherever that lies now, and its weights: see `open_data`.

    Raises:
        UserError: `data.path`, `data.tokenizer`, `model.init_from` or the package of `train.track` is not there, or `overwrite` would
            delete what the recipe reads.
    """
    check_tracker(recipe.train.track)
    if resume:
        return
    if overwrite:
        sources = {
            "data.path": recipe.data.path,
            "data.tokenizer": recipe.data.tokenizer,
            "model.init_from": recipe.model.init_from,
        }
        sources |= {f"data.mixture, {path}": path for path in recipe.data.mixture}
        for name, source in sources.items():
            if source and Path(source).exists() and is_own(out, Path(source)):
                raise UserError(
                    f"{name} = {source!r} lies in {out}, which --overwrite would empty; name another directory with --out"
                )
    if recipe.model.init_from:
        open_checkpoint(recipe.model.init_from)
    if not is_begun(Path(recipe.data.path)) and (overwrite or not (out / "data" / INDEX).is_file()):
        expand_inputs([recipe.data.path])
        load_tokenizer(recipe.data.tokenizer)


def open_data(recipe: Recipe, out: Path, resume: bool = False) -> Data:
    """The data of a recipe; text that is not prepared yet is prepared into `out`/data first (once).

    `resume`: `out` is a run that began before. Its data is looked for wherever it may lie now, unless the recipe names another place.
    """
    path, mixture = Path(recipe.data.path), recipe.data.mixture
    if resume and read_starts(out):
        mixture = find_mixture(out, mixture)
        if recipe.data.path == load_recipe(str(out / RECIPE)).data.path:
            try:
                path = find_data(out, recipe)
            except UserError as error:
                raise UserError(f"{error}; restore it, or name its place with --data.path") from None
        elif not is_begun(path):
            raise UserError(
                f"data.path = {recipe.data.path!r} holds no prepared data; a resumed run goes on with the data it began with"
            )
    elif not is_begun(path):
        path = out / "data"
        if not (path / INDEX).is_file():
            say(f"preparing {recipe.data.path} into {path}")
            say(prepare([recipe.data.path], path, tokenizer=recipe.data.tokenizer))
    train: TokenShards | Mixture
    index = fingerprint = sha256_of_file(path / INDEX)
    if mixture:
        train = open_mixture(mixture, path)
        fingerprint = hashlib.sha256(f"{index} {train.fingerprint()}".encode()).hexdigest()
    else:
        train = TokenShards(path, "train")
    return Data(path, train.load_tokenizer(), train, TokenShards(path, "valid"), index, fingerprint)


def build_model(recipe: Recipe, tokenizer: Any) -> tuple[SSAForCausalLM, list[str]]:
    """(model in float32 on the CPU (or the present default device), notes): a new one, or the one in `model.init_from` with the recipe's
    method, about which the notes say what is not as it was there."""
    if recipe.model.init_from:
        return _from_checkpoint(recipe, tokenizer)
    vocab_size = recipe.model.vocab_size or vocabulary_size(tokenizer)
    _check_vocabulary(vocab_size, tokenizer, "model.vocab_size")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SSAForCausalLM(SSAConfig.from_recipe(recipe.model, vocab_size, stream_seed=recipe.train.seed, **tokens)), []


def _from_checkpoint(recipe: Recipe, tokenizer: Any) -> tuple[SSAForCausalLM, list[str]]:
    init_from, notes = recipe.model.init_from, []
    try:
        directory = open_checkpoint(init_from)
        had = read_config(directory)
        config = with_method(had, recipe)
        _check_vocabulary(config.vocab_size, tokenizer, "the vocabulary of model.init_from")
        new_selector = had.selector != config.selector
        if new_selector and (note := fresh_selector_note(config)):
            notes.append(note)
        if recipe.model.rope_factor > 1:
            factor = f"model.rope_factor = {recipe.model.rope_factor:g}"
            notes.append(f"{factor} scales the positions of {init_from}; 1 keeps them as they are")
        return load_pretrained(directory, config, torch.float32, new_selector), notes
    except UserError as error:
        raise UserError(f"model.init_from = {init_from!r}: {error}") from None


def with_method(config: SSAConfig, recipe: Recipe) -> SSAConfig:
    """A checkpoint's configuration under the recipe's method: everything but the weights' shapes (the gate stays the checkpoint's).
    Budgets for each layer go: they were tuned for other weights.

    `model.rope_factor` > 1 applies too: it is how the paper goes on to 32k tokens.
    """
    wanted = SSAConfig.from_recipe(recipe.model, config.vocab_size)
    values = config.to_dict() | {
        name: getattr(wanted, name) for name in ("method", "attention_mode", *METHOD_FIELDS) if name != "attention_gate"
    }
    if recipe.model.rope_factor > 1:
        values["rope_parameters"] = wanted.rope_parameters | {"rope_theta": config.rope_parameters["rope_theta"]}
    return SSAConfig.from_dict(values | {"stream_seed": recipe.train.seed, "layer_budgets": None})


def _check_vocabulary(vocab_size: int, tokenizer: Any, name: str) -> None:
    if vocab_size < vocabulary_size(tokenizer):
        raise UserError(f"{name} = {vocab_size} is smaller than the tokenizer's {vocabulary_size(tokenizer)} ids")
