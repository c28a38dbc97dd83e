"""Evaluation results as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console


def print_perplexity(console: Console, entry: dict[str, Any], names: Sequence[str]) -> None:
    """One row per budget of `names`, from an entry of perplexity.json."""
    setting = entry["setting"]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("attention", no_wrap=True)
    for heading in ("nats/token", "gap to full", "ppl", "word ppl", "bits/byte", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        row = entry["budgets"][name]
        gap = "" if row["gap_to_full"] is None or name == "full" else f"{row['gap_to_full']:+.4f}"
        table.add_row(
            name, f"{row['nats_per_token']:.4f}", gap, _number(row["perplexity"]), _number(row["word_perplexity"]),
            _number(row["bits_per_byte"], 4), f"{row['tokens_per_second']:,.0f}",
        )  # fmt: skip
    where = setting["data"] + (f" ({setting['split']})" if setting["split"] else "")
    _print(console, f"{_who(entry)}: perplexity on {where}", table)
    _note(
        console,
        f"{entry['tokens']:,} tokens of {entry['documents']:,} documents, context {setting['context']}, stride {setting['stride']}",
    )
    for note in entry["notes"]:
        _note(console, note)


def print_needles(console: Console, entry: dict[str, Any], name: str) -> None:
    """Lengths by depths for one budget, from an entry of needle.json; each cell the share found."""
    setting, figures = entry["setting"], entry["budgets"][name]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tokens", justify="right", no_wrap=True)
    for depth in setting["depths"]:
        table.add_column(f"depth {depth:.0%}", justify="right")
    accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in figures["grid"]}
    for length in setting["lengths"]:
        table.add_row(str(length), *(f"{accuracy[length, depth]:.0%}" for depth in setting["depths"]))
    _print(console, f"{_who(entry)}, attention {name}: {figures['accuracy']:.0%} of the needles found", table)
    _note(console, f"{setting['cases']} cases a cell; mean log-probability of the value {figures['log_probability']:.2f}")


def _print(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _note(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"), soft_wrap=True)


def _who(entry: dict[str, Any]) -> str:
    model = entry["model"]
    return model["method"] + (f" at step {model['step']}" if model["step"] is not None else "")


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.3g}"
