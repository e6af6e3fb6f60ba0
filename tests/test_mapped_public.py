"""Everything public under grad(vmap) with all its optional arguments mapped: as a Python loop over the rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import linen, nnx
from making import filled

import jaxrnn

Tree = Any
ROWS = T = N = F = H = 3  # all sizes are equal, for there an axis that is taken for another raises no error
LENGTHS = np.array([[3, 1, 2], [2, 3, 0], [1, 2, 3]])
MARKS = {"lengths": LENGTHS, "mask": normal(ROWS, T, N, seed=1) > -1, "reset": normal(ROWS, T, N) > 0.5}


def _state(cell: jaxrnn.Cell, *shape: int, seed: int = 0) -> Tree:
    """A state for each row."""
    state = tuple(normal(ROWS, *shape, H, seed=seed + k) for k in range(len(cell.states)))
    return state if len(state) > 1 else state[0]


def _rows(tree: Tree) -> Tree:
    """Parameters of their own for each row."""
    return jax.tree.map(lambda a: np.stack([np.asarray(a, np.float64) * scale for scale in (1, -0.7, 0.4)]), tree)


# What is differentiated, and what is only mapped: each array with an axis for the rows first.
Mapped = tuple[Callable[[Tree, Tree], Any], Tree, Tree]


def _apply() -> Mapped:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=3, dropout=0.5, proj_size=2)
    state = (normal(ROWS, 3, N, 2), normal(ROWS, 3, N, H))
    floats = {
        "params": _rows(parameters(spec)),
        "x": normal(ROWS, T, N, F),
        "hx": state,
        "reset_state": jax.tree.map(np.cos, state),
    }
    marks = MARKS | {"dropout_masks": [normal(ROWS, T, N, 2) > 0, normal(ROWS, 1, N, 2, seed=1) > -1]}
    return lambda floats, marks: jaxrnn.apply(spec, **floats, **marks), floats, marks


def _trajectory() -> Mapped:
    _, floats, marks = _apply()
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=3, dropout=0.5, proj_size=2)
    return lambda floats, marks: jaxrnn.trajectory(spec, **floats, **marks), floats, marks


def _apply_cell() -> Mapped:
    spec = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, F, H)
    state = _state(spec.cell, N)
    floats = {
        "params": _rows(parameters(spec)),
        "x": normal(ROWS, N, F),
        "hx": state,
        "reset_state": jax.tree.map(np.cos, state),
    }
    return lambda floats, marks: jaxrnn.apply_cell(spec, **floats, **marks), floats, {"reset": MARKS["reset"][:, 0]}


def _apply_step() -> Mapped:
    spec = jaxrnn.Spec(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.3), F, H, num_layers=2, recurrent_dropout=0.5)
    floats = {
        "params": _rows(parameters(spec)),
        "x": normal(ROWS, N, F),
        "hx": (state := _state(spec.cell, 2, N)),
        "reset_state": jax.tree.map(np.cos, state),
    }
    marks = {"reset": MARKS["reset"][:, 0], "dropout_key": jax.random.split(jax.random.key(0), ROWS)}
    return lambda floats, marks: jaxrnn.apply_step(spec, **floats, **marks), floats, marks


def _layer(kind: str, **settings: Any) -> Mapped:
    """An nnx layer, with dropout from a key for each row."""
    make = functools.partial(getattr(jaxrnn, kind), **settings)
    module = filled(lambda: make(input_size=F, hidden_size=H, num_layers=2, dropout=0.5, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    state = _state(module.spec.cell, 2, N)
    floats = {
        "params": _rows(params),
        "x": normal(ROWS, T, N, F),
        "hx": state,
        "reset_state": jax.tree.map(np.cos, state),
    }

    def run(floats: Tree, marks: Tree) -> Any:
        call = nnx.merge(graph, floats.pop("params"), rest)
        return call(floats.pop("x"), **floats, **marks, deterministic=False)

    return run, floats, MARKS | {"rngs": jax.random.split(jax.random.key(0), ROWS)}


def _linen_layer(kind: str, **settings: Any) -> Mapped:
    make = functools.partial(getattr(jaxrnn.linen, kind), **settings)
    module = make(input_size=F, hidden_size=H, num_layers=2, dropout=0.5, deterministic=False)
    state = _state(module.spec.cell, 2, N)
    params = _rows(parameters(module.spec))
    floats = {"params": params, "x": normal(ROWS, T, N, F), "hx": state, "reset_state": jax.tree.map(np.cos, state)}

    def run(floats: Tree, marks: Tree) -> Any:
        return module.apply({"params": floats.pop("params")}, floats.pop("x"), **floats, **marks)

    return run, floats, MARKS | {"rng": jax.random.split(jax.random.key(0), ROWS)}


def _output_only() -> Mapped:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    layer = filled(lambda: jaxrnn.GRU(F, H, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(jaxrnn.OutputOnly(layer))
    floats = {"params": {"layer": _rows(parameters(spec))}, "x": normal(ROWS, T, N, F), "hx": _state(spec.cell, 1, N)}

    def run(floats: Tree, marks: Tree) -> Any:
        return nnx.merge(graph, nnx.State(floats["params"]))(floats["x"], floats["hx"], **marks)

    return run, floats, MARKS


def _linen_output_only() -> Mapped:
    module = jaxrnn.linen.OutputOnly(jaxrnn.linen.GRU(F, H))
    spec = module.layer.spec
    floats = {"params": {"layer": _rows(parameters(spec))}, "x": normal(ROWS, T, N, F), "hx": _state(spec.cell, 1, N)}

    def run(floats: Tree, marks: Tree) -> Any:
        return module.apply({"params": floats["params"]}, floats["x"], floats["hx"], **marks)

    return run, floats, MARKS


def _flip() -> Mapped:
    return lambda x, lengths: jaxrnn.flip_sequences(x, lengths), normal(ROWS, T, N, F), LENGTHS


def _cell(kind: str) -> Mapped:
    module = filled(lambda: getattr(jaxrnn, kind)(F, H, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(module)
    floats = {"params": _rows(params), "x": normal(ROWS, N, F), "hx": _state(module.spec.cell, N)}
    return lambda floats, _: nnx.merge(graph, floats["params"])(floats["x"], floats["hx"]), floats, {}


def _linen_cell(kind: str) -> Mapped:
    module = getattr(jaxrnn.linen, kind)(F, H)
    floats = {"params": _rows(parameters(module.spec)), "x": normal(ROWS, N, F), "hx": _state(module.spec.cell, N)}
    return lambda floats, _: module.apply({"params": floats["params"]}, floats["x"], floats["hx"]), floats, {}


def _flax_cell() -> Mapped:
    module = filled(lambda: nnx.RNN(jaxrnn.FlaxCell(jaxrnn.LSTMCell(F, H, rngs=nnx.Rngs(0))), return_carry=True))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    floats = {"params": _rows(params), "x": normal(ROWS, N, T, F), "carry": _state(jaxrnn.LSTM_CELL, N)}

    def run(floats: Tree, marks: Tree) -> Any:
        rnn = nnx.merge(graph, floats["params"], rest)
        return rnn(floats["x"], initial_carry=floats["carry"], seq_lengths=marks["lengths"])

    return run, floats, {"lengths": np.maximum(LENGTHS, 1)}


def _linen_flax_cell() -> Mapped:
    cell = jaxrnn.linen.GRUCell(F, H)
    rnn = linen.RNN(jaxrnn.linen.FlaxCell(cell), return_carry=True)
    floats = {"params": _rows(parameters(cell.spec)), "x": normal(ROWS, N, T, F), "carry": _state(jaxrnn.GRU_CELL, N)}

    def run(floats: Tree, marks: Tree) -> Any:
        variables = {"params": {"cell": {"cell": floats["params"]}}}
        return rnn.apply(variables, floats["x"], initial_carry=floats["carry"], seq_lengths=marks["lengths"])

    return run, floats, {"lengths": np.maximum(LENGTHS, 1)}


def _packing(function: Callable[[Tree], Any], *shape: int) -> Callable[[], Mapped]:
    """Of packing, the data are mapped; the integers are static."""
    return lambda: (lambda floats, _: function(floats), normal(ROWS, *shape), {})


PACKED = jaxrnn.pack_padded_sequence(np.zeros((3, 3, F)), [2, 3, 1], enforce_sorted=False)
DATA = (6, F)


def _packed_layer() -> Mapped:
    """A PackedSequence of data through a layer."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    floats = {"params": _rows(parameters(spec)), "data": normal(ROWS, *DATA), "hx": normal(ROWS, 1, N, H)}

    def run(floats: Tree, marks: Tree) -> Any:
        packed = jaxrnn.PackedSequence(floats["data"], *PACKED[1:])
        return jaxrnn.apply(spec, floats["params"], packed, floats["hx"])

    return run, floats, {}


