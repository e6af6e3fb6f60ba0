"""Our cells in Flax's own wrappers, of both APIs, equal our layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

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
        results, variables = module.init_with_output(jax.random.key(0), x, **arguments)
        params = variables["params"]
        cells = (
            [params[name]["cell"]["cell"] for name in ("forward_rnn", "backward_rnn")]
            if both
            else [params["cell"]["cell"]]
        )
        return results, cells
    rngs = nnx.Rngs(0)
    cells = [jaxrnn.FlaxCell(getattr(jaxrnn, kind)(F, H, param_dtype=jnp.float64, rngs=rngs)) for _ in range(count)]
    rnns = [nnx.RNN(cell, **options, return_carry=True) for cell in cells]
    module = nnx.Bidirectional(*rnns, return_carry=True) if both else rnns[0]
    params = [{name: getattr(c.cell, name)[...] for name in c.cell.spec.shapes()} for c in cells]
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


def _assert_close(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


FRAMEWORKS = ["linen", "nnx.jit", "nnx.split"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_rnn_is_our_layer(framework: str, kind: str) -> None:
    (carry, output), cells = _run(framework, kind, {}, _x())
    expected, (expected_carry,) = _layer(kind, cells, _x())
    _assert_close((carry, output), (expected_carry, expected))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_is_our_layer(framework: str, kind: str) -> None:
    (carries, output), cells = _run(framework, kind, {"both": True}, _x())
    expected, expected_carries = _layer(kind, cells, _x())
    _assert_close((carries, output), (tuple(expected_carries), expected))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_options_of_flaxs_rnn(framework: str) -> None:
    (carry, output), cells = _run(framework, "LSTMCell", {}, _x(), seq_lengths=LENGTHS)
    expected, (expected_carry,) = _layer("LSTMCell", cells, _x(), LENGTHS)
    _assert_close(carry, expected_carry)
    for row, length in enumerate(LENGTHS):  # Flax's outputs go on past the end
        _assert_close(output[row, :length], expected[row, :length])
    options = {"time_major": True, "reverse": True, "keep_order": True, "unroll": 2}
    (_, output), cells = _run(framework, "GRUCell", options, _x().swapaxes(0, 1))
    expected, _ = _layer("GRUCell", cells, _x()[:, ::-1])
    _assert_close(output.swapaxes(0, 1), expected[:, ::-1])
    start = jnp.ones((B, H))
    (_, output), cells = _run(framework, "GRUCell", {}, _x(), initial_carry=start)
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, batch_first=True)
    params = {f"{name}_l0": value for name, value in cells[0].items()}
    _assert_close(output, jaxrnn.apply(spec, params, _x(), start[None])[0])


def test_the_carry_is_flaxs() -> None:
    cell = jaxrnn.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    ours = jaxrnn.FlaxCell(cell)
    assert ours.num_feature_axes == 1
    x, h, c = _x(B, F), _x(B, H), 2 * _x(B, H)
    (c_1, h_1), y = ours((c, h), x)
    _assert_close((h_1, c_1), cell(x, (h, c)))
    _assert_close(y, h_1)
    # As many batch axes as one likes, as in Flax.
    (many_c, many_h), many = ours((c[None, :, None], h[None, :, None]), x[None, :, None])
    assert many.shape == (1, B, 1, H)
    _assert_close((many_c[0, :, 0], many_h[0, :, 0]), (c_1, h_1))
    _, none = ours((c[:0], h[:0]), x[:0])
    assert none.shape == (0, H)
    (_, one), _ = ours((c[0], h[0]), x[0])
    _assert_close(one, h_1[0])
    for shape in ((F,), (B, F), (2, B, F)):
        theirs = nnx.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)).initialize_carry(shape, nnx.Rngs(0))
        _assert_close(ours.initialize_carry(shape), theirs)
        _assert_close(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(F, H)).initialize_carry(KEY, shape), theirs[1])
    ones = ours.initialize_carry((B, F), carry_init=nnx.initializers.ones)
    assert all(np.all(np.asarray(a) == 1) for a in ones)
    drawn = ours.initialize_carry((B, F), nnx.Rngs(0), nnx.initializers.normal())
    assert not np.array_equal(drawn[0], drawn[1])
    _assert_close(drawn, ours.initialize_carry((B, F), nnx.Rngs(carry=0), nnx.initializers.normal()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_carry_keeps_its_dtype_through_a_scan(dtype: Any) -> None:
    rnn = nnx.RNN(jaxrnn.FlaxCell(jaxrnn.LSTMCell(F, H, dtype=dtype, rngs=nnx.Rngs(0))), return_carry=True)
    (c, h), output = rnn(_x().astype(jnp.float32))
    assert (c.dtype, h.dtype, output.dtype) == (dtype,) * 3
    cell = jaxrnn.FlaxCell(jaxrnn.GRUCell(F, H, dtype=dtype, rngs=nnx.Rngs(0)))
    carry, y = cell(jnp.zeros((B, H), jnp.float32), _x(B, F))
    assert (carry.dtype, y.dtype) == (jnp.float32, dtype)


def test_gradients_go_through_both_wrappers() -> None:
    rnn = nnx.RNN(jaxrnn.FlaxCell(jaxrnn.GRUCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))))
    gradient = nnx.jit(nnx.grad(lambda rnn: (rnn(_x()) ** 2).sum()))(rnn)
    params = {f"{name}_l0": getattr(rnn.cell.cell, name)[...] for name in rnn.cell.cell.spec.shapes()}
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, batch_first=True)
    expected = jax.grad(lambda params: (jaxrnn.apply(spec, params, _x())[0] ** 2).sum())(params)
    module = linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(F, H, param_dtype=jnp.float64)))
    variables = {"cell": {"cell": {name.removesuffix("_l0"): value for name, value in params.items()}}}
    in_linen = jax.grad(lambda params: (module.apply({"params": params}, _x()) ** 2).sum())(variables)
    for name, value in expected.items():
        name = name.removesuffix("_l0")
        _assert_close(gradient["cell"]["cell"][name][...], value)
        _assert_close(in_linen["cell"]["cell"][name], value)


def test_only_cells_of_the_same_api() -> None:
    for cell in (jaxrnn.linen.GRUCell(F, H), jaxrnn.GRU(F, H, rngs=nnx.Rngs(0)), nnx.GRUCell(F, H, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=r"an RNNCell, LSTMCell or GRUCell of jaxrnn\.nnx, got"):
            jaxrnn.FlaxCell(cell)
    for cell in (jaxrnn.linen.GRU(F, H), jaxrnn.GRUCell(F, H, rngs=nnx.Rngs(0)), linen.GRUCell(H)):
        with pytest.raises(TypeError, match=r"an RNNCell, LSTMCell or GRUCell of jaxrnn\.linen, got"):
            jaxrnn.linen.FlaxCell(cell)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_carry_of_another_batch_is_refused(framework: str) -> None:
    """Flattened, it has as many rows."""
    if framework == "nnx":
        cell = jaxrnn.FlaxCell(jaxrnn.LSTMCell(F, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
        call = cell
    else:
        cell = jaxrnn.linen.FlaxCell(jaxrnn.linen.LSTMCell(F, H, param_dtype=jnp.float64))
        inputs = jnp.ones((2, 3, F))
        variables = cell.init(KEY, cell.initialize_carry(KEY, inputs.shape), inputs)
        call = functools.partial(cell.apply, variables)
    carry = (jnp.zeros((2, 3, H)), jnp.zeros((3, 2, H)))
    with pytest.raises(RuntimeError, match=r"carry should have arrays of shape \(2, 3, 4\).*got \(3, 2, 4\)"):
        call(carry, jnp.ones((2, 3, F)))
