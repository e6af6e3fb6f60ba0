"""Dropout between layers and on h, and zoneout: with given masks a reference's results, and masks of the right rate."""

import dataclasses
import functools
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from flax import nnx

import jaxrnn
from jaxrnn._core import dropout
from jaxrnn.checkpoint.dialects import DIALECTS

T, N, F, H = 5, 3, 2, 4  # time, batch, input features, hidden size
SPEC = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=3, dropout=0.4, bidirectional=True)
PARAMS = parameters(SPEC)


@pytest.mark.torch
@pytest.mark.parametrize(("batch_first", "p"), [(False, 0.4), (True, 0.4), (False, 1.0)])
def test_with_torchs_masks_it_is_torchs(torch: types.ModuleType, batch_first: bool, p: float) -> None:
    spec = dataclasses.replace(SPEC, batch_first=batch_first, dropout=p)
    module = torch.nn.GRU(F, H, 3, dropout=p, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    module.load_state_dict(jax.tree.map(torch.tensor, PARAMS))
    x = normal(N, T, F) if batch_first else normal(T, N, F)
    torch.manual_seed(3)
    expected = module(torch.tensor(x))
    torch.manual_seed(3)
    ones = torch.ones(T, N, 2 * H, dtype=torch.float64)
    masks = [torch.nn.functional.dropout(ones, p).numpy() != 0 for _ in range(2)]
    found = jaxrnn.apply(spec, PARAMS, x, dropout_masks=masks)
    assert_close(named(spec, found), named(spec, [a.detach().numpy() for a in expected]))
    assert not np.allclose(found[0], jaxrnn.apply(spec, PARAMS, x)[0])


def test_from_a_key() -> None:
    x, key = normal(T, N, F), jax.random.key(1)
    plain = jaxrnn.apply(SPEC, PARAMS, x)
    one, again, other = (jaxrnn.apply(SPEC, PARAMS, x, dropout_key=k) for k in (key, key, jax.random.key(2)))
    assert_close(again, one, atol=0)
    assert not np.allclose(one[0], other[0])
    # The first layer's last states are not dropped.
    assert_close({"h_n of the first layer": one[1][:2]}, {"h_n of the first layer": plain[1][:2]}, atol=0)
    assert not np.allclose(one[1][2:], plain[1][2:])


@pytest.mark.parametrize("layers", [2, 3])
def test_the_last_layer_drops_nothing_and_every_step_and_layer_has_its_own_mask(layers: int) -> None:
    """Relu layers that copy positive input: what comes out is the masks' product, scaled to keep the mean."""
    spec = jaxrnn.Spec(jaxrnn.RNN_RELU, 50, 50, num_layers=layers, bias=False, dropout=0.25)
    params = {name: np.eye(50) if "_ih" in name else np.zeros((50, 50)) for name in spec.shapes()}
    output = np.asarray(jaxrnn.apply(spec, params, np.ones((40, 10, 50)), dropout_key=jax.random.key(0))[0])
    scale = (4 / 3) ** (layers - 1)
    assert_close({"values": np.unique(output)}, {"values": np.array([0, scale])}, atol=1e-15)
    assert abs(output.mean() - 1) < 5 * np.sqrt((scale - 1) / output.size)
    assert not np.array_equal(output[0], output[1])


def test_one_layer_drops_nothing() -> None:
    with pytest.warns(UserWarning, match="num_layers=1"):
        spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, dropout=0.9)
    x, params = normal(T, N, F), parameters(spec)
    found = jaxrnn.apply(spec, params, x, dropout_key=jax.random.key(0))
    assert_close(found, jaxrnn.apply(spec, params, x), atol=0)


def test_masks_without_dropout() -> None:
    spec = dataclasses.replace(SPEC, dropout=0)
    masks, message = [np.ones((T, N, 2 * H))] * 2, "dropout_masks should be None with dropout=0"
    with pytest.raises(ValueError, match=message):
        jaxrnn.apply(spec, PARAMS, normal(T, N, F), dropout_masks=masks)
    linen = jaxrnn.linen.GRU(F, H, 3, bidirectional=True)
    with pytest.raises(ValueError, match=message):
        linen.apply({"params": PARAMS}, normal(T, N, F), dropout_masks=masks)
    one = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)  # has none between layers
    assert_close(*(jaxrnn.apply(one, parameters(one), normal(T, N, F), dropout_masks=m) for m in ([], None)), atol=0)


