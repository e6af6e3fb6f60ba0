"""All steps at once, for cells that are linear in their state: as the loop over time, and refused for other cells."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrnn
from jaxrnn.engines.scan import Form, Scan

F, H, T, N = 3, 5, 9, 4


def _sru(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """The gate f, and a highway. Lei et al. 2018 (arXiv:1709.02755), without c in its gates."""
    x, f, r, skipped = gates
    c = jax.nn.sigmoid(f) * state[1] + (1 - jax.nn.sigmoid(f)) * x
    return jax.nn.sigmoid(r) * c + (1 - jax.nn.sigmoid(r)) * skipped, c


def _rotation(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """Both states depend on both."""
    angle, x, y = gates
    cos, sin = jnp.cos(angle) * 0.8, jnp.sin(angle) * 0.8
    return cos * state[0] - sin * state[1] + x, sin * state[0] + cos * state[1] + y


def _chain(gates: tuple, hidden: tuple, state: tuple, params: dict) -> tuple:
    """The first depends on the second, the second on the third; so the first depends on the third a step later."""
    _, b, c = state
    return 0.5 * b + gates[0], -0.7 * c, jnp.where(gates[0] > 0, params["w"] * c, c) + gates[0]


SRU: jaxrnn.Cell = jaxrnn.Cell("SRU", ("x", "f", "r", "skipped"), ("h", "c"), _sru, recurrent=False)
ROTATION: jaxrnn.Cell = jaxrnn.Cell("rotation", ("angle", "x", "y"), ("a", "b"), _rotation, recurrent=False)
CHAIN: jaxrnn.Cell = jaxrnn.Cell("chain", "x", ("a", "b", "c"), _chain, params={"w": ("hidden",)}, recurrent=False)
LENGTHS, MASK = {"lengths": np.array([9, 0, 1, 6])}, {"mask": np.random.RandomState(0).rand(T, N) < 0.6}
RESET = {"reset": np.random.RandomState(1).rand(T, N) < 0.4}
KEY = {"dropout_key": np.asarray(jax.random.PRNGKey(0))}


def _case(cell: jaxrnn.Cell, **settings: Any) -> tuple[jaxrnn.Spec, Any]:
    spec = jaxrnn.Spec(cell, F, H, **settings)
    rows = spec.num_layers * (1 + spec.bidirectional)
    state = tuple(normal(rows, N, H, seed=k) for k in range(len(cell.states)))
    return spec, (parameters(spec), normal(T, N, F), state if len(state) > 1 else state[0])


@pytest.mark.parametrize(
    ("cell", "settings", "marks", "remat"),
    [
        pytest.param(
            jaxrnn.MIN_GRU_CELL, {"num_layers": 2, "bidirectional": True}, LENGTHS, "none", id="minGRU-lengths"
        ),
        pytest.param(SRU, {}, RESET, "gates", id="SRU-resets"),
        pytest.param(ROTATION, {}, MASK, "none", id="rotation-mask"),
        pytest.param(CHAIN, {}, RESET | LENGTHS, 4, id="chain-resets-lengths"),
        pytest.param(jaxrnn.zoneout(jaxrnn.MIN_GRU_CELL, h=0.3), {}, KEY, "none", id="zoneout"),
    ],
)
def test_as_the_loop(cell: jaxrnn.Cell, settings: dict, marks: dict, remat: Any) -> None:
    """Results, gradients and second derivatives."""
    spec, given = _case(cell, **settings)

    def every(engine: str) -> Any:
        def apply(*given: Any) -> Any:
            return jaxrnn.apply(spec, *given, engine=engine, remat=remat, **marks)

        def loss(*given: Any) -> jax.Array:
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(apply(*given)))

        def run(*given: Any) -> Any:
            gradient, second = jax.jvp(jax.grad(loss, (0, 1, 2)), given, given)
            return {"results": apply(*given), "gradient": gradient, "second": second}

        return jax.jit(run)(*given)

    assert_close(every("associative_scan"), every("scan"))


def test_a_reset_forgets_nan_and_overflow() -> None:
    """As in a loop, also in gradients by what comes after it."""
    reset = np.zeros((T, N), bool)
    reset[5, 1:] = True
    spec, (params, x, hx) = _case(jaxrnn.MIN_GRU_CELL)
    x[2, :3], x[3, 3] = np.nan, np.inf

    def later(x: Any, engine: str) -> Any:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, hx, reset=reset, engine=engine)[0][6:, 1:]))

    found, expected = (jax.jit(jax.value_and_grad(later), static_argnums=1)(x, e) for e in ("associative_scan", "scan"))
    assert np.isfinite(found[0])
    assert np.isfinite(found[1][6:, 1:]).all()
    assert_close(found, expected)


def _of_h(step: Any) -> jaxrnn.Cell:
    return jaxrnn.Cell("own", "x", "h", lambda gates, hidden, state: (step(gates[0], state[0]),), recurrent=False)


LINEAR = {
    "twice": lambda x, h: h + jax.nn.sigmoid(x) * h,
    "where": lambda x, h: jnp.where(x > 0, x, h / 2),
    "jitted": jax.jit(lambda x, h: x - h),
    "computed again": jax.checkpoint(lambda x, h: -h / (2 + x * x)),
    "a step of ours": lambda x, h: jaxrnn.GRU_CELL.step((x, x, x), (x,), (h,))[0],
    "a derivative of its own": lambda x, h: jax.nn.relu(x) - h,
    "reshaped": lambda x, h: (x.reshape(*x.shape, 1) * h[..., None])[..., 0],
    "forgetful": lambda x, h: jnp.tanh(x),
}


@jax.custom_jvp
def _straight_through(h: jax.Array) -> jax.Array:
    return jnp.round(h)


_straight_through.defjvp(lambda primals, tangents: (_straight_through(*primals), tangents[0]))


def _printed(x: jax.Array, h: jax.Array) -> jax.Array:
    jax.debug.print("{h}", h=h)
    return x + h


def _called(x: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, jax.typeof(x), x)


OTHERS = {
    "squared": (lambda x, h: x + h * h, "mul"),
    "tanh": (lambda x, h: jnp.tanh(x + h), "tanh"),
    "relu": (lambda x, h: jax.nn.relu(h) + x, "custom_jvp_call"),
    "divided by": (lambda x, h: x / (2 + h), "div"),
    "backward": (lambda x, h: x + h[..., ::-1], "rev"),
    "rolled": (lambda x, h: x + jnp.roll(h, 1, axis=-1), "concatenate"),
    "mean": (lambda x, h: x + jnp.mean(h, -1, keepdims=True), "reduce_sum"),
    "summed up": (lambda x, h: x + jnp.cumsum(h, -1), "cumsum"),
    "transposed": (lambda x, h: x + jax.lax.reshape(h, h.shape, (1, 0)), "reshape"),
    "of other rows": (lambda x, h: x + h[:1], "add', 'slice"),
    # The derivatives of these by the state do not depend on it.
    "chosen by the state": (lambda x, h: jnp.where(h > 0, x, -x), "select_n"),
    "sign": (lambda x, h: x + jnp.sign(h), "sign"),
    "compared": (lambda x, h: x + (h > 0).astype(x.dtype), "gt"),
    "whole": (lambda x, h: x + h.astype(jnp.int32).astype(x.dtype), "convert_element_type"),
    "rounded": (lambda x, h: x + h.astype(jnp.bfloat16).astype(x.dtype), "convert_element_type"),
    "no derivative": (lambda x, h: x + jax.lax.stop_gradient(h), "stop_gradient"),
    "another derivative": (lambda x, h: x + _straight_through(h), "custom_jvp_call"),
    "a branch": (lambda x, h: jax.lax.cond(jnp.sum(h) > 0, lambda: x, lambda: -x), "cond"),
    "a loop": (lambda x, h: jax.lax.while_loop(lambda a: a[0, 0] < h[0, 0], lambda a: a + 1, x), "while"),
    # These run once more, or for other states, or cannot be mapped or differentiated.
    "printed": (_printed, "debug_"),
    "a callback": (lambda x, h: h + _called(x), "pure_callback"),
    "a callback in a jitted function": (lambda x, h: h + jax.jit(_called)(x), "pure_callback"),
    "a callback in a loop": (lambda x, h: h + jax.lax.fori_loop(0, 2, lambda _, a: _called(a), x), "pure_callback"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    spec, given = _case(_of_h(LINEAR[name]))
    found = {engine: jaxrnn.apply(spec, *given, engine=engine) for engine in ("associative_scan", "scan")}
    assert_close(found["associative_scan"], found["scan"])


@pytest.mark.parametrize("name", OTHERS)
def test_not_linear_or_not_unit_by_unit(name: str) -> None:
    step, operation = OTHERS[name]
    spec, given = _case(_of_h(step))
    with pytest.raises(ValueError, match=f"'associative_scan' cannot run this: .*{operation}.* in 'own' may not be"):
        jax.eval_shape(lambda *a: jaxrnn.apply(spec, *a, engine="associative_scan"), *given)
    jax.eval_shape(lambda *a: jaxrnn.apply(spec, *a), *given)  # by default a loop


def test_the_remedy_works() -> None:
    spec, given = _case(jaxrnn.GRU_CELL)
    with pytest.raises(ValueError, match=r"'GRU' has a recurrent product. Use engine=\('associative_scan', 'scan'\)"):
        jaxrnn.apply(spec, *given, engine="associative_scan")
    assert_close(jaxrnn.apply(spec, *given, engine=("associative_scan", "scan")), jaxrnn.apply(spec, *given))


def _loops(platform: str, rows: int = N, cell: jaxrnn.Cell = jaxrnn.MIN_GRU_CELL, **settings: Any) -> int:
    spec, (params, x, _) = _case(cell)
    given = params, *(jax.ShapeDtypeStruct(shape, x.dtype) for shape in ((T, rows, F), (1, rows, H)))
    step = jax.jit(jax.grad(lambda *a: jnp.sum(jaxrnn.apply(spec, *a, **settings)[0])))
    return step.trace(*given).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")


def test_by_default_where_steps_take_longer_than_passes() -> None:
    """On GPUs and TPUs, for few rows."""
    assert _loops("tpu") == _loops("cuda") == 0
    assert _loops("cpu") == 2
    assert _loops("tpu", cell=jaxrnn.IND_RNN_CELL) == 2
    assert _loops("cpu", engine="associative_scan") == 0


@pytest.mark.parametrize(("platform", "kib"), [("cuda", 1024), ("rocm", 1024), ("tpu", 128)])
def test_by_default_up_to_a_size_of_a_step(platform: str, kib: int) -> None:
    most = kib * 1024 // (2 * H * 4)  # two gates of float32
    assert _loops(platform, most) == 0 < _loops(platform, most + 1)


ROWS = 2 * H * 4 * N  # bytes of the gates in a step


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(Form(training=2 * ROWS, joined=True, parallel=ROWS), id="blocks of two steps"),
        pytest.param(Form(training=ROWS, inference=ROWS, many=1, parallel=ROWS), id="blocks of a step"),
    ],
)
def test_within_blocks(form: Form, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As on GPUs, where the steps of a block run at once."""
    engine, name = Scan(), request.node.name
    monkeypatch.setattr(engine, "forms", lambda run: {None: form})
    monkeypatch.setitem(jaxrnn.engines.ENGINES, name, engine)
    spec, given = _case(jaxrnn.MIN_GRU_CELL, bidirectional=True)

    def loss(*given: Any, engine: str) -> jax.Array:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, *given, engine=engine, **LENGTHS)[0]))

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, engine=each), (0, 1, 2)))(*given) for each in (name, "scan")
    )
    assert_close(found, expected)


