"""`jaxrnn speed --sweep`: layers over the number of rows and of hidden units."""

import itertools
from collections.abc import Callable, Sequence

from rich.console import Console

from ..tables import new_table, print_table
from .workloads import Workload

KINDS = ("LSTM", "GRU")
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
UNITS = (32, 128, 512)
STEPS = 64, 16  # the most, and the least
LARGE = 3e10  # operations forward, above which a workload has fewer steps

# Ratios by kind and program, hidden units, and rows.
Curves = dict[tuple[str, str], dict[int, dict[int, float]]]


def workloads() -> list[Workload]:
    """One layer of each kind and size, with half as many inputs as units."""
    most, least = STEPS
    found = []
    for kind, units, rows in itertools.product(KINDS, UNITS, ROWS):
        workload = Workload(f"{kind} {units}, {rows:,} rows", kind, rows, most, units // 2, units)
        while workload.operations() > LARGE and workload.time > least:
            workload = workload._replace(time=workload.time // 2)
        found.append(workload)
    return found


def curves(found: Sequence[Workload], programs: Sequence[str], ratio: Callable[[str, str], float | None]) -> Curves:
    """The curves of a ratio, which is a function of a workload's name and the program."""
    sorted_: Curves = {}
    for workload, program in itertools.product(found, programs):
        if (value := ratio(workload.name, program)) is not None:
            by_units = sorted_.setdefault((workload.kind, program), {})
            by_units.setdefault(workload.hidden_size, {})[workload.batch] = value
    return dict(sorted(sorted_.items(), key=lambda item: KINDS.index(item[0][0])))


def show(time: Curves, memory: Curves, side: str, console: Console) -> None:
    """Print the ratios: a line for each number of rows, a column for each of units."""
    title = f"time: {side}'s over ours; memory: ours over its"
    units = sorted({units for by_units in time.values() for units in by_units})
    more = [str(each) for each in units[1:]]
    headings = [f"time\n{units[0]} units", *more, f"memory\n{units[0]} units", *more]
    table = new_table(title, ("", "program"), ("rows", *headings))
    for (kind, program), by_units in time.items():
        table.add_section()
        for rows in sorted({rows for by_rows in by_units.values() for rows in by_rows}):
            both = itertools.product((by_units, memory.get((kind, program), {})), units)
            values = [curve.get(each, {}).get(rows) for curve, each in both]
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            table.add_row(kind, program, f"{rows:,}", *cells)
    print_table(table, console)
