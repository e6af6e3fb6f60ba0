"""What one step of a recurrent cell computes, and nothing else.

A kind of cell is a value, a `Cell`. Its `step` sees the gates after the matrix products and touches no weight.
Products, biases, projection, time, layers and derivatives are written once, for every cell, in `jaxrnn.recurrence` and
above.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import relu, sigmoid

from jaxrnn.rules import pointwise

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A kind of recurrent cell.

    At each step the gates are `W_ih x + b_ih + W_hh h + b_hh`, one array of shape `(..., hidden_size)` a gate, stacked
    in the weights' rows in the order of `gates`. A gate named in `apart` needs its two halves separately.

    Attributes:
        name: what the cell is called; torch's `mode` for torch's cells.
        gates: the gates' names, in the order of the weights' rows.
        states: the names of the state's arrays. The first is the output, and what `W_hh` multiplies at the next step.
        step: `step(gates, hidden, state) -> state`, any function of arrays of shape `(..., hidden_size)`.
            `gates` has one array a gate: the whole sum, but only `W_ih x + b_ih` for a gate named in `apart`;
            `hidden` has `W_hh h + b_hh` for each gate named in `apart`; `state` has one array a state.
            Arrays that it closes over are differentiated as well, and saved once for each time step.
        apart: the names of the gates that come in two halves.
        projects: whether `proj_size` is allowed: the step must not read the first state, whose size then differs.

    Raises:
        ValueError: a name is missing, doubled or unknown.

    A cell of one's own, an LSTM whose input gate is one minus its forget gate:

    >>> import jax, jaxrnn
    >>> def step(gates, hidden, state):
    ...     f, g, o = gates
    ...     _, c = state
    ...     keep = jax.nn.sigmoid(f)
    ...     c = keep * c + (1 - keep) * jax.numpy.tanh(g)
    ...     return jax.nn.sigmoid(o) * jax.numpy.tanh(c), c
    >>> coupled = jaxrnn.Cell("coupled", gates=("f", "g", "o"), states=("h", "c"), step=step)
    >>> spec = jaxrnn.Spec(coupled, 10, 20, num_layers=2, bidirectional=True)
    >>> output, (h_n, c_n) = jaxrnn.apply(spec, spec.init(jax.random.key(0)), jax.numpy.ones((5, 3, 10)))
    >>> output.shape, c_n.shape
    ((5, 3, 40), (4, 3, 20))
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Callable[[Arrays, Arrays, Arrays], Arrays]
    apart: tuple[str, ...] = ()
    projects: bool = False

    def __post_init__(self) -> None:
        for field in ("gates", "states", "apart"):
            names = tuple(getattr(self, field))
            object.__setattr__(self, field, names)
            if len(set(names)) != len(names) or not (names or field == "apart"):
                raise ValueError(f"{field} of Cell {self.name!r} should be distinct names, got {names}")
        if not set(self.apart) <= set(self.gates):
            raise ValueError(
                f"apart of Cell {self.name!r} should name some of the gates {self.gates}, got {self.apart}"
            )


def _rnn_tanh(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (h,) = gates
    return (pointwise(jnp.tanh)(h),)


def _rnn_relu(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (h,) = gates
    return (pointwise(relu)(h),)


def _lstm(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    i, f, g, o = gates
    _, c = state
    c = _lstm_c(i, f, g, c)
    return _lstm_h(o, c), c


@pointwise
def _lstm_c(i: jax.Array, f: jax.Array, g: jax.Array, c: jax.Array) -> jax.Array:
    return sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)


@pointwise
def _lstm_h(o: jax.Array, c: jax.Array) -> jax.Array:
    return sigmoid(o) * jnp.tanh(c)


def _gru(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    return (_gru_h(*gates, *hidden, *state),)


@pointwise
def _gru_h(r: jax.Array, z: jax.Array, n: jax.Array, n_h: jax.Array, h: jax.Array) -> jax.Array:
    n = jnp.tanh(n + sigmoid(r) * n_h)
    return (h - n) * sigmoid(z) + n


RNN_TANH = Cell("RNN_TANH", gates=("h",), states=("h",), step=_rnn_tanh)
RNN_RELU = Cell("RNN_RELU", gates=("h",), states=("h",), step=_rnn_relu)
LSTM_CELL = Cell("LSTM", gates=("i", "f", "g", "o"), states=("h", "c"), step=_lstm, projects=True)
GRU_CELL = Cell("GRU", gates=("r", "z", "n"), states=("h",), step=_gru, apart=("n",))


def rnn_cell(nonlinearity: str) -> Cell:
    """The cell of torch's RNN and RNNCell with this nonlinearity."""
    cells = {"tanh": RNN_TANH, "relu": RNN_RELU}
    if nonlinearity not in cells:
        raise ValueError(f"nonlinearity should be 'tanh' or 'relu', got {nonlinearity!r}")
    return cells[nonlinearity]
