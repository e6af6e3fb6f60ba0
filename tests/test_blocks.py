"""The loop in blocks of steps: whatever their size, it computes the same; and which size is chosen."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrnn
from jaxrnn._core import blocks
from jaxrnn._core.options import Options
from jaxrnn._core.platforms import Where
from jaxrnn._core.steps import Settings
from jaxrnn.engines import scan

T, N, F, H = 7, 3, 4, 5  # sizes of no other test, whose programs would be found compiled
LENGTHS = np.array([7, 2, 5])  # which end in the middle of blocks of three, and at their edges
RESET = np.zeros((T, N), bool)
RESET[[0, 3, 4, 6], [1, 0, 2, 1]] = True  # at the first step of a block, and at the others
SCALE = jnp.linspace(0.5, 1.5, H)


def _scaled(gates: Any, hidden: Any, state: Any) -> Any:
    """A step that closes over an array, and is not pointwise."""
    (a,) = gates
    return (jnp.tanh(a * SCALE + jnp.roll(state[0], 1, axis=-1)),)


CASES: dict[str, tuple[jaxrnn.Cell, dict[str, Any], dict[str, Any]]] = {
    "LSTM both ways, with lengths": (jaxrnn.LSTM_CELL, {"bidirectional": True}, {"lengths": LENGTHS}),
    "GRU with resets": (jaxrnn.GRU_CELL, {}, {"reset": RESET}),
    "projected LSTM, gates recomputed": (jaxrnn.LSTM_CELL, {"proj_size": 3, "bidirectional": True}, {"remat": "gates"}),
    "layer-normalised LSTM, whose sums are kept": (jaxrnn.LAYER_NORM_LSTM_CELL, {}, {"lengths": LENGTHS}),
    "peephole LSTM without biases, with resets": (jaxrnn.PEEPHOLE_LSTM_CELL, {"bias": False}, {"reset": RESET}),
    "a cell of one's own": (jaxrnn.Cell("scaled", ("a",), ("h",), _scaled), {"num_layers": 2}, {"reset": RESET}),
}
QUICK = "GRU with resets"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    jax.clear_caches()
    yield
    jax.clear_caches()


def _blocks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a program is for, and however many rows it has."""

    monkeypatch.setattr(blocks, "block_size", lambda form, where, settings, sizes: min(size, sizes.time))
    jax.clear_caches()


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_blocks_of_any_size_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and their tangents; mapped, and the gradient of what is mapped, with weights of their own."""
    cell, settings, options = CASES[name]
    spec = jaxrnn.Spec(cell, F, H, **settings)
    states = [normal(spec.num_layers * spec.num_directions, N, spec.proj_size or H), normal(2, N, H)]
    hx = tuple(np.resize(a, shape) for a, shape in zip(states, spec.state_shapes(N), strict=False))
    arguments = parameters(spec), normal(T, N, F), hx if len(hx) > 1 else hx[0]

    def loss(*arguments: Any) -> jax.Array:
        output, state = jaxrnn.apply(spec, *arguments, **options)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves((output, state)))

    def results() -> Any:
        gradient, d = jax.grad(loss, (0, 1, 2)), jax.tree.map(jnp.cos, arguments)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), arguments, d)
        return {
            "value": loss(*arguments),
            "gradient and its tangent": jax.jvp(gradient, arguments, d),
            "vmap of the gradient": jax.vmap(gradient, (None, 0, 0))(arguments[0], *both[1:]),
            "gradient of vmap": jax.grad(lambda *a: jnp.sum(jax.vmap(loss)(*a)), (0, 1, 2))(*both),
        }

    found = {}
    for size in (T, 3, 1) if name == QUICK or "gates recomputed" in name else (T, 3):
        _blocks_of(size, monkeypatch)
        found[f"blocks of {size}"] = jax.jit(results)()
    assert_close(found, dict.fromkeys(found, found[f"blocks of {T}"]), rtol=1e-13)


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_look_inside(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, bidirectional=True)
    arguments = parameters(spec), normal(T, N, F)

    def results() -> Any:
        def inside(*arguments: Any) -> Any:
            return jaxrnn.trajectory(spec, *arguments, lengths=LENGTHS)

        found, pull = jax.vjp(inside, *arguments)
        return found, pull(jax.tree.map(jnp.cos, found))

    _blocks_of(99, monkeypatch)
    expected = jax.jit(results)()
    _blocks_of(size, monkeypatch)
    assert_close(jax.jit(results)(), expected)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_one_step_and_one_row(rows: int) -> None:
    """Weights are not transposed for them: alone, in a scan, mapped, and their gradients, beside many steps at once."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    params, x, h_0 = parameters(spec), normal(T, rows, F), normal(1, rows, H)

    def at_once(params: Any, x: Any, h_0: Any) -> Any:
        x = jnp.concatenate([x, x[:, :1]], axis=1)  # never one row
        output, h_n = jaxrnn.apply(spec, params, x, jnp.concatenate([h_0, h_0[:, :1]], axis=1))
        return output[:, :-1], h_n[:, :-1]

    def by_steps(params: Any, x: Any, h_0: Any) -> Any:
        def step(h: Any, x_t: Any) -> Any:
            return jaxrnn.apply(spec, params, x_t[None], h)[::-1]

        h_n, output = jax.lax.scan(step, h_0, x)
        return output[:, 0], h_n

    def results(function: Any) -> Any:
        def gradient(*arguments: Any) -> Any:
            return jax.grad(lambda *a: sum(jnp.sum(jnp.sin(b)) for b in jax.tree.leaves(function(*a))), (0, 1, 2))(
                *arguments
            )

        both = jnp.stack([x, x[::-1]])
        return (
            function(params, x, h_0),
            gradient(params, x, h_0),
            jax.vmap(gradient, (None, 0, None))(params, both, h_0),
        )

    functions = {"at once": at_once, "by steps": by_steps, "whole": lambda *a: jaxrnn.apply(spec, *a)}
    found = jax.jit(lambda: {name: results(function) for name, function in functions.items()})()
    assert_close(found, dict.fromkeys(found, found["at once"]))


