"""The graphs of an ONNX file: their constants, and where other values come from."""

import importlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, as_text
from jaxrnn.checkpoint.formats.bombs import Budget

BUILTIN = ("", "ai.onnx")  # the domain of ONNX's own operators
# Operators whose results exporters leave as weights. None of them makes more numbers than it takes.
_FOLDED = ("Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
# Operators that only move, repeat or leave out numbers of their first input; Concat, of all.
_MOVING = (*_FOLDED, "Cast", "Expand", "Gather", "Split", "Tile")
_AS_THEY_ARE = ("Identity", "Dropout", "Cast")
LOOPS = ("Loop", "Scan", "SequenceMap")  # whose bodies run many times
_FAR = 99  # how many nodes to go back
_MOST_SIZES = 8  # elements of a shape
_DEEPEST = 100  # graphs in graphs
_COST = 1000  # bytes of the budget for each node of a function, for each call


def library(name: str = "onnx") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            'an ONNX file, and reading it needs the package onnx\npip install "jaxrnn[onnx]"'
        ) from error


def value_of(attribute: Any) -> Any:
    """A number or text, or a list of them; an empty list for all else."""
    for field in ("f", "i"):
        if attribute.HasField(field):
            return getattr(attribute, field)
    if attribute.HasField("s"):
        return as_text(attribute.s)
    return [*map(as_text, attribute.strings), *attribute.floats, *attribute.ints]


class File(NamedTuple):
    """What all graphs of a file share.

    Attributes:
        folder: where its external data is.
        budget: for the arrays that are read.
        functions: the model's own, by domain, name and overload.
        used: names of the initializers that recurrent nodes use.
        states: constants by which recurrent nodes start, by the names under which they are returned.
    """

    folder: str
    budget: Budget
    functions: dict[tuple[str, str, str], Any]
    used: set[str]
    states: dict[str, np.ndarray]

    @classmethod
    def of(cls, model: Any, folder: str, budget: Budget) -> "File":
        pairs = [((_domain(each), as_text(each.name), as_text(each.overload)), each) for each in model.functions]
        return cls(folder, budget, _once(pairs, "functions"), set(), {})


class Leaves(NamedTuple):
    """What a value is made of.

    Attributes:
        arrays: constants that are not zero, by where they are.
        given: inputs of the model.
        computed: values that a node computes.
    """

    arrays: dict[tuple["Graph", str], np.ndarray]
    given: list[str]
    computed: list[str]


