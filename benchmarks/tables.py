"""Tables of a record: as Markdown, and for the terminal. Both are made of the same headings and cells."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.table import Table


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it."""
    return text.replace("*", "\\*").replace("|", "\\|").replace("\n", "\n  ")


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]], text_columns: Collection[str]) -> list[str]:
    """Return the lines of a table; columns that hold numbers are those not among ``text_columns``."""
    left = ["---" if heading in text_columns or not heading else "---:" for heading in headings]
    found = [f"| {' | '.join(heading.replace(chr(10), ' ') for heading in headings)} |", f"|{'|'.join(left)}|"]
    return found + [f"| {' | '.join(map(escaped, row))} |" for row in cells]


def terminal(
    title: str, headings: Sequence[str], cells: Iterable[Sequence[str]], text_columns: Collection[str]
) -> Table:
    """Return the same table for `rich`."""
    drawn = Table(title=title, title_justify="left")
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading in text_columns else "right")
    for row in cells:
        drawn.add_row(*row)
    return drawn


def commit(record: dict) -> str:
    """Return the commit of a record, and whether the tree had changes."""
    return (record["git"]["commit"] or "unknown") + (" with changes" if record["git"]["dirty"] else "")
