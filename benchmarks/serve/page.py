"""The record of `specopt ab` as one HTML page that needs no other file and no network."""

from __future__ import annotations

import shlex
from html import escape

from vllm_specopt.benchmarks.serve import plots, report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
.text { text-align: left; }
td.better { background: #dff3e4; } td.worse { background: #fbe3dd; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: 12px; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: #555; }
"""


def page(record: dict) -> str:
    """Return the page as text."""
    parts = [f"<h1>Served models, arm against arm</h1><pre>{escape(record['command'])}</pre><h2>Outcome</h2>"]
    parts.append(_items(report.outcome(record)))
    for caption, svg in plots.figures(record):
        parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    for title, headings, rows in report.tables(record):
        parts.append(f"<h2>{escape(title)}</h2>{_table(headings, rows)}")
    parts.append(f"<h2>How to read this</h2>{_items(report.notes(record))}")
    parts.append(f"<h2>Conditions</h2>{_table(('', ''), report.conditions(record), plain=True)}<h2>Servers</h2>")
    for arm, settings in record["config"]["arms"].items():
        command = record["arms"].get(arm, {}).get("command")
        shown = shlex.join(command) if command else str(settings["url"])
        parts.append(f"<p>{escape(arm)}</p><pre>{escape(shown)}</pre>")
    head = f'<meta charset="utf-8"><title>specopt ab</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(parts)}</body></html>\n'


def _items(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(headings, rows, plain: bool = False) -> str:
    def cell(tag: str, heading: str, text: str) -> str:
        classes = ["text"] if plain or heading in report.TEXT_COLUMNS else []
        classes += [text] if text in ("better", "worse") else []
        return f'<{tag} class="{" ".join(classes)}">{escape(text)}</{tag}>'

    head = "" if plain else "<tr>" + "".join(cell("th", heading, heading) for heading in headings) + "</tr>"
    body = ["<tr>" + "".join(map(cell, ["td"] * len(row), headings, row)) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{head}{"".join(body)}</table></div>'
