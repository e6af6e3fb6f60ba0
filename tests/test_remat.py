"""What is kept for the derivative: the same values and gradients whatever it is, and less memory where it is less."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn

T, N, F, H = 7, 3, 2, 4
SPECS = {
    "LSTM": jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, bidirectional=True),
    "LSTM reversed": jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, bidirectional=True),
    "LSTM_PROJ": jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, bidirectional=True, proj_size=2),
    "GRU": jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=2),
    "RNN": jaxrnn.Spec(jaxrnn.RNN_TANH, F, H),
}
MARKS: dict[str, dict[str, Any]] = {
    "LSTM": {"lengths": np.array([7, 0, 4])},
    "LSTM reversed": {"lengths": np.array([7, 0, 4])},
    "LSTM_PROJ": {},
    "GRU": {"reset": np.arange(T * N).reshape(T, N) % 4 == 3},
    "RNN": {"lengths": np.array([1, 6, 7])},
}


def _loss(name: str, remat: str | int, params: Any, x: jax.Array) -> jax.Array:
    results = jaxrnn.apply(SPECS[name], params, x, remat=remat, **MARKS[name])
    return sum((jnp.sum(jnp.sin(a + k)) for k, a in enumerate(jax.tree.leaves(results))), jnp.zeros((), x.dtype))


def _arguments(name: str, dtype: str = "float64") -> tuple[Any, jax.Array]:
    return jax.tree.map(jnp.asarray, (parameters(SPECS[name], dtype), normal(T, N, F).astype(dtype)))


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        pytest.param("LSTM", ("gates", 3), marks=pytest.mark.slow),
        ("LSTM reversed", ("gates", 3)),
        pytest.param("LSTM_PROJ", ("gates", 2), marks=pytest.mark.slow),
        ("GRU", (3,)),
        pytest.param("GRU", ("gates", 1), marks=pytest.mark.slow),
        ("RNN", ("gates", 1, 100)),
    ],
)
def test_values_and_gradients_are_the_same(name: str, choices: tuple) -> None:
    @jax.jit
    def run(params: Any, x: jax.Array) -> dict[str, Any]:
        return {f"remat={r}": jax.value_and_grad(_loss, (2, 3))(name, r, params, x) for r in ("none", *choices)}

    results = run(*_arguments(name))
    assert_close(results, dict.fromkeys(results, results["remat=none"]), atol=1e-13)


@pytest.mark.parametrize("name", ["RNN", pytest.param("GRU", marks=pytest.mark.slow)])
def test_under_vmap_and_twice(name: str) -> None:
    params, x = _arguments(name)
    gradient = jax.grad(_loss, 3)

    @jax.jit
    def run(x: jax.Array) -> dict[str, Any]:
        results = {}
        for r in ("none", "gates", 3):
            over_rows = jax.vmap(lambda x, r=r: gradient(name, r, params, x))(jnp.stack([x, 2 * x]))
            second = jax.jvp(lambda x, r=r: gradient(name, r, params, x), (x,), (jnp.cos(x),))[1]
            results[f"remat={r}"] = {"over rows": over_rows, "second": second}
        return results

    results = run(x)
    assert_close(results, dict.fromkeys(results, results["remat=none"]), atol=1e-13)


@pytest.mark.parametrize("remat", ["gates", 2])
def test_16_bits_are_not_rounded_between_chunks(remat: str | int) -> None:
    params, x = _arguments("LSTM_PROJ", "bfloat16")
    kept, again = (jaxrnn.apply(SPECS["LSTM_PROJ"], params, x, remat=r) for r in ("none", remat))
    assert_close(again, kept, atol=0)


def test_16_bits_add_up_gradients_over_chunks_as_closely() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H)
    params, x = spec.init(jax.random.key(0), jnp.float64), np.random.RandomState(0).randn(1024, N, F)

    def gradient(dtype: str, remat: str | int) -> Any:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, remat=remat)[0].astype(jnp.float64)))

        return jax.grad(loss)(*jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), (params, x)))

    ways = (("float64", "none"), ("bfloat16", "gates"), ("bfloat16", 4))
    truth, *found = jax.jit(lambda: [gradient(*way) for way in ways])()
    largest = jax.tree.map(lambda a: np.abs(a).max(), truth)
    relative = [jax.tree.map(lambda a, b: np.asarray(a, np.float64) / b, tree, largest) for tree in (truth, *found)]
    for remat, gradients in zip(("gates", 4), relative[1:], strict=True):
        assert_close({f"remat={remat}": gradients}, {f"remat={remat}": relative[0]}, atol=2.0**-7)  # one eps


def test_a_symbolic_time_is_exported() -> None:
    params, _ = _arguments("GRU")
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t,4,2"), jnp.float64)
    run = jax.jit(lambda x: jaxrnn.apply(SPECS["GRU"], params, x, remat=2)[0])
    x = jnp.ones((5, 4, F))
    assert_close(jax.export.export(run)(shape).call(x), run(x), atol=1e-14)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(jaxrnn.LSTM_CELL, id="LSTM", marks=pytest.mark.slow), pytest.param(jaxrnn.GRU_CELL, id="GRU")],
)
def test_less_memory_is_taken(cell: jaxrnn.Cell, optimized: None) -> None:
    spec = jaxrnn.Spec(cell, 16, 32)
    params, x = spec.init(jax.random.key(0)), jnp.ones((1024, 4, 16), jnp.float32)

    def memory(remat: str | int) -> int:
        gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(jaxrnn.apply(spec, p, x, remat=remat)[0] ** 2), (0, 1)))
        return gradient.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    everything = memory("none")
    assert memory("gates") < 0.5 * everything
    assert memory(32) < 0.3 * everything


def test_no_rows() -> None:
    params, x = _arguments("GRU")
    output, h_n = jaxrnn.apply(SPECS["GRU"], params, x[:, :0], remat=2)
    assert (output.shape, h_n.shape) == ((T, 0, H), (2, 0, H))


def test_modules_take_it() -> None:
    x = jnp.ones((T, N, F), jnp.float32)
    expected = filled(lambda: jaxrnn.GRU(F, H, rngs=nnx.Rngs(0)))(x)
    module = filled(lambda: jaxrnn.GRU(F, H, remat=2, rngs=nnx.Rngs(0)))
    assert "length=3" in str(jax.make_jaxpr(jax.grad(lambda x: module(x)[0].sum()))(x))  # blocks of two of the 7 steps
    assert_close(module(x), expected, atol=0)
    linen = jaxrnn.linen.GRU(F, H, remat="gates")
    params = {name: getattr(module, name)[...] for name in module.spec.shapes()}
    assert_close(linen.apply({"params": params}, x), expected, atol=0)


@pytest.mark.parametrize("remat", ["all", 0, -1, True, 1.5, None])
def test_what_it_cannot_be(remat: Any) -> None:
    message = "remat should be 'none', 'gates' or an integer above 0, got"
    params, x = _arguments("GRU")
    with pytest.raises(ValueError, match=message):
        jaxrnn.apply(SPECS["GRU"], params, x, remat=remat)
    with pytest.raises(ValueError, match=message):
        jaxrnn.LSTM(F, H, remat=remat, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        jaxrnn.linen.RNN(F, H, remat=remat)
