"""Meshes on which types say how arrays are sharded: inside `jax.shard_map`, and with axes of type Explicit."""

import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from covering import covering
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from mapping import FLOATS, MARKS, TRANSFORMS, Case, Row, Tree, draw, parts

import jaxrnn

P = PartitionSpec


def _rows(transforms: list[str], keys: list[str], **fixed: Any) -> list[Row]:
    """Settings in which any two values of `keys` and of arguments meet: an argument is sharded (0) or not (None)."""
    chance, rows = random.Random(1), []
    while len(rows) < 300:
        row = draw(chance) | fixed
        row |= {name: 0 for name in FLOATS + MARKS if row[name] == 1}
        row["transform"] = chance.choice(transforms)
        if any(row[name] == 0 for name in FLOATS + MARKS):
            rows.append(row)
    return covering(rows, lambda row: {name: row[name] for name in (*keys, *FLOATS, *MARKS)})


def _parametrize(rows: list[Row], name: Callable[[Row], str]) -> pytest.MarkDecorator:
    """Every third row; --thorough takes all."""
    marks = [() if k % 3 == 0 else pytest.mark.thorough for k in range(len(rows))]
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=name(row), marks=mark) for row, mark in zip(rows, marks, strict=True)]
    )


INSIDE = _rows(["grad", "jvp"], ["transform", "jit", "cell", "remat"], order="of vmap", out=0)


@_parametrize(INSIDE, lambda row: f"{row['transform']}, {row['jit']}, {row['cell']}")
def test_inside_shard_map(row: Row) -> None:
    """A row for each device: as a loop over the rows. Differentiated inside of shard_map, or outside."""
    case = Case(row)
    mesh = Mesh(np.array(jax.devices()[: case.rows]), ("rows",))
    floats, marks = parts(case.stack(case.arguments, case.axes))
    weights = [np.stack(each) for each in zip(*case.weights, strict=True)]
    tangents = jax.tree.map(lambda a: np.cos(3 * a), floats)
    specs = [{n: P() if case.axes[n] is None else P("rows") for n in tree} for tree in (floats, marks)]
    each = P("rows")

    def own(tree: Row) -> Row:
        """What a device holds of arguments of which each has a row."""
        return {n: a if case.axes[n] is None else jax.tree.map(lambda a: a[0], a) for n, a in tree.items()}

    def rows(floats: Row, marks: Row) -> list[jax.Array]:
        return [a[None] for a in case.apply(own(floats), own(marks), row["remat"])]

    transform = TRANSFORMS[row["transform"]]
    if "inside" in row["jit"]:

        def summed(floats: Row, marks: Row, weights: list) -> jax.Array:
            losses = [jnp.sum(w * jnp.sin(a)) for w, a in zip(weights, rows(floats, marks), strict=True)]
            return jax.lax.psum(sum(losses), "rows")

        def inside(*arguments: Any) -> Tree:
            return jax.grad(summed)(*arguments[:3]) if row["transform"] == "grad" else transform(rows, *arguments)

        out = specs[0] if row["transform"] == "grad" else each
        run = jax.shard_map(inside, mesh=mesh, in_specs=(*specs, each, specs[0]), out_specs=out)
    else:
        run = functools.partial(transform, jax.shard_map(rows, mesh=mesh, in_specs=tuple(specs), out_specs=each))
    found = jax.jit(run)(floats, marks, weights, tangents)
    assert_close(found if isinstance(found, dict) else dict(enumerate(jax.tree.leaves(found))), case.by_loop())


EXPLICIT = _rows(["grad", "jvp"], ["transform", "bidirectional", "remat"], order="of vmap", batched=True, cell="LSTM")
BATCH_AXES = {"x": 1, "hx": 1, "reset_state": 1, "lengths": 0, "mask": 1, "reset": 1, "dropout_masks": 1}


