"""Sequences in pieces: chunks with the state carried on, and resets between episodes."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn import GRU_CELL, LSTM_CELL, RNN_TANH

T, N, F, H = 5, 3, 2, 4  # time, batch, input features, hidden size
LSTM = jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2, batch_first=True)
GRU = jaxrnn.Spec(GRU_CELL, F, H)


@pytest.mark.parametrize(
    ("cell", "proj_size"), [(LSTM_CELL, 2), (GRU_CELL, 0), (RNN_TANH, 0)], ids=["LSTM", "GRU", "RNN"]
)
def test_any_chunks_equal_the_whole(cell: jaxrnn.Cell, proj_size: int, thorough: bool) -> None:
    spec = jaxrnn.Spec(cell, F, H, num_layers=2, proj_size=proj_size)
    steps = 12 if thorough else 4  # a program for every size of a chunk
    params, x = parameters(spec), normal(steps, N, F)
    whole = jaxrnn.apply(spec, params, x)
    random = np.random.RandomState(0)
    for _ in range(1000 if thorough else 20):
        cuts = np.flatnonzero(random.rand(steps - 1) < random.rand()) + 1
        pieces, state = [], None
        for chunk in np.split(x, cuts):
            piece, state = jaxrnn.apply(spec, params, chunk, state)
            pieces.append(piece)
        assert_close(named(spec, (np.concatenate(pieces), state)), named(spec, whole))


def _episodes(params: dict, x: Any, hx: tuple, reset: np.ndarray, reset_state: tuple) -> tuple:
    """Each row by itself, cut where it is reset."""
    outputs, states = [], []
    for row in range(len(x)):
        state, pieces = tuple(a[:, row] for a in hx), []
        starts = np.flatnonzero(reset[row])
        for start, chunk in zip([None, *starts], np.split(x[row], starts), strict=True):
            state = state if start is None else tuple(a[:, row] for a in reset_state)
            if len(chunk):
                piece, state = jaxrnn.apply(LSTM, params, chunk, state)
                pieces.append(piece)
        outputs.append(np.concatenate(pieces))
        states.append(state)
    return np.stack(outputs), [np.stack(rows, axis=1) for rows in zip(*states, strict=True)]


def test_reset_starts_an_episode() -> None:
    reset = np.array([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    params, x, hx = parameters(LSTM), normal(N, T, F), (normal(2, N, H), normal(2, N, H, seed=1))
    zeros, other = (np.zeros((2, N, H)),) * 2, tuple(np.cos(a) for a in hx)
    run = jax.jit(lambda reset, reset_state: jaxrnn.apply(LSTM, params, x, hx, reset=reset, reset_state=reset_state))
    for reset_state, state in ((None, zeros), (other, other)):
        expected = _episodes(params, x, hx, reset, state)
        assert_close(named(LSTM, run(reset, reset_state)), named(LSTM, expected))
    output, _ = jaxrnn.apply(LSTM, params, x[1], tuple(a[:, 1] for a in hx), reset=reset[1])
    assert_close(output, run(reset, None)[0][1], atol=1e-15)


def test_a_reset_past_the_end_of_a_row_does_nothing() -> None:
    params, x, lengths, reset = parameters(LSTM), normal(N, T, F), [2, 5, 0], np.zeros((N, T), bool)
    plain = jaxrnn.apply(LSTM, params, x, lengths=lengths, reset=reset)
    reset[0, 2:] = reset[2] = True
    assert_close(jaxrnn.apply(LSTM, params, x, lengths=lengths, reset=reset), plain, atol=0)


RESET = np.zeros((T, N), bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reset": RESET.T}, RuntimeError, r"reset should have the shape of x .* \(5, 3\), got \(3, 5\)"),
        (
            {"reset": RESET.astype(float)},
            TypeError,
            "reset should be boolean, True at the steps to .*, got float64",
        ),
        ({"reset_state": np.zeros((1, N, H))}, ValueError, "reset should be given with reset_state"),
        (
            {"reset": RESET, "reset_state": np.zeros((1, 2, H))},
            RuntimeError,
            r"h_0 of reset_state should have shape \(1, 3, 4\), got \(1, 2, 4\)",
        ),
    ],
)
def test_bad_resets(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply(GRU, parameters(GRU), normal(T, N, F), **arguments)


def test_a_bidirectional_network_takes_no_reset() -> None:
    spec = jaxrnn.Spec(GRU_CELL, F, H, bidirectional=True)
    with pytest.raises(ValueError, match="reset should be None for a bidirectional network"):
        jaxrnn.apply(spec, parameters(spec), normal(T, N, F), reset=RESET)


MODULES = {
    "RNN": {"num_layers": 2},
    "LSTM": {"bidirectional": True, "proj_size": 2},
    "GRU": {},
    "RNNCell": {},
    "LSTMCell": {},
    "GRUCell": {},
}


@pytest.mark.parametrize("name", MODULES)
def test_a_state_to_start_from(name: str) -> None:
    """Zeros, as a call without hx has them, of the shapes and dtypes that it returns."""
    module = filled(lambda: getattr(jaxrnn, name)(F, H, **MODULES[name], rngs=nnx.Rngs(0)))
    other = getattr(jaxrnn.linen, name)(F, H, **MODULES[name], dtype=jax.numpy.bfloat16)
    for shape in ((N, F), (F,)):
        x = normal(*shape if "Cell" in name else (T, *shape)).astype(np.float32)
        batch = N if len(shape) == 2 else None
        state = module.initial_state(batch)
        assert not any(np.any(a) for a in jax.tree.leaves(state))
        called = jax.eval_shape(lambda x=x: module(x) if "Cell" in name else module(x)[1])
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), called)
        assert {a.dtype for a in jax.tree.leaves(module.initial_state(batch, "float16"))} == {np.dtype("float16")}
        unbound = other.initial_state(batch)
        assert jax.tree.map(lambda a: (a.shape, jax.numpy.bfloat16), state) == jax.tree.map(
            lambda a: (a.shape, a.dtype), unbound
        )


def test_a_scan_over_chunks_starts_from_it() -> None:
    module = filled(lambda: jaxrnn.LSTM(F, H, 2, rngs=nnx.Rngs(0)))
    x = normal(4 * T, N, F).astype(np.float32)

    @jax.jit
    def run(x: jax.Array) -> Any:
        return jax.lax.scan(lambda state, x: module(x, state)[::-1], module.initial_state(N), x.reshape(4, T, N, F))

    state, output = run(x)
    assert_close(named(LSTM, (output.reshape(4 * T, N, H), state)), named(LSTM, module(x)), atol=1e-6)


@pytest.mark.parametrize("batched", [True, False])
def test_steps_are_the_whole(batched: bool) -> None:
    """Through all layers, with resets: the function, NNX and Linen."""
    shape = (T, N) if batched else (T,)
    params, x, reset = parameters(LSTM), normal(*shape, F), normal(*shape, seed=4) > 0.5
    hx = tuple(normal(2, *shape[1:], H, seed=k) for k in range(2))
    other = tuple(np.cos(a) for a in hx)
    spec = dataclasses.replace(LSTM, batch_first=False)
    ours = filled(lambda: jaxrnn.LSTM(F, H, 2, batch_first=True, param_dtype=np.float64, rngs=nnx.Rngs(0)))
    own, linen = nnx.to_pure_dict(nnx.state(ours)), jaxrnn.linen.LSTM(F, H, 2, batch_first=True)
    linen_step = functools.partial(linen.apply, {"params": own}, method="step")
    runs = {
        "apply_step": (params, functools.partial(jaxrnn.apply_step, LSTM, params)),
        "nnx": (own, ours.step),
        "linen": (own, linen_step),
    }
    for name, (weights, step) in runs.items():
        outputs, state = [], hx
        for t in range(T):
            output, state = step(x[t], state, reset=reset[t], reset_state=other)
            outputs.append(output)
        expected = jaxrnn.apply(spec, weights, x, hx, reset=reset, reset_state=other)
        assert_close({name: (np.stack(outputs), state)}, {name: expected}, atol=1e-14)
    without_hx = jaxrnn.apply_step(LSTM, params, x[0])
    assert_close(without_hx[0], jaxrnn.apply(spec, params, x[:1])[0][0], atol=1e-14)


def test_a_step_of_linen_makes_parameters_too() -> None:
    linen, x = jaxrnn.linen.GRU(F, H, 2), normal(N, F).astype(np.float32)
    of_step = linen.init(jax.random.key(0), x, method="step")
    assert_close(of_step, linen.init(jax.random.key(0), x[None]), atol=0)


def test_a_bidirectional_network_makes_no_step() -> None:
    spec = jaxrnn.Spec(GRU_CELL, F, H, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional should be False to make a step"):
        jaxrnn.apply_step(spec, parameters(spec), normal(N, F))


# Modules that keep their state, as the guide has them.


class _Stream(nnx.Module):
    def __init__(self, layer: Any) -> None:
        self.layer, self.state = layer, nnx.Cache(layer.initial_state(N))

    def __call__(self, x: Any) -> Any:
        output, state = self.layer(x, self.state.get_value())
        self.state.set_value(state)
        return output


def test_a_state_in_a_variable_of_nnx_is_neither_trained_nor_in_the_state_dict() -> None:
    layer = filled(lambda: jaxrnn.LSTM(F, H, 2, param_dtype="float64", rngs=nnx.Rngs(0)))
    stream, x = _Stream(layer), normal(2 * T, N, F)
    run = nnx.jit(lambda stream, x: stream(x))
    assert_close(np.concatenate([run(stream, x[:T]), run(stream, x[T:])]), layer(x)[0])
    kept, saved = stream.state.get_value(), jaxrnn.state_dict(stream)
    assert list(saved) == [f"layer.{name}" for name in layer.spec.shapes()]
    assert jaxrnn.load_state_dict(stream, saved) == ([], [])
    assert_close(stream.state.get_value(), kept, atol=0)
    optimizer = nnx.Optimizer(stream, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    gradient = nnx.grad(lambda stream: stream(x[:T]).sum())(stream)
    assert_close(stream.state.get_value(), layer(x[:T], kept)[1])
    optimizer.update(stream, gradient)
    assert len(jax.tree.leaves(nnx.state(gradient))) == len(saved)


class _LinenStream(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        layer = jaxrnn.linen.LSTM(F, H, 2, param_dtype="float64", name="layer")
        state = self.variable("carry", "state", layer.initial_state, x.shape[1])
        output, state.value = layer(x, state.value)
        return output


def test_a_state_in_a_collection_of_linen_is_not_in_the_state_dict() -> None:
    module, x = _LinenStream(), normal(2 * T, N, F)
    variables = filled_variables(module, x)
    params = {"params": variables["params"]}
    one, carry = module.apply(params, x[:T], mutable=["carry"])
    two, carry = module.apply(params | carry, x[T:], mutable=["carry"])
    whole, states = jaxrnn.linen.LSTM(F, H, 2).apply({"params": params["params"]["layer"]}, x)
    assert_close([np.concatenate([one, two]), carry["carry"]["state"]], [whole, states])
    saved = jaxrnn.checkpoint.linen.state_dict(module, variables, x)
    assert list(saved) == [f"layer.{name}" for name in jaxrnn.Spec(LSTM_CELL, F, H, 2).shapes()]
    loaded = jaxrnn.checkpoint.linen.load_state_dict(module, params | carry, saved, x).variables
    assert_close(loaded["carry"], carry["carry"], atol=0)
