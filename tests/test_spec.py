"""Spec and CellSpec make the checks that torch's constructors make and name the parameters as torch does."""

import math
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

LAYER_KINDS = [
    ("RNN", jaxrnn.RNN_TANH, {}),
    ("RNN", jaxrnn.RNN_RELU, {"nonlinearity": "relu"}),
    ("LSTM", jaxrnn.LSTM_CELL, {}),
    ("LSTM", jaxrnn.LSTM_CELL, {"proj_size": 2}),
    ("GRU", jaxrnn.GRU_CELL, {}),
]
SETTINGS = [
    {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    for num_layers in (1, 2, 11)
    for bidirectional in (False, True)
    for bias in (False, True)
]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "cell", "extra"), LAYER_KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_names_shapes_and_order_are_torchs(
    torch: types.ModuleType, name: str, cell: jaxrnn.Cell, extra: dict, settings: dict
) -> None:
    module = getattr(torch.nn, name)(3, 4, **settings, **extra)
    spec = jaxrnn.Spec(cell, 3, 4, **settings, proj_size=extra.get("proj_size", 0))
    assert list(spec.shapes().items()) == [(key, tuple(value.shape)) for key, value in module.state_dict().items()]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "cell"), [("RNNCell", jaxrnn.RNN_TANH), ("LSTMCell", jaxrnn.LSTM_CELL), ("GRUCell", jaxrnn.GRU_CELL)]
)
@pytest.mark.parametrize("bias", [True, False, 1, 0])
def test_cell_names_shapes_and_order_are_torchs(
    torch: types.ModuleType, name: str, cell: jaxrnn.Cell, bias: bool
) -> None:
    module = getattr(torch.nn, name)(3, 4, bias=bias)
    shapes = jaxrnn.CellSpec(cell, 3, 4, bias).shapes()
    assert list(shapes.items()) == [(key, tuple(value.shape)) for key, value in module.state_dict().items()]


def test_names_of_a_projected_bidirectional_lstm() -> None:
    """Known by heart, for machines without torch."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, 2, bidirectional=True, proj_size=2)
    roles = {"weight_ih": (16, 3), "weight_hh": (16, 2), "bias_ih": (16,), "bias_hh": (16,), "weight_hr": (2, 4)}
    expected = {
        role + suffix: (16, 4) if role == "weight_ih" and "_l1" in suffix else shape
        for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
        for role, shape in roles.items()
    }
    assert list(spec.shapes().items()) == list(expected.items())


# Arguments of a GRU or LSTM, and what torch raises for them.
BAD: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"input_size": 0}, ValueError),
    ({"input_size": -1}, ValueError),
    ({"input_size": 2.0}, TypeError),
    ({"input_size": np.int64(2)}, TypeError),
    ({"hidden_size": 0}, ValueError),
    ({"hidden_size": "4"}, TypeError),
    ({"num_layers": 0}, ValueError),
    ({"num_layers": 1.5}, TypeError),
    ({"bias": 1}, TypeError),
    ({"batch_first": 0}, TypeError),
    ({"dropout": -0.1}, ValueError),
    ({"dropout": 1.1}, ValueError),
    ({"dropout": True}, ValueError),
    ({"dropout": "0.5"}, ValueError),
    ({"proj_size": -1}, ValueError),
    ({"proj_size": 4}, ValueError),
    ({"proj_size": 5}, ValueError),
]


@pytest.mark.parametrize(("bad", "error"), BAD, ids=str)
def test_bad_arguments(bad: dict, error: type[Exception]) -> None:
    arguments = {"input_size": 3, "hidden_size": 4}
    jaxrnn.Spec(jaxrnn.LSTM_CELL, **arguments)
    (name, value) = next(iter(bad.items()))
    with pytest.raises(error, match=name) as caught:
        jaxrnn.Spec(jaxrnn.LSTM_CELL, **{**arguments, **bad})
    assert str(value) in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize(("bad", "error"), BAD, ids=str)
def test_torch_raises_the_same(torch: types.ModuleType, bad: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        torch.nn.LSTM(**{"input_size": 3, "hidden_size": 4, **bad})


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        ({"input_size": np.int64(2)}, ": write int(input_size)"),
        ({"num_layers": np.int8(2)}, ": write int(num_layers)"),
        ({"bias": np.True_}, ": write bool(bias)"),
        ({"hidden_size": np.float32(2.5)}, ""),
        ({"hidden_size": 2.5}, ""),
    ],
    ids=str,
)
def test_what_to_write_for_numbers_of_numpy(bad: dict, remedy: str) -> None:
    with pytest.raises(TypeError) as caught:
        jaxrnn.Spec(jaxrnn.LSTM_CELL, **{"input_size": 3, "hidden_size": 4, **bad})
    message, wrong = str(caught.value), next(iter(bad.values()))
    assert message.endswith(f"{type(wrong).__name__}{remedy}")
    assert ("numpy." in message) == isinstance(wrong, np.generic)


@pytest.mark.parametrize("cell", [jaxrnn.RNN_TANH, jaxrnn.GRU_CELL, jaxrnn.IND_RNN_CELL], ids=lambda cell: cell.name)
def test_cells_that_do_not_project(cell: jaxrnn.Cell) -> None:
    with pytest.raises(
        ValueError, match=f"proj_size should be 0 for {cell.name}, got 2: only a Cell with projects=True"
    ):
        jaxrnn.Spec(cell, 3, 4, proj_size=2)


def test_dropout_in_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="num_layers=1"):
        jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, num_layers=2, dropout=0.5)


def test_what_torch_accepts() -> None:
    assert jaxrnn.Spec(jaxrnn.GRU_CELL, True, True).shapes()["weight_ih_l0"] == (3, 1)
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, bidirectional=1, dropout=0)
    assert spec == jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, bidirectional=True)
    assert jaxrnn.CellSpec(jaxrnn.GRU_CELL, 0, 0).shapes()["weight_hh"] == (0, 0)


def test_a_cell_spec_checks_its_sizes() -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, -1)
    with pytest.raises(TypeError, match="input_size"):
        jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3.0, 4)


def test_a_spec_is_a_value() -> None:
    one, other = (jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, 2, dropout=0.5) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(AttributeError):
        one.input_size = 5


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_initial_parameters_are_uniform_as_torchs(dtype: jnp.dtype) -> None:
    """Every parameter, biases and weight_hr too, is uniform within 1/sqrt(hidden_size): mean, spread and range."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 60, 64, 2, proj_size=32)
    params = spec.init(jax.random.key(0), dtype)
    assert {name: value.shape for name, value in params.items()} == spec.shapes()
    bound = 1 / math.sqrt(64)
    for name, value in params.items():
        assert value.dtype == dtype
        numbers = np.asarray(value, np.float64).ravel()
        assert np.abs(numbers).max() <= bound
        assert np.abs(numbers).max() > 0.95 * bound, name
        assert abs(numbers.mean()) < 5 * bound / math.sqrt(3 * numbers.size), name
        assert abs(numbers.std() - bound / math.sqrt(3)) < 2 * bound / math.sqrt(numbers.size), name
    assert not np.array_equal(params["bias_ih_l0"], params["bias_hh_l0"])


def test_repr_is_short() -> None:
    assert repr(jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4)) == "Spec(LSTM, 3, 4)"
    assert (
        repr(jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, 2, bidirectional=True))
        == "Spec(GRU, 3, 4, num_layers=2, bidirectional=True)"
    )
    assert repr(jaxrnn.CellSpec(jaxrnn.RNN_RELU, 3, 4, bias=False)) == "CellSpec(RNN_RELU, 3, 4, bias=False)"
