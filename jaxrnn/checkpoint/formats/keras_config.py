"""The configuration of a Keras model: its recurrent layers, where they are, and what becomes of their settings."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.tables import USED, Finding, Row, Table, neutral, warned

GroupPath = tuple[str, ...]

CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # of models in files of Keras 3, and of late Keras 2
CELL = re.compile(r"cell|(lstm|gru|simple_rnn)_cell(_\d+)?")
FLIP = "flip its input along the time axis"
_MASK = "give mask=, True at valid steps, and take h_n for the last output"
MASKED = f"{_MASK}; at a masked step the output is 0, where Keras repeats the one before"
FLIP_MASKED = f"flip its input and the mask along the time axis, {MASKED}"
_DEEPEST, _MOST = 128, 50_000  # of paths, and of layers: files with more groups are refused, too

_TRAINING = neutral("changes training alone")
_SHAPES = neutral("the weights' shapes say it")
_START = neutral("is how weights start, and the file has them")
_HOW = neutral("changes how the layer computes, not what")
_INPUT = neutral("describes the input")
_COMPARE = "compare the outputs with Keras's"

_ANY: dict[str, Row] = {
    "name": USED,
    "trainable": _TRAINING,
    "activity_regularizer": _TRAINING,
    "dtype": warned(
        None,
        "float32",
        "float64",
        "float16",
        "bfloat16",
        remedy="make the module with the dtype in which that computes, dtype=jnp.float16 or dtype=jnp.bfloat16",
    ),
    # of Keras 2
    "batch_input_shape": _INPUT,
    "dynamic": _HOW,
}
_LAYER: dict[str, Row] = {
    **_ANY,
    "return_sequences": neutral("every output is returned here, and the last state is h_n"),
    "return_state": neutral("the state is always returned here"),
    "go_backwards": warned(False, remedy=FLIP),
    "stateful": warned(False, remedy="give each call the state that the last one returned, as hx"),
    "unroll": _HOW,
    "zero_output_for_mask": neutral("is about the output at masked steps, which is zero here"),
    # of Keras 2
    "time_major": USED,
    "input_dim": _INPUT,
    "input_length": _INPUT,
}
_OF_CELLS: dict[str, Row] = {
    "units": USED,
    "use_bias": _SHAPES,
    "activation": USED,
    **dict.fromkeys((f"{each}_initializer" for each in ("kernel", "recurrent", "bias")), _START),
    **dict.fromkeys((f"{each}_regularizer" for each in ("kernel", "recurrent", "bias")), _TRAINING),
    **dict.fromkeys((f"{each}_constraint" for each in ("kernel", "recurrent", "bias")), _TRAINING),
    "dropout": USED,
    "recurrent_dropout": USED,
    "seed": _TRAINING,
    "implementation": _HOW,  # of Keras 2
}
_OF_KIND: dict[str, dict[str, Row]] = {
    "SimpleRNN": {},
    "LSTM": {"recurrent_activation": USED, "unit_forget_bias": _START},
    "GRU": {"recurrent_activation": USED, "reset_after": USED},
}
_INNER = {"layer": USED}
_NOT_RECURRENT = neutral("is of a layer that is not recurrent")
# By class: what becomes of each setting. Those in MASKS are not recurrent, and change what recurrent layers do.
TABLES = {
    name: Table(f"keras.layers.{name}", rows)
    for name, rows in {
        **{kind: _LAYER | _OF_CELLS | rows for kind, rows in _OF_KIND.items()},
        **{kind: _LAYER | _OF_CELLS | _OF_KIND[kind] | {"use_cudnn": _HOW} for kind in ("LSTM", "GRU")},
        **{f"{kind}Cell": _ANY | _OF_CELLS | rows for kind, rows in _OF_KIND.items()},
        "RNN": _LAYER | {"cell": USED},
        "StackedRNNCells": _ANY | {"cells": USED, "reverse_state_order": neutral("orders states alone")},
        "Bidirectional": {
            **_ANY,
            **_INNER,
            "backward_layer": USED,
            "merge_mode": warned("concat", remedy="merge the output's halves, because torch concatenates"),
            "weights": _START,
        },
        "TimeDistributed": _ANY | _INNER,
    }.items()
}
_EMBEDDING: dict[str, Row] = {
    **dict.fromkeys(_ANY, _NOT_RECURRENT),
    "mask_zero": warned(False, remedy=MASKED),
    **dict.fromkeys(("input_dim", "output_dim", "embeddings_initializer", "embeddings_regularizer"), _NOT_RECURRENT),
    **dict.fromkeys(("embeddings_constraint", "input_length", "sparse", "weights"), _NOT_RECURRENT),
    **dict.fromkeys(("lora_rank", "lora_alpha", "quantization_config"), _NOT_RECURRENT),
}
MASKS = {
    "Masking": Table(
        "keras.layers.Masking", dict.fromkeys(_ANY, _NOT_RECURRENT) | {"mask_value": warned(remedy=MASKED)}
    ),
    "Embedding": Table("keras.layers.Embedding", _EMBEDDING),
    "ReversibleEmbedding": Table(
        "keras.layers.ReversibleEmbedding",
        _EMBEDDING | dict.fromkeys(("tie_weights", "reverse_dtype", "logit_soft_cap"), _NOT_RECURRENT),
    ),
    "Lambda": Table(
        "keras.layers.Lambda",
        {
            **dict.fromkeys((*_ANY, "function", "output_shape", "arguments"), _NOT_RECURRENT),
            **dict.fromkeys(("module", "function_type", "output_shape_type", "output_shape_module"), _NOT_RECURRENT),
            "mask": warned(None, remedy=MASKED),
        },
    ),
}
# Layers whose kernel has the name and the axes of one of Flax, and other numbers in them.
TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
# Layers that pass no mask on.
UNMASKING = {
    *(f"{each}{n}D" for each in ("Conv", "UpSampling", "ZeroPadding", "Cropping") for n in (1, 2, 3)),
    *(f"{each}Pooling{n}D" for each in ("Max", "Average", "GlobalMax", "GlobalAverage") for n in (1, 2, 3)),
    *("SeparableConv1D", "SeparableConv2D", "DepthwiseConv1D", "DepthwiseConv2D"),
    *TRANSPOSED,
    *("Flatten", "Permute", "RepeatVector", "Reshape"),
}
# What a functional model gives a recurrent layer in a call.
CALL = Table(
    "a call of a recurrent layer",
    {
        "mask": USED,
        "sequence": USED,
        "sequences": USED,
        "inputs": USED,
        "training": USED,
        "initial_state": warned(None, remedy="give it as hx, with the layers and directions on the first axis"),
        "constants": warned(None, remedy="write a jaxrnn.Cell that has them"),
    },
)
_POSITIONS = ("sequences", "initial_state", "mask", "training")
_POSITIONS_OF_MODELS = ("inputs", "training", "mask")


class Node(NamedTuple):
    """A layer, model or cell in a configuration.

    Attributes:
        kind: its class in keras.layers; of a class from elsewhere its name, with "~" before it.
        settings: its configuration.
        calls: how the functional model that has it calls it.
    """

    kind: str
    settings: Mapping[str, Any]
    calls: Any

    @property
    def name(self) -> str:
        name = self.settings.get("name")
        return name if isinstance(name, str) else ""

    @property
    def layers(self) -> list[Any] | None:
        """The layers of a model."""
        layers = self.settings.get("layers")
        return layers if isinstance(layers, list) else None


class KerasCell(NamedTuple):
    """A recurrent cell in a configuration.

    Attributes:
        module: the path of the outermost recurrent layer that it is in.
        chain: the layers around it, from that layer to the cell itself.
        side: the attribute of its Bidirectional that has it; "" outside.
        level: its place among stacked cells.
        levels: how many there are.
        mask: what may mask its input, as words: "comes after pads (Masking)".
        trains: whether it, or a model that it is in, is called with training=True.
        words: other warnings.
        names: the names that Keras may give the weights: a tuple for each layer around the cell, and one for the cell.
        depth: how many of `names` are those of the outermost recurrent layer and of the models around it.
        version: the version of Keras that wrote the file, if that says it.
    """

    module: GroupPath = ()
    chain: tuple[Node, ...] = ()
    side: str = ""
    level: int = 0
    levels: int = 1
    mask: str = ""
    trains: bool = False
    words: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    depth: int = 0
    version: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the cell, and of the layers around it that it does not have itself."""
        return {name: value for node in self.chain for name, value in node.settings.items()}


