"""Write a recurrent module as an ONNX model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen, nnx

from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH
from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.errors import CheckpointError, about
from jaxrnn.checkpoint.formats.onnx_graph import library
from jaxrnn.checkpoint.write import replace
from jaxrnn.spec import Spec

_DTYPES = ("float32", "float64", "float16")
_OPSET = 14  # the first with all operators that are written here


def to_onnx(
    module: nnx.Module | linen.Module,
    path: str | os.PathLike[str],
    variables: Mapping[str, Any] | None = None,
    lengths: bool = False,
    hx: bool = False,
) -> None:
    """Write an RNN, LSTM or GRU as an ONNX model, which onnxruntime and others run.

    The model's input is "x", and its outputs are "output", "h_n" and, for an LSTM, "c_n", with the shapes of the
    module's call. Batch and time may have any size. The model computes what the module computes without dropout, in the
    dtype of its parameters.

    Needs the package onnx: `pip install "jaxrnn[onnx]"`.

    Args:
        module: an RNN, LSTM or GRU of jaxrnn, or of jaxrnn.linen.
        path: the file to write, which replaces one that is there.
        variables: those of a Linen module, as from `module.init`.
        lengths: whether the model has another input "lengths" of shape (batch,) and dtype int32, as the module's call.
        hx: whether the model has inputs for the initial states: "h_0" and, for an LSTM, "c_0". Without, they are zeros.

    Raises:
        TypeError: another module, or a Linen module without variables.
        CheckpointError: ONNX does not have such a module: an LSTM with a projection, or parameters of bfloat16; the
            file cannot be written; or onnx is not installed.

    >>> import os, tempfile
    >>> import jaxrnn, onnx
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(3, 4, bidirectional=True, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "gru.onnx")
    ...     jaxrnn.checkpoint.to_onnx(gru, path)
    ...     [found] = jaxrnn.checkpoint.find_rnns(jaxrnn.checkpoint.load(path))
    >>> found.kind, found.hidden_size, found.bidirectional
    ('GRU', 4, True)
    """
    spec = getattr(module, "spec", None)
    params: Mapping[str, Any]
    if isinstance(module, linen.Module):
        if variables is None:
            raise TypeError("variables should be what the Linen module's init returned, got None")
        params = linen.unbox(variables["params"])
    if not isinstance(spec, Spec) or spec.cell not in (RNN_TANH, RNN_RELU, LSTM_CELL, GRU_CELL):
        of = f" of {spec.cell.name}" if isinstance(spec, Spec) else ""
        raise TypeError(f"module should be an RNN, LSTM or GRU of jaxrnn, got {type(module).__name__}{of}")
    if isinstance(module, nnx.Module):
        params = {name: getattr(module, name)[...] for name in spec.shapes()}
    with about(path, "check the folder and its space"):
        if spec.proj_size:
            raise CheckpointError("ONNX has no LSTM with proj_size\nexport it with jax.export instead")
        arrays = {name: to_numpy(name, params[name]) for name in spec.shapes()}
        if (dtype := np.dtype(arrays["weight_ih_l0"].dtype).name) not in _DTYPES:
            raise CheckpointError(
                f"ONNX has no {spec.cell.name} of {dtype}\nmake the module with param_dtype one of {', '.join(_DTYPES)}"
            )
        replace(path, _model(spec, arrays, lengths, hx))


def _model(spec: Spec, params: Mapping[str, Any], lengths: bool, hx: bool) -> bytes:
    """The file of a model that runs layers as `jaxrnn.apply` does, without dropout."""
    onnx, helper = library(), library("onnx.helper")
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
