"""What one step of a recurrent cell computes, and nothing else.

A kind of cell is a value, a `Cell`. Its `step` sees the gates after the matrix products and touches no weight.
Products, biases, projection, time, layers and derivatives are written once, for every cell, in `jaxrnn._core`.
"""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import relu, sigmoid

from jaxrnn._core.rules import pointwise

Arrays = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]  # an LSTM's state
Nonlinearity = Literal["tanh", "relu"]
# The type of a cell's state: a jax.Array, or for several states a tuple; Any for a cell without an annotation.
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    StateT = TypeVar("StateT", covariant=True, default=Any)
else:
    from typing import TypeVar

    StateT = TypeVar("StateT", covariant=True)
# The weights of one layer in one direction, in torch's order.
ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class Parameter(NamedTuple):
    """A parameter of a cell's own, beside the weights and biases that every cell has.

    Attributes:
        axes: ("hidden",) for a number for each hidden unit, ("gates", "hidden") for one for each unit of each gate,
            ("gates",) for one for each gate, () for a single number.
        init: `init(key, shape, dtype)` draws the initial value, as the functions of `jax.nn.initializers` do; None to
            draw it like the weights.

    An LSTM whose forget gate has a bias of its own for each unit, at first 1:

    >>> import jax, jaxrnn
    >>> def step(gates, hidden, state, params):
    ...     i, f, g, o = gates
    ...     return jaxrnn.LSTM_CELL.step((i, f + params["keep"], g, o), hidden, state)
    >>> keep = jaxrnn.Parameter(("hidden",), jax.nn.initializers.ones)
    >>> cell = jaxrnn.Cell("keeping", ("i", "f", "g", "o"), ("h", "c"), step, params={"keep": keep})
    >>> jaxrnn.Spec(cell, 10, 20).init(jax.random.key(0))["keep_l0"].shape
    (20,)
    """

    axes: tuple[str, ...]
    init: Callable[..., jax.Array] | None = None


class _Parameters(dict[str, Parameter]):
    """A dict that can be hashed, because a cell is hashed."""

    def __hash__(self) -> int:  # type: ignore[override]  # dict has none, which mypy wants kept
        return hash(tuple(self.items()))


@dataclasses.dataclass(frozen=True)
class Cell(Generic[StateT]):
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
            With `params`, `step(gates, hidden, state, params)`. Arrays that it closes over are differentiated as
            well.
        apart: the names of the gates that come in two halves.
        projects: whether `proj_size` is allowed: the step must not read the first state, whose size then differs.
        params: the cell's own parameters by name, each a `Parameter` or its axes. The step gets a dict of arrays. One
            with an axis "hidden" broadcasts against the gates: it is `(..., hidden_size)`, or with an axis "gates"
            `(gates, ..., hidden_size)`, where `...` stands for axes of size one.
        recurrent: whether there are `weight_hh` and `bias_hh`. Without them, the gates are `W_ih x + b_ih`, and only
            the step connects a state with the next.
        gate_values: `gate_values(gates, hidden, state)`, or with `params` also of these: what each gate is after its
            nonlinearity, for `jaxrnn.trajectory`, one array a gate. Without it, that shows the step's `gates`.
        zoneout: for each state the probability with which each of its units keeps its value at a step in training;
            `jaxrnn.zoneout` sets it. Empty for none.

    Raises:
        ValueError: a name is missing, doubled or unknown, or settings exclude each other.

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

    A type checker knows what states are from `jaxrnn.Cell[jax.Array]`, for a cell of one, and
    `jaxrnn.Cell[tuple[jax.Array, jax.Array]]`, for one of two. Annotate your own so: `coupled: jaxrnn.Cell[...] = ...`.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Callable[..., Arrays] = dataclasses.field(repr=False)
    apart: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    projects: bool = dataclasses.field(default=False, repr=False)
    params: Mapping[str, Parameter | Sequence[str]] = dataclasses.field(default_factory=dict, repr=False)
    recurrent: bool = dataclasses.field(default=True, repr=False)
    gate_values: Callable[..., Arrays] | None = dataclasses.field(default=None, repr=False)
    zoneout: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        for field in ("gates", "states", "apart"):
            names = tuple(getattr(self, field))
            object.__setattr__(self, field, names)
            if len(set(names)) != len(names) or not (names or field == "apart"):
                raise ValueError(f"{field} of Cell {self.name!r} should be names, each once, got {names}")
        if not set(self.apart) <= set(self.gates):
            raise ValueError(
                f"apart of Cell {self.name!r} should name some of the gates {self.gates}, got {self.apart}"
            )
        if not self.recurrent and (self.apart or self.projects):
            got = f"apart={self.apart} and projects={self.projects}"
            raise ValueError(
                f"Cell {self.name!r} with recurrent=False should have apart=() and projects=False, got {got}"
            )
        for p in self.zoneout:
            check_probability(f"zoneout of Cell {self.name!r}", p)
        object.__setattr__(self, "zoneout", tuple(map(float, self.zoneout)))
        if len(self.zoneout) not in (0, len(self.states)):
            raise ValueError(
                f"zoneout of Cell {self.name!r} should have a number for each of {self.states}, got {self.zoneout}"
            )
        object.__setattr__(self, "params", _Parameters({n: self._parameter(n, p) for n, p in self.params.items()}))

    def _parameter(self, name: str, given: Any) -> Parameter:
        if not name.isidentifier() or name in ROLES:
            wanted = f"Python names other than {', '.join(ROLES)}"
            raise ValueError(f"params of Cell {self.name!r} should have {wanted}, got {name!r}")
        parameter = given if isinstance(given, Parameter) else Parameter(given)
        axes = parameter.axes
        if isinstance(axes, str) or tuple(axes) not in ((), ("gates",), ("hidden",), ("gates", "hidden")):
            raise ValueError(
                f"axes of {name!r} of Cell {self.name!r} should be ('hidden',), ('gates', 'hidden'), ('gates',) or (), "
                f"got {axes!r}"
            )
        return parameter._replace(axes=tuple(axes))

    @property
    def own(self) -> dict[str, Parameter]:
        """`params`, each as a `Parameter`."""
        return {name: given for name, given in self.params.items() if isinstance(given, Parameter)}


def check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} should be a number from 0 to 1, not a bool, got {value!r}")


def _rnn_tanh(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (h,) = gates
    return (pointwise(jnp.tanh)(h),)


def _rnn_relu(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (h,) = gates
    return (pointwise(relu)(h),)


def _lstm(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    i, f, g, o = gates
    _, c = state
    c = lstm_c(i, f, g, c)
    return lstm_h(o, c), c


@pointwise
def lstm_c(i: jax.Array, f: jax.Array, g: jax.Array, c: jax.Array) -> jax.Array:
    return sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)


@pointwise
def lstm_h(o: jax.Array, c: jax.Array) -> jax.Array:
    return sigmoid(o) * jnp.tanh(c)


def lstm_values(gates: Arrays, *_: Any) -> Arrays:
    i, f, g, o = gates
    return sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)


def _gru(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    return (_gru_h(*gates, *hidden, *state),)


@pointwise
def _gru_h(r: jax.Array, z: jax.Array, n: jax.Array, n_h: jax.Array, h: jax.Array) -> jax.Array:
    n = jnp.tanh(n + sigmoid(r) * n_h)
    return (h - n) * sigmoid(z) + n


def _gru_values(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (r, z, n), (n_h,) = gates, hidden
    return sigmoid(r), sigmoid(z), jnp.tanh(n + sigmoid(r) * n_h)


RNN_TANH: Cell[jax.Array] = Cell("RNN_TANH", gates=("h",), states=("h",), step=_rnn_tanh, gate_values=_rnn_tanh)
RNN_RELU: Cell[jax.Array] = Cell("RNN_RELU", gates=("h",), states=("h",), step=_rnn_relu, gate_values=_rnn_relu)
LSTM_CELL: Cell[Pair] = Cell(
    "LSTM", gates=("i", "f", "g", "o"), states=("h", "c"), step=_lstm, projects=True, gate_values=lstm_values
)
GRU_CELL: Cell[jax.Array] = Cell(
    "GRU", gates=("r", "z", "n"), states=("h",), step=_gru, apart=("n",), gate_values=_gru_values
)


def torch_rnn_cell(nonlinearity: Nonlinearity) -> Cell[jax.Array]:
    """The cell of torch's RNN and RNNCell with this nonlinearity."""
    cells = {"tanh": RNN_TANH, "relu": RNN_RELU}
    if nonlinearity not in cells:
        raise ValueError(f"nonlinearity should be 'tanh' or 'relu', got {nonlinearity!r}")
    return cells[nonlinearity]
