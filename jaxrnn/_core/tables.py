"""Print tables whose names are never folded or cut."""

import sys

from rich.console import Console
from rich.table import Table


def print_table(table: Table, console: Console) -> None:
    """Print a table at its full width. On a terminal that is too narrow, print one field a line."""
    for column in table.columns:
        column.no_wrap = True
    width = console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum
    if not console.is_terminal or width <= console.width:
        before, console.width = console.width, max(width, console.width)
        console.print(table)
        console.width = before
        return
    if table.title:
        console.print(table.title, end="\n\n")
    headings = [str(column.header).replace("\n", " ") for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        fields = [(heading, cell) for heading, cell in zip(headings, row, strict=True) if cell]
        for heading, cell in fields:
            text = str(cell).strip()
            console.print(text if len(fields) == 1 else f"{heading}: {text}", soft_wrap=True, highlight=False)
        console.print()