@pytest.mark.parametrize("hidden", [pytest.param(5, id="small"), pytest.param(150, id="large")])
def test_few_rows_with_a_weight_of_any_size(hidden: int) -> None:
    """Beside one row at a time, whose product is another."""
    spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, F, hidden)
    params, x, h = parameters(spec), normal(3, F), normal(3, hidden)
    expected = jnp.stack([jaxrnn.apply_cell(spec, params, *row) for row in zip(x, h, strict=True)])
    assert_close(jaxrnn.apply_cell(spec, params, x, h), expected)


@pytest.mark.parametrize("size", [1, 9])
def test_the_derivative_by_one_argument_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not differentiated is left out, and the rest stays as it is."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=3)
    everything = {**parameters(spec), "x": normal(T, N, F), "h_0": normal(1, N, 3), "c_0": normal(1, N, H)}

    def loss(some: Any, rest: Any) -> jax.Array:
        params = {**some, **rest}
        x, *hx = (params.pop(name) for name in ("x", "h_0", "c_0"))
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, tuple(hx))[0]))

    def alone(name: str) -> jax.Array:
        rest = {key: a for key, a in everything.items() if key != name}
        return jax.grad(loss)({name: everything[name]}, rest)[name]

    _blocks_of(size, monkeypatch)
    found, expected = jax.jit(lambda: ({name: alone(name) for name in everything}, jax.grad(loss)(everything, {})))()
    assert_close(found, expected)


def test_the_derivative_by_a_bias_alone_on_an_explicit_mesh() -> None:
    """Zeros in place of the other tangents are sharded like what they stand for."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H)
    params, x = parameters(spec), normal(T, 4, F)

    def gradient(x: Any) -> jax.Array:
        def loss(bias: Any) -> jax.Array:
            return jnp.sum(jnp.sin(jaxrnn.apply(spec, {**params, "bias_hh_l0": bias}, x)[0]))

        return jax.grad(loss)(params["bias_hh_l0"])

    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "rows")))
    assert_close(jax.jit(gradient)(sharded), jax.jit(gradient)(x))


def test_many_rows_take_little_memory() -> None:
    """Inference takes a few MB, and training eight arrays of all steps for a GRU, where Flax has eleven."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 16, 32)
    params, x = jax.eval_shape(spec.init, jax.random.key(0)), jax.ShapeDtypeStruct((64, 512, 16), jnp.float32)
    outputs = 64 * 512 * 32 * 4

    def run(params: Any, x: Any) -> jax.Array:
        return jaxrnn.apply(spec, params, x)[0]

    assert _memory(run, params, x) < 6e6  # the gates of all steps alone would be 13 MB
    assert _memory(jax.grad(lambda *a: jnp.sum(run(*a) ** 2)), params, x) < 8.5 * outputs  # at once, it would be 13