def node_of(raw: Any) -> Node | None:
    """What a dict describes, if it is a layer, a model or a cell."""
    if not isinstance(raw, dict) or not isinstance(raw.get("class_name"), str):
        return None
    settings, module = raw.get("config"), raw.get("module", "keras")
    if isinstance(settings, list):  # of Sequential, before Keras 2.2
        settings = {"layers": settings}
    if not isinstance(settings, dict):
        return None
    own = isinstance(module, str) and module.split(".")[0] in ("keras", "tf_keras", "tensorflow", "keras_core")
    kind = raw["class_name"].rpartition(">")[2][:80]
    if isinstance(policy := settings.get("dtype"), dict) and policy.get("class_name") in ("DTypePolicy", "Policy"):
        named = policy.get("config")
        settings = {**settings, "dtype": named.get("name") if isinstance(named, dict) else policy}
    return Node(kind if own and ">" not in raw["class_name"] else f"~{kind}", settings, raw.get("inbound_nodes"))


class Config:
    """The recurrent cells of a model's configuration.

    Args:
        raw: the configuration, which may hold anything that JSON can.
        version: the version of Keras that wrote it, if the file says it.
    """

    def __init__(self, raw: Any, version: str | None = None) -> None:
        self._cells: dict[GroupPath, KerasCell] = {}
        self._by_name: dict[tuple[str, str], list[KerasCell]] = {}  # of the layer of the model that has it, and its own
        self._makes: dict[int, str] = {}  # what makes a mask, by a model's list of layers
        self._read: set[int] = set()  # the cells of which weights were found
        self._titles: dict[GroupPath, str] = {}  # of what is in a model, by the group's name
        self._places: dict[GroupPath, int] = {}  # among the layers of a model, by the layers' names
        self.transposed: list[str] = []  # names of layers of `TRANSPOSED`
        root = node_of(raw)
        self._root = root.name if root else ""
        todo: list[tuple[Node | None, GroupPath, KerasCell]] = [(root, (), KerasCell(version=version))]
        while todo:
            node, path, place = todo.pop()
            if node is not None and len(path) <= _DEEPEST:
                todo += self._inside(node, path, place)
                self.transposed += [node.name] * (node.kind in TRANSPOSED)
            if len(self._cells) > _MOST:
                raise CheckpointError(f"the configuration of the model has over {_MOST} recurrent layers\n{AGAIN}")

    def by_path(self, path: GroupPath, titles: Iterable[str | None]) -> KerasCell | None:
        """The cell whose weights are in a group of a file of Keras 3.

        Args:
            path: the names of groups, from the outermost.
            titles: the name of the layer that each holds, where the file says it.
        """
        found: GroupPath = ()
        for each, title in zip(path, self.titled(path, titles), strict=True):
            found = (*found, each) if title is None else (*found[:-1], "layers", title)
        cell = self._cells.get(found)
        self._read.add(id(cell))
        return cell

    def titled(self, path: GroupPath, titles: Iterable[str | None]) -> list[str | None]:
        """For each group of a path, if it is in a list of layers, the layer's name; "" if nothing says it."""
        found: GroupPath = ()
        named: list[str | None] = []
        contained = False
        for each, title in zip(path, titles, strict=True):
            name = (title or self._titles.get((*found, each), "")) if contained else None
            found = (*found, each) if name is None else (*found[:-1], "layers", name)
            contained = not contained and each in CONTAINERS
            named.append(name)
        return named

    def order(self, path: GroupPath, titles: Iterable[str | None]) -> list[int]:
        """The key by which groups of files of Keras 3 are in the order of the model; others are last."""
        found: GroupPath = ()
        places = []
        for each, title in zip(path, self.titled(path, titles), strict=True):
            found = (*found, each) if title is None else (*found[:-1], "layers", title)
            places += [] if title is None else [self._places.get(found, _MOST)]
        return places or [_MOST]

    def by_names(self, path: GroupPath) -> KerasCell | None:
        """The cell whose weights have these names in a file of Keras 2, from the outermost layer's to the cell's."""
        found = list(self._by_name.get((path[0], path[-1]), ()))
        if CELL.fullmatch(path[-1]) and len(path) > 1:
            found += self._by_name.get((path[0], path[-2]), ())
        found = [cell for cell in found if self._follows(path[1:], cell)] if len(found) <= _DEEPEST else []
        self._read.update(map(id, found))
        return found[0] if found and all(cell.chain == found[0].chain for cell in found) else None

    def unread(self) -> list[str]:
        """The recurrent layers of which no weights were found, with the settings that are not plain."""
        found: dict[str, None] = {}
        for cell in self._cells.values():
            if id(cell) in self._read or cell.chain[-1].kind not in TABLES:
                continue
            names = dict.fromkeys(some[0] for some in cell.names[: cell.depth])
            said = {
                shown(finding.name, finding.value): None
                for node in cell.chain
                if node.kind in TABLES
                for finding in TABLES[node.kind].findings(node.settings)
            }
            said |= dict.fromkeys([cell.mask] if cell.mask else ())
            found[".".join(names) + (f" ({', '.join(said)})" if said else "")] = None
        return list(found)

    def _follows(self, path: GroupPath, cell: KerasCell) -> bool:
        """Whether names follow each other as those of what a cell is in do; some may be left out."""
        if cell.depth == 1 and cell.chain[0].kind in TABLES and len(path) > 1 and path[1] in cell.names[0]:
            path = path[1:]  # the first name is that of the model in which the layer was made
        names = iter([(self._root,), *cell.names])
        last = len(path) - 1
        return all(
            any(each in some for some in names) or (i == last and CELL.fullmatch(each)) for i, each in enumerate(path)
        )

    def _add(self, path: GroupPath, cell: KerasCell) -> None:
        self._cells[path] = cell
        # Keras 2 may not name the only cell of a layer.
        alone = cell.levels == 1 and len(cell.chain) > 1 and cell.chain[-2].kind == "RNN"
        for name in {*cell.names[-1], *(cell.names[-2] if alone and len(cell.names) > 1 else ())}:
            self._by_name.setdefault((cell.names[0][0], name), []).append(cell)

    def _inside(
        self, node: Node, path: GroupPath, place: KerasCell
    ) -> Iterator[tuple[Node | None, GroupPath, KerasCell]]:
        """What is directly in a layer or model, with its path and place. A cell is noted instead."""
        if node.layers is not None:
            if node.kind.startswith("~"):
                name = f"{node.name} ({node.kind[1:]})".strip()
                text = f"is in {name}, a class of your own, whose code the file does not have: {_COMPARE}"
                place = place._replace(words=(*place.words, text))
            yield from self._in_model(node.layers, path, place)
            return
        if not path:
            return
        if not place.names or node.name not in place.names[-1]:
            place = place._replace(names=(*place.names, (node.name,)))
        if not place.chain:
            place = place._replace(module=path, depth=len(place.names))
        place = place._replace(chain=(*place.chain, node))
        inner = node_of(node.settings.get("layer"))
        if node.kind == "Bidirectional" and inner is not None:
            for side, layer in zip(("forward_layer", "backward_layer"), _directions(node, inner), strict=True):
                names = {layer.name: None, f"{side.partition('_')[0]}_{inner.name.removeprefix('forward_')}": None}
                yield layer, (*path, side), place._replace(side=side, names=(*place.names, tuple(names)))
        elif node.kind == "TimeDistributed":
            words = ["is in a TimeDistributed: merge the first two axes of its input"]
            words += [sentence_of(finding) for finding in TABLES[node.kind].findings(node.settings)]
            below = place._replace(chain=(), words=(*place.words, *words))
            if inner and inner.layers is not None:
                below = below._replace(names=(*place.names, (inner.name,)))
            yield inner, (*path, "layer"), below
        elif node.kind == "RNN":
            yield node_of(node.settings.get("cell")), (*path, "cell"), place
        elif node.kind == "StackedRNNCells" and isinstance(cells := node.settings.get("cells"), list):
            nodes = [node_of(each) for each in cells]
            for level, (each, group) in enumerate(zip(nodes, _groups(nodes), strict=True)):
                yield each, (*path, "cells", group), place._replace(level=level, levels=len(nodes))
        elif [each.kind for each in place.chain[-2:-1]] in (["RNN"], ["StackedRNNCells"]) or node.kind.endswith("Cell"):
            self._add(path, place)
        elif node.kind in TABLES or "units" in node.settings:
            self._add((*path, "cell"), place)

    def _mask_of(self, node: Node) -> str:
        """What in a layer or a model makes a mask, by its name and class; "" if nothing does."""
        findings = MASKS[node.kind].findings(node.settings) if node.kind in MASKS else ()
        own = node.layers is None and node.kind.startswith("~")  # whose code may do anything
        if own or any(finding.row.words == MASKED for finding in findings):
            return f"comes after {node.name[:80]} ({node.kind.removeprefix('~')})"
        if node.layers is None:
            inner = node_of(node.settings.get("layer"))
            return self._mask_of(inner) if inner else ""
        if id(node.layers) not in self._makes:
            found = (self._mask_of(inner) for each in node.layers if (inner := node_of(each)))
            self._makes[id(node.layers)] = next(filter(None, found), "")
        return self._makes[id(node.layers)]

    def _in_model(
        self, layers: list[Any], path: GroupPath, place: KerasCell
    ) -> Iterator[tuple[Node | None, GroupPath, KerasCell]]:
        nodes = [node_of(each) for each in layers]
        groups = _groups(nodes)
        alone = Counter(node.kind for node in nodes if node)
        made = [self._mask_of(node) if node else "" for node in nodes]
        for index, (node, group, mask) in enumerate(zip(nodes, groups, _masks(nodes, made, place.mask), strict=True)):
            if node is None:
                continue
            self._places[(*path, "layers", node.name)] = index
            self._titles[(*path, "layers", group)] = node.name
            if alone[node.kind] == 1:  # Keras 2 numbers them in another way
                self._titles[(*path, "_layer_checkpoint_dependencies", group)] = node.name
            words, masked, trains = _called(node)
            below = place._replace(names=(*place.names, (node.name,)), words=(*place.words, *words))
            below = below._replace(trains=place.trains if trains is None else trains)
            yield node, (*path, "layers", node.name), below._replace(mask=mask or masked)


