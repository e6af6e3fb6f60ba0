"""`jaxrnn.plain_jaxprs`: programs of JAX's primitives alone, with the same results, for libraries that read jaxprs."""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx
from jax.experimental import checkify
from jax.experimental.jet import jet
from jax.extend.core import Primitive
from making import filled

import jaxrnn

Tree = Any
T, N, F, H = 5, 3, 3, 4
KEY = jax.random.key(0)
LENGTHS = np.array([5, 0, 2])
MASK, RESET = normal(T, N) > -1, normal(T, N, seed=1) > 0.5
OURS = {
    value
    for name, module in list(sys.modules.items())
    if name.startswith("jaxrnn")
    for value in vars(module).values()
    if isinstance(value, Primitive)
}


def _equations(program: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and of all jaxprs inside."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
            if hasattr(value, "eqns"):
                yield from _equations(value)


def _is_plain(function: Callable, *arguments: Tree) -> bool:
    found = list(_equations(jax.make_jaxpr(function)(*arguments)))
    ours = any(each.primitive in OURS or each.primitive.name.startswith("custom_jvp") for each in found)
    return not ours and not any(each.params.get("reverse") for each in found)


def _apply(cell: jaxrnn.Cell, settings: Tree, **arguments: Any) -> tuple[Callable, Tree]:
    spec = jaxrnn.Spec(cell, F, H, **settings)
    return lambda params, x: jaxrnn.apply(spec, params, x, **arguments), (parameters(spec), normal(T, N, F))


def _packed() -> tuple[Callable, Tree]:
    function, (params, x) = _apply(jaxrnn.GRU_CELL, {"bidirectional": True})
    return lambda params, x: function(params, jaxrnn.pack_padded_sequence(x, [5, 2, 2])), (params, x)


def _step() -> tuple[Callable, Tree]:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, proj_size=2)
    return lambda params, x: jaxrnn.apply_step(spec, params, x, reset=RESET[0]), (parameters(spec), normal(N, F))


def _cell() -> tuple[Callable, Tree]:
    spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, F, H)
    return lambda params, x: jaxrnn.apply_cell(spec, params, x), (parameters(spec), normal(N, F))


def _trajectory() -> tuple[Callable, Tree]:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, bidirectional=True)
    return lambda params, x: jaxrnn.trajectory(spec, params, x, lengths=LENGTHS), (parameters(spec), normal(T, N, F))


def _nnx() -> tuple[Callable, Tree]:
    settings = {"bidirectional": True, "param_dtype": jnp.float64}
    graph, params = nnx.split(filled(lambda: jaxrnn.LSTM(F, H, **settings, rngs=nnx.Rngs(0))))
    return lambda params, x: nnx.merge(graph, params)(x, lengths=LENGTHS), (params, normal(T, N, F))


def _linen() -> tuple[Callable, Tree]:
    module = jaxrnn.linen.GRU(F, H, batch_first=True)
    return lambda params, x: module.apply({"params": params}, x), (parameters(module.spec), normal(N, T, F))


BOTH = {"num_layers": 2, "bidirectional": True}
RANDOM = {"num_layers": 2, "dropout": 0.3, "recurrent_dropout": 0.3}
CASES: dict[str, Callable[[], tuple[Callable, Tree]]] = {
    "lengths": lambda: _apply(jaxrnn.LSTM_CELL, BOTH | {"proj_size": 2}, lengths=LENGTHS),
    "mask": lambda: _apply(jaxrnn.GRU_CELL, BOTH, mask=MASK, remat=2),
    "reset": lambda: _apply(jaxrnn.RNN_TANH, {}, reset=RESET, remat="gates"),
    "dropout": lambda: _apply(jaxrnn.GRU_CELL, RANDOM, dropout_key=KEY),
    "zoneout": lambda: _apply(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.3, c=0.2), {}, dropout_key=KEY),
    "layer norm": lambda: _apply(jaxrnn.LAYER_NORM_LSTM_CELL, {}),
    "peephole": lambda: _apply(jaxrnn.PEEPHOLE_LSTM_CELL, {}, unroll=2),
    "all steps at once": lambda: _apply(jaxrnn.MIN_GRU_CELL, BOTH, engine="associative_scan"),
    "packed": _packed,
    "step": _step,
    "cell": _cell,
    "trajectory": _trajectory,
    "nnx": _nnx,
    "linen": _linen,
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same(name: str) -> None:
    function, arguments = CASES[name]()
    assert not _is_plain(function, *arguments)  # or this test would tell nothing
    plain = jaxrnn.plain_jaxprs()(function)
    assert _is_plain(plain, *arguments)
    assert_close(jax.jit(plain)(*arguments), jax.jit(function)(*arguments), atol=1e-14)


