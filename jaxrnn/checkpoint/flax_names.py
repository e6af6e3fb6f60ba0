"""Names in files of Flax and Haiku: find the parameters, and give the weights of recurrent cells torch's names."""

import dataclasses
import functools
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax import linen, nnx

from jaxrnn.checkpoint.arrays import dtype_of
from jaxrnn.checkpoint.dialects import DIALECTS, Dialect
from jaxrnn.checkpoint.errors import RESET_BEFORE, CheckpointError, listed
from jaxrnn.checkpoint.flax_run import StoredCell, run
from jaxrnn.checkpoint.named import Names, Origin, described_as
from jaxrnn.spec import level_outside

_ONE_PART = "give the part of the weights that belongs to one module"
_BOTH_FORWARD = "if both run forward, give the weights of each alone"
_LIBRARIES = {"flax.linen": linen, "flax.nnx": nnx}
# What RNN and Bidirectional add to names.
_IN_RNN = re.compile(r"(?<![^.])cell\.$")
_IN_BIDIRECTIONAL = re.compile(r"(?P<above>|.*\.)(?P<way>forward|backward)_rnn\.cell\.", re.S)
# The state of random numbers that NNX modules have, such as a Dropout.
RANDOM_STATE = re.compile(r"(?<![^.])rngs\.(?:[^.]*\.)?(key|count)$")
# What is in Haiku's default names of cells. Their arrays have the names of any other layers'.
_IN_HAIKU = {"LSTM": "lstm", "VanillaRNN": "rnn"}
# What joins names, before that of an array in Flax or Haiku.
_SEPARATED = re.compile(r"(?:.*\w)??(?P<separator>\W+|__)(kernel|w)", re.S)
_MOST_SEPARATORS = 4  # to try: each costs a look at all names
_MOST_AXES = 3  # before those of a cell: of seeds, agents and layers
_COLLECTIONS = ("params", "batch_stats")  # variables of Linen that are weights or statistics
_OPTIMIZERS = ("opt_state", "optimizer_state", "optimizer")
# Cells that torch does not have, by the names of their arrays, with what to do.
_OWN_CELL = "write a jaxrnn.Cell for it: its weights keep their names"
_LEFT_OUT = {
    frozenset({"if.kernel", "hf.kernel", "in.kernel", "hn.kernel"}): ("flax.linen.MGUCell", _OWN_CELL),
    frozenset({"w_i", "w_h"}): ("haiku.GRU", f"it {RESET_BEFORE}, with z and 1 - z exchanged"),
}


def chosen(paths: Mapping[tuple[str, ...], Any]) -> tuple[Names[Any], list[str]]:
    """The parameters among the leaves of nested dicts, by names joined by dots, and what was left out.

    Where a dict has "params", as Linen's variables and a TrainState have, its parameters and batch statistics are
    taken, without these names. What else is in it is left out, and so are optimizers.
    """
    holders = {
        path[:depth] for path in paths for depth, name in enumerate(path[:-1]) if name == _COLLECTIONS[0]
    }  # of "params"
    names, left_out = Names[Any]("rename one of them before saving"), dict[str, None]()
    optimizers: dict[tuple[str, ...], Any] = {}
    for path, value in paths.items():
        kept: list[str] = []
        for depth, name in enumerate(path):
            inner = depth < len(path) - 1
            if path[:depth] in holders:
                if not inner or name not in _COLLECTIONS:
                    left_out[".".join(path[: depth + 1])] = None
                    break
            elif inner and name in _OPTIMIZERS:
                optimizers[path] = value
                break
            else:
                kept.append(name)
        else:
            names.put(".".join(kept), value, "/".join(path))
    if not names:  # of an optimizer alone
        for path, value in optimizers.items():
            names.put(".".join(path), value, "/".join(path))
    else:
        left_out |= dict.fromkeys(".".join(path[:1]) for path in optimizers)
    return names, list(left_out)


