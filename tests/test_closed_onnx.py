"""ONNX, closed: what a file says is used, changes nothing, or is named with a remedy that works; no name is lost."""

import dataclasses
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns, load
from jaxrnn.checkpoint.formats import onnx as reader

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
_apply = jax.jit(jaxrnn.apply, static_argnums=0)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, F, H = 5, 2, 2, 3


def _schemas(kind: str) -> list[Any]:
    every = onnx.defs.get_all_schemas_with_history()
    found = [each for each in every if each.name == kind and each.domain == ""]
    return sorted(found, key=lambda schema: schema.since_version)


def _attribute(kind: str, name: str) -> tuple[Any, Any]:
    """The last schema that has an attribute, and the attribute."""
    return next((each, each.attributes[name]) for each in reversed(_schemas(kind)) if name in each.attributes)


@pytest.mark.parametrize("kind", reader.OPERATORS)
def test_the_tables_have_all_of_onnxs_operators(kind: str) -> None:
    table = reader.OPERATORS[kind]
    for schema in _schemas(kind):
        names = [*schema.attributes, *(each.name for each in (*schema.inputs, *schema.outputs))]
        assert [name for name in names if name not in table] == [], f"{kind} of version {schema.since_version}"
        assert [each.name for each in schema.inputs] == [name for name in reader.INPUTS if name in table]
        assert [each.name for each in schema.outputs] == [name for name in reader.OUTPUTS if name in table]
    assert table["since_version"].plain == tuple(schema.since_version for schema in _schemas(kind))


def test_all_recurrent_operators_are_known_as_such() -> None:
    names = {each.name for each in onnx.defs.get_all_schemas_with_history()}
    runtime = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    names |= {each.name for each in runtime.get_all_operator_schema()}
    assert {name for name in names if reader._RECURRENT.search(name)} == {
        *reader.OPERATORS, "AttnLSTM", "DynamicQuantizeLSTM", "GRUUnit",
    }  # fmt: skip
    assert {"Loop", "Scan", "If"} == {
        each.name for each in onnx.defs.get_all_schemas() if each.domain == "" and "GRAPH" in str(_types(each))
    } - {"SequenceMap"}


def _types(schema: Any) -> list[Any]:
    return [each.type for each in schema.attributes.values()]


