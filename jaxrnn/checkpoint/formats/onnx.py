"""Files of ONNX: the LSTM, GRU and RNN nodes in them, with torch's names, and such nodes for weights of ours."""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, as_text, check_unicode, listed
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.stored import Value
from jaxrnn.spec import Spec

# What nodes compute unless their attributes say otherwise, which is what torch computes.
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_PEEPHOLES = ("weight_ci", "weight_co", "weight_cf")  # in ONNX's order
_OTHERS = ("DynamicQuantizeLSTM", "AttnLSTM")  # onnxruntime's own
# Operators whose results exporters leave as weights. None of them makes more numbers than it takes.
_FOLDED = ("Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_OPSET = 14  # the first that has all that is written


def _library(name: str = "onnx") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            'an ONNX file, and reading it needs the package onnx\npip install "jaxrnn[onnx]"'
        ) from error


def sniff(head: bytes) -> bool:
    # A protobuf message: its version, and then one of the fields of a model.
    return head[:1] == b"\x08" and 0 < head[1] < 64 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    """The weights of recurrent nodes by torch's names, and the graph's other arrays by their own.

    A node's prefix is its name, or the path of the module that torch exported. Consecutive nodes that torch made of the
    layers of one module are one again.

    Warns:
        UserWarning: nodes that compute what torch has not, and are left out; a nonlinearity or an initial state, which
            no weights hold.
    """
    what.check_no_key("an ONNX file")
    onnx = _library()
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            model = onnx.ModelProto.FromString(file.read())
        except Exception as error:  # protobuf's own
            raise CheckpointError(f"a damaged ONNX file: {error}\n{AGAIN}") from error
    if not model.graph.node and not model.graph.initializer:
        raise CheckpointError(f"an ONNX file without a graph\n{AGAIN}")
    budget = Budget(size)
    graph = _Graph(model.graph, os.path.dirname(os.fspath(path)), budget, list(model.opset_import))
    try:
        tensors, words = _weights(graph, budget)
        for name, tensor in graph.tensors.items():
            if name not in tensors and name not in graph.used and tensor.data_type != onnx.TensorProto.STRING:
                tensors[name] = graph.constant(name)
    except RecursionError as error:
        raise CheckpointError(f"an ONNX file whose graphs are nested too deeply\n{AGAIN}") from error
    for text in words:
        warn(path, text)
    for name, array in tensors.items():
        check_unicode(name)
        if dtype_of(array) == NO_NUMBERS:
            raise CheckpointError(f"{name} has dtype {array.dtype}, which is not of numbers\nconvert it before saving")
    return tensors


