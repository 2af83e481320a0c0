"""HTML pages: the pieces of a self-contained page; all text is escaped here."""

import base64
import html
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path

from mimir_fast.checkpoints.atomic import write_atomically, write_text_atomically

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead, figcaption, .note { color: var(--soft); } figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; }
.config { columns: 2; column-gap: 2rem; }
.config div { border-bottom: 1px solid var(--line); break-inside: avoid; display: flex; justify-content: space-between;
  gap: 1rem; font-size: .88rem; }
.config span:last-child { overflow-wrap: anywhere; text-align: right; }
@media print { body { margin: 0; max-width: none; } }
"""


def write_page(path: Path, title: str, lead: str, sections: Iterable[str]) -> Path:
    """Write a page of HTML sections under a title and a line below it; the file is replaced as a whole."""
    title = html.escape(title)
    head = (
        f'<meta charset="utf-8"><title>{title} · mimir_fast</title><meta name="viewport" content="width=device-width">'
    )
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}<style>{STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="lead">{html.escape(lead)}</p>',
        *sections,
        "</body></html>",
    ]
    write_text_atomically(path, "\n".join(lines) + "\n", "run_dir")
    return path


def heading(text: str) -> str:
    """Heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str) -> str:
    """Paragraph in a softer colour."""
    return f'<p class="note">{html.escape(text)}</p>'


def link(text: str, target: str) -> str:
    """Paragraph that leads to another page, by a path from this page's folder."""
    return f'<p class="note"><a href="{html.escape(urllib.parse.quote(target))}">{html.escape(text)}</a></p>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of column names; the first cell of a row is its name."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{html.escape(first)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def settings(values: dict) -> str:
    """Names and values in two columns."""
    pairs = ((html.escape(str(name)), html.escape(str(value))) for name, value in values.items())
    return '<div class="config">' + "".join(f"<div><span>{n}</span><span>{v}</span></div>" for n, v in pairs) + "</div>"


def picture(folder: Path, name: str, figure, caption: str) -> str:
    """Save a matplotlib figure as folder/NAME.png; returns it with its caption, embedded in the page."""
    # Embedded, so that the page can be sent or moved without its folder.
    path = folder / f"{name}.png"
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110), "run_dir")
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
