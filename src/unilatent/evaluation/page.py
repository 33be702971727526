"""A report as one self-contained HTML page: no network access, all images embedded, no scripts but those of a viewer of
samples (`Modality.viewer`)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from ..runs.curves import Panel, draw_panel
from ..tables import ARROWS, marked
from .contents import ReportContents, SampleGrid, SearchCurve
from .evaluate import EvaluatedMetric
from .protocol import ENOUGH, Protocol
from .search import format_setting
from .table import (
    LEGEND,
    distinct_protocols,
    format_baselines,
    format_counts,
    format_number,
    format_value,
    outline,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Placeholder for the page's text colour in a drawing."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WITH_VIEWER = f"{POLICY}; script-src 'unsafe-inline'"
"""For pages with a viewer of samples: a document of its own inside the page, without rights to anything outside it."""

STYLE = """
:root { --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --back: #ffffff; --card: #f5f7f8; --warn: #8a4b00;
  --warn-back: #fff3dd; --link: #0b5cad; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --soft: #9aa6b0; --line: #343c44; --back: #14181c; --card: #1c2227; --warn: #ffc871;
    --warn-back: #3a2c12; --link: #7db8f2; color-scheme: dark; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .35rem; }
p { margin: .35rem 0 .9rem; max-width: 46rem; }
a { color: var(--link); }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .75rem .9rem;
  margin: .5rem 0; white-space: pre-wrap; }
.soft { color: var(--soft); }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; font-size: .92rem; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .75rem 0; }
th, td { text-align: left; vertical-align: baseline; padding: .5rem 1.1rem .5rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tbody th { font-weight: 500; }
td.value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; font-weight: 650; }
thead th.value { text-align: right; }
td.of { font-variant-numeric: tabular-nums; }
.caution { display: inline-block; background: var(--warn-back); color: var(--warn); border-radius: .3rem;
  padding: 0 .45rem; font-size: .85rem; white-space: nowrap; margin: 0 .25rem .15rem 0; }
.key { display: block; }
.note { border-left: 3px solid var(--warn); background: var(--warn-back); color: var(--warn); padding: .5rem .9rem;
  border-radius: 0 .35rem .35rem 0; max-width: none; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .5rem .9rem; }
details:target { border-color: var(--link); }
summary { cursor: pointer; font-size: .93rem; }
figure { margin: 0; }
ol.grid { list-style: none; margin: .75rem 0; padding: 0; display: grid; gap: .5rem .4rem;
  grid-template-columns: repeat(var(--columns), minmax(0, 6rem)); }
ol.grid img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: .2rem; }
ol.grid figcaption { font-size: .75rem; line-height: 1.3; display: flex; justify-content: space-between; gap: .3rem;
  flex-wrap: wrap; overflow-wrap: anywhere; padding: .05rem .2rem 0; }
iframe { width: 100%; height: 34rem; border: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem;
  margin: .75rem 0; }
.plots figure { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .75rem .4rem; }
.plots figcaption { font-size: .88rem; font-weight: 500; }
.plots svg { display: block; width: 100%; height: auto; }
.plots svg text { font-family: inherit !important; }
.plots.one { grid-template-columns: minmax(0, 27rem); }
@media (max-width: 44rem) {
  body { padding-top: 1.25rem; }
  ol.grid { grid-template-columns: repeat(auto-fill, minmax(3.6rem, 1fr)); }
  table.numbers thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table.numbers, table.numbers tbody { display: block; }
  table.numbers tr { display: grid; grid-template-columns: 1fr max-content; border-bottom: 1px solid var(--line);
    padding: .5rem 0; }
  table.numbers th, table.numbers td { border: 0; padding: .1rem 0; }
  table.numbers td.baselines, table.numbers td.of { grid-column: 1 / -1; font-size: .88rem; }
  table.numbers td.baselines:empty { display: none; } }
@media print {
  body { max-width: none; padding: 0; font-size: 11px; }
  tr, li, .plots figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .caution, .note { border: 1px solid var(--warn); } }
