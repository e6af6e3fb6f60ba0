"""Our cells in Flax's own wrappers, of both APIs, equal our layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn

KINDS = {"RNNCell": jaxrnn.RNN_TANH, "LSTMCell": jaxrnn.LSTM_CELL, "GRUCell": jaxrnn.GRU_CELL}
B, T, F, H = 3, 5, 2, 4  # the field's names for batch, time, input features and hidden size
LENGTHS = np.array([2, 5, 1])
KEY = jax.random.key(0)


def _x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).randn(*(shape or (B, T, F))))


def _run(framework: str, kind: str, options: dict, x: jax.Array, **arguments: Any) -> tuple[tuple, list[dict]]:
    """Flax's RNN, or Bidirectional, around FlaxCells; and the cells' parameters, forward first."""
    both = options.pop("both", False)
    count = 1 + both
    if framework == "linen":
        cells = [
            jaxrnn.linen.FlaxCell(getattr(jaxrnn.linen, kind)(F, H, param_dtype=jnp.float64)) for _ in range(count)
        ]
        rnns = [linen.RNN(cell, **options, return_carry=True) for cell in cells]
        module = linen.Bidirectional(*rnns, return_carry=True) if both else rnns[0]
        params = filled_variables(module, x, **arguments)["params"]
        results = jax.jit(lambda params, x: module.apply({"params": params}, x, **arguments))(params, x)
        cells = (
            [params[name]["cell"]["cell"] for name in ("forward_rnn", "backward_rnn")]
            if both
            else [params["cell"]["cell"]]
        )
        return results, cells

    def make() -> Any:
        rngs = nnx.Rngs(0)
        cells = [jaxrnn.FlaxCell(getattr(jaxrnn, kind)(F, H, param_dtype=jnp.float64, rngs=rngs)) for _ in range(count)]
        rnns = [nnx.RNN(cell, **options, return_carry=True) for cell in cells]
        return nnx.Bidirectional(*rnns, return_carry=True) if both else rnns[0]

    module = filled(make)
    cells = [rnn.cell.cell for rnn in ((module.forward_rnn, module.backward_rnn) if both else (module,))]
    params = [{name: getattr(cell, name)[...] for name in cell.spec.shapes()} for cell in cells]
    if framework == "nnx.jit":
        return nnx.jit(lambda module, x: module(x, **arguments))(module, x), params
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, **arguments))(state, x), params


def _layer(kind: str, cells: list[dict], x: jax.Array, lengths: Any = None) -> tuple[jax.Array, list]:
    """Our layer with the same parameters: the output, and for each direction the carry as Flax orders it."""
    spec = jaxrnn.Spec(KINDS[kind], F, H, batch_first=True, bidirectional=len(cells) == 2)
    suffixes = ("_l0", "_l0_reverse")
    params = {name + end: value for end, cell in zip(suffixes, cells, strict=False) for name, value in cell.items()}
    output, state = jaxrnn.apply(spec, params, x, lengths=lengths)
    states = state if isinstance(state, tuple) else (state,)
    carries = [tuple(a[k] for a in states[::-1]) for k in range(len(cells))]
    return output, [carry if len(carry) > 1 else carry[0] for carry in carries]


FRAMEWORKS = ["linen", "nnx.jit", "nnx.split"]
# Any two of framework, kind and directions meet in the quick ones.
ALL = [
    pytest.param(framework, kind, both, marks=[] if (f + k) % 2 == both else pytest.mark.slow)
    for f, framework in enumerate(FRAMEWORKS)
    for k, kind in enumerate(KINDS)
    for both in (False, True)
]


@pytest.mark.parametrize(("framework", "kind", "both"), ALL)
def test_rnn_and_bidirectional_are_our_layer(framework: str, kind: str, both: bool) -> None:
    (carry, output), cells = _run(framework, kind, {"both": both}, _x())
    expected, carries = _layer(kind, cells, _x())
    assert_close({"carry": carry, "output": output}, {"carry": carries if both else carries[0], "output": expected})


@pytest.mark.parametrize("framework", ["linen", pytest.param("nnx.jit", marks=pytest.mark.slow), "nnx.split"])
def test_options_of_flaxs_rnn(framework: str) -> None:
    (carry, output), cells = _run(framework, "LSTMCell", {}, _x(), seq_lengths=LENGTHS)
    expected, (expected_carry,) = _layer("LSTMCell", cells, _x(), LENGTHS)
    assert_close(carry, expected_carry)
    for row, length in enumerate(LENGTHS):  # Flax's outputs go on past the end
        assert_close(output[row, :length], expected[row, :length])
    options = {"time_major": True, "reverse": True, "keep_order": True, "unroll": 2}
    (_, output), cells = _run(framework, "GRUCell", options, _x().swapaxes(0, 1))
    expected, _ = _layer("GRUCell", cells, _x()[:, ::-1])
    assert_close(output.swapaxes(0, 1), expected[:, ::-1])
    start = jnp.ones((B, H))
    (_, output), cells = _run(framework, "GRUCell", {}, _x(), initial_carry=start)
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, batch_first=True)
    params = {f"{name}_l0": value for name, value in cells[0].items()}
    assert_close(output, jaxrnn.apply(spec, params, _x(), start[None])[0])


def test_the_carry_is_flaxs() -> None:
    cell = filled(lambda: jaxrnn.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    ours = jaxrnn.FlaxCell(cell)
    assert ours.num_feature_axes == 1
    x, h, c = _x(B, F), _x(B, H), 2 * _x(B, H)
    (c_1, h_1), y = ours((c, h), x)
    assert_close((h_1, c_1), cell(x, (h, c)))
    assert_close(y, h_1)
    # As many batch axes as one likes, as in Flax.
    (many_c, many_h), many = ours((c[None, :, None], h[None, :, None]), x[None, :, None])
    assert many.shape == (1, B, 1, H)
    assert_close((many_c[0, :, 0], many_h[0, :, 0]), (c_1, h_1))
    _, none = ours((c[:0], h[:0]), x[:0])
    assert none.shape == (0, H)
    (_, one), _ = ours((c[0], h[0]), x[0])
    assert_close(one, h_1[0])
    flaxs = filled(lambda: nnx.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    for shape in ((F,), (B, F), (2, B, F)):
        theirs = flaxs.initialize_carry(shape, nnx.Rngs(0))
        assert_close(ours.initialize_carry(shape), theirs)
        assert_close(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(F, H)).initialize_carry(KEY, shape), theirs[1])
    ones = ours.initialize_carry((B, F), carry_init=nnx.initializers.ones)
    assert all(np.all(np.asarray(a) == 1) for a in ones)
    drawn = ours.initialize_carry((B, F), nnx.Rngs(0), nnx.initializers.normal())
    assert not np.array_equal(drawn[0], drawn[1])
    assert_close(drawn, ours.initialize_carry((B, F), nnx.Rngs(carry=0), nnx.initializers.normal()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_carry_keeps_its_dtype_through_a_scan(dtype: Any) -> None:
    def scan() -> Any:
        rnn = nnx.RNN(jaxrnn.FlaxCell(jaxrnn.LSTMCell(F, H, dtype=dtype, rngs=nnx.Rngs(0))), return_carry=True)
        return rnn(_x().astype(jnp.float32))

    (c, h), output = jax.eval_shape(scan)
    assert (c.dtype, h.dtype, output.dtype) == (dtype,) * 3

    def step() -> Any:
        cell = jaxrnn.FlaxCell(jaxrnn.GRUCell(F, H, dtype=dtype, rngs=nnx.Rngs(0)))
        return cell(jnp.zeros((B, H), jnp.float32), _x(B, F))

    carry, y = jax.eval_shape(step)
    assert (carry.dtype, y.dtype) == (jnp.float32, dtype)


def test_gradients_go_through_both_wrappers() -> None:
    rnn = filled(lambda: nnx.RNN(jaxrnn.FlaxCell(jaxrnn.GRUCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))))
    names = list(rnn.cell.cell.spec.shapes())
    module = linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(F, H, param_dtype=jnp.float64)))
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, batch_first=True)
    graph, _, rngs = nnx.split(rnn, nnx.Param, ...)

    @jax.jit
    def gradients(params: dict[str, jax.Array], x: jax.Array) -> tuple:
        def in_layer(params: dict[str, jax.Array]) -> jax.Array:
            return jaxrnn.apply(spec, {f"{name}_l0": value for name, value in params.items()}, x)[0]

        def in_nnx(params: dict[str, jax.Array]) -> jax.Array:
            return nnx.merge(graph, nnx.State({"cell": {"cell": params}}), rngs)(x)

        def in_linen(params: dict[str, jax.Array]) -> jax.Array:
            return module.apply({"params": {"cell": {"cell": params}}}, x)

        return tuple(jax.grad(lambda p, f=f: (f(p) ** 2).sum())(params) for f in (in_layer, in_nnx, in_linen))

    expected, nnxs, linens = gradients({name: getattr(rnn.cell.cell, name)[...] for name in names}, _x())
    assert_close({"nnx": nnxs, "linen": linens}, {"nnx": expected, "linen": expected})


def test_only_cells_of_the_same_api() -> None:
    layer, cell, flaxs = (
        filled(lambda make=make: make(rngs=nnx.Rngs(0)))
        for make in (functools.partial(kind, F, H) for kind in (jaxrnn.GRU, jaxrnn.GRUCell, nnx.GRUCell))
    )
    for cell_of_another in (jaxrnn.linen.GRUCell(F, H), layer, flaxs):
        with pytest.raises(TypeError, match=r"an RNNCell, LSTMCell or GRUCell of jaxrnn\.nnx, got"):
            jaxrnn.FlaxCell(cell_of_another)
    for cell_of_another in (jaxrnn.linen.GRU(F, H), cell, linen.GRUCell(H)):
        with pytest.raises(TypeError, match=r"an RNNCell, LSTMCell or GRUCell of jaxrnn\.linen, got"):
            jaxrnn.linen.FlaxCell(cell_of_another)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_carry_of_another_batch_is_refused(framework: str) -> None:
    """Flattened, it has as many rows."""
    if framework == "nnx":
        call = filled(lambda: jaxrnn.FlaxCell(jaxrnn.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))))
    else:
        cell = jaxrnn.linen.FlaxCell(jaxrnn.linen.LSTMCell(F, H, param_dtype=jnp.float64))
        inputs = jnp.ones((2, 3, F))
        variables = filled_variables(cell, cell.initialize_carry(KEY, inputs.shape), inputs)
        call = functools.partial(cell.apply, variables)
    carry = (jnp.zeros((2, 3, H)), jnp.zeros((3, 2, H)))
    with pytest.raises(RuntimeError, match=r"carry should have arrays of shape \(2, 3, 4\).*got \(3, 2, 4\)"):
        call(carry, jnp.ones((2, 3, F)))