MESSAGES = {
    "ModelProto": reader.MODEL,
    "GraphProto": reader.GRAPH,
    "NodeProto": reader.NODE,
    "FunctionProto": reader.FUNCTION,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_the_tables_have_all_fields(message: str) -> None:
    fields = {field.name for field in getattr(onnx, message).DESCRIPTOR.fields}
    assert MESSAGES[message].keys() == fields


@dataclasses.dataclass
class Case:
    """A model of one node, and what is to be said of it.

    Attributes:
        kind: the operator.
        attributes: of the node, beside hidden_size, and linear_before_reset=1 of a GRU.
        inputs: names of the node's optional inputs, by the schema's names.
        arrays: initializers, beside the weights.
        nodes: those before the recurrent one.
        feeds: inputs of the model beside X.
        outputs: names of the node's outputs.
        silent: whether there must be no warning.
        reference: whether to run ONNX's own reference, for what onnxruntime refuses.
        without: attributes that neither takes.
    """

    kind: str
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    nodes: list[Any] = dataclasses.field(default_factory=list)
    feeds: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ("Y", "Y_h")
    opset: int = 14
    static: bool = False
    hidden: int = H
    silent: bool = False
    reference: bool = False
    without: tuple[str, ...] = ()

    @property
    def directions(self) -> int:
        return 1 + (self.attributes.get("direction") == "bidirectional")

    @property
    def x(self) -> np.ndarray:
        return normal(*((B, T) if self.attributes.get("layout") else (T, B)), F).astype("f4")

    def model(self, more_outputs: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Any:
        rows, hidden, helper = GATES[self.kind] * self.hidden, self.hidden, onnx.helper
        shapes = {"W": (rows, F), "R": (rows, hidden), "B": (2 * rows,)}
        arrays = {n: normal(self.directions, *s, seed=len(s)).astype("f4") for n, s in shapes.items()} | self.arrays
        attributes = {"hidden_size": hidden, "linear_before_reset": 1 if self.kind == "GRU" else None} | self.attributes
        attributes = {name: value for name, value in attributes.items() if name not in without and value is not None}
        known = [name for name in reader.INPUTS if name in reader.OPERATORS[self.kind]]
        inputs = {"X": "X", "W": "W", "R": "R", "B": "B"} | self.inputs
        node = helper.make_node(self.kind, [inputs.get(each, "") for each in known], self.outputs, "one", **attributes)
        outer = ([B, T] if self.attributes.get("layout") else [T, B]) if self.static else [None, None]
        given = [helper.make_tensor_value_info("X", 1, [*outer, F])]
        for name, array in self.feeds.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            given.append(helper.make_tensor_value_info(name, kind, array.shape))
        names = [name for name in (*self.outputs, *more_outputs) if name]
        tensors = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items() if n != "B" or inputs["B"]]
        outputs = [helper.make_tensor_value_info(name, 1, None) for name in names]
        for name, value in zip(names, outputs, strict=True):
            if "lens" in name:
                value.type.tensor_type.elem_type = onnx.TensorProto.INT32
        graph = helper.make_graph([*self.nodes, node], "test", given, outputs, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 8
        return model

    def run(self, more_outputs: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """What onnxruntime computes, or ONNX's own reference what onnxruntime has not."""
        names = [name for name in (*self.outputs, *more_outputs) if name]
        if self.attributes.get("layout") or self.opset < 7 or self.reference:
            from onnx.reference import ReferenceEvaluator

            # Both begin at version 7, before which the equations were the same.
            newer = dataclasses.replace(self, opset=max(7, self.opset))
            session: Any = ReferenceEvaluator(newer.model(more_outputs, self.without))
        else:
            runtime = pytest.importorskip("onnxruntime")
            session = runtime.InferenceSession(self.model(more_outputs).SerializeToString())
        return dict(zip(names, session.run(names, {"X": self.x, **self.feeds}), strict=True))


def _usual(kind: str) -> list[str]:
    return {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[kind]


def _of_an_attribute(kind: str, name: str) -> Iterator[Case]:
    """Other values of an attribute, by its type in the schema."""
    schema, attribute = _attribute(kind, name)
    opset, kinds = max(schema.since_version, 7), onnx.defs.OpSchema.AttrType
    if name == "output_sequence":
        opset = schema.since_version
    if name == "hidden_size":
        yield Case(kind, hidden=5, silent=True)
        yield Case(kind, {"hidden_size": None}, reference=True, silent=True)
        yield Case(kind, {"hidden_size": 4}, reference=True)
    elif attribute.type == kinds.INT:
        without = (name,) if opset < 7 else ()
        for value in (0, 1):
            yield Case(kind, {name: value}, opset=opset, without=without)
    elif attribute.type == kinds.FLOAT:
        yield Case(kind, {name: 0.1}, opset=opset)
        yield Case(kind, {name: float(np.finfo("f4").max)}, opset=opset, silent=True)
    elif attribute.type == kinds.FLOATS:
        yield Case(kind, {name: [0.3] * len(_usual(kind))}, opset=opset, silent=True)
    elif attribute.type == kinds.STRING:
        for value in re.findall(r"forward|reverse|bidirectional", attribute.description):
            yield Case(kind, {name: value}, opset=opset, silent=value != "reverse")
    elif attribute.type == kinds.STRINGS:
        for function in re.findall(r"^[* ]*(\w+)\(x\)", schema.doc, re.M):
            values = [function] * len(_usual(kind))
            more = {"activation_alpha": [0.3] * 3, "activation_beta": [0.2] * 3}
            plain = function in ("Sigmoid", "Tanh", "Relu")
            yield Case(kind, {name: values, **({} if plain else more)}, opset=opset)
            if plain:
                both = {"direction": "bidirectional"}
                yield Case(kind, {name: [*_usual(kind), *values], **both}, opset=opset)
                yield Case(kind, {name: [*values, *_usual(kind)], **both}, opset=opset)
                yield Case(kind, {name: [*values, *values], **both}, opset=opset)
        if kind != "RNN":  # onnxruntime takes only Tanh with a capital
            yield Case(kind, {name: [text.upper() for text in _usual(kind)]}, opset=opset, silent=True)


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, inputs, [output], f"/{output}", **attributes)


def _tensor(value: Any, dtype: str) -> Any:
    return onnx.numpy_helper.from_array(np.array([value], dtype))


def _of_lengths(kind: str) -> Iterator[Case]:
    shape = [_node("Shape", ["X"], "shape")]
    numbers = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    time = [_node("Slice", ["shape", "zero", "one"], "time"), _node("Cast", ["time"], "steps", to=6)]
    rows = [_node("Gather", ["shape", "one"], "rows")]
    made = {"inputs": {"sequence_lens": "lens"}}
    yield Case(kind, arrays={"lens": np.array([3, 5], np.int32)}, **made)
    yield Case(kind, {"direction": "bidirectional"}, arrays={"lens": np.array([1, 4], np.int32)}, **made)
    yield Case(kind, arrays={"lens": np.array([T, T], np.int32)}, static=True, silent=True, **made)
    yield Case(kind, arrays={"lens": np.array([T, 2], np.int32)}, static=True, **made)
    yield Case(kind, feeds={"lens": np.array([2, 4], np.int32)}, silent=True, **made)
    for operator in ("Expand", "Tile"):  # as tf2onnx and others write that all rows are whole
        nodes = [*shape, *time, *rows, _node(operator, ["steps", "rows"], "lens")]
        yield Case(kind, nodes=nodes, arrays=numbers, silent=True, **made)
    # The number of rows, and a step less, are not the number of steps.
    nodes = [*shape, *rows, _node("Cast", ["rows"], "few", to=6), _node("Expand", ["few", "rows"], "lens")]
    yield Case(kind, nodes=nodes, arrays=numbers, **made)
    nodes = [*shape, *time, *rows, _node("Sub", ["steps", "less"], "fewer"), _node("Expand", ["fewer", "rows"], "lens")]
    yield Case(kind, nodes=nodes, arrays={**numbers, "less": np.array([1], np.int32)}, **made)


def _of_a_state(kind: str, name: str) -> Iterator[Case]:
    state, row = normal(1, B, H, seed=7).astype("f4"), normal(1, 1, H, seed=8).astype("f4")
    given = {"inputs": {name: "state"}}
    sizes = {"sizes": np.array([1, B, H])}
    yield Case(kind, arrays={"state": state}, **given)
    yield Case(kind, arrays={"state": 0 * state}, silent=True, **given)
    yield Case(kind, feeds={"state": state}, silent=True, **given)
    yield Case(kind, feeds={"theirs": state}, nodes=[_node("Cast", ["theirs"], "state", to=1)], silent=True, **given)
    yield Case(kind, arrays={"first": row, **sizes}, nodes=[_node("Expand", ["first", "sizes"], "state")], **given)
    for value in (0.0, 0.5):
        nodes = [_node("ConstantOfShape", ["sizes"], "state", value=_tensor(value, "f4"))]
        yield Case(kind, arrays=sizes, nodes=nodes, silent=not value, **given)
    nodes = [_node("Expand", ["zero", "sizes"], "state")]
    yield Case(kind, arrays={"zero": np.zeros(1, "f4"), **sizes}, nodes=nodes, silent=True, **given)
    yield Case(kind, arrays={"raw": state}, nodes=[_node("Tanh", ["raw"], "state")], **given)
    batch_first = state.transpose(1, 0, 2).copy()
    yield Case(kind, {"layout": 1}, arrays={"state": batch_first}, **given)


def _of_a_weight(kind: str, name: str) -> Iterator[Case]:
    rows = GATES[kind] * H
    if name == "B":
        yield Case(kind, inputs={"B": ""}, silent=True)
    if name == "P":
        yield Case(kind, inputs={"P": "P"}, arrays={"P": normal(1, 3 * H).astype("f4")}, silent=True)
        return
    shape = {"W": (1, rows, F), "R": (1, rows, H), "B": (1, 2 * rows)}[name]
    array = normal(*shape, seed=9).astype("f4")
    yield Case(kind, arrays={name: array}, silent=True)
    constant = _node("Constant", [], "made", value=onnx.numpy_helper.from_array(array))
    yield Case(kind, inputs={name: "made"}, nodes=[constant], silent=True)
    flat = _node("Constant", [], "flat", value_floats=array.reshape(-1).tolist())
    nodes = [flat, _node("Constant", [], "shape", value_ints=list(shape)), _node("Reshape", ["flat", "shape"], "made")]
    yield Case(kind, inputs={name: "made"}, nodes=nodes, silent=True)
    yield Case(kind, inputs={name: "made"}, arrays={"raw": array}, nodes=[_node("Tanh", ["raw"], "made")])


def _cases(kind: str, name: str) -> list[Case]:
    """Models in which a row of the table has another value."""
    if any(name in schema.attributes for schema in _schemas(kind)):
        return list(_of_an_attribute(kind, name))
    if name == "since_version":
        return [Case(kind, opset=each.since_version, silent=True) for each in _schemas(kind)]
    if name in reader.OUTPUTS:
        every = [each for each in reader.OUTPUTS if each in reader.OPERATORS[kind]]
        return [Case(kind, outputs=tuple("" if each == name else each for each in every), silent=True)]
    if name == "sequence_lens":
        return list(_of_lengths(kind))
    if name.startswith("initial"):
        return list(_of_a_state(kind, name))
    if name == "X":
        return [Case(kind, silent=True), Case(kind, {"direction": "bidirectional"}, static=True, silent=True)]
    return list(_of_a_weight(kind, name))


def _loaded(model: Any, tmp_path: Path) -> tuple[Any, list[str]]:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = load(path)
    return tensors, [str(each.message).removeprefix(f"{path}: ") for each in caught]


def _follow(case: Case, words: list[str], tensors: Any, states: int) -> dict[str, Any]:
    """The arguments that warnings tell to give."""
    first: dict[str, Any] = {name: case.feeds[value] for name, value in case.inputs.items() if value in case.feeds}
    if "theirs" in case.feeds:
        first = dict.fromkeys(case.inputs, case.feeds["theirs"])
    for text in words:
        if match := re.match(r"one (?P<c>starts its c|starts) from the state (?P<name>[^ ,]+)", text):
            assert text.endswith(": give it to each call as hx")
            name, made = match["name"], re.search(r"makes of ([^:]+):", text)
            state = tensors[made[1]] if made else tensors[name] if "not zero" in text else case.run((name,))[name]
            if "of shape (batch, directions, hidden)" in text:
                state = np.swapaxes(state, 0, 1)
            first["initial_c" if "its c" in match["c"] else "initial_h"] = np.broadcast_to(state, (1, B, H))
        elif "stops each row after the steps in" in text:
            assert text.endswith(": give them to each call as lengths")
            name = text.split("steps in ")[1].partition(",")[0].partition(" ")[0]
            first["sequence_lens"] = tensors[name] if name in tensors else case.run((name,))[name]
    # Always both, since zeros and all steps are the same as none, so that fewer programs are compiled.
    zero = np.zeros((case.directions, B, case.hidden), "f4")
    each = [jnp.asarray(first.get(name, zero)) for name in ("initial_h", "initial_c")[:states]]
    lengths = first.get("sequence_lens", np.full(B, T, np.int32))
    return {"lengths": jnp.asarray(lengths), "hx": tuple(each) if states > 1 else each[0]}


def _check(case: Case, row: str, tmp_path: Path) -> str:
    """Load a model and compare; return what became of it."""
    tensors, words = _loaded(case.model(), tmp_path)
    if any(text.startswith("left out") for text in words):
        assert not case.silent, words
        assert f"{row}=" in words[0] or ("computed by the graph" in words[0] and "raw" in case.arrays), words
        assert find_rnns(tensors) == []
        return "left out"
    assert not (case.silent and words), words
    [found] = find_rnns(tensors)
    params = {name.removeprefix("one."): jnp.asarray(array) for name, array in tensors.items() if "one." in name}
    given = _follow(case, words, tensors, len(found.spec.cell.states))
    output, last = _apply(found.spec, params, jnp.asarray(case.x), **given)
    theirs = case.run()
    both = case.directions * case.hidden
    if "Y" in theirs:
        y = theirs["Y"] if case.attributes.get("layout") else theirs["Y"].transpose(0, 2, 1, 3)
        assert_close(output, y.reshape(*y.shape[:2], both), atol=1e-6, rtol=1e-6)
    if "Y_h" in theirs:
        h = theirs["Y_h"].transpose(1, 0, 2) if case.attributes.get("layout") else theirs["Y_h"]
        assert_close(last[0] if isinstance(last, tuple) else last, h, atol=1e-6, rtol=1e-6)
    return "warned" if words else "used"


ROWS = [(kind, name) for kind, table in reader.OPERATORS.items() for name in table]
_QUICK = {("LSTM", name) for name in ("sequence_lens", "initial_h", "clip", "input_forget", "layout", "activations")}


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*row, marks=[] if row in _QUICK else pytest.mark.slow) for row in ROWS]
)
def test_each_setting_is_used_or_neutral_or_named(kind: str, name: str, tmp_path: Path) -> None:
    cases = _cases(kind, name)
    assert cases, f"no other value for {name} of {kind}"
    became = [_check(case, name, tmp_path) for case in cases]
    use = reader.OPERATORS[kind][name].use
    if use == "refused" and name not in ("layout",):
        assert "left out" in became
    if use == "warned" and name != "since_version":
        assert "warned" in became
    if use == "neutral":
        assert set(became) == {"used"}


