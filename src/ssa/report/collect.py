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
from typing import Any

from ssa.analysis.results import RunResults, perplexities, perplexity_setting, printable, read_metrics
from ssa.errors import UserError
from ssa.eval.run_directory import run_home

DEPTH = 5
"""Directories are searched so deep."""
SKIPPED = frozenset({"checkpoints", "data", "tensorboard", "items", "profile", "__pycache__"})
"""Directories that hold no results."""
_OTHER_PURPOSE = re.compile(
    r"(config|generation_config|tokenizer(_config)?|special_tokens_map|trainer|checkpoint|index|vocab|added_tokens|environment)\.json"
    r"|.*\.safetensors\.index\.json"
)
"""JSON that belongs to models and runs and is no result."""
_SIZE_LIMIT = 256 << 20


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

    @property
    def perplexities(self) -> list[str]:
        """The names of `evaluations` that hold perplexities."""
        return [name for name in self.evaluations if name == "perplexity" or name.startswith("perplexity, ")]

    @property
    def method(self) -> str:
        if self.analysis is not None:
            return str(self.analysis["method"])
        if self.recipe is not None:
            return str(self.recipe["model"]["method"])
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
    evidence.runs = [run for run in runs.values() if run.metrics or run.evaluations or run.analysis or run.recipe]
    if not evidence.runs and not evidence.benchmarks:
        looked = "metrics.jsonl, eval/*.json, analysis/analysis.json and JSON of measurements"
        unusable = "".join(f"; {file}: {why}" for file, why in evidence.problems[:3])
        raise UserError(f"nothing to report under {', '.join(evidence.searched)}: looked for {looked}{unusable}")
    _name(evidence.runs)
    return evidence


def collect_analyses(analyses: Sequence[tuple[Path, str, dict[str, Any]]]) -> Evidence:
    """What lies in the run directories of (directory, name, analysis), with these analyses instead of any that are there."""
    evidence = Evidence([str(home) for home, _, _ in analyses])
    for home, name, analysis in analyses:
        found: dict[Path, RunEvidence] = {home.resolve(): RunEvidence(home.resolve())}
        for file in _files(home):
            _read(file, _shown(file, home), found, evidence)
        run = found[home.resolve()]
        run.name, run.analysis = printable(name), analysis
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
            run(file.parent).metrics = read_metrics(file)
            return
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            content: Any = {**rows[0], "rows": rows[1:]} if rows and "rows" not in rows[0] else None
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
        kind = _kind(file, content)
        if kind == "recipe":
            run(file.parent).recipe = content
        elif kind == "analysis":
            _check_analysis(content)
            run(_home(file, "analysis")).analysis = content
        elif kind == "comparison":
            for analysis in content["runs"]:
                _check_analysis(analysis)
                _add_compared(file, analysis, runs)
        elif kind == "evaluation":
            run(_home(file, "eval")).evaluations[file.stem] = _entries(content)
        elif kind == "record of a run":
            _add_record(content, run(file.with_suffix("")))
        elif kind == "benchmark":
            _check_claims(content.get("claims", []))
            evidence.benchmarks.append(Benchmark(shown, content))
        else:
            evidence.problems.append((shown, "no kind of result that this page knows"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        evidence.problems.append((shown, f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"))


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


def _add_record(content: dict[str, Any], run: RunEvidence) -> None:
    """A run's recipe, curve, evaluations of several texts ({name: what `ssa.eval.evaluate` returns}) and analysis in one file."""
    analysis = content["figures"].get("analysis")
    if analysis is not None:
        _check_analysis(analysis)
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for name, found in content["figures"].items():
        if name == "analysis":
            continue
        if found["perplexity"]:
            evaluations[f"perplexity, {name}"] = [found["perplexity"]]
        if found["needle"]:
            evaluations["needle"] = [found["needle"]]
        evaluations.setdefault("tasks", []).extend(found["tasks"].values())
    run.evaluations = {name: checked for name, entries in evaluations.items() if (checked := _checked(entries))}
    run.recipe, run.analysis = content["recipe"], analysis
    run.metrics = [line for line in content["curve"] if isinstance(line["step"], int)]


def _add_compared(file: Path, analysis: dict[str, Any], runs: dict[Path, RunEvidence]) -> None:
    """An analysis of a comparison, unless the run's own is known. The run is the directory of that name beside the comparison."""
    beside = (_home(file, "analysis") / str(analysis["run"])).resolve()
    if beside in runs:
        if runs[beside].analysis is None:
            runs[beside].analysis = analysis
    elif not (beside / "analysis" / "analysis.json").is_file():
        runs.setdefault(beside, RunEvidence(beside)).analysis = analysis


def _check_analysis(content: dict[str, Any]) -> None:
    """Looks up what the page's pictures need, so that a damaged file is named instead of ending the report."""
    results = RunResults("", content)
    for mode in ("sparse", "full"):
        means = results.means(mode)
        for name in ("kept_mass", "entropy_bits", "sink_mass_first"):
            float(means[name])
            results.by_layer(mode, name)
        for layer in content["inference"][mode]["layers"]:
            (
                layer.get("theorem_1", {"points": []})["points"],
                sum(layer["distance_histogram"]),
            )  # a record of a run may lack the points
    for name in ("cross_entropy_full", "cross_entropy_sparse", "gap_nats", "kl_nats", "top1_agreement"):
        float(results.predictions[name])
    for name in ("method", "budget", "measured", "versions", "device", "dtype", "selection", "receptive_field"):
        content[name]
    results.violations()


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