MAPPED: dict[str, Callable[[], Mapped]] = {
    "apply": _apply,
    "trajectory": _trajectory,
    "apply_step": _apply_step,
    "apply_cell": _apply_cell,
    "RNN": lambda: _layer("RNN", nonlinearity="relu", variational_dropout=True),
    "LSTM": lambda: _layer("LSTM", remat=2, recurrent_dropout=0.3),
    "GRU": lambda: _layer("GRU", remat="gates"),
    "Recurrent": lambda: _layer("Recurrent", cell=jaxrnn.PEEPHOLE_LSTM_CELL),
    "linen.Recurrent": lambda: _linen_layer("Recurrent", cell=jaxrnn.IND_RNN_CELL),
    **{name: lambda name=name: _cell(name) for name in ("RNNCell", "LSTMCell", "GRUCell")},
    "FlaxCell": _flax_cell,
    "OutputOnly": _output_only,
    "linen.OutputOnly": _linen_output_only,
    **{f"linen.{name}": lambda name=name: _linen_layer(name) for name in ("RNN", "LSTM", "GRU")},
    **{f"linen.{name}": lambda name=name: _linen_cell(name) for name in ("RNNCell", "LSTMCell", "GRUCell")},
    "linen.FlaxCell": _linen_flax_cell,
    "flip_sequences": _flip,
    "PackedSequence": _packed_layer,
    "pack_padded_sequence": _packing(
        lambda x: jaxrnn.pack_padded_sequence(x, [2, 3, 1], enforce_sorted=False).data, T, N, F
    ),
    "pad_packed_sequence": _packing(
        lambda data: jaxrnn.pad_packed_sequence(PACKED._replace(data=data), total_length=5)[0], *DATA
    ),
    "pack_sequence": _packing(lambda x: jaxrnn.pack_sequence([x, 2 * x[:1]]).data, T, F),
    "unpack_sequence": _packing(lambda data: jaxrnn.unpack_sequence(PACKED._replace(data=data)), *DATA),
    "pad_sequence": _packing(lambda x: jaxrnn.pad_sequence([x, 2 * x[:1]], padding_side="left"), T, F),
    "unpad_sequence": _packing(lambda x: jaxrnn.unpad_sequence(x, [2, 3, 0]), T, N, F),
}
NOT_MAPPED = {
    **dict.fromkeys(("Cell", "Spec", "CellSpec"), "a value that tells what to compute, with no arrays in it"),
    **dict.fromkeys([name for name, value in vars(jaxrnn).items() if isinstance(value, jaxrnn.Cell)], "a Cell"),
    "Parameter": "axes and a function, with no arrays in it",
    "Trajectory": "what trajectory returns",
    **dict.fromkeys(
        ("load_state_dict", "state_dict", "torch_init", "from_torch", "from_flax"),
        "moves arrays between host and module",
    ),
    "checkpoint": "reads and writes files",
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_cell", "zoneout"), "makes a Cell"),
    "activations": "functions of one array, of which a Cell is made",
    "TorchGenerator": "draws NumPy's arrays, outside of what JAX traces",
    "initializers": "functions that draw parameters: test_initializers maps them",
    "CheckpointError": "an error",
    "plain_jaxprs": "a context, under which test_plain_jaxprs maps",
    "linen": "a module, whose classes are listed by themselves",
    "__version__": "a string",
}


