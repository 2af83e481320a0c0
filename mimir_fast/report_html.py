"""The report's page: plain HTML with its style and pictures inside, readable light, dark and on paper."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --paper: #ffffff; --panel: #f6f8fa;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #12161c;
  --panel: #1b2129; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .85rem; margin: 0 0 .3rem; color: var(--soft); text-transform: uppercase; letter-spacing: .05em; }
p { margin: .3rem 0; }
.lead, figcaption, td.detail, footer { color: var(--soft); overflow-wrap: anywhere; }
.notes { margin: 1.2rem 0 0; padding: .6rem 1rem .6rem 2rem; border-left: 4px solid var(--accent); background: var(--panel);
  overflow-wrap: anywhere; }
.absent { padding: .6rem 1rem; border: 1px dashed var(--line); color: var(--soft); overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 400; }
td.value { font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .4rem; }
figcaption { font-size: .88rem; margin-top: .4rem; }
.stages { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.5rem 2rem; align-items: start; }
.stages td { font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; font-size: .82rem;
  overflow-wrap: anywhere; }
.stages tr.changed td { font-weight: 700; }
footer { margin-top: 3rem; font-size: .82rem; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #f4f4f4; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 11pt; } section, figure, tr, .stages > div { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """One figure of the report: its file name (without .png), heading, one-line caption, and the PNG.

    png None: there is nothing to draw and the caption says why.
    """

    name: str
    heading: str
    caption: str
    png: bytes | None


def page(
    title: str,
    lead: str,
    notes: list[str],
    summary: list[tuple[str, str, str]],
    sections: list[Section],
    configuration: dict[str, list[tuple[str, str, bool]]] | str,
    footer: str,
) -> str:
    """The whole page.  Every text is escaped here; callers pass it as it is.

    summary        (quantity, value, detail) rows
    configuration  {group: (flag, value, whether it differs from the default) rows}, or why there is none
    """
    body = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p></header>",
        _notes(notes),
        f"<section><h2>Summary</h2>{_summary(summary)}</section>",
        *map(_section, sections),
        f"<section><h2>Configuration</h2>{_configuration(configuration)}</section>",
        f"<footer>{escape(footer)}</footer>",
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _notes(notes: list[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul class='notes'>{items}</ul>" if notes else ""


def _summary(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = (
        f"<tr><th scope='row'>{escape(name)}</th><td class='value'>{escape(value)}</td>"
        f"<td class='detail'>{escape(detail)}</td></tr>"
        for name, value, detail in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _section(section: Section) -> str:
    heading, caption = escape(section.heading), escape(section.caption)
    if section.png is None:
        inner = f"<p class='absent'>{caption}</p>"
    else:
        data = base64.b64encode(section.png).decode("ascii")
        inner = (
            f"<figure><img alt='{heading}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<section id='{escape(section.name)}'><h2>{heading}</h2>{inner}</section>"


def _configuration(groups: dict[str, list[tuple[str, str, bool]]] | str) -> str:
    if isinstance(groups, str):
        return f"<p class='absent'>{escape(groups)}</p>"
    tables = []
    for group, rows in groups.items():
        lines = "".join(
            f"<tr{' class=changed' if changed else ''}><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
            for name, value, changed in rows
        )
        tables.append(f"<div><h3>{escape(group)}</h3><table>{lines}</table></div>")
    note = "<p class='lead'>Bold: differs from the default.</p>"
    return f"{note}<div class='stages'>{''.join(tables)}</div>"