def test_mapped_rows_count() -> None:
    spec, (params, x, _) = _case(jaxrnn.MIN_GRU_CELL)
    mapped = jax.jit(jax.vmap(lambda x: jaxrnn.apply(spec, params, x)[0]))

    def loops(count: int) -> int:
        program = mapped.trace(jax.ShapeDtypeStruct((count, T, N, F), x.dtype)).lower(lowering_platforms=("tpu",))
        return program.as_text().count("stablehlo.while")

    most = 128 * 1024 // (2 * H * 4) // N
    assert loops(most) == 0 < loops(most + 1)


def test_a_symbolic_number_of_steps_is_a_loop() -> None:
    spec, (params, x, _) = _case(jaxrnn.MIN_GRU_CELL)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"t, {N}, {F}"), jnp.float64)

    def exported(**settings: Any) -> Any:
        function = jax.jit(lambda x: jaxrnn.apply(spec, params, x, **settings)[0])
        return jax.export.export(function, platforms=["cpu", "tpu"])(shape)

    assert_close(exported().call(x), jaxrnn.apply(spec, params, x)[0])
    with pytest.raises(ValueError, match="the number of steps is symbolic"):
        exported(engine="associative_scan")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, AxisType.Manual])
def test_rows_on_several_devices(kind: AxisType) -> None:
    spec, (params, x, _) = _case(jaxrnn.MIN_GRU_CELL, bidirectional=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto if kind == AxisType.Manual else kind,))

    def loss(params: Any, x: Any, engine: str) -> Any:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, engine=engine)[0]))

    def whole(params: Any, x: Any) -> Any:
        return jax.grad(loss, (0, 1))(params, x, "associative_scan")

    expected = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, x, "scan")
    rows = PartitionSpec(None, "data")
    if kind == AxisType.Manual:
        whole = jax.shard_map(whole, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=(PartitionSpec(), rows))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, rows))
        assert_close(jax.jit(whole)(params, sharded), expected)
