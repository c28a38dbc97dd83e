"""`tune_budget`: the least budget of each layer that keeps a share of full attention's mass, and a model that reads by it."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ssa.analysis.analyze import MAX_TOKENS, write_figures
from ssa.analysis.attention_stats import selection_of
from ssa.analysis.divergence import DivergenceSums, token_divergence
from ssa.analysis.kept_mass import KeptMass
from ssa.analysis.measure import ROW_TOKENS, own_rows
from ssa.analysis.rows import Rows, packed_rows
from ssa.budget import FULL, Budget, LayerBudgets, LayerReading, Reading
from ssa.collectives import gather, meet
from ssa.device import device_name, local_device
from ssa.errors import UserError
from ssa.eval.documents import document_texts
from ssa.eval.model_under_test import progress_bar
from ssa.eval.needle import Haystack, check_grid, needle_grid
from ssa.eval.perplexity import WINDOW_TOKENS
from ssa.files import check_directory
from ssa.infer.load import load_model
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.card import CARD, is_foreign, write_card
from ssa.model.configuration import build_attention
from ssa.model.convert import appearing, check_out
from ssa.model.sources import open_source
from ssa.model.stored import make_config, own_fields
from ssa.model.weights import link_weights, write_json
from ssa.ranks import Shard
from ssa.runs.checkpoints import open_checkpoint
from ssa.runs.home import run_context, run_data, run_home
from ssa.runs.provenance import versions

FORMAT = 1
FIGURES = "tune_budget.json"
NEEDLE_DEPTHS, NEEDLE_CASES = (0.0, 0.25, 0.5, 0.75, 1.0), 20
LEAST_FOUND = 0.5
"""Of the needles, by full attention: where it finds fewer, what sparse attention misses says nothing about the budget."""


@dataclass(frozen=True)
class Ladder:
    """What each layer keeps at each number of blocks, under full attention."""

    block_size: int
    blocks: list[int]
    """The steps, ascending; above them everything is read."""
    all_blocks: int
    """Of the longest document measured."""
    kept: list[list[float]]
    """By layer and step."""

    def choose(self, target: float) -> LayerBudgets:
        """For each layer the least step that keeps `target`, else everything."""
        readings: list[LayerReading] = []
        for kept in self.kept:
            enough = [k for k, mass in zip(self.blocks, kept, strict=True) if mass >= target]
            readings.append(Budget(enough[0], self.block_size) if enough else FULL)
        return LayerBudgets(tuple(readings))

    def kept_by(self, reading: LayerReading, layer: int) -> float:
        return self.kept[layer][self.blocks.index(reading.num_selected_blocks)] if isinstance(reading, Budget) else 1.0

    def blocks_of(self, readings: LayerBudgets) -> list[int]:
        """By layer; everything counts as the blocks there are."""
        return [reading.num_selected_blocks if isinstance(reading, Budget) else self.all_blocks for reading in readings]


def tune_budget(
    run: Path | str, *, target: float = 0.98, data: Path | str | None = None, split: str = "valid", block_size: int | None = None,
    context: int | None = None, max_tokens: int | None = None, whole_documents: bool = False, needle_lengths: Sequence[int] = (),
    seed: int = 0, device: str = "auto", dtype: str = "auto", out: Path | str | None = None, overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find the least budget of each layer of `run` that keeps `target` of full attention's mass, and write a model with these budgets.

    One pass of full attention over the text says what each layer's selection keeps at 1, 2, ... 8, 10, 12, 14, 16, 20, ... blocks; the least that
    reaches the target becomes the layer's budget, "full" where only everything does. A mean is over heads and the queries beyond the model's own
    uniform budget; where the text has none, over all. Then the model runs with these budgets, and with a uniform budget of the same mean, and both are
    compared with full attention on the same text. Under torchrun the ranks share the rows; rank 0 alone writes, prints and returns something.

    Args:
        run: A run, a checkpoint, or a model directory.
        target: Kept mass, above 0 and at most 1.
        data, split, context, max_tokens, whole_documents, seed: The text, as for `ssa.analysis.analyze.analyze`.
        block_size: Keys of a block; the model's own by default.
        needle_lengths: Also look for needles in haystacks of so many tokens of the text.
        device, dtype: As for `ssa.infer.load.load_model`.
        out: The model directory to write, which shares the files of the weights with the source where the file system has hard links;
            beside the run, RUN-tuned, by default. The figures lie in it as tune_budget.json.
        overwrite: Replace `out` if it is a model directory.
        console: Where to print; standard output by default.

    Returns:
        What tune_budget.json holds.

    Raises:
        UserError: Anything a user can get wrong; nothing is left at `out`.
    """
    rank, device = Shard.from_environment().rank, local_device(device)
    console = Console(quiet=True) if rank else Console() if console is None else console
    if not 0 < target <= 1:
        raise UserError(f"target_kept_mass = {target} must lie in 0..1, 0 excluded: a share of full attention's mass")
    if needle_lengths:
        check_grid(needle_lengths, NEEDLE_DEPTHS, NEEDLE_CASES, seed)
    checkpoint, home = open_checkpoint(run), run_home(run).absolute()
    out = home.with_name(f"{home.name}-tuned") if out is None else Path(out)
    check_out(out, checkpoint, overwrite)
    check_directory(out.absolute().parent)
    source = run_data(run) if data is None else data
    model, tokenizer = load_model(checkpoint, device=device, dtype=dtype)
    context = min(run_context(run), model.config.max_position_embeddings) if context is None else context
    for length in (context, *needle_lengths):
        if length > model.config.max_position_embeddings:
            raise UserError(f"{length} tokens exceed the model's {model.config.max_position_embeddings} positions")
    max_tokens = max(MAX_TOKENS, context) if max_tokens is None else max_tokens
    rows = packed_rows(
        source, tokenizer, split=split, context=context, max_tokens=max_tokens, seed=seed, whole_documents=whole_documents
    )
    meet()
    config, layers = model.config, model.config.num_hidden_layers
    size = config.block_size if block_size is None else block_size
    beyond, notes = _beyond(config, rows)
    ladder = measure_ladder(model, rows, size, beyond, console)
    tuned = ladder.choose(target)
    uniform = uniform_budgets(config, ladder, tuned)
    sides = {"tuned": tuned, "uniform": uniform}
    compared = compare(model, rows, sides, beyond, console)
    if rank:
        return {}
    for name, readings in sides.items():
        blocks = ladder.blocks_of(readings)
        compared[name] = {"layer_budgets": [str(r) for r in readings], "mean_blocks": sum(blocks) / layers, **compared[name]}
    if needle_lengths:
        haystack = Haystack(document_texts(source, split, tokenizer), tokenizer, max(needle_lengths))
        needles: dict[str, Reading] = {"full": FULL, **sides}
        for name, reading in needles.items():
            cells = needle_grid(
                model, tokenizer, haystack, lengths=needle_lengths, depths=NEEDLE_DEPTHS, cases=NEEDLE_CASES, seed=seed,
                attention_mode="full" if reading is FULL else "sparse", budget=reading, batch_tokens=WINDOW_TOKENS,
            )  # fmt: skip
            compared[name]["needles_found"] = sum(cell.accuracy for cell in cells) / len(cells)
        if compared["full"]["needles_found"] < LEAST_FOUND:
            notes.append(
                f"Full attention finds {compared['full']['needles_found']:.0%} of the needles, less than half: what the others find says little."
            )
    notes += _notes(target, tuned, compared["tuned"]["kept_mass_by_layer"])
    if config.attention_mode == "full":
        notes.append(
            "The model read everything unless told otherwise; with these budgets it reads sparsely (--mode full goes back)."
        )
    figures = {
        "format": FORMAT, "run": home.name, "method": config.attention_name, "target_kept_mass": target, "block_size": size,
        "uniform_budget": str(config.uniform_budget), "beyond": beyond, "layer_budgets": [str(reading) for reading in tuned],
        "ladder": {
            "blocks": [*ladder.blocks, "full"], "all_blocks": ladder.all_blocks, "kept_mass": [[*kept, 1.0] for kept in ladder.kept],
        },
        "compared": compared, "notes": [*config.attends.full_notes, *notes],
        "selection": f"{config.selection_scope} / {config.selection_scoring} / {config.selection_rule}",
        "measured": rows.about, "device": device_name(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }  # fmt: skip
    write_tuned(checkpoint, out, tuned, figures)
    _print(console, figures, ladder, tuned)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return figures


def allowed_blocks(config: SSAConfig, block_size: int, all_blocks: int) -> list[int]:
    """Numbers of blocks below `all_blocks` that the model's selector can choose.

    Raises:
        UserError: A block size of which it can choose none at all.
    """
    with torch.device("meta"):
        _, selector = build_attention(config)
    allowed = []
    for k in range(1, all_blocks):
        with contextlib.suppress(UserError):
            selector.check(config.selection(Budget(k, block_size)))
            allowed.append(k)
    if not allowed:  # too short a text, or no size of theirs
        selector.check(config.selection(Budget(config.num_selected_blocks, block_size)))
    return allowed


def ladder_steps(allowed: Sequence[int]) -> list[int]:
    """Of the numbers of blocks that can be chosen, ascending, the least, and 1, 2, ... 8, 10, 12, 14, 16, 20, ... (four to a doubling)
    among the others."""
    steps = {1, 2, 3, *(quarters << e for quarters in (4, 5, 6, 7) for e in range(max(allowed, default=0).bit_length()))}
    return [k for i, k in enumerate(allowed) if i == 0 or k in steps]


@torch.no_grad()
def measure_ladder(model: SSAForCausalLM, rows: Rows, block_size: int, beyond: int, console: Console | None = None) -> Ladder:
    """What each layer of `model` keeps of full attention at each step, in one pass of full attention over the rows."""
    all_blocks = int(rows.position_ids.max()) // block_size + 1
    steps = ladder_steps(allowed_blocks(model.config, block_size, all_blocks))
    if not steps:  # a document is no longer than the least that is read
        return Ladder(block_size, [], all_blocks, [[] for _ in model.model.layers])
    kept = KeptMass(beyond, selection_of(model), steps)
    with progress_bar(console, "full attention", len(own_rows(len(rows.input_ids)))) as progress:
        for ids, positions in _batches(model, rows):
            model.model(
                input_ids=ids, position_ids=positions, use_cache=False, attention_mode="full", budget=Budget(steps[0], block_size),
                observer=kept,
            )  # fmt: skip
            if progress is not None:
                progress(len(ids))
    return Ladder(block_size, steps, all_blocks, _joined(kept).means())


def uniform_budgets(config: SSAConfig, ladder: Ladder, tuned: LayerBudgets) -> LayerBudgets:
    """As many blocks over all layers as `tuned` has, in numbers that differ by one at most, the larger ones spread among the others.

    Where the selector cannot choose one of them, all layers have the next larger number that it can: never fewer blocks than `tuned`.
    """
    layers, total = len(tuned), sum(ladder.blocks_of(tuned))
    shares = [total * (i + 1) // layers - total * i // layers for i in range(layers)]
    allowed = allowed_blocks(config, ladder.block_size, ladder.all_blocks)
    if not all(k in allowed or k == ladder.all_blocks for k in shares):
        shares = [min((k for k in allowed if k >= max(shares)), default=ladder.all_blocks)] * layers
    return LayerBudgets(tuple(FULL if k == ladder.all_blocks else Budget(k, ladder.block_size) for k in shares))


@torch.no_grad()
def compare(
    model: SSAForCausalLM, rows: Rows, sides: dict[str, LayerBudgets], beyond: int, console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Perplexity of full attention and of each side, and the sides' kept mass as they run and divergence from full attention."""
    kept = {name: KeptMass(beyond) for name in sides}
    divergence = {name: DivergenceSums() for name in sides}
    with progress_bar(console, "tuned and uniform", len(own_rows(len(rows.input_ids)))) as progress:
        for ids, positions in _batches(model, rows):
            given: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            full = model.model(**given, attention_mode="full", budget=FULL).last_hidden_state
            for name, readings in sides.items():
                sparse = model.model(**given, attention_mode="sparse", budget=readings, observer=kept[name]).last_hidden_state
                divergence[name].add(token_divergence(full, sparse, model.lm_head, ids, positions), positions, beyond)
            if progress is not None:
                progress(len(ids))
    found: dict[str, dict[str, Any]] = {}
    for name in sides:
        sums, *others = gather(divergence[name])
        for other in others:
            sums.join(other)
        by_layer = [mass for (mass,) in _joined(kept[name]).means()]
        means = sums.means(False)
        assert means is not None  # a row has two tokens at least
        found.setdefault("full", {"perplexity": _perplexity(means["cross_entropy_full"])})
        found[name] = {
            "perplexity": _perplexity(means["cross_entropy_sparse"]), "kept_mass": sum(by_layer) / len(by_layer),
            "kl_nats": means["kl_nats"], "top1_agreement": means["top1_agreement"], "kept_mass_by_layer": by_layer,
            "all_tokens": means, "beyond": sums.means(True),
        }  # fmt: skip
    return found


def write_tuned(checkpoint: Path, out: Path, budgets: LayerBudgets, figures: dict[str, Any]) -> None:
    """The model of `checkpoint` that reads `budgets` by itself, as the model directory `out`, with `figures` beside it.

    Raises:
        UserError: It cannot be written, or the figures are not finite; nothing is left at `out`.
    """
    source = open_source(checkpoint)
    values = {**source.config, "layer_budgets": [str(reading) for reading in budgets], "attention_mode": "sparse"}
    config = make_config(own_fields(values))
    with appearing(out) as scratch:
        link_weights(checkpoint, scratch)
        write_json(scratch / "config.json", values)
        source.carry(scratch)
        if is_foreign(checkpoint / CARD):
            shutil.copyfile(checkpoint / CARD, scratch / CARD)
        write_card(scratch, config)
        write_figures(scratch / FIGURES, figures)


def _beyond(config: SSAConfig, rows: Rows) -> tuple[int, list[str]]:
    """(document position from which on queries count, notes)."""
    own = config.uniform_budget
    queries = int((rows.position_ids >= own.tokens).sum())
    if not queries:
        return 0, [
            f"Kept mass is over all queries: no document reaches beyond {own}, the model's own budget. A longer context says more."
        ]
    return own.tokens, [
        f"Kept mass is over the {queries} queries at document positions from {own.tokens} on, beyond {own}, the model's own budget."
    ]


def _notes(target: float, tuned: LayerBudgets, as_it_runs: list[float]) -> list[str]:
    notes = []
    if full := [str(layer) for layer, reading in enumerate(tuned) if reading is FULL]:
        notes.append(f"Layers {', '.join(full)} keep {target:g} only where they read everything.")
    if less := [layer for layer, mass in enumerate(as_it_runs) if mass < target]:
        least = min(less, key=lambda layer: as_it_runs[layer])
        notes.append(
            f"As it runs, with the layers before them reading sparsely, {len(less)} of {len(tuned)} layers keep less than {target:g}, the least "
            f"{as_it_runs[least]:.4f} (layer {least})."
        )
    return notes


def _print(console: Console, figures: dict[str, Any], ladder: Ladder, tuned: LayerBudgets) -> None:
    compared = figures["compared"]
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("layer", "budget", "kept mass", "as it runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, (reading, mass) in enumerate(zip(tuned, compared["tuned"]["kept_mass_by_layer"], strict=True)):
        table.add_row(str(layer), str(reading), f"{ladder.kept_by(reading, layer):.4f}", f"{mass:.4f}")
    console.print(table)
    rows = [("blocks a layer", "mean_blocks", ".2f"), ("perplexity", "perplexity", ".3f"), ("kept mass", "kept_mass", ".4f"),
            ("KL from full (nats)", "kl_nats", ".5f"), ("same most likely token", "top1_agreement", ".4f"),
            ("needles found", "needles_found", ".0%")]  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in compared:
        table.add_column(name, justify="right", no_wrap=True)
    for heading, key, form in rows:
        cells = [format(side[key], form) if side.get(key) is not None else "" for side in compared.values()]
        if any(cells):
            table.add_row(heading, *cells)
    console.print(table)
    about = figures["measured"]
    console.print(
        f"{about['tokens']} tokens of {about['data']} in rows of {about['context']}; blocks of {figures['block_size']} keys.",
        highlight=False,
    )
    for note in figures["notes"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _perplexity(nats: float) -> float | None:
    """None where it is too large for a float."""
    return math.exp(nats) if nats < 700 else None


def _batches(model: SSAForCausalLM, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, position_ids) of this rank's rows, a few rows at a time."""
    own = own_rows(len(rows.input_ids))
    step = max(1, ROW_TOKENS // rows.input_ids.shape[1])
    for i in own[::step]:
        cut = slice(i, min(i + step, own.stop))
        yield rows.input_ids[cut].to(model.device), rows.position_ids[cut].to(model.device)


def _joined(kept: KeptMass) -> KeptMass:
    """With what other ranks have seen."""
    first, *others = gather((kept.sums, kept.queries))
    kept.sums, kept.queries = first
    for sums, queries in others:
        kept.add(sums, queries)
    return kept
