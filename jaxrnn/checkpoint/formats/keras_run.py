"""Run recurrent layers that were read from a file of Keras in Keras itself: see `named.Origin`."""

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxrnn.activations import Activation, Elu, HardSigmoid, LeakyRelu
from jaxrnn.checkpoint.formats.keras_parts import Part, Parts
from jaxrnn.checkpoint.named import CannotRun

_BACKENDS = {"jax": "jax.numpy", "torch": "torch", "tensorflow": "tensorflow"}
_EXACT = ("tanh", "sigmoid", "relu", "linear")  # in which Keras 3 does not round to float32


def is_exact(parts: Parts) -> bool:
    """Whether Keras computes them in float64, if told to. On other backends than JAX it rounds products, too."""
    keras = sys.modules.get("keras")
    backend = keras.backend.backend() if keras else os.environ.get("KERAS_BACKEND", "jax")
    return backend == "jax" and all(each in _EXACT for part in parts.values() for each in part.activations.values())


def run(parts: Parts, x: np.ndarray, states: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute with layers of Keras of the same weights and settings."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "jax")  # as JAX is installed here
    keras = importlib.import_module("keras")
    sides = list(dict.fromkeys(side for side, _ in parts))
    sides.sort(key=lambda side: side == "backward_layer")
    levels = 1 + max(level for _, level in parts)
    lasts: list[list[np.ndarray]] = []
    for level in range(levels):
        outputs = []
        for index, side in enumerate(sides):
            start = [each[level * len(sides) + index] for each in states]
            steps = x[::-1] if side == "backward_layer" else x
            output, *last = _layer(keras, parts[side, level], steps, start)
            outputs.append(output[::-1] if side == "backward_layer" else output)
            lasts.append(last)
        x = np.concatenate(outputs, -1)
    return [x, *(np.stack(each) for each in zip(*lasts, strict=True))]


def _layer(keras: ModuleType, part: Part, x: np.ndarray, start: list[np.ndarray]) -> list[np.ndarray]:
    """The output and the last states of one cell, run over all steps."""
    settings: dict[str, Any] = {"reset_after": True} if part.kind == "GRU" else {}
    known = part.activations
    for name in known:
        settings[name] = _activation(keras, known[name])
    try:
        layer = getattr(keras.layers, part.kind)(
            start[0].shape[-1],
            use_bias="bias" in part.arrays,
            return_sequences=True,
            return_state=True,
            dtype=x.dtype.name,
            **settings,
        )
        steps = np.swapaxes(x, 0, 1)
        layer.build(steps.shape)
        arrays = [part.arrays[name] for name in ("kernel", "recurrent_kernel", "bias") if name in part.arrays]
        layer.set_weights([array.astype(x.dtype) for array in arrays])
        output, *last = layer(steps, initial_state=start)
    except (ValueError, TypeError) as error:  # of a Keras in which something has another form
        raise CannotRun from error
    output, *last = map(keras.ops.convert_to_numpy, (output, *last))
    return [np.swapaxes(output, 0, 1), *last]


def _activation(keras: ModuleType, known: Activation | None) -> Any:
    """Keras's function for an activation. Keras gets nothing else of the file's words: they may name code."""
    if isinstance(known, HardSigmoid):  # of Keras 2
        return lambda x: keras.ops.clip(known.alpha * x + known.beta, 0.0, 1.0)
    if isinstance(known, LeakyRelu):
        return lambda x: keras.ops.leaky_relu(x, known.alpha)
    if isinstance(known, Elu):
        return lambda x: keras.ops.elu(x, known.alpha)
    if known == "tanh":  # Keras 3's rounds to float32
        return importlib.import_module(_BACKENDS[keras.backend.backend()]).tanh
    return keras.activations.get(known)
