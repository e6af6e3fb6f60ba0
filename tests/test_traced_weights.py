"""Weights that jit or vmap traces, and weights stacked over seeds, through the dialects and `from_flax`."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import linen, nnx
from flax.traverse_util import flatten_dict
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, load
from jaxrnn.checkpoint.dialects import DIALECTS, from_flat, to_flat

F, H, T, N, SEEDS = 3, 4, 2, 5, 3
X = jnp.asarray(normal(N, T, F), jnp.float32)
ROWS = {"LSTM": 4 * H, "GRU": 3 * H, "RNN": H}


def _weights(kind: str, *axes: int) -> dict[str, np.ndarray]:
    shapes = {"weight_ih": (F,), "weight_hh": (H,), "bias_ih": (), "bias_hh": ()}
    return {role: normal(*axes, ROWS[kind], *shape, seed=seed) for seed, (role, shape) in enumerate(shapes.items())}


def _each(function: Callable[[Any], Any], arrays: Any) -> Any:
    """The results for each seed, one by one, stacked."""
    results = [function(jax.tree.map(lambda a, seed=seed: np.asarray(a[seed]), arrays)) for seed in range(SEEDS)]
    return jax.tree.map(lambda *each: np.stack(each), *results)


@pytest.mark.parametrize(("library", "name"), DIALECTS)
def test_a_dialect_of_traced_weights(library: str, name: str) -> None:
    dialect = DIALECTS[library, name]
    weights = _weights(dialect.kind, SEEDS)
    if (library, name) == ("flax.nnx", "GRUCell"):
        del weights["bias_hh"]
    expected = _each(dialect.write, weights)
    written, back = jax.jit(jax.vmap(lambda w: (out := dialect.write(w), dialect.read(out))))(weights)
    assert isinstance(written[next(iter(written))], jax.Array)
    assert_close(written, expected, atol=1e-15)
    assert_close(back, _each(dialect.read, expected), atol=0)
    with pytest.raises(
        CheckpointError, match=r"does not fit .*\n.* or map this over the axes before theirs by jax.vmap"
    ):
        dialect.read(expected)
    with pytest.raises(CheckpointError, match=r"does not fit weight_hh .*\n.* or map this over the axes before theirs"):
        dialect.write(weights)
    params = {f"{role}_l0": array for role, array in weights.items()}
    with pytest.raises(
        CheckpointError, match=r"is no array of a layer of .*\n.* or map this over the axes before theirs"
    ):
        dialect.has(params)
    assert_close(jax.vmap(dialect.has)(params), _each(dialect.has, params), atol=0)


def test_biases_are_added_up_in_the_widest_dtype_there_is() -> None:
    dialect, weights = DIALECTS["flax.linen", "LSTMCell"], _weights("LSTM")
    half = {role: jnp.asarray(array, jnp.bfloat16) for role, array in weights.items()}
    expected = dialect.write(half)
    for x64 in (True, False):
        with jax.enable_x64(x64):
            found = jax.jit(dialect.write)(half)
            assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in expected.items()}
            assert_close(found, expected, atol=0)


def test_a_bias_that_a_trace_hides() -> None:
    dialect, weights = DIALECTS["flax.nnx", "GRUCell"], _weights("GRU")
    with pytest.raises(
        CheckpointError, match=r"hides whether bias_hh is 0\nif it is 0, give the weights without bias_hh"
    ):
        jax.jit(dialect.write)(weights)
    zero = weights | {"bias_hh": np.zeros(3 * H)}
    expected = dialect.write(zero)
    assert_close(jax.jit(dialect.write)({name: a for name, a in weights.items() if name != "bias_hh"}), expected)
    known = jax.jit(lambda kernel: dialect.write({**zero, "weight_ih": kernel}))  # beside it zeros that are known
    assert_close(known(weights["weight_ih"]), expected)
    lost = functools.partial(
        jax.jit(lambda kernel: dialect.write({**weights, "weight_ih": kernel})), weights["weight_ih"]
    )
    with pytest.raises(CheckpointError, match="for the gate n: numbers up to"):
        lost()


def test_flat_weights_whose_biases_a_trace_hides() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, bias=False)
    params = {f"{role}_l0": jnp.asarray(a) for role, a in _weights("GRU").items() if role.startswith("weight")}
    flat = to_flat(spec, params)
    with pytest.raises(CheckpointError, match=r"hides whether they are 0\nif they are 0, give flat\[:84\]; else"):
        jax.jit(lambda flat: from_flat(spec, flat))(flat)
    assert_close(jax.jit(lambda flat: from_flat(spec, flat[:84]))(flat), params, atol=0)


LINEN = {
    "GRU": lambda: linen.RNN(linen.GRUCell(H)),
    "LSTM, time-major": lambda: linen.RNN(linen.LSTMCell(H), time_major=True),
    "both ways": lambda: linen.Bidirectional(*(linen.RNN(linen.SimpleCell(H)) for _ in range(2))),
}
BOTH_WAYS = pytest.mark.filterwarnings("ignore:.* are read as a Bidirectional, whose second runs backward")


def _stacked(theirs: Any, *axes: int) -> Any:
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), X)
    return jax.tree.map(lambda a: jnp.asarray(normal(*axes, *a.shape), a.dtype), shapes)


@BOTH_WAYS
@pytest.mark.parametrize("name", LINEN)
def test_weights_of_linen_stacked_over_seeds(name: str) -> None:
    theirs = LINEN[name]()
    batch_first = not theirs.time_major
    variables = _stacked(theirs, SEEDS)
    expected = jax.vmap(theirs.apply, (0, None))(variables, X)
    for weights in (variables, variables["params"], flatten_dict(variables["params"], sep="/")):
        ours, converted = jaxrnn.from_flax(weights, batch_first=batch_first)
        assert ours.batch_first == batch_first
        assert_close(jax.vmap(ours.apply, (0, None))(converted, X)[0], expected, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"should have two axes in a flax\.linen\..*\nof several .* by vmap: "
    ) as caught:
        jaxrnn.from_flax(theirs, variables)
    advice = str(caught.value).rpartition(" by vmap: ")[2]
    assert_close(
        eval(advice, {"jax": jax, "jaxrnn": jaxrnn, "module": theirs, "variables": variables}), converted, atol=0
    )
    mapped = jax.jit(jax.vmap(lambda weights: jaxrnn.from_flax(weights, batch_first=True)[1]))
    assert_close(mapped(variables), converted, atol=0)


def test_weights_stacked_twice_and_in_a_file(tmp_path: Path) -> None:
    theirs = LINEN["GRU"]()
    variables = _stacked(theirs, 2, SEEDS)
    each = jax.vmap(jax.vmap(theirs.apply, (0, None)), (0, None))
    flat = flatten_dict(variables["params"], sep=".")
    np.savez(tmp_path / "seeds.npz", **flat)
    with pytest.warns(
        UserWarning, match=r"makes them: not converted\ngive the part of one cell to jaxrnn\.from_flax, whi"
    ):
        tensors = load(tmp_path / "seeds.npz")
    for weights in (variables, tensors):
        ours, converted = jaxrnn.from_flax(weights, batch_first=True)
        found = jax.vmap(jax.vmap(ours.apply, (0, None)), (0, None))(converted, X)[0]
        assert_close(found, each(variables, X), atol=1e-5)


def test_weights_of_several_cells_of_which_some_are_stacked() -> None:
    part = LINEN["GRU"]()
    one, stacked = (_stacked(part, *axes)["params"]["cell"] for axes in ((), (SEEDS,)))
    with pytest.warns(UserWarning, match=r"beside the weights of .* there are b\.hn\.bias"):
        _, converted = jaxrnn.from_flax({"a": one, "b": stacked}, batch_first=True)
    assert converted["params"]["bias_hh_l0"].shape == (3 * H,)
    with pytest.raises(CheckpointError, match=r"by different axes: a by \(3,\), b by \(2, 3\)\ngive the part"):
        jaxrnn.from_flax({"a": stacked, "b": _stacked(part, 2, SEEDS)["params"]["cell"]})


def test_what_is_beside_stacked_cells_is_named() -> None:
    stacked = {"a": _stacked(LINEN["GRU"](), SEEDS)["params"]["cell"], "head": {"kernel": np.zeros((SEEDS, 2, 2))}}
    with pytest.warns(UserWarning, match=r"beside the weights of .* there are head\.kernel, steps, which") as caught:
        jaxrnn.from_flax(stacked | {"steps": np.zeros(SEEDS, int)}, batch_first=True)
    assert [warning.filename for warning in caught] == [__file__]


def _nnx(seed: int) -> Any:
    return filled(lambda: nnx.RNN(nnx.GRUCell(F, H, rngs=nnx.Rngs(0))), seed)


def _several() -> Any:
    """One module with the parameters of several, as nnx.vmap makes it."""
    states = [nnx.state(_nnx(seed)) for seed in range(SEEDS)]
    return nnx.merge(nnx.graphdef(_nnx(0)), jax.tree.map(lambda *each: jnp.stack(each), *states))


def test_modules_of_nnx_stacked_over_seeds() -> None:
    several = _several()
    expected = jnp.stack([jaxrnn.from_flax(_nnx(seed))(X)[0] for seed in range(SEEDS)])
    call = nnx.vmap(lambda ours, x: ours(x)[0], in_axes=(0, None))
    state = nnx.state(several)
    assert_close(call(jaxrnn.from_flax(state, batch_first=True), X), expected, atol=1e-6)
    for vmap in (nnx.vmap, jax.vmap):
        ours = vmap(lambda state: jaxrnn.from_flax(state, batch_first=True))(state)
        assert_close(call(ours, X), expected, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"two axes in a flax\.nnx\.GRUCell\nof several .* by vmap: ") as caught:
        jaxrnn.from_flax(several)
    advice = str(caught.value).rpartition(" by vmap: ")[2]
    flax = __import__("flax.nnx")
    assert_close(call(eval(advice, {"flax": flax, "jaxrnn": jaxrnn, "module": several}), X), expected, atol=1e-6)


def test_within_jit() -> None:
    theirs = _nnx(0)
    expected = jaxrnn.from_flax(theirs)(X)
    assert_close(nnx.jit(lambda theirs: jaxrnn.from_flax(theirs)(X))(theirs), expected, atol=1e-6)
    assert_close(nnx.jit(jaxrnn.from_flax)(theirs)(X), expected, atol=1e-6)
    weights = nnx.state(theirs)
    assert_close(jax.jit(lambda state: jaxrnn.from_flax(state, batch_first=True)(X))(weights), expected, atol=1e-6)
    module = LINEN["GRU"]()
    variables = filled_variables(module, X)

    def loss(variables: Any) -> jax.Array:
        ours, converted = jaxrnn.from_flax(module, variables)
        return jnp.sum(ours.apply(converted, X)[0] ** 2)

    gradient = jax.grad(lambda variables: jnp.sum(module.apply(variables, X) ** 2))(variables)
    assert_close(jax.jit(jax.grad(loss))(variables), gradient, atol=1e-5)


def test_which_axis_is_time_is_assumed_with_a_warning() -> None:
    variables = filled_variables(LINEN["GRU"](), X)
    for weights, assumed in ((variables, True), ({"ScannedRNN_0": variables["params"]["cell"]}, False)):
        said = (
            rf"which axis of x is time: batch_first={assumed} is assumed\ngive (\w+=\w+), .*, or (\w+=\w+), as a scan"
        )
        with pytest.warns(UserWarning, match=said) as caught:
            ours, _ = jaxrnn.from_flax(weights)
        assert ours.batch_first == assumed
        for given in re.search(said, str(caught[0].message)).groups():
            made, _ = eval(f"jaxrnn.from_flax(weights, {given})", {"jaxrnn": jaxrnn, "weights": weights})
            assert given == f"batch_first={made.batch_first}"
    for module, more in ((_nnx(0), ()), (LINEN["GRU"](), (variables,))):
        with pytest.raises(TypeError, match="batch_first is for weights alone: an RNN says by time_major"):
            jaxrnn.from_flax(module, *more, batch_first=True)
    with pytest.raises(TypeError, match="batch_first should be of type bool"):
        jaxrnn.from_flax(variables, batch_first=1)


def _scan(module: Any, **settings: Any) -> Any:
    return linen.scan(module, variable_broadcast="params", split_rngs={"params": False}, **settings)


class ScannedRNN(linen.Module):
    """As in purejaxrl."""

    @functools.partial(_scan, in_axes=0, out_axes=0)
    @linen.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        x, resets = inputs
        return linen.GRUCell(features=H)(jnp.where(resets[:, None], 0.0, carry), x)


def _remedy(theirs: Any, variables: Any, **names: Any) -> Any:
    said = r"got Scan\w+\nof a scan over one of these cells give the weights alone: (jaxrnn.*?\)), or True where"
    with pytest.raises(TypeError, match=said) as caught:
        jaxrnn.from_flax(theirs, variables)
    return eval(re.search(said, str(caught.value))[1], {"jaxrnn": jaxrnn, "variables": variables})


def test_a_scan_over_a_cell_is_converted_as_the_message_says() -> None:
    x, first = X.swapaxes(0, 1), jnp.zeros((T, N), bool).at[1, 2].set(True)
    carry = jnp.asarray(normal(N, H), jnp.float32)
    variables = filled_variables(ScannedRNN(), carry, (x, first))
    ours, converted = _remedy(ScannedRNN(), variables)
    last, expected = ScannedRNN().apply(variables, carry, (x, first))
    assert_close(ours.apply(converted, x, carry[None], reset=first), (expected, last[None]), atol=1e-6)
    for settings in ({}, {"in_axes": 1, "out_axes": 1}, {"reverse": True}):
        theirs = _scan(linen.GRUCell, **settings)(features=H)
        y = X if settings.get("in_axes") else x
        variables = filled_variables(theirs, carry, y)
        ours, converted = _remedy(theirs, variables)
        ours = ours.copy(batch_first=True) if y is X else ours
        flip = jnp.flip if settings.get("reverse") else lambda x, axis: x
        output, _ = ours.apply(converted, flip(y, 0), carry[None])
        assert_close(flip(output, 0), theirs.apply(variables, carry, y)[1], atol=1e-6)
    cell = linen.GRUCell(H, activation_fn=linen.relu)  # an RNN of it
    theirs = _scan(linen.GRUCell)(H, activation_fn=linen.relu)
    variables = filled_variables(theirs, carry, x)
    rnn = linen.RNN(cell, time_major=True)
    ours, converted = jaxrnn.from_flax(rnn, {"params": {"cell": variables["params"]}})
    assert_close(ours.apply(converted, x, carry[None])[0], theirs.apply(variables, carry, x)[1], atol=1e-6)


def test_a_state_before_there_is_a_layer() -> None:
    """Also inside a module, where a layer would take a name."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            state = jaxrnn.linen.GRU(F, H, parent=None).initial_state(N)
            assert jaxrnn.Spec(jaxrnn.GRU_CELL, F, H).initial_state(N).shape == state.shape == (1, N, H)
            return jaxrnn.linen.GRU(F, H)(x, state)

    assert [*jax.eval_shape(Model().init, jax.random.key(0), X.swapaxes(0, 1))["params"]] == ["GRU_0"]
    h, c = jaxrnn.linen.LSTM(F, H).initial_state(N)
    assert h.shape == c.shape == (1, N, H)
