"""ONNX, closed: what a file says is used, changes nothing, or is named with a remedy that works."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax_models import FLIP, expression
from onnx_models import GATES, B, F, H, T, everything, onnx, op, read
from reading import apply, weights

from jaxrnn.checkpoint import CheckpointError, find_rnns
from jaxrnn.checkpoint.formats import onnx as reader

pytestmark = pytest.mark.libraries


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
    scale: float = 1.0  # of weights: with some activations numbers grow

    @property
    def directions(self) -> int:
        return 1 + (self.attributes.get("direction") == "bidirectional")

    @property
    def x(self) -> np.ndarray:
        return normal(*((B, T) if self.attributes.get("layout") else (T, B)), F).astype("f4")

    def model(self, more_outputs: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Any:
        rows, hidden, helper = GATES[self.kind] * self.hidden, self.hidden, onnx.helper
        shapes = {"W": (rows, F), "R": (rows, hidden), "B": (2 * rows,)}
        arrays = {n: normal(self.directions, *s, seed=len(s)) * self.scale for n, s in shapes.items()}
        arrays = {n: array.astype("f4") for n, array in arrays.items()} | self.arrays
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
        lengths: dict[str, Any] = {"arrays": {"lens": np.array([2, T], np.int32)}, "inputs": {"sequence_lens": "lens"}}
        yield Case(kind, {name: "reverse"}, opset=opset, **lengths)
        yield Case(kind, {name: "sideways"}, opset=opset)
    elif attribute.type == kinds.STRINGS:
        for function in re.findall(r"^[* ]*(\w+)\(x\)", schema.doc, re.M):
            values = [function] * len(_usual(kind))
            more = {"activation_alpha": [0.3] * 3, "activation_beta": [0.2] * 3}
            plain = function in ("Sigmoid", "Tanh", "Relu")
            small = 0.1 if function == "Softplus" else 0.3  # onnxruntime's becomes infinite early
            yield Case(kind, {name: values, **({} if plain else more)}, opset=opset, scale=small)
            yield Case(kind, {name: [function, *_usual(kind)[1:]], **more}, opset=opset, scale=0.3)
            yield Case(kind, {name: [*_usual(kind)[:-1], function], **more, "clip": 0.4}, opset=opset, scale=0.3)
            if plain:
                both = {"direction": "bidirectional"}
                yield Case(kind, {name: [*_usual(kind), *values], **both}, opset=opset, scale=0.3)
                yield Case(kind, {name: [*values, *_usual(kind)], **both}, opset=opset, scale=0.3)
                yield Case(kind, {name: [*values, *values], **both}, opset=opset, scale=0.3)
        if kind != "RNN":  # onnxruntime takes only Tanh with a capital
            yield Case(kind, {name: [text.upper() for text in _usual(kind)]}, opset=opset, silent=True)


def _tensor(value: Any, dtype: str) -> Any:
    return onnx.numpy_helper.from_array(np.array([value], dtype))


def _of_lengths(kind: str) -> Iterator[Case]:
    shape = [op("Shape", ["X"], "shape")]
    numbers = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    time = [op("Slice", ["shape", "zero", "one"], "time"), op("Cast", ["time"], "steps", to=6)]
    rows = [op("Gather", ["shape", "one"], "rows")]
    made = {"inputs": {"sequence_lens": "lens"}}
    yield Case(kind, arrays={"lens": np.array([3, 5], np.int32)}, **made)
    yield Case(kind, {"direction": "bidirectional"}, arrays={"lens": np.array([1, 4], np.int32)}, **made)
    yield Case(kind, arrays={"lens": np.array([T, T], np.int32)}, static=True, silent=True, **made)
    yield Case(kind, arrays={"lens": np.array([T, 2], np.int32)}, static=True, **made)
    yield Case(kind, feeds={"lens": np.array([2, 4], np.int32)}, silent=True, **made)
    shaped, known = (
        {"X": "shaped", **made["inputs"]},
        {"lens": np.array([T, T], np.int32), "sizes": np.array([T, B, F])},
    )
    yield Case(kind, nodes=[op("Reshape", ["X", "sizes"], "shaped")], inputs=shaped, arrays=known, silent=True)
    for operator in ("Expand", "Tile"):  # as tf2onnx and others write that all rows are whole
        nodes = [*shape, *time, *rows, op(operator, ["steps", "rows"], "lens")]
        yield Case(kind, nodes=nodes, arrays=numbers, silent=True, **made)
    # The number of rows, and a step less, are not the number of steps.
    nodes = [*shape, *rows, op("Cast", ["rows"], "few", to=6), op("Expand", ["few", "rows"], "lens")]
    yield Case(kind, nodes=nodes, arrays=numbers, **made)
    nodes = [*shape, *time, *rows, op("Sub", ["steps", "less"], "fewer"), op("Expand", ["fewer", "rows"], "lens")]
    yield Case(kind, nodes=nodes, arrays={**numbers, "less": np.array([1], np.int32)}, **made)


def _of_a_state(kind: str, name: str) -> Iterator[Case]:
    state, row = normal(1, B, H, seed=7).astype("f4"), normal(1, 1, H, seed=8).astype("f4")
    given = {"inputs": {name: "state"}}
    sizes = {"sizes": np.array([1, B, H])}
    yield Case(kind, arrays={"state": state}, **given)
    yield Case(kind, arrays={"state": 0 * state}, silent=True, **given)
    yield Case(kind, feeds={"state": state}, silent=True, **given)
    yield Case(kind, feeds={"theirs": state}, nodes=[op("Cast", ["theirs"], "state", to=1)], silent=True, **given)
    yield Case(kind, arrays={"first": row, **sizes}, nodes=[op("Expand", ["first", "sizes"], "state")], **given)
    for value in (0.0, 0.5):
        nodes = [op("ConstantOfShape", ["sizes"], "state", value=_tensor(value, "f4"))]
        yield Case(kind, arrays=sizes, nodes=nodes, silent=not value, **given)
    nodes = [op("Expand", ["zero", "sizes"], "state")]
    yield Case(kind, arrays={"zero": np.zeros(1, "f4"), **sizes}, nodes=nodes, silent=True, **given)
    yield Case(kind, arrays={"raw": state}, nodes=[op("Tanh", ["raw"], "state")], **given)
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
    constant = op("Constant", [], "made", value=onnx.numpy_helper.from_array(array))
    yield Case(kind, inputs={name: "made"}, nodes=[constant], silent=True)
    flat = op("Constant", [], "flat", value_floats=array.reshape(-1).tolist())
    nodes = [flat, op("Constant", [], "shape", value_ints=list(shape)), op("Reshape", ["flat", "shape"], "made")]
    yield Case(kind, inputs={name: "made"}, nodes=nodes, silent=True)
    yield Case(kind, inputs={name: "made"}, arrays={"raw": array}, nodes=[op("Tanh", ["raw"], "made")])


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
        elif "has direction=" in text:
            assert text == (
                "one has direction='reverse': flip its input and its output along the time axis: "
                "jaxrnn.flip_sequences(x, lengths, batch_first=x.ndim > 2 and batch_first), where lengths may be None"
            )
    # Always both, since zeros and all steps are the same as none, so that fewer programs are compiled.
    zero = np.zeros((case.directions, B, case.hidden), "f4")
    each = [jnp.asarray(first.get(name, zero)) for name in ("initial_h", "initial_c")[:states]]
    lengths = first.get("sequence_lens", np.full(B, T, np.int32))
    return {"lengths": jnp.asarray(lengths), "hx": tuple(each) if states > 1 else each[0]}


def _check(case: Case, row: str, tmp_path: Path) -> str:
    """Load a model and compare; return what became of it."""
    tensors, words = read(case.model(), tmp_path)
    if any(text.startswith("left out") for text in words):
        assert not case.silent, words
        assert f"{row}=" in words[0] or ("computed by the graph" in words[0] and "raw" in case.arrays), words
        assert find_rnns(tensors) == []
        return "left out"
    assert not (case.silent and words), words
    [found] = find_rnns(tensors)
    given = _follow(case, words, tensors, len(found.spec.cell.states))
    ways = [lambda x: x]
    if case.attributes.get("direction") == "reverse":  # both ways that are told
        [told] = [text for text in words if "has direction=" in text]
        each = [given["lengths"]] if "lens" in case.arrays else [given["lengths"], None]
        ways = [lambda x, n=n: expression(FLIP, told, x=x, lengths=n, batch_first=False) for n in each]
    for way in ways:
        output, last = apply(found.spec, weights(tensors, found), way(jnp.asarray(case.x)), **given)
        _compare(case, way(output), last)
    return "warned" if words else "used"


def _compare(case: Case, output: Any, last: Any) -> None:
    theirs = case.run()
    both = case.directions * case.hidden
    if "Y" in theirs:
        y = theirs["Y"] if case.attributes.get("layout") else theirs["Y"].transpose(0, 2, 1, 3)
        assert_close(output, y.reshape(*y.shape[:2], both), atol=1e-6, rtol=1e-6)
    if "Y_c" in theirs:
        c = theirs["Y_c"].transpose(1, 0, 2) if case.attributes.get("layout") else theirs["Y_c"]
        assert_close(last[1], c, atol=1e-6, rtol=1e-6)
    if "Y_h" in theirs:
        h = theirs["Y_h"].transpose(1, 0, 2) if case.attributes.get("layout") else theirs["Y_h"]
        assert_close(last[0] if isinstance(last, tuple) else last, h, atol=1e-6, rtol=1e-6)


ROWS = [(kind, name) for kind, table in reader.OPERATORS.items() for name in table]
_QUICK = {("LSTM", name) for name in ("sequence_lens", "initial_h", "clip", "input_forget", "layout")}


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


def _summary(model: Any, tmp_path: Path) -> Any:
    try:
        tensors, words = read(model, tmp_path)
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
    before, changed = _summary(everything(), tmp_path), []
    assert isinstance(before, tuple)
    assert before[1] == []
    for place in range(len(_places(message, everything()))):
        model = everything()
        each = _places(message, model)[place]
        _change(each, each.DESCRIPTOR.fields_by_name[name])
        changed.append(_summary(model, tmp_path) != before)
    assert any(changed) == (MESSAGES[message][name].use == "used")


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_in_no_table_is_named(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("doc_string", "name") if message != "ModelProto" else ("producer_name",):
        model = everything()
        setattr(_places(message, model)[0], name, "gru0" if name == "name" else "new")
        if message == "FunctionProto" and name == "name":
            continue
        row = MESSAGES[message][name]
        monkeypatch.delitem(MESSAGES[message], name)
        _, words = read(model, tmp_path)
        assert any(f"ONNX's {message} has {name}=" in text and "does not know" in text for text in words)
        monkeypatch.setitem(MESSAGES[message], name, row)
