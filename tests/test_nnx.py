"""The modules: torch's signatures, attributes and repr; Flax's train/eval, rngs, dtypes and transforms; training."""

import copy
import functools
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("GRU", {"batch_first": True, "bias": False}),
]
CELLS: list[tuple[str, dict[str, Any]]] = [
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTMCell", {"bias": False}),
    ("GRUCell", {"bias": 1}),
]
ATTRIBUTES = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


def _make(name: str, **settings: Any) -> Any:
    return filled(lambda: getattr(jaxrnn, name)(3, 4, **settings, rngs=nnx.Rngs(0)))


def _x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).randn(*(shape or (5, 2, 3))), jnp.float32)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "settings"), LAYERS + CELLS)
def test_a_module_looks_like_torchs(torch: types.ModuleType, name: str, settings: dict) -> None:
    ours, theirs = _make(name, **settings), getattr(torch.nn, name)(3, 4, **settings)
    for attribute in (*ATTRIBUTES, "nonlinearity"):
        if hasattr(theirs, attribute):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    if name != "RNN":  # torch's RNN does not print its nonlinearity; ours does
        for shown in repr(theirs).removesuffix(")").split("(")[1].replace("nonlinearity=relu", "'relu'").split(", "):
            assert shown in repr(ours) or shown == "bias=1"
    for key, value in theirs.state_dict().items():
        assert isinstance(getattr(ours, key), nnx.Param)
        assert getattr(ours, key).shape == tuple(value.shape)


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _merged(module: Any) -> Any:
    """As another process would have it that was sent the two halves."""
    return nnx.merge(*_pickled(nnx.split(module)))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled])
@pytest.mark.parametrize(("name", "settings"), LAYERS + CELLS)
def test_a_copy_says_what_it_is(name: str, settings: dict, copied: Callable[[Any], Any]) -> None:
    ours = _make(name, **settings)
    for other in (copied(ours), nnx.clone(ours), _merged(ours), jax.tree.map(lambda array: array, ours)):
        assert other.spec == ours.spec
        assert repr(other) == repr(ours)
        assert getattr(other, "nonlinearity", "") == settings.get("nonlinearity", "")
    linen = getattr(jaxrnn.linen, name)(3, 4, **settings)
    for other in (copied(linen), linen.clone()):
        assert other == linen
        assert other.spec == linen.spec
        assert repr(other) == repr(linen)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RNN", "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional"),
        ("LSTM", "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"),
        ("GRU", "input_size hidden_size num_layers bias batch_first dropout bidirectional"),
        ("RNNCell", "input_size hidden_size bias nonlinearity"),
        ("LSTMCell", "input_size hidden_size bias"),
        ("GRUCell", "input_size hidden_size bias"),
    ],
)
def test_positional_arguments_are_torchs(name: str, expected: str) -> None:
    parameters = inspect.signature(getattr(jaxrnn, name).__init__).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["self", *expected.split()]
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= {"dtype", "param_dtype", "precision", "rngs"}


@pytest.mark.parametrize(("name", "settings"), LAYERS + CELLS)
def test_state_paths_are_the_parameter_names(name: str, settings: dict) -> None:
    module = _make(name, **settings)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert paths == {(name,) for name in module.spec.shapes()}


def test_repr() -> None:
    assert repr(_make("LSTM", num_layers=2, bidirectional=True)) == "LSTM(3, 4, num_layers=2, bidirectional=True)"
    assert repr(_make("RNN", nonlinearity="relu")) == "RNN(3, 4, nonlinearity='relu')"
    assert repr(_make("GRUCell", bias=False)) == "GRUCell(3, 4, bias=False)"


def test_a_cell_without_bias_has_none() -> None:
    cell = _make("GRUCell", bias=False)
    assert cell.bias_ih is None
    assert cell.bias_hh is None


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
def test_a_bad_nonlinearity(name: str) -> None:
    with pytest.raises(ValueError, match="nonlinearity should be 'tanh' or 'relu', got 'sigmoid'"):
        _make(name, nonlinearity="sigmoid")


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_proj_size_is_the_lstms(name: str) -> None:
    with pytest.raises(ValueError, match=r"proj_size should be 0 for .*, got 2"):
        _make(name, proj_size=2)


