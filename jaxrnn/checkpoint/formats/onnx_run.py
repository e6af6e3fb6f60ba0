"""Run recurrent nodes that were read from an ONNX file in onnxruntime: see `named.Origin`."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.checkpoint.named import CannotRun

_UNUSED = ("direction", "layout", "hidden_size")


class OnnxNode(NamedTuple):
    """A recurrent node.

    Attributes:
        kind: its operator.
        attributes: its attributes, as the file has them.
        arrays: its weights, by the names W, R, B and P.
        opsets: the versions of operators, as the file has them.
    """

    kind: str
    attributes: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray | None]
    opsets: Any


def run(nodes: Sequence[OnnxNode], x: np.ndarray, states: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute with the nodes, each of which is one layer on top of the one before."""
    runtime, helper = importlib.import_module("onnxruntime"), importlib.import_module("onnx.helper")
    lasts = []
    for level, node in enumerate(nodes):
        arrays = {name: array for name, array in node.arrays.items() if array is not None}
        directions = len(arrays["R"])
        names = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P"]
        given = dict(zip(("initial_h", "initial_c"), states, strict=False))
        given = {name: each[level * directions : (level + 1) * directions] for name, each in given.items()}
        known = {"X": x, **arrays, **given}
        outputs = ["Y", "Y_h", "Y_c"][: 1 + len(states)]
        inputs = [name if name in known else "" for name in names]
        while not inputs[-1]:
            inputs.pop()
        alone = helper.make_node(
            node.kind,
            inputs,
            outputs,
            hidden_size=arrays["R"].shape[-1],
            direction="bidirectional" if directions == 2 else "forward",
        )
        alone.attribute.extend(each for name, each in node.attributes.items() if name not in _UNUSED)
        described = [helper.make_tensor_value_info(name, 1, known[name].shape) for name in inputs if name]
        returned = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
        graph = helper.make_graph([alone], "one", described, returned)
        model = helper.make_model(graph, opset_imports=node.opsets, ir_version=8)
        try:
            session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            feed = {name: np.asarray(known[name], np.float32) for name in inputs if name}
            output, *last = session.run(outputs, feed)
        except Exception as error:  # of onnxruntime, on what it does not implement
            raise CannotRun from error
        x = np.concatenate(list(np.moveaxis(output, 1, 0)), -1)
        lasts.append(last)
    return [x, *(np.concatenate(each) for each in zip(*lasts, strict=True))]
