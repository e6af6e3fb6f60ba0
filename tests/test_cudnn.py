"""The engine "cudnn", without a GPU: what it hands to cuDNN, what it makes of the results, and what it refuses.

In place of cuDNN's kernel stands JAX's reference for it. Where JAX's own function is traced, or compiled for a GPU that
is not here, only the size of cuDNN's workspace, which the GPU's library tells, is made up: so the arguments, their
shapes, layouts and the precision are checked up to the kernel's call. What the kernel computes is not.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from jax.experimental import rnn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrnn
from jaxrnn import engines
from jaxrnn.engines.cudnn import CuDNN
from parity import compilers

F, H, T, N = 3, 5, 6, 4
LENGTHS = np.array([2, 0, T, 1])
CALLED: list[str] = []


def _reference(x: Any, h_0: Any, c_0: Any, weights: Any, lengths: Any, *arguments: Any) -> tuple[jax.Array, ...]:
    """As `rnn.lstm`, but with NaN where JAX promises nothing: in the padding, and everywhere if a row has no step."""
    *sizes, dropout, bidirectional, _ = arguments
    assert {a.dtype for a in (x, h_0, c_0, weights)} == {jnp.dtype("float32")}
    assert weights.shape == (rnn.get_num_params_in_lstm(*sizes, bidirectional),)
    unpacked = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
    y, h_n, c_n = rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *sizes, dropout, bidirectional)
    taken = jnp.where(jnp.all(lengths > 0), 1, jnp.nan).astype(y.dtype)
    return jnp.where(_padding(x, lengths), jnp.nan, taken * y), taken * h_n, taken * c_n


def _padding(x: jax.Array, lengths: jax.Array) -> jax.Array:
    return (jnp.arange(x.shape[1], dtype=jnp.int32) >= lengths[:, None])[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9, 10))
def kernel(*arguments: Any) -> tuple[jax.Array, ...]:
    CALLED.append("forward")
    return _reference(*arguments)


def _forward(*arguments: Any) -> tuple[Any, Any]:
    return kernel(*arguments), arguments[:5]


def _backward(*arguments: Any) -> tuple[Any, ...]:
    *fixed, (*arrays, lengths), cotangents = arguments
    CALLED.append("backward")
    d_x, *others = jax.vjp(lambda *a: _reference(*a, lengths, *fixed), *arrays)[1](cotangents)
    padding = _padding(arrays[0], lengths)
    heeded = jnp.any(jnp.where(padding, cotangents[0] != 0, False))
    return jnp.where(padding | heeded, jnp.nan, d_x), *others, None


kernel.defvjp(_forward, _backward)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, with the stand-in."""
    monkeypatch.setattr(CuDNN, "has_gpu", lambda _: True)
    monkeypatch.setattr(rnn, "lstm", kernel)
    CALLED.clear()
    yield
    jax.clear_caches()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, with JAX's own function, which can be traced."""
    monkeypatch.setattr(CuDNN, "has_gpu", lambda _: True)
    sizes = "compute_rnn_workspace_reserve_space_sizes"
    monkeypatch.setattr(rnn.gpu_rnn, sizes, lambda *_: (16, 32), raising=False)
    yield
    jax.clear_caches()


def _spec(cell: jaxrnn.Cell = jaxrnn.LSTM_CELL, **settings: Any) -> jaxrnn.Spec:
    return jaxrnn.Spec(cell, F, H, **settings)


def _results(spec: jaxrnn.Spec, x: Any, hx: Any, engine: Any, **marks: Any) -> dict[str, Any]:
    """The outputs, the last states, and the gradients by all that is given."""

    def run(*arguments: Any) -> dict[str, Any]:
        found = named(spec, jaxrnn.apply(spec, *arguments, engine=engine, **marks))
        return found | {"output": getattr(found["output"], "data", found["output"])}

    def results(*arguments: Any) -> Any:
        found, pullback = jax.vjp(run, *arguments)
        gradients = pullback(jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), found))
        return found | dict(zip(("params", "x", "hx"), gradients, strict=True))

    found = jax.jit(results)(parameters(spec, np.float32), x, hx)
    return found | {"x": getattr(found["x"], "data", found["x"])}  # of a PackedSequence


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed).astype(np.float32)


def _packed() -> jaxrnn.PackedSequence:
    return jaxrnn.pack_sequence([_normal(n, F) for n in (2, T, 1)], enforce_sorted=False)


