"""Files of ONNX: the weights of their LSTM, GRU and RNN nodes, with torch's names."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxrnn.cells import LSTM_CELL
from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.errors import AGAIN, RESET_BEFORE, CheckpointError, as_text, check_unicode, listed
from jaxrnn.checkpoint.formats import onnx_run
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.onnx_activations import cell_of
from jaxrnn.checkpoint.formats.onnx_graph import BUILTIN, LOOPS, File, Graph, library, value_of
from jaxrnn.checkpoint.formats.onnx_modules import OnnxContents, OnnxLayer, put_layers
from jaxrnn.checkpoint.formats.onnx_tables import FUNCTION, GRAPH, INPUTS, MODEL, NODE, OPERATORS, OUTPUTS
from jaxrnn.checkpoint.formats.reading import Reading, said_of_cell, warn
from jaxrnn.checkpoint.named import Described, Names
from jaxrnn.checkpoint.stored import Value, equal
from jaxrnn.checkpoint.tables import Finding, Table

_DIRECTIONS = ("forward", "reverse", "bidirectional")
_PEEPHOLES = ("weight_ci", "weight_co", "weight_cf")  # in ONNX's order

_VERBS = {"initial_h": "starts from", "initial_c": "starts its c from", "sequence_lens": "stops each row after"}
_RECURRENT = re.compile("LSTM|GRU|RNN", re.I)  # operators of others, such as AttnLSTM of onnxruntime
_LAYERS_NAME = re.compile(r"(?P<prefix>.*\.|)(?P<role>(weight|bias)_[ih]h)_(?P<place>l\d+(_reverse)?)", re.S | re.ASCII)
_CELLS_NAME = re.compile(r"(?P<prefix>.*\.|)weight_hh", re.S)


def sniff(head: bytes) -> bool:
    # A protobuf message: its version, and then one of the fields of a model.
    return (
        head[:1] == b"\x08"
        and 0 < int.from_bytes(head[1:2]) < 64
        and head[2:3] in (b"\x12", b"\x1a", b'"', b"(", b"2", b":", b"B")
    )


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    """The weights of recurrent nodes by torch's names, and the graph's other arrays by their own.

    A node's prefix is its name, or the path of the module that torch exported. Consecutive nodes that torch made of the
    layers of one module are one again. What nodes say of nonlinearity and batch_first is in `Described.said`.

    Warns:
        UserWarning: nodes that torch has no layer for, which are left out; what no weights hold: a nonlinearity,
            batch_first, an initial state, lengths; what jaxrnn does not know; a prefix that two nodes have.
    """
    what.check_no_key("an ONNX file")
    onnx = library()
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            model = onnx.ModelProto.FromString(file.read())
        except Exception as error:  # protobuf's own
            raise CheckpointError(f"a damaged ONNX file: {error}\n{AGAIN}") from error
    if not model.graph.node and not model.graph.initializer and not model.graph.sparse_initializer:
        raise CheckpointError(f"an ONNX file without a graph\n{AGAIN}")
    shared = File.of(model, os.path.dirname(os.fspath(path)), Budget(size))
    words = _unknown_fields(MODEL, model)
    try:
        tensors = _tensors(Graph(model.graph, shared, model.opset_import), words)
    except RecursionError as error:
        raise CheckpointError(f"an ONNX file whose graphs are nested too deeply\n{AGAIN}") from error
    for text in words:
        warn(path, text)
    for name, array in tensors.items():
        check_unicode(name)
        if dtype_of(array) == NO_NUMBERS:
            raise CheckpointError(f"{name} has dtype {array.dtype}, which is not of numbers\nconvert it before saving")
    return tensors


def _tensors(graph: Graph, words: list[str]) -> Described:
    """The weights of all recurrent nodes by torch's names, and other arrays."""
    found = OnnxContents([], [], set(), {}, {}, words)
    graphs = [graph]
    while graphs:
        each = graphs.pop()
        words += _unknown_fields(FUNCTION if hasattr(each.proto, "opset_import") else GRAPH, each.proto)
        inner: list[Graph] = []
        for index, node in enumerate(each.nodes):
            name = as_text(node.name or f"{as_text(node.op_type)}_{index}")
            inner += each.inside(node, name, _prefix(node, name) if each.function(node) is not None else "")
            _add(each, node, name, found)
        graphs += reversed(inner)  # in the order of the file
    for layer in found.layers:
        for weights in layer.weights:
            graph.file.budget.spend(sum(array.nbytes for array in weights.values()))
    tensors = Names[Any]("rename the node or the initializer in the model, and save it again")
    said, origins = put_layers(found, tensors)
    others = {
        name: array
        for name, tensor in graph.tensors.items()
        if name not in graph.file.used and tensor.data_type != library().TensorProto.STRING
        if (array := graph.constant(name)) is not None
    }
    _leave_out_parts(others, tensors, said, found)
    for name, array in {**others, **graph.file.states}.items():
        if name not in tensors or not equal(tensors[name], array):
            tensors.put(name, array, f"the initializer {name}")
    if found.left_out:
        words.insert(0, f"left out nodes that torch does not have: {listed(found.left_out)}")
    if loops := [name for name, multiplies in found.loops.items() if multiplies or not found.layers]:
        text = f"{listed(loops)} may be recurrent layers, written as loops over steps, which are not read"
        remedy = "read the weights from the library's own file: of Keras model.save('model.keras'), of torch"
        words.append(f"{text}: {remedy} torch.save(model.state_dict(), 'model.pt')")
    words[:] = dict.fromkeys(words)
    return Described(tensors, said, origins=origins)


