"""Cells with other activations than torch's, as files of Keras and ONNX may have.

`lstm_cell`, `gru_cell` and `rnn_cell` take an activation as a name, as an object of a class below, or as any function.
The same arguments make equal cells. A step wraps chains of known activations in `jaxrnn._core.rules.pointwise`, to save
memory; a function of the user's may be anything, and is not wrapped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrnn._core.rules import pointwise
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Arrays, Cell, Pair

Activation = str | Callable[[jax.Array], jax.Array]
_FunctionT = TypeVar("_FunctionT", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Affine:
    """`alpha * x + beta`."""

    alpha: float = 1.0
    beta: float = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.alpha * x + self.beta


@dataclasses.dataclass(frozen=True)
class Elu:
    """`x` above 0, `alpha * (exp(x) - 1)` below."""

    alpha: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x, self.alpha)


@dataclasses.dataclass(frozen=True)
class HardSigmoid:
    """`alpha * x + beta`, between 0 and 1. The defaults are those of Keras 2 and ONNX."""

    alpha: float = 0.2
    beta: float = 0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.clip(self.alpha * x + self.beta, 0, 1)


@dataclasses.dataclass(frozen=True)
class LeakyRelu:
    """`x` above 0, `alpha * x` below."""

    alpha: float = 0.01

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(x, self.alpha)


@dataclasses.dataclass(frozen=True)
class ScaledTanh:
    """`alpha * tanh(beta * x)`."""

    alpha: float = 1.0
    beta: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.alpha * jnp.tanh(self.beta * x)


@dataclasses.dataclass(frozen=True)
class ThresholdedRelu:
    """`x` above `alpha`, 0 below."""

    alpha: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.where(x > self.alpha, x, 0)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """`activation(x)`, with x cut off at `-limit` and `limit`, as by ONNX's attribute clip."""

    activation: Activation
    limit: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return function_of(self.activation)(jnp.clip(x, -self.limit, self.limit))


_PARAMETRIC = (Affine, Elu, HardSigmoid, LeakyRelu, ScaledTanh, ThresholdedRelu)
# By Keras's names, with Keras's defaults.
FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "linear": lambda x: x,
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "exponential": jnp.exp,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "hard_silu": jax.nn.hard_silu,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": LeakyRelu(0.2),
    "log_sigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "squareplus": lambda x: (x + jnp.sqrt(x * x + 4)) / 2,
    "tanh_shrink": lambda x: x - jnp.tanh(x),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
}
_OVER_UNITS = ("softmax", "log_softmax")
SYNONYMS = {"swish": "silu", "hard_swish": "hard_silu"}


def function_of(activation: Activation) -> Callable[[jax.Array], jax.Array]:
    """The function that an activation stands for."""
    return FUNCTIONS[activation] if isinstance(activation, str) else activation


def _is_pointwise(activation: Activation) -> bool:
    """Whether each element of its result is known to depend on the same element of x alone."""
    if isinstance(activation, Clipped):
        return _is_pointwise(activation.activation)
    return activation not in _OVER_UNITS if isinstance(activation, str) else isinstance(activation, _PARAMETRIC)


def _known(argument: str, given: Activation) -> Activation:
    """An activation by its name, if it has one."""
    if not isinstance(given, str) and callable(given):
        return next((name for name, function in FUNCTIONS.items() if function == given), given)
    name = SYNONYMS.get(given, given) if isinstance(given, str) else None
    if name not in FUNCTIONS:
        names = ", ".join(map(repr, [*FUNCTIONS, *SYNONYMS]))
        raise ValueError(f"{argument} should be a function, or one of {names}; got {given!r}")
    return name


