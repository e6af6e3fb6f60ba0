"""Cells with other activations: equations, derivatives, equality, and names, which mean what they do in Keras."""

import importlib.util
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx

import jaxrnn
from jaxrnn import activations
from jaxrnn.activations import FUNCTIONS, function_of

F, H, T, N = 2, 3, 3, 2
OBJECTS = [
    activations.Affine(0.7, -0.2),
    activations.Elu(0.3),
    activations.HardSigmoid(),
    activations.LeakyRelu(0.3),
    activations.ScaledTanh(1.7, 0.4),
    activations.ThresholdedRelu(0.2),
    activations.Clipped("tanh", 0.3),
    activations.Clipped(activations.HardSigmoid(0.3, 0.4), 0.5),
]


def squared(x: jax.Array) -> jax.Array:
    return x * x


def over_units(x: jax.Array) -> jax.Array:
    return x / jnp.sum(jnp.exp(x), -1, keepdims=True)


MAKERS: dict[str, Callable[[Any, Any], jaxrnn.Cell]] = {
    "rnn": lambda one, other: jaxrnn.rnn_cell(one),
    "lstm": lambda one, other: jaxrnn.lstm_cell(one, other, "softsign"),
    "gru": lambda one, other: jaxrnn.gru_cell(one, other),
}


def _plain(kind: str, one: Any, other: Any, gates: Any, hidden: Any, state: Any) -> tuple:
    """The equations of the docstrings."""
    one, other, out = function_of(one), function_of(other), function_of("softsign")
    if kind == "rnn":
        return (one(gates[0]),)
    if kind == "gru":
        r, z = other(gates[0]), other(gates[1])
        return ((1 - z) * one(gates[2] + r * hidden[0]) + z * state[0],)
    c = other(gates[1]) * state[1] + other(gates[0]) * one(gates[2])
    return other(gates[3]) * out(c), c


@pytest.mark.parametrize(
    "activation", [*FUNCTIONS, *OBJECTS, squared, over_units], ids=lambda each: getattr(each, "__name__", str(each))
)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_and_its_derivative_are_those_of_the_equations(kind: str, activation: Any) -> None:
    cell = MAKERS[kind](activation, "hard_sigmoid")
    groups = (cell.gates, cell.apart, cell.states)
    arguments = [tuple(jnp.asarray(normal(N, H, seed=10 * k + i)) for i in range(len(g))) for k, g in enumerate(groups)]
    cotangents = tuple(jnp.asarray(normal(N, H, seed=50 + i)) for i in range(len(cell.states)))
    ours, back = jax.vjp(cell.step, *arguments)
    theirs, expected = jax.vjp(lambda *a: _plain(kind, activation, "hard_sigmoid", *a), *arguments)
    assert_close(ours, theirs)
    assert_close(back(cotangents), expected(cotangents))
    assert cell.gate_values is not None
    assert len(cell.gate_values(*arguments)) == len(cell.gates)


