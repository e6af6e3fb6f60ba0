"""The activations of ONNX's recurrent nodes, and the cells that have them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrnn.activations import (
    Activation,
    Affine,
    Clipped,
    Elu,
    HardSigmoid,
    LeakyRelu,
    ScaledTanh,
    ThresholdedRelu,
    gru_cell,
    lstm_cell,
    rnn_cell,
)
from jaxrnn.cells import Cell

# For one direction, in ONNX's order, and those of a node that names none.
_MAKERS: dict[str, tuple[Callable[..., Cell], tuple[str, ...]]] = {
    "LSTM": (lambda f, g, h: lstm_cell(g, f, h), ("sigmoid", "tanh", "tanh")),
    "GRU": (lambda f, g: gru_cell(g, f), ("sigmoid", "tanh")),
    "RNN": (rnn_cell, ("tanh",)),
}
_PLAIN = ("relu", "sigmoid", "softplus", "softsign", "tanh")
_PARAMETRIC: dict[str, type[Any]] = {
    each.__name__.lower(): each for each in (Affine, Elu, HardSigmoid, LeakyRelu, ScaledTanh, ThresholdedRelu)
}
_NO_DEFAULTS = (Affine, ScaledTanh, ThresholdedRelu)  # runtimes have others than ONNX's text
_LARGE = 3e38  # what some exporters write for no clip


def cell_of(kind: str, attributes: Mapping[str, Any]) -> Cell | str:
    """The cell of a node, or why there is none.

    Args:
        kind: "LSTM", "GRU" or "RNN".
        attributes: the node's.
    """
    make, usual = _MAKERS[kind]
    names = attributes.get("activations", [])
    reason = f"activations={str(names)[:80]}"
    if not isinstance(names, list) or len(names) not in (0, len(usual), 2 * len(usual)):
        return reason
    numbers: dict[str, list[float]] = {}
    for key in ("alpha", "beta"):
        given = attributes.get(f"activation_{key}", [])
        if not isinstance(given, list) or not all(isinstance(each, float) and math.isfinite(each) for each in given):
            return f"activation_{key}={given!r}"[:80]
        numbers[key] = given
    lower = [str(name).lower() for name in names or usual]
    for key, given in numbers.items():
        if len(given) not in (0, len(lower)) and len(given) > sum(key in _keys(name) for name in lower):
            return f"{reason}: activation_{key} has more numbers than they take"
    functions = _functions(lower, numbers)
    if isinstance(functions, str):
        return f"{reason}: {functions}"
    by_place = {key: _by_place(lower, key, given) for key, given in numbers.items()}
    if functions != _functions(lower, by_place):
        return f"{reason}: activation_alpha and activation_beta fit in two ways"
    clip = attributes.get("clip", _LARGE)
    if not isinstance(clip, float) or not clip > 0:
        return f"clip={clip:.6g}" if isinstance(clip, float) else f"clip={clip!r}"[:80]
    cells = [make(*_clipped(some, clip)) for some in _by_direction(functions, len(usual))]
    return cells[0] if cells[0] == cells[-1] else f"{reason}, others in each direction"


def _by_direction(functions: list[Activation], length: int) -> list[list[Activation]]:
    return [functions[start : start + length] for start in range(0, len(functions), length)]


def _functions(names: Sequence[str], numbers: Mapping[str, Sequence[float]]) -> list[Activation] | str:
    """The functions, each of which takes the next numbers if it has parameters; or why there are none."""
    left = {key: list(given) for key, given in numbers.items()}
    found: list[Activation] = []
    for name in names:
        if name in _PLAIN:
            found.append(name)
            continue
        if name not in _PARAMETRIC:
            return f"jaxrnn does not know {name[:80]}"
        given = {key: left[key].pop(0) for key in _keys(name) if left[key]}
        if _PARAMETRIC[name] in _NO_DEFAULTS and len(given) < len(_keys(name)):
            return f"runtimes disagree on {name} without all its numbers"
        found.append(_PARAMETRIC[name](**given))
    return found


def _keys(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_PARAMETRIC[name])] if name in _PARAMETRIC else []


def _by_place(names: Sequence[str], key: str, given: Sequence[float]) -> Sequence[float]:
    """The numbers that are taken if there is one for each function, as some read it."""
    whole = len(given) == len(names)
    return [number for name, number in zip(names, given, strict=True) if key in _keys(name)] if whole else given


def _clipped(functions: Sequence[Activation], clip: float) -> list[Activation]:
    """Clip the inputs of the gates' activations, but not that of an LSTM's c, as onnxruntime does."""
    if clip >= _LARGE:
        return list(functions)
    return [each if place == 2 else Clipped(each, clip) for place, each in enumerate(functions)]