def test_masks_of_the_wrong_shape() -> None:
    for masks in ([np.ones((T, N, 2 * H))], [np.ones((N, T, 2 * H))] * 2, [None, None]):
        with pytest.raises(ValueError, match=r"dropout_masks should be 2 arrays of shape \(5, 3, 8\)"):
            jaxrnn.apply(SPEC, PARAMS, normal(T, N, F), dropout_masks=masks)
    batch_first = dataclasses.replace(SPEC, batch_first=True)
    with pytest.raises(ValueError, match=r"got \[\(3, 5, 8\), \(3, 5, 8\)\]: batch_first does not change them"):
        jaxrnn.apply(batch_first, PARAMS, normal(N, T, F), dropout_masks=[np.ones((N, T, 2 * H))] * 2)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_mask_for_all_steps(batch_first: bool) -> None:
    """Given with an axis of time of 1, or drawn with `variational_dropout`."""
    spec = dataclasses.replace(SPEC, batch_first=batch_first)
    x, chance = normal(N, T, F) if batch_first else normal(T, N, F), np.random.RandomState(0)
    masks = [chance.rand(1, N, 2 * H) < 0.6 for _ in range(2)]
    found = jaxrnn.apply(spec, PARAMS, x, dropout_masks=masks)
    every = [np.broadcast_to(mask, (T, N, 2 * H)) for mask in masks]
    assert_close(found, jaxrnn.apply(spec, PARAMS, x, dropout_masks=every), atol=0)
    one = jaxrnn.apply(spec, PARAMS, x[0] if batch_first else x[:, 0], dropout_masks=[mask[:, 0] for mask in masks])
    assert_close({"row": found[0][0] if batch_first else found[0][:, 0]}, {"row": one[0]}, atol=1e-15)


def test_variational_dropout_draws_one_mask_for_all_steps() -> None:
    spec = jaxrnn.Spec(jaxrnn.RNN_RELU, 50, 50, num_layers=2, bias=False, dropout=0.25, variational_dropout=True)
    params = {name: np.eye(50) if "_ih" in name else np.zeros((50, 50)) for name in spec.shapes()}
    output = np.asarray(jaxrnn.apply(spec, params, np.ones((4, 100, 50)), dropout_key=jax.random.key(0))[0])
    assert_close({"values": np.unique(output)}, {"values": np.array([0, 4 / 3])}, atol=1e-15)
    assert_close({"steps": output[1:]}, {"steps": np.broadcast_to(output[0], (3, 100, 50))}, atol=0)
    assert abs(output[0].mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / output[0].size)


def test_packed_rows_take_one_mask_for_all_steps() -> None:
    """In the order of the rows of hx."""
    rows, mask = [normal(n, F, seed=n) for n in (2, 5, 3)], np.random.RandomState(0).rand(1, 3, H) < 0.5
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=2, dropout=0.5)
    packed = jaxrnn.pack_sequence(rows, enforce_sorted=False)
    output, h_n = jaxrnn.apply(spec, parameters(spec), packed, dropout_masks=[mask])
    expected = [jaxrnn.apply(spec, parameters(spec), x, dropout_masks=[mask[:, k]]) for k, x in enumerate(rows)]
    assert_close(jaxrnn.unpack_sequence(output), [output for output, _ in expected], atol=1e-15)
    assert_close({"h_n": h_n}, {"h_n": np.stack([state for _, state in expected], 1)}, atol=1e-15)


RECURRENT = {"recurrent_dropout": 0.4}
KINDS = {
    "RNN": (jaxrnn.RNN_TANH, {}),
    "LSTM": (jaxrnn.LSTM_CELL, {"num_layers": 2, "bidirectional": True}),
    "projected LSTM": (jaxrnn.LSTM_CELL, {"proj_size": 2, "num_layers": 2}),
    "GRU": (jaxrnn.GRU_CELL, {}),
}