@pytest.mark.parametrize("kind", MAKERS)
def test_layers_of_them(kind: str) -> None:
    """In both of Flax's APIs, with lengths, both directions and every gradient."""
    cell = MAKERS[kind]("elu", activations.HardSigmoid())
    spec = jaxrnn.Spec(cell, F, H, bidirectional=True)
    params, x, lengths = parameters(spec), normal(T, N, F), [T, 1]

    def plain(params: Any, x: Any) -> Any:
        outputs, states = [], []
        for direction in range(2):
            w = {role: params[name] for role, name in spec.names(0, direction).items()}
            rows, ends = [], []
            for row, length in enumerate(lengths):
                steps = x[:length, row][:: -1 if direction else 1]
                state, row_outputs = tuple(jnp.zeros(H) for _ in cell.states), []
                for x_t in steps:
                    one = jnp.split(w["weight_ih"] @ x_t + w["bias_ih"], len(cell.gates))
                    two = jnp.split(w["weight_hh"] @ state[0] + w["bias_hh"], len(cell.gates))
                    gates = [a if n in cell.apart else a + b for a, b, n in zip(one, two, cell.gates, strict=True)]
                    state = _plain(kind, "elu", activations.HardSigmoid(), gates, two[2:], state)
                    row_outputs.append(state[0])
                rows.append(jnp.pad(jnp.stack(row_outputs)[:: -1 if direction else 1], ((0, T - length), (0, 0))))
                ends.append(state[0])
            outputs.append(jnp.stack(rows, 1))
            states.append(jnp.stack(ends))
        return jnp.concatenate(outputs, -1), jnp.stack(states)

    def ours(params: Any, x: Any) -> Any:
        output, state = jaxrnn.apply(spec, params, x, lengths=lengths)
        return output, jax.tree.leaves(state)[0]

    def loss(run: Callable) -> Callable:
        return lambda *a: sum(jnp.sum(jnp.sin(each + k)) for k, each in enumerate(run(*a)))

    assert_close(ours(params, x), plain(params, x))
    found, expected = jax.jit(lambda *a: [jax.grad(loss(run), (0, 1))(*a) for run in (ours, plain)])(params, x)
    assert_close(found, expected)
    module = jaxrnn.Recurrent(cell, F, H, bidirectional=True, param_dtype=float, rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(module, params)
    assert_close(module(x, lengths=lengths)[0], ours(params, x)[0], atol=1e-12)
    linen = jaxrnn.linen.Recurrent(cell, F, H, bidirectional=True)
    assert_close(linen.apply({"params": params}, x, lengths=lengths)[0], ours(params, x)[0], atol=1e-12)


def test_the_defaults_are_torchs_cells() -> None:
    assert jaxrnn.lstm_cell() is jaxrnn.lstm_cell(jnp.tanh, jax.nn.sigmoid, "tanh") is jaxrnn.LSTM_CELL
    assert jaxrnn.gru_cell() is jaxrnn.gru_cell("tanh", "sigmoid") is jaxrnn.GRU_CELL
    assert (jaxrnn.rnn_cell(), jaxrnn.rnn_cell("relu")) == (jaxrnn.RNN_TANH, jaxrnn.RNN_RELU)


def test_the_same_arguments_make_equal_cells_that_tell_what_they_are() -> None:
    made = [
        lambda: jaxrnn.lstm_cell(recurrent_activation="hard_sigmoid"),
        lambda: jaxrnn.lstm_cell("relu"),
        lambda: jaxrnn.lstm_cell("relu", output_activation="tanh"),
        lambda: jaxrnn.gru_cell("softsign", activations.HardSigmoid()),
        lambda: jaxrnn.rnn_cell(activations.Clipped("tanh", 3.0)),
        lambda: jaxrnn.rnn_cell(squared),
    ]
    cells = [make() for make in made]
    assert cells == [make() for make in made]
    assert len(set(cells)) == len(cells)
    assert pickle.loads(pickle.dumps(cells)) == cells
    names = vars(activations) | {"lstm_cell": jaxrnn.lstm_cell, "squared": squared}
    assert [eval(cell.name, names) for cell in cells] == cells
    assert cells[3].name == "gru_cell(activation='softsign', recurrent_activation=HardSigmoid(alpha=0.2, beta=0.5))"
    assert repr(jaxrnn.Spec(cells[2], F, H)) == "Spec(lstm_cell(activation='relu', output_activation='tanh'), 2, 3)"
    assert jaxrnn.gru_cell("swish") == jaxrnn.gru_cell(jax.nn.silu) == jaxrnn.gru_cell("silu")
    assert jaxrnn.rnn_cell(activations.LeakyRelu(0.2)) == jaxrnn.rnn_cell("leaky_relu")
    assert jaxrnn.lstm_cell("relu").projects


@pytest.mark.parametrize("wrong", ["tahn", None, 3])
def test_an_unknown_name_is_refused(wrong: Any) -> None:
    for maker in (jaxrnn.rnn_cell, jaxrnn.lstm_cell, jaxrnn.gru_cell):
        with pytest.raises(ValueError, match=r"^activation should be a function, or one of 'tanh', .*; got "):
            maker(wrong)


@pytest.mark.libraries
@pytest.mark.slow  # imports Keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_names_are_kerass() -> None:
    from keras_models import load_keras

    theirs, x = load_keras().activations, jnp.linspace(-7.0, 7.0, 141)
    names = {name for name in dir(theirs) if not name.startswith("_")} - {"get", "serialize", "deserialize"}
    names = {name for name in names if callable(getattr(theirs, name))}
    # What halves its input, or has arguments without a default; what JAX has not.
    assert names - {*FUNCTIONS, *activations.SYNONYMS} == {
        *("glu", "threshold"), *("hard_shrink", "soft_shrink", "sparsemax"),
    }  # fmt: skip
    for name in {*FUNCTIONS, *activations.SYNONYMS} & names:
        function = getattr(theirs, name)
        assert len([p for p in inspect.signature(function).parameters.values() if p.default is p.empty]) == 1
        ours = function_of(activations._known("activation", name))(x)
        expected = np.asarray(function(x))  # its tanh is in float32, whatever x is
        assert_close(ours, expected, atol=1e-15 if expected.dtype == float else 1e-6, rtol=0)
    assert {*FUNCTIONS} <= names
