"""Exported by jax.export, to bytes, and called where neither jaxrnn nor Flax is: the same results and gradients."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import nnx
from making import filled, filled_variables

import jaxrnn

F, H = 3, 4
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 2e-6  # of the largest number, in float32: another program than here, which may sum in another order
# What the other process runs. It sees the file of the export and arrays, and leaves arrays.
PROGRAM = """
import sys
from pathlib import Path
import jax.export
import numpy as np

exported = jax.export.deserialize(bytearray(Path("exported").read_bytes()))
given = dict(np.load("given.npz"))
results = {}
%s
np.savez("results.npz", **results)
loaded = {name.partition(".")[0] for name in sys.modules}
assert "jax" in loaded
assert not loaded & {"jaxrnn", "flax", "optax", "orbax", "torch"}, loaded
"""
CALLS = """
for call in sorted({name.partition("/")[0] for name in given}):
    leaves = [given[f"{call}/{i}"] for i in range(exported.in_tree.num_leaves)]
    args, kwargs = jax.tree.unflatten(exported.in_tree, leaves)
    output = jax.tree.leaves(exported.call(*args, **kwargs))
    results |= {f"{call}/{i}": value for i, value in enumerate(output)}
    if exported.has_vjp():
        gradients = exported.vjp().call(*leaves, *(np.cos(value) for value in output))
        floating = [a for a in gradients if np.issubdtype(a.dtype, np.floating)]  # not of lengths
        results |= {f"{call}/gradient/{i}": value for i, value in enumerate(floating)}
"""
STREAM = """
params = [given[f"param/{i}"] for i in range(sum(name.startswith("param/") for name in given))]
count = exported.in_tree.num_leaves - len(params) - 1  # arrays of state
for call in sorted({name.partition("/")[0] for name in given} - {"param"}):
    state = [given[f"{call}/state/{i}"] for i in range(count)]
    outputs = []
    for x in given[f"{call}/x"]:
        args, kwargs = jax.tree.unflatten(exported.in_tree, [*params, x, *state])
        output, *state = jax.tree.leaves(exported.call(*args, **kwargs))
        outputs.append(output)
    results[f"{call}/output"] = np.stack(outputs)
    results |= {f"{call}/state/{i}": value for i, value in enumerate(state)}
