"""Weights in other libraries' layouts: each library's own code computes in float64 what we compute, both ways."""

import dataclasses
import importlib
import os
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxrnn
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError, load, save
from jaxrnn.checkpoint.dialects import DIALECTS, Dialect, Weights, from_flat, to_flat

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")
F, H, T, N = 3, 4, 5, 2
CELLS = {"LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL, "RNN": jaxrnn.RNN_TANH}
X = normal(N, T, F)


def _library(name: str) -> types.ModuleType:
    os.environ["KERAS_BACKEND"] = "jax"
    return pytest.importorskip({"haiku": "haiku", "keras": "keras", "equinox": "equinox"}[name])


def _weights(kind: str) -> Weights:
    return {name.removesuffix("_l0"): a for name, a in parameters(jaxrnn.Spec(CELLS[kind], F, H)).items()}


def _ours(kind: str, weights: Weights, nonlinearity: str = "tanh") -> np.ndarray:
    cell = jaxrnn.RNN_RELU if nonlinearity == "relu" else CELLS[kind]
    spec = jaxrnn.Spec(cell, F, H, batch_first=True)
    return np.asarray(jaxrnn.apply(spec, {f"{role}_l0": a for role, a in weights.items()}, X)[0])


def _run_linen(cell: str, arrays: Weights) -> Any:
    params = unflatten_dict({tuple(name.split(".")): a for name, a in arrays.items()})
    return linen.RNN(getattr(linen, cell)(H, param_dtype=jnp.float64)).apply({"params": {"cell": params}}, X)


def _run_nnx(cell: str, arrays: Weights) -> Any:
    rnn = nnx.RNN(getattr(nnx, cell)(F, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    flat = {("cell", *name.split(".")): a for name, a in arrays.items()}
    state = nnx.state(rnn, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(flat[path])
    nnx.update(rnn, state)
    return rnn(X)


def _run_keras(cell: str, arrays: Weights) -> Any:
    keras = _library("keras")
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    try:
        # Keras rounds its own tanh to float32.
        functions = {"activation": jnp.tanh} | ({} if cell == "SimpleRNN" else {"recurrent_activation": jax.nn.sigmoid})
        layer = getattr(keras.layers, cell)(H, return_sequences=True, **functions)
        layer.build(X.shape)
        layer.set_weights([arrays[name] for name in ("kernel", "recurrent_kernel", "bias")])
        return layer(jnp.asarray(X))
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_floatx("float32")


def _run_haiku(cell: str, arrays: Weights) -> Any:
    hk = _library("haiku")

    def run(x: Any) -> Any:
        core = getattr(hk, cell)(H, name="cell")
        return hk.dynamic_unroll(core, x, core.initial_state(N), time_major=False)[0]

    params: dict = {}
    for name, array in arrays.items():
        layer, leaf = name.split(".")
        params.setdefault(f"cell/{layer}", {})[leaf] = jnp.asarray(array)
    return hk.transform(run).apply(params, None, X)


def _run_equinox(cell: str, arrays: Weights) -> Any:
    eqx = _library("equinox")
    made = getattr(eqx.nn, cell)(F, H, dtype=jnp.float64, key=jax.random.key(0))
    names = list(arrays)
    made = eqx.tree_at(lambda c: [getattr(c, name) for name in names], made, [jnp.asarray(arrays[n]) for n in names])
    zero = jnp.zeros(H)
    first = (zero, zero) if cell == "LSTMCell" else zero

    def body(state: Any, x: Any) -> Any:
        state = made(x, state)
        return state, state[0] if cell == "LSTMCell" else state

    return jax.vmap(lambda x: jax.lax.scan(body, first, x)[1])(X)


def _run_onnx(cell: str, arrays: Weights) -> Any:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    more = {"linear_before_reset": 1} if cell == "GRU" else {}
    node = onnx.helper.make_node(cell, ["X", "W", "R", "B"], ["Y"], hidden_size=H, **more)
    inputs = {"X": X.swapaxes(0, 1)} | {name: array[None] for name, array in arrays.items()}
    described = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in [*inputs, "Y"]]
    graph = onnx.helper.make_graph([node], "one", described[:-1], described[-1:])
    [y] = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, inputs)
    return y[:, 0].swapaxes(0, 1)


RUN = {
    "onnx": _run_onnx,
    "flax.linen": _run_linen,
    "flax.nnx": _run_nnx,
    "keras": _run_keras,
    "haiku": _run_haiku,
    "equinox": _run_equinox,
}


@pytest.mark.libraries
@pytest.mark.parametrize(("library", "name"), DIALECTS)
@pytest.mark.filterwarnings("ignore")
def test_a_library_computes_what_we_do_from_the_same_weights(library: str, name: str) -> None:
    dialect = DIALECTS[library, name]
    weights = _weights(dialect.kind)
    if (library, name) == ("flax.nnx", "GRUCell"):  # which has no b_hn
        worst = np.abs(weights["bias_hh"][-H:]).max()
        with pytest.raises(CheckpointError, match=f"for the gate n: numbers up to {worst:.3g} would be lost"):
            dialect.write(weights)
        weights["bias_hh"][-H:] = 0
    with jax.numpy_dtype_promotion("standard"):
        theirs = np.asarray(RUN[library](name, dialect.write(weights)))
    assert theirs.dtype == np.float64
    assert_close(_ours(dialect.kind, weights, dialect.nonlinearities[0]), theirs)


@pytest.mark.parametrize(("library", "name"), DIALECTS)
def test_there_and_back(library: str, name: str) -> None:
    """The same function: weights bit for bit, biases at most added up. A second round changes no bit."""
    dialect = DIALECTS[library, name]
    weights = _weights(dialect.kind)
    if (library, name) == ("flax.nnx", "GRUCell"):
        weights["bias_hh"][-H:] = 0
    back = dialect.read(dialect.write(weights))
    for role in ("weight_ih", "weight_hh"):
        assert_close(back[role], weights[role], atol=0)
    nonlinearity = dialect.nonlinearities[0]
    assert_close(_ours(dialect.kind, back, nonlinearity), _ours(dialect.kind, weights, nonlinearity), atol=1e-14)
    if not dialect.added:
        assert_close(dialect.read(dialect.write(back)), back, atol=0)
    without = {role: a for role, a in weights.items() if role.startswith("weight")}
    zeros = {role: np.zeros_like(a) for role, a in weights.items() if role.startswith("bias")}
    written = dialect.write(without)
    assert_close(written, dialect.write(without | zeros), atol=0)
    if not dialect.added:  # of a layer without biases
        biases = {entry.name for entry in dialect.entries if entry.bias}
        assert_close(dialect.read({name: a for name, a in written.items() if name not in biases}), without, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_a_library_adds_is_not_rounded_into_a_bias(dtype: str) -> None:
    arrays = {"linear.w": normal(F + H, 4 * H).astype(dtype), "linear.b": (normal(4 * H) / 100).astype(dtype)}
    weights = DIALECTS["haiku", "LSTM"].read(arrays)
    assert {array.dtype.name for array in weights.values()} == {dtype}
    assert np.sort(weights["bias_ih"]).tobytes() == np.sort(arrays["linear.b"]).tobytes()
    assert weights["bias_hh"].tolist() == [0.0] * H + [1.0] * H + [0.0] * 2 * H
    back = DIALECTS["haiku", "LSTM"].write(weights)
    assert {name: array.tobytes() for name, array in back.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_what_does_not_fit_is_refused() -> None:
    keras = DIALECTS["keras", "LSTM"]
    arrays = keras.write(_weights("LSTM"))
    with pytest.raises(CheckpointError, match=r"LSTM should have recurrent_kernel, .*\nthe arrays given: kernel, bias"):
        keras.read({name: a for name, a in arrays.items() if name != "recurrent_kernel"})
    with pytest.raises(CheckpointError, match=r"LSTM is \(3, 15\), which does not fit hidden_size=4"):
        keras.read(arrays | {"kernel": arrays["kernel"][:, :15]})
    with pytest.raises(CheckpointError, match=r"recurrent_kernel of .* is \(5, 16\), which does not fit"):
        keras.read(arrays | {"recurrent_kernel": np.ones((5, 16))})
    with pytest.raises(CheckpointError, match=r"bias of .* is \(2, 8\), which does not fit"):
        keras.read(arrays | {"bias": np.ones((2, 8))})
    with pytest.raises(CheckpointError, match=r"LSTM has no weight_hr"):
        keras.write(_weights("LSTM") | {"weight_hr": np.ones((2, 4))})
    with pytest.raises(CheckpointError, match=r"LSTM needs weight_hh\ngive the weights of one layer by role"):
        keras.write({"weight_ih": _weights("LSTM")["weight_ih"]})
    with pytest.raises(CheckpointError, match=r"weight_ih is \(12, 3\), which does not fit weight_hh of \(16, 4\)\n"):
        keras.write(_weights("LSTM") | {"weight_ih": np.ones((12, 3))})


NNX = {
    "LSTM": lambda rngs: nnx.RNN(nnx.LSTMCell(F, H, rngs=rngs)),
    "optimized, time-major": lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(F, H, rngs=rngs), time_major=True),
    "relu": lambda rngs: nnx.RNN(nnx.SimpleCell(F, H, activation_fn=nnx.relu, rngs=rngs)),
    "both ways": lambda rngs: nnx.Bidirectional(
        nnx.RNN(nnx.GRUCell(F, H, rngs=rngs)), nnx.RNN(nnx.GRUCell(F, H, rngs=rngs))
    ),
}


LINEN = {
    "LSTM": lambda: linen.RNN(linen.LSTMCell(H)),
    "GRU, time-major": lambda: linen.RNN(linen.GRUCell(H), time_major=True),
    "both ways": lambda: linen.Bidirectional(*(linen.RNN(linen.OptimizedLSTMCell(H)) for _ in range(2))),
    "RNN": lambda: linen.RNN(linen.SimpleCell(H)),
}


def _linen_variables(theirs: Any, x: Any) -> Any:
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), x)
    return jax.tree.map(lambda a: jnp.asarray(normal(*a.shape), jnp.float32), shapes)


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_module_as_ours(name: str) -> None:
    theirs, x = NNX[name](nnx.Rngs(0)), jnp.asarray(X, jnp.float32)
    params = nnx.state(theirs, nnx.Param)
    nnx.update(theirs, jax.tree.map(lambda a: jnp.asarray(normal(*a.shape), jnp.float32), params))
    ours = jaxrnn.from_flax(theirs)
    assert_close(ours(x)[0], theirs(x), atol=1e-5)
    assert ours.batch_first == ("time-major" not in name)


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_module_as_ours(name: str) -> None:
    theirs, x = LINEN[name](), jnp.asarray(X, jnp.float32)
    ours, converted = jaxrnn.from_flax(theirs, variables := _linen_variables(theirs, x))
    assert_close(ours.apply(converted, x)[0], theirs.apply(variables, x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* are read as a Bidirectional, whose second runs backward")
def test_weights_alone_as_ours() -> None:
    x = jnp.asarray(X, jnp.float32)
    theirs = LINEN["both ways"]()
    variables = _linen_variables(theirs, x)
    for weights in (variables, variables["params"], flatten_dict(variables["params"], sep=".")):
        ours, converted = jaxrnn.from_flax(weights, batch_first=True)
        assert ours.bidirectional
        assert_close(ours.apply(converted, x)[0], theirs.apply(variables, x), atol=1e-5)
    for make, name in ((NNX["optimized, time-major"], "LSTM"), (NNX["relu"], "RNN"), (NNX["both ways"], "GRU")):
        module = make(nnx.Rngs(0))
        ours = jaxrnn.from_flax(nnx.state(module), batch_first=True)
        assert_close(jaxrnn.state_dict(ours), jaxrnn.state_dict(jaxrnn.from_flax(module)), atol=0)
        assert type(ours).__name__ == name
    two = {"a": variables["params"], "b": variables["params"]}
    with pytest.raises(CheckpointError, match=r"and hold the cells 'a\.', 'b\.'"):
        jaxrnn.from_flax(two)
    with pytest.raises(CheckpointError, match=r"hold no cell; the names are kernel"):
        jaxrnn.from_flax({"kernel": np.ones((2, 2))})


def test_the_command_line_finds_flaxs_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: a.astype("f4") for name, a in DIALECTS["flax.linen", "GRUCell"].write(_weights("GRU")).items()}
    tree = {f"params.encoder.cell.{name}": a for name, a in weights.items()} | {"params.head.kernel": np.ones((4, 2))}
    save(tmp_path / "flax.orbax", tree)
    save(tmp_path / "flax.safetensors", tree)
    for name in ("flax.orbax", "flax.safetensors"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert "encoder. GRU      3      4" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "flax.orbax"), str(tmp_path / "a.pt"), "--only-rnn"]) == 0
    assert_close(load(tmp_path / "a.pt")["encoder.weight_hh_l0"], _weights("GRU")["weight_hh"].astype("f4"), atol=0)
    assert main(["convert", str(tmp_path / "flax.orbax"), str(tmp_path / "b.pt")]) == 0
    assert load(tmp_path / "b.pt").keys() == {"head.kernel", *load(tmp_path / "a.pt")}


