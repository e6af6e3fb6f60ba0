"""The records: their checks, what each step computes on numbers, and what of its arguments each result depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close

import jaxrnn

CELLS = [jaxrnn.RNN_TANH, jaxrnn.RNN_RELU, jaxrnn.LSTM_CELL, jaxrnn.GRU_CELL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": ()}, "gates"),
        ({"gates": ("a", "a")}, "gates"),
        ({"states": ()}, "states"),
        ({"states": ("h", "h")}, "states"),
        ({"apart": ("x",)}, "apart"),
    ],
)
def test_a_cell_checks_itself(change: dict, message: str) -> None:
    fields = {"name": "mine", "gates": ("a", "b"), "states": ("h",), "step": lambda gates, hidden, state: state}
    jaxrnn.Cell(**fields)
    with pytest.raises(ValueError, match=message):
        jaxrnn.Cell(**{**fields, **change})


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_is_hashable_and_pointwise(cell: jaxrnn.Cell) -> None:
    assert hash(cell) == hash(cell)
    random = np.random.RandomState(0)
    arguments = [tuple(jnp.asarray(random.randn(7)) for _ in names) for names in (cell.gates, cell.apart, cell.states)]
    whole = cell.step(*arguments)
    assert len(whole) == len(cell.states)
    for unit in range(7):
        one = cell.step(*(tuple(a[unit] for a in group) for group in arguments))
        assert_close([a[unit] for a in whole], one, atol=0, rtol=1e-15)


def test_gru_keeps_its_state_where_z_is_one() -> None:
    """The final combine's sign: z = 1 keeps h, z = 0 takes n."""
    gates = (jnp.zeros(2), jnp.asarray([50.0, -50.0]), jnp.asarray([0.7, 0.7]))
    (h,) = jaxrnn.GRU_CELL.step(gates, (jnp.zeros(2),), (jnp.asarray([0.3, 0.3]),))
    assert_close(h, np.array([0.3, np.tanh(0.7)]), atol=0, rtol=1e-15)


def test_relu_has_gradient_zero_at_zero() -> None:
    gradient = jax.grad(lambda a: jaxrnn.RNN_RELU.step((a,), (), (a,))[0])(0.0)
    assert gradient == 0
