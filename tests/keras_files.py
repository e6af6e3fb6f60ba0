"""Keras's files by hand: weights in HDF5, and the configuration of a model."""

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from arrays import normal

h5py = pytest.importorskip("h5py", reason="h5py, which writes files, is not installed")
F, H = 2, 3
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


def layer_arrays(kind: str, features: int = F, bias: bool = True) -> list[np.ndarray]:
    columns = GATES[kind] * H
    shapes = [(features, columns), (H, columns), (2, columns) if kind == "GRU" else (columns,)]
    return [normal(*shape, seed=i).astype("f4") for i, shape in enumerate(shapes[: 2 + bias])]


def hdf5(groups: dict[str, list[np.ndarray]], config: Any = None, names: dict[str, str] | None = None) -> bytes:
    """A file with numbered arrays in groups of Keras 3, or named ones where a group is not called vars."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for group, arrays in groups.items():
            leaves = "012" if group.endswith("vars") else ("kernel:0", "recurrent_kernel:0", "bias:0")
            for leaf, array in zip(leaves, arrays, strict=False):
                opened[f"{group}/{leaf}"] = array
        for group, name in (names or {}).items():
            opened.require_group(group).attrs["name"] = name
        if config is not None:
            opened.attrs["model_config"] = json.dumps(config)
    return file.getvalue()


def layer(kind: str, name: str, class_name: str = "", **settings: Any) -> dict[str, Any]:
    return {"class_name": class_name or kind, "config": {"name": name, "units": H, **settings}}


def sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": [*layers]}


def around(class_name: str, name: str, **settings: Any) -> dict[str, Any]:
    """A layer that is not recurrent, or is around others."""
    return {"class_name": class_name, "config": {"name": name, **settings}}


KERAS_3 = {
    "layers/lstm_1/cell/vars": layer_arrays("LSTM"),
    "layers/bidirectional/forward_layer/cell/vars": layer_arrays("GRU"),
    "layers/bidirectional/backward_layer/cell/vars": layer_arrays("GRU"),
    "layers/functional/layers/simple_rnn/cell/vars": layer_arrays("SimpleRNN", bias=False),
    "encoder/lstm/cell/vars": layer_arrays("LSTM"),
    "layers/dense/vars": [normal(3, 3)],
    "optimizer/vars": [normal(2)],
}


_CALL = {"args": [around("x", "x", keras_history=["mask", 0, 0])], "kwargs": {"mask": None}}
CONFIG = around("Functional", "model", layers=[
    around("InputLayer", "in") | {"inbound_nodes": []},
    around("Masking", "mask") | {"inbound_nodes": [[["in", 0, 0, {}]]]},
    layer("LSTM", "tagger", dtype={"class_name": "DTypePolicy", "config": {"name": "float32"}},
           activation=around("LeakyReLU", "l", negative_slope=0.3), recurrent_activation="hard_sigmoid"),
    around("Bidirectional", "both", layer=layer("GRU", "gru", return_sequences=True), merge_mode="sum")
    | {"inbound_nodes": [_CALL]},
    around("RNN", "st", cell=around("StackedRNNCells", "cells", cells=[layer("LSTMCell", "x")] * 2)),
    around("Sequential", "functional", layers=[
        around("TimeDistributed", "td", layer=layer("SimpleRNN", "simple_rnn")),
    ]),
])  # fmt: skip


def keras_zip(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("_", "."), data)
    return file.getvalue()
