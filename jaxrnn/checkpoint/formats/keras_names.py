"""The names of variables in files of Keras: the layer's name, and the variable's."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence

from jaxrnn.checkpoint.formats.keras_config import CELL, CONTAINERS, Config, GroupPath
from jaxrnn.checkpoint.formats.keras_variables import Variable

RECURRENT = ("kernel", "recurrent_kernel", "bias")
_KERNEL, _NORM = ("kernel", "bias"), ("gamma", "beta")
# Of a layer all of whose variables are there, or all but the bias, by the name that Keras makes of its class. Keras 3
# numbers variables in this order.
_VARIABLES = {
    **dict.fromkeys(("dense", "einsum_dense"), _KERNEL),
    **dict.fromkeys((f"conv{n}d{more}" for n in (1, 2, 3) for more in ("", "_transpose")), _KERNEL),
    **dict.fromkeys(("depthwise_conv1d", "depthwise_conv2d"), _KERNEL),
    **dict.fromkeys(("layer_normalization", "group_normalization"), _NORM),
    "batch_normalization": (*_NORM, "moving_mean", "moving_variance"),
    "embedding": ("embeddings",),
}


def layers_in(group: GroupPath) -> GroupPath:
    """The part of a group's path that names layers."""
    if group[-1:] == ("vars",):
        return group[:-1]
    return group[1:] if group[0] == "model_weights" and len(group) > 1 else group


def names_in(path: GroupPath, titles: Iterable[str | None]) -> GroupPath:
    """The names in the path of a layer: what is in a list of layers goes by the layer's name, an attribute by its own.

    Args:
        path: the groups of a file of Keras 3.
        titles: for each the name of the layer in it, where the file says it.
    """
    names: list[str] = []
    contained = False
    for i, (each, title) in enumerate(zip(path, titles, strict=True)):
        container = not contained and each in CONTAINERS and i + 1 < len(path)
        if not container:
            names.append((title or each) if contained else each)
        contained = container
    return tuple(names)


def names_of(variables: Sequence[Variable], taken: Container[str], config: Config | None) -> list[str]:
    """A name for each variable: short, such as "head.kernel", or its whole path if the short one is taken."""
    groups: dict[GroupPath, list[Variable]] = {}
    for each in variables:
        groups.setdefault(each.path[:-1], []).append(each)
    short = [".".join((*_layer(each, config), _leaf(each, groups[each.path[:-1]]))) for each in variables]
    count = Counter(short)
    whole = [".".join(part for part in each.path if part != "vars") for each in variables]
    return [name if count[name] == 1 and name not in taken else path for name, path in zip(short, whole, strict=True)]


def _layer(variable: Variable, config: Config | None) -> GroupPath:
    path = layers_in(variable.path[:-1])
    if variable.path[-2:-1] == ("vars",):
        titles = variable.titles[: len(path)]
        return names_in(path, titles if config is None else config.titled(path, titles))
    last = max((i for i, each in enumerate(path) if each == path[0]), default=0)
    return path[:1] + path[last + 1 :]  # Keras 2 repeats the layer's name, and that of the model


def _leaf(variable: Variable, group: list[Variable]) -> str:
    """The name of a variable. Keras 3 numbers them."""
    name = variable.path[-1]
    if variable.path[-2:-1] != ("vars",):
        return name.partition(":")[0]
    path = variable.path[:-2]
    if not path or {each.path[-1] for each in group} != {str(i) for i in range(len(group))}:
        return name
    title = variable.titles[len(path) - 1] or ""
    listed = len(path) > 1 and path[-2] in CONTAINERS
    kind = re.sub(r"_\d+$", "", path[-1] if listed else title)
    names = RECURRENT if CELL.fullmatch(path[-1]) else _VARIABLES.get(kind, ())
    whole = len(group) == len(names) or (names[-1:] == ("bias",) and len(group) == len(names) - 1)
    first = next(each.array for each in group if each.path[-1] == "0")
    return names[int(name)] if whole and (first.ndim > 1) == (names[0] in ("kernel", "embeddings")) else name
