"""The look of all tables."""

from collections.abc import Iterable

from rich import box
from rich.table import Table

from jaxrnn._core.tables import print_table

__all__ = ["new_table", "print_table"]


def new_table(title: str, words: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table without rows, given the headings of columns of words and, after them, of columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