"""

Tree = Any


@pytest.fixture(autouse=True)
def as_elsewhere() -> Iterator[None]:
    """Float32 alone, as in the other process: dropout, too, draws other numbers in float64."""
    with jax.enable_x64(False):
        yield


def _elsewhere(
    folder: Path, program: str, exported: jax.export.Exported, given: dict[str, Any], vjp_order: int = 0
) -> dict[str, np.ndarray]:
    """Run the program in another process, in which there is no more of this one than two files."""
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers, which is not installed")
    (folder / "exported").write_bytes(exported.serialize(vjp_order=vjp_order))
    np.savez(folder / "given.npz", allow_pickle=False, **given)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM % program], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "results.npz"))


def _export(function: Callable, *arguments: Tree) -> jax.export.Exported:
    """For arguments of these shapes."""
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*_shapes(arguments))
    # By default nothing that the promise of jax.export does not cover gets through; what does is no kernel.
    assert exported.platforms == PLATFORMS
    assert not exported.disabled_safety_checks
    assert set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) <= {"shape_assertion"}
    return exported


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _pure(module: nnx.Module) -> tuple[dict[str, jax.Array], Callable[[dict[str, jax.Array]], nnx.Module]]:
    """A module's parameters as a plain dict, for jax.export writes no nnx.State; and the module with others."""
    graph, state = nnx.split(module)

    def with_params(params: dict[str, jax.Array]) -> nnx.Module:
        filled = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)

    return nnx.to_pure_dict(state), with_params


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def _check(found: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    """Compare what the other process returned under these names."""
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert np.isfinite(value).all(), name
        assert_close({name: found[name]}, {name: value}, atol=TOLERANCE * max(1, np.abs(value).max()))


def _leaves(prefix: str, tree: Tree) -> dict[str, Any]:
    return {f"{prefix}/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _given(calls: dict[str, Tree]) -> dict[str, Any]:
    """The arguments of each call, by the names that the other process reads."""
    return {name: leaf for call, arguments in calls.items() for name, leaf in _leaves(call, arguments).items()}


def _cell_step(module: nnx.Module, x: jax.Array, *state: jax.Array) -> tuple[jax.Array, ...]:
    after = jax.tree.leaves(module(x, state if len(state) > 1 else state[0]))
    return after[0], *after


def _layer_step(module: nnx.Module, x: jax.Array, *state: jax.Array) -> tuple[jax.Array, ...]:
    output, after = module(x[None], state if len(state) > 1 else state[0])
    return output[0], *jax.tree.leaves(after)


STREAMS: dict[str, tuple[Callable, dict[str, Any], Callable]] = {
    "LSTMCell": (jaxrnn.LSTMCell, {}, _cell_step),
    "RNNCell": (jaxrnn.RNNCell, {"nonlinearity": "relu"}, _cell_step),
    "LSTM": (jaxrnn.LSTM, {"num_layers": 2, "proj_size": 2}, _layer_step),
    "GRU": (jaxrnn.GRU, {"num_layers": 2}, _layer_step),
}


def _first_state(module: nnx.Module, seed: int, batch: int) -> list[jax.Array]:
    spec = module.spec
    if isinstance(spec, jaxrnn.CellSpec):
        return [_random(seed + i, batch, H) for i in range(len(spec.cell.states))]
    return [_random(seed + i, spec.num_layers, batch, size) for i, size in enumerate(spec.state_sizes())]


@pytest.mark.parametrize(
    ("name", "params_are"),
    [
        ("LSTMCell", "arguments"),
        *(pytest.param(name, "constants", marks=pytest.mark.slow) for name in STREAMS if name != "LSTMCell"),
    ],
)
def test_a_step_of_a_stream(tmp_path: Path, name: str, params_are: str) -> None:
    make, settings, step = STREAMS[name]
    module = filled(lambda: make(F, H, **settings, rngs=nnx.Rngs(0)))
    params, with_params = _pure(module)
    (batch,) = jax.export.symbolic_shape("batch")

    def symbolic(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*array.shape[:-2], batch, array.shape[-1]), array.dtype)

    arguments = [symbolic(a) for a in (_random(0, 1, F), *_first_state(module, 1, 1))]
    given = {}
    if params_are == "constants":
        exported = _export(lambda *arguments: step(module, *arguments), *arguments)
    else:
        exported = _export(lambda params, *arguments: step(with_params(params), *arguments), params, *arguments)
        given = _leaves("param", params)
    batches = (1, 5)
    for size in batches:
        given[f"{size}/x"] = _random(size, 6, size, F)
        given |= _leaves(f"{size}/state", _first_state(module, size, size))
    found = _elsewhere(tmp_path, STREAM, exported, given)
    for size in batches:
        outputs, state = [], _first_state(module, size, size)
        for x in given[f"{size}/x"]:
            output, *state = step(module, x, *state)
            outputs.append(output)
        if name == "LSTM":  # the stream is the whole sequence
            whole, _ = module(given[f"{size}/x"], tuple(_first_state(module, size, size)))
            _check({"output": np.stack(outputs)}, {"output": whole})
        _check(found, {f"{size}/output": np.stack(outputs)} | _leaves(f"{size}/state", state))


def test_a_cell_starts_from_zeros_for_any_batch() -> None:
    cell = filled(lambda: jaxrnn.LSTMCell(F, H, rngs=nnx.Rngs(0)))
    (batch,) = jax.export.symbolic_shape("batch")
    exported = _export(cell, jax.ShapeDtypeStruct((batch, F), jnp.float32))
    x = _random(0, 5, F)
    _check(_leaves("call", exported.call(x)), _leaves("call", cell(x)))


def _ragged(time: int, batch: int, batch_first: bool = False) -> tuple[jax.Array, jax.Array]:
    """Rows of lengths from 0 to time, with NaN past their ends."""
    lengths = np.linspace(time, 0, batch).astype(np.int32)
    x = np.array(_random(time + batch, time, batch, F))
    x[np.arange(time)[:, None] >= lengths] = np.nan
    return jnp.asarray(x.swapaxes(0, 1) if batch_first else x), jnp.asarray(lengths)


BOTH = "time, batch"
# The module and its settings, which sizes are symbols, and the (time, batch) of each call.
RAGGED: dict[str, tuple[Callable, dict[str, Any], str, list[tuple[int, int]]]] = {
    "LSTM, batch": (jaxrnn.LSTM, {"proj_size": 2, "remat": "gates"}, "7, batch", [(7, 2), (7, 5)]),
    "LSTM, time": (jaxrnn.LSTM, {"batch_first": True}, "time, 3", [(9, 3)]),
    "GRU, both": (jaxrnn.GRU, {}, BOTH, [(9, 5)]),
    "GRU, batch, steps made again": (jaxrnn.GRU, {"remat": 3}, "7, batch", [(7, 4)]),
    "RNN, both, steps made again": (jaxrnn.RNN, {"num_layers": 2, "remat": 3}, BOTH, [(7, 4)]),
}


@pytest.mark.parametrize(
    "name", [name if name == "GRU, both" else pytest.param(name, marks=pytest.mark.slow) for name in RAGGED]
)
def test_a_ragged_batch(tmp_path: Path, name: str) -> None:
    make, settings, shape, sizes = RAGGED[name]
    module = filled(lambda: make(F, H, bidirectional=True, **settings, rngs=nnx.Rngs(0)))
    params, with_params = _pure(module)
    time, batch = jax.export.symbolic_shape(shape)
    batch_first = module.batch_first

    def run(params: dict[str, jax.Array], x: jax.Array, lengths: jax.Array) -> Tree:
        return with_params(params)(x, lengths=lengths)

    x_shape = (batch, time, F) if batch_first else (time, batch, F)
    symbols = jax.ShapeDtypeStruct(x_shape, jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = _export(run, params, *symbols)
    calls = {f"{t}x{n}": (params, *_ragged(t, n, batch_first)) for t, n in sizes}
    found = _elsewhere(tmp_path, CALLS, exported, _given(calls), vjp_order=1)
    for call, (_, x, lengths) in calls.items():
        results = module(x, lengths=lengths)

        @jax.jit
        def gradient(params: dict[str, jax.Array], x: jax.Array, lengths: jax.Array, cotangents: Tree) -> Tree:
            _, pull = jax.vjp(lambda params, x: run(params, x, lengths), params, x)
            return pull(cotangents)

        gradients = gradient(params, x, lengths, jax.tree.map(jnp.cos, results))
        assert all(np.abs(value).max() > 0.01 for value in jax.tree.leaves(gradients))  # x and each parameter have one
        _check(found, _leaves(call, results) | _leaves(f"{call}/gradient", gradients))


@pytest.mark.slow
def test_resets_and_dropout_are_arguments(tmp_path: Path) -> None:
    module = jaxrnn.GRU(F, H, num_layers=2, dropout=0.5, rngs=nnx.Rngs(0))
    time, batch = jax.export.symbolic_shape("time, batch")

    def run(x: jax.Array, reset: jax.Array, key: jax.Array) -> Tree:
        return module(x, reset=reset, rngs=jax.random.wrap_key_data(key))

    def arguments(time: Any, batch: Any) -> list[jax.ShapeDtypeStruct]:
        shapes = [((time, batch, F), jnp.float32), ((time, batch), bool), ((2,), jnp.uint32)]
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    exported = _export(run, *arguments(time, batch))
    calls = {}
    for t, n in ((1, 2), (8, 3)):
        calls[f"{t}x{n}"] = (
            _random(t, t, n, F),
            np.arange(t * n).reshape(t, n) % 5 == 2,
            jnp.array([t, n], jnp.uint32),
        )
    found = _elsewhere(tmp_path, CALLS, exported, _given(calls))
    for call, leaves in calls.items():
        _check(found, _leaves(call, run(*leaves)))


@pytest.mark.slow
def test_linen(tmp_path: Path) -> None:
    module = jaxrnn.linen.LSTM(F, H, bidirectional=True)
    x, lengths = _ragged(5, 4)
    variables = filled_variables(module, x)
    time, batch = jax.export.symbolic_shape("time, batch")
    exported = _export(
        lambda variables, x, lengths: module.apply(variables, x, lengths=lengths),
        variables,
        jax.ShapeDtypeStruct((time, batch, F), x.dtype),
        jax.ShapeDtypeStruct((batch,), lengths.dtype),
    )
    found = _elsewhere(tmp_path, CALLS, exported, _given({"call": (variables, x, lengths)}))
    _check(found, _leaves("call", module.apply(variables, x, lengths=lengths)))


def test_sizes_that_do_not_fit_are_named() -> None:
    lstm = filled(lambda: jaxrnn.LSTM(F, H, rngs=nnx.Rngs(0)))
    batch, other = jax.export.symbolic_shape("batch, other")
    x = jax.ShapeDtypeStruct((7, batch, F), jnp.float32)
    with pytest.raises(
        RuntimeError, match=r"lengths should have shape \(batch,\), one for each row of x, got \(other,"
    ):
        _export(lambda x, lengths: lstm(x, lengths=lengths), x, jax.ShapeDtypeStruct((other,), jnp.int32))
    h_0 = jax.ShapeDtypeStruct((1, other, H), jnp.float32)
    with pytest.raises(RuntimeError, match=r"h_0 of hx should have shape \(1, batch, 4\), got \(1, other, 4\)"):
        _export(lambda x, h_0: lstm(x, (h_0, h_0)), x, h_0)
