"""Covering arrays: few rows of a table in which any two settings meet wherever they meet in the whole table."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def covering(rows: Iterable[T], settings: Callable[[T], Mapping[str, Hashable]]) -> list[T]:
    """Choose rows greedily until every pair of settings that some row has is in a chosen row.

    Args:
        rows: the whole table.
        settings: the settings of a row, by name.
    """
    table = [*rows]
    pairs = {index: set(itertools.combinations(settings(row).items(), 2)) for index, row in enumerate(table)}
    wanted: set[Any] = set().union(*pairs.values())
    chosen = []
    while wanted:
        best = max(pairs, key=lambda index: (len(pairs[index] & wanted), -index))
        wanted -= pairs[best]
        chosen.append(best)
    return [table[index] for index in sorted(chosen)]