def _values(*names: str, sizes: Any = None) -> list[Any]:
    return [onnx.helper.make_tensor_value_info(name, 1, sizes) for name in names]


def _arrays(kind: str, prefix: str, features: int = F, seed: int = 0) -> dict[str, np.ndarray]:
    rows = GATES[kind] * H
    shapes = {"W": (1, rows, features), "R": (1, rows, H), "B": (1, 2 * rows)}
    return {f"{prefix}{key}": normal(*s, seed=seed + len(key + prefix)).astype("f4") for key, s in shapes.items()}


def _recurrent(
    kind: str, prefix: str, x: str, y: str, name: str | None = None, more: Any = (), **attributes: Any
) -> Any:
    if kind == "GRU":
        attributes = {"linear_before_reset": 1} | attributes
    inputs = [x, *(f"{prefix}{key}" for key in "WRB"), *more]
    name = prefix if name is None else name
    return onnx.helper.make_node(kind, inputs, [y], name, **({"hidden_size": H} | attributes))


def _graph(nodes: list[Any], arrays: dict[str, Any], inputs: Any = (), outputs: tuple[str, ...] = ("Y",)) -> Any:
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return onnx.helper.make_graph(
        nodes, "test", inputs or _values("X", sizes=[None, None, F]), _values(*outputs), tensors
    )


def _model(graph: Any, functions: Any = (), opset: int = 14) -> Any:
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("local", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions)
    model.ir_version = 8
    return model