def test_rows_of_vmap_are_rows() -> None:
    """One row, mapped over many: the same memory as a batch."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 16, 32)
    params, x = jax.eval_shape(spec.init, jax.random.key(0)), jax.ShapeDtypeStruct((512, 64, 16), jnp.float32)
    outputs = 64 * 512 * 32 * 4

    def run(params: Any, x: Any) -> jax.Array:
        return jax.vmap(lambda x: jaxrnn.apply(spec, params, x)[0])(x)

    assert _memory(jax.grad(lambda *a: jnp.sum(run(*a) ** 2)), params, x) < 10 * outputs


def test_a_shared_batch_exchanges_gradients_once() -> None:
    """However many rows there are: a sum over devices in a loop would be one a step."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 8, 8)
    mesh = Mesh(np.array(jax.devices()[:2]), "rows")
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "rows")))
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for n, s in spec.shapes().items()}
    x = jax.ShapeDtypeStruct((8, 256, 8), jnp.float32, sharding=rows)

    def loss(params: Any, x: Any) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, params, x)[0] ** 2)

    def by_hand(params: Any, x: Any) -> Any:
        spread = jax.shard_map(
            lambda p, x: jax.lax.psum(loss(p, x), "rows"),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(None, "rows")),
            out_specs=PartitionSpec(),
        )
        return jax.grad(spread)(params, x)

    for function in (jax.grad(loss), by_hand):
        text = jax.jit(function).lower(params, x).compile().as_text() or ""
        assert "all-reduce" in text
        assert not [name for name, lines in _bodies(text).items() if "all-reduce" in lines]


def _bodies(text: str) -> dict[str, str]:
    """The bodies of a compiled program's loops."""
    parts = {
        match[1]: part for part in text.split("\n\n") if (match := re.match(r"(?:ENTRY )?%([\w.\-]+)", part.strip()))
    }
    return {name: parts[name] for name in re.findall(r"body=%([\w.\-]+)", text)}


def _memory(function: Any, *arguments: Any) -> int:
    memory: Any = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


# Bytes a step of the input's part of the gates: rows * 4 * 32 * 4.
SIZES: dict[str, tuple[Any, int]] = {
    "few rows, inference: all steps": ((64, 8, 1, False, "none"), 64),
    "many rows, inference: what fits the cache": ((64, 1024, 1, False, "none"), 4),
    "more rows than fit, inference": ((64, 8192, 1, False, "none"), 1),
    "few rows, training: all steps": ((64, 64, 1, True, "none"), 64),
    "many rows, training: step by step": ((64, 65, 1, True, "none"), 1),
    "rows of vmap": ((64, 8, 9, True, "none"), 1),
    "hardly more than fits, inference": ((64, 128, 1, False, "none"), 64),
    "a long sequence, training": ((2**20, 8, 1, True, "none"), 2**17),
    "gates recomputed": ((1024, 8, 1, True, "gates"), 128),
    "steps recomputed": ((64, 512, 1, True, 8), 8),
    "no step": ((0, 512, 1, False, "none"), 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_how_many_steps_a_block_has_on_a_cpu(name: str) -> None:
    (time, rows, mapped, keep, remat), expected = SIZES[name]
    settings, where = Settings(jaxrnn.LSTM_CELL, Options(remat=remat)), Where(times=mapped)
    sizes = blocks.Sizes(time, rows, columns=4 * 32, keep=keep, backward=keep)
    assert blocks.block_size(scan._CPU, where, settings, sizes) == expected