@_parametrize(EXPLICIT, lambda row: f"{row['transform']}, {row['remat']}")
def test_on_an_explicit_mesh(row: Row) -> None:
    """With any arguments sharded along the batch, and parameters along whatever can be: as on one device."""
    case = Case(row)
    arguments, weights, tangents = case.arguments[0], case.weights[0], case.tangents(0)
    mesh = jax.make_mesh((arguments["x"].shape[1],), ("rows",), axis_types=(AxisType.Explicit,))

    def lay(name: str, a: np.ndarray) -> jax.Array:
        axis = BATCH_AXES.get(name, 0)
        sharded = row[name] == 0 and a.shape[axis] % mesh.size == 0
        return jax.device_put(a, NamedSharding(mesh, P(*[None] * axis, "rows") if sharded else P()))

    laid = parts({name: jax.tree.map(functools.partial(lay, name), a) for name, a in arguments.items()})
    pushed = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), tangents, laid[0])
    run = functools.partial(TRANSFORMS[row["transform"]], functools.partial(case.apply, remat=row["remat"]))
    expected = jax.jit(run)(*parts(arguments), weights, tangents)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(*laid, weights, pushed)
    if row["x"] == 0 and row["transform"] == "jvp":
        assert found[0][0].sharding.spec[1] == "rows"  # the output follows x
    assert_close(found, expected)


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))


def test_dropout_and_zoneout_on_an_explicit_mesh(mesh: Mesh) -> None:
    cell = jaxrnn.zoneout(jaxrnn.GRU_CELL, h=0.3)
    spec = jaxrnn.Spec(cell, 2, 3, num_layers=2, dropout=0.5, recurrent_dropout=0.5, batch_first=True)
    params, x, key = parameters(spec), normal(4, 5, 2), jax.random.key(0)
    run = jax.jit(lambda x: jaxrnn.apply(spec, params, x, dropout_key=key))
    expected = run(x)
    with jax.set_mesh(mesh):
        found = run(jax.device_put(x, NamedSharding(mesh, P("rows"))))
    assert found[0].sharding.spec == P("rows", None, None)
    assert_close(found, expected)


def test_a_dropout_key_for_each_device() -> None:
    """Inside shard_map, where nothing else varies."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3, num_layers=2, dropout=0.5)
    params, x, keys = parameters(spec), normal(5, 2, 2), jax.random.split(jax.random.key(0), 2)

    def run(key: jax.Array) -> jax.Array:
        return jaxrnn.apply(spec, params, x, dropout_key=key[0])[0][None]

    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))(keys)
    assert_close(found, np.concatenate([jax.jit(run)(keys[k : k + 1]) for k in range(2)]))


def test_cells_on_an_explicit_mesh(mesh: Mesh) -> None:
    spec = jaxrnn.CellSpec(jaxrnn.zoneout(jaxrnn.LSTM_CELL, c=0.5), 2, 4)
    params, x, hx = parameters(spec), normal(4, 2), (normal(4, 4), normal(4, 4, seed=1))
    random = {"reset": np.arange(4) == 2, "dropout_key": jax.random.key(0)}
    run = jax.jit(lambda params, x, hx: jaxrnn.apply_cell(spec, params, x, hx, **random))
    expected, rows = run(params, x, hx), NamedSharding(mesh, P("rows"))
    with jax.set_mesh(mesh):
        assert_close(run(jax.device_put(params, rows), jax.device_put(x, rows), hx), expected)
        assert_close(run(params, x, jax.device_put(hx, rows)), expected)


def test_packed_rows_on_an_explicit_mesh(mesh: Mesh) -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3)
    packed = jaxrnn.pack_padded_sequence(normal(4, 3, 2), [4, 2, 2])
    expected, _ = jaxrnn.apply(spec, parameters(spec), packed)
    with jax.set_mesh(mesh):
        found, _ = jaxrnn.apply(spec, parameters(spec), packed)
        assert_close(found.data, expected.data)
        sharded = packed._replace(data=jax.device_put(packed.data, NamedSharding(mesh, P("rows"))))
        with pytest.raises(ValueError, match=r"type Explicit, got P\('rows', None\): give padded rows and lengths="):
            jaxrnn.apply(spec, parameters(spec), sharded)