def _function(name: str, nodes: list[Any], inputs: list[str], **attributes: int) -> Any:
    opsets = [onnx.helper.make_opsetid("", 14), onnx.helper.make_opsetid("local", 1)]
    defaults = [onnx.helper.make_attribute(key, value) for key, value in attributes.items()]
    return onnx.helper.make_function("local", name, inputs, ["Y"], nodes, opsets, attribute_protos=defaults)


def _refers(node: Any, name: str, other: str) -> Any:
    """The node, whose attribute is the function's."""
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.AttributeProto(name=name, ref_attr_name=other, type=onnx.AttributeProto.INT)])
    return node


def _everything() -> Any:
    """A model in which every field that is used matters: two layers, and a function, after an operator."""
    layers = []
    for number, x in enumerate(("Z", "S0")):
        layers.append(_recurrent("GRU", f"gru{number}", x, f"Y{number}", more=["lens"]))
        layers[-1].metadata_props.add(key="namespace", value=": Model/enc: torch.nn.GRU/gru: aten.gru.input")
        layers.append(_node("Squeeze", [f"Y{number}", "one"], f"S{number}"))
    arrays = _arrays("GRU", "gru0") | _arrays("GRU", "gru1", H) | _arrays("GRU", "block")
    sparse = arrays.pop("blockR")
    arrays["lens"], arrays["one"] = np.array([T, T], np.int32), np.array([1])
    body = [
        _node("Identity", ["v"], "Q"),
        _node("Constant", [], "axis", value_ints=[0]),
        _node("Unsqueeze", ["w", "axis"], "deeper"),
        _refers(_recurrent("GRU", "", "Q", "Y", "inner", ["lens"]), "linear_before_reset", "linear"),
    ]
    body[-1].input[1:5] = ["deeper", "r", "b", "l"]
    arrays["blockW"] = arrays["blockW"][0]
    function = _function("Block", body, ["v", "w", "r", "b", "l"], linear=1)
    function.value_info.extend(_values("Q", sizes=[T, B, F]))
    call = onnx.helper.make_node("Block", ["P", "blockW", "blockR", "blockB", "lens"], ["Y"], "block", domain="local")
    first = [_node("Relu", ["X"], "A"), _node("Tanh", ["A"], "Z"), _node("Sin", ["A"], "P")]
    graph = _graph([*first, *layers, call], arrays, _values("X", sizes=[T, B, F]))
    graph.value_info.extend(_values("Z", sizes=[T, B, F]))
    places = np.arange(sparse.size)
    values = onnx.numpy_helper.from_array(sparse.reshape(-1), "blockR")
    graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(places), sparse.shape)
    )
    flat = {**_arrays("RNN", "rnn"), "zero": np.array([0])}
    flat["flat"] = flat.pop("rnnB")[0]
    graph.node.append(_node("Unsqueeze", ["flat", "zero"], "rnnB"))
    graph.node.append(_recurrent("RNN", "rnn", "X", "R", more=["lens"]))
    graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in flat.items())
    return _model(graph, [function])


def _summary(model: Any, tmp_path: Path) -> Any:
    try:
        tensors, words = _loaded(model, tmp_path)
    except CheckpointError as error:
        return str(error)
    return {name: array.tobytes() for name, array in tensors.items()}, words, tensors.said


def _places(message: str, model: Any) -> list[Any]:
    return {
        "ModelProto": [model],
        "GraphProto": [model.graph],
        "NodeProto": [node for node in model.graph.node if node.op_type in ("GRU", "Block")],
        "FunctionProto": list(model.functions),
    }[message]


def _change(message: Any, field: Any) -> None:
    """Give a field another value: none, or if it has none, some."""
    value = getattr(message, field.name)
    of_a_function = message.DESCRIPTOR.name == "FunctionProto" and field.name in ("name", "domain")
    if isinstance(value, str) and (of_a_function or not value):
        setattr(message, field.name, "other")
    elif isinstance(value, int):
        setattr(message, field.name, value + 1)
    elif not isinstance(value, str) and hasattr(value, "add") and not value:
        value.add()
    elif not isinstance(value, str) and hasattr(value, "append") and not value:
        value.append("other")
    else:
        message.ClearField(field.name)


FIELDS = [(message, name) for message, table in MESSAGES.items() for name in table]


@pytest.mark.parametrize(("message", "name"), FIELDS)
def test_each_field_is_used_or_neutral(message: str, name: str, tmp_path: Path) -> None:
    before, changed = _summary(_everything(), tmp_path), []
    assert isinstance(before, tuple)
    assert before[1] == []
    for place in range(len(_places(message, _everything()))):
        model = _everything()
        each = _places(message, model)[place]
        _change(each, each.DESCRIPTOR.fields_by_name[name])
        changed.append(_summary(model, tmp_path) != before)
    assert any(changed) == (MESSAGES[message][name].use == "used")


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_in_no_table_is_named(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("doc_string", "name") if message != "ModelProto" else ("producer_name",):
        model = _everything()
        setattr(_places(message, model)[0], name, "gru0" if name == "name" else "new")
        if message == "FunctionProto" and name == "name":
            continue
        row = MESSAGES[message][name]
        monkeypatch.delitem(MESSAGES[message], name)
        _, words = _loaded(model, tmp_path)
        assert any(f"ONNX's {message} has {name}=" in text and "does not know" in text for text in words)
        monkeypatch.setitem(MESSAGES[message], name, row)


def test_a_hidden_size_that_is_not_the_weights(tmp_path: Path) -> None:
    _, words = _loaded(Case("LSTM", {"hidden_size": 4}).model(), tmp_path)
    assert words == ["left out nodes that torch does not have: one (hidden_size=4, where its weights have 3)"]


def test_sparse_initializers_are_returned(tmp_path: Path) -> None:
    model, array = _model(_graph([_node("Tanh", ["X"], "Y")], {})), np.array([[0, 0, 2.0], [3, 0, 0]])
    values = onnx.numpy_helper.from_array(np.array([2.0, 3.0]), "sparse")
    for places in (np.array([2, 3]), np.array([[0, 2], [1, 0]])):
        del model.graph.sparse_initializer[:]
        indices = onnx.numpy_helper.from_array(places)
        model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, array.shape))
        tensors, words = _loaded(model, tmp_path)
        assert words == []
        assert np.array_equal(tensors["sparse"], array)
    for dims, cause in (([10**6, 10**6], "a bomb"), ([1, 2], "cannot be read"), ([-1, 3], "cannot be read")):
        model.graph.sparse_initializer[0].dims[:] = dims
        with pytest.raises(CheckpointError, match=f"{cause}.*\n"):
            _loaded(model, tmp_path)


