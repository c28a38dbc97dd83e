"""Evaluation results as rich tables, and Markdown."""

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
    table = _table()
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
    table = _table()
    table.add_column("tokens", justify="right", no_wrap=True)
    for depth in setting["depths"]:
        table.add_column(f"depth {depth:.0%}", justify="right")
    accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in figures["grid"]}
    for length in setting["lengths"]:
        table.add_row(str(length), *(f"{accuracy[length, depth]:.0%}" for depth in setting["depths"]))
    _print(console, f"{_who(entry)}, attention {name}: {figures['accuracy']:.0%} of the needles found", table)
    _note(
        console,
        f"{setting['cases']} case{'' if setting['cases'] == 1 else 's'} a cell; mean log-probability of the value {figures['log_probability']:.2f}",
    )


def print_task(console: Console, entry: dict[str, Any], names: Sequence[str]) -> None:
    """One row per budget of `names`, from an entry of tasks.json; accuracies in per cent."""
    setting = entry["setting"]
    shown = [name for name in names if name in entry["budgets"]]
    table = _table()
    table.add_column("attention", no_wrap=True)
    metrics = list(entry["budgets"][shown[0]]["metrics"]) if shown else []
    for heading in metrics:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in shown:
        table.add_row(name, *(figure(metric, entry["budgets"][name]["metrics"][metric]) for metric in metrics))
    examples = f", {setting['num_fewshot']}-shot" if "num_fewshot" in setting else ""
    _print(console, f"{_who(entry)}: {setting['task']}{examples}", table)
    _note(console, f"{entry['items']:,} items" + (" (limited)" if setting["limit"] is not None else ""))
    for name in names:
        if name not in shown:
            _note(console, f"{name}: this rank is done, others are not")
    for note in entry["notes"]:
        _note(console, note)


def figure(metric: str, value: dict[str, Any]) -> str:
    """ "74.53 ± 0.21": mean and standard deviation over seeds, accuracies in per cent; the deviation is left out where it is 0 or unknown."""
    scale = 100 if metric.startswith(("acc", "exact_match")) else 1
    spread = f" ± {scale * value['std']:.2f}" if value["std"] else ""
    return f"{scale * value['mean']:.2f}{spread}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns are text, the others are numbers."""
    lines = [list(headings), ["---"] * words + ["---:"] * (len(headings) - words), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _table() -> Table:
    """Without room to spare: seven columns have to fit into a terminal's usual 80."""
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _print(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(Text(title, style="bold"), soft_wrap=True)
    # as wide as it is: where that is too much a terminal breaks lines, while rich would cut digits off
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, crop=False)


def _note(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"), soft_wrap=True)


def _who(entry: dict[str, Any]) -> str:
    model = entry["model"]
    return model["method"] + (f" at step {model['step']}" if model["step"] is not None else "")


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.3g}"