def _by_steps(spec: jaxrnn.Spec, params: dict, x: jax.Array, key: jax.Array | None) -> list[jax.Array]:
    """The outputs and the last states, step by step, with the masks that a call with this key draws."""
    last, count = [], len(spec.cell.gates)
    for layer in range(spec.num_layers):
        outputs = []
        states = tuple(a[: spec.num_directions] for a in _zeros(spec, x.shape[1]))
        scale = dropout.h_scale(spec, key, states[0], x.dtype, layer)
        zoned = dropout.zoned(spec, key, states, len(x), layer)
        for direction in range(spec.num_directions):
            weights = {role: params[name] for role, name in spec.names(layer, direction).items()}
            state, output = tuple(a[direction] for a in states), [jnp.zeros(0)] * len(x)
            for t in range(len(x))[:: -1 if direction else 1]:
                h = state[0] if scale is None else state[0] * scale[direction]
                inputs = jnp.split(x[t] @ weights["weight_ih"].T + weights["bias_ih"][None], count, -1)
                hidden = jnp.split(h @ weights["weight_hh"].T + weights["bias_hh"][None], count, -1)
                pairs = zip(spec.cell.gates, inputs, hidden, strict=True)
                gates = tuple(a if name in spec.cell.apart else a + b for name, a, b in pairs)
                apart = tuple(b for name, b in zip(spec.cell.gates, hidden, strict=True) if name in spec.cell.apart)
                after = spec.cell.step(gates, apart, state)
                if spec.proj_size:
                    after = (after[0] @ weights["weight_hr"].T, *after[1:])
                for k, p in enumerate(spec.cell.zoneout):
                    kept = p if zoned is None or zoned[k] is None else zoned[k][direction, t].astype(x.dtype)
                    after = (*after[:k], kept * state[k] + (1 - kept) * after[k], *after[k + 1 :])
                state = after
                output[t] = state[0]
            outputs.append(jnp.stack(output))
            last.append(state)
        x = jnp.concatenate(outputs, -1)
    return [x, *(jnp.stack(a) for a in zip(*last, strict=True))]


def _zeros(spec: jaxrnn.Spec, batch: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(shape) for shape in spec.state_shapes(batch))


@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_and_zoneout_step_by_step(kind: str, zoneout: bool) -> None:
    cell, settings = KINDS[kind]
    if zoneout:
        cell = jaxrnn.zoneout(cell, **dict(zip(cell.states, (0.3, 0.6), strict=False)))
    spec = jaxrnn.Spec(cell, F, H, **settings, **({} if zoneout else RECURRENT))
    params, x, key = jax.tree.map(jnp.asarray, parameters(spec)), jnp.asarray(normal(T, N, F)), jax.random.key(3)
    plain = jaxrnn.apply(dataclasses.replace(spec, cell=KINDS[kind][0]), params, x)
    for given in (key, None):
        found = jaxrnn.apply(spec, params, x, dropout_key=given)
        assert_close(jax.tree.leaves(found), _by_steps(spec, params, x, given), atol=1e-13)
        # Without a key recurrent dropout is off, and zoneout takes the mean.
        assert np.allclose(found[0], plain[0]) == (given is None and not zoneout)


@pytest.mark.parametrize("kind", ["GRU", pytest.param("projected LSTM", marks=pytest.mark.slow)])
@pytest.mark.parametrize("random", [True, False])
def test_derivatives_step_by_step(kind: str, random: bool) -> None:
    """Of recurrent dropout with zoneout: forward, backward, and second ones."""
    cell, settings = KINDS[kind]
    cell = jaxrnn.zoneout(cell, **dict(zip(cell.states, (0.3, 0.6), strict=False)))
    spec = jaxrnn.Spec(cell, F, H, **settings | RECURRENT | {"num_layers": 1})
    params, x = jax.tree.map(jnp.asarray, parameters(spec)), jnp.asarray(normal(3, N, F))
    key, tangents = jax.random.key(3) if random else None, jax.tree.map(jnp.cos, (params, x))

    def differentiated(run: Callable[..., list[jax.Array]]) -> Any:
        def loss(params: dict, x: jax.Array) -> jax.Array:
            return sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(run(params, x)))

        return jax.jvp(run, (params, x), tangents), jax.jvp(jax.grad(loss, (0, 1)), (params, x), tangents)

    def ours(remat: str) -> Any:
        return differentiated(lambda *a: jax.tree.leaves(jaxrnn.apply(spec, *a, dropout_key=key, remat=remat)))

    expected = jax.jit(lambda: differentiated(lambda *a: _by_steps(spec, *a, key)))()
    for remat in ("none", "gates")[: 1 + random]:
        assert_close(jax.jit(functools.partial(ours, remat))(), expected, atol=1e-12)