@dataclasses.dataclass(frozen=True)
class _Functions:
    """The activations of a step: a value, so that cells of the same are equal."""

    activation: Activation
    recurrent: Activation = "sigmoid"
    output: Activation = "tanh"

    def of(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        return function_of(self.activation), function_of(self.recurrent), function_of(self.output)

    def ruled(self, function: _FunctionT) -> _FunctionT:
        known = all(map(_is_pointwise, (self.activation, self.recurrent, self.output)))
        return pointwise(function) if known else function


class _RNN(_Functions):
    def __call__(self, gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
        (h,) = gates
        return (self.ruled(function_of(self.activation))(h),)


class _LSTM(_Functions):
    def __call__(self, gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
        (i, f, g, o), (_, c) = gates, state
        activation, recurrent, output = self.of()

        @self.ruled
        def new_c(i: jax.Array, f: jax.Array, g: jax.Array, c: jax.Array) -> jax.Array:
            return recurrent(f) * c + recurrent(i) * activation(g)

        @self.ruled
        def new_h(o: jax.Array, c: jax.Array) -> jax.Array:
            return recurrent(o) * output(c)

        c = new_c(i, f, g, c)
        return new_h(o, c), c


class _LSTMValues(_Functions):
    def __call__(self, gates: Arrays, *_: Any) -> Arrays:
        i, f, g, o = gates
        activation, recurrent, _output = self.of()
        return recurrent(i), recurrent(f), activation(g), recurrent(o)


class _GRU(_Functions):
    def __call__(self, gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
        activation, recurrent, _ = self.of()

        @self.ruled
        def new_h(r: jax.Array, z: jax.Array, n: jax.Array, n_h: jax.Array, h: jax.Array) -> jax.Array:
            n = activation(n + recurrent(r) * n_h)
            return (h - n) * recurrent(z) + n

        return (new_h(*gates, *hidden, *state),)


class _GRUValues(_Functions):
    def __call__(self, gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
        (r, z, n), (n_h,) = gates, hidden
        activation, recurrent, _ = self.of()
        return recurrent(r), recurrent(z), activation(n + recurrent(r) * n_h)


def _named(maker: str, **given: tuple[Activation, Activation]) -> str:
    """A cell's name, which is what makes it: of each argument the value and the default."""
    shown = [f"{name}={_shown(value)}" for name, (value, default) in given.items() if value != default]
    return f"{maker}({', '.join(shown)})"


def _shown(value: Activation) -> str:
    return getattr(value, "__name__", "") or repr(value)


def rnn_cell(activation: Activation = "tanh") -> Cell[jax.Array]:
    """An RNN's cell with another activation than torch has.

        h_t = activation(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    Args:
        activation: a name as in Keras, such as "softsign"; an object of a class in `jaxrnn.activations`; or a function.

    Returns:
        A `jaxrnn.Cell` for `jaxrnn.Recurrent` and `jaxrnn.apply`; with "tanh" and "relu" `jaxrnn.RNN_TANH` and
        `jaxrnn.RNN_RELU`. The same arguments make equal cells.

    Raises:
        ValueError: the name is not known.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.rnn_cell("softsign"), 10, 20)
    >>> spec
    Spec(rnn_cell(activation='softsign'), 10, 20)
    >>> output, h_n = jaxrnn.apply(spec, spec.init(jax.random.key(0)), jax.numpy.ones((5, 3, 10)))
    """
    function = _known("activation", activation)
    if function in ("tanh", "relu"):
        return RNN_TANH if function == "tanh" else RNN_RELU
    name, step = _named("rnn_cell", activation=(function, "tanh")), _RNN(function)
    return dataclasses.replace(RNN_TANH, name=name, step=step, gate_values=step)


def lstm_cell(
    activation: Activation = "tanh",
    recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None,
) -> Cell[Pair]:
    """An LSTM's cell with other activations than torch's.

        i, f, o = recurrent_activation(...)
        g = activation(...)
        c_t = f * c_{t-1} + i * g
        h_t = o * output_activation(c_t)

    where each `...` is that gate's `W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`.

    Args:
        activation: of g: a name as in Keras, such as "relu"; an object of a class in `jaxrnn.activations`, such as
            `HardSigmoid(0.2, 0.5)`; or a function of your own.
        recurrent_activation: of the gates i, f and o. "hard_sigmoid" is Keras 3's; that of Keras 2 is `HardSigmoid()`.
        output_activation: of the cell state; if None, `activation`, as in Keras.

    Returns:
        A `jaxrnn.Cell` for `jaxrnn.Recurrent` and `jaxrnn.apply`; with the defaults `jaxrnn.LSTM_CELL`. The same
        arguments make equal cells.

    Raises:
        ValueError: a name is not known.

    >>> import jax, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.lstm_cell(recurrent_activation="hard_sigmoid")
    >>> cell.name, cell == jaxrnn.lstm_cell("tanh", "hard_sigmoid"), jaxrnn.lstm_cell() is jaxrnn.LSTM_CELL
    ("lstm_cell(recurrent_activation='hard_sigmoid')", True, True)
    >>> lstm = jaxrnn.Recurrent(cell, 10, 20, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jax.numpy.ones((3, 5, 10)))
    """
    g, gates = _known("activation", activation), _known("recurrent_activation", recurrent_activation)
    output = g if output_activation is None else _known("output_activation", output_activation)
    if (g, gates, output) == ("tanh", "sigmoid", "tanh"):
        return LSTM_CELL
    shown = {"activation": (g, "tanh"), "recurrent_activation": (gates, "sigmoid"), "output_activation": (output, g)}
    step, values = _LSTM(g, gates, output), _LSTMValues(g, gates, output)
    return dataclasses.replace(LSTM_CELL, name=_named("lstm_cell", **shown), step=step, gate_values=values)


def gru_cell(activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid") -> Cell[jax.Array]:
    """A GRU's cell with other activations than torch's.

        r, z = recurrent_activation(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = activation(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    Args:
        activation: of n: a name as in Keras, such as "relu"; an object of a class in `jaxrnn.activations`; or a
            function of your own.
        recurrent_activation: of the gates r and z. "hard_sigmoid" is Keras 3's; that of Keras 2 is
            `jaxrnn.activations.HardSigmoid()`.

    Returns:
        A `jaxrnn.Cell` for `jaxrnn.Recurrent` and `jaxrnn.apply`; with the defaults `jaxrnn.GRU_CELL`. The same
        arguments make equal cells.

    Raises:
        ValueError: a name is not known.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.gru_cell(recurrent_activation=jaxrnn.activations.HardSigmoid()), 10, 20)
    >>> output, h_n = jaxrnn.apply(spec, spec.init(jax.random.key(0)), jax.numpy.ones((5, 3, 10)))
    """
    n, gates = _known("activation", activation), _known("recurrent_activation", recurrent_activation)
    if (n, gates) == ("tanh", "sigmoid"):
        return GRU_CELL
    name = _named("gru_cell", activation=(n, "tanh"), recurrent_activation=(gates, "sigmoid"))
    return dataclasses.replace(GRU_CELL, name=name, step=_GRU(n, gates), gate_values=_GRUValues(n, gates))