"""


def page(contents: ReportContents) -> str:
    """Return the HTML document."""
    numbers = contents.evaluation.numbers
    grids = (contents.samples, contents.reconstructions)
    policy = WITH_VIEWER if any(grid is not None and grid.viewer is not None for grid in grids) else POLICY
    sections = [
        _header(contents),
        _numbers(numbers),
        _samples(contents),
        _reconstructions(contents.reconstructions),
        _curves(contents.curves),
        *map(_search, contents.searches),
        _protocols(numbers),
        _command(contents.command),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(contents.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _header(contents: ReportContents) -> str:
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in contents.facts)
    notes = "".join(f'\n<p class="note">{escape(note)}</p>' for note in contents.notes)
    return f'<header>\n<h1>{escape(contents.title)}</h1>\n<dl class="facts">\n{facts}\n</dl>{notes}\n</header>'


def _numbers(numbers: list[EvaluatedMetric]) -> str:
    protocols = distinct_protocols(numbers)
    rows = []
    for result in numbers:
        row, protocol = result.row, result.protocol
        cautions = _cautions(protocol.cautions())
        place = protocols.index(protocol) + 1
        rows.append(
            f'<tr><th scope="row"><span class="soft">{ARROWS[row.better]}</span> {escape(row.name)}</th>'
            f'<td class="value">{escape(format_value(row))}</td>'
            f'<td class="baselines">{escape(format_baselines(row))}</td>'
            f'<td class="of">{cautions or escape(format_counts(protocol))}'
            f'<a class="key" href="#protocol-{place}"><code>{escape(result.key)}</code></a></td></tr>'
        )
    few = any(m.protocol.space is not None and m.protocol.num_samples < ENOUGH for m in numbers)
    warning = (
        f'<p class="note">Distances from fewer than {ENOUGH:,} samples depend on their number: compare such a '
        "number only with one of equal n, not with published values.</p>\n"
        if few
        else ""
    )
    return (
        f'<section>\n<h2>Numbers</h2>\n{warning}<table class="numbers">\n'
        '<thead><tr><th scope="col">metric</th><th scope="col" class="value">value</th>'
        '<th scope="col">baselines</th><th scope="col">samples and protocol</th></tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f'\n</tbody>\n</table>\n<p class="soft">{escape(LEGEND)}</p>\n</section>'
    )


def _samples(contents: ReportContents) -> str:
    grid = contents.samples
    if grid is None:
        return ""
    return (
        f"<section>\n<h2>Samples</h2>\n<p>Uncurated: {grid.about}. Below each: its condition and its index.</p>\n"
        f"{_grid(grid, 'sample')}\n</section>"
    )


def _reconstructions(grid: SampleGrid | None) -> str:
    if grid is None:
        return ""
    return (
        f"<section>\n<h2>Reconstructions</h2>\n<p>Uncurated: {grid.about}.</p>\n"
        f"{_grid(grid, 'held-out original above its reconstruction,')}\n</section>"
    )


def _grid(grid: SampleGrid, what: str) -> str:
    items = "\n".join(
        f'<li><figure><img alt="{escape(f"{what} {image.place} {image.caption}".strip())}" '
        f'src="data:image/png;base64,{base64.b64encode(image.png).decode()}">'
        f'<figcaption><span>{escape(image.caption)}</span><span class="soft">#{image.place}</span></figcaption>'
        "</figure></li>"
        for image in grid.images
    )
    return f'<ol class="grid" style="--columns: {grid.columns}">\n{items}\n</ol>{_viewer(grid)}'


def _viewer(grid: SampleGrid) -> str:
    if grid.viewer is None:
        return ""
    return (
        f'\n<details class="viewer"><summary>in three dimensions</summary>\n<iframe title="three-dimensional view" '
        f'sandbox="allow-scripts" loading="lazy" srcdoc="{escape(grid.viewer)}"></iframe></details>'
    )


def _curves(curves: list[Panel]) -> str:
    if not curves:
        return ""
    figures = []
    for panel in curves:

        def draw(axes: Axes, panel: Panel = panel) -> None:
            draw_panel(axes, panel)
            axes.set_xlabel("step")

        figures.append(_figure(panel.title, svg(draw, panel.title)))
    return f'<section>\n<h2>Training</h2>\n<div class="plots">\n{"".join(figures)}</div>\n</section>'


def _search(search: SearchCurve) -> str:
    title = f"{search.metric} over {search.over.replace('_', ' ')}"

    def draw(axes: Axes) -> None:
        for name, points in search.lines.items():
            axes.plot(*zip(*points, strict=True), "o-", linewidth=1.3, markersize=5, label=name)
        if len(search.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        pairs = isinstance(search.points[0].at, tuple)
        axes.set_xlabel(search.over.replace("_", " ") + (", high end" if pairs else ""), parse_math=False)
        axes.set_ylabel(search.metric, parse_math=False)
        axes.grid(alpha=0.25)

    cautions = _cautions(search.cautions)
    rows = "\n".join(
        f'<tr><td>{format_setting(point.at)}</td><td class="value">{format_number(point.value)}</td>'
        f"<td>{cautions}<code>{escape(point.key)}</code></td></tr>"
        for point in search.points
    )
    first, last = escape(search.points[0].key), escape(search.points[-1].key)
    return (
        f"<section>\n<h2>Search: {escape(title)}</h2>\n"
        f"<p>{cautions}From <code>{first}</code> to <code>{last}</code>.</p>\n"
        f'<div class="plots one">{_figure(title, svg(draw, title))}</div>\n'
        f"<details><summary>every evaluated point ({len(search.points)})</summary>\n<table><thead><tr>"
        f'<th scope="col">{escape(search.over.replace("_", " "))}</th><th scope="col" class="value">value</th>'
        f'<th scope="col">protocol</th></tr></thead><tbody>\n{rows}\n</tbody></table></details>\n</section>'
    )


def _protocols(numbers: list[EvaluatedMetric]) -> str:
    parts = []
    for i, protocol in enumerate(distinct_protocols(numbers), 1):
        names = ", ".join(result.row.name for result in numbers if result.protocol == protocol)
        parts.append(
            f'<details id="protocol-{i}"><summary>{escape(outline(protocol))}</summary>\n'
            f"<p>{escape(names)}</p>\n<pre>{escape(_plain(protocol))}</pre></details>"
        )
    return "<section>\n<h2>Protocols</h2>\n" + "\n".join(parts) + "\n</section>"


def _command(command: str) -> str:
    return f"<section>\n<h2>Reproduce with</h2>\n<pre>{escape(command)}</pre>\n</section>"


def _plain(protocol: Protocol) -> str:
    return json.dumps(protocol.plain(), indent=2, ensure_ascii=False)


def _cautions(cautions: Iterable[str]) -> str:
    return "".join(f'<span class="caution">{escape(caution)}</span>' for caution in marked(cautions))


def _figure(title: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>\n"


def svg(draw: Callable[[Axes], None], about: str) -> str:
    """Return a drawing as an SVG element in the page's text colour."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    clear: dict[Any, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": about,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context({**colours, **clear, **style}):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=no_metadata)
    text = out.getvalue()
    start = text.index("<svg")
    label = f'<svg role="img" aria-label="{escape(about)}"'
    return label + text[start + len("<svg") :].replace(INK, "currentColor")