def test_attributes_and_inputs_that_nobody_knows_are_named(tmp_path: Path) -> None:
    node = _recurrent("GRU", "one", "X", "Y", more=["", "", "seventh"], new=2, since_version=3)
    node.output.extend(["h", "third"])
    _, words = _loaded(_model(_graph([node], _arrays("GRU", "one"))), tmp_path)
    assert [text.partition(": ")[0] for text in words] == [
        "one has new=2", "one has attribute since_version=3", "one has input 6='seventh'", "one has output 2='third'",
    ]  # fmt: skip


def test_branches_with_the_same_names_keep_both(tmp_path: Path) -> None:
    """Their weights, and their first states."""
    inner = []
    for seed in (0, 5):
        arrays = _arrays("GRU", "one", seed=seed) | {"first": normal(1, B, H, seed=seed + 7).astype("f4")}
        inner.append(_graph([_recurrent("GRU", "one", "X", "Y", more=["", "first"])], arrays))
        del inner[-1].input[:]
    node = onnx.helper.make_node("If", ["C"], ["Y"], "if", then_branch=inner[0], else_branch=inner[1])
    condition = onnx.helper.make_tensor_value_info("C", onnx.TensorProto.BOOL, [])
    model = _model(_graph([node], {}, [*_values("X", sizes=[None, None, F]), condition]))
    tensors, words = _loaded(model, tmp_path)
    assert words == [
        "one in else_branch of if starts from the state first, which is not zero: give it to each call as hx",
        "one in then_branch of if starts from the state first.1, which is not zero: give it to each call as hx",
        "the nodes one in else_branch of if and one in then_branch of if have the prefix 'one.': load the second with "
        "the prefix 'one.1.', or give the nodes other names",
    ]
    runtime, x = pytest.importorskip("onnxruntime"), normal(T, B, F).astype("f4")
    session = runtime.InferenceSession(model.SerializeToString())
    theirs = [session.run(None, {"X": x, "C": np.array(condition)})[0][:, 0] for condition in (False, True)]
    for found, first in zip(find_rnns(tensors), ("first", "first.1"), strict=True):
        params = {name: jnp.asarray(tensors[found.prefix + name]) for name in found.spec.shapes()}
        ours = _apply(found.spec, params, jnp.asarray(x), hx=jnp.asarray(tensors[first]))[0]
        assert_close(ours, theirs.pop(0), atol=1e-6, rtol=1e-6)
    assert theirs == []
    node = onnx.helper.make_node("If", ["C"], ["Y"], "if", then_branch=inner[0], else_branch=inner[0])
    tensors, words = _loaded(_model(_graph([node], {}, [*_values("X"), condition])), tmp_path)
    assert [each.prefix for each in find_rnns(tensors)] == ["one."]  # the same weights
    assert len(words) == 2


def test_a_node_and_an_initializer_of_one_name(tmp_path: Path) -> None:
    arrays = _arrays("GRU", "one")
    model = _model(_graph([_recurrent("GRU", "one", "X", "Y")], arrays))
    tensors, _ = _loaded(model, tmp_path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(tensors["one.bias_ih_l0"], "one.bias_ih_l0"))
    again, words = _loaded(model, tmp_path)  # the same numbers, as in what torch exports without folding
    assert (again.keys(), words) == (tensors.keys(), [])
    model.graph.initializer[-1].raw_data = bytes(len(model.graph.initializer[-1].raw_data))
    with pytest.raises(CheckpointError) as caught:
        _loaded(model, tmp_path)
    assert str(caught.value).partition(": ")[2] == (
        "bias_ih of the node one and the initializer one.bias_ih_l0 are both read as one.bias_ih_l0\n"
        "rename the node or the initializer in the model, and save it again"
    )
    model.graph.node[0].name = "other"
    tensors, _ = _loaded(model, tmp_path)
    assert "other.bias_ih_l0" in tensors


@pytest.mark.parametrize("what", ["initializers", "outputs", "attributes", "functions"])
def test_two_of_one_name_in_the_file_are_refused(what: str, tmp_path: Path) -> None:
    model = _everything()
    if what == "initializers":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1), "gru0W"))
    elif what == "outputs":
        model.graph.node.append(_node("Cos", ["X"], "Y0"))
    elif what == "attributes":
        next(each for each in model.graph.node if each.op_type == "GRU").attribute.extend(
            [onnx.helper.make_attribute("hidden_size", 9)]
        )
    else:
        model.functions.append(_function("Block", [_node("Cos", ["v"], "Y")], ["v"]))
    with pytest.raises(CheckpointError, match=f"a damaged ONNX file, two {what} are named .*\n"):
        _loaded(model, tmp_path)


def test_functions_are_looked_into(tmp_path: Path) -> None:
    """Called twice with other weights, and one through another; sizes come from the call or the function."""
    weights = ["w", "r", "b"]
    inner = _refers(_recurrent("GRU", "", "v", "Z", "gru"), "hidden_size", "units")
    inner.input[1:4] = weights
    squeeze = onnx.helper.make_node("Squeeze", ["Z", "axis"], ["Y"])
    axis = onnx.helper.make_node("Constant", [], ["axis"], value_ints=[1])
    block = _function("Block", [axis, inner, squeeze], ["v", *weights], units=H)
    call = onnx.helper.make_node("Block", ["v", *weights], ["Y"], "deep", domain="local")
    outer = _function("Outer", [call], ["v", *weights])
    arrays = _arrays("GRU", "a") | _arrays("GRU", "b", H) | {"bR": _arrays("GRU", "bbb")["bbbR"]}
    calls = [
        onnx.helper.make_node("Block", ["X", "aW", "aR", "aB"], ["M"], "first", domain="local", units=H),
        onnx.helper.make_node("Outer", ["M", "bW", "bR", "bB"], ["Y"], "/dec/Outer", domain="local"),
    ]
    model = _model(_graph(calls, arrays), [block, outer])
    tensors, words = _loaded(model, tmp_path)
    assert words == []
    found = find_rnns(tensors)
    assert [each.prefix for each in found] == ["first.gru.", "dec.deep.gru."]
    x = normal(T, B, F).astype("f4")
    [theirs] = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString()).run(None, {"X": x})
    ours: Any = x
    for each in found:
        params = {name: jnp.asarray(tensors[each.prefix + name]) for name in each.spec.shapes()}
        ours = jaxrnn.apply(each.spec, params, ours)[0]
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_names_in_a_function_are_its_own(tmp_path: Path) -> None:
    """A weight in a function has the name of an initializer outside, which stays."""
    arrays = _arrays("LSTM", "")
    constants = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))
        for name, array in arrays.items()
    ]
    function = _function("Block", [*constants, _recurrent("LSTM", "", "v", "Y", "lstm")], ["v"])
    calls = [
        onnx.helper.make_node("Block", ["X"], ["M"], "a", domain="local"),
        onnx.helper.make_node("Block", ["X"], ["N"], "b", domain="local"),
        _node("MatMul", ["X", "W"], "Y"),
    ]
    outside = normal(F, F, seed=3)
    tensors, words = _loaded(_model(_graph(calls, {"W": outside}), [function]), tmp_path)
    assert words == []
    assert np.array_equal(tensors["W"], outside)
    assert [each.prefix for each in find_rnns(tensors)] == ["a.lstm.", "b.lstm."]


