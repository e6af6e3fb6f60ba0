"""Files that hold nested dicts and lists of arrays, as JAX's libraries write them: choose and name the arrays."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxrnn.checkpoint.errors import CheckpointError, check_unicode, listed
from jaxrnn.checkpoint.flax_names import chosen
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.nested import at_key, deeper
from jaxrnn.checkpoint.formats.reading import Reading

MOST = 50_000  # values in all
TOO_MUCH = f"its dicts and lists hold more than {MOST} values\nsave the parameters alone"
_CONTAINERS = (dict, list, tuple)


def params_in(tree: Any, what: Reading, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The parameters in a tree, or in what is under a key of it, by names joined by dots: see `flax_names.chosen`."""
    place = "it" if what.key is None else f"its {what.key!r}"
    tree = at_key(tree, what.key)
    if not isinstance(tree, _CONTAINERS):
        got = "one array" if is_tensor(tree) else f"of type {type(tree).__name__}"
        raise CheckpointError(f"{place} is {got}, not a dict of arrays\nread it with jaxrnn.checkpoint.load_tree(path)")
    arrays: dict[tuple[str, ...], Any] = {}
    others: list[str] = []
    for path, value in leaves(tree):
        if is_tensor(value):
            if path in arrays:
                one = "/".join(path)
                raise CheckpointError(f"two keys are both read as {one}\nrename one of them before saving")
            arrays[path] = value
        else:
            others.append(".".join(path))
    if not arrays:
        there = f", but {listed(others)}" if others else ""
        raise CheckpointError(f"{place} has no arrays{there}\ngive another file, or the key of its arrays")
    names, left_out = chosen(arrays)
    others = [name for name in others if not any(name.startswith(f"{above}.") for above in left_out)]
    if left_out or others:
        what.note(f"took the parameters, and left out {listed([*left_out, *others])}")
    for name in names:
        check_unicode(name)
    return names


def leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of nested dicts and lists, by their keys, in order."""
    left: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    count = 0
    while left:
        path, value = left.pop()
        if not isinstance(value, _CONTAINERS):
            yield path, value
            continue
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        count += len(items)
        if count > MOST:
            raise CheckpointError(TOO_MUCH)
        left += [(deeper(path, name), item) for name, item in reversed(items)]


def owned(arrays: dict[str, Any], array_of: Callable[[Any], np.ndarray], budget: Budget) -> dict[str, np.ndarray]:
    """Contiguous copies that can be written to. Each replaces its original in `arrays`, which can then be freed."""
    for name in arrays:
        array = array_of(arrays[name])
        budget.spend(array.nbytes)
        arrays[name] = np.array(array, order="C")
    return arrays


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