def _unknown_fields(table: Table, message: Any) -> list[str]:
    fields = {field.name: value if type(value) in (int, str) else "..." for field, value in message.ListFields()}
    return [f"{table.title} has {finding}: {finding.row.words}" for finding in table.findings(fields)]


def _leave_out_parts(
    others: dict[str, np.ndarray], tensors: Mapping[str, Any], said: dict[str, dict[str, Any]], found: OnnxContents
) -> None:
    """Leave out initializers that have torch's names, but are not whole layers, or those of a node that is left out.

    What torch's exporter writes step by step is whole, if the weights kept their names. So are cells, which it always
    writes so.
    """
    for name in others:
        if (match := _CELLS_NAME.fullmatch(name)) and name not in tensors:
            said.update(_said_by_operators(match["prefix"], [others[name]], found))
    modules: dict[str, dict[str, list[str]]] = {}
    for name in others:
        if (match := _LAYERS_NAME.fullmatch(name)) and name not in tensors:
            modules.setdefault(match["prefix"], {}).setdefault(match["place"], []).append(match["role"])
    for prefix, places in modules.items():
        names = [f"{prefix}{role}_{place}" for place, roles in places.items() for role in roles]
        parts = any(not {"weight_ih", "weight_hh"} <= {*roles} for roles in places.values())
        if parts or prefix in found.odd:
            for name in names:
                del others[name]
        if prefix in found.odd:
            found.words.append(f"left out {listed(names)}, with the node that has them")
        elif parts:
            cause = f"left out {listed(names)}, whose other weights have no names, as in an RNN written step by step"
            found.words.append(f"{cause}: export it with torch.onnx.export(..., dynamo=False)")
        else:
            said.update(_said_by_operators(prefix, [others[name] for name in names if "weight_hh" in name], found))


def _said_by_operators(prefix: str, state_weights: list[np.ndarray], found: OnnxContents) -> dict[str, dict[str, Any]]:
    """What a module's operators say of an RNN: its nonlinearity, if there is one operator, and no gates."""
    operators = found.activations.get(prefix, set())
    simple = len(operators) == 1 and all(len({*array.shape}) == 1 for array in state_weights)
    return {prefix: {"nonlinearity": next(iter(operators)).lower()}} if simple else {}