def test_the_command_line_says_what_it_takes_for_a_bidirectional(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = {name: a.astype("f4") for name, a in DIALECTS["flax.nnx", "GRUCell"].write(_weights("GRU") | NO_N).items()}
    tree = {f"enc.{way}_rnn.cell.{name}": a for way in ("forward", "backward") for name, a in cell.items()}
    save(tmp_path / "flax.safetensors", tree)
    for command in (["inspect"], ["check"]):
        main([*command, str(tmp_path / "flax.safetensors")])
        assert "enc.forward_rnn and enc.backward_rnn are read as a Bidirectional, whose" in capsys.readouterr().err


NO_N = {"bias_hh": np.zeros(3 * H)}


def test_cells_and_what_is_refused() -> None:
    cell = nnx.GRUCell(F, H, rngs=nnx.Rngs(0))
    x, h = jnp.asarray(X[:, 0], jnp.float32), jnp.ones((N, H), jnp.float32)
    assert_close(jaxrnn.from_flax(cell)(x, h), cell(h, x)[1], atol=1e-6)
    with pytest.raises(TypeError, match="got MGUCell"):
        jaxrnn.from_flax(linen.MGUCell(H), {"params": {}})
    with pytest.raises(TypeError, match="variables should be what the Linen module's init returned"):
        jaxrnn.from_flax(linen.RNN(linen.LSTMCell(H)))
    sine = nnx.RNN(nnx.LSTMCell(F, H, activation_fn=jnp.sin, rngs=nnx.Rngs(0)))
    assert_close(jaxrnn.from_flax(sine)(x[:, None])[0], sine(x[:, None]), atol=1e-6)
    with pytest.raises(CheckpointError, match="residual=True"):
        jaxrnn.from_flax(nnx.RNN(nnx.SimpleCell(F, H, residual=True, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError, match="reverse=True"):
        jaxrnn.from_flax(nnx.RNN(cell, reverse=True))
    with pytest.raises(CheckpointError, match="another merge_fn"):
        jaxrnn.from_flax(nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(cell), merge_fn=lambda a, b: a + b))


def test_around_all_libraries_and_back() -> None:
    """torch to Flax to Keras to Equinox to torch: weights bit for bit, biases within one rounding of their sum."""
    paths = {
        "LSTM": ["flax.nnx LSTMCell", "keras LSTM", "equinox LSTMCell", "flax.linen OptimizedLSTMCell"],
        "GRU": ["flax.linen GRUCell", "keras GRU", "equinox GRUCell"],
    }
    for kind, path in paths.items():
        weights = start = _weights(kind)
        for each in path:
            library, name = each.split()
            weights = DIALECTS[library, name].read(DIALECTS[library, name].write(weights))
        for role in ("weight_ih", "weight_hh"):
            assert_close(weights[role], start[role], atol=0)
        assert_close(weights["bias_ih"] + weights["bias_hh"], start["bias_ih"] + start["bias_hh"], rtol=2**-52, atol=0)
        assert_close(_ours(kind, weights), _ours(kind, start), atol=1e-15)


@pytest.mark.parametrize("bias", [True, False])
def test_cudnns_flat_weights(bias: bool) -> None:
    """As jax.experimental.rnn's reference, which is float64 here, takes them."""
    from jax.experimental import rnn

    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, 2, bias=bias, bidirectional=True, batch_first=True)
    params = parameters(spec)
    flat = to_flat(spec, params)
    unpacked = rnn.unpack_lstm_weights(jnp.asarray(flat), F, H, 2, True)
    h_0, c_0 = normal(4, N, H), normal(4, N, H, seed=1)
    lengths = np.array([T, T - 2], np.int32)
    with jax.numpy_dtype_promotion("standard"):
        theirs = rnn.lstm_ref(jnp.asarray(X), h_0, c_0, *unpacked, seq_lengths=lengths, **_LSTM_REF)
    ours = jaxrnn.apply(spec, params, X, (h_0, c_0), lengths=lengths)
    assert_close([ours[0], *ours[1]], theirs)
    assert_close(from_flat(spec, flat), params, atol=0)
    traced = jax.eval_shape(lambda p: from_flat(spec, to_flat(spec, p)) if bias else to_flat(spec, p), params)
    assert jax.tree.leaves(traced)[0].dtype == jnp.float64


_LSTM_REF = {"input_size": F, "hidden_size": H, "num_layers": 2, "dropout": 0.0, "bidirectional": True}


def test_flat_weights_that_do_not_fit() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    flat = to_flat(spec, parameters(spec))
    with pytest.raises(CheckpointError, match=rf"flat is of shape \({flat.size - 1},\), should be \({flat.size},\)"):
        from_flat(spec, flat[1:])
    without = dataclasses.replace(spec, bias=False)
    with pytest.raises(CheckpointError, match=rf"biases up to {np.abs(flat[-24:]).max():.3g}, which bias=False"):
        from_flat(without, flat)
    assert_close(from_flat(without, flat[:-24])["weight_hh_l0"], flat[36:84].reshape(12, 4), atol=0)
    with pytest.raises(CheckpointError, match="no place for proj_size"):
        to_flat(jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=2), {})


def test_every_library_is_in_the_table() -> None:
    assert {library for library, _ in DIALECTS} == RUN.keys()
    assert importlib.import_module("jaxrnn.checkpoint").dialects.DIALECTS is DIALECTS


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.title)
def test_a_dialect_knows_arrays_that_fit(dialect: Dialect) -> None:
    arrays = dialect.write(_weights(dialect.kind) | (NO_N if dialect.kind == "GRU" else {}))
    assert dialect.fits(arrays)
    assert not dialect.fits({name: a[:, :-1] if a.ndim == 2 else a for name, a in arrays.items()})
