"""One self-contained HTML page about one or several runs: what is seen, the table, the pictures and how to read them."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssa.analysis import plots
from ssa.analysis.results import RunResults
from ssa.analysis.table import table_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#22262c;--soft:#5d6570;--line:#e2e4e8;--accent:#b34a00;--best:#fff1e5}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e4e7eb;--soft:#a0a8b3;--line:#30363e;--accent:#ff9a52;--best:#3a2a1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .75rem}
h2{font-size:1.15rem;margin:2.25rem 0 .25rem}
p{margin:.4rem 0;max-width:46rem}
.lead{font-size:1.08rem}
.soft,figcaption,.section{color:var(--soft);font-size:.92rem}
.alarm{border-left:4px solid var(--accent);padding:.4rem .8rem;background:var(--best)}
.wide{overflow-x:auto;margin:1rem 0;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.45rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}
thead th{white-space:normal;vertical-align:bottom;overflow-wrap:anywhere;min-width:5rem}
tbody th,thead td{text-align:left;position:sticky;left:0;background:var(--card);white-space:normal;font-weight:400;color:var(--soft)}
tbody th{min-width:8.5rem}
td.best{background:var(--best);font-weight:600}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem;margin-top:.75rem}
figure{margin:0;padding:.75rem;border:1px solid var(--line);border-radius:8px;background:var(--card);color:var(--ink);min-width:0}
figure h3{font-size:.98rem;margin:0 0 .4rem;overflow-wrap:anywhere}
figure svg{display:block;width:100%;max-width:27rem;height:auto;margin:0 auto}
figcaption{margin-top:.5rem}
details{margin-top:2.5rem}
summary{cursor:pointer;font-weight:600}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.25rem 1rem;font-size:.92rem;overflow-wrap:anywhere}
dt{color:var(--soft)}dd{margin:0}
@media(max-width:30rem){main{padding:1rem .6rem 2rem}table{font-size:.78rem}th,td{padding:.4rem .35rem}tbody th{min-width:5.6rem}thead th{min-width:3.6rem}figure{padding:.6rem .4rem}}
"""


def render_report(results: Sequence[RunResults]) -> str:
    """The page as one string of HTML: no script, no external resource. Everything that comes from a run is escaped.

    Raises:
        UserError: matplotlib is missing.
    """
    plots.require_matplotlib()
    with plots.style():
        sections = [_section(*section) for section in _sections(results) if section[2]]
    names = ", ".join(run.name for run in results)
    title = f"Attention analysis: {names}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{_lead(results)}\n{_table(results)}\n{_notes(results)}\n"
        + "\n".join(sections)
        + f"\n{_method(results)}\n</main>\n</body>\n</html>\n"
    )