MASKS = [normal(T, N, 2 * H) > 0]
CASES: dict[str, tuple[dict[str, Any], Any, int | None, dict[str, Any]]] = {
    # the spec's settings, x, the rows of hx, and what else is given
    "all rows as long": ({}, _normal(T, N, F), N, {}),
    "two layers both ways, lengths, dropout": (
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        _normal(T, N, F),
        N,
        {"lengths": LENGTHS, "dropout_masks": MASKS},
    ),
    "batch first without biases": ({"bias": False, "batch_first": True}, _normal(N, T, F), N, {"lengths": LENGTHS}),
    "packed, both ways": ({"bidirectional": True}, _packed(), 3, {}),
    "unbatched": ({}, _normal(T, F), None, {}),
}


def _by_engine(name: str, engine: str) -> tuple[jaxrnn.Spec, dict[str, Any]]:
    settings, x, rows, marks = CASES[name]
    spec = _spec(**settings)
    shapes = spec.state_shapes(*() if rows is None else (rows,))
    hx = tuple(_normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return spec, _results(spec, x, hx, engine, precision="highest", **marks)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_scan_does(name: str, gpu: None) -> None:
    spec, found = _by_engine(name, "cudnn")
    assert CALLED.count("backward") == spec.num_layers
    assert_close(found, _by_engine(name, "scan")[1], atol=2e-6, rtol=1e-6)


def test_cudnn_itself_computes_what_the_scan_does() -> None:
    """For those who have a GPU: nothing is replaced."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU is here")
    for name in CASES:
        assert_close({name: _by_engine(name, "cudnn")[1]}, {name: _by_engine(name, "scan")[1]}, atol=1e-5, rtol=1e-5)


def test_states_keep_their_dtype(gpu: None) -> None:
    x, hx = _normal(T, N, F), tuple(normal(1, N, H, seed=seed) for seed in range(2))
    options = {"dtype": jnp.float32, "lengths": LENGTHS}
    found, expected = (
        jaxrnn.apply(_spec(), parameters(_spec(), np.float32), x, hx, engine=engine, **options)
        for engine in ("cudnn", "scan")
    )
    assert CALLED
    assert [a.dtype for a in jax.tree.leaves(found)] == [jnp.float32, jnp.float64, jnp.float64]
    assert_close(found, expected, atol=2e-6)


def _run(spec: jaxrnn.Spec, x: Any = None, engine: Any = "cudnn", **options: Any) -> Any:
    x = _normal(T, N, F) if x is None else x
    function = options.pop("function", jaxrnn.apply)
    return function(spec, parameters(spec, x.dtype), x, engine=engine, **options)


def _step(gates: Any, hidden: Any, state: Any) -> Any:
    return jaxrnn.LSTM_CELL.step(gates, hidden, state)


def _on_mesh(kind: AxisType) -> Any:
    hx = _normal(1, N, H), _normal(1, N, H, seed=1)
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(kind,))):
        return _run(_spec(), hx=hx)


def _on_mesh_of_units() -> Any:
    with jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))):
        return _run(_spec(), hidden_axis="d")


def _in_shard_map(check_vma: bool) -> Any:
    rows = PartitionSpec(None, "d")
    run = functools.partial(_run, _spec())
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=(rows, rows), check_vma=check_vma)(_normal(T, N, F))


def _sharded(kind: AxisType) -> Any:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    return _run(_spec(), jax.device_put(_normal(T, N, F), NamedSharding(mesh, PartitionSpec(None, "d"))))


def _with_default(precision: str) -> Any:
    with jax.default_matmul_precision(precision):
        return _run(_spec())


def _exported() -> Any:
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"{T}, b, {F}"), jnp.float32)
    return jax.export.export(jax.jit(functools.partial(_run, _spec())))(x)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another cell": (lambda: _run(_spec(jaxrnn.GRU_CELL)), "it runs LSTM_CELL, not 'GRU'"),
    "a cell of its name": (
        lambda: _run(_spec(dataclasses.replace(jaxrnn.LSTM_CELL, step=_step))),
        "it runs LSTM_CELL, not 'LSTM'",
    ),
    "projection": (lambda: _run(_spec(proj_size=2)), "it has no projection"),
    "float64": (lambda: _run(_spec(), normal(T, N, F)), "it computes in float32, not float64"),
    "bfloat16": (lambda: _run(_spec(), dtype=jnp.bfloat16), "it computes in float32, not bfloat16"),
    "resets": (lambda: _run(_spec(), reset=np.zeros((T, N), bool)), "it has no resets"),
    "a mask": (lambda: _run(_spec(), mask=np.ones((T, N), bool)), "it takes lengths, and no mask"),
    "recurrent dropout": (
        lambda: _run(_spec(recurrent_dropout=0.5), dropout_key=jax.random.key(0)),
        "it has no recurrent dropout",
    ),
    "zoneout": (lambda: _run(_spec(jaxrnn.zoneout(jaxrnn.LSTM_CELL, c=0.5))), r"not 'zoneout\(LSTM, c=0.5\)'"),
    "trajectory": (lambda: _run(_spec(), function=jaxrnn.trajectory), "it does not return the states of every step"),
    "gates recomputed": (lambda: _run(_spec(), remat="gates"), "it does not recompute, and remat is 'gates'"),
    "steps recomputed": (lambda: _run(_spec(), remat=2), "it does not recompute, and remat is 2"),
    "hidden axis": (_on_mesh_of_units, "it does not shard hidden units"),
    "a mesh": (lambda: _on_mesh(AxisType.Auto), "it runs on one device"),
    "an explicit mesh": (lambda: _on_mesh(AxisType.Explicit), "it runs on one device"),
    "sharded": (lambda: _sharded(AxisType.Auto), "it runs on one device"),
    "sharded by type": (lambda: _sharded(AxisType.Explicit), "it runs on one device"),
    "checked shard_map": (lambda: _in_shard_map(check_vma=True), r"or in jax.shard_map with check_vma=False"),
    "unknown size": (_exported, rf"it needs sizes that are known and above 0, and x has shape \({T}, b, {F}\)"),
    "no rows": (lambda: _run(_spec(), _normal(T, 0, F)), "it needs sizes that are known and above 0"),
    "an algorithm": (lambda: _run(_spec(), precision="F32_F32_F32"), "it has no precision 'F32_F32_F32'"),
    "a preset": (
        lambda: _run(_spec(), precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32),
        "it has no precision DotAlgorithmPreset.BF16_BF16_F32",
    ),
    "JAX's own setting": (lambda: _with_default("BF16_BF16_F32"), "it has no precision 'BF16_BF16_F32'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_says_why_it_refuses(name: str, gpu: None) -> None:
    call, reason = REFUSED[name]
    remedy = r"Use engine=\('cudnn', 'scan'\), which runs it by scan, or engine='auto'"
    with pytest.raises(ValueError, match=rf"engine='cudnn' cannot run this: .*{reason}.*\. {remedy}"):
        call()
    assert not CALLED


def test_it_refuses_where_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match="it needs a GPU, and JAX's default backend is 'cpu'"):
        _run(_spec())


def test_each_device_of_a_shard_map_runs_its_rows(gpu: None) -> None:
    found = _in_shard_map(check_vma=False)
    assert CALLED
    assert_close(found, _run(_spec(), engine="scan"), atol=2e-6)


def test_on_a_mesh_of_one_device_it_runs(gpu: None) -> None:
    with jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))):
        _run(_spec())
    assert CALLED


def test_where_it_refuses_the_scan_runs(gpu: None) -> None:
    reset = np.arange(T * N).reshape(T, N) % 5 == 0
    x, hx = _normal(T, N, F), (_normal(1, N, H), _normal(1, N, H, seed=1))
    found = _results(_spec(), x, hx, ("cudnn", "scan"), reset=reset)
    assert not CALLED
    assert_close(found, _results(_spec(), x, hx, "scan", reset=reset), atol=0)


def test_without_a_gpu_the_scan_runs() -> None:
    x, hx = _normal(T, N, F), (_normal(1, N, H), _normal(1, N, H, seed=1))
    found = _results(_spec(), x, hx, ("cudnn", "scan"), lengths=LENGTHS)
    assert_close(found, _results(_spec(), x, hx, "scan", lengths=LENGTHS), atol=0)


def test_engines_are_tried_in_the_order_given(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "never", Never())
    _run(_spec(), engine=("scan", "cudnn"))
    _run(_spec(), engine="auto")
    assert not CALLED
    reasons = (
        "never: it never runs; cudnn: it runs whole layers, and refused this one or comes after an engine of loops"
    )
    with pytest.raises(ValueError, match=reasons):
        _run(_spec(), engine=("never", "cudnn"))
    _run(_spec(), engine=("cudnn", "never"))
    assert CALLED == ["forward"]


class Never(engines.Scan):
    def refuses(self, run: Any) -> str | None:
        return "it never runs"


def _loss(*arguments: Any, **options: Any) -> jax.Array:
    spec = _spec(bidirectional=True)
    output, state = jaxrnn.apply(spec, *arguments, engine="cudnn", **options)
    return sum(jnp.sum(a**2) for a in (output, *state))


PRECISIONS = {None: True, "default": True, "tensorfloat32": True, "highest": False, ("high", "highest"): False}


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_it_hands_on_the_precision(precision: Any, traced: None) -> None:
    """To JAX's own function, forward and backward."""
    arguments = parameters(_spec(bidirectional=True), np.float32), _normal(T, N, F)
    step = jax.grad(functools.partial(_loss, precision=precision), (0, 1))
    allowed = PRECISIONS[precision]
    program = str(jax.make_jaxpr(step)(*arguments))
    assert [program.count(f"cudnn_allow_tf32={each}") for each in (allowed, not allowed)] == [2, 0]
    assert jax.eval_shape(step, *arguments)[1].shape == (T, N, F)


def test_it_hands_on_jaxs_own_setting(traced: None) -> None:
    arguments = parameters(_spec(bidirectional=True), np.float32), _normal(T, N, F)
    with jax.default_matmul_precision("highest"):
        assert str(jax.make_jaxpr(jax.grad(_loss))(*arguments)).count("cudnn_allow_tf32=False") == 2


def _equations(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """Every equation, with the program that it is in."""
    for equation in jaxpr.eqns:
        yield equation, jaxpr
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda a: hasattr(a, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)


def test_arrays_beside_the_kernel_are_row_major(traced: None) -> None:
    """What goes in and comes out, forward and backward, has its layout fixed. JAX's function leaves it to XLA."""
    spec = _spec(bidirectional=True)
    arguments = parameters(spec, np.float32), _normal(T, N, F), tuple(_normal(*s) for s in spec.state_shapes(N))
    program = jax.make_jaxpr(jax.grad(_loss, (0, 1, 2)))(*arguments).jaxpr
    found = {}
    for equation, around in _equations(program):
        if (name := equation.primitive.name) in ("rnn_fwd", "rnn_bwd"):
            fixed = [each for each in around.eqns if each.primitive.name == "layout_constraint"]
            assert {each.params["layout"].major_to_minor for each in fixed} == {(0, 1, 2)}
            before, after = {each.outvars[0] for each in fixed}, {each.invars[0] for each in fixed}
            found[name] = set(equation.invars[:3]) <= before, set(equation.outvars[:3]) <= after
    assert found == {"rnn_fwd": (True, True), "rnn_bwd": (True, True)}


@pytest.mark.compilers
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="no compiler for a GPU is here")
def test_compiled_for_a_gpu_they_are_row_major(traced: None, optimized: None) -> None:
    spec, sharding = _spec(num_layers=2), jax.sharding.SingleDeviceSharding(compilers.devices("h100")[0])
    described = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=sharding)
    arguments = {name: described(shape) for name, shape in spec.shapes().items()}, described((T, N, F))

    def loss(*arguments: Any) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, *arguments, engine="cudnn")[0] ** 2)

    with jax.enable_x64(False):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().as_text()
    types = dict(re.findall(r"^ *(?:ROOT )?(%[\w.-]+) = ((?:\(.*?\)|\S+) )", text, re.M))
    calls = re.findall(
        r"^ *(?:ROOT )?(%[\w.-]+) = .*? custom-call\((.*?)\), custom_call_target=\"cudnn_rnn", text, re.M
    )
    assert len(calls) == 4
    for name, operands in calls:
        beside = "".join(types[each] for each in [name, *re.findall(r"%[\w.-]+", operands)])
        assert set(re.findall(r"\{\d,\d,\d\}", beside)) == {"{2,1,0}"}


def test_a_jvp_raises_jaxs_error(gpu: None) -> None:
    arguments = parameters(_spec(bidirectional=True), np.float32), _normal(T, N, F)
    with pytest.raises(TypeError, match=r"can't apply forward-mode .* to a custom_vjp function"):
        jax.jvp(_loss, arguments, arguments)


def test_a_second_derivative_and_vmap_raise_jaxs_errors(traced: None) -> None:
    params, x = parameters(_spec(bidirectional=True), np.float32), jnp.asarray(_normal(T, N, F))
    loss = functools.partial(_loss, params)
    with pytest.raises(NotImplementedError, match="Differentiation rule for 'rnn_fwd' not implemented"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))), x)
    with pytest.raises(NotImplementedError, match="Batching rule for 'rnn_fwd' not implemented"):
        jax.eval_shape(jax.vmap(loss), x[None])
