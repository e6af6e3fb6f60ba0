"""The Linen modules: torch's arguments and keys, dropout as Linen has it, and bit by bit what the NNX modules give."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from covering import covering
from flax import linen, nnx
from flax.errors import InvalidRngError
from making import filled_variables

import jaxrnn
from parity import sides
from parity.cases import CASES, KINDS, Case

KEY = jax.random.key(0)
MODULES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def _x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).randn(*(shape or (5, 2, 3))), jnp.float32)


def _cases(kind: str, thorough: bool) -> list[Case]:
    """Those of a kind; unless thorough, as many as have any two settings meet."""
    cases = [case for case in CASES.values() if case.small and case.kind == kind]
    assert len(cases) >= 8
    return cases if thorough else covering(cases, _settings)


def _settings(case: Case) -> dict[str, Any]:
    return {"way": case.way, "hx": case.hx, "batched": case.batch is not None, **case.arguments}


def _run(case: Case, call: Any, module: Any, parameters: Any, x: jax.Array, hx: Any) -> Any:
    return sides.Feed.of(case)(functools.partial(call, module, parameters), x, hx, case.marks())


def _program(case: Case, module: Any, call: Any) -> tuple[str, list]:
    """What JAX is to run for a case, as text, and the numbers that are fixed in it."""
    parameters, inputs, _ = case.arrays()
    run = functools.partial(_run, case, call, module)
    traced = jax.make_jaxpr(run)(parameters, inputs["input"], sides.given_state(case, inputs, "0") if case.hx else None)
    return str(traced), traced.consts


@pytest.mark.parametrize("kind", KINDS)
def test_linen_runs_what_nnx_runs(kind: str, thorough: bool) -> None:
    for case in _cases(kind, thorough):
        settings = {**case.constructor, "param_dtype": jnp.float64}
        make = functools.partial(getattr(jaxrnn, case.module), **settings)
        graph = nnx.graphdef(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))))
        ours, constants = _program(case, getattr(jaxrnn.linen, case.module)(**settings), sides.call_linen)
        expected, expected_constants = _program(case, graph, sides.call_nnx)
        assert ours == expected, case.name
        assert_close(constants, expected_constants, atol=0)


def _results(case: Case, build: Any, call: Any) -> tuple:
    """What a side gives without jit of its own, so that the sides share what jaxrnn.apply compiles."""
    parameters, inputs, cotangents = (jax.tree.map(jnp.asarray, arrays) for arrays in case.arrays())
    module, parameters = build(case, "float64", parameters)
    x, hx = inputs["input"], sides.given_state(case, inputs, "0") if case.hx else None
    returned, pullback = jax.vjp(functools.partial(_run, case, call, module), parameters, x, hx)
    state = sides.given_state(case, cotangents, "n")
    return returned, pullback(state if case.steps is None else (cotangents["output"], state))


@pytest.mark.thorough  # that the programs are the same as text is a quick test
@pytest.mark.parametrize("kind", KINDS)
def test_linen_is_nnx_bit_by_bit(kind: str, thorough: bool) -> None:
    for case in _cases(kind, thorough):
        nnx_results = _results(case, sides.build_nnx, sides.call_nnx)
        assert_close(_results(case, sides.build_linen, sides.call_linen), nnx_results, atol=0)
    jax.clear_caches()  # each compilation takes memory maps, and Linux gives a process 65,530


def _arguments(function: Any, *kinds: Any) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds and name != "self"]


@pytest.mark.parametrize("name", MODULES)
def test_arguments_are_those_of_the_nnx_module(name: str) -> None:
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    ours, nnx_module = getattr(jaxrnn.linen, name), getattr(jaxrnn, name).__init__
    expected = _arguments(nnx_module, either)
    found = _arguments(ours, either)
    assert found[: len(expected)] == expected
    assert set(found[len(expected) :]) <= {"parent", "name"}  # Linen's own
    assert set(_arguments(ours, either, keyword)) >= set(_arguments(nnx_module, keyword)) - {"rngs"}


def test_params_have_torchs_keys_and_ranges() -> None:
    names = {}

    @jax.jit
    def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
        params = {}
        for name in MODULES:
            x = jnp.ones((2, 3) if "Cell" in name else (5, 2, 3))
            params[name] = getattr(jaxrnn.linen, name)(3, 16, param_dtype=jnp.float64).init(key, x)["params"]
            names[name] = list(params[name])  # jit sorts them
        return params

    for name, params in init(KEY).items():
        spec = nnx.eval_shape(lambda name=name: getattr(jaxrnn, name)(3, 16, rngs=nnx.Rngs(0))).spec
        assert {key: value.shape for key, value in params.items()} == spec.shapes()
        assert names[name] == list(spec.shapes())
        for value in params.values():
            assert value.dtype == jnp.float64
            assert 0.15 < np.abs(value).max() <= 0.25  # 1 / sqrt(16)
        assert len({np.asarray(value).ravel()[0] for value in params.values()}) == len(params)  # each drawn by itself


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jaxrnn.linen.LSTM(3, 0), ValueError, "hidden_size should be greater than zero, got 0"),
        (lambda: jaxrnn.linen.GRU(3.0, 4), TypeError, "input_size should be of type int"),
        (lambda: jaxrnn.linen.GRU(3, 4, bias=1), TypeError, "bias should be of type bool"),
        (lambda: jaxrnn.linen.GRU(3, 4, proj_size=2), ValueError, "proj_size should be 0 for GRU, got 2"),
        (lambda: jaxrnn.linen.LSTM(3, 4, proj_size=4), ValueError, "less than hidden_size=4"),
        (lambda: jaxrnn.linen.RNN(3, 4, 2, "sine"), ValueError, "nonlinearity should be 'tanh' or 'relu', got 'sine'"),
        (lambda: jaxrnn.linen.RNNCell(3, 4, True, "sine"), ValueError, "nonlinearity should be 'tanh' or 'relu'"),
        (lambda: jaxrnn.linen.LSTMCell(-1, 4), ValueError, "input_size should not be negative"),
    ],
)
def test_bad_arguments_raise_at_construction(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_calls_take_what_apply_takes() -> None:
    gru = jaxrnn.linen.GRU(3, 4, batch_first=True)
    x, lengths, reset = _x(2, 5, 3), [3, 0], np.zeros((2, 5), bool)
    reset[0, 1] = True
    variables = filled_variables(gru, x)
    hx = reset_state = jnp.ones((1, 2, 4), jnp.float32)
    arguments = {"hx": hx, "lengths": lengths, "reset": reset, "reset_state": reset_state}
    ours = gru.apply(variables, x, **arguments)
    assert_close(ours, jaxrnn.apply(gru.spec, variables["params"], x, **arguments), atol=0)
    packed = jaxrnn.pack_padded_sequence(x, [3, 5], True, enforce_sorted=False)
    output, h_n = gru.apply(variables, packed)
    assert isinstance(output, jaxrnn.PackedSequence)
    assert_close(h_n, gru.apply(variables, x, lengths=[3, 5])[1], atol=1e-7)
    assert gru.clone(dtype=jnp.bfloat16).apply(variables, x)[0].dtype == jnp.bfloat16


def test_dropout_through_rng_collections() -> None:
    gru = jaxrnn.linen.GRU(3, 4, num_layers=2, dropout=0.5)
    x = _x()
    variables = filled_variables(gru, x, deterministic=True)

    def run(seed: int, module: jaxrnn.linen.GRU = gru, collection: str = "dropout", **arguments: Any) -> np.ndarray:
        return np.asarray(module.apply(variables, x, rngs={collection: jax.random.key(seed)}, **arguments)[0])

    plain = gru.apply(variables, x, deterministic=True)[0]
    on = run(1, deterministic=False)
    assert_close(on, run(1, deterministic=False), atol=0)
    assert not np.array_equal(on, run(2, deterministic=False))
    assert not np.array_equal(on, plain)
    assert np.all(on != 0), "the last layer's output was dropped"
    assert_close(run(1, deterministic=True), plain, atol=0)
    assert_close(run(1, module=gru.clone(deterministic=False)), on, atol=0)
    other = gru.clone(rng_collection="noise")
    assert run(1, module=other, collection="noise", deterministic=False).shape == on.shape
    by_key = gru.apply(variables, x, deterministic=False, rng=jax.random.key(3))[0]
    assert_close(by_key, gru.apply(variables, x, deterministic=False, rng=jax.random.key(3))[0], atol=0)
    assert_close(gru.apply(variables, x, deterministic=True, rng=jax.random.key(3))[0], plain, atol=0)
    with pytest.raises(InvalidRngError, match="dropout"):
        gru.apply(variables, x, deterministic=False)
    with pytest.raises(ValueError, match='"deterministic" must be passed'):
        gru.apply(variables, x)
    # By position, so that linen.remat can name it as static.
    again = linen.remat(jaxrnn.linen.GRU, static_argnums=3)(3, 4, num_layers=2, dropout=0.5)
    for deterministic in (True, False):
        key = None if deterministic else jax.random.key(3)
        expected = gru.apply(variables, x, None, deterministic, rng=key)[0]
        assert_close(again.apply(variables, x, None, deterministic, rng=key)[0], expected, atol=0)
    for lengths in ([5, 2], np.array([5, 2])):
        with pytest.raises(TypeError, match=r"deterministic should be .*: give lengths by name"):
            gru.apply(variables, x, None, lengths)
    # Where there is nothing to drop, nothing has to be said.
    jaxrnn.linen.GRU(3, 4, num_layers=2).init(KEY, x)


class _Tagger(linen.Module):
    """Uses modules made in setup and in a compact call."""

    def setup(self) -> None:
        self.encoder = jaxrnn.linen.LSTM(3, 8, bidirectional=True)
        self.head = linen.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.encoder(x)[0])


class _Stacked(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = jaxrnn.linen.GRU(3, 4)(x)
        x, _ = linen.remat(jaxrnn.linen.GRU)(4, 4, name="second")(x)
        return x


def test_inside_other_modules() -> None:
    variables = filled_variables(_Tagger(), _x())
    assert set(variables["params"]["encoder"]) == set(jaxrnn.linen.LSTM(3, 8, bidirectional=True).spec.shapes())
    assert _Tagger().apply(variables, _x()).shape == (5, 2, 2)
    variables = filled_variables(_Stacked(), _x())
    assert set(variables["params"]) == {"GRU_0", "second"}
    one, _ = jaxrnn.linen.GRU(3, 4).apply({"params": variables["params"]["GRU_0"]}, _x())
    two, _ = jaxrnn.linen.GRU(4, 4).apply({"params": variables["params"]["second"]}, one)
    assert_close(_Stacked().apply(variables, _x()), two, atol=1e-7)
    assert "weight_hh_l0" in linen.tabulate(_Stacked(), KEY)(_x())


def test_scan_vmap_and_shapes_only() -> None:
    class Step(linen.Module):
        @linen.compact
        def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jaxrnn.linen.GRUCell(3, 4)(x, h)
            return h, h

    scanned = linen.scan(Step, variable_broadcast="params", split_rngs={"params": False})()
    h = jnp.zeros((2, 4), jnp.float32)
    variables = filled_variables(scanned, h, _x())
    last, outputs = jax.jit(scanned.apply)(variables, h, _x())
    params = {f"{name}_l0": value for name, value in variables["params"]["GRUCell_0"].items()}
    expected, h_n = jaxrnn.linen.GRU(3, 4).apply({"params": params}, _x())
    assert_close(outputs, expected, atol=1e-6)
    assert_close(last, h_n[0], atol=1e-6)

    several = linen.vmap(jaxrnn.linen.GRU, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3)(3, 4)
    x = jnp.stack([_x()] * 3)
    variables = jax.jit(several.init)(KEY, x)
    outputs, _ = jax.jit(several.apply)(variables, x)
    assert not np.array_equal(outputs[0], outputs[1])
    one = jax.tree.map(lambda a: a[1], variables)
    assert_close(jaxrnn.linen.GRU(3, 4).apply(one, x[1])[0], outputs[1], atol=1e-6)

    shapes = jax.eval_shape(jaxrnn.linen.LSTM(3, 4).init, KEY, jax.ShapeDtypeStruct((5, 2, 3), jnp.float32))
    assert shapes["params"]["weight_ih_l0"].shape == (16, 3)


def test_a_model_learns_with_optax() -> None:
    """The parity of five bits: nothing but memory tells it."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(1)(jaxrnn.linen.LSTM(1, 16)(x)[0][-1])[:, 0]

    bits = np.random.RandomState(0).randint(0, 2, (5, 256))
    x, y = jnp.asarray(bits[..., None], jnp.float32), jnp.asarray(bits.sum(0) % 2, jnp.float32)
    model, optimizer = Model(), optax.adam(2e-2)

    def loss(variables: dict) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model.apply(variables, x), y).mean()

    @jax.jit
    def step(variables: dict, state: Any) -> tuple:
        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state, variables)
        return value, optax.apply_updates(variables, updates), state

    variables = jax.jit(model.init)(KEY, x)
    state = optimizer.init(variables)
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes
        for _ in range(400):
            value, variables, state = step(variables, state)
            losses.append(float(value))
    assert losses[0] > 0.6
    assert losses[-1] < 0.1