def test_keys_are_used_once() -> None:
    spec, key = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=3), jax.random.key(0)
    keys = [
        *jax.random.split(key, 3),
        *(dropout._key_of_layer(spec, key, k, layer) for k in (0, 1) for layer in range(3)),
    ]
    assert len({np.asarray(jax.random.key_data(k)).tobytes() for k in keys}) == 9


def test_recurrent_masks_have_the_rate_and_differ() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 1, 200, num_layers=2, bidirectional=True, **RECURRENT)
    h = jnp.zeros((2, 50, 200))
    masks = [np.asarray(dropout.h_scale(spec, jax.random.key(0), h, h.dtype, layer)) for layer in range(2)]
    every = np.concatenate(masks)
    assert_close({"values": np.unique(every)}, {"values": np.array([0, 1 / 0.6])}, atol=1e-15)
    assert abs((every > 0).mean() - 0.6) < 5 * np.sqrt(0.24 / every.size)
    assert len({row.tobytes() for row in every.reshape(-1, 200)}) == 200  # of each layer, direction and row


def test_zoneout_keeps_units_at_the_rate_of_their_state() -> None:
    cell = jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.1, c=0.7)
    spec = jaxrnn.Spec(cell, 2, 100)
    params, x = parameters(spec), normal(20, 30, 2)
    output, _ = jaxrnn.apply(spec, params, x, dropout_key=jax.random.key(0))
    kept = (np.asarray(output)[1:] == np.asarray(output)[:-1]).mean()
    assert abs(kept - 0.1) < 5 * np.sqrt(0.09 / output[1:].size)
    zoned = dropout.zoned(spec, jax.random.key(0), _zeros(spec, 30), 20, 0)
    assert zoned is not None
    assert abs(np.asarray(zoned[1]).mean() - 0.7) < 5 * np.sqrt(0.21 / zoned[1].size)
    assert np.all(jaxrnn.zoneout(jaxrnn.LSTM_CELL, c=0.5).zoneout == (0, 0.5))
    always = jaxrnn.Spec(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=1, c=1), 2, 100)
    assert not np.any(jaxrnn.apply(always, params, x, dropout_key=jax.random.key(0))[0])


# Both states count their steps, so that a unit that zoneout keeps is seen.
COUNTED = jaxrnn.Cell("counted", ("a",), ("h", "c"), lambda _, __, state: tuple(a + 1 for a in state), recurrent=False)
CLOCK = jaxrnn.zoneout(COUNTED, h=0.25, c=0.75)


def test_zoneout_draws_anew_for_each_layer_direction_step_and_row() -> None:
    spec = jaxrnn.Spec(CLOCK, 1, 60, num_layers=2, bidirectional=True)
    params, x = parameters(spec), np.zeros((6, 7, 1))
    states = jaxrnn.trajectory(spec, params, x, dropout_key=jax.random.key(0)).states
    ways = [1, -1, 1, -1]  # in which the layers' directions go through time
    kept = [
        np.stack([(np.diff(a[::way], axis=0, prepend=0) == 0)[::way] for a, way in zip(state, ways, strict=True)])
        for state in map(np.asarray, states.values())
    ]
    for p, each in zip((0.25, 0.75), kept, strict=True):
        assert abs(each.mean() - p) < 5 * np.sqrt(p * (1 - p) / each.size)
        for axis in range(4):
            assert len({a.tobytes() for a in np.moveaxis(each, axis, 0)}) == each.shape[axis]
    assert np.any(kept[0] & ~kept[1])  # units of h are not drawn with those of c
    cell = jaxrnn.CellSpec(CLOCK, 1, 60)
    one, other = jaxrnn.apply_cell(cell, parameters(cell), x[0], dropout_key=jax.random.key(0))
    assert len({a.tobytes() for a in np.asarray(one)}) == 7
    assert np.any((one == 0) & (other != 0))


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["mean", "random"])
def test_zoneout_keeps_the_state_that_a_step_was_reset_to(key: jax.Array | None) -> None:
    """And none from before the reset: neither value nor derivative."""
    spec, start = jaxrnn.Spec(CLOCK, 1, 60), np.full((1, 1, 60), 1000.0)
    params, x, reset = parameters(spec), np.zeros((4, 1, 1)), np.arange(4)[:, None] == 2

    def run(hx: Any, reset_state: Any) -> Any:
        return jaxrnn.apply(spec, params, x, (hx, hx), reset=reset, reset_state=(reset_state,) * 2, dropout_key=key)

    output, state = run(start, 10 * np.ones_like(start))
    assert np.all(output[:2] >= 1000)
    for a in (output[2], *state):
        assert np.all((np.asarray(a) >= 10) & (np.asarray(a) <= 12))
    before, after = jax.grad(lambda *a: sum(map(jnp.sum, run(*a)[1])), (0, 1))(start, start)
    assert_close((before, after), (np.zeros_like(start), 2 * np.ones_like(start)), atol=1e-15)


