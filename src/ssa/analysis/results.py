"""What is known about a run when its report is drawn: the analysis, and whatever training and evaluation left beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ssa.budget import tokens_of
from ssa.checked_json import parse_json, typed
from ssa.errors import UserError
from ssa.eval.results import read_results as read_evaluation

FORMAT = 1
LARGEST = 1e100
"""Of the numbers that are drawn: sums and squares of them stay finite."""


class _Line(TypedDict):
    step: int


@dataclass(frozen=True)
class BudgetPerplexity:
    """Perplexity of one budget on one text."""

    budget: str
    """"kxs", or "full"."""
    tokens: float
    """Receptive field in keys; infinite for full attention."""
    nats: float
    perplexity: float


@dataclass(frozen=True)
class NeedleGrid:
    """Needle-in-a-haystack accuracy, 0..1, by depth (row) and length (column); None = not tested."""

    budget: str
    lengths: list[int]
    depths: list[float]
    accuracy: list[list[float | None]]


@dataclass(frozen=True)
class RunResults:
    """One run's figures. Everything but `analysis` may be missing."""

    name: str
    analysis: dict[str, Any]
    """See `ssa.analysis.measure.measure_model`; plus method, step, budget, block_size and how it was measured."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    perplexity: list[BudgetPerplexity] = field(default_factory=list)
    perplexity_setting: dict[str, Any] = field(default_factory=dict)
    """text_sha256, context, stride: perplexities compare where these are equal; the tokens scored, and the step of the checkpoint."""
    needles: list[NeedleGrid] = field(default_factory=list)

    @property
    def method(self) -> str:
        return str(self.analysis["method"])

    @property
    def beyond(self) -> bool:
        """Whether any query stood beyond the receptive field, so that selection left something out."""
        return self.analysis["inference"]["sparse"]["beyond_receptive_field"] is not None

    def means(self, mode: str) -> dict[str, float]:
        """Mean figures over layers and heads under `mode` inference, of queries beyond the receptive field where there are any."""
        figures = self.analysis["inference"][mode]
        return figures["beyond_receptive_field"] or figures["all_queries"]

    def heads(self, mode: str, name: str) -> list[list[float]]:
        """A `HeadMeans` field by layer and head, of the same queries as `means`."""
        layers = self.analysis["inference"][mode]["layers"]
        which = "beyond_receptive_field" if self.beyond else "all_queries"
        return [layer[which][name] for layer in layers]

    def by_layer(self, mode: str, name: str) -> list[float]:
        """The same, averaged over heads."""
        return [sum(row) / len(row) for row in self.heads(mode, name)]

    @property
    def predictions(self) -> dict[str, float]:
        """KL, agreement and losses over all tokens."""
        return self.analysis["predictions"]["all_tokens"]

    def violations(self) -> tuple[int, int]:
        """(violations of Theorem 1's bound, points checked) over both modes; a record of a run may have left them out."""
        layers = [layer for mode in ("sparse", "full") for layer in self.analysis["inference"][mode]["layers"]]
        checks = [layer["theorem_1"] for layer in layers if "theorem_1" in layer]
        return sum(x["violations"] for x in checks), sum(x["checked"] for x in checks)


@dataclass(frozen=True)
class Losses:
    """Of a run at its analysed budget, nats a token."""

    full: float
    sparse: float

    @property
    def gap(self) -> float:
        return self.sparse - self.full


def losses(results: Sequence[RunResults]) -> tuple[list[Losses], str]:
    """The losses that stand for the runs wherever they are shown, all from one measurement; and a sentence that says which.

    `ssa eval`'s, where every run has them for its analysed checkpoint and budget on the same windows of the same text; else the analysis's.
    """
    known = [{p.budget: p.nats for p in run.perplexity} for run in results]
    asked = [(str(run.analysis["budget"]), run.analysis.get("step")) for run in results]
    settings = [run.perplexity_setting for run in results]
    if (
        all({"full", budget} <= nats.keys() for nats, (budget, _) in zip(known, asked, strict=True))
        and all(setting["step"] == step for setting, (_, step) in zip(settings, asked, strict=True))
        and len({tuple(setting[name] for name in SAME_TEXT) for setting in settings}) == 1
    ):
        found = [Losses(nats["full"], nats[budget]) for nats, (budget, _) in zip(known, asked, strict=True)]
        return found, f"Losses are ssa eval's: {settings[0]['tokens']} tokens in windows of {settings[0]['context']}."
    return [
        Losses(run.predictions["cross_entropy_full"], run.predictions["cross_entropy_sparse"]) for run in results
    ], "Losses are over all analysed tokens."


SAME_TEXT = ("text_sha256", "context", "stride")
"""Settings of an evaluation that must be equal for its figures to compare with another's."""


@dataclass(frozen=True)
class AnalysisResult:
    """What `analyze` found and wrote."""

    runs: list[RunResults]
    files: list[Path]
    """The JSON files."""
    homes: list[Path]
    """The run directories."""
    directory: Path | None
    """Where what concerns all of them belongs."""


def read_results(run: Path | str, analysis: dict[str, Any], name: str | None = None) -> RunResults:
    """`analysis` of `run` together with RUN/metrics.jsonl, RUN/eval/perplexity.json and RUN/eval/needle.json, where they are.

    Raises:
        UserError: one of these files is there and cannot be read.
    """
    run = Path(run)
    perplexity, setting = _perplexities(run / "eval" / "perplexity.json")
    return RunResults(
        name=printable(name or run.resolve().name),
        analysis=analysis,
        metrics=read_metrics(run / "metrics.jsonl"),
        perplexity=perplexity,
        perplexity_setting=setting,
        needles=_needles(run / "eval" / "needle.json"),
    )


def printable(name: str) -> str:
    """A run's name as a picture, a terminal or a page can show it."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"


def read_metrics(path: Path, faults: list[str] | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a step; a run that is being written may end in half a line.

    Any other line that is none of ours is left out, and why is added to `faults`.
    """
    if not path.is_file():
        return []
    lines = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            entry = parse_json(text, f"line {number}", largest=None)
            typed(entry, _Line, f"line {number}:")
        except UserError as error:
            if number < len(texts) and text.strip() and faults is not None:
                faults.append(str(error))
            continue
        if abs(entry["step"]) < 2**53:
            lines.append(entry)
    return lines


def curve(metrics: Iterable[dict[str, Any]], *names: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines with all of `names` finite and less than `LARGEST`; the values of several names are summed."""
    steps, values = [], []
    for line in metrics:
        parts = [line.get(name) for name in names]
        if all(isinstance(x, int | float) and abs(x) <= LARGEST for x in parts):
            steps.append(line["step"])
            values.append(float(sum(parts)))  # type: ignore[arg-type]
    return steps, values


def _perplexities(path: Path) -> tuple[list[BudgetPerplexity], dict[str, Any]]:
    entry = _latest(path)
    if entry is None:
        return [], {}
    with _readable(path):
        return perplexities(entry), perplexity_setting(entry)


def perplexities(entry: dict[str, Any]) -> list[BudgetPerplexity]:
    """The budgets of an entry of perplexity.json, smallest first; see `ssa.eval.results`."""
    known = []
    for name, figures in entry["budgets"].items():
        if figures["perplexity"] is not None:  # too large for a float
            known.append(BudgetPerplexity(name, tokens_of(name), float(figures["nats_per_token"]), float(figures["perplexity"])))
    return sorted(known, key=lambda p: (p.tokens, p.budget))


def perplexity_setting(entry: dict[str, Any]) -> dict[str, Any]:
    """What decides whether its figures compare with another's (`SAME_TEXT`); the tokens scored, and the checkpoint's step."""
    return {key: entry["setting"].get(key) for key in SAME_TEXT} | {
        "tokens": entry.get("tokens"),
        "step": entry["model"].get("step"),
    }


def _needles(path: Path) -> list[NeedleGrid]:
    entry = _latest(path)
    if entry is None:
        return []
    with _readable(path):
        return needle_grids(entry)


def needle_grids(entry: dict[str, Any]) -> list[NeedleGrid]:
    """The grids of an entry of needle.json, one a budget."""
    grids = []
    for name, figures in entry["budgets"].items():
        at = {(cell["length"], cell["depth"]): float(cell["accuracy"]) for cell in figures["grid"]}
        lengths, depths = (sorted({key[i] for key in at}) for i in (0, 1))
        grids.append(NeedleGrid(name, lengths, depths, [[at.get((n, d)) for n in lengths] for d in depths]))
    return grids


def _latest(path: Path) -> dict[str, Any] | None:
    with _readable(path):
        content = read_evaluation(path)
        return None if content["latest"] is None else content["results"][content["latest"]]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no evaluation that this version reads ({error!r}): move it away") from None
