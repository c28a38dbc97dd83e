"""Files of measurements of any make: lists and groups of records as tables, series of numbers as curves, single figures as notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssa.report.charts import line_figure
from ssa.report.collect import Benchmark
from ssa.report.page import Section, table
from ssa.report.svg import Series, number, tokens

COLUMNS = 16
"""A table shows so many columns at most,"""
TURNED_ROWS = 6
"""except that as few rows become columns."""
DENSE_COLOURS = ("var(--full)", "var(--nsa)", "var(--moba)", "var(--infllmv2)", "var(--nosa)", "var(--other)")
_COLOURS = ("var(--ssa)", *DENSE_COLOURS)
_NOTES = ("what", "about")
_CIRCUMSTANCES = frozenset(
    {"command", "hardware", "device", "processor", "cores", "dtype", "versions", "git", "environment", "recipe", "seed", "started", "finished",
     "format", "suite", "unit", "peers", "ranks", "data", "seconds"}
)  # fmt: skip
"""What is no result."""
Record = dict[str, Any]


def measurements(benchmarks: Sequence[Benchmark]) -> Section:
    """A section with everything that such files hold."""
    tables: list[str] = []
    pictures: list[str] = []
    for benchmark in benchmarks:
        rows = benchmark.content.get("rows")
        found = [records_table(benchmark.name, about(benchmark), rows)] if rows else []
        pictures += times_chart(benchmark.name, rows) if rows else []
        found += other_tables(benchmark, about(benchmark) if not found else "")
        curves = _curves(benchmark)
        if not found and not curves:
            found = [records_table(benchmark.name, about(benchmark), [{"": "", **_facts(benchmark.content)}])]
        tables += found
        pictures += curves
    intro = "What other benchmarks and comparisons found, each on the hardware that its first table names."
    return Section("Other measurements", intro, tables, pictures)


def about(benchmark: Benchmark) -> str:
    """Where and with what it was measured, what it says about itself, and its single figures."""
    content = benchmark.content
    hardware = content.get("hardware", content.get("device", content.get("processor", "unknown hardware")))
    if isinstance(hardware, dict):
        hardware = hardware.get("device", "unknown hardware")
    versions: dict[str, Any] = content["versions"] if isinstance(content.get("versions"), dict) else content
    known = [f"{name} {versions[name]}" for name in ("torch", "triton") if isinstance(versions.get(name), str)]
    parts = [*(str(content[name]).rstrip(".") for name in _NOTES if isinstance(content.get(name), str))]
    parts += ["; ".join(f"{name}: {_word(name, x)}" for name, x in _facts(content).items())]
    parts += [", ".join([str(hardware), *known])]
    parts += [f"Command: {content['command']}"] if isinstance(content.get("command"), str) else []
    return " ".join(f"{part}." for part in parts if part)


def other_tables(benchmark: Benchmark, note: str = "") -> list[str]:
    """Tables of the lists and groups of records beside the rows and bars that the file is about."""
    tables: list[str] = []
    for key, value in benchmark.content.items():
        if key not in _CIRCUMSTANCES | {"rows", "bars", "claims"} and (records := _records(value)):
            tables.append(records_table(f"{benchmark.name}: {key.replace('_', ' ')}", "" if tables else note, records))
    return tables


def records_table(name: str, note: str, records: Sequence[Record]) -> str:
    """The numbers and words of every record, those inside of objects under their joined names."""
    all_flat = [_flat(record) for record in records]
    names = list(dict.fromkeys(key for record in all_flat for key in record))
    short = dict(zip(names, _without_prefix(names), strict=True))
    if len(names) > 8 and len(all_flat) <= TURNED_ROWS:
        first, *rest = names
        turned = [(short[name], [_word(name, record.get(name)) for record in all_flat]) for name in rest]
        return table(name, note, [short[first], *(_word(first, record.get(first)) for record in all_flat)], turned)
    shown = names[:COLUMNS]
    left_out = f" {len(names) - COLUMNS} more columns are in the file." if len(names) > COLUMNS else ""
    rows = [(_word(shown[0], record.get(shown[0])), [_word(name, record.get(name)) for name in shown[1:]]) for record in all_flat]
    return table(name, f"{note}{left_out}", [short[name] for name in shown], rows)


def times_chart(name: str, records: Sequence[Record]) -> list[str]:
    """Times by length, where every length has one record."""
    all_flat = sorted(
        (record for record in map(_flat, records) if isinstance(record.get("tokens"), int)), key=lambda record: record["tokens"]
    )
    lengths = [record["tokens"] for record in all_flat]
    if len(all_flat) < 2 or len(set(lengths)) < len(lengths):
        return []
    for unit in ("seconds", "ms"):
        names = [n for n in dict.fromkeys(key for record in all_flat for key in record) if n.endswith(unit)]
        series: list[Series] = []
        for key in names[: len(_COLOURS)]:
            points = [(r["tokens"], r[key]) for r in all_flat if isinstance(r.get(key), int | float) and r[key] > 0]
            if points:
                label = _without_prefix(names)[names.index(key)].removesuffix(unit).strip(" _") or key
                series.append(Series(label, _COLOURS[len(series)], [p[0] for p in points], [p[1] for p in points]))
        more = f" {len(names) - len(series)} more are in the table." if len(names) > len(series) else ""
        picture = line_figure(
            series, f"{name}: {unit} by length", f"Both axes logarithmic.{more}", xlabel="tokens", ylabel=unit, log_x=True, log_y=True,
            x_ticks=lengths, x_format=tokens,
        )  # fmt: skip
        if picture:
            return [picture]
    return []


def _curves(benchmark: Benchmark) -> list[str]:
    """The file's lists of numbers in one picture."""
    found = {
        key: value
        for key, value in benchmark.content.items()
        if isinstance(value, list) and len(value) > 1 and all(isinstance(x, int | float) for x in value)
    }
    series = [
        Series(key.replace("_", " "), colour, list(range(1, len(values) + 1)), values, dashed=i > 0)
        for i, ((key, values), colour) in enumerate(zip(found.items(), _COLOURS, strict=False))
    ]
    caption = f"{about(benchmark)} Where lines coincide only one shows."
    picture = line_figure(series, benchmark.name, caption, xlabel="number", ylabel="value")
    return [picture] if picture else []