class _Graph:
    """A graph: its nodes, and the constants that they can use."""

    def __init__(self, graph: Any, folder: str, budget: Budget, opsets: Any, outer: "_Graph | None" = None) -> None:
        self.nodes = list(graph.node)
        self.tensors = {as_text(tensor.name): tensor for tensor in graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.folder, self.budget, self.opsets, self.outer = folder, budget, opsets, outer
        self.used: set[str] = set() if outer is None else outer.used  # by recurrent nodes
        self._made: dict[str, np.ndarray | None] = {}

    def inner(self) -> Iterator["_Graph"]:
        """The graphs in it, such as those of an If."""
        for node in self.nodes:
            for attribute in node.attribute:
                for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                    yield _Graph(graph, self.folder, self.budget, self.opsets, self)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a name, if the file alone says it."""
        if name not in self._made:
            self._made[name] = None  # for a loop, which only a damaged graph has
            if name in self.tensors:
                self._made[name] = self._array(name, self.tensors[name])
            elif node := self.producers.get(name):
                self._made[name] = self._value(node, name)
            elif self.outer is not None:
                return self.outer.constant(name)
        return self._made[name]

    def _array(self, name: str, tensor: Any) -> np.ndarray:
        try:
            array = np.asarray(_library("onnx.numpy_helper").to_array(tensor, self.folder))
        except Exception as error:  # onnx raises many kinds, and lets NumPy's through
            cause = f"{type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"a damaged ONNX file: {name} cannot be read: {cause}\n{AGAIN}") from error
        self.budget.spend(array.nbytes)
        return array

    def _value(self, node: Any, name: str) -> np.ndarray | None:
        if node.op_type == "Constant":
            tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            return self._array(name, tensors[0]) if tensors else None
        if node.op_type not in _FOLDED:
            return None
        inputs = {each: self.constant(each) for each in node.input if each}
        if any(array is None for array in inputs.values()):
            return None
        self.budget.spend(sum(array.nbytes for array in inputs.values() if array is not None))
        helper = _library("onnx.helper")
        described = [helper.make_tensor_value_info(each, 1, None) for each in (*inputs, name)]
        graph = helper.make_graph([node], "one", described[:-1], described[-1:])
        try:
            model = helper.make_model(graph, opset_imports=self.opsets)
            [made] = _library("onnx.reference").ReferenceEvaluator(model).run([name], inputs)
        except Exception as error:  # of NumPy, on what does not fit
            raise CheckpointError(f"a damaged ONNX file: {name} cannot be computed: {error}\n{AGAIN}") from error
        return np.asarray(made)


class _Layer(NamedTuple):
    """A recurrent node.

    Attributes:
        prefix: what the names of its weights start with.
        kind: "LSTM", "GRU" or "RNN".
        nonlinearity: an RNN's.
        names: of its weights in the graph.
        weights: torch's, by name without the layer, for each direction.
        above: the node that makes its input, if that could be the layer below.
        output: the name of its output.
    """

    prefix: str
    kind: str
    nonlinearity: str
    names: tuple[str, ...]
    weights: list[dict[str, np.ndarray]]
    above: str
    output: str

    def continues(self, other: "_Layer") -> bool:
        """Whether torch has both as layers of one module."""
        one, two = self.weights[0], other.weights[0]
        hidden = two["weight_hh"].shape[1]
        same = (self.prefix, self.kind, self.nonlinearity, len(self.weights)) == (
            other.prefix, other.kind, other.nonlinearity, len(other.weights),
        )  # fmt: skip
        same = same and one["weight_hh"].shape == two["weight_hh"].shape and one.keys() == two.keys()
        return same and self.above == other.output and one["weight_ih"].shape[1] == hidden * len(self.weights)


def _weights(graph: _Graph, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """The weights of all recurrent nodes by torch's names, and what there is to say of them."""
    left_out: list[str] = []
    words: list[str] = []
    layers: list[_Layer] = []
    graphs = [graph]
    while graphs:
        each = graphs.pop()
        graphs += each.inner()
        layers += _layers(each, left_out, words)
    for layer in layers:
        for weights in layer.weights:
            budget.spend(sum(array.nbytes for array in weights.values()))
    modules: list[list[_Layer]] = []
    for layer in layers:
        stack = next((stack for stack in modules if layer.continues(stack[-1])), None)
        if stack:
            stack.append(layer)
        elif all(layer.names != other.names for stack in modules for other in stack):  # not the same weights again
            modules.append([layer])
    tensors: dict[str, Any] = {}
    taken: set[str] = set()
    for stack in modules:
        prefix, number = stack[0].prefix, 1
        while prefix in taken:
            prefix, number = f"{stack[0].prefix}{number}.", number + 1
        taken.add(prefix)
        for level, layer in enumerate(stack):
            for suffix, weights in zip(("", "_reverse"), layer.weights, strict=False):
                tensors |= {f"{prefix}{role}_l{level}{suffix}": array for role, array in weights.items()}
        if stack[0].nonlinearity == "relu":
            words.append(
                f"{prefix or 'the RNN'} has relu, which weights do not say: make the module with nonlinearity='relu'"
            )
    if left_out:
        words.insert(0, f"left out nodes that torch does not have: {listed(left_out)}")
    return tensors, words


def _layers(graph: _Graph, left_out: list[str], words: list[str]) -> Iterator[_Layer]:
    for index, node in enumerate(graph.nodes):
        name = as_text(node.name or f"{node.op_type}_{index}")
        if node.op_type in _OTHERS:
            left_out.append(f"{name} ({node.op_type})")
        if node.op_type not in _ACTIVATIONS or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {a.name: a for a in node.attribute}
        nonlinearity, reasons = _read_attributes(node.op_type, attributes)
        inputs = [*map(as_text, node.input), *[""] * 8][:8]
        names = tuple(inputs[1:4])
        arrays = {"W": graph.constant(names[0]), "R": graph.constant(names[1])}
        if names[2]:
            arrays["B"] = graph.constant(names[2])
        peepholes = graph.constant(inputs[7]) if inputs[7] else None
        if any(array is None for array in arrays.values()) or (inputs[7] and peepholes is None):
            reasons.append("its weights are computed by the graph")
        if reasons:
            left_out.append(f"{name} ({', '.join(reasons)})")
            continue
        for state in filter(None, inputs[5:7]):
            if (first := graph.constant(state)) is not None and np.any(first):
                words.append(f"{name} starts from the state {state}, which is not zero: give it to each call as hx")
        try:
            weights = _by_direction(node.op_type, arrays, peepholes, _direction(attributes) == b"bidirectional")
        except CheckpointError as error:
            raise CheckpointError(f"its node {name}: {error}") from error
        graph.used.update(filter(None, (*names, inputs[7])))
        prefix = _prefix(node, name)
        above = _below(graph, inputs[0], len(weights), weights[0]["weight_ih"].shape[1])
        yield _Layer(prefix, node.op_type, nonlinearity, names, weights, above, node.output[0] if node.output else "")


def _read_attributes(kind: str, attributes: Mapping[str, Any]) -> tuple[str, list[str]]:
    """An RNN's nonlinearity, and what of the attributes torch does not have."""
    reasons = []
    if "clip" in attributes:
        reasons.append(f"clip={attributes['clip'].f:.6g}")
    if "input_forget" in attributes and attributes["input_forget"].i:
        reasons.append("input_forget=1")
    if (direction := _direction(attributes)) not in (b"forward", b"bidirectional"):
        reasons.append(f"direction={as_text(direction)}")
    if kind == "GRU" and not ("linear_before_reset" in attributes and attributes["linear_before_reset"].i):
        reasons.append("linear_before_reset=0, where torch's GRU has 1")
    usual = _ACTIVATIONS[kind]
    given = [as_text(text) for text in attributes["activations"].strings] if "activations" in attributes else usual
    repeated = given[: len(usual)] * (len(given) // len(usual)) == given
    relu = kind == "RNN" and {text.lower() for text in given} == {"relu"}
    if not relu and not (repeated and [text.lower() for text in given[: len(usual)]] == [u.lower() for u in usual]):
        reasons.append(f"activations={given}")
    return "relu" if relu else "tanh", reasons


def _direction(attributes: Mapping[str, Any]) -> bytes:
    return bytes(attributes["direction"].s) if "direction" in attributes else b"forward"


def _by_direction(
    kind: str, arrays: Mapping[str, Any], peepholes: np.ndarray | None, both: bool
) -> list[dict[str, np.ndarray]]:
    for name, array in arrays.items():
        if array.ndim != (2 if name == "B" else 3) or len(array) != 1 + both:
            raise CheckpointError(f"{name} has shape {array.shape}, which does not fit {1 + both} directions\n{AGAIN}")
    found = [DIALECTS["onnx", kind].read({name: a[d] for name, a in arrays.items()}) for d in range(1 + both)]
    if peepholes is not None:
        hidden = found[0]["weight_hh"].shape[1]
        if peepholes.shape != (len(found), 3 * hidden):
            raise CheckpointError(f"P has shape {peepholes.shape}, should be {(len(found), 3 * hidden)}\n{AGAIN}")
        for weights, row in zip(found, peepholes, strict=True):
            weights |= dict(zip(_PEEPHOLES, np.split(row, 3), strict=True))
    return found


def _prefix(node: Any, name: str) -> str:
    """The path of the module in torch, where the exporter left it; otherwise the node's name."""
    space = next((as_text(each.value) for each in node.metadata_props if each.key == "namespace"), "")
    path = [each.partition(":")[0] for each in space.split("/")][1:-1] if space else name.split("/")[1:-1]
    if not space and "/" not in name:
        return f"{name}."
    return "".join(f"{each}." for each in path)


def _below(graph: _Graph, name: str, directions: int, features: int) -> str:
    """The name whose directions are joined to the input of a layer, or "" if it is made in another way."""

    def attribute(node: Any, key: str) -> list[int]:
        return [int(value) for each in node.attribute if each.name == key for value in each.ints]

    def numbers(node: Any, place: int) -> list[int]:
        array = graph.constant(node.input[place]) if len(node.input) > place else None
        return [] if array is None or array.dtype.kind != "i" else [int(value) for value in array.reshape(-1)[:9]]

    for _ in range(9):
        node = graph.producers.get(name)
        if node is None or not node.input:
            break
        if node.op_type in ("Identity", "Dropout"):
            name = node.input[0]
        elif node.op_type == "Squeeze" and directions == 1 and [1] in (attribute(node, "axes"), numbers(node, 1)):
            return str(node.input[0])
        elif node.op_type == "Reshape" and numbers(node, 1)[2:] in ([-1], [features]):
            before = graph.producers.get(node.input[0])
            if before is not None and before.op_type == "Transpose" and attribute(before, "perm") == [0, 2, 1, 3]:
                return str(before.input[0])
            break
        else:
            break
    return ""


def graph_of(spec: Spec, params: Mapping[str, Any], lengths: bool, hx: bool) -> bytes:
    """The file of a model that runs layers as `jaxrnn.apply` does, without dropout."""
    onnx, helper = _library(), _library("onnx.helper")
    kind = spec.cell.name.partition("_")[0]
    dialect, directions, hidden = DIALECTS["onnx", kind], 1 + spec.bidirectional, spec.hidden_size
    arrays = {name: np.asarray(value) for name, value in params.items()}
    dtype = helper.np_dtype_to_tensor_dtype(arrays["weight_ih_l0"].dtype)
    nodes: list[Any] = []
    weights: dict[str, np.ndarray] = {}

    def node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, name=name or f"/{op}_{len(nodes)}", **attributes))
        return outputs[0]

    def constant(name: str, value: list[int]) -> str:  # unlike the weights, which are initializers
        return node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(value), name))

    x = node("Transpose", ["x"], ["x_time_first"], perm=[1, 0, 2]) if spec.batch_first else "x"
    joined = constant("joined", [0, 0, directions * hidden])
    states = [f"{name}_0" for name in spec.cell.states] if hx else []
    firsts: list[list[str]] = []
    for state in states:  # one for each layer
        firsts.append([f"{state}_l{layer}" for layer in range(spec.num_layers)])
        sizes = constant(f"{state}_sizes", [directions] * spec.num_layers)
        node("Split", [state, sizes], firsts[-1], axis=0)
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if spec.bidirectional else "forward",
    }
    if kind == "GRU":
        settings["linear_before_reset"] = 1
    if kind == "RNN":
        settings["activations"] = ["Relu" if spec.cell.name.endswith("RELU") else "Tanh"] * directions
    finals: list[list[str]] = [[] for _ in spec.cell.states]
    for layer in range(spec.num_layers):
        written = [
            dialect.write({role: arrays[name] for role, name in spec.names(layer, direction).items()})
            for direction in range(directions)
        ]
        if not spec.bias:
            written = [{name: array for name, array in each.items() if name != "B"} for each in written]
        made = {f"{name}_l{layer}": np.stack([each[name] for each in written]) for name in written[0]}
        weights |= made
        inputs = [x, *made, *[""] * (3 - len(made)), "lengths" if lengths else "", *[each[layer] for each in firsts]]
        ends = [f"{state}_n_l{layer}" for state in spec.cell.states]
        node(kind, inputs, [f"y_l{layer}", *ends], f"/{kind}_{layer}" if layer else f"/{kind}", **settings)
        for final, end in zip(finals, ends, strict=True):
            final.append(end)
        apart = node("Transpose", [f"y_l{layer}"], [f"y_transposed_l{layer}"], perm=[0, 2, 1, 3])
        x = node("Reshape", [apart, joined], [f"output_l{layer}"])
    node("Transpose", [x], ["output"], perm=[1, 0, 2]) if spec.batch_first else node("Identity", [x], ["output"])
    if keep := lengths and hx:  # onnxruntime returns zeros for rows of length 0
        zero, last = constant("zero", [0]), constant("last_axis", [1])
        counts = node("Cast", ["lengths"], ["lengths_int64"], to=onnx.TensorProto.INT64)
        empty = node("Unsqueeze", [node("Equal", [counts, zero], ["empty"]), last], ["empty_rows"])
    for state, final in zip(spec.cell.states, finals, strict=True):
        node("Concat", final, [f"{state}_of_layers" if keep else f"{state}_n"], axis=0)
        if keep:
            node("Where", [empty, f"{state}_0", f"{state}_of_layers"], [f"{state}_n"])
    outer = ["batch", "time"] if spec.batch_first else ["time", "batch"]
    state_shape = [spec.num_layers * directions, "batch", hidden]
    described = {
        "x": (dtype, [*outer, spec.input_size]),
        "lengths": (onnx.TensorProto.INT32, ["batch"]),
        "output": (dtype, [*outer, directions * hidden]),
    }
    described |= {name: (dtype, state_shape) for state in spec.cell.states for name in (f"{state}_0", f"{state}_n")}

    def values(names: Sequence[str]) -> list[Any]:
        return [helper.make_tensor_value_info(name, *described[name]) for name in names]

    graph = helper.make_graph(
        nodes,
        f"jaxrnn {kind}",
        values(["x", *states, *(["lengths"] if lengths else [])]),
        values(["output", *(f"{state}_n" for state in spec.cell.states)]),
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="jaxrnn")
    model.ir_version = 8  # what runtimes of 2021 and later read
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