@pytest.mark.parametrize(("name", "settings"), LAYERS)
def test_a_module_is_its_pure_function(name: str, settings: dict) -> None:
    module = _make(name, **settings)
    params = {key: getattr(module, key)[...] for key in module.spec.shapes()}
    assert_close(module(_x()), jaxrnn.apply(module.spec, params, _x()), atol=0)
    _, state = module(_x())
    assert_close(module(_x(), hx=state), module(_x(), state), atol=0)


def test_a_call_takes_what_apply_takes() -> None:
    gru = _make("GRU", num_layers=2)
    params = {key: getattr(gru, key)[...] for key in gru.spec.shapes()}
    reset, hx = np.zeros((5, 2), bool), jnp.ones((2, 2, 4), jnp.float32)
    reset[1, 0] = True
    arguments = {"lengths": jnp.array([4, 0]), "reset": reset, "reset_state": 2 * hx}
    ours = gru(_x(), hx, **arguments)
    assert_close(ours, jaxrnn.apply(gru.spec, params, _x(), hx, **arguments), atol=0)
    after, _ = gru(_x()[1:], 2 * hx)  # as a sequence of its own, for the row that is put back
    assert_close({"output after a reset": ours[0][1:4, 0]}, {"output after a reset": after[:3, 0]}, atol=1e-6)
    for name in ("lengths", "reset_state"):
        other = gru(_x(), hx, **{**arguments, name: None})
        assert not np.array_equal(ours[1], other[1])


def test_dtype_and_param_dtype() -> None:
    gru = _make("GRU", dtype=jnp.bfloat16)
    assert gru.weight_ih_l0.dtype == jnp.float32
    output, h_n = gru(_x())
    assert {"output": output.dtype, "h_n": h_n.dtype} == dict.fromkeys(("output", "h_n"), jnp.bfloat16)
    cell = _make("LSTMCell", param_dtype=jnp.float64)
    assert cell.weight_ih.dtype == jnp.float64
    assert cell(_x(2, 3).astype(jnp.float64))[1].dtype == jnp.float64


def test_two_modules_of_one_stream_differ_and_seeds_repeat() -> None:
    rngs = nnx.Rngs(0)
    one, other = jaxrnn.GRU(3, 4, rngs=rngs), jaxrnn.GRU(3, 4, rngs=rngs)
    assert not np.array_equal(one.weight_ih_l0[...], other.weight_ih_l0[...])
    assert_close(one.weight_ih_l0[...], jaxrnn.GRU(3, 4, rngs=nnx.Rngs(0)).weight_ih_l0[...], atol=0)


# Dropout as nnx.Dropout has it.


def _dropout() -> jaxrnn.GRU:
    return _make("GRU", num_layers=2, dropout=0.5)


def test_train_eval_and_view() -> None:
    gru = _dropout()
    first, second = gru(_x())[0], gru(_x())[0]
    assert not np.array_equal(first, second)  # training is the default, and every call draws anew
    assert np.all(first != 0), "the last layer's output was dropped"
    gru.eval()
    plain = gru(_x())[0]
    assert_close(plain, gru(_x())[0], atol=0)
    assert not np.array_equal(plain, gru(_x(), deterministic=False)[0])
    assert not np.array_equal(plain, nnx.view(gru, deterministic=False)(_x())[0])
    gru.train()
    assert not np.array_equal(plain, gru(_x())[0])
    assert_close(plain, gru(_x(), deterministic=True)[0], atol=0)
    assert_close(plain, nnx.view(gru, deterministic=True)(_x())[0], atol=0)