def test_all_that_is_public_is_mapped_or_says_why_not() -> None:
    public = {*jaxrnn.__all__, *(f"linen.{name}" for name in jaxrnn.linen.__all__)}
    assert sorted([*MAPPED, *NOT_MAPPED]) == sorted(public)


# One of each kind, in either API.
QUICK = ("apply", "linen.GRU", "GRUCell", "linen.FlaxCell", "PackedSequence", "pack_padded_sequence", "unpad_sequence")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MAPPED])
def test_grad_of_vmap(name: str) -> None:
    function, floats, marks = MAPPED[name]()

    def loss(floats: Tree, marks: Tree) -> jax.Array:
        floats = dict(floats) if isinstance(floats, dict) else floats  # for functions that take it apart
        return sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(jax.tree.leaves(function(floats, marks))))

    one = jax.jit(jax.grad(loss))
    each = [one(*jax.tree.map(lambda a, k=k: a[k], (floats, marks))) for k in range(ROWS)]
    expected = jax.tree.map(lambda *a: np.stack(a), *each)
    found = jax.jit(jax.grad(lambda floats, marks: jax.vmap(loss)(floats, marks).sum()))(floats, marks)
    assert_close(found, expected)
    assert all(np.abs(a).max() > 1e-3 for a in jax.tree.leaves(expected))


