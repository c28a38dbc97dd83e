"""The page around the findings: one HTML file without scripts or external resources, for phones and desktops, light and dark."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ssa.methods import OTHER_COLOURS, methods

OPEN_ROWS = 24
"""A table with more rows opens on demand."""

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#22262c;--soft:#575f6a;--line:#dfe2e7;--accent:#a84400;--best:#fff1e5;--good:#1d6b3c;
METHODS-LIGHT}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e4e7eb;--soft:#a5adb8;--line:#323840;--accent:#ff9a52;--best:#3a2a1c;--good:#7fd6a0;
METHODS-DARK}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .75rem}
h2{font-size:1.2rem;margin:2.5rem 0 .25rem;scroll-margin-top:.5rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--accent)}
.lead{font-size:1.08rem}
.soft,figcaption,.caption{color:var(--soft);font-size:.92rem}
.alarm{border-left:4px solid var(--accent);padding:.4rem .8rem;background:var(--best)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:0;margin:1rem 0;list-style:none}
.card{margin:1rem 0;border:1px solid var(--line);border-radius:8px;background:var(--card)}
.wide{overflow-x:auto;border-radius:0 0 8px 8px}
.wide:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem;overflow-wrap:normal}
.caption{max-width:none;margin:0;padding:.6rem .7rem;border-bottom:1px solid var(--line)}
.card details{margin:0}.card summary{padding:.5rem .7rem}
.caption b{color:var(--ink);font-weight:600}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}
thead th{vertical-align:bottom}
tbody th,thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:400}
thead th:first-child{font-weight:600}
tbody th{color:var(--soft);max-width:15rem;white-space:normal;min-width:7rem}
td.text,th.text{text-align:left}
tr.part>*{border-top:2px solid var(--line)}
td.best{background:var(--best);font-weight:600}
td.no{color:var(--soft)}td.yes{color:var(--good)}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em;background:var(--c)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21.5rem),1fr));gap:1rem;margin-top:.75rem;align-items:start}
figure{margin:0;padding:.75rem;border:1px solid var(--line);border-radius:8px;background:var(--card);min-width:0}
figure h3{font-size:1rem;margin:0 0 .4rem}
figure svg{display:block;width:100%;max-width:30rem;height:auto;margin:0 auto}
figcaption{margin-top:.4rem}
svg text{fill:var(--ink);font-size:11.5px}
svg .mid,svg .cell{text-anchor:middle}svg .end{text-anchor:end}svg .axis{fill:var(--soft)}
svg .grid{stroke:var(--line);fill:none}svg .frame{stroke:var(--soft);fill:none}
svg .line{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}
svg .dashed{stroke-dasharray:5 3;stroke-width:1.6}
svg .faint{stroke-width:.8;opacity:.35}
svg .error{stroke:var(--c);stroke-width:1.3;fill:none}
svg .mark{fill:var(--c);stroke:var(--card);stroke-width:.8}
svg .hollow{fill:var(--card);stroke:var(--c);stroke-width:1.4}
svg .dots{stroke:var(--c);stroke-width:3;stroke-linecap:round;opacity:.75;fill:none}
svg .rule{stroke:var(--ink);stroke-width:1.2;fill:none}
.legend{display:flex;flex-wrap:wrap;gap:.15rem .9rem;padding:0;margin:.3rem 0 0;list-style:none;font-size:.88rem}
details{margin-top:1rem}
summary{cursor:pointer;font-weight:600}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.25rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0}
code{font-size:.92em}
@media(max-width:30rem){main{padding:1rem .6rem 2rem}table{font-size:.82rem}th,td{padding:.38rem .45rem}tbody th{min-width:5.4rem;max-width:8.5rem}figure{padding:.6rem .4rem}}
@media print{.wide{overflow:visible}figure{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Section:
    """A heading with tables (full width) and pictures (in a grid) under it; left out of the page where it has neither."""

    title: str
    intro: str = ""
    """Text, escaped when the page is made."""
    tables: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    """A table's cell; `best` tints it, `kind` is one of the style's classes."""

    text: str
    best: bool = False
    kind: str = ""


def table(
    caption: str, note: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell | str]]], parts: Sequence[int] = ()
) -> str:
    """A table that scrolls inside its own box.

    Args:
        caption, note: What it shows, and how to read it.
        head: Column headings, that of the row names first.
        rows: (name, cells) each.
        parts: Rows that start a new part, set apart by a heavier line.
    """
    body = []
    for i, (name, cells) in enumerate(rows):
        data = "".join(_cell(cell) for cell in cells)
        body.append(f'<tr{" class=part" if i in parts else ""}><th scope="row">{html.escape(name)}</th>{data}</tr>')
    words = [isinstance(cell, Cell) and "text" in cell.kind.split() for cell in rows[0][1]] if rows else []
    columns = "".join(
        f'<th scope="col"{" class=text" if word else ""}>{html.escape(h)}</th>'
        for h, word in zip(head, [False, *words], strict=False)
    )
    label = html.escape(caption, quote=True)
    # The caption stays out of the box that scrolls, or it would be as wide as the table; tabindex: the box is reachable without a mouse.
    content = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table aria-label="{label}">'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    if len(rows) > OPEN_ROWS:
        content = f"<details><summary>{len(rows)} rows</summary>{content}</details>"
    return f'<div class="card"><p class="caption"><b>{html.escape(caption)}.</b> {html.escape(note)}</p>{content}</div>'


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    kind = " ".join(filter(None, (cell.kind, "best" if cell.best else "")))
    return f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html.escape(cell.text)}</td>"


def figure(title: str, svg: str, caption: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A picture with its title, legend (name, colour) and how to read it."""
    keys = "".join(f'<li><span class="dot" style="--c:{colour}"></span>{html.escape(name)}</li>' for name, colour in legend)
    legend_html = f'<ul class="legend">{keys}</ul>' if keys else ""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{legend_html}{below}</figure>"