@pytest.mark.parametrize("settings", [RECURRENT, {"dropout": 0.5, "variational_dropout": True, "num_layers": 2}])
def test_chunks_with_the_same_key_have_the_same_masks(settings: dict) -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, **settings)
    params, x, key = parameters(spec), normal(T, N, F), jax.random.key(5)
    whole = jaxrnn.apply(spec, params, x, dropout_key=key)
    first, state = jaxrnn.apply(spec, params, x[:2], dropout_key=key)
    second, state = jaxrnn.apply(spec, params, x[2:], state, dropout_key=key)
    assert_close((np.concatenate([first, second]), state), whole, atol=1e-15)
    outputs, state = [], None
    for x_t in x:
        output, state = jaxrnn.apply_step(spec, params, x_t, state, dropout_key=key)
        outputs.append(output)
    assert_close((np.stack(outputs), state), whole, atol=1e-15)


LAYERS = {
    "recurrent": (jaxrnn.LSTM_CELL, RECURRENT),
    "zoneout": (jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.2, c=0.5), {}),
    "between": (jaxrnn.LSTM_CELL, {"dropout": 0.5, "num_layers": 2}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_modules_are_random_in_training_alone(kind: str) -> None:
    cell, settings = LAYERS[kind]
    x, key = normal(T, N, F).astype(np.float32), jax.random.key(1)
    ours = jaxrnn.Recurrent(cell, F, H, **settings, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    off, on = (jaxrnn.apply(ours.spec, params, x, dropout_key=k) for k in (None, key))
    assert_close(ours(x, rngs=key), on, atol=0)
    assert not np.allclose(ours(x)[0], ours(x)[0])
    ours.eval()
    assert_close(ours(x, rngs=key), off, atol=0)
    linen = jaxrnn.linen.Recurrent(cell, F, H, **settings)
    variables = {"params": params}
    assert_close(linen.apply(variables, x, deterministic=False, rng=key), on, atol=0)
    assert_close(linen.apply(variables, x, deterministic=True), off, atol=0)
    one, other = (linen.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(k)}) for k in (1, 2))
    assert not np.allclose(one[0], other[0])
    with pytest.raises(ValueError, match="deterministic"):
        linen.apply(variables, x)
    # One step.
    state = tuple(np.ones(shape, np.float32) for shape in ours.spec.state_shapes(N))
    off, on = (jaxrnn.apply_step(ours.spec, params, x[0], state, dropout_key=k) for k in (None, key))
    assert not np.allclose(on[0], off[0])
    linen_step = functools.partial(linen.apply, variables, x[0], state, method="step")
    for deterministic, expected in ((True, off), (False, on)):
        assert_close(ours.step(x[0], state, deterministic=deterministic, rngs=key), expected, atol=0)
        assert_close(linen_step(deterministic, rng=key), expected, atol=0)
    assert_close(ours.step(x[0], state, rngs=key), off, atol=0)
    ours.train()
    assert_close(ours.step(x[0], state, rngs=key), on, atol=0)
    with pytest.raises(ValueError, match="deterministic"):
        linen_step()