def _directions(node: Node, inner: Node) -> tuple[Node, Node]:
    """The layers of a Bidirectional. Keras 2 notes the backward one only if it is not made of the other."""
    if (backward := node_of(node.settings.get("backward_layer"))) is None:
        name = f"backward_{inner.name.removeprefix('forward_')}"
        other = {**inner.settings, "name": name, "go_backwards": not inner.settings.get("go_backwards")}
        backward = inner._replace(settings=other)
    return inner, backward


@functools.lru_cache
def _group(kind: str) -> str:
    """The name of the group in which Keras puts a layer of a list, by its class."""
    name = re.sub(r"\W+", "", kind)
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _groups(nodes: list[Node | None]) -> list[str]:
    """The names of the groups of the layers of a list: those of one class are numbered."""
    count: Counter[str] = Counter()
    found = []
    for name in [_group(node.kind if node else "") for node in nodes]:
        found.append(f"{name}_{count[name]}" if count[name] else name)
        count[name] += 1
    return found


def _masks(nodes: list[Node | None], made: list[str], outer: str) -> list[str]:
    """For each layer of a model what may mask its input, "" if nothing does: what others made, or is there outside."""
    by_name = {node.name: i for i, node in enumerate(nodes) if node}
    if all(node is None or node.calls is None for node in nodes):  # a Sequential
        following: dict[int, list[int]] = {i: [i + 1] for i in range(len(nodes) - 1)}
        starts = [(0, outer)] if outer and nodes else []
    else:
        following = {}
        for i, node in enumerate(nodes):
            for name in _tensors(node.calls) if node else ():
                if name in by_name:
                    following.setdefault(by_name[name], []).append(i)
        starts = [(i, outer) for i, node in enumerate(nodes) if outer and node and node.kind == "InputLayer"]
    found = [""] * len(nodes)
    for i, mask in starts:
        found[i] = mask
    todo = [i for i in range(len(nodes)) if made[i] or found[i]]
    while todo:
        i = todo.pop()
        node, mask = nodes[i], made[i] or found[i]
        if node is not None and not _ends_mask(node):
            for other in following.get(i, ()):
                if not found[other]:
                    found[other] = mask
                    todo += [other] if not made[other] else []
    return found


