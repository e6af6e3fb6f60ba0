"""List every closed table of jaxrnn: how many settings it has, and what becomes of them."""

import collections
import importlib
import pkgutil
from collections.abc import Iterator

import jaxrnn.checkpoint
from jaxrnn.checkpoint.tables import Table

USES = ("used", "neutral", "refused", "warned")


def tables() -> Iterator[tuple[str, Table]]:
    """Every table, and the module that has it."""
    seen: set[int] = set()

    def found(value: object) -> Iterator[Table]:
        if isinstance(value, Table):
            yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from found(each)
        elif isinstance(value, list | tuple):
            for each in value:
                yield from found(each)

    for info in pkgutil.walk_packages(jaxrnn.checkpoint.__path__, "jaxrnn.checkpoint."):
        for value in vars(importlib.import_module(info.name)).values():
            for table in found(value):
                if id(table) not in seen:
                    seen.add(id(table))
                    yield info.name, table


if __name__ == "__main__":
    print(f"{'table':60} settings  {'  '.join(USES)}")
    for module, table in tables():
        counts = collections.Counter(row.use for row in table.values())
        cells = "  ".join(f"{counts[use]:{len(use)}}" for use in USES)
        print(f"{module.removeprefix('jaxrnn.checkpoint.') + ': ' + table.title:60} {len(table):8}  {cells}")