def _loss(function: Callable) -> Callable:
    return lambda *arguments: sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(function(*arguments)))


def _quick(names: Iterable[str], quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _quick(CASES, ("dropout", "cell")))
def test_gradients_are_the_same(name: str) -> None:
    function, arguments = CASES[name]()
    gradient = jax.grad(_loss(function), (0, 1))
    plain = jaxrnn.plain_jaxprs()(gradient)
    found = list(_equations(jax.make_jaxpr(plain)(*arguments)))
    assert not any(each.primitive in OURS for each in found)
    assert_close(jax.jit(plain)(*arguments), jax.jit(gradient)(*arguments), atol=1e-13)


TRANSFORMED: dict[str, Callable[[Callable], Callable]] = {
    "vmap": jax.vmap,
    "jvp of vmap": lambda f: lambda x: jax.jvp(jax.vmap(f), (x,), (jnp.cos(x),)),
    "jit of vmap of remat": lambda f: jax.jit(jax.vmap(jax.checkpoint(f))),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_transformations(name: str) -> None:
    function, (params, _) = CASES["mask"]()
    x, transformed, plain = normal(2, T, N, F), TRANSFORMED[name], jaxrnn.plain_jaxprs()
    one = functools.partial(function, params)
    expected = jax.jit(transformed(one))(x)
    for each in plain(transformed(one)), transformed(plain(one)):
        assert _is_plain(each, x)
        assert_close(jax.jit(each)(x), expected, atol=1e-14)


def test_what_was_traced_before_is_traced_again() -> None:
    function, arguments = CASES["nnx"]()
    jitted = jax.jit(function)
    jitted(*arguments)
    assert not _is_plain(jitted, *arguments)
    with jaxrnn.plain_jaxprs():
        assert _is_plain(jitted, *arguments)
        with jax.disable_jit():
            assert _is_plain(function, *arguments)
        assert "stablehlo.reverse" in jitted.lower(*arguments).as_text()
    assert not _is_plain(jitted, *arguments)
    assert "stablehlo.reverse" not in jitted.lower(*arguments).as_text()


def test_all_steps_at_once_are_a_loop() -> None:
    """Readers of jaxprs know loops, and not all that an associative scan is made of."""
    function, arguments = CASES["all steps at once"]()
    loops = [
        {each.primitive.name for each in _equations(jax.make_jaxpr(each)(*arguments))} & {"scan"}
        for each in (function, jaxrnn.plain_jaxprs()(function))
    ]
    assert loops == [set(), {"scan"}]


def test_kernels_are_left_out() -> None:
    settings = {"dtype": jnp.float32, "precision": "highest", "engine": "pallas_interpret"}
    function, arguments = _apply(jaxrnn.LSTM_CELL, {}, **settings)
    with jaxrnn.plain_jaxprs():
        assert _is_plain(function, *arguments)
        plain = jax.jit(function)(*arguments)
    assert_close(plain, function(*arguments), atol=1e-6)


def test_cudnn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(jaxrnn.engines.ENGINES["cudnn"]), "has_gpu", lambda self: True)
    function, arguments = _apply(jaxrnn.LSTM_CELL, {}, dtype=jnp.float32, engine="cudnn")
    with jaxrnn.plain_jaxprs():
        with pytest.raises(ValueError, match="its program is no plain jaxpr"):
            function(*arguments)
        function, arguments = _apply(jaxrnn.LSTM_CELL, {}, dtype=jnp.float32, engine=("cudnn", "scan"))
        assert _is_plain(function, *arguments)


