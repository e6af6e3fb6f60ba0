"""The activations of Keras's recurrent layers, and the cells that have them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxrnn.activations import (
    FUNCTIONS,
    SYNONYMS,
    Activation,
    Elu,
    HardSigmoid,
    LeakyRelu,
    gru_cell,
    lstm_cell,
    rnn_cell,
)
from jaxrnn.cells import Cell
from jaxrnn.checkpoint.formats.keras_config import node_of

MAKERS: dict[str, Callable[..., Cell]] = {"SimpleRNN": rnn_cell, "LSTM": lstm_cell, "GRU": gru_cell}
# Layers that are activations: what they are here, their default, and what their argument is called in Keras 3 and 2.
_SLOPES: dict[str, tuple[Callable[[float], Activation], float, tuple[str, ...]]] = {
    "LeakyReLU": (LeakyRelu, 0.3, ("negative_slope", "alpha")),
    "ELU": (Elu, 1.0, ("alpha",)),
}
_OF_LAYERS = ("name", "trainable", "dtype", "negative_slope", "alpha")
_USUAL = {"activation": "tanh", "recurrent_activation": "sigmoid"}


def activations_of(kind: str, settings: Mapping[str, Any], version: str | None) -> dict[str, Activation | None]:
    """The activations of a layer by the names of its settings; None for one that jaxrnn does not know.

    Args:
        kind: the layer's class.
        settings: its configuration.
        version: the version of Keras that wrote it, if the file says it.
    """
    usual = {name: value for name, value in _USUAL.items() if kind != "SimpleRNN" or name == "activation"}
    return {name: _activation(settings.get(name, value), version) for name, value in usual.items()}


def cell_of(kind: str, settings: Mapping[str, Any], version: str | None) -> Cell:
    """The cell of a layer all of whose activations are known."""
    return MAKERS[kind](**activations_of(kind, settings, version))


def _activation(value: Any, version: str | None) -> Activation | None:
    if value is None:
        return "linear"
    if value == "hard_sigmoid":
        return HardSigmoid() if _is_old(version) else value
    if isinstance(value, str):
        return value if value in FUNCTIONS or value in SYNONYMS else None
    node = node_of(value)  # a layer that is an activation
    if node is None or node.kind not in _SLOPES or node.settings.keys() - {*_OF_LAYERS}:
        return None
    make, usual, names = _SLOPES[node.kind]
    slope = next((node.settings[name] for name in names if name in node.settings), usual)
    return make(slope) if isinstance(slope, float) and math.isfinite(slope) else None


def _is_old(version: str | None) -> bool:
    """Whether hard_sigmoid is that of Keras 1 and 2. A file that does not say its version is taken for one of these."""
    return version is None or version.partition(".")[0] in ("1", "2")
