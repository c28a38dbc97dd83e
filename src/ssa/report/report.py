"""`ssa report`: everything found under the given directories, on one page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssa.analysis.results import AnalysisResult, losses
from ssa.files import write_atomically
from ssa.report.attention import attention, theorem_notes
from ssa.report.claims import claims
from ssa.report.collect import Evidence, RunEvidence, check_something, collect, collect_analyses, why_not
from ssa.report.efficiency import efficiency, is_timed
from ssa.report.evaluation import evaluation
from ssa.report.measurements import measurements
from ssa.report.page import Cell, Section, colours, definitions, render, table
from ssa.report.training import training

WORDS = (
    ("budget, 4x16", "What a query may read: 4 blocks of 16 tokens, the one that it stands in and those that score best."),
    ("full, sparse inference", "Reading everything, or the budget alone. Any model can be read either way, however it was trained."),
    ("receptive field", "The tokens of a budget, 64 for 4x16. A query with no more before it reads all; most figures are over later queries."),
    ("kept mass", "The share of full attention's weight that falls on the selected blocks. 1 = they hold all that mattered."),
    ("gap", "Loss read sparse minus loss read full, in nats a token: what reading less costs."),
    ("loss, perplexity", "How badly the next token is foretold: mean -log of its probability (nats), and e to its power. Lower is better."),
    ("KL(full ‖ sparse)", "How far the predictions move when the model is read sparse instead of full. 0 = not at all."),
    ("entropy", "How widely attention spreads, in bits: b bits is as wide as equal attention to 2ᵇ tokens."),
    ("sink", "Attention on a document's first tokens, where it goes when it has nowhere else to go."),
    ("Theorem 1", "The paper's bound on the error of sparse attention: the dropped mass times the largest values involved."),
)  # fmt: skip
"""For people who have not read the paper."""


def write_report(paths: Sequence[Path | str], out: Path | str) -> Evidence:
    """Search `paths` (runs, directories of runs, result files) and write the page to `out`, whole or not at all.

    Raises:
        UserError: a path that does not exist, nothing found, or `out` cannot be written.
    """
    evidence = collect(paths)
    write_atomically(Path(out), render_report(evidence))
    return evidence


def write_analysis_report(result: AnalysisResult) -> Path | None:
    """Draw what `ssa.analysis.analyze.analyze` has just measured, beside its figures; None on a rank that has none."""
    if result.directory is None:
        return None
    analyses = [(home, run.name, run.analysis) for home, run in zip(result.homes, result.runs, strict=True)]
    return write_atomically(result.directory / "report.html", render_report(collect_analyses(analyses)))


def render_report(evidence: Evidence) -> str:
    """The page: no script, no external resource. Everything that comes from files is escaped.

    A file that no page can be made of is taken out of `evidence` and named among its problems.

    Raises:
        UserError: nothing is left.
    """
    try:
        return _page(evidence)
    except Exception:  # of what kind depends on what the file has in place of a number
        _leave_out(evidence)
        check_something(evidence)
        return _page(evidence)


def _leave_out(evidence: Evidence) -> None:
    """Keep what a page can be made of together with what was kept before."""
    runs, benchmarks = evidence.runs, evidence.benchmarks
    evidence.runs, evidence.benchmarks = [], []

    def kept(file: str) -> bool:
        try:
            _page(evidence)
        except Exception as error:
            evidence.problems.append((file, why_not(error)))
            return False
        return True

    for run in runs:
        bare = RunEvidence(run.path, run.name)
        for name, content in run.parts().items():
            more = replace(bare, evaluations=dict(bare.evaluations), files=dict(bare.files))
            more.put(name, content, run.files[name])
            evidence.runs.append(more)
            bare = more if kept(run.files[name]) else bare
            evidence.runs.pop()
        evidence.runs += [bare] if bare.parts() else []
    for benchmark in benchmarks:
        evidence.benchmarks.append(benchmark)
        if not kept(benchmark.name):
            evidence.benchmarks.pop()


def _page(evidence: Evidence) -> str:
    runs = evidence.runs
    shades = colours([run.method for run in runs])
    analysed = [(results, colour) for run, colour in zip(runs, shades, strict=True) if (results := run.results) is not None]
    sections = [claims(evidence.benchmarks), *evaluation(runs), *attention(analysed), training(runs)]
    sections += [efficiency([b for b in evidence.benchmarks if is_timed(b)])]
    sections += [measurements([b for b in evidence.benchmarks if not is_timed(b)]), searched(evidence)]
    names = ", ".join(run.name for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    title = f"Report: {names}" if names else "Report: benchmarks"
    return render(title, _lead(evidence, [results for results, _ in analysed]), sections, _how(runs))


def searched(evidence: Evidence) -> Section:
    """What was looked for and not found, and what was found and is not shown."""
    kinds = (
        ("training", "ssa train", lambda run: bool(run.metrics)),
        ("perplexity", "ssa eval RUN", lambda run: bool(run.perplexities)),
        ("tasks", "ssa eval RUN --tasks ...", lambda run: "tasks" in run.evaluations),
        ("long context", "ssa eval RUN --tasks ruler,longbench", lambda run: bool(set(run.evaluations) - {*run.perplexities, "needle", "tasks"})),
        ("needles", "ssa eval RUN --needle-lengths ...", lambda run: "needle" in run.evaluations),
        ("analysis", "ssa analyze RUN", lambda run: run.analysis is not None),
    )  # fmt: skip
    tables = []
    if evidence.runs:
        rows = [
            (run.name, [Cell("found", kind="yes") if has(run) else Cell("not found", kind="no") for _, _, has in kinds])
            for run in evidence.runs
        ]
        made_by = "; ".join(f"{kind}: {command}" for kind, command, _ in kinds)
        tables.append(
            table("Results of every run", f"What makes them: {made_by}.", ["run", *(kind for kind, _, _ in kinds)], rows)
        )
    if evidence.problems:
        rows = [(file, [Cell(why, kind="text")]) for file, why in evidence.problems]
        tables.append(table("Files that are not shown", "Found, but not understood.", ["file", "why"], rows))
    missing = "" if evidence.benchmarks else " No benchmark file (JSON with rows of measured times) was among them."
    if not evidence.runs:
        missing += " No run (metrics.jsonl, eval/*.json, analysis/analysis.json) was among them."
    intro = f"Looked for runs, their evaluations and analyses, and benchmarks under {', '.join(evidence.searched)}.{missing}"
    if not tables:
        tables.append("")
    return Section("What was looked for", intro, tables)


def _lead(evidence: Evidence, results: Sequence) -> list[str]:
    """A few sentences that say what is seen."""
    runs, measured = len(evidence.runs), len(evidence.benchmarks)
    counted = [f"{n} {name}{'' if n == 1 else 's'}" for n, name in ((runs, "run"), (measured, "benchmark file")) if n]
    lead = [
        f'<p class="soft">{" and ".join(counted)}. The <a href="#what-was-looked-for">end of the page</a> says what was not found.</p>'
    ]
    lead += [f'<p class="alarm">{html.escape(note)}</p>' for note in (theorem_notes(results) if results else [])]
    bitten = [run for run in results if run.beyond]
    if results:
        lead.append(definitions("Words of this page", WORDS))
    if not bitten:
        return lead

    def strong(run) -> str:
        return f"<strong>{html.escape(run.name)}</strong>"

    gaps = {run.name: loss.gap for run, loss in zip(results, losses(results)[0], strict=True)}

    def gap(run) -> float:
        return gaps[run.name]

    def kept(run) -> float:
        return run.means("sparse")["kept_mass"]

    if len(bitten) == 1:
        run = bitten[0]
        tokens = "by layer" if "layer_budgets" in run.analysis else f"at most {int(run.analysis['receptive_field'])} tokens"
        text = (
            f"When {strong(run)} reads only {html.escape(str(run.analysis['budget']))} ({tokens}) its "
            f"loss changes by {gap(run):+.4f} nats per token against full attention. The blocks it selects keep {100 * kept(run):.1f} % of the "
            "attention mass."
        )
    else:
        low, high = (choose(bitten, key=lambda run: abs(gap(run))) for choose in (min, max))
        most, least = max(bitten, key=kept), min(bitten, key=kept)
        text = (
            f"Switched from full to sparse attention {strong(low)} changes least ({gap(low):+.4f} nats per token) and {strong(high)} most "
            f"({gap(high):+.4f}). The selected blocks keep most of the attention mass in {strong(most)} ({100 * kept(most):.1f} %) and least in "
            f"{strong(least)} ({100 * kept(least):.1f} %)."
        )
    return [f'<p class="lead">{text}</p>', *lead]


def _how(runs: Sequence[RunEvidence]) -> str:
    """How the analyses and evaluations were made."""
    entries: list[tuple[str, str]] = []
    for run in runs:
        if run.analysis is not None:
            a = run.analysis
            text = ", ".join(str(a["measured"][key]) for key in ("data", "split") if a["measured"].get(key))
            rows = f"{a['measured']['rows']} rows of {a['measured']['context']} tokens, seed {a['measured']['seed']}"
            entries.append((run.name, f"analysis at step {a.get('step')}: budget {a['budget']}, selection {a['selection']}, {text}, {rows}, {a['device']}, {a['dtype']}"))  # fmt: skip
            entries.append(("", ", ".join(f"{name} {version}" for name, version in sorted(a["versions"].items()))))
        for file, found in run.evaluations.items():
            entry = found[-1]
            settings = ", ".join(
                f"{k} {v}" for k, v in entry["setting"].items() if isinstance(v, str | int | float) and not k.endswith("sha256")
            )
            entries.append((run.name, f"{file}, step {entry.get('model', {}).get('step')}: {settings}"))
    return definitions("How this was measured", entries) if entries else ""
