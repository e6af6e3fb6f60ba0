"""Every state and every gate: as one step after the other gives them, and differentiable."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close

import jaxrnn

F, H, T, N = 3, 4, 5, 2
sigmoid = jax.nn.sigmoid


def _lstm_gates(sums: np.ndarray, hidden: np.ndarray) -> dict:
    i, f, g, o = np.split(np.asarray(sums + hidden), 4, -1)
    return {"i": sigmoid(i), "f": sigmoid(f), "g": np.tanh(g), "o": sigmoid(o)}


def _gru_gates(sums: np.ndarray, hidden: np.ndarray) -> dict:
    (r, z, n), (r_h, z_h, n_h) = np.split(np.asarray(sums), 3, -1), np.split(np.asarray(hidden), 3, -1)
    return {"r": sigmoid(r + r_h), "z": sigmoid(z + z_h), "n": np.tanh(n + sigmoid(r + r_h) * n_h)}


KINDS = {"LSTM": (jaxrnn.LSTM_CELL, _lstm_gates), "GRU": (jaxrnn.GRU_CELL, _gru_gates)}


def _step_by_step(kind: str, params: dict, x: np.ndarray, hx: tuple) -> tuple[dict, dict]:
    """One row, one layer, forward."""
    cell, gates_of = KINDS[kind]
    weights = {name.removesuffix("_l0"): value for name, value in params.items()}
    states: dict = {name: [] for name in cell.states}
    gates: dict = {name: [] for name in cell.gates}
    state: Any = hx if len(hx) > 1 else hx[0]
    for x_t in x:
        h = state[0] if len(hx) > 1 else state
        inputs = weights["weight_ih"] @ x_t + weights["bias_ih"], weights["weight_hh"] @ h + weights["bias_hh"]
        for name, value in gates_of(*inputs).items():
            gates[name].append(value)
        state = jaxrnn.apply_cell(jaxrnn.CellSpec(cell, F, H), weights, x_t, state)
        for name, value in zip(cell.states, state if len(hx) > 1 else (state,), strict=True):
            states[name].append(value)
    return jax.tree.map(np.stack, (states, gates), is_leaf=lambda a: isinstance(a, list))


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gates_are_those_of_each_step(kind: str) -> None:
    cell = KINDS[kind][0]
    spec = jaxrnn.Spec(cell, F, H)
    params, x, hx = parameters(spec), normal(T, F), tuple(normal(1, H, seed=k) for k in range(len(cell.states)))
    inside = jaxrnn.trajectory(spec, params, x, hx if len(hx) > 1 else hx[0])
    states, gates = _step_by_step(kind, params, x, tuple(a[0] for a in hx))
    assert_close(inside.states, {name: a[None] for name, a in states.items()})
    assert_close(inside.gates, {name: a[None] for name, a in gates.items()})


def test_layers_directions_lengths_and_layouts() -> None:
    """Row by row, the last states are h_n and c_n, and the outputs of the last layer are its h."""
    settings = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, **settings)
    params, x, lengths = parameters(spec), normal(T, N, F), np.array([T, 2])
    inside = jaxrnn.trajectory(spec, params, x, lengths=lengths)
    output, (h_n, c_n) = jaxrnn.apply(spec, params, x, lengths=lengths)
    h, c = inside.states["h"], inside.states["c"]
    assert (h.shape, c.shape, inside.gates["f"].shape) == ((4, T, N, 2), (4, T, N, H), (4, T, N, H))
    for row, length in enumerate(lengths):
        assert_close(h[2:, :length, row], np.stack(np.split(output[:length, row], 2, -1)), atol=0)
        for state, last in ((h, h_n), (c, c_n)):
            assert_close(state[::2, length - 1, row], last[::2, row], atol=0)
            assert_close(state[1::2, 0, row], last[1::2, row], atol=0)
            assert_close(state[::2, T - 1, row], last[::2, row], atol=0)  # held
        assert np.all(inside.gates["f"][:, length:, row] == 0)
        assert np.all(inside.gates["f"][:, :length, row] > 0)
    batch_first = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, **settings, batch_first=True)
    swapped = jaxrnn.trajectory(batch_first, params, x.swapaxes(0, 1), lengths=lengths)
    assert_close(swapped, jax.tree.map(lambda a: a.swapaxes(1, 2), inside), atol=0)
    packed = jaxrnn.pack_padded_sequence(x[:, ::-1], lengths[::-1], enforce_sorted=False)
    assert_close(jaxrnn.trajectory(spec, params, packed), jax.tree.map(lambda a: a[:, :, ::-1], inside), atol=1e-15)
    alone = jaxrnn.trajectory(spec, params, x[:, 0])
    assert_close(alone, jax.tree.map(lambda a: a[:, :, 0], inside), atol=1e-15)


@pytest.mark.parametrize("remat", ["none", "gates", 2])
def test_it_can_be_differentiated(remat: Any) -> None:
    """By every array, as autodiff of the textbook's GRU in a scan, with a reset on the way."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    params, x, hx, reset = parameters(spec), normal(T, N, F), normal(1, N, H), np.arange(T * N).reshape(T, N) == 5

    def ours(*arguments: Any) -> list:
        inside = jaxrnn.trajectory(spec, *arguments, reset=reset, remat=remat)
        return [inside.states["h"][0], *(gate[0] for gate in inside.gates.values())]

    def plain(params: Any, x: Any, hx: Any) -> list:
        def body(h: Any, step: Any) -> Any:
            x_t, reset_t = step
            h = jnp.where(reset_t[:, None], 0.0, h)
            inputs = jnp.split(x_t @ params["weight_ih_l0"].T + params["bias_ih_l0"], 3, -1)
            hidden = jnp.split(h @ params["weight_hh_l0"].T + params["bias_hh_l0"], 3, -1)
            r, z = (sigmoid(inputs[k] + hidden[k]) for k in (0, 1))
            n = jnp.tanh(inputs[2] + r * hidden[2])
            h = (1 - z) * n + z * h
            return h, [h, r, z, n]

        return jax.lax.scan(body, hx[0], (x, reset))[1]

    def results(function: Any, *arguments: Any) -> Any:
        def loss(*arguments: Any) -> Any:
            return sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(function(*arguments)))

        return function(*arguments), jax.grad(loss, (0, 1, 2))(*arguments)

    assert_close(*jax.jit(lambda *a: [results(f, *a) for f in (ours, plain)])(params, x, hx))


def test_a_cell_that_does_not_say_shows_what_its_step_gets() -> None:
    cell = jaxrnn.Cell("plain", ("a",), ("h",), lambda gates, hidden, state: (jnp.tanh(gates[0]),))
    spec = jaxrnn.Spec(cell, F, H)
    inside = jaxrnn.trajectory(spec, parameters(spec), normal(T, F))
    assert_close(np.tanh(inside.gates["a"]), inside.states["h"])


def test_gate_values_see_the_state_before_the_step() -> None:
    """Also at the first step, and where the state was reset."""
    values = {"gate_values": lambda gates, hidden, state: state}
    cell = jaxrnn.Cell("plain", ("a",), ("h",), lambda gates, hidden, state: (jnp.tanh(gates[0]),), **values)
    spec, hx, restart = jaxrnn.Spec(cell, F, H), normal(1, H), normal(1, H, seed=1)
    inside = jaxrnn.trajectory(spec, parameters(spec), normal(T, F), hx, reset=np.arange(T) == 2, reset_state=restart)
    h = inside.states["h"][0]
    assert_close(inside.gates["a"][0], jnp.stack([hx[0], h[0], restart[0], h[2], h[3]]), atol=0)
