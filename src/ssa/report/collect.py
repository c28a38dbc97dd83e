"""What lies under the directories that a report is about: runs with their metrics, evaluations and analyses, and benchmarks.

Files are known by what is in them, not by where they lie alone. What cannot be read, and JSON of no known kind, is kept for the page to
say so.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ssa.analysis.results import LARGEST, RunResults, perplexities, perplexity_setting, printable, read_metrics
from ssa.checked_json import parse_json, read_bytes, typed
from ssa.errors import UserError, one_line
from ssa.methods import full_name
from ssa.runs.checkpoints import numbered_checkpoints, read_complete, verify_checkpoint
from ssa.runs.home import run_home

DEPTH = 5
"""Directories are searched so deep."""
SKIPPED = frozenset({"checkpoints", "latest", "data", "tensorboard", "items", "profile", "__pycache__"})
"""Directories that hold no results."""
_OTHER_PURPOSE = re.compile(
    r"(config|generation_config|tune_budget|tokenizer(_config)?|special_tokens_map|trainer|checkpoint|index|vocab|added_tokens|environment)\.json"
    r"|.*\.safetensors\.index\.json"
)
"""JSON that belongs to models and runs and is no result."""
_SIZE_LIMIT = 256 << 20
_PARTS = ("recipe", "metrics", "analysis")


class _RecipeModel(TypedDict):
    method: str


class _RecipeTrain(TypedDict, total=False):
    seed: int


class _Recipe(TypedDict):
    model: _RecipeModel
    train: _RecipeTrain


class _Analysis(TypedDict):
    run: str
    method: str
    budget: str
    inference: dict[str, dict[str, Any]]
    predictions: dict[str, dict[str, Any]]


@dataclass
class RunEvidence:
    """Everything found about one run; what is missing is None or empty."""

    path: Path
    name: str = ""
    recipe: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """File name without suffix -> its entries, the latest last; see `ssa.eval.results`. Perplexities of several texts that a record of
    the run holds are "perplexity, TEXT"."""
    analysis: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Where each part, "recipe", "metrics", "analysis" or a name of `evaluations`, came from."""

    def put(self, part: str, content: Any, file: str) -> None:
        """What `file` says is this part of the run."""
        if part in _PARTS:
            setattr(self, part, content)
        else:
            self.evaluations[part] = content
        self.files[part] = file

    def parts(self) -> dict[str, Any]:
        """What `put` was given and is not empty."""
        found = {name: getattr(self, name) for name in _PARTS} | self.evaluations
        return {name: content for name, content in found.items() if content}

    @property
    def perplexities(self) -> list[str]:
        """The names of `evaluations` that hold perplexities."""
        return [name for name in self.evaluations if name == "perplexity" or name.startswith("perplexity, ")]

    @property
    def method(self) -> str:
        if self.analysis is not None:
            return str(self.analysis["method"])
        if self.recipe is not None:
            return full_name(str(self.recipe["model"]["method"]), str(self.recipe["model"].get("selector", "means")))
        for entries in self.evaluations.values():
            for entry in entries:
                if isinstance(found := entry.get("model", {}).get("method"), str):
                    return found
        return "unknown"

    @property
    def results(self) -> RunResults | None:
        """The analysis as `ssa.analysis` reads it, with the latest perplexities."""
        if self.analysis is None:
            return None
        found = RunResults(self.name, self.analysis)
        for entry in self.evaluations.get("perplexity", [])[-1:]:
            found = dataclasses.replace(found, perplexity=perplexities(entry), perplexity_setting=perplexity_setting(entry))
        return found

    @property
    def seed_group(self) -> str:
        """The same for runs that differ in their seed alone."""
        if self.recipe is None:
            return f"path {self.path}"
        train = {k: v for k, v in self.recipe["train"].items() if k != "seed"}
        return json.dumps(self.recipe | {"train": train}, sort_keys=True)


@dataclass(frozen=True)
class Benchmark:
    """A file of measurements that belongs to no run."""

    name: str
    content: dict[str, Any]