def _add(graph: Graph, node: Any, name: str, found: OnnxContents) -> None:
    """Add what a node is, if it is a recurrence."""
    operator, builtin = as_text(node.op_type), node.domain in BUILTIN
    if graph.function(node) is not None:
        return
    if operator in OPERATORS and builtin:
        _add_recurrent(graph, node, name, found)
    elif _RECURRENT.search(operator):
        full = operator if builtin else f"{as_text(node.domain)}.{operator}"
        found.left_out.append(f"{name}{graph.where} ({full})")
    elif operator in LOOPS and builtin:
        found.loops[name + graph.where] = _multiplies(node)
    elif operator in ("Tanh", "Relu") and (name[:1] == "/" or any(e.key == "namespace" for e in node.metadata_props)):
        found.activations.setdefault(_prefix(node, name), set()).add(operator)


def _multiplies(node: Any) -> bool:
    """Whether there is a product of matrices in a node's graphs, as in the steps of a recurrent layer."""
    todo = [attribute.g for attribute in node.attribute]
    while todo:
        for each in todo.pop().node:
            if each.op_type in ("MatMul", "Gemm"):
                return True
            todo += [attribute.g for attribute in each.attribute]
    return False


def _add_recurrent(graph: Graph, node: Any, name: str, found: OnnxContents) -> None:
    operator, prefix = node.op_type, graph.path + _prefix(node, name)
    given = [each if graph.home(each)[1] else "" for each in map(as_text, node.input)]
    known = [each for each in INPUTS if each in OPERATORS[operator]]
    inputs = dict.fromkeys(INPUTS, "") | dict(zip(known, given, strict=False))
    attributes = {key: value_of(each) for key, each in graph.attributes_of(node).items()}
    arrays = {each: graph.constant(inputs[each]) for each in ("W", "R", "B", "P") if inputs[each] or each in "WR"}
    findings = list(OPERATORS[operator].findings(_settings(graph, node, attributes, inputs)))
    reasons = [_reason(finding) for finding in findings if finding.refused]
    cell = cell_of(operator, attributes)
    if isinstance(cell, str):
        reasons.append(cell)
    elif inputs["P"] and cell != LSTM_CELL:
        reasons.append("peepholes P with other activations")
    if (direction := attributes.get("direction", "forward")) not in _DIRECTIONS:
        reasons.append(f"direction={direction}"[:80])
    if (hidden := attributes.get("hidden_size")) is not None and _hidden(arrays["R"]) not in (None, hidden):
        reasons.append(f"hidden_size={hidden}, where its weights have {_hidden(arrays['R'])}")
    sources = [each for key in arrays for each in graph.sources(inputs[key])]
    if reasons:
        found.odd.add(prefix)
        found.odd.update(match["prefix"] for each in sources if (match := _LAYERS_NAME.fullmatch(each)))
    if any(array is None for array in arrays.values()):
        reasons.append("its weights are computed by the graph")
    if reasons or isinstance(cell, str):
        found.left_out.append(f"{name}{graph.where} ({', '.join(reasons)})")
        if any(finding.name == "linear_before_reset" for finding in findings):
            found.words.append(f"{name}{graph.where} {RESET_BEFORE}")
        return
    found.words.extend(_unknown_fields(NODE, node))
    found.words.extend(f"{name}{graph.where} {_sentence(finding)}" for finding in findings)
    both, reverse = direction == "bidirectional", direction == "reverse"
    try:
        weights = _by_direction(operator, {key: a for key, a in arrays.items() if key != "P"}, arrays.get("P"), both)
    except CheckpointError as error:
        raise CheckpointError(f"its node {name}{graph.where}: {error}") from error
    module = None if reverse else _module(graph, sources, weights)
    if module is not None:
        prefix = module[0]
    graph.file.used.update(each for each in sources if _LAYERS_NAME.fullmatch(each))
    homes = {each: graph.home(inputs[each]) for each in inputs}
    graph.file.used.update(homes[each][1] for each in arrays if homes[each][0].outer is None)
    said: dict[str, Any] = {"batch_first": True} if attributes.get("layout") else {}
    said |= said_of_cell(cell)
    features = weights[0]["weight_ih"].shape[1]
    above = None if attributes.get("layout") else _below(graph, inputs["X"], len(weights), features)
    output = graph, as_text(node.output[0]) if node.output else ""
    places = tuple(homes[each] for each in ("W", "R", "B", "P"))
    starts = tuple(homes[each] for each in ("initial_h", "initial_c") if inputs[each])
    if graph.looped:
        found.words.append(f"{name}{graph.where} runs once for each step of {graph.looped}: call {prefix!r} as often")
    found.layers.append(
        OnnxLayer(
            name + graph.where,
            prefix,
            None if module is None else module[1],
            operator,
            cell,
            said,
            places,
            weights,
            homes["sequence_lens"],
            reverse,
            above,
            output,
            starts,
            onnx_run.OnnxNode(
                operator,
                graph.attributes_of(node),
                {key: a for key, a in arrays.items() if a is not None},
                graph.opsets,
            ),
        )
    )