def _table(results: Sequence[RunResults]) -> str:
    dots = [f'<span class="dot" style="background:{colour}"></span>' for colour in plots.run_colours(results)]
    head = "".join(f'<th scope="col">{dot}{html.escape(run.name)}</th>' for dot, run in zip(dots, results, strict=True))
    rows = []
    for heading, cells, best in table_rows(results):
        data = "".join(f"<td{' class=best' if i == best else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(cells))
        rows.append(f'<tr><th scope="row">{html.escape(heading)}</th>{data}</tr>')
    return f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _lead(results: Sequence[RunResults]) -> str:
    """Two sentences that say what is seen."""
    budgets = {run.analysis["budget"] for run in results}
    context = results[0].analysis["measured"]["context"]
    if len(budgets) == 1:
        tokens = results[0].analysis["receptive_field"]
        budget = f"the budget {html.escape(next(iter(budgets)))}, at most {tokens} of up to {context} tokens,"
    else:
        budget = "its budget"
    if not any(run.beyond for run in results):
        return (
            f'<p class="lead alarm">Nothing was left out: no query stands beyond {budget} so sparse and full attention read the same. '
            "Analyse a longer context or a smaller budget to see a difference.</p>"
        )

    def strong(run: RunResults) -> str:
        return f"<strong>{html.escape(run.name)}</strong>"

    def gap(run: RunResults) -> float:
        return run.predictions["gap_nats"]

    def kept(run: RunResults) -> float:
        return run.means("sparse")["kept_mass"]

    if len(results) == 1:
        run = results[0]
        return (
            f'<p class="lead">When {strong(run)} reads only {budget} its loss changes by {gap(run):+.4f} nats per token '
            f"against full attention. The blocks it selects keep {100 * kept(run):.1f} % of the attention mass.</p>"
        )
    low, high = (choose(results, key=lambda run: abs(gap(run))) for choose in (min, max))
    most, least = max(results, key=kept), min(results, key=kept)
    return (
        f'<p class="lead">Switched from full attention to {budget} {strong(low)} changes least ({gap(low):+.4f} nats per token) and '
        f"{strong(high)} most ({gap(high):+.4f}). The selected blocks keep most of the attention mass in {strong(most)} "
        f"({100 * kept(most):.1f} %) and least in {strong(least)} ({100 * kept(least):.1f} %).</p>"
    )


def _notes(results: Sequence[RunResults]) -> str:
    notes = []
    violations, checked = (sum(x) for x in zip(*(run.violations() for run in results), strict=True))
    if violations:
        notes.append(
            f'<p class="alarm">Theorem 1 is violated at {violations} of {checked} points: the numbers cannot be right.</p>'
        )
    measured = results[0].analysis["measured"]
    which = "queries beyond the receptive field" if any(run.beyond for run in results) else "all queries"
    notes.append(
        f'<p class="soft">Losses and KL: mean over {measured["tokens"]:,} tokens of the same text for every run. Kept mass, entropy and '
        f"sink mass: mean over heads, layers and {which} (below it everything is selected); entropy and sink under full inference. "
        + ("Perplexities: from the evaluation of each run. " if any(run.perplexity for run in results) else "")
        + ("A tinted cell is the best of its row.</p>" if len(results) > 1 else "</p>")
    )
    settings = [run.perplexity_setting for run in results if run.perplexity]
    if any(s[key] != settings[0][key] for s in settings for key in ("text_sha256", "context", "stride")):
        notes.append(
            '<p class="alarm">The runs were evaluated on different texts or with different windows: their perplexities do not compare. '
            "Evaluate them again with the same settings.</p>"
        )
    for run in results:
        if run.perplexity and run.perplexity_setting["step"] != run.analysis["step"]:
            at = html.escape(
                f"{run.name}: the perplexities are those of step {run.perplexity_setting['step']}, the analysis is of step {run.analysis['step']}."
            )
            notes.append(f'<p class="soft">{at}</p>')
    if any(run.method == "nsa" for run in results):
        notes.append(
            '<p class="soft">NSA under full attention: its selection branch reads everything, the other two branches stay as they '
            "are; its attention figures are those of the selection branch.</p>"
        )
    return "\n".join(notes)


_Picture = tuple[str, "Figure | None", str]


def _sections(results: Sequence[RunResults]) -> list[tuple[str, str, list[_Picture]]]:
    """(heading, introduction, pictures); sections without pictures are left out."""
    solid = "Solid: sparse inference; dotted: full inference (where they coincide only one shows)."
    kept = [x for run in results for row in run.heads("sparse", "kept_mass") for x in row]
    low, high = math.floor(10 * min(kept)) / 10, min(1.0, math.ceil(10 * max(kept)) / 10)
    low = min(low, high - 0.1)
    several = len(results) > 1
    needles = [(run, grid) for run in results for grid in run.needles]
    sections: list[tuple[str, str, list[_Picture]]] = [
        ("Training and evaluation", "", [
            ("Training loss", plots.training_loss(results),
             "Cross-entropy of the training steps; the thick line is a running mean of the thin one. Lower is better. SSA's steps "
             "alternate at random between full and sparse attention."),
            ("Alignment loss", plots.alignment_loss(results),
             "How far full and sparse attention outputs are apart at the same layer (logarithmic). Only SSA trains on it; falling means "
             "that the two streams agree more and more."),
            ("Validation loss", plots.validation_loss(results),
             "Solid: sparse attention; dashed: full attention. The closer the two lines of a run, the less it costs to go sparse."),
            ("Perplexity by budget", plots.perplexity_by_budget(results),
             "Each model read at several budgets, larger to the right, full attention last. Lower is better; a good sparse model is flat, "
             "and never gets worse with more budget."),
        ]),
        ("What the selection keeps", "", [
            ("Kept attention mass by layer", plots.by_layer(results, "kept_mass", "kept mass"),
             f"Share of the full-attention weight that lies on the selected blocks, mean over heads. {solid} Higher is better: 1 means "
             "that nothing that matters was left out."),
            ("Entropy of full attention by layer", plots.by_layer(results, "entropy_bits", "entropy (bits)"),
             f"How widely attention spreads: b bits is as wide as uniform attention over 2ᵇ tokens. {solid} Narrow attention is easier "
             "to capture with few blocks."),
            ("Attention on the first token by layer", plots.by_layer(results, "sink_mass_first", "attention mass"),
             f"Share of full-attention weight on the first token of the document, the usual attention sink. {solid}"),
            ("Distance of selected blocks", plots.distance_histogram(results),
             "Share of selected blocks by how far their first token lies behind the query, in powers of two. The left side is the query's "
             "own block, which is always read; weight on the right means that the model looks far back."),
        ]),
        ("Kept mass, head by head", "Every cell is one query head of one layer under sparse inference. Brighter is better; the colour "
         "scale is the same for all runs. Dark cells are heads whose attention the selection misses.", [
            (run.name if several else "Layers x heads", plots.head_map(run, "kept_mass", "kept mass", low, high), "") for run in results
        ]),
        ("Theorem 1", "Each point is one query and head: the distance between full and sparse attention output against the bound "
         "δ·(‖v‖max + ‖h_sparse‖), where δ is the dropped attention mass. Every point must lie on or below the line; the further to the "
         "lower left, the closer sparse attention is to full.", [
            (run.name if several else "Error against bound", plots.theorem_scatter(run), _checked(run)) for run in results
        ]),
        ("Needle in a haystack", "Share of needles found, by length of the haystack and depth of the needle (0 % is the start).", [
            (f"{run.name}, {grid.budget}" if several else f"Budget {grid.budget}", plots.needle_map(grid), "") for run, grid in needles
        ]),
    ]  # fmt: skip
    return [(heading, text, [p for p in pictures if p[1] is not None]) for heading, text, pictures in sections]


def _checked(run: RunResults) -> str:
    violations, checked = run.violations()
    return f"{checked:,} points checked, {violations} above the bound."


def _section(heading: str, text: str, pictures: Sequence[_Picture]) -> str:
    figures = []
    for i, (title, figure, caption) in enumerate(pictures):
        assert figure is not None
        name = re.sub(r"\W+", "-", heading.lower()) + f"-{i}"
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        figures.append(f"<figure><h3>{html.escape(title)}</h3>{inline_svg(figure, name, title)}{below}</figure>")
    intro = f'<p class="section">{html.escape(text)}</p>' if text else ""
    return f'<section><h2>{html.escape(heading)}</h2>{intro}<div class="grid">{"".join(figures)}</div></section>'


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG for the inside of a page: ids made unique by `name`, text and lines in the page's own colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, dpi=150)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = svg.replace(plots.INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title, quote=True)}"', 1)


def _method(results: Sequence[RunResults]) -> str:
    """How the numbers were obtained."""
    entries: list[tuple[str, object]] = []
    measured = results[0].analysis["measured"]
    entries += [(name, measured[name]) for name in ("data", "split", "context", "rows", "tokens", "seed")]
    for run in results:
        a = run.analysis
        about = f"{run.method}, step {a['step']}, budget {a['budget']}, selection {a['selection']}, {a['device']}, {a['dtype']}"
        entries.append((run.name, about.replace("step None, ", "")))
    entries += sorted(results[0].analysis["versions"].items())
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries)
    return f"<details><summary>How this was measured</summary><dl>{items}</dl></details>"
