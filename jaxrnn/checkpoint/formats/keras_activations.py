"""The activations of Keras's recurrent layers, and the cells that have them."""

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

MAKERS: dict[str, Callable[..., Cell]] = {"SimpleRNN": rnn_cell, "LSTM": lstm_cell, "GRU": gru_cell}
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
        return HardSigmoid() if is_old(version) else value
    if isinstance(value, str):
        return value if value in FUNCTIONS or value in SYNONYMS else None
    settings = value.get("config") if isinstance(value, dict) else None
    return _of_layer(value["class_name"], settings) if isinstance(settings, dict) and "class_name" in value else None


def is_old(version: str | None) -> bool:
    """Whether hard_sigmoid is that of Keras 1 and 2. A file that does not say its version is taken for one of these."""
    return version is None or version.partition(".")[0] in ("1", "2")


def _of_layer(kind: Any, settings: Mapping[str, Any]) -> Activation | None:
    """A layer that is an activation."""
    if kind == "LeakyReLU":  # whose argument was called alpha in Keras 2
        slope = settings.get("negative_slope", settings.get("alpha", 0.3))
        return LeakyRelu(slope) if isinstance(slope, float) else None
    if kind == "ELU":
        alpha = settings.get("alpha", 1.0)
        return Elu(alpha) if isinstance(alpha, float) else None
    return None