def _bomb(depth: int, calls: int) -> Any:
    """Functions of which each calls the one below twice, or one that calls itself."""
    names = [f"f{number}" for number in range(depth)]
    functions = [
        _function(
            name,
            [onnx.helper.make_node(below, ["v"], [f"y{call}"], domain="local") for call in range(calls)],
            ["v"],
        )
        for name, below in zip(names, [*names[1:], "f0"], strict=True)
    ]
    return _model(_graph([onnx.helper.make_node("f0", ["X"], ["Y"], domain="local")], {}), functions)


@pytest.mark.parametrize(("depth", "calls"), [(1, 1), (1, 2), (40, 2), (60, 30)])
def test_functions_without_end_are_refused(depth: int, calls: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nested too deeply|a bomb"):
        _loaded(_bomb(depth, calls), tmp_path)


def test_other_recurrences_are_named(tmp_path: Path) -> None:
    others = [
        onnx.helper.make_node("DynamicQuantizeLSTM", ["X"], ["A"], "quantized", domain="com.microsoft"),
        onnx.helper.make_node("GRUUnit", ["X"], ["C"], "unit"),
        onnx.helper.make_node("LSTM", ["X"], ["D"], "theirs", domain="my.own"),
    ]
    node = _recurrent("GRU", "one", "X", "E")
    tensors, words = _loaded(_model(_graph([*others, node], _arrays("GRU", "one"))), tmp_path)
    assert words == [
        "left out nodes that torch does not have: quantized (com.microsoft.DynamicQuantizeLSTM), unit (GRUUnit), "
        "theirs (my.own.LSTM)"
    ]
    assert [each.prefix for each in find_rnns(tensors)] == ["one."]
    body = _graph([_node("Tanh", ["s"], "t")], {}, _values("s"), ("t",))
    scan = onnx.helper.make_node("Scan", ["X"], ["Y"], "steps", body=body, num_scan_inputs=1)
    _, words = _loaded(_model(_graph([scan], {"a": np.ones(2)})), tmp_path)
    assert words == [
        "found no LSTM, GRU or RNN node, but steps, whose steps are not read: export the model from its own library "
        "with such a node"
    ]
    _, words = _loaded(_model(_graph([scan, node], _arrays("GRU", "one"))), tmp_path)
    assert words == []


def test_find_rnns_knows_what_nodes_say(tmp_path: Path) -> None:
    nodes = [
        _recurrent("RNN", "a", "X", "A", activations=["Relu"]),
        _recurrent("RNN", "bb", "X", "C"),
        _recurrent("RNN", "ccc", "X", "Y", layout=1, activations=["relu"]),
    ]
    arrays = _arrays("RNN", "a") | _arrays("RNN", "bb") | _arrays("RNN", "ccc")
    tensors, words = _loaded(_model(_graph(nodes, arrays)), tmp_path)
    found = {each.prefix: each for each in find_rnns(tensors)}
    assert {prefix: each.spec.cell.name for prefix, each in found.items()} == {
        "a.": "RNN_RELU", "bb.": "RNN_TANH", "ccc.": "RNN_RELU",
    }  # fmt: skip
    assert [each.assumed for each in found.values()] == [{"batch_first": False}, {"batch_first": False}, {}]
    assert found["ccc."].arguments["batch_first"] is True
    assert words == [
        "a. has relu, which weights do not say: make the module with nonlinearity='relu'",
        "ccc. has relu, which weights do not say: make the module with nonlinearity='relu'",
        "ccc. has layout=1, which weights do not say: make the module with batch_first=True",
    ]


def test_a_node_that_is_left_out_is_not_loaded_by_its_initializers(tmp_path: Path) -> None:
    """An RNN whose weights have torch's names, as they are exported without folding, but which torch does not have."""
    names = {"W": "one.weight_ih_l0", "R": "one.weight_hh_l0"}
    arrays = {names["W"]: normal(H, F).astype("f4"), names["R"]: normal(H, H).astype("f4"), "zero": np.array([0])}
    deeper = [_node("Unsqueeze", [name, "zero"], f"deeper{key}") for key, name in names.items()]
    for clip, prefixes in ((None, ["one."]), (0.1, [])):
        node = onnx.helper.make_node("RNN", ["X", "deeperW", "deeperR"], ["Y"], "one", hidden_size=H, clip=clip)
        tensors, words = _loaded(_model(_graph([*deeper, node], arrays)), tmp_path)
        assert [each.prefix for each in find_rnns(tensors)] == prefixes
        assert words == ([] if prefixes else [
            "left out nodes that torch does not have: one (clip=0.1)",
            "left out one.weight_ih_l0, one.weight_hh_l0, with the node that has them",
        ])  # fmt: skip


def _steps(nonlinearity: str, names: bool) -> Any:
    """An RNN as torch's dynamo exporter writes it, step by step; optimized, its weights lose their names."""
    arrays = {"rnn.bias_ih_l0": normal(H).astype("f4"), "rnn.bias_hh_l0": normal(H).astype("f4")}
    weights = {"rnn.weight_ih_l0": normal(H, F).astype("f4"), "rnn.weight_hh_l0": normal(H, H).astype("f4")}
    arrays |= weights if names else {"val_12": weights["rnn.weight_ih_l0"].T, "val_34": weights["rnn.weight_hh_l0"].T}
    nodes = [_node("MatMul", ["X", "val_12"], "linear"), _node(nonlinearity, ["linear"], "Y")]
    if names:
        nodes[:0] = [_node("Transpose", ["rnn.weight_ih_l0"], "val_12", perm=[1, 0])]
    for node in nodes:
        node.metadata_props.add(key="namespace", value=": M/rnn: torch.nn.modules.rnn.RNN/linear: aten.linear.default")
    return _model(_graph(nodes, arrays))


@pytest.mark.parametrize("nonlinearity", ["Tanh", "Relu"])
def test_an_rnn_written_step_by_step(nonlinearity: str, tmp_path: Path) -> None:
    tensors, words = _loaded(_steps(nonlinearity, names=False), tmp_path)
    assert words == [
        "left out rnn.bias_ih_l0, rnn.bias_hh_l0, whose other weights have no names, as in an RNN written step by "
        "step: export it with torch.onnx.export(..., dynamo=False)"
    ]
    assert find_rnns(tensors) == []
    tensors, words = _loaded(_steps(nonlinearity, names=True), tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.prefix, found.said) == ([], "rnn.", {"nonlinearity": nonlinearity.lower()})


@pytest.mark.parametrize("nonlinearity", ["Tanh", "Relu"])
def test_a_cell_written_as_torch_does(nonlinearity: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    shapes = {"weight_ih": (H, F), "weight_hh": (H, H), "bias_ih": (H,), "bias_hh": (H,)}
    arrays = {f"cell.{name}": normal(*shape, seed=len(name)).astype("f4") for name, shape in shapes.items()}
    nodes = [
        onnx.helper.make_node("Gemm", ["h", "cell.weight_hh", "cell.bias_hh"], ["a"], "/cell/Gemm", transB=1),
        onnx.helper.make_node("Gemm", ["x", "cell.weight_ih", "cell.bias_ih"], ["b"], "/cell/Gemm_1", transB=1),
        onnx.helper.make_node("Add", ["a", "b"], ["c"], "/cell/Add"),
        onnx.helper.make_node(nonlinearity, ["c"], ["Y"], f"/cell/{nonlinearity}"),
    ]
    inputs = [*_values("x", sizes=[B, F]), *_values("h", sizes=[B, H])]
    tensors, words = _loaded(_model(_graph(nodes, arrays, inputs)), tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.said, found.is_cell) == ([], {"nonlinearity": nonlinearity.lower()}, True)
    x, h = normal(B, F).astype("f4"), normal(B, H, seed=1).astype("f4")
    [theirs] = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x, "h": h})
    params = {name: jnp.asarray(tensors[f"cell.{name}"]) for name in shapes}
    np.testing.assert_allclose(jaxrnn.apply_cell(found.spec, params, x, h), theirs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_learned_first_state_of_torch(kind: str, torch: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            more = {"nonlinearity": "relu"} if kind == "RNN" else {}
            self.rnn = getattr(torch.nn, kind)(F, H, 2, bidirectional=True, **more)
            self.first = torch.nn.Parameter(torch.randn(4, 1, H))

        def forward(self, x: Any) -> Any:
            first = self.first.expand(-1, x.shape[1], -1).contiguous()
            return self.rnn(x, (first, torch.zeros_like(first)) if kind == "LSTM" else first)[0]

    model, path, x = Model().eval(), tmp_path / "model.onnx", torch.tensor(normal(T, B, F).astype("f4"))
    settings: dict[str, Any] = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": [0, 1]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, **settings)
    tensors, words = _loaded(onnx.load(path), tmp_path)
    stated = [text for text in words if "starts from" in text]
    assert len(stated) == 2
    assert all(text.endswith("which the graph makes of first: give it to each call as hx") for text in stated)
    assert len(words) == 2 + (kind == "RNN")
    [found] = find_rnns(tensors)
    params = {name: jnp.asarray(tensors[f"rnn.{name}"]) for name in found.spec.shapes()}
    h = jnp.broadcast_to(jnp.asarray(tensors["first"]), (4, B, H))
    ours = jaxrnn.apply(found.spec, params, jnp.asarray(x.numpy()), (h, 0 * h) if kind == "LSTM" else h)[0]
    assert_close(ours, model(x).detach().numpy(), atol=1e-6, rtol=1e-6)


def test_layers_joined_by_sizes_that_the_graph_computes(tmp_path: Path) -> None:
    """As torch's dynamo exporter joins two directions when sizes are not numbers."""
    nodes = [_recurrent("GRU", "a", "X", "Ya", "gru", direction="bidirectional")]
    arrays = {name: np.concatenate([array, array]) for name, array in _arrays("GRU", "a").items()}
    arrays |= {name: np.concatenate([array, array]) for name, array in _arrays("GRU", "b", 2 * H).items()}
    arrays |= {str(number): np.array([number]) for number in range(5)}
    nodes += [
        _node("Transpose", ["Ya"], "apart", perm=[0, 2, 1, 3]),
        _node("Shape", ["apart"], "shape", start=0),
        _node("Slice", ["shape", "0", "1"], "time"),
        _node("Slice", ["shape", "1", "2"], "rows"),
        _node("Slice", ["shape", "2", "3"], "directions"),
        _node("Slice", ["shape", "3", "4"], "units"),
        _node("Mul", ["directions", "units"], "both"),
        _node("Concat", ["time", "rows", "both"], "joined", axis=0),
        _node("Reshape", ["apart", "joined"], "Z"),
        _recurrent("GRU", "b", "Z", "Y", "gru", direction="bidirectional"),
    ]
    tensors, words = _loaded(_model(_graph(nodes, arrays), opset=15), tmp_path)
    assert words == []
    [found] = find_rnns(tensors)
    assert (found.prefix, found.num_layers, found.bidirectional) == ("gru.", 2, True)
    swapped = [node for node in nodes if node.output[0] != "joined"]
    swapped.append(_node("Concat", ["rows", "time", "both"], "joined", axis=0))  # which mixes steps with rows
    tensors, words = _loaded(_model(_graph(swapped, arrays), opset=15), tmp_path)
    assert [each.num_layers for each in find_rnns(tensors)] == [1, 1]
    assert len(words) == 1


@pytest.mark.parametrize("names", ["aa", "ab", "aba"])
def test_layers_may_have_the_same_weights(names: str, tmp_path: Path) -> None:
    """Torch's exporter gives the second call of a module another path."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    nodes, arrays, last = [], {"one": np.array([1])}, "X"
    for layer, name in enumerate(names):
        arrays |= _arrays("GRU", name, H, seed=ord(name))
        nodes.append(_recurrent("GRU", name, last, f"Y{layer}", "/gru/GRU" + f"_{layer}" * bool(layer)))
        nodes.append(_node("Squeeze", [f"Y{layer}", "one"], last := f"Z{layer}"))
    model = _model(_graph(nodes, arrays, _values("X", sizes=[None, None, H]), (last,)))
    tensors, words = _loaded(model, tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.prefix, found.num_layers) == ([], "gru.", len(names))
    x = normal(T, B, H).astype("f4")
    [theirs] = runtime.InferenceSession(model.SerializeToString()).run(None, {"X": x})
    params = {name.removeprefix("gru."): jnp.asarray(array) for name, array in tensors.items() if name != "one"}
    np.testing.assert_allclose(_apply(found.spec, params, jnp.asarray(x))[0], theirs, atol=1e-6)


@pytest.mark.parametrize("path", ["/gru_1/GRU", "again"])
def test_a_module_called_on_its_own_output_is_one(path: str, tmp_path: Path) -> None:
    """Not two layers of one module: nodes of one module of torch have one path."""
    arrays = _arrays("GRU", "a", H) | {"one": np.array([1])}
    nodes = [
        _recurrent("GRU", "a", "X", "Ya", "/gru/GRU"),
        _node("Squeeze", ["Ya", "one"], "Z"),
        _recurrent("GRU", "a", "Z", "Y", path),
    ]
    tensors, words = _loaded(_model(_graph(nodes, arrays)), tmp_path)
    assert [(each.prefix, each.num_layers) for each in find_rnns(tensors)] == [("gru.", 1)]
    assert words == [
        f"the node {path} has the weights of /gru/GRU, and takes its output: call the module 'gru.' again, on its own "
        "output"
    ]


@pytest.mark.parametrize("between", [None, "Neg"])
def test_a_node_that_starts_from_anothers_end_is_no_layer_of_one_module(between: str | None, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    arrays = _arrays("GRU", "a", H) | _arrays("GRU", "b", H, seed=5) | {"one": np.array([1])}
    first = _recurrent("GRU", "a", "X", "Ya", "/gru/GRU")
    first.output.append("end")
    start = "start" if between else "end"
    nodes = [
        first,
        *([_node(between, ["end"], start)] if between else []),
        _node("Squeeze", ["Ya", "one"], "Z"),
        _recurrent("GRU", "b", "Z", "Y", "/gru/GRU_1", ["", start]),
    ]
    model = _model(_graph(nodes, arrays, _values("X", sizes=[None, None, H])))
    tensors, words = _loaded(model, tmp_path)
    one, two = find_rnns(tensors)
    assert (one.prefix, two.prefix, one.num_layers, two.num_layers) == ("gru.", "gru.1.", 1, 1)
    assert words == [
        f"/gru/GRU_1 starts from the state {start}, which the graph computes: give it to each call as hx",
        "the nodes /gru/GRU and /gru/GRU_1 have the prefix 'gru.': load the second with the prefix 'gru.1.', or give "
        "the nodes other names",
    ]
    x = normal(T, B, H).astype("f4")
    [theirs] = runtime.InferenceSession(model.SerializeToString()).run(None, {"X": x})
    ours, end = jnp.asarray(x), None
    for each in (one, two):
        params = {name: jnp.asarray(tensors[each.prefix + name]) for name in each.spec.shapes()}
        ours, end = _apply(each.spec, params, ours, end if end is None or not between else -end)
    np.testing.assert_allclose(ours, theirs[:, 0], atol=1e-6)


@pytest.mark.parametrize("loop", ["Loop", "Scan"])
def test_a_node_in_a_loop_is_named(loop: str, tmp_path: Path) -> None:
    helper, arrays = onnx.helper, _arrays("GRU", "a", H) | {"one": np.array([1]), "many": np.array(2)}
    body_nodes = [_recurrent("GRU", "a", "x", "y", "in"), _node("Squeeze", ["y", "one"], "x_out")]
    given, made = _values("x"), _values("x_out")
    if loop == "Loop":
        body_nodes.append(_node("Identity", ["go"], "go_out"))
        given[:0] = [helper.make_tensor_value_info("step", 7, []), helper.make_tensor_value_info("go", 9, [])]
        made[:0] = [helper.make_tensor_value_info("go_out", 9, [])]
        node = helper.make_node("Loop", ["many", "", "X"], ["Y"], "loop")
    else:
        body_nodes.append(_node("Identity", ["scanned"], "scanned_out"))
        given, made = [*given, *_values("scanned")], [*made, *_values("scanned_out")]
        node = helper.make_node("Scan", ["X", "S"], ["Y", "S_out"], "loop", num_scan_inputs=1)
    node.attribute.append(helper.make_attribute("body", helper.make_graph(body_nodes, "body", given, made)))
    inputs = [*_values("X", sizes=[T, B, H]), *(_values("S", sizes=[2, 1]) if loop == "Scan" else [])]
    model = _model(_graph([node], arrays, inputs))
    tensors, words = _loaded(model, tmp_path)
    assert words == ["in in body of loop runs once for each step of loop: call 'in.' as often"]
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    x = normal(T, B, H).astype("f4")
    feeds = {"X": x} | ({"S": np.zeros((2, 1), "f4")} if loop == "Scan" else {})
    [theirs] = runtime.InferenceSession(model.SerializeToString()).run(None, feeds)
    [found] = find_rnns(tensors)
    params = {name: jnp.asarray(tensors[found.prefix + name]) for name in found.spec.shapes()}
    ours = _apply(found.spec, params, _apply(found.spec, params, jnp.asarray(x))[0])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_names_make_no_lines_of_warnings(tmp_path: Path) -> None:
    arrays = _arrays("GRU", "a") | {"start": np.ones((1, B, H), "f4")}
    node = _recurrent("GRU", "a", "X", "Y", "gru\nWarning: all is well\x1b[31m", ["", "start"])
    [text] = _loaded(_model(_graph([node], arrays)), tmp_path)[1]
    assert text == (
        r"gru\nWarning: all is well\x1b[31m starts from the state start, which is not zero: give it to each call as hx"
    )


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    numbers, data, refused = random.Random(0), _everything().SerializeToString(), 0
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(numbers.choice([1, 2, 9])):
            changed[numbers.randrange(2, len(data))] = numbers.choice([0, 1, 255, numbers.randrange(256)])
        (tmp_path / "model.onnx").write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(tmp_path / "model.onnx")
            except CheckpointError:
                refused += 1
    assert 10 < refused < 100
