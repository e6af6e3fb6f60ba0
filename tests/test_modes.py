"""JAX's global modes: what a user may have switched on for a whole program changes no result and raises no error."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn

T, N, F, H = 4, 2, 3, 4
X = normal(T, N, F).astype(np.float32)


def _module(make: Callable[[], nnx.Module], *arguments: Any, **settings: Any) -> tuple[Callable, Any]:
    """What an nnx module that is called like this makes of its parameters, and the parameters."""
    graph, params, rest = nnx.split(filled(make), nnx.Param, ...)
    return lambda params: nnx.merge(graph, params, rest)(*arguments, **settings), params


def _linen(module: linen.Module, *arguments: Any, **settings: Any) -> tuple[Callable, Any]:
    variables = filled_variables(module, *arguments, **settings)
    return lambda variables: module.apply(variables, *arguments, **settings), variables


def _lstm() -> tuple[Callable, Any]:
    """Two layers and directions, a projection, lengths, and dropout from a key."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, 2, dropout=0.5, bidirectional=True, proj_size=2)
    key, params = jax.random.key(0), parameters(spec, np.float32)
    return lambda params: jaxrnn.apply(spec, params, X, lengths=[4, 2], dropout_key=key), params


def _gru() -> tuple[Callable, Any]:
    """Without biases, unbatched, with a state, resets and recomputation."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, bias=False)
    given = {"reset": [False, True, False, False], "reset_state": np.ones((1, H), np.float32), "remat": 2}
    hx = np.full((1, H), 0.5, np.float32)
    return lambda params: jaxrnn.apply(spec, params, X[:, 0], hx, **given), parameters(spec, np.float32)


def _packed() -> tuple[Callable, Any]:
    spec, params = jaxrnn.Spec(jaxrnn.RNN_TANH, F, H), parameters(jaxrnn.Spec(jaxrnn.RNN_TANH, F, H), np.float32)

    def outputs(params: Any) -> Any:
        packed = jaxrnn.pack_padded_sequence(jax.device_put(X), [2, 4], enforce_sorted=False)
        output, h_n = jaxrnn.apply(spec, params, packed, remat="gates")
        return jaxrnn.pad_packed_sequence(output)[0], h_n

    return outputs, params


def _cell() -> tuple[Callable, Any]:
    return _module(lambda: jaxrnn.LSTMCell(F, H, rngs=nnx.Rngs(0)), X[0, 0])


PROGRAMS: dict[str, Callable[[], tuple[Callable, Any]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "packed RNN": _packed,
    "nnx.RNN": lambda: _module(lambda: jaxrnn.RNN(F, H, nonlinearity="relu", batch_first=True, rngs=nnx.Rngs(0)), X),
    "LSTMCell": _cell,
    "GRUCell without biases": lambda: _module(lambda: jaxrnn.GRUCell(F, H, bias=False, rngs=nnx.Rngs(0)), X[0]),
    "linen.LSTM": lambda: _linen(jaxrnn.linen.LSTM(F, H, 2, dropout=0.5, deterministic=True), X),
    "linen.RNNCell": lambda: _linen(jaxrnn.linen.RNNCell(F, H), X[0]),
    "flip_sequences": lambda: (lambda x: jaxrnn.flip_sequences(x, [4, 2]), X),
    "FlaxCell": lambda: _module(lambda: nnx.RNN(jaxrnn.FlaxCell(jaxrnn.GRUCell(F, H, rngs=nnx.Rngs(0)))), X),
    "linen.FlaxCell": lambda: _linen(linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.LSTMCell(F, H))), X),
}
TOGETHER: list[Callable[[], Any]] = [
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.debug_nans(True),
    lambda: jax.debug_infs(True),
    lambda: jax.transfer_guard("disallow"),  # of what is compiled; also eagerly, below
    lambda: jax.debug_key_reuse(True),
    lambda: jax.default_matmul_precision("highest"),
]
MODES: dict[str, list[Callable[[], Any]]] = {
    "those that may be on together": TOGETHER,  # each would compile a program of its own
    "enable checks": [lambda: jax.enable_checks(True)],
    "checking leaks": [jax.checking_leaks],
    "disable jit": [jax.disable_jit],
    "float64 off": [lambda: jax.enable_x64(False)],
}
SLOW = ("LSTM", "nnx.RNN", "linen.LSTM", "linen.FlaxCell")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in PROGRAMS])
def test_under_every_mode(name: str) -> None:
    outputs, params = PROGRAMS[name]()

    def loss(params: Any) -> jax.Array:
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(outputs(params)))

    run, params = jax.jit(jax.value_and_grad(loss)), jax.device_put(params)
    found = {mode: _within(settings, run, params) for mode, settings in MODES.items()}
    assert_close(found, dict.fromkeys(MODES, run(params)), atol=1e-5)
    if "FlaxCell" not in name:  # for Flax's wrappers make their first carries by themselves
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(outputs(params))


def _within(settings: list[Callable[[], Any]], run: Callable, params: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting())
        return run(params)