def test_an_ensemble_by_nnx_vmap() -> None:
    """Modules of their own for the rows, each with its lengths."""
    module = filled(lambda: jaxrnn.LSTM(F, H, bidirectional=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(module)
    ensemble, x = nnx.merge(graph, _rows(params)), normal(ROWS, T, N, F)

    def loss(module: Any, x: Any, lengths: Any) -> jax.Array:
        return jnp.sum(jnp.sin(module(x, lengths=lengths)[0]))

    gradient = nnx.jit(nnx.grad(lambda *arguments: jnp.sum(nnx.vmap(loss)(*arguments))))
    one = jax.jit(jax.grad(lambda params, x, n: loss(nnx.merge(graph, params), x, n)))
    each = [one(jax.tree.map(lambda a, k=k: a[k], _rows(params)), x[k], LENGTHS[k]) for k in range(ROWS)]
    assert_close(gradient(ensemble, x, LENGTHS), jax.tree.map(lambda *a: np.stack(a), *each))


class Ragged(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        return jnp.sin(jaxrnn.linen.GRU(F, H, 2, name="gru")(x, lengths=lengths)[0])


@pytest.mark.parametrize("axis", [0, None])
def test_rows_by_linen_vmap(axis: int | None) -> None:
    """Parameters of their own for the rows, or the same for all; each with its lengths."""
    module = linen.vmap(Ragged, variable_axes={"params": axis}, split_rngs={"params": axis == 0})()
    params, x = parameters(jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, 2)), normal(ROWS, T, N, F)
    params = params if axis is None else _rows(params)

    def loss(module: Any, params: Tree, *arguments: Any) -> jax.Array:
        return module.apply({"params": {"gru": params}}, *arguments).sum()

    found = jax.jit(jax.grad(lambda params: loss(module, params, x, LENGTHS)))(params)
    one = jax.jit(jax.grad(lambda params, *arguments: loss(Ragged(), params, *arguments)))
    rows = [params if axis is None else jax.tree.map(lambda a, k=k: a[k], params) for k in range(ROWS)]
    each = [one(rows[k], x[k], LENGTHS[k]) for k in range(ROWS)]
    assert_close(found, jax.tree.map(lambda *a: np.sum(a, 0) if axis is None else np.stack(a), *each))
