"""Which module of `ssa` imports which: no circle, nothing upwards, and imports stand at the top of the file."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ssa

SOURCES = Path(ssa.__file__).parent

FLOORS = (
    ("ssa.errors",),
    ("ssa.arguments", "ssa.checked_json", "ssa.files", "ssa.ranks", "ssa.terminal"),
    ("ssa.budget", "ssa.collectives", "ssa.device"),
    ("ssa.methods",),
    ("ssa.config",),
    ("ssa.data",),
    ("ssa.runs",),
    ("ssa.ops",),
    ("ssa.attention",),
    ("ssa.model",),
    ("ssa.analysis.attention_stats", "ssa.analysis.selection", "ssa.analysis.sparsity", "ssa.analysis.dense_pass"),
    ("ssa.train",),
    ("ssa.infer",),
    ("ssa.eval",),
    ("ssa.analysis",),
    ("ssa.report",),
    ("ssa.testing",),
    ("ssa.bench",),
    ("ssa.demo", "ssa.demo_claims", "ssa.doctor", "ssa.examine_run"),
    ("ssa.cli",),
    ("ssa.__main__",),
)
"""From the ground up. A module belongs to the floor that names it, or the nearest package around it; it imports from its own floor and those
below. `ssa` itself, the version, is below all of them."""

LATE = 60
"""So many imports may stand inside functions: of verbs, which `ssa --help` does without, and of optional packages."""


class Import(NamedTuple):
    importer: str
    line: int
    imported: str
    late: bool
    """Whether it stands inside a function."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCES.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES.rglob("*.py")}


def imports_of(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Every import of a module: at the top, for types alone, or inside functions."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, child.lineno, alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level and child.module, f"{module}:{child.lineno} is a relative import"
                full = [f"{child.module}.{alias.name}" for alias in child.names]
                for name in dict.fromkeys(name if name in known else child.module for name in full):
                    yield Import(module, child.lineno, name, late)
            yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(source), False)


def floor(module: str) -> int:
    if module == "ssa":
        return -1
    found = {name: number for number, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")}
    assert found, f"{module} has no floor: put it into FLOORS"
    return found[max(found, key=len)]


def circles(imports: list[Import]) -> list[list[str]]:
    """Sets of modules each of which, by way of others, imports itself."""
    reached: dict[str, set[str]] = defaultdict(set)
    for one in imports:
        if one.imported != one.importer:
            reached[one.importer].add(one.imported)
    growing = True
    while growing:
        growing = False
        for others in reached.values():
            more = set().union(*(reached.get(other, set()) for other in others)) - others
            others |= more
            growing |= bool(more)
    return sorted(
        {tuple(sorted(m for m in others if module in reached[m])) for module, others in reached.items() if module in others}
    )


def upward(imports: list[Import]) -> list[str]:
    return [str(one) for one in imports if floor(one.imported) > floor(one.importer)]


ALL = [one for module, path in MODULES.items() for one in imports_of(module, path.read_text(encoding="utf-8"), set(MODULES))]
OURS = [one for one in ALL if one.imported in MODULES]


def test_no_circle_of_imports():
    assert circles(OURS) == []


def test_no_import_from_a_higher_floor():
    assert upward(OURS) == []


def test_imports_stand_at_the_top():
    late = {(one.importer, one.line) for one in ALL if one.late}
    assert len(late) <= LATE, f"{len(late)} imports inside functions: {sorted(late)}"


def test_what_these_tests_see():
    """Imports inside functions and for types count, as do those over a third module."""
    known = {"ssa.ops", "ssa.model", "ssa.eval", "ssa.eval.x"}
    source = (
        "if TYPE_CHECKING:\n    from ssa.eval import x\n\ndef f():\n    import ssa.model, sys\n    return lambda: __import__\n"
    )
    found = list(imports_of("ssa.ops", source, known))
    assert found == [
        Import("ssa.ops", 2, "ssa.eval.x", False),
        Import("ssa.ops", 5, "ssa.model", True),
        Import("ssa.ops", 5, "sys", True),
    ]
    assert upward(found[:2]) == ["ssa.ops:2 imports ssa.eval.x", "ssa.ops:5 imports ssa.model"]
    back = Import("ssa.model", 1, "ssa.eval.x", False), Import("ssa.eval.x", 1, "ssa.ops", False)
    assert circles([*found[:2], *back]) == [("ssa.eval.x", "ssa.model", "ssa.ops")] and circles(list(back)) == []


WITHOUT_TORCH = (
    "ssa.cli",
    "ssa.data.prepare",
    "ssa.report.report",
    "ssa.bench.plot",
    "ssa.examine_run",
    "ssa.doctor",
    "ssa.runs.home",
)


def test_what_does_without_torch():
    """`ssa --help`, prepare and its worker processes, report, bench plot, and doctor until it looks at torch."""
    code = f"import importlib, sys; [importlib.import_module(m) for m in {WITHOUT_TORCH}]; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr
