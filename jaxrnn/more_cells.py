"""Cells that torch.nn does not have, for `jaxrnn.Recurrent` and `jaxrnn.apply`.

Each has a step, `gate_values` and a `Cell`, and is exported in `jaxrnn/__init__.py`. Some have parameters of their own,
mix hidden units, or do without recurrent weights. A step wraps chains of nonlinear operations in
`jaxrnn._core.rules.pointwise`, to save memory. A checkpoint does not name its cells: `find_rnns` knows a cell by the
names of its own parameters, and takes one without them for torch's cell with as many gates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers, relu, sigmoid

from jaxrnn._core.rules import with_rule
from jaxrnn.cells import Arrays, Cell, Pair, Parameter, StateT, lstm_c, lstm_h, lstm_values

Params = dict[str, jax.Array]


def _normalised(arrays: Arrays, gain: Any, bias: Any) -> Arrays:
    """Layer normalisation over the units of all arrays together, with a gain and a bias for each array."""
    normalised, _ = _standardised(arrays)
    return tuple(a * g + b for a, g, b in zip(normalised, gain, bias, strict=True))


def _standardised_jvp(primals: tuple[Arrays], tangents: tuple[Arrays]) -> tuple:
    """Saves its result for the backward pass, and nothing else."""
    normalised, scale = _standardised(*primals)
    (d_arrays,) = tangents
    mean, along = _mean(d_arrays), _mean([a * d for a, d in zip(normalised, d_arrays, strict=True)])
    d_normalised = tuple((d - mean - a * along) * scale for a, d in zip(normalised, d_arrays, strict=True))
    return (normalised, scale), (d_normalised, -scale * scale * along)


@with_rule(_standardised_jvp)
def _standardised(arrays: Arrays) -> tuple[Arrays, jax.Array]:
    """The arrays with mean zero and variance one over the units of all, and one over the standard deviation."""
    mean = _mean(arrays)
    centred = [a - mean for a in arrays]
    scale = jax.lax.rsqrt(_mean([a * a for a in centred]) + 1e-5)
    return tuple(a * scale for a in centred), scale


def _mean(arrays: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, [jnp.mean(a, axis=-1, keepdims=True) for a in arrays]) / len(arrays)


def _layer_norm_sums(gates: Arrays, hidden: Arrays, params: Params) -> Arrays:
    inputs = _normalised(gates, params["weight_ln_ih"], params["bias_ln_ih"])
    hidden = _normalised(hidden, params["weight_ln_hh"], params["bias_ln_hh"])
    return tuple(a + b for a, b in zip(inputs, hidden, strict=True))


def _layer_norm_lstm(gates: Arrays, hidden: Arrays, state: Arrays, params: Params) -> Arrays:
    i, f, g, o = _layer_norm_sums(gates, hidden, params)
    _, c = state
    (c,) = _normalised((lstm_c(i, f, g, c),), [params["weight_ln_c"]], [params["bias_ln_c"]])
    return lstm_h(o, c), c


def _layer_norm_values(gates: Arrays, hidden: Arrays, state: Arrays, params: Params) -> Arrays:
    return lstm_values(_layer_norm_sums(gates, hidden, params))


def _peephole_sums(gates: Arrays, state: Arrays, params: Params) -> tuple[Arrays, jax.Array]:
    i, f, g, o = gates
    _, c = state
    i, f = i + params["weight_ci"] * c, f + params["weight_cf"] * c
    c = lstm_c(i, f, g, c)
    return (i, f, g, o + params["weight_co"] * c), c


def _peephole_lstm(gates: Arrays, hidden: Arrays, state: Arrays, params: Params) -> Arrays:
    (*_, o), c = _peephole_sums(gates, state, params)
    return lstm_h(o, c), c


def _peephole_values(gates: Arrays, hidden: Arrays, state: Arrays, params: Params) -> Arrays:
    return lstm_values(_peephole_sums(gates, state, params)[0])


def _ind_rnn(gates: Arrays, hidden: Arrays, state: Arrays, params: Params) -> Arrays:
    (a,), (h,) = gates, state
    return (relu(a + params["weight_u"] * h),)


def _min_gru_gates(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    z, n = gates
    return sigmoid(z), n


def _min_gru(gates: Arrays, hidden: Arrays, state: Arrays) -> Arrays:
    (z, n), (h,) = _min_gru_gates(gates, hidden, state), state
    return ((1 - z) * h + z * n,)


def zoneout(cell: Cell[StateT], **probabilities: float) -> Cell[StateT]:
    """The same cell with zoneout: in training, units of the state keep their value at random.

    Each unit of a state is kept from the step before with the state's probability p, drawn anew for each step, row and
    layer. In evaluation, it becomes its mean, p times the value before plus 1 - p times the one after. Krueger et al.
    2017 (arXiv:1606.01305). A layer with such a cell draws from the same `rngs` as dropout, and `train()`, `eval()` and
    `deterministic` switch both.

    Args:
        cell: any cell without zoneout.
        probabilities: by name of the state, from 0 to 1; 0 for a state that is not named.

    Raises:
        TypeError: cell is not a `Cell`.
        ValueError: the cell has no such state or has zoneout already, or a number is out of range.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.05, c=0.5)
    >>> lstm = jaxrnn.Recurrent(cell, 10, 20, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jnp.ones((5, 3, 10)))           # training; lstm.eval() for the mean
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell should be a jaxrnn.Cell, such as jaxrnn.LSTM_CELL, got {cell!r}")
    if any(cell.zoneout):
        raise ValueError(f"cell should have no zoneout, got {cell.name}: give the numbers of all states at once")
    if not probabilities.keys() <= set(cell.states):
        raise ValueError(f"zoneout of Cell {cell.name!r} is for its states {cell.states}, got {list(probabilities)}")
    said = ", ".join([cell.name, *(f"{name}={p}" for name, p in probabilities.items())])
    values = tuple(probabilities.get(name, 0.0) for name in cell.states)
    return dataclasses.replace(cell, name=f"zoneout({said})", zoneout=values)


_GATES = ("i", "f", "g", "o")
_ONES, _ZEROS = initializers.ones, initializers.zeros

# Ba et al. 2016 (arXiv:1607.06450), as in PyTorch's benchmarks/fastrnns/custom_lstms.py: the input's part and the
# recurrent part of the gates are normalised separately, each over all gates. c is normalised, and carried so. PyTorch's
# benchmark has no biases: use bias=False to compare.
LAYER_NORM_LSTM_CELL: Cell[Pair] = Cell(
    "LayerNormLSTM",
    gates=_GATES,
    states=("h", "c"),
    step=_layer_norm_lstm,
    apart=_GATES,
    params={
        "weight_ln_ih": Parameter(("gates", "hidden"), _ONES),
        "bias_ln_ih": Parameter(("gates", "hidden"), _ZEROS),
        "weight_ln_hh": Parameter(("gates", "hidden"), _ONES),
        "bias_ln_hh": Parameter(("gates", "hidden"), _ZEROS),
        "weight_ln_c": Parameter(("hidden",), _ONES),
        "bias_ln_c": Parameter(("hidden",), _ZEROS),
    },
    gate_values=_layer_norm_values,
)
# Gers and Schmidhuber 2000: the gates see c, too; the output gate sees the new one.
PEEPHOLE_LSTM_CELL: Cell[Pair] = Cell(
    "PeepholeLSTM",
    gates=_GATES,
    states=("h", "c"),
    step=_peephole_lstm,
    projects=True,
    params={"weight_ci": ("hidden",), "weight_cf": ("hidden",), "weight_co": ("hidden",)},
    gate_values=_peephole_values,
)
# Li et al. 2018 (arXiv:1803.04831): each hidden unit sees itself alone.
IND_RNN_CELL: Cell[jax.Array] = Cell(
    "IndRNN",
    gates=("h",),
    states=("h",),
    step=_ind_rnn,
    params={"weight_u": ("hidden",)},
    recurrent=False,
    gate_values=_ind_rnn,
)
# Feng et al. 2024 (arXiv:2410.01201): gates of the input alone.
MIN_GRU_CELL: Cell[jax.Array] = Cell(
    "minGRU", gates=("z", "n"), states=("h",), step=_min_gru, recurrent=False, gate_values=_min_gru_gates
)