def _ends_mask(node: Node) -> bool:
    """Whether no mask goes on from it, as from a recurrent layer that returns the last output alone."""
    inner = node_of(node.settings.get("layer")) if node.kind == "Bidirectional" else node
    recurrent = inner is not None and inner.kind in ("RNN", *_OF_KIND)
    ends = recurrent and inner is not None and not inner.settings.get("return_sequences")
    return bool(ends or node.kind in UNMASKING)


def _tensors(calls: Any) -> Iterator[str]:
    """The names of the layers whose outputs a layer is called with."""
    todo = [calls]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            history = each.get("keras_history")
            if isinstance(history, list) and history and isinstance(history[0], str):
                yield history[0]
            todo += each.values()
        elif isinstance(each, list):
            if len(each) > 2 and isinstance(each[0], str) and isinstance(each[1], int):  # of Keras 2
                yield each[0]
            todo += each


def _called(node: Node) -> tuple[list[str], str, bool | None]:
    """How a functional model calls a recurrent layer or a model.

    Returns:
        Warnings about arguments; words on a mask among them; the argument training, None if there is none.
    """
    inner = node_of(node.settings.get("layer")) if node.kind in ("Bidirectional", "TimeDistributed") else node
    model = inner is not None and inner.layers is not None
    if inner is None or not (model or inner.kind in ("RNN", *_OF_KIND)) or not isinstance(node.calls, list):
        return [], "", None
    calls = [_given(call, _POSITIONS_OF_MODELS if model else _POSITIONS) for call in node.calls]
    place = f"is in {node.name[:80]}, which " * model
    words = {
        f"{place}is called with {shown(finding.name, finding.value)}: {finding.row.words}": None
        for given in calls
        for finding in CALL.findings(given)
    }
    masked = any(_any(given.get("mask")) for given in calls)
    given_training = [each.get("training") for each in calls]
    known = True in given_training or (bool(calls) and all(each is False for each in given_training))
    return list(words), f"{place}is called with mask=" * masked, True in given_training if known else None