def test_rngs_of_the_call_come_first() -> None:
    gru, key = _dropout(), jax.random.key(7)
    by_key = gru(_x(), rngs=key)[0]
    assert_close(by_key, gru(_x(), rngs=key)[0], atol=0)
    assert_close(gru(_x(), rngs=nnx.Rngs(7))[0], gru(_x(), rngs=nnx.Rngs(dropout=7))[0], atol=0)
    assert_close(gru(_x(), rngs=nnx.Rngs(7).dropout)[0], gru(_x(), rngs=nnx.Rngs(7))[0], atol=0)
    with pytest.raises(TypeError, match=r"rngs should be .* a jax key, got int"):
        gru(_x(), rngs=7)
    # As people write it in a plain jit, where the module's own stream cannot be drawn from:
    graph, state = nnx.split(gru)
    jitted = jax.jit(lambda state, key: nnx.merge(graph, state)(_x(), rngs=key)[0])
    assert_close(jitted(state, key), by_key, atol=1e-6)


def test_no_stream_is_kept_where_there_is_no_dropout() -> None:
    assert set(nnx.state(_make("GRU", num_layers=2))) == set(_make("GRU", num_layers=2).spec.shapes())
    with pytest.warns(UserWarning, match="num_layers=1"):
        gru = _make("GRU", dropout=0.5)
    assert set(nnx.state(gru)) == set(gru.spec.shapes())
    assert len(jax.tree.leaves(nnx.state(_dropout()))) > len(_dropout().spec.shapes())


@pytest.mark.parametrize("make", [functools.partial(jaxrnn.GRU, rngs=nnx.Rngs(0)), jaxrnn.linen.GRU])
def test_a_warning_is_of_the_callers_line(make: Any) -> None:
    with pytest.warns(UserWarning, match="num_layers=1") as warned:
        make(3, 4, dropout=0.5)
    assert {warning.filename for warning in warned} == {__file__}


# Transforms and training.


def test_no_second_trace_under_nnx_jit() -> None:
    chex.clear_trace_counter()
    lstm = _make("LSTM", num_layers=2)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def run(module: jaxrnn.LSTM, x: jax.Array) -> jax.Array:
        return module(x)[0]

    for k in range(3):
        run(lstm, k * _x())
    assert_close(run(lstm, _x()), lstm(_x())[0], atol=1e-6)


class _Model(nnx.Module):
    """A sequence's parity bit, read off the last state: nothing but memory solves it."""

    def __init__(self, kind: str, rngs: nnx.Rngs) -> None:
        self.rnn = getattr(jaxrnn, kind)(1, 16, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x)[0][-1])[:, 0]


@pytest.mark.parametrize("kind", [pytest.param("LSTM", marks=pytest.mark.slow), "GRU"])  # Linen's test has an LSTM
def test_a_model_learns_with_optax(kind: str) -> None:
    bits = np.random.RandomState(0).randint(0, 2, (5, 256))
    x, y = jnp.asarray(bits[..., None], jnp.float32), jnp.asarray(bits.sum(0) % 2, jnp.float32)
    model = _Model(kind, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: _Model, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: _Model) -> jax.Array:
            return optax.sigmoid_binary_cross_entropy(model(x), y).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes
        losses = [float(step(model, optimizer)) for _ in range(400)]
    assert losses[0] > 0.6
    assert losses[-1] < 0.1


def test_vmap_over_modules() -> None:
    @nnx.jit
    @nnx.vmap(in_axes=0)
    def make(key: jax.Array) -> jaxrnn.GRU:
        return jaxrnn.GRU(3, 4, rngs=nnx.Rngs(params=key))

    stacked = make(jax.random.split(jax.random.key(0), 3))
    outputs = nnx.jit(nnx.vmap(lambda module, x: module(x)[0], in_axes=(0, None)))(stacked, _x())
    for k in range(3):
        one = nnx.merge(nnx.graphdef(_make("GRU")), jax.tree.map(lambda a, k=k: a[k], nnx.state(stacked)))
        assert_close(outputs[k], one(_x())[0], atol=1e-6)


def test_everything_works_with_32_bits_only() -> None:
    with jax.enable_x64(False):
        lstm = _make("LSTM", num_layers=2)
        gradient = nnx.grad(lambda lstm: lstm(np.random.RandomState(0).randn(5, 2, 3))[0].sum())(lstm)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