def _module(graph: Graph, sources: Iterable[str], weights: list[dict[str, np.ndarray]]) -> tuple[str, int] | None:
    """The prefix and the layer of torch's module whose weights these are, by the names of the initializers."""
    found: dict[tuple[str, bool], list[re.Match[str]]] = {}
    for name in sources:
        if match := _LAYERS_NAME.fullmatch(name):
            found.setdefault((match["role"], match["place"].endswith("_reverse")), []).append(match)
    places = set()
    for direction, some in enumerate(weights):
        for role, array in some.items():
            matches = [each for each in found.get((role, bool(direction)), ()) if len(each["place"]) < 20]
            same = [each for each in matches if _is(graph.constant(each[0]), array)]
            places.add((same[0]["prefix"], same[0]["place"].removesuffix("_reverse")) if same else None)
    [*one] = places if len(places) == 1 else {None}
    return None if one[0] is None else (one[0][0], int(one[0][1][1:]))


def _is(constant: np.ndarray | None, array: np.ndarray) -> bool:
    return constant is not None and equal(constant, array)


def _settings(graph: Graph, node: Any, attributes: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """The attributes, inputs and outputs of a node, by their names in the table of its operator."""
    table = OPERATORS[node.op_type]
    batch_first = bool(attributes.get("layout"))
    others = {*INPUTS, *OUTPUTS, "since_version"}  # names in the table that no attribute has
    settings = {
        **{f"attribute {name}" if name in others else name: value for name, value in attributes.items()},
        "since_version": _version(node.op_type, graph),
        "sequence_lens": _lengths(graph, inputs, batch_first),
        "initial_h": _start(graph, inputs["initial_h"], batch_first),
    }
    if inputs["initial_c"]:
        settings["initial_c"] = _start(graph, inputs["initial_c"], batch_first)
    for name in {"linear_before_reset", "input_forget"} & table.keys():
        settings[name] = int(bool(attributes.get(name)))  # all but 0 is 1
    for what, names, known in (("input", node.input, INPUTS), ("output", node.output, OUTPUTS)):
        places = range(sum(each in table for each in known), len(names))
        settings |= {f"{what} {place}": as_text(names[place]) for place in places if names[place]}
    return settings


def _version(kind: str, graph: Graph) -> int:
    """The version of an operator in a graph: that of the set of operators in which it changed last."""
    version = next((int(each.version) for each in graph.opsets if each.domain in BUILTIN), 1)
    onnx = library("onnx.defs")
    try:
        return int(onnx.get_schema(kind, version, "").since_version)
    except (onnx.SchemaError, TypeError):
        return version


def _hidden(state_weights: np.ndarray | None) -> int | None:
    return None if state_weights is None or not state_weights.ndim else int(state_weights.shape[-1])


def _reason(finding: Finding) -> str:
    value = f"{finding.value:.6g}" if isinstance(finding.value, float) else str(finding.value)[:80]
    return f"{finding.name}={value}" + (f", {finding.row.words}" if finding.row.words else "")


def _sentence(finding: Finding) -> str:
    """A warning about a finding, without the name of the node, which comes first."""
    what = f"{_VERBS[finding.name]} {finding.value}" if finding.name in _VERBS else f"has {finding}"
    return f"{what}: {finding.row.words}"


def _start(graph: Graph, name: str, batch_first: bool) -> str | None:
    """The state by which a node starts; None if it is zero, or an input of the model."""
    if not name:
        return None
    shape = " of shape (batch, directions, hidden)" if batch_first else ""
    if (array := graph.constant(name)) is not None:
        return f"the state {_keep(graph, name, array)}{shape}, which is not zero" if np.any(array) else None
    leaves = graph.leaves(name)
    if leaves.computed or (leaves.arrays and leaves.given):
        return f"the state {name}{shape}, which the graph computes"
    names = [_keep(each, inner, array) for (each, inner), array in leaves.arrays.items()]
    return f"the state {name}{shape}, which the graph makes of {listed(names)}" if names else None


def _lengths(graph: Graph, inputs: Mapping[str, str], batch_first: bool) -> str | None:
    """The lengths of rows; None if the file says that they are all of x, or if they are an input of the model.

    A constant is all of x only where the file fixes how long x is: then the model takes no other.
    """
    if not (name := inputs["sequence_lens"]):
        return None
    steps = graph.axis(inputs["X"], int(batch_first))
    if (array := graph.constant(name)) is not None:
        whole = isinstance(steps, int) and np.all(array == steps)
        numbers = listed(array.reshape(-1)[:99].tolist())
        return None if whole else f"the steps in {_keep(graph, name, array)} ({numbers})"
    if graph.sizes(name) == [steps]:
        return None
    leaves = graph.leaves(name)
    given = leaves.given and not leaves.arrays and not leaves.computed
    return None if given else f"the steps in {name}, which the graph computes"


def _keep(graph: Graph, name: str, array: np.ndarray) -> str:
    """The name under which a constant is returned. Branches may have others of the same name."""
    home, name = graph.home(name)
    top = home
    while top.outer is not None:
        top = top.outer
    if home is top and name in top.tensors:
        return name
    states, key, number = graph.file.states, name, 1
    while key in top.tensors or (key in states and not equal(states[key], array)):
        key, number = f"{name}.{number}", number + 1
    states[key] = array
    return key


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


def _below(graph: Graph, name: str, directions: int, features: int) -> tuple[Graph, str] | None:
    """Where the value is whose directions are joined to the input of a layer; None if it is made in another way."""
    graph, name = graph.home(name)
    for _ in range(9):
        node = graph.producers.get(name)
        if node is None or not node.input:
            break
        first, before = as_text(node.input[0]), graph.home(as_text(node.input[0]))
        if node.op_type in ("Identity", "Dropout"):
            graph, name = before
        elif node.op_type == "Squeeze" and directions == 1 and graph.numbers(node, "axes", 1) == [1]:
            return before
        elif node.op_type == "Reshape" and len(node.input) > 1:
            sizes = graph.sizes(as_text(node.input[1]))
            joined = graph.numbers(node, "shape", 1)[2:] in ([-1], [features])
            joined = joined or sizes[:2] == [graph.axis(first, 0), graph.axis(first, 1)]
            apart: Any = before[0].producers.get(before[1])
            transposed = apart is not None and apart.op_type == "Transpose" and apart.input
            if joined and transposed and before[0].numbers(apart, "perm", 9) == [0, 2, 1, 3]:
                return before[0].home(as_text(apart.input[0]))
            break
        else:
            break
    return None