def _records(value: Any) -> list[Record]:
    """Of a list of records, or of records by name."""
    if isinstance(value, list):
        return value if value and all(isinstance(x, dict) for x in value) else []
    if isinstance(value, dict) and value and all(isinstance(x, dict) for x in value.values()):
        return [{"": name, **record} for name, record in value.items()]
    return []


def _facts(content: Record) -> Record:
    """Single figures, those of a group of them under their joined names."""
    beside = {k: x for k, x in content.items() if k not in _CIRCUMSTANCES and k not in _NOTES and not _records(x)}
    return {name.replace("_", " "): x for name, x in _flat(beside).items()}


def _without_prefix(names: Sequence[str]) -> list[str]:
    """Joined names as words, without a first one that most of them share."""
    first = [name.split(" ")[0] for name in names if " " in name]
    common = max(sorted(set(first)), key=first.count, default="")
    if first.count(common) * 2 <= len(names):
        common = ""
    return [name.removeprefix(f"{common} ").replace("_", " ") for name in names]


def _flat(record: Record, depth: int = 3) -> Record:
    found: Record = {}
    for key, x in record.items():
        if isinstance(x, dict) and depth:
            found |= {f"{key} {inner}": y for inner, y in _flat(x, depth - 1).items()}
        elif isinstance(x, int | float | str) and not (isinstance(x, str) and len(x) > 40):
            found[str(key)] = x
    return found


def _word(name: str, x: Any) -> str:
    if x is None:
        return "–"
    if name == "tokens" and isinstance(x, int):
        return tokens(x)
    return str(x) if isinstance(x, str | bool) else number(x)
