"""Files of Keras: .keras, .weights.h5 and the older .h5, with the weights of recurrent layers as torch's."""

import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, check_unicode, listed
from jaxrnn.checkpoint.formats.keras_config import (
    CELL,
    FLIP,
    FLIP_MASKED,
    MASKED,
    Config,
    GroupPath,
    KerasCell,
    sentence_of,
)
from jaxrnn.checkpoint.formats.keras_names import RECURRENT, layers_in, names_in, names_of
from jaxrnn.checkpoint.formats.keras_parts import (
    Part,
    Parts,
    drops,
    findings,
    in_training,
    lacking,
    words_on_activations,
)
from jaxrnn.checkpoint.formats.keras_run import is_exact, run
from jaxrnn.checkpoint.formats.keras_variables import Variable, contents, sniff
from jaxrnn.checkpoint.formats.reading import Reading, said_of_cell, warn
from jaxrnn.checkpoint.named import Described, Names, Origin
from jaxrnn.checkpoint.stored import Value

__all__ = ["read", "sniff"]

_RENAME = "rename one of them, and save the model again"
_TRANSPOSED = "reversed, with outputs before inputs: make it as Flax's ConvTranspose(..., transpose_kernel=True)"
_SIDES = ("forward_layer", "backward_layer")  # a Bidirectional's attributes
_OTHER = {"forward": "backward", "backward": "forward"}
_STACK = ("cell", "cells")  # the attributes under which an RNN has stacked cells


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    """The weights of recurrent layers by torch's names, and the other variables by their own.

    A layer's prefix is its name in Keras, or the attribute of a subclassed model. A model's configuration, if the file
    has one, says what weights do not.

    Warns:
        UserWarning: layers that torch does not have, which are left out; settings to give to the module.
    """
    what.check_no_key("a file of Keras")
    config, version, variables = contents(path)
    try:
        tensors, words = _converted(variables, _config(config, version))
    except RecursionError as error:
        raise CheckpointError(f"the configuration of the model is nested too deeply\n{AGAIN}") from error
    for text in words:
        warn(path, "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text))
    for name in tensors:
        check_unicode(name)
    return tensors


def _config(config: Any, version: str | None = None) -> Config | None:
    """A model's configuration, if the file has one."""
    if config is None:
        return None
    try:
        raw = json.loads(config)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the configuration of the model is damaged: {error}\n{AGAIN}") from error
    return Config(raw, version)


class _KerasModule(NamedTuple):
    """A recurrent layer, which becomes one of torch's modules.

    Attributes:
        where: the names of groups down to its own.
        titles: the names of the layers in them, where the file says them.
        numbered: whether the file is one of Keras 3, in which arrays have numbers.
        parts: its cells.
    """

    where: GroupPath
    titles: tuple[str | None, ...]
    numbered: bool
    parts: Parts


class _Place(NamedTuple):
    """Where a cell is: the path of the module, the attribute of a Bidirectional, the level, and how many there are."""

    where: GroupPath
    side: str = ""
    level: int = 0
    levels: int = 1


def _arrays(group: list[Variable]) -> dict[str, np.ndarray] | None:
    """Keras's arrays by name, if these variables, all of one group, are those of a recurrent cell."""
    path = group[0].path[:-1]
    numbered = path[-1:] == ("vars",)
    known = {str(i): name for i, name in enumerate(RECURRENT)} if numbered else {name: name for name in RECURRENT}
    arrays = {name: each.array for each in group if (name := known.get(each.path[-1].partition(":")[0]))}
    called = numbered and any(CELL.fullmatch(name or "") for name in (*path[-2:-1], *group[0].titles[-2:-1]))
    shapes = [arrays[name].shape for name in RECURRENT[:2] if name in arrays]
    if len(arrays) < len(group) or [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        return None
    hidden, columns = shapes[1]
    if not hidden or columns % hidden or not layers_in(path) or (numbered and not called):
        return None
    return arrays


def _convolves(group: list[Variable]) -> bool:
    """Whether these variables, all of one group, are those of a cell like a ConvLSTM's."""
    path, shapes = layers_in(group[0].path[:-1]), [each.array.shape for each in group[:2]]
    return bool(path) and CELL.fullmatch(path[-1]) is not None and all(len(shape) > 2 for shape in shapes)


def _converted(variables: list[Variable], config: Config | None) -> tuple[Described, list[str]]:
    """The weights, and warnings."""
    groups: dict[GroupPath, list[Variable]] = {}
    if config is not None:
        variables = sorted(variables, key=lambda each: _order(each, config))
    for each in variables:
        groups.setdefault(each.path[:-1], []).append(each)
    modules = _modules(groups, config)
    tensors, said = Names[Value](_RENAME), dict[str, dict[str, Any]]()
    origins: dict[str, Origin] = {}
    training: dict[str, tuple[str, ...]] = {}
    notes = _Notes(config is not None)
    if config is not None:
        notes.without = config.unread()
    used: set[GroupPath] = set()
    for prefix, parts in _named(modules, notes).items():
        if reasons := _reasons(parts):
            notes.leave_out(prefix, reasons)
            continue
        used.update(part.group for part in parts.values())
        split = _split(prefix, parts)
        notes.add(prefix, parts, list(split))
        for below, some in split.items():
            said[below] = _said(some)
            training[below] = in_training(some)
            title = f"keras.layers.{next(iter(some.values())).kind}"
            origins[below] = Origin(title, {}, functools.partial(run, some), is_exact(some))
            for (side, level), part in some.items():
                suffix = f"_l{level}{'_reverse' * (side == _SIDES[1])}"
                for role, array in part.weights().items():
                    tensors.put(f"{below}{role}{suffix}", array, "/".join(part.group))
    others = [each for path, group in groups.items() if path not in used for each in group]
    for path, group in groups.items():
        if path not in used and _convolves(group):
            notes.left_out[f"{'.'.join(layers_in(path))} (a recurrent cell with convolutions)"] = None
    for each, name in zip(others, names_of(others, tensors, config), strict=True):
        tensors.put(name, each.array, "/".join(each.path))
    said = {prefix: settings for prefix, settings in said.items() if settings}
    words = notes.words()
    if config is not None and config.transposed:
        words.append(f"{listed(config.transposed)}: a transposed convolution's kernel is {_TRANSPOSED}")
    return Described(tensors, said, origins=origins, in_training=training), words


def _order(variable: Variable, config: Config) -> list[int]:
    """The place of its layer in the model. Files of Keras 2 are in that order."""
    path = variable.path[:-1]
    return config.order(layers_in(path), variable.titles[: len(layers_in(path))]) if path[-1:] == ("vars",) else []


def _modules(groups: Mapping[GroupPath, list[Variable]], config: Config | None) -> list[_KerasModule]:
    """The cells, by the recurrent layer that they are in."""
    arrays = {path: found for path, group in groups.items() if (found := _arrays(group)) is not None}
    titles = {path: groups[path][0].titles[: len(layers_in(path))] for path in arrays}
    named = titles if config is None else {path: config.titled(layers_in(path), titles[path]) for path in arrays}
    cells = {path: _cell_of(path, titles[path], config) for path in arrays}
    count = Counter(map(id, cells.values()))
    cells = {path: cell if count[id(cell)] == 1 else None for path, cell in cells.items()}  # of one group alone
    unknown = {path: titles[path] for path, cell in cells.items() if cell is None}
    guessed = _guessed(unknown, groups, config is not None)
    modules: dict[Any, _KerasModule] = {}
    for path, found in arrays.items():
        cell, numbered = cells[path], path[-1] == "vars"
        place = guessed[path] if cell is None else _place(path, cell)
        key: Any = (numbered, place.where) if cell is None else cell.module
        if key in modules and (place.side, place.level) in modules[key].parts:
            key = path
        module = modules.setdefault(
            key, _KerasModule(place.where, tuple(named[path][: len(place.where)]), numbered, {})
        )
        module.parts[place.side, place.level] = Part(path, found, cell, place.levels, titles[path][-1])
    return list(modules.values())


def _cell_of(group: GroupPath, titles: tuple[str | None, ...], config: Config | None) -> KerasCell | None:
    """What the configuration says of the cell in a group."""
    if config is None:
        return None
    path = layers_in(group)
    return config.by_path(path, titles) if group[-1] == "vars" else config.by_names(path)


def _place(group: GroupPath, cell: KerasCell) -> _Place:
    path = layers_in(group)
    end = len(cell.module)
    if group[-1] != "vars":
        names = cell.names[cell.depth - 1]
        end = next((i for i, each in enumerate(path) if i and each in names), 0) + 1
    return _Place(path[:end], cell.side, cell.level, cell.levels)


def _guessed(
    cells: Mapping[GroupPath, tuple[str | None, ...]], groups: Iterable[GroupPath], configured: bool
) -> dict[GroupPath, _Place]:
    """The places of cells of which no configuration says anything, by the names of groups."""
    stacks: dict[GroupPath, list[str]] = {}
    for path in map(layers_in, groups):
        if path[-3:-1] == _STACK and len(path) > 3:
            stacks.setdefault(path[:-1], []).append(path[-1])
    stacks = {
        path: sorted(names, key=lambda name: (len(name), name))
        for path, names in stacks.items()
        if len({name.rstrip("_0123456789") for name in names}) == 1
    }
    levels = {(*path, name): i for path, names in stacks.items() for i, name in enumerate(names)}
    alone = Counter(path[:-1] for group in cells if CELL.fullmatch((path := layers_in(group))[-1]))
    places: dict[GroupPath, _Place] = {}
    for group in cells:
        path = layers_in(group)
        if path in levels:
            places[group] = _Place(path[:-3], "", levels[path], len(stacks[path[:-1]]))
        elif len(path) > 1 and CELL.fullmatch(path[-1]) and alone[path[:-1]] == 1:
            places[group] = _Place(path[:-1])
        else:
            places[group] = _Place(path)
    bases = {(place.where, group[-1] == "vars") for group, place in places.items()}
    titles = {place.where: cells[group][len(place.where) - 1] for group, place in places.items()}
    for group, place in places.items():
        *outer, last = place.where
        numbered = group[-1] == "vars"
        side, _, rest = last.partition("_")
        if not outer or side not in _OTHER or not rest or (numbered and rest != "layer"):
            continue
        if configured and not numbered and outer[-1] == outer[0]:  # which the configuration does not call Bidirectional
            continue
        if ((*outer, f"{_OTHER[side]}_{rest}"), numbered) not in bases:
            continue
        forward = titles.get((*outer, f"forward_{rest}"))
        if not forward or forward.startswith("forward_"):  # as Bidirectional names it
            places[group] = place._replace(where=tuple(outer), side=f"{side}_layer")
    return places


def _named(modules: list[_KerasModule], notes: "_Notes") -> dict[str, Parts]:
    """The modules by their prefixes. Those that would have the same are named by their whole paths."""
    tops = Counter(module.where[0] for module in modules if not module.numbered)
    groups = [next(iter(module.parts.values())).group for module in modules]
    prefixes = [".".join(_names_of(module, tops)) for module in modules]
    first = prefixes
    for longer in ([module.where for module in modules], [layers_in(group) for group in groups]):
        count = Counter(prefixes)
        prefixes = [".".join(path) if count[each] > 1 else each for each, path in zip(prefixes, longer, strict=True)]
    named = Names[Parts](_RENAME)
    for before, prefix, module, group in zip(first, prefixes, modules, groups, strict=True):
        named.put(f"{prefix}.", module.parts, "/".join(group))
        if before != prefix:
            notes.renamed.setdefault(before, []).append(prefix)
    return named


def _names_of(module: _KerasModule, tops: Mapping[str, int]) -> GroupPath:
    """The names in a module's prefix."""
    if not module.numbered:
        return module.where[:1] if tops[module.where[0]] == 1 else module.where
    return names_in(module.where, module.titles)


def _reasons(parts: Parts) -> dict[str, str]:
    """Why torch does not have a module: the reasons, each with a remedy or ""."""
    sides = {side for side, _ in parts}
    found: dict[tuple[str, str], set[str]] = {}
    for (side, _), part in parts.items():
        for reason in lacking(part).items():
            found.setdefault(reason, set()).add(side)
    reasons = {
        (reason if where == sides else f"{reason} of its {listed(where)}"): remedy
        for (reason, remedy), where in found.items()
    }
    wanted = {(side, level) for (side, _), part in parts.items() for level in range(part.levels)}
    if parts.keys() != wanted or (any(sides) and sides != {*_SIDES}):
        reasons[f"only {len(parts)} of its cells are like torch's, or its cells share weights"] = ""
    backward = {side: bool(part.settings.get("go_backwards")) for (side, _), part in parts.items() if part.cell}
    if len(backward) == 2 and len(set(backward.values())) == 1:
        reasons["both of its directions run the same way"] = ""
    return reasons


def _split(prefix: str, parts: Parts) -> dict[str, Parts]:
    """What torch can have as one module, by prefix: the whole, or each direction, or each cell."""
    if _fit(parts):
        return {prefix: parts}
    found: dict[str, Parts] = {}
    for side in sorted({side for side, _ in parts}, reverse=True):
        below = f"{prefix}{side}." if side else prefix
        some: Parts = {("", level): part for (each, level), part in parts.items() if each == side}
        if _fit(some):
            found[below] = some
        else:
            found |= {f"{below}cells.{level}.": {("", 0): some["", level]} for level in range(len(some))}
    return found


def _fit(parts: Parts) -> bool:
    """Whether torch can have these as one module."""
    hidden = next(iter(parts.values())).arrays["recurrent_kernel"].shape[0]
    same = len({part.form for part in parts.values()}) == 1
    first = {part.arrays["kernel"].shape[0] for (_, level), part in parts.items() if level == 0}
    above = {part.arrays["kernel"].shape[0] for (_, level), part in parts.items() if level}
    return same and len(first) == 1 and above <= {hidden} and (not above or len({side for side, _ in parts}) == 1)


def _said(parts: Parts) -> dict[str, Any]:
    """The settings of a module that the configuration says, and weights do not."""
    settings = [part.settings for part in parts.values()]
    if any(part.cell is None for part in parts.values()):
        return {"batch_first": True}  # as in Keras 3 always, and in Keras 2 but for time_major
    said: dict[str, Any] = {"batch_first": not settings[0].get("time_major")}
    said |= said_of_cell(next(iter(parts.values())).rnn)
    if any(level for _, level in parts):
        said["dropout"] = 0.0  # Keras's is another
    return said


class _Notes:
    """The warnings about a file.

    Attributes:
        left_out: layers that torch does not have.
        renamed: for prefixes that several layers would have had, those that they got.
        without: layers of the configuration for which no weights were found.

    Args:
        configured: whether the file has a configuration.
    """

    def __init__(self, configured: bool) -> None:
        self.left_out: dict[str, None] = {}
        self.renamed: dict[str, list[str]] = {}
        self.without: list[str] = []
        self._configured = configured
        self._words: dict[str, None] = {}
        self._unknown: dict[str, None] = {}
        self._assumed: dict[str, None] = {}

    def leave_out(self, prefix: str, reasons: Mapping[str, str]) -> None:
        """Note a layer that torch does not have, and why."""
        name = prefix.removesuffix(".")
        self.left_out[f"{name} ({', '.join(reasons)})"] = None
        self._words |= {f"{name} {remedy}": None for remedy in reasons.values() if remedy}

    def add(self, prefix: str, parts: Parts, modules: list[str]) -> None:
        """Note the warnings about a layer that was read as these modules."""
        words: dict[str, None] = {}
        for part in parts.values():
            words |= dict.fromkeys(part.cell.words if part.cell else ())
            if part.cell and part.cell.trains and (dropouts := drops(part)):
                words[f"is called with training=True, and has {listed(dropouts)}: what is read here drops nothing"] = (
                    None
                )
            for finding in findings(part):
                if finding.name != "go_backwards":
                    words[sentence_of(finding)] = None
            words |= dict.fromkeys(words_on_activations(part))
        one = next((part for (side, _), part in parts.items() if side != _SIDES[1]), None)
        if one and one.cell:
            flip, mask = bool(one.settings.get("go_backwards")), one.cell.mask
            if mask:
                remedy = FLIP_MASKED if flip else MASKED
                words[f"{mask}, which may mask steps{' and has go_backwards' * flip}: {remedy}"] = None
            elif flip:
                words[f"has go_backwards: {FLIP}"] = None
        self._words |= {f"{prefix} {text}": None for text in words}
        if len(modules) > 1:
            self._words[f"{prefix} is more than torch has in one module: {_recipe(prefix, modules)}"] = None
        if any(part.cell is None for part in parts.values()):
            odd = {part.title for part in parts.values() if part.title and not CELL.fullmatch(part.title)}
            self._unknown[f"{prefix} (whose cell is named {listed(sorted(odd))})" if odd else prefix] = None
            self._assumed |= dict.fromkeys(_assumed(parts))

    def words(self) -> list[str]:
        """All warnings, a line each."""
        words = [
            f"several layers are named {each}: of these, {listed(new)} are read by their paths in the file"
            for each, new in self.renamed.items()
        ]
        if self._unknown:
            whole = "" if self._configured else "read a file of model.save(path) instead, or "
            words.append(
                f"the file does not say the settings of {listed(self._unknown)}, "
                f"{'or not where jaxrnn finds them' if self._configured else 'but weights alone'}: jaxrnn assumes "
                f"{', '.join(self._assumed)}; {whole}compare the outputs with Keras's"
            )
        if self.without:
            words.append(
                f"found no weights for {listed(self.without)} of the configuration: another layer may have them, "
                "if they are shared, and its module can be called again"
            )
        if self.left_out:
            raw = "which keep Keras's names and layout, for a jaxrnn.Cell"
            words.insert(0, f"left out layers that torch does not have, {raw}: {listed(self.left_out)}")
        return words + list(self._words)


def _assumed(parts: Parts) -> list[str]:
    """What is assumed of a module, of which no settings are known."""
    one = next(iter(parts.values()))
    found = ["Keras's default activations", "go_backwards=False", "no mask"]
    if len({side for side, _ in parts}) > 1:
        found.append("merge_mode='concat'")
    if one.kind == "GRU" and "bias" not in one.arrays:
        found.append("reset_after=True")
    if not any(part.title for part in parts.values()):  # which Keras 3 notes
        found.append("time_major=False")
    return found


def _recipe(prefix: str, modules: list[str]) -> str:
    """How to compute with several modules what a layer of Keras computes."""
    sides = [[each for each in modules if each.startswith(f"{prefix}{side}.")] for side in _SIDES]
    runs = [" and then ".join(each) for each in (sides if all(sides) else [modules])]
    if len(runs) == 1:
        return f"run {runs[0]}"
    return f"run {runs[0]}; run {runs[1]} on the input flipped along the time axis, flip the output, and concatenate"