def definitions(summary: str, entries: Sequence[tuple[str, str]]) -> str:
    """A list that opens on demand."""
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in entries)
    return f"<details><summary>{html.escape(summary)}</summary><dl>{items}</dl></details>"


def colours(names: Sequence[str]) -> list[str]:
    """A CSS colour for each run, by its method; runs of one method are mixed with grey a little more each."""
    seen: dict[str, int] = {}
    result = []
    for method in names:
        again = seen[method] = seen.get(method, -1) + 1
        base = method.partition("+")[0]
        colour = f"var(--{base})" if base in methods() else "var(--other)"
        result.append(colour if not again else f"color-mix(in srgb,{colour} {max(35, 100 - 25 * again)}%,var(--other))")
    return result


def render(title: str, lead: Sequence[str], sections: Sequence[Section], closing: str) -> str:
    """The page as one string.

    Args:
        lead: Paragraphs of HTML for the first screen.
        closing: HTML at the end.
    """
    shown = [s for s in sections if s.tables or s.pictures]
    links = "".join(f'<li><a href="#{s.anchor}">{html.escape(s.title)}</a></li>' for s in shown)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(lead)
        + f'\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        + "\n".join(map(_section, shown))
        + f"\n{closing}\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    """With a colour for each method and one for the rest."""
    style = _STYLE
    for place, ground in (("METHODS-LIGHT", 0), ("METHODS-DARK", 1)):
        named = [(name, method.colours[ground]) for name, method in methods().items()]
        style = style.replace(
            place, ";".join(f"--{name}:{colour}" for name, colour in [*named, ("other", OTHER_COLOURS[ground])])
        )
    return style


def _section(section: Section) -> str:
    intro = f'<p class="soft">{html.escape(section.intro)}</p>' if section.intro else ""
    pictures = f'<div class="grid">{"".join(section.pictures)}</div>' if section.pictures else ""
    return f'<section><h2 id="{section.anchor}">{html.escape(section.title)}</h2>{intro}{"".join(section.tables)}{pictures}</section>'