@dataclass
class Evidence:
    """What a report is made of."""

    searched: list[str]
    runs: list[RunEvidence] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(file, why it is not shown)."""


def collect(paths: Sequence[Path | str]) -> Evidence:
    """Search files and directories.

    The checkpoints of a run that is named itself are compared with their hashes.

    Raises:
        UserError: a path that does not exist, or nothing at all to report.
    """
    evidence = Evidence([str(path) for path in paths])
    runs: dict[Path, RunEvidence] = {}
    seen: set[Path] = set()
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given} does not exist: name runs, directories or result files")
        top = run_home(given)
        for file in [top] if top.is_file() else _files(top):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                _read(file, _shown(file, given), runs, evidence)
    evidence.runs = [run for run in runs.values() if run.parts()]
    named = {run_home(path).resolve() for path in paths}
    for run in evidence.runs:
        _look_at_checkpoints(run, run.path in named, evidence)
    _name(evidence.runs)
    check_something(evidence)
    return evidence


def check_something(evidence: Evidence) -> None:
    """Raise `UserError` where there is nothing to show."""
    if not evidence.runs and not evidence.benchmarks:
        looked = "metrics.jsonl, eval/*.json, analysis/analysis.json and JSON of measurements"
        unusable = "".join(f"; {file}: {why}" for file, why in evidence.problems[:3])
        raise UserError(f"nothing to report under {', '.join(evidence.searched)}: looked for {looked}{unusable}")


def collect_analyses(analyses: Sequence[tuple[Path, str, dict[str, Any]]]) -> Evidence:
    """What lies in the run directories of (directory, name, analysis), with these analyses instead of any that are there."""
    evidence = Evidence([str(home) for home, _, _ in analyses])
    for home, name, analysis in analyses:
        found: dict[Path, RunEvidence] = {home.resolve(): RunEvidence(home.resolve())}
        for file in _files(home):
            _read(file, _shown(file, home), found, evidence)
        run = found[home.resolve()]
        run.name = printable(name)
        run.put("analysis", analysis, f"{home.name}/analysis")
        evidence.runs.append(run)
    evidence.problems = list(dict.fromkeys(evidence.problems))
    return evidence


def _files(directory: Path, depth: int = 0) -> Iterator[Path]:
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if depth < DEPTH and entry.name not in SKIPPED:
                yield from _files(entry, depth + 1)
        elif entry.suffix in (".json", ".jsonl") and not _OTHER_PURPOSE.fullmatch(entry.name):
            yield entry


def _shown(file: Path, given: Path) -> str:
    """A file's name in the page: from the directory that was named on."""
    if file == given:
        return given.name
    try:
        return str(Path(given.resolve().name) / file.resolve().relative_to(given.resolve()))
    except ValueError:
        return file.name