def test_it_ends_with_an_error() -> None:
    function, (params, x) = CASES["cell"]()
    with pytest.raises(RuntimeError, match="input_size"), jaxrnn.plain_jaxprs():
        function(params, x[:, :1])
    assert not _is_plain(function, params, x)


def test_symbolic_sizes() -> None:
    function, (params, x) = _apply(jaxrnn.LSTM_CELL, BOTH)
    time, rows = jax.export.symbolic_shape("time, rows")
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, **BOTH)
    function = jax.jit(lambda x, lengths: jaxrnn.apply(spec, params, x, lengths=lengths))
    with jaxrnn.plain_jaxprs():
        symbolic = jax.ShapeDtypeStruct((time, rows, F), jnp.float64), lengths
        assert _is_plain(function, *symbolic)
        exported = jax.export.export(function)(*symbolic)
    assert_close(exported.call(x, LENGTHS.astype(np.int32)), function(x, LENGTHS), atol=1e-14)


CELLS = {name: getattr(jaxrnn, name) for name in ("RNN_TANH", "LSTM_CELL", "GRU_CELL", "PEEPHOLE_LSTM_CELL")}


def _taylor(function: Callable, x: jax.Array, *terms: jax.Array) -> list[jax.Array]:
    """The value and three derivatives along a curve, by forward mode of forward mode."""
    derivatives = [lambda t: function(x + sum(t**k / math.factorial(k) * a for k, a in enumerate(terms, 1)))]
    for _ in terms:
        derivatives.append(lambda t, f=derivatives[-1]: jax.jvp(f, (t,), (1.0,))[1])
    return [each(0.0) for each in derivatives]


@pytest.mark.parametrize("name", _quick(CELLS, ("GRU_CELL",)))
def test_taylor_mode_of_a_step(name: str) -> None:
    """`jax.experimental.jet` has no rule for our primitives, and fails at any custom derivative."""
    spec = jaxrnn.Spec(CELLS[name], F, H)
    params, (x, *terms) = parameters(spec), map(jnp.asarray, normal(4, N, F))

    def step(x: jax.Array) -> jax.Array:
        return jaxrnn.apply_step(spec, params, x)[0]

    with jaxrnn.plain_jaxprs():
        value, derivatives = jet(step, (x,), (terms,))
    assert_close([value, *derivatives], _taylor(step, x, *terms), atol=1e-13)


@pytest.mark.slow
def test_taylor_mode_of_a_layer() -> None:
    """It has no rule for `jax.lax.scan` either, so the loop is Python's."""
    function, (params, _) = _apply(jaxrnn.GRU_CELL, {"bidirectional": True}, lengths=LENGTHS)
    x, *terms = map(jnp.asarray, normal(4, T, N, F))
    with jaxrnn.plain_jaxprs(), jax.disable_jit():
        value, derivatives = jet(lambda x: function(params, x)[0], (x,), (terms,))
    assert_close([value, *derivatives], _taylor(lambda x: function(params, x)[0], x, *terms), atol=1e-13)


def test_checks_inside_a_layer() -> None:
    """`checkify` sees what happens in a layer, and a cell's own checks."""

    def step(gates: Any, hidden: Any, state: Any) -> Any:
        checkify.check(~jnp.any(gates[0] > 100), "too large")
        return (gates[0],)

    function, (params, x) = _apply(jaxrnn.Cell("own", ("a",), ("h",), step), {})
    errors = checkify.user_checks | checkify.nan_checks
    checked = jaxrnn.plain_jaxprs()(checkify.checkify(jax.jit(function), errors=errors))
    assert checked(params, x)[0].get() is None
    assert "too large" in checked(params, 1000 * x)[0].get()
    assert "nan generated" in checked(params | {"bias_ih_l0": np.full(H, np.nan)}, x)[0].get()