class Graph:
    """A graph, such as the model's or a branch, or the body of a function for one call of it.

    Args:
        proto: a GraphProto, or a FunctionProto.
        file: what all graphs share.
        opsets: the versions of operators.
        outer: the graph around it.
        call: the node that calls the function.
        path: the prefix for the names of what is in it.
        where: which it is, for messages, such as " in then_branch of if".
        looped: the name of the node that runs it many times, such as a Loop.
    """

    def __init__(
        self,
        proto: Any,
        file: File,
        opsets: Any,
        outer: "Graph | None" = None,
        call: Any = None,
        path: str = "",
        where: str = "",
        looped: str = "",
    ) -> None:
        self.proto: Any = proto
        self.file: File = file
        self.opsets: list[Any] = list(opsets)
        self.outer: Graph | None = outer
        self.path: str = path
        self.where = where
        self.looped: str = looped or ("" if outer is None else outer.looped)
        self._depth: int = 0 if outer is None else outer._depth + 1
        if self._depth > _DEEPEST:
            raise CheckpointError(f"an ONNX file whose graphs are nested too deeply\n{AGAIN}")
        self.nodes: list[Any] = list(proto.node)
        self.tensors: dict[str, Any] = {}
        self._sparse: dict[str, Any] = {}
        self._described = {as_text(each.name): each for each in proto.value_info}
        outputs = ((as_text(n), node) for node in self.nodes for n in node.output if n)
        self.producers: dict[str, Any] = _once(outputs, "outputs")
        self.attributes: dict[str, Any] = {} if outer is None else outer.attributes  # of the function around
        self._called: dict[str, str] | None = None  # names of the caller, by input
        self.inputs: dict[str, Any] = {}
        if call is not None and outer is not None:
            given = [*map(as_text, call.input), *[""] * len(proto.input)]
            self._called = dict(zip(map(as_text, proto.input), given, strict=False))
            defaults = {as_text(each.name): each for each in proto.attribute_proto}
            self.attributes = defaults | outer.attributes_of(call)
        else:
            sparse = [(as_text(each.values.name), each) for each in proto.sparse_initializer]
            self._sparse = _once(sparse, "initializers")
            dense = [(as_text(each.name), each) for each in proto.initializer]
            self.tensors = _once([*dense, *((name, each.values) for name, each in sparse)], "initializers")
            self.inputs = {as_text(each.name): each for each in proto.input}
        self._made: dict[str, np.ndarray | None] = {}
        self._lists: dict[str, list[Any]] = {}

    def function(self, node: Any) -> Any:
        """The function of the model that a node calls, or None."""
        return self.file.functions.get((_domain(node), as_text(node.op_type), as_text(node.overload)))

    def inside(self, node: Any, name: str, path: str) -> Iterator["Graph"]:
        """The graphs in a node, such as those of an If, and the body of the function that it calls."""
        where = f" of {name}{self.where}"
        if (function := self.function(node)) is not None:
            self.file.budget.spend(_COST * (1 + len(function.node)))  # functions that call functions may be a bomb
            yield Graph(
                function, self.file, function.opset_import, self, node, self.path + path, f" in the call{where}"
            )
        for attribute in node.attribute:
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                inner = f" in {as_text(attribute.name)}{where}"
                looped = name if node.op_type in LOOPS and node.domain in BUILTIN else ""
                yield Graph(graph, self.file, self.opsets, self, None, self.path, inner, looped)

    def attributes_of(self, node: Any) -> dict[str, Any]:
        """A node's attributes, with those of the call for which a function's refer to."""
        found = _once(((as_text(each.name), each) for each in node.attribute), "attributes")
        for name, each in list(found.items()):
            if not each.ref_attr_name:
                continue
            del found[name]
            if (meant := self.attributes.get(as_text(each.ref_attr_name))) is not None:
                found[name] = type(each)()
                found[name].CopyFrom(meant)
                found[name].name = name
        return found

    def home(self, name: str) -> tuple["Graph", str]:
        """The graph that has a value, and its name there: "" if a function is called without it."""
        graph = self
        while graph.outer is not None and not (
            name in graph.tensors or name in graph.producers or name in graph.inputs
        ):
            if graph._called is not None:
                name = graph._called.get(name, "")
                if not name:
                    break
            graph = graph.outer
        return graph, name

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a name, if the file alone says it."""
        graph, name = self.home(name)
        if name not in graph._made:
            graph._made[name] = None  # for a loop, which only a damaged graph has
            if name in graph._sparse:
                graph._made[name] = graph._dense(name, graph._sparse[name])
            elif name in graph.tensors:
                graph._made[name] = graph._array(name, graph.tensors[name])
            elif node := graph.producers.get(name):
                graph._made[name] = graph._value(node, name)
        return graph._made[name]

    def _array(self, name: str, tensor: Any) -> np.ndarray:
        try:
            array = np.asarray(library("onnx.numpy_helper").to_array(tensor, self.file.folder))
        except Exception as error:  # onnx raises many kinds, and lets NumPy's through
            cause = f"{type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"a damaged ONNX file: {name} cannot be read: {cause}\n{AGAIN}") from error
        self.file.budget.spend(array.nbytes)
        return array

    def _dense(self, name: str, sparse: Any) -> np.ndarray:
        values, places = self._array(name, sparse.values), self._array(f"{name}'s indices", sparse.indices)
        shape = tuple(sparse.dims)
        self.file.budget.spend(math.prod(shape) * values.dtype.itemsize)
        try:
            dense = np.zeros(shape, values.dtype)
            dense[tuple(places.T) if places.ndim == 2 else np.unravel_index(places, shape)] = values
        except (ValueError, IndexError, TypeError, MemoryError) as error:
            raise CheckpointError(f"a damaged ONNX file: {name} cannot be read: {error}\n{AGAIN}") from error
        return dense

    def _value(self, node: Any, name: str) -> np.ndarray | None:
        attributes = self.attributes_of(node)
        if node.op_type == "Constant":
            return self._constant(name, attributes)
        if node.op_type not in _FOLDED or node.domain not in BUILTIN:
            return None
        inputs = {each: self.constant(as_text(each)) for each in node.input if each}
        if any(array is None for array in inputs.values()):
            return None
        self.file.budget.spend(sum(array.nbytes for array in inputs.values() if array is not None))
        helper = library("onnx.helper")
        try:
            described = [helper.make_tensor_value_info(each, 1, None) for each in (*inputs, name)]
            alone = helper.make_node(node.op_type, list(node.input), list(node.output), domain=node.domain)
            alone.attribute.extend(attributes.values())
            graph = helper.make_graph([alone], "one", described[:-1], described[-1:])
            model = helper.make_model(graph, opset_imports=self.opsets)
            [made] = library("onnx.reference").ReferenceEvaluator(model).run([name], inputs)
        except Exception as error:  # of NumPy, on what does not fit
            raise CheckpointError(f"a damaged ONNX file: {name} cannot be computed: {error}\n{AGAIN}") from error
        return np.asarray(made)

    def _constant(self, name: str, attributes: dict[str, Any]) -> np.ndarray | None:
        if "value" in attributes:
            return self._array(name, attributes["value"].t)
        if "sparse_value" in attributes:
            return self._dense(name, attributes["sparse_value"].sparse_tensor)
        for key, each in attributes.items():
            if key.startswith(("value_float", "value_int")):
                array = np.asarray(value_of(each), np.float32 if key.startswith("value_float") else np.int64)
                self.file.budget.spend(array.nbytes)
                return array
        return None

    def leaves(self, name: str) -> Leaves:
        """What a value is made of, through operators that compute nothing. What is zero is in none of them."""
        found, seen, todo = Leaves({}, [], []), set[tuple[Graph, str]](), [self.home(name)]
        while todo:
            place = graph, name = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            node = graph.producers.get(name)
            array = graph.constant(name)
            if array is None and node is not None and node.op_type == "ConstantOfShape":
                value = graph.attributes_of(node).get("value")
                array = np.zeros(1) if value is None else graph._array(name, value.t)
            if array is not None:
                if np.any(array):
                    found.arrays[place] = array
            elif node is not None and node.op_type in _MOVING and node.domain in BUILTIN:
                moved = node.input if node.op_type == "Concat" else node.input[:1]
                todo += [graph.home(as_text(each)) for each in moved]
            elif node is not None and node.op_type == "Mul" and any(map(graph._is_zero, node.input)):
                continue
            elif node is None and graph.outer is None and name in graph.inputs:
                found.given.append(name)
            else:
                found.computed.append(name)
        return found

    def sources(self, name: str) -> list[str]:
        """The names of the model's initializers that a value is made of, as far as that is not far."""
        found, seen, todo = dict[str, None](), set[tuple[Graph, str]](), [self.home(name)]
        while todo and len(seen) < _FAR:
            place = graph, name = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            if name in graph.tensors and graph.outer is None:
                found[name] = None
            elif (node := graph.producers.get(name)) is not None:
                todo += [graph.home(as_text(each)) for each in node.input if each]
        return list(found)

    def comes_from(self, name: str, other: tuple["Graph", str]) -> bool:
        """Whether a value is computed with an output of the node that makes another, and not with its shape alone."""
        wanted = other[0].producers.get(other[1])
        seen, todo = set[tuple[Graph, str]](), [self.home(name)]
        while todo:
            place = graph, name = todo.pop()
            node = graph.producers.get(name)
            if place in seen or node is None or node.op_type in ("Shape", "Size"):
                continue
            if node is wanted:
                return True
            seen.add(place)
            todo += [graph.home(as_text(each)) for each in node.input if each]
        return False

    def _is_zero(self, name: str) -> bool:
        array = self.constant(as_text(name))
        return array is not None and not np.any(array)

    def sizes(self, name: str) -> list[Any]:
        """The elements of a small array of integers: numbers, or axes as `axis` has them; None, last, for the unknown.

        An array of equal numbers may be shortened to one of them.
        """
        graph, name = self.home(name)
        if name not in graph._lists:
            graph._lists[name] = [None]  # for a loop
            found = graph._find_sizes(name)
            known = found[: found.index(None)] if None in found else found
            whole = len(known) == len(found) <= _MOST_SIZES
            graph._lists[name] = known if whole else [*known[:_MOST_SIZES], None]
        return graph._lists[name]

    def _find_sizes(self, name: str) -> list[Any]:
        unknown: list[Any] = [None]
        array = self.constant(name)
        if array is not None:
            integral = array.dtype.kind in "iu" and array.size <= _MOST_SIZES
            return [int(number) for number in array.reshape(-1)] if integral else unknown
        node = self.producers.get(name)
        if node is None or not node.input or node.domain not in BUILTIN:
            return unknown
        first = as_text(node.input[0])
        if node.op_type == "Shape":
            rank = self._rank(first)
            axes: list[Any] = [self.axis(first, place) for place in range(rank or 4)]
            bounds = {key: value_of(each) for key, each in self.attributes_of(node).items()}
            return _cut(axes if rank else [*axes, None], bounds.get("start", 0), bounds.get("end"))
        if node.op_type == "Concat":
            return [size for each in node.input for size in self.sizes(as_text(each))]
        if node.op_type == "ConstantOfShape":
            value = self.attributes_of(node).get("value")
            return [0] if value is None else [int(n) for n in self._array(name, value.t).reshape(-1)[:1]] or unknown
        sizes = self.sizes(first)
        if node.op_type in (*_AS_THEY_ARE, "Squeeze", "Unsqueeze", "Reshape"):
            return sizes
        if node.op_type in ("Expand", "Tile"):
            return sizes[:1] if len({*sizes}) == 1 else unknown
        if node.op_type == "Gather" and len(node.input) > 1:
            places = self.sizes(as_text(node.input[1]))
            known = len(sizes) - (None in sizes)
            least = -known if known == len(sizes) else 0  # from the end only of what is known to the end
            fits = all(isinstance(each, int) and least <= each < known for each in places)
            return [sizes[each] for each in places] if fits else unknown
        if node.op_type == "Slice":
            starts, ends, axes, steps = (self.numbers(node, key, place) for place, key in enumerate(_SLICED, 1))
            if len(starts) == len(ends) == 1 and axes in ([], [0]) and steps in ([], [1]):
                return _cut(sizes, starts[0], ends[0])
        return unknown

    def axis(self, name: str, place: int) -> Any:
        """What stands for the length of an axis: its number if the file says it, or the same for all that are equal."""
        graph, name = self.home(name)
        for _ in range(_FAR):
            if size := graph._size(name, place):
                return size
            node = graph.producers.get(name)
            behind = None if node is None or not node.input else graph._behind(node, name, place)
            if behind is None:
                break
            if not isinstance(behind, list):
                return behind
            [before, place] = behind
            graph, name = graph.home(as_text(before))
        return graph, name, place

    def _behind(self, node: Any, name: str, place: int) -> Any:
        """An axis that is as long: a list of a name and a place; or its length."""
        first = node.input[0]
        if node.op_type in _AS_THEY_ARE:
            return [first, place]
        if node.op_type == "Transpose":
            perm = self.numbers(node, "perm", 9)
            return [first, perm[place]] if place < len(perm) else None
        if node.op_type in ("LSTM", "GRU", "RNN") and name == as_text(node.output[0]):
            layout = self.attributes_of(node).get("layout")
            before = ({0: 0, 1: 1} if layout is not None and layout.i else {0: 0, 2: 1}).get(place)
            return None if before is None else [first, before]
        if node.op_type == "Squeeze":
            axes = self.numbers(node, "axes", 1)
            if axes and min(axes) >= 0:
                for each in sorted(axes):
                    place += each <= place
                return [first, place]
        if node.op_type == "Reshape" and len(node.input) > 1:
            sizes = self.sizes(as_text(node.input[1]))
            size = sizes[place] if place < len(sizes) else None
            if size == 0:
                return [first, place]
            return size if not isinstance(size, int) or size > 0 else None
        return None

    def _size(self, name: str, place: int) -> int | None:
        """The length of an axis, if the file says it."""
        if name in self.tensors:
            dims = list(self._sparse[name].dims if name in self._sparse else self.tensors[name].dims)
            return dims[place] if place < len(dims) else None
        dims = self._dims(name)
        return dims[place].dim_value or None if dims and place < len(dims) else None

    def _rank(self, name: str) -> int:
        """How many axes a value has, or 0 if the file does not say it."""
        graph, name = self.home(name)
        return len(graph.tensors[name].dims if name in graph.tensors else graph._dims(name) or [])

    def _dims(self, name: str) -> Any:
        described: Any = self.inputs.get(name) or self._described.get(name)
        if described is None or not described.type.tensor_type.HasField("shape"):
            return None
        return described.type.tensor_type.shape.dim

    def numbers(self, node: Any, key: str, place: int) -> list[int]:
        """Integers that are an attribute of a node, or a constant input; none if neither."""
        if key in (attributes := self.attributes_of(node)):
            return [int(value) for value in attributes[key].ints]
        array = self.constant(as_text(node.input[place])) if len(node.input) > place and node.input[place] else None
        return [] if array is None or array.dtype.kind != "i" else [int(value) for value in array.reshape(-1)[:9]]


_SLICED = ("starts", "ends", "axes", "steps")


def _cut(sizes: list[Any], start: Any, end: Any) -> list[Any]:
    """A slice of a list; nothing is known of it if it counts from an end that is unknown."""
    open_ended = None in sizes
    if not isinstance(start, int) or not isinstance(end, int | None) or (open_ended and (start < 0 or (end or 0) < 0)):
        return [None]
    return sizes[start:end] or [None]


def _domain(message: Any) -> str:
    return "" if message.domain in BUILTIN else as_text(message.domain)


def _once(pairs: Iterable[tuple[Any, Any]], what: str) -> dict[Any, Any]:
    """A dict of pairs in which none is lost."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise CheckpointError(f"a damaged ONNX file, two {what} are named {name}\n{AGAIN}")
        found[name] = value
    return found
