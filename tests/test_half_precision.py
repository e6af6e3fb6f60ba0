"""bfloat16 and float16: products accumulate, and the state is carried, in float32."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close

import jaxrnn
from jaxrnn.engines import scan

SPECS = {
    "RNN": jaxrnn.Spec(jaxrnn.RNN_TANH, 32, 64, num_layers=2, bidirectional=True),
    "LSTM": jaxrnn.Spec(jaxrnn.LSTM_CELL, 32, 64, num_layers=2, bidirectional=True, proj_size=32),
    "GRU": jaxrnn.Spec(jaxrnn.GRU_CELL, 32, 64, num_layers=2, bidirectional=True),
}
ONE = jaxrnn.Spec(jaxrnn.GRU_CELL, 32, 64)
DTYPES = ["bfloat16", "float16"]


def _params(spec: jaxrnn.Spec, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """As large as initial parameters are."""
    return {name: (a / 7).astype(dtype) for name, a in parameters(spec).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _differentiate(spec: jaxrnn.Spec, dtype: str, params: Any, x: Any, cotangents: Any) -> Any:
    arguments = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), (params, x, cotangents))
    results, pullback = jax.vjp(lambda params, x: jaxrnn.apply(spec, params, x), *arguments[:2])
    return results, pullback(arguments[2])


@pytest.mark.parametrize(("kind", "dtype"), [*itertools.product(SPECS, ["bfloat16"]), ("GRU", "float16")])
def test_within_one_rounding_of_float64(kind: str, dtype: str) -> None:
    """Results and gradients, each scaled by max(1, its largest), are off by less than eps, 200 steps on."""
    spec, half = SPECS[kind], jnp.dtype(dtype)
    params, x = _params(spec, half), normal(200, 4, 32).astype(half)
    shapes = jax.eval_shape(lambda: jaxrnn.apply(spec, params, x))
    cotangents = jax.tree.map(lambda a: normal(*a.shape).astype(half), shapes)
    found, truth = (_differentiate(spec, each, params, x, cotangents) for each in (dtype, "float64"))
    assert {a.dtype for a in jax.tree.leaves(found)} == {half}
    scaled = [
        jax.tree.map(lambda a, b: np.asarray(a, np.float64) / max(1.0, np.max(np.abs(b))), tree, truth)
        for tree in (found, truth)
    ]
    assert_close(*scaled, atol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_boundary_costs_one_rounding(dtype: str) -> None:
    """The state inside a call is more precise than what the call returns."""
    params, x = _params(ONE), normal(200, 4, 32).astype(np.float32)
    truth = np.asarray(jaxrnn.apply(ONE, params, x, dtype=jnp.float64)[1])
    _, whole = jaxrnn.apply(ONE, params, x, dtype=dtype)
    _, first = jaxrnn.apply(ONE, params, x[:100], dtype=dtype)
    assert first.dtype == whole.dtype == dtype
    _, halves = jaxrnn.apply(ONE, params, x[100:], first, dtype=dtype)
    assert_close(halves, whole, atol=float(jnp.finfo(dtype).eps))
    state = None
    for t in range(200):
        _, state = jaxrnn.apply(ONE, params, x[t : t + 1], state, dtype=dtype)
    error = [np.sqrt(np.mean((np.asarray(a, np.float64) - truth) ** 2)) for a in (whole, state)]
    assert error[0] < error[1]


@pytest.mark.parametrize("kind", SPECS)
def test_a_float32_state_goes_from_chunk_to_chunk_unrounded(kind: str) -> None:
    """A returned state has the dtype of the one that was given, so that chunks in bfloat16 equal the whole exactly."""
    spec = dataclasses.replace(SPECS[kind], bidirectional=False)
    params, x = _params(spec), normal(20, 4, 32).astype(np.float32)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        def chunk(state: Any, x: jax.Array) -> Any:
            return jaxrnn.apply(spec, params, x, state, dtype=jnp.bfloat16)[::-1]

        state = spec.initial_state(4)
        return chunk(state, x), jax.lax.scan(chunk, state, x.reshape(5, 4, 4, 32))

    (state, output), (last, outputs) = run(params, x)
    assert {a.dtype for a in jax.tree.leaves((state, last))} == {jnp.dtype(np.float32)}
    assert output.dtype == outputs.dtype == jnp.bfloat16
    assert_close((last, outputs.reshape(output.shape)), (state, output), atol=0)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float64")], ids=str)
def test_each_state_keeps_its_own_dtype(dtypes: tuple[str, str]) -> None:
    spec, cell = SPECS["LSTM"], jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 32, 64)
    state = tuple(np.ones(shape, dtype) for shape, dtype in zip(spec.state_shapes(4), dtypes, strict=True))
    x = normal(4, 4, 32).astype(np.float32)
    packed = jaxrnn.pack_padded_sequence(x, [4, 3, 2, 1])
    for given in (x, packed):
        found = jax.eval_shape(lambda given=given: jaxrnn.apply(spec, _params(spec), given, state, dtype="bfloat16")[1])
        assert tuple(a.dtype for a in found) == dtypes
    first = tuple(np.ones(shape, dtype) for shape, dtype in zip(cell.state_shapes(4), dtypes, strict=True))
    found = jax.eval_shape(lambda: jaxrnn.apply_cell(cell, _params(cell), x[0], first, dtype="bfloat16"))
    assert tuple(a.dtype for a in found) == dtypes
    reset = {"reset": np.ones((4, 4), bool), "reset_state": np.ones((1, 4, 64))}
    h_n = jax.eval_shape(lambda: jaxrnn.apply(ONE, _params(ONE), x, dtype="bfloat16", **reset)[1])
    assert h_n.dtype == jnp.bfloat16  # whatever it is put back to


@pytest.mark.parametrize("blocks", [False, True])
def test_no_loop_stacks_bfloat16_on_a_cpu(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There XLA would convert the whole stack at each step: 4,096 steps took 100 times as long."""
    if blocks:
        monkeypatch.setattr(scan, "_CPU", scan._CPU._replace(inference=20_000, training=20_000))

    def inference(x: jax.Array) -> jax.Array:
        return jaxrnn.apply(ONE, _params(ONE), x, dtype="bfloat16")[0]

    for function in (inference, lambda x: jax.jvp(inference, (x,), (x,))):
        compiled = jax.jit(function).lower(normal(64, 4, 32).astype(np.float32)).compile().as_text()
        loops = [line.partition(" while(")[0] for line in compiled.splitlines() if " while(" in line]
        assert loops
        assert not any("bf16" in line for line in loops)
