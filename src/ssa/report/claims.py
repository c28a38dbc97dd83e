"""What became of the paper's claims: files with judged claims, as `ssa demo` writes one."""

from __future__ import annotations

from collections.abc import Sequence

from ssa.report.collect import Benchmark
from ssa.report.page import Cell, Section, table

_KINDS = {"holds": "text yes", "does not hold here": "text", "cannot be judged at this size": "text no"}


def claims(benchmarks: Sequence[Benchmark]) -> Section:
    """A table of each file's `claims`, see `ssa.demo_claims.Claim`."""
    tables = []
    for benchmark in benchmarks:
        judged = benchmark.content.get("claims")
        if judged:
            rows = [
                (
                    str(c["claim"]),
                    [Cell(str(c["verdict"]), kind=_KINDS.get(c["verdict"], "text")), Cell(str(c["here"]), kind="text")],
                )
                for c in judged
            ]
            note = "Toy models, one seed of each. A difference that another seed could turn round decides nothing."
            tables.append(table(benchmark.name, note, ["the paper says", "in these runs", "judged from"], rows))
    intro = (
        "Three models are compared that differ in their training alone. full: attention to everything. moba: attention to a few selected blocks "
        "only (sparse attention). ssa: both, on the same weights, with their outputs drawn together. Each can afterwards be read full or sparse."
    )
    return Section("What the paper says, and what these runs show", intro, tables)
