"""ONNX models for tests: their nodes, weights and graphs. Tests that import this are skipped without onnx."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import normal
from reading import loaded

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, F, H = 5, 2, 2, 3


def node_weights(
    kind: str, prefix: str, features: int = F, seed: int = 0, directions: int = 1
) -> dict[str, np.ndarray]:
    """The weights of a node, which are named W, R and B after the prefix."""
    rows = GATES[kind] * H
    shapes = {"W": (directions, rows, features), "R": (directions, rows, H), "B": (directions, 2 * rows)}
    return {f"{prefix}{key}": normal(*s, seed=seed + len(key + prefix)).astype("f4") for key, s in shapes.items()}


def recurrent(
    kind: str, prefix: str, x: str = "X", y: str = "Y", name: str | None = None, more: Any = (), **attributes: Any
) -> Any:
    """A node with these weights; `more` are its inputs after them."""
    attributes = {"hidden_size": H} | ({"linear_before_reset": 1} if kind == "GRU" else {}) | attributes
    inputs = [x, *(f"{prefix}{key}" for key in "WRB"), *more]
    return onnx.helper.make_node(kind, inputs, [y], prefix if name is None else name, **attributes)


def op(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, inputs, [output], f"/{output}", **attributes)


def call(function: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> Any:
    """A call of one of the model's own functions."""
    return onnx.helper.make_node(function, inputs, [output], name, domain="local", **attributes)


def values(*names: str, sizes: Any = None) -> list[Any]:
    return [onnx.helper.make_tensor_value_info(name, 1, sizes) for name in names]


def graph_of(nodes: list[Any], arrays: dict[str, Any], inputs: Any = (), outputs: tuple[str, ...] = ("Y",)) -> Any:
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    inputs = inputs or values("X", sizes=[None, None, F])
    return onnx.helper.make_graph(nodes, "test", inputs, values(*outputs), tensors)


def model_of(graph: Any, functions: Any = (), opset: int = 14) -> Any:
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("local", 1)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions)
    made.ir_version = 8
    return made


def function_of(name: str, nodes: list[Any], inputs: list[str], **attributes: int) -> Any:
    opsets = [onnx.helper.make_opsetid("", 14), onnx.helper.make_opsetid("local", 1)]
    defaults = [onnx.helper.make_attribute(key, value) for key, value in attributes.items()]
    return onnx.helper.make_function("local", name, inputs, ["Y"], nodes, opsets, attribute_protos=defaults)


def refers(node: Any, name: str, other: str) -> Any:
    """The node, whose attribute is the function's."""
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.AttributeProto(name=name, ref_attr_name=other, type=onnx.AttributeProto.INT)])
    return node


def read(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """The tensors of a model in a file, and what was said of it."""
    return loaded(folder / "model.onnx", model.SerializeToString())


def run(model: Any, **feeds: Any) -> np.ndarray:
    """The first output of a model, by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return runtime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


def everything() -> Any:
    """A model in which every field that is used matters: two layers, and a function, after an operator."""
    layers = []
    for number, x in enumerate(("Z", "S0")):
        layers.append(recurrent("GRU", f"gru{number}", x, f"Y{number}", more=["lens"]))
        layers[-1].metadata_props.add(key="namespace", value=": Model/enc: torch.nn.GRU/gru: aten.gru.input")
        layers.append(op("Squeeze", [f"Y{number}", "one"], f"S{number}"))
    initial = node_weights("GRU", "gru0") | node_weights("GRU", "gru1", H) | node_weights("GRU", "block")
    sparse = initial.pop("blockR")
    initial |= {"lens": np.array([T, T], np.int32), "one": np.array([1]), "blockW": initial["blockW"][0]}
    body = [
        op("Identity", ["v"], "Q"),
        op("Constant", [], "axis", value_ints=[0]),
        op("Unsqueeze", ["w", "axis"], "deeper"),
        refers(recurrent("GRU", "", "Q", "Y", "inner", ["lens"]), "linear_before_reset", "linear"),
    ]
    body[-1].input[1:5] = ["deeper", "r", "b", "l"]
    block = function_of("Block", body, ["v", "w", "r", "b", "l"], linear=1)
    block.value_info.extend(values("Q", sizes=[T, B, F]))
    flat = {**node_weights("RNN", "rnn"), "zero": np.array([0])}
    flat["flat"] = flat.pop("rnnB")[0]
    nodes = [
        *(op("Relu", ["X"], "A"), op("Tanh", ["A"], "Z"), op("Sin", ["A"], "P")),
        *layers,
        call("Block", ["P", "blockW", "blockR", "blockB", "lens"], "Y", "block"),
        op("Unsqueeze", ["flat", "zero"], "rnnB"),
        recurrent("RNN", "rnn", "X", "R", more=["lens"]),
    ]
    made = graph_of(nodes, initial | flat, values("X", sizes=[T, B, F]))
    made.value_info.extend(values("Z", sizes=[T, B, F]))
    numbers = onnx.numpy_helper.from_array(sparse.reshape(-1), "blockR")
    places = onnx.numpy_helper.from_array(np.arange(sparse.size))
    made.sparse_initializer.append(onnx.helper.make_sparse_tensor(numbers, places, sparse.shape))
    return model_of(made, [block])
