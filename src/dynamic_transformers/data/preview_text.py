"""A preview on a terminal, or as plain text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from dynamic_transformers.data.preview import Excerpt, Preview
from dynamic_transformers.data.preview_tables import Table

SHOWN_RECORDS, SHOWN_EXCERPTS = 5, 4
# All columns have to fit a terminal of 80.
SHORT_HEADERS = {
    "filtered": "fil-\ntered",
    "contaminated": "con-\ntami-\nnated",
    "duplicates": "dupli-\ncates",
    "quarantined": "quaran-\ntined",
    "documents": "docu-\nments",
    "in the mixture": "in the\nmixture",
    "behind a cut": "behind\na cut",
    "bytes a token": "bytes\na token",
}


def print_preview(preview: Preview, console: Console) -> None:
    """Print tables, the first broken records and some blocks; what has no loss is dim, or stands in ⟦⟧."""
    for table in preview.tables:
        console.print(Text(table.title, style="bold"))
        console.print(_drawn(table))
        console.print(Text(table.caption, style="dim"), "", sep="\n")
    for warning in preview.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    if preview.warnings:
        console.print()
    if preview.quarantine:
        console.print(Text("Broken records", style="bold"))
        for entry in preview.quarantine[:SHOWN_RECORDS]:
            place = f"{entry['source']}: {entry['file'] or 'the source'}, row {entry['row']}"
            line = f"  {place}: {entry['reason']}: {entry['record'][:60]}"
            console.print(Text(line), soft_wrap=True)
        if preview.broken > SHOWN_RECORDS:
            console.print(f"  and {preview.broken - SHOWN_RECORDS:,} more", highlight=False)
        console.print()
    dim = console.is_terminal and not console.is_dumb_terminal
    how = "is dim" if dim else "stands in ⟦⟧"
    console.print(Text("Training blocks, decoded", style="bold"))
    console.print(
        Text(f"▶ begins a document, or what best fit cut off from one. What {how} is read but not predicted.")
    )
    for excerpt in preview.excerpts[:SHOWN_EXCERPTS]:
        console.print("", _text_of(excerpt, dim), soft_wrap=True, sep="\n")


def _drawn(table: Table) -> Drawn:
    drawn = Drawn(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, header in enumerate(table.headers):
        words = SHORT_HEADERS.get(header) or header.replace(" ", "\n")
        drawn.add_column(words, justify="right" if number else "left", overflow="fold", vertical="bottom")
    for row in table.rows:
        drawn.add_row(*(Text(cell.replace(" %", "\u00a0%")) for cell in row))
    return drawn


def _text_of(excerpt: Excerpt, dim: bool) -> Text:
    text = Text(f"── block {excerpt.block}, tokens {excerpt.first} to {excerpt.last} ──", style="default")
    text.stylize("bold")
    for piece in excerpt.pieces:
        mark = "▶" if piece.begins else "…"
        text.append(f"\n{mark} {piece.source or 'nothing'}\n", style="bold blue" if piece.begins else "blue")
        for part in piece.parts:
            shown = part.text if part.loss or dim else f"⟦{part.text}⟧"
            text.append(shown, style="not bold" if part.loss else "not bold dim")
        text.append("" if piece.ends else "…", style="not bold")
    return text