def _read(file: Path, shown: str, runs: dict[Path, RunEvidence], evidence: Evidence) -> None:
    def run(home: Path) -> RunEvidence:
        return runs.setdefault(home.resolve(), RunEvidence(home.resolve()))

    try:
        if file.stat().st_size > _SIZE_LIMIT:
            raise ValueError(f"larger than {_SIZE_LIMIT >> 20} MiB")
        if file.name == "metrics.jsonl":
            faults: list[str] = []
            run(file.parent).put("metrics", read_metrics(file, faults), shown)
            evidence.problems += [(shown, f"{faults[0]}; {len(faults)} lines are left out")] if faults else []
            return
        if file.suffix == ".jsonl":
            lines = [line for line in read_bytes(file).split(b"\n") if line.strip()]
            rows = [parse_json(line, f"line {i}", largest=LARGEST) for i, line in enumerate(lines, start=1)]
            content: Any = {**rows[0], "rows": rows[1:]} if rows and "rows" not in rows[0] else None
        else:
            content = parse_json(read_bytes(file), "it", Any, largest=LARGEST)
        kind = _kind(file, content)
        if kind == "recipe":
            run(file.parent).put("recipe", typed(content, _Recipe), shown)
        elif kind == "analysis":
            run(_home(file, "analysis")).put("analysis", typed(content, _Analysis), shown)
        elif kind == "comparison":
            for analysis in content["runs"]:
                _add_compared(file, shown, typed(analysis, _Analysis), runs)
        elif kind == "evaluation":
            run(_home(file, "eval")).put(file.stem, _entries(content), shown)
        elif kind == "record of a run":
            _add_record(content, shown, run(file.with_suffix("")))
        elif kind == "benchmark":
            _check_claims(content.get("claims", []))
            evidence.benchmarks.append(Benchmark(shown, content))
        else:
            evidence.problems.append((shown, "no kind of result that this page knows"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        evidence.problems.append((shown, why_not(error)))


def why_not(error: Exception) -> str:
    """Why a file is not shown."""
    text = one_line(error)[:200] + (" is missing" if isinstance(error, KeyError) else "")
    return text.removeprefix("it ") if "cannot be read" in text else f"cannot be read: {text}"


def _look_at_checkpoints(run: RunEvidence, hashes: bool, evidence: Evidence) -> None:
    """Damaged checkpoints of the run are problems, too; their content is compared with their hashes only if that is asked for."""
    for path in numbered_checkpoints(run.path):
        try:
            if hashes:
                verify_checkpoint(path)
            else:
                read_complete(path)
        except UserError as error:
            evidence.problems.append((f"{run.path.name}/checkpoints/{path.name}", str(error)))


def _kind(file: Path, content: Any) -> str:
    if not isinstance(content, dict):
        return "unknown"
    if file.name == "recipe.json" and {"model", "train"} <= content.keys():
        return "recipe"
    if "inference" in content and "predictions" in content:
        return "analysis"
    if "format" in content and isinstance(content.get("runs"), list):
        return "comparison"
    if {"format", "latest", "results"} <= content.keys():
        return "evaluation"
    if {"recipe", "curve", "figures"} <= content.keys():
        return "record of a run"
    if isinstance(rows := content.get("rows", []), list) and all(isinstance(row, dict) for row in rows):
        return "benchmark" if rows or isinstance(content.get("command"), str) else "unknown"
    return "unknown"


def _home(file: Path, directory: str) -> Path:
    """The run that RUN/`directory`/file belongs to; a file elsewhere is its directory's."""
    return file.parent.parent if file.parent.name == directory else file.parent


def _add_record(content: dict[str, Any], shown: str, run: RunEvidence) -> None:
    """A run's recipe, curve, evaluations of several texts ({name: what `ssa.eval.evaluate` returns}) and analysis in one file."""
    analysis = content["figures"].get("analysis")
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for name, found in content["figures"].items():
        if name == "analysis":
            continue
        if found["perplexity"]:
            evaluations[f"perplexity, {name}"] = [found["perplexity"]]
        if found["needle"]:
            evaluations["needle"] = [found["needle"]]
        evaluations.setdefault("tasks", []).extend(found["tasks"].values())
    parts = {name: checked for name, entries in evaluations.items() if (checked := _checked(entries))}
    recipe, metrics = typed(content["recipe"], _Recipe), [line for line in content["curve"] if isinstance(line["step"], int)]
    analysed = {} if analysis is None else {"analysis": typed(analysis, _Analysis)}
    for name, part in {**parts, "recipe": recipe, "metrics": metrics, **analysed}.items():
        run.put(name, part, shown)


def _add_compared(file: Path, shown: str, analysis: dict[str, Any], runs: dict[Path, RunEvidence]) -> None:
    """An analysis of a comparison, unless the run's own is known. The run is the directory of that name beside the comparison."""
    beside = (_home(file, "analysis") / str(analysis["run"])).resolve()
    if beside in runs:
        if runs[beside].analysis is None:
            runs[beside].put("analysis", analysis, shown)
    elif not (beside / "analysis" / "analysis.json").is_file():
        runs.setdefault(beside, RunEvidence(beside)).put("analysis", analysis, shown)


def _check_claims(claims: Any) -> None:
    for claim in claims:
        claim["claim"], claim["verdict"], claim["here"]


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    entries = {key: entry for key, entry in content["results"].items() if entry["budgets"]}
    latest = content["latest"]
    return _checked([entry for key, entry in entries.items() if key != latest] + ([entries[latest]] if latest in entries else []))


def _checked(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        if not all(isinstance(figures, dict) for figures in entry["budgets"].values()) or not isinstance(entry["setting"], dict):
            raise ValueError("its entries are not evaluations")
    return entries


def _name(runs: Sequence[RunEvidence]) -> None:
    """The last part of every path, with as much before it as it takes to tell runs apart."""
    for run in runs:
        parts = run.path.parts
        for depth in range(1, len(parts) + 1):
            if sum(other.path.parts[-depth:] == parts[-depth:] for other in runs) == 1:
                break
        run.name = printable("/".join(parts[-depth:]))