def with_torchs_names(
    tensors: Mapping[str, Any],
    keep: Collection[str] = (),
    note: Callable[[str], None] = lambda text: None,
    warn: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """A flat dict in which the weights of the cells of Flax and Haiku have torch's names and layouts, each as a layer.

    The two cells of a Bidirectional become one layer, if they are alike. The prefix of a layer leaves out the names
    that RNN and Bidirectional add. If there is a cell, `chosen` names the other parameters.

    Args:
        tensors: by name, joined by dots, or by whatever flax.traverse_util.flatten_dict was given.
        keep: names of weights that stay.
        note: gets a sentence about what was left out.
        warn: gets warnings with their remedies: of what is in doubt, and of cells that torch does not have.

    Raises:
        CheckpointError: two weights get the same name.

    Warns:
        UserWarning: without `warn`, of what is in doubt: two cells are taken for those of a Bidirectional.
    """
    tensors, groups = _joined_by_dots(tensors, note, stacked=warn is not None)
    cells = _cells(groups)
    cells = {prefix: cell for prefix, cell in cells.items() if not any(prefix + name in keep for name in cell.arrays)}
    for prefix, arrays in groups.items():
        for names, (title, remedy) in _LEFT_OUT.items():
            if warn is not None and arrays.keys() >= names:
                warn(f"left out {prefix.removesuffix('.') or 'a cell'} ({title}), which torch does not have", remedy)
    if warn is not None and (stacked := _stacked(groups)):
        _warn_of_stacked(stacked, warn)
    if not cells:
        return tensors
    places = _places(cells, warn or _warn)
    of_cell = {prefix + name: prefix for prefix, cell in cells.items() for name in cell.arrays}
    random = {
        name: None for name, value in tensors.items() if RANDOM_STATE.search(name) and dtype_of(value).kind in "iu"
    }
    if random:
        note(f"left out states of random numbers: {listed(random)}")
    new = Names[Any](_ONE_PART)
    alone: dict[str, list[StoredCell]] = {}
    left = dict(cells)
    for name, value in tensors.items():
        if name not in of_cell and name not in random:
            new.put(name, value, name)
        elif (cell := left.pop(prefix := of_cell.get(name, ""), None)) is not None:
            short, suffix = places[prefix]
            for role, array in cell.dialect.read(cell.arrays).items():
                new.put(f"{short}{role}{suffix}", array, f"a weight of {prefix.removesuffix('.') or 'the cell'}")
            alone.setdefault(short, []).insert(0 if suffix == "_l0" else 1, cell)
    found = described_as(new, tensors)
    for prefix, both in alone.items():
        # Flax's layers put the batch first; its scan, and haiku's dynamic_unroll, time.
        batch_first = both[0].package != "haiku" and "Scan" not in prefix
        found.origins[prefix] = Origin(
            both[0].dialect.title, {"batch_first": batch_first}, functools.partial(run, both)
        )
        if (both[0].package, both[0].name) == ("haiku", "VanillaRNN"):
            found.said[prefix] = {"nonlinearity": "relu"}
    return found


def _warn(text: str, remedy: str) -> None:
    warnings.warn(f"{text}\n{remedy}", stacklevel=level_outside())


def _groups(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays that a cell could have, by prefix and by name in the cell: of its layers, and its own."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        if not isinstance(key, str):
            continue
        prefix, dot, leaf = key.rpartition(".")
        above, _, layer = prefix.rpartition(".")
        groups.setdefault(f"{above}." * bool(above), {})[f"{layer}.{leaf}"] = value
        if leaf in ("w_i", "w_h"):
            groups.setdefault(prefix + dot, {})[leaf] = value
    return groups


def _cells(groups: Mapping[str, dict[str, Any]]) -> dict[str, StoredCell]:
    found = {}
    for prefix, arrays in groups.items():
        for (library, name), dialect in DIALECTS.items():
            if library == "haiku" and _IN_HAIKU[name] not in prefix.removesuffix(".").rpartition(".")[2]:
                continue
            if library == "haiku":
                dialect = _with_biases(dialect, arrays)
            if (library in _LIBRARIES or library == "haiku") and dialect.fits(arrays):
                found[prefix] = StoredCell(library, name, dialect, arrays)
                break
    return found


def _stacked(groups: Mapping[str, dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The cells whose arrays all have more axes first, the numbers of several cells; and the sizes of these axes."""
    found: dict[str, tuple[int, ...]] = {}
    for axes in range(1, _MOST_AXES + 1):
        shapes = {
            prefix: {name: np.shape(array) for name, array in arrays.items()} for prefix, arrays in groups.items()
        }
        firsts = {
            prefix: {name: types.SimpleNamespace(shape=shape[axes:]) for name, shape in each.items()}
            for prefix, each in shapes.items()
            if len({shape[:axes] for shape in each.values()}) == 1 and min(map(len, each.values())) > axes
        }
        found |= {prefix: next(iter(shapes[prefix].values()))[:axes] for prefix in _cells(firsts)}
    return found


def stacked_cells(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The arrays of cells that jax.vmap stacked, if there are such cells and no others.

    Returns:
        By names joined by dots the cells' arrays, and the others; and how many axes are before those of a cell.

    Raises:
        CheckpointError: cells are stacked in different ways.
    """
    tensors, groups = _joined_by_dots(tensors, lambda text: None, stacked=True)
    stacked = {} if _cells(groups) else _stacked(groups)
    if not stacked:
        return {}, tensors, 0
    if len(set(stacked.values())) > 1:
        different = [f"{prefix.removesuffix('.')} by {axes}" for prefix, axes in stacked.items()]
        raise CheckpointError(f"cells are stacked by different axes: {listed(different)}\n{_ONE_PART}")
    cells = {prefix + name: array for prefix in stacked for name, array in groups[prefix].items()}
    others = {name: array for name, array in tensors.items() if name not in cells}
    return cells, others, len(next(iter(stacked.values())))


def _warn_of_stacked(stacked: Mapping[str, tuple[int, ...]], warn: Callable[[str, str], None]) -> None:
    (prefix, (number, *_)), *others = stacked.items()
    cause = f"{prefix.removesuffix('.') or 'a cell'} is {number} cells, one for each index of its arrays' first axis"
    also = f", and so are {len(others)} more" if others else ""
    one = "{name: array[0] for name, array in jaxrnn.checkpoint.load(path).items() if array.ndim}"
    both = "give the part of one cell to jaxrnn.from_flax, which converts all; or write a file of one, and read that"
    remedy = f"{both}: numpy.savez('one.npz', **{one})"
    warn(f"{cause}, as jax.vmap makes them{also}: not converted", remedy)


def _with_biases(dialect: Dialect, arrays: Mapping[str, Any]) -> Dialect:
    """The same dialect without the last bias, if that is not there: of haiku.VanillaRNN(double_bias=False)."""
    last = dialect.entries[-1]
    one = last.bias and last.name not in arrays and sum(entry.bias for entry in dialect.entries) > 1
    return dataclasses.replace(dialect, entries=dialect.entries[:-1]) if one else dialect


def maybe_haikus_lstms(tensors: Mapping[str, Any]) -> list[str]:
    """Prefixes of arrays that an LSTM of Haiku may have, whose name does not say it: any other module may, too."""
    dialect, found = DIALECTS["haiku", "LSTM"], []
    for name in tensors:
        prefix, arrays = name.removesuffix("linear.w"), {f"linear.{leaf}": f"{name[:-1]}{leaf}" for leaf in "wb"}
        if prefix.endswith("/") and arrays["linear.b"] in tensors:
            found += [prefix] if dialect.fits({leaf: tensors[each] for leaf, each in arrays.items()}) else []
    return found


def _joined_by_dots(
    tensors: Mapping[str, Any], note: Callable[[str], None], stacked: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The parameters, by names joined by dots, if there are cells; else all as they are. And their `_groups`.

    Cells that jax.vmap stacked count, too, with `stacked`.
    """
    names = [name for name in tensors if isinstance(name, str)]
    separators = Counter(match["separator"] for name in names if (match := _SEPARATED.fullmatch(name)))
    for separator in dict.fromkeys([".", "/", *(each for each, _ in separators.most_common(_MOST_SEPARATORS))]):
        dotted = {name.replace(separator, "."): tensors[name] for name in names}
        if len(dotted) == len(names) and (_cells(groups := _groups(dotted)) or (stacked and _stacked(groups))):
            params, left_out = chosen({tuple(name.split(".")): value for name, value in dotted.items()})
            if left_out:
                note(f"took the parameters, and left out {listed(left_out)}")
            return described_as(params, tensors), _groups(params)
    return tensors if isinstance(tensors, dict) else dict(tensors), _groups(tensors)


def _places(cells: Mapping[str, StoredCell], warn: Callable[[str, str], None]) -> dict[str, tuple[str, str]]:
    """For each cell the prefix and the suffix of its weights' names as a layer's."""
    alike = {
        prefix: (cell.dialect.title, {name: np.shape(array) for name, array in cell.arrays.items()})
        for prefix, cell in cells.items()
    }
    places = {}
    for prefix in cells:
        short, suffix = _IN_RNN.sub("", prefix), "_l0"
        if match := _IN_BIDIRECTIONAL.fullmatch(prefix):
            above = match["above"]
            if alike.get(f"{above}forward_rnn.cell.") == alike.get(f"{above}backward_rnn.cell."):
                short = above
                if match["way"] == "backward":
                    suffix = "_l0_reverse"
                    cause = f"{above}forward_rnn and {above}backward_rnn are read as a Bidirectional"
                    warn(f"{cause}, whose second runs backward, because their names are its", _BOTH_FORWARD)
        places[prefix] = short, suffix
    return places