def test_modules_take_masks() -> None:
    x, masks = normal(T, N, F).astype(np.float32), [np.random.RandomState(0).rand(1, N, H) < 0.5]
    ours = jaxrnn.GRU(F, H, 2, dropout=0.5, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    on, off = jaxrnn.apply(ours.spec, params, x, dropout_masks=masks), jaxrnn.apply(ours.spec, params, x)
    before = ours.rngs.count[...]
    assert_close(ours(x, dropout_masks=masks), on, atol=0)
    assert ours.rngs.count[...] == before  # no numbers were drawn
    linen = jaxrnn.linen.GRU(F, H, 2, dropout=0.5)
    assert_close(linen.apply({"params": params}, x, deterministic=False, dropout_masks=masks), on, atol=0)
    assert_close(linen.apply({"params": params}, x, deterministic=True, dropout_masks=masks), off, atol=0)
    ours.eval()
    assert_close(ours(x, dropout_masks=masks), off, atol=0)
    # What is random beside them stays so.
    key, settings = jax.random.key(0), {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.4}
    both = jaxrnn.apply(dataclasses.replace(ours.spec, **settings), params, x, dropout_masks=masks, dropout_key=key)
    assert not np.allclose(both[0], on[0])
    for module in (jaxrnn.GRU(F, H, **settings, rngs=nnx.Rngs(0)), jaxrnn.linen.GRU(F, H, **settings)):
        if isinstance(module, jaxrnn.GRU):
            nnx.update(module, nnx.State(params))
            found = module(x, rngs=key, dropout_masks=masks)
        else:
            found = module.apply({"params": params}, x, deterministic=False, rng=key, dropout_masks=masks)
        assert_close(found, both, atol=0)


@pytest.mark.libraries
@pytest.mark.slow  # imports Keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_recurrent_dropout_is_keras_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one mask for all gates, where Keras draws one for each."""
    from keras_models import load_keras

    keras = load_keras()
    x, rate, key = normal(N, T, F), 0.4, jax.random.key(2)
    functions = {"activation": jnp.tanh}  # Keras's own are in float32
    functions |= {} if name == "SimpleRNN" else {"recurrent_activation": jax.nn.sigmoid}
    layer = getattr(keras.layers, name)(
        H, return_sequences=True, return_state=True, recurrent_dropout=rate, dtype="float64", **functions
    )
    layer.build(x.shape)
    weights = DIALECTS["keras", name].read(
        dict(zip(("kernel", "recurrent_kernel", "bias"), map(keras.ops.convert_to_numpy, layer.weights), strict=True))
    )
    params = {f"{role}_l0": array for role, array in weights.items()}
    cell = {"SimpleRNN": jaxrnn.RNN_TANH, "LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL}[name]
    spec = jaxrnn.Spec(cell, F, H, batch_first=True, recurrent_dropout=rate)
    scale = np.asarray(dropout.h_scale(spec, key, np.zeros((1, N, H)), np.dtype(float), 0))[0]
    gates = len(spec.cell.gates)
    mask = keras.ops.convert_to_tensor(scale)
    given = mask if gates == 1 else [mask] * gates
    monkeypatch.setattr(layer.cell, "get_recurrent_dropout_mask", lambda step_input: given)
    with jax.numpy_dtype_promotion("standard"):
        expected = [keras.ops.convert_to_numpy(a) for a in layer(x, training=True)]
    output, state = jaxrnn.apply(spec, params, x, dropout_key=key)
    found = [output, *(a[0] for a in (state if isinstance(state, tuple) else (state,)))]
    assert_close(found, expected, atol=1e-12)
    assert not np.allclose(output, jaxrnn.apply(spec, params, x)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, recurrent_dropout=1.5),
            "recurrent_dropout should be a number from",
        ),
        (lambda: jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, recurrent_dropout=True), "from 0 to 1, not a bool, got True"),
        (lambda: jaxrnn.Spec(jaxrnn.IND_RNN_CELL, F, H, recurrent_dropout=0.5), "the cell has no recurrent weights"),
        (lambda: jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=-1), "zoneout of Cell .* should be a number from 0 to 1"),
        (lambda: jaxrnn.zoneout(jaxrnn.GRU_CELL, c=0.1), r"zoneout of Cell 'GRU' is for its states \('h',\), got"),
        (
            lambda: dataclasses.replace(jaxrnn.LSTM_CELL, zoneout=(0.1,)),
            r"a number for each of \('h', 'c'\), got \(0.1",
        ),
        (
            lambda: jaxrnn.zoneout(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.1), c=0.5),
            r"cell should have no zoneout, got zoneout\(LSTM, h=0\.1\): give the numbers of all states at once",
        ),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_flag_should_be_a_bool() -> None:
    with pytest.raises(
        TypeError, match=r"variational_dropout should be of type bool, got 0\.2 .* the probability is that of"
    ):
        jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, variational_dropout=0.2)
    with pytest.raises(TypeError, match=r"cell should be a jaxrnn\.Cell"):
        jaxrnn.zoneout("LSTM", h=0.1)