def _any(value: Any) -> bool:
    """Whether an argument, or one of a list, is not None."""
    return any(each is not None for each in value) if isinstance(value, list) else value is not None


def _given(call: Any, positions: Iterable[str]) -> dict[str, Any]:
    """The arguments of a call, by name."""
    if isinstance(call, dict):
        args, given = call.get("args"), call.get("kwargs")
        named = dict(zip(positions, args, strict=False)) if isinstance(args, list) else {}
        return named | (given if isinstance(given, dict) else {})
    call = call if isinstance(call, list) else []  # of Keras 2
    given = call[0][3] if call and isinstance(call[0], list) and len(call[0]) > 3 else {}
    # A model's further tensors are inputs.
    more = {"initial_state": call[1:]} if len(call) > 1 and "initial_state" in positions else {}
    return (given if isinstance(given, dict) else {}) | more


def sentence_of(finding: Finding) -> str:
    """A warning about a setting, without the name of the layer, which comes first."""
    return f"has {shown(finding.name, finding.value)}: {finding.row.words}"


def shown(name: str, value: Any) -> str:
    """A setting for a message; of what is nested its class alone."""
    if isinstance(value, dict):
        function = value.get("class_name") == "function"
        value = value.get("config") if function else value.get("registered_name") or value.get("class_name")
    known = isinstance(value, str | int | float | None) and value is not True and value != "__keras_tensor__"
    return " ".join((f"{name}={value}" if known else name).split())[:80]
