"""The embedded corpus: real prose that every Python installation carries, so that a first run needs no network.

Two sources, both read statically (`ast`, nothing is imported or executed): the reference topics behind Python's ``help()``, and the
docstrings and longer comments of the standard library, one document per source file. What comes out depends on the Python version and on how it was packaged;
the index of a prepared corpus records that version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ssa.errors import UserError

_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__", "ensurepip"}
)
_NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_SHORTEST_DOCUMENT = 256  # characters; below it a file has a heading and a line
_TOPICS = Path("pydoc_data", "topics.py")


def python_corpus(stdlib: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(id, text)`` for every document, sorted by id, without duplicated texts.

    ``stdlib`` is the directory of the standard library's sources (default: the running interpreter's). Raises `UserError` where the
    sources are missing or carry no docstrings (a stripped or zipped installation). ``python -OO`` does not matter: sources are read,
    not objects.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    documents = {f"topic/{name}": text for name, text in _topics(root / _TOPICS)}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if relative == _TOPICS or not _SKIPPED_DIRECTORIES.isdisjoint(relative.parts):
            continue
        text = _module_document(path, _module_name(relative))
        if len(text) >= _SHORTEST_DOCUMENT:
            documents[f"module/{relative.as_posix()}"] = text
    if not documents:
        raise UserError(
            f"builtin:python: no docstrings in the sources under {root} (a stripped Python); prepare text files instead"
        )
    seen: set[bytes] = set()
    for name in sorted(documents):
        digest = hashlib.blake2b(documents[name].encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield name, documents[name]


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a source file; None for what this interpreter cannot read (bad encodings kept as test data, for one)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(path)
    for node in tree.body if tree else ():
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            for name, text in ast.literal_eval(value).items():
                yield name, text.strip() + "\n"


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _module_document(path: Path, module: str) -> str:
    """A file's docstrings, each under its qualified name and signature as ``help()`` shows them, and its comments, in source order."""
    tree = _parse(path)
    if tree is None:
        return ""
    sections = sorted([*_docstrings(tree, module), *_comments(path)])
    return "\n\n".join(text for _, text in sections)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of every docstring at or below a node."""
    if isinstance(node, ast.Module | _NAMED):
        docstring = ast.get_docstring(node)
        if docstring:
            yield getattr(node, "lineno", 0), f"{_heading(node, name)}\n\n{docstring}\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _NAMED):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):  # definitions hide under `if` and `try`, never in expressions
            yield from _docstrings(child, name)


def _comments(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of every run of comment lines that reads as prose: three lines or more, three quarters letters and spaces."""
    run: list[str] = []
    for number, line in enumerate([*path.read_text("utf-8", "replace").splitlines(), ""], start=1):
        stripped = line.lstrip()
        if stripped.startswith("#"):
            run.append(stripped.lstrip("#").removeprefix(" ").rstrip())
            continue
        text = "\n".join(run).strip()
        if len(run) >= 3 and sum(c.isalpha() or c.isspace() for c in text) > 0.75 * len(text):
            yield number - len(run), text + "\n"
        run.clear()


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"{name}({ast.unparse(node.args)})"
