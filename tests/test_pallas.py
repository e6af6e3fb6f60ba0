"""The kernels for TPUs: what they compute, interpreted here, and how they are lowered for a TPU."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from jax.sharding import AxisType, PartitionSpec

import jaxrnn
from jaxrnn import engines
from jaxrnn.engines.pallas import Pallas, _Resident

T, N, F, H = 7, 3, 5, 6  # no multiple of a block of steps, or of a tile
LENGTHS = {"lengths": np.array([T, 2, 0])}
RESET = {"reset": np.arange(T * N).reshape(T, N) % 5 == 3, "reset_state": (normal(1, N, H), normal(1, N, H, seed=1))}
CASES: dict[str, tuple[jaxrnn.Cell, dict[str, Any], dict[str, Any]]] = {
    "LSTM": (jaxrnn.LSTM_CELL, {}, {}),
    "LSTM with resets": (jaxrnn.LSTM_CELL, {}, RESET),
    "LSTM, gates recomputed": (jaxrnn.LSTM_CELL, {}, {"remat": "gates"}),
    "GRU, two layers both ways, with lengths": (jaxrnn.GRU_CELL, {"num_layers": 2, "bidirectional": True}, LENGTHS),
    "relu RNN without biases, three steps at a time": (jaxrnn.RNN_RELU, {"bias": False}, {"remat": 3}),
    "peephole LSTM with lengths": (jaxrnn.PEEPHOLE_LSTM_CELL, {}, LENGTHS),
    "independent RNN": (jaxrnn.IND_RNN_CELL, {}, RESET | {"reset_state": None}),
    "layer-normalised LSTM": (jaxrnn.LAYER_NORM_LSTM_CELL, {}, {}),
}
KERNEL = "pallas_interpret"


def _single(tree: Any) -> Any:
    """Floating arrays in float32, in which a TPU computes."""
    return jax.tree.map(lambda a: a.astype(np.float32) if getattr(a, "dtype", None) == np.float64 else a, tree)


def _arguments(cell: jaxrnn.Cell, **settings: Any) -> tuple[jaxrnn.Spec, Any]:
    spec = jaxrnn.Spec(cell, F, H, **settings)
    rows = spec.num_layers * spec.num_directions
    hx = tuple(normal(rows, N, H, seed=k) for k in range(len(cell.states)))
    return spec, (parameters(spec), normal(T, N, F), hx if len(hx) > 1 else hx[0])


def _results(spec: jaxrnn.Spec, engine: str, **options: Any) -> Any:
    """A loss, and what it is of."""

    def results(*arguments: Any) -> tuple[jax.Array, Any]:
        params, x, hx = arguments
        found = jaxrnn.apply(spec, params, x, hx, engine=engine, precision="highest", **options)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(found)), found

    return results


def _loss(spec: jaxrnn.Spec, engine: str, **options: Any) -> Any:
    return lambda *arguments: _results(spec, engine, **options)(*arguments)[0]


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_the_scan(name: str) -> None:
    """In float32, beside float64: values and gradients."""
    cell, settings, options = CASES[name]
    spec, arguments = _arguments(cell, **settings)

    def results(engine: str, dtype: Any) -> dict[str, Any]:
        given, others = (arguments, options) if dtype == np.float64 else _single((arguments, options))
        gradients, returned = jax.jit(jax.grad(_results(spec, engine, **others), (0, 1, 2), has_aux=True))(*given)
        return {"values": named(spec, returned), "gradients": gradients}

    truth = results("scan", np.float64)
    error = {engine: _rms(results(engine, np.float32), truth) for engine in (KERNEL, "scan")}
    assert error["scan"] > 0
    assert error[KERNEL] < 2 * error["scan"]


def _rms(found: Any, truth: Any) -> float:
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    differences = [np.ravel((np.asarray(a, np.float64) - b) / np.maximum(1, np.abs(b))) for a, b in leaves]
    return float(np.sqrt(np.mean(np.concatenate(differences) ** 2)))


@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences_stream_in_by_blocks(reverse: bool) -> None:
    """Three blocks of steps, the last one not whole."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, bidirectional=reverse)
    params, x = _single((parameters(spec), normal(37, N, F)))

    def results(engine: str) -> Any:
        def loss(params: Any, x: Any) -> jax.Array:
            output, h_n = jaxrnn.apply(spec, params, x, engine=engine, precision="highest")
            return jnp.sum(jnp.sin(output)) + jnp.sum(h_n**2)

        return jax.value_and_grad(loss, (0, 1))(params, x)

    assert_close(results(KERNEL), results("scan"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LSTM with resets", pytest.param("LSTM", marks=pytest.mark.slow)])
def test_other_transforms_run_by_scan(name: str) -> None:
    cell, settings, options = CASES[name]
    spec, arguments = _arguments(cell, **settings)
    arguments, options = _single((arguments, options))
    every = jax.tree.map(jnp.cos, arguments)

    def results(engine: str) -> Any:
        loss = _loss(spec, engine, **options)
        gradient = jax.grad(loss, (0, 1, 2))

        def of_x(x: jax.Array) -> Any:
            return gradient(arguments[0], x, arguments[2])

        two = jnp.stack([arguments[1], every[1]])
        return {
            "jvp": jax.jvp(loss, arguments, every),
            "jvp of grad": jax.jvp(gradient, arguments, every),
            "grad of grad": jax.grad(lambda x: sum(jnp.sum(a**2) for a in jax.tree.leaves(of_x(x))))(arguments[1]),
            "vmap of grad": jax.vmap(of_x)(two),
            "grad of vmap": jax.grad(lambda x: jnp.sum(jax.vmap(lambda x: loss(arguments[0], x, arguments[2]))(x)))(
                two
            ),
        }

    assert_close(jax.jit(lambda: results(KERNEL))(), jax.jit(lambda: results("scan"))(), atol=2e-5, rtol=1e-4)


def test_states_and_gates_of_every_step() -> None:
    spec, arguments = _arguments(jaxrnn.GRU_CELL, bidirectional=True)
    params, x, hx = _single(arguments)
    found, expected = (jaxrnn.trajectory(spec, params, x, hx, precision="highest", engine=e) for e in (KERNEL, "scan"))
    assert_close(found.states, expected.states, atol=1e-6)
    assert_close(found.gates, expected.gates, atol=1e-6)


def test_the_default_precision_is_a_tpus() -> None:
    """Products in bfloat16, unless JAX is told otherwise."""
    spec, arguments = _arguments(jaxrnn.LSTM_CELL)
    given = _single(arguments)

    def output(engine: str) -> np.ndarray:
        return np.asarray(jaxrnn.apply(spec, *given, engine=engine)[0])

    exact = output("scan")
    assert 1e-4 < np.abs(output(KERNEL) - exact).max() < 1e-1
    with jax.default_matmul_precision("highest"):
        assert_close(output(KERNEL), exact, atol=1e-6)


def test_bfloat16() -> None:
    spec, arguments = _arguments(jaxrnn.LSTM_CELL)
    given = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arguments)

    def results(engine: str) -> Any:
        return jax.value_and_grad(_loss(spec, engine, dtype=jnp.bfloat16), (0, 1, 2))(*given)

    found = results(KERNEL)
    assert found[1][1].dtype == jnp.bfloat16
    assert_close(found, results("scan"), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("inside", [True, False])
def test_rows_are_shared_out_by_shard_map(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differentiated inside of shard_map, or outside. Pallas cannot interpret what JAX checks there, but lower it."""
    spec = jaxrnn.Spec(jaxrnn.PEEPHOLE_LSTM_CELL, F, H)
    given = _single((parameters(spec), normal(T, 8, F)))
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    rows, every = PartitionSpec(None, "rows"), PartitionSpec()

    def loss(engine: str, params: Any, x: Any) -> jax.Array:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, engine=engine, precision="highest")[0]))

    def shared_out(engine: str, check: bool) -> Any:
        def each(params: Any, x: Any) -> Any:
            if not inside:
                return jax.lax.psum(loss(engine, params, x), "rows")
            found = jax.grad(lambda *a: loss(engine, *a), (0, 1))(params, x)
            return found if check else (jax.lax.psum(found[0], "rows"), found[1])

        specs = (every, rows)
        mapped = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=specs if inside else every, check_vma=check)
        return jax.jit(mapped if inside else jax.grad(mapped, (0, 1)))

    expected = jax.grad(lambda *a: loss("scan", *a), (0, 1))(*given)
    assert_close(shared_out(KERNEL, check=False)(*given), expected, atol=1e-5)
    lowered = shared_out("pallas", check=True).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call") == 2
    monkeypatch.setitem(engines.ENGINES, "scanned", Scanned(platform=None, interpret=True))
    assert_close(shared_out("scanned", check=True)(*given), expected, atol=1e-5)


class Scanned(Pallas):
    """The kernels' own steps, run by `jax.lax.scan`."""

    def _scan(self, body: Any, run: Any, carry: Any, every: Any, results: Any, *, reverse: bool) -> tuple[Any, Any]:
        def step(carry: Any, this: Any) -> Any:
            return body(_Resident.of(run), this[0], carry, this[1])

        return jax.lax.scan(step, carry, (jnp.arange(len(run.gates[0])), every), reverse=reverse)


def _lowered(platform: str, engine: Any = "pallas", cell: jaxrnn.Cell = jaxrnn.LSTM_CELL) -> str:
    """A training step, lowered for a platform that need not be here."""
    spec, arguments = _arguments(cell)
    given = _single(arguments)
    step = jax.jit(jax.value_and_grad(_loss(spec, engine), (0, 1, 2)))
    return step.trace(*given).lower(lowering_platforms=(platform,)).as_text()


def test_a_training_step_has_two_kernels_on_a_tpu_alone() -> None:
    on_tpu = _lowered("tpu")
    assert on_tpu.count("@tpu_custom_call") == 2
    assert "stablehlo.while" not in on_tpu
    assert "custom_call" not in _lowered("cpu")


def test_a_cells_name_may_be_anything() -> None:
    lowered = _lowered("tpu", cell=dataclasses.replace(jaxrnn.LSTM_CELL, name="an LSTM, größer"))
    assert lowered.count("@tpu_custom_call") == 2


def test_no_rows() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H)
    output, _ = jaxrnn.apply(
        spec, _single(parameters(spec)), jnp.zeros((T, 0, F), jnp.float32), engine=(KERNEL, "scan")
    )
    assert output.shape == (T, 0, H)


def _sorted(gates: Any, hidden: Any, state: Any) -> Any:
    return (jnp.sort(jnp.tanh(gates[0]), axis=-1),)


def _closing(scale: Any) -> jaxrnn.Cell:
    return jaxrnn.Cell("closing", ("a",), ("h",), lambda gates, *_: (jnp.tanh(gates[0]) * scale,))


def _scaled(gates: Any, hidden: Any, state: Any, params: Any) -> Any:
    return (jnp.tanh(gates[0]) * params["scale"],)


SCALE = np.full(H, 0.5, np.float32)
SORTED = jaxrnn.Cell("sorted, in a row", ("a",), ("h",), _sorted)
SCALED = jaxrnn.Cell("scaled", ("a",), ("h",), _scaled, params={"scale": ()})
REFUSED: dict[str, tuple[jaxrnn.Cell, dict[str, Any], dict[str, Any]]] = {
    "this is float64": (jaxrnn.GRU_CELL, {}, {"dtype": jnp.float64}),
    "it runs no projection": (jaxrnn.LSTM_CELL, {"proj_size": 2}, {}),
    "it takes lengths, and no mask": (jaxrnn.GRU_CELL, {}, {"mask": normal(T, N) > 0}),
    "neither recurrent dropout": (jaxrnn.GRU_CELL, {"recurrent_dropout": 0.5}, {"dropout_key": jax.random.key(0)}),
    "nor zoneout": (jaxrnn.zoneout(jaxrnn.GRU_CELL, h=0.5), {}, {}),
    "the cell's step closes over arrays": (_closing(1), {}, {}),
    "a parameter without an axis 'hidden'": (SCALED, {}, {}),
    "sharded over mesh axes ['units']": (jaxrnn.GRU_CELL, {}, {"hidden_axis": "units"}),
    "sharded over mesh axes ['rows']": (jaxrnn.GRU_CELL, {}, {}),
    "the number of steps or rows is symbolic, or 0": (jaxrnn.GRU_CELL, {}, {}),
    "and this is 'high'": (jaxrnn.GRU_CELL, {}, {"precision": "high"}),
    "takes more than 0 MiB on the chip": (jaxrnn.GRU_CELL, {}, {}),
    "a kernel of its step cannot be made (": (SORTED, {}, {}),
    "a kernel of its step cannot be made": (_closing(SCALE), {}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_kernels_refuse_runs_by_scan(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, settings, options = REFUSED[reason]
    spec = jaxrnn.Spec(cell, F, H, **settings)
    params, x = _single((parameters(spec), normal(T, N, F)))
    axis = "units" if "units" in reason else "rows" if "rows'" in reason else None
    if "0 MiB" in reason:
        monkeypatch.setitem(engines.ENGINES, "pallas", Pallas(memory=1000))
        jax.clear_caches()

    def run(engine: Any) -> Any:
        @jax.jit
        def function(params: Any, x: Any) -> Any:
            given = dataclasses.replace(spec, cell=_closing(x[0, 0, 0])) if "closes" in reason else spec
            return jaxrnn.apply(given, params, x, engine=engine, **options)[0]

        if "symbolic" in reason:
            steps, rows = jax.export.symbolic_shape("steps, rows")
            shape = jax.ShapeDtypeStruct((steps, rows, F), x.dtype)
            return jax.export.export(function)(params, shape).call(params, x)
        if axis is None:
            return function(params, x)
        with jax.set_mesh(jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))):
            return function(params, x)

    with pytest.raises(ValueError, match=f"engine='pallas' cannot run this: .*{re.escape(reason)}"):
        run("pallas")
    assert_close(run(("pallas", "scan")), run("scan"), atol=0)
