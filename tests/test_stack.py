"""The whole call: layout, order, dropout, dtypes, what compiles when, and what bad arguments get."""

import itertools
import types
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, recurrence

T, N, F, H = 5, 3, 2, 4  # the field's names for time, batch, input features and hidden size
LSTM = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, bidirectional=True)
GRU = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
PARAMS = {spec: spec.init(jax.random.key(0), jnp.float64) for spec in (LSTM, GRU)}


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(sum(shape)).randn(*shape))


def _replace(spec: jaxrnn.Spec, **changes: Any) -> jaxrnn.Spec:
    return jaxrnn.Spec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes})


def test_the_order_of_states_and_features() -> None:
    output, (h_n, c_n) = jaxrnn.apply(LSTM, PARAMS[LSTM], _normal(T, N, F))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, N, 2 * H), (4, N, H), (4, N, H))
    np.testing.assert_array_equal(h_n[-2], output[-1, :, :H])
    np.testing.assert_array_equal(h_n[-1], output[0, :, H:])


def test_batch_first_turns_input_and_output_only() -> None:
    x, hx = _normal(T, N, F), (_normal(4, N, H), _normal(4, N, H))
    output, states = jaxrnn.apply(LSTM, PARAMS[LSTM], x, hx)
    turned, turned_states = jaxrnn.apply(_replace(LSTM, batch_first=True), PARAMS[LSTM], x.swapaxes(0, 1), hx)
    np.testing.assert_array_equal(turned.swapaxes(0, 1), output)
    for a, b in zip(states, turned_states, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_is_a_batch_of_one(batch_first: bool) -> None:
    spec = _replace(LSTM, batch_first=batch_first)
    x, hx = _normal(T, F), (_normal(4, H), _normal(4, H))
    output, (h_n, c_n) = jaxrnn.apply(spec, PARAMS[LSTM], x, hx)
    assert (output.shape, h_n.shape, c_n.shape) == ((T, 2 * H), (4, H), (4, H))
    batched, _ = jaxrnn.apply(LSTM, PARAMS[LSTM], x[:, None], tuple(a[:, None] for a in hx))
    np.testing.assert_allclose(output, batched[:, 0], rtol=0, atol=1e-15)


def test_no_hx_is_zeros_and_a_list_is_a_tuple() -> None:
    x, zeros = _normal(T, N, F), jnp.zeros((4, N, H))
    for hx in ((zeros, zeros), [zeros, zeros]):
        ours = jaxrnn.apply(LSTM, PARAMS[LSTM], x, hx)
        jax.tree.map(np.testing.assert_array_equal, jaxrnn.apply(LSTM, PARAMS[LSTM], x), ours)


def test_batch_size_zero() -> None:
    def loss(params: dict) -> jax.Array:
        output, (h_n, _) = jaxrnn.apply(LSTM, params, jnp.zeros((T, 0, F)))
        assert (output.shape, h_n.shape) == ((T, 0, 2 * H), (4, 0, H))
        return output.sum()

    assert all(np.all(np.asarray(g) == 0) for g in jax.grad(loss)(PARAMS[LSTM]).values())


def test_plain_dicts_of_numpy_arrays_do() -> None:
    params = {name: np.asarray(value) for name, value in PARAMS[GRU].items()}
    x = np.random.RandomState(0).randn(T, N, F)
    jax.tree.map(
        np.testing.assert_array_equal, jaxrnn.apply(GRU, params, x), jaxrnn.apply(GRU, PARAMS[GRU], jnp.asarray(x))
    )


def test_dtype_promotes_or_is_asked_for() -> None:
    x32, params32 = _normal(T, N, F).astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), PARAMS[GRU])
    with jax.numpy_dtype_promotion("standard"):
        assert jaxrnn.apply(GRU, params32, x32)[0].dtype == jnp.float32
        assert jaxrnn.apply(GRU, PARAMS[GRU], x32)[0].dtype == jnp.float64
        assert jaxrnn.apply(GRU, params32, x32.astype(jnp.bfloat16))[0].dtype == jnp.float32
    truth, _ = jaxrnn.apply(GRU, PARAMS[GRU], _normal(T, N, F))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        output, h_n = jaxrnn.apply(GRU, PARAMS[GRU], x32, dtype=dtype)
        assert output.dtype == h_n.dtype == dtype
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(output, np.float64), truth, rtol=0, atol=tolerance)
    with pytest.raises(TypeError, match="dtype should be floating, got int32"):
        jaxrnn.apply(GRU, PARAMS[GRU], x32, dtype=jnp.int32)


def test_precision_reaches_every_product() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=2)

    def loss(params: dict) -> jax.Array:
        return jaxrnn.apply(spec, params, _normal(T, N, F), precision="highest")[0].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(spec.init(jax.random.key(0), jnp.float64)))
    assert jaxpr.count("dot_general") > 6
    assert jaxpr.count("dot_general") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_a_second_call_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    layer = recurrence.layer
    monkeypatch.setattr(recurrence, "layer", lambda *args: traces.append(args) or layer(*args))
    spec = _replace(GRU, hidden_size=7)  # met nowhere else
    params = spec.init(jax.random.key(0), jnp.float64)
    for _ in range(3):
        jaxrnn.apply(jaxrnn.Spec(jaxrnn.GRU_CELL, F, 7), params, _normal(T, N, F))
    assert len(traces) == 1
    jaxrnn.apply(spec, params, _normal(T + 1, N, F))
    assert len(traces) == 2


# Lengths.

ROWS = np.array([3, 5, 0, 1])
# Two layers, two directions and a projection; and the cell whose recurrent half comes apart.
RAGGED = [
    jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, bidirectional=True, proj_size=2),
    jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=2, bidirectional=True, batch_first=True),
]


class Ragged:
    """A batch of rows of different lengths, given with whatever is wanted in the padding."""

    def __init__(self, spec: jaxrnn.Spec) -> None:
        self.spec = spec
        self.params = spec.init(jax.random.key(0), jnp.float64)
        self.x = _normal(T, len(ROWS), F)
        rows = spec.num_layers * spec.num_directions
        self.hx = tuple(_normal(rows, len(ROWS), size) for size in spec.state_sizes())
        self.padding = np.arange(T)[:, None] >= ROWS

    def turn(self, a: jax.Array) -> jax.Array:
        return a.swapaxes(0, 1) if self.spec.batch_first else a

    def run(self, params: dict, x: jax.Array, hx: tuple, **arguments: Any) -> tuple:
        """The outputs, time first, and the states; x is time first, too."""
        hx = hx if len(hx) > 1 else hx[0]
        output, state = jaxrnn.apply(self.spec, params, self.turn(x) if x.ndim == 3 else x, hx, **arguments)
        return (self.turn(output) if x.ndim == 3 else output), *(state if isinstance(state, tuple) else (state,))

    def differentiate(self, padding: float, cotangent_padding: float = 0.0) -> tuple:
        """The results and the gradients of parameters, x and hx."""
        x = jnp.where(self.padding[..., None], padding, self.x)
        results, pullback = jax.vjp(lambda *arguments: self.run(*arguments, lengths=ROWS), self.params, x, self.hx)
        output, *states = (_normal(*a.shape) for a in results)
        output = jnp.where(self.padding[..., None], cotangent_padding, output)
        return results, pullback((output, *states))


@pytest.fixture(params=RAGGED, ids=["LSTM", "GRU"], scope="module")
def ragged(request: pytest.FixtureRequest) -> Ragged:
    return Ragged(request.param)


def test_lengths_equal_each_row_alone(ragged: Ragged) -> None:
    _assert_each_row_alone(ragged)


def test_lengths_equal_each_row_alone_for_every_kind(thorough: bool) -> None:
    kinds = [(RNN_TANH, 0), (RNN_RELU, 0), (LSTM_CELL, 0), (LSTM_CELL, 2), (GRU_CELL, 0)]
    table = list(itertools.product(kinds, (1, 2, 3), (False, True)))
    for (cell, proj_size), num_layers, bidirectional in table if thorough else table[::11]:
        _assert_each_row_alone(
            Ragged(jaxrnn.Spec(cell, F, H, num_layers, bidirectional=bidirectional, proj_size=proj_size))
        )


def _assert_each_row_alone(ragged: Ragged) -> None:
    results, (d_params, d_x, d_hx) = ragged.differentiate(7.0)
    output, *states = results
    added = jax.tree.map(jnp.zeros_like, ragged.params)
    for row, length in enumerate(ROWS):
        assert np.all(np.asarray(output[length:, row]) == 0)
        assert np.all(np.asarray(d_x[length:, row]) == 0)
        if length == 0:
            continue
        alone, pullback = jax.vjp(
            ragged.run, ragged.params, ragged.x[:length, row], tuple(a[:, row] for a in ragged.hx)
        )
        for a, b in zip(alone, (output[:length, row], *(a[:, row] for a in states)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        cotangents = (_normal(*output.shape)[:length, row], *(_normal(*a.shape)[:, row] for a in states))
        row_params, row_x, row_hx = pullback(cotangents)
        added = jax.tree.map(jnp.add, added, row_params)
        np.testing.assert_allclose(d_x[:length, row], row_x, rtol=0, atol=1e-12)
        for a, b in zip(d_hx, row_hx, strict=True):
            np.testing.assert_allclose(a[:, row], b, rtol=0, atol=1e-12)
    for name, gradient in d_params.items():
        np.testing.assert_allclose(gradient, added[name], rtol=0, atol=1e-12, err_msg=name)
        assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e308])
def test_padding_reaches_nothing(ragged: Ragged, padding: float) -> None:
    zeros = ragged.differentiate(0.0)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(zeros))
    # Bit by bit; and what a loss does with the outputs past the end does not come back either.
    jax.tree.map(np.testing.assert_array_equal, ragged.differentiate(padding, padding), zeros)


def test_a_row_of_length_0_keeps_its_state(ragged: Ragged) -> None:
    (_, *states), _ = ragged.differentiate(np.nan)
    (row,) = np.flatnonzero(ROWS == 0)
    for a, a_0 in zip(states, ragged.hx, strict=True):
        np.testing.assert_array_equal(a[:, row], a_0[:, row])
    none, *states = ragged.run(ragged.params, ragged.x, ragged.hx, lengths=np.zeros(4, np.int32))
    assert not np.any(np.asarray(none))
    jax.tree.map(np.testing.assert_array_equal, tuple(states), ragged.hx)


def test_whole_lengths_are_no_lengths(ragged: Ragged) -> None:
    whole = ragged.run(ragged.params, ragged.x, ragged.hx, lengths=[T] * 4)
    plain = ragged.run(ragged.params, ragged.x, ragged.hx)
    for a, b in zip(whole, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-15)


def test_lengths_of_unbatched_input() -> None:
    x = _normal(T, F)
    output, (h_n, c_n) = jaxrnn.apply(LSTM, PARAMS[LSTM], x.at[3:].set(jnp.nan), lengths=3)
    expected, (h, c) = jaxrnn.apply(LSTM, PARAMS[LSTM], x[:3])
    for a, b in [(output[:3], expected), (output[3:], jnp.zeros((2, 2 * H))), (h_n, h), (c_n, c)]:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-15)


def test_one_trace_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    layer = recurrence.layer
    monkeypatch.setattr(recurrence, "layer", lambda *args: traces.append(args) or layer(*args))
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, 9)  # met nowhere else
    params = spec.init(jax.random.key(0), jnp.float64)
    jitted = jax.jit(lambda lengths: jaxrnn.apply(spec, params, _normal(T, N, F), lengths=lengths)[1])
    last = [jitted(jnp.array([k % (T + 1), (k + 2) % (T + 1), T])) for k in range(10)]
    assert len(traces) == 1
    assert len({a.tobytes() for a in np.asarray(last)}) > 4
    for k in range(10):
        jaxrnn.apply(spec, params, _normal(T, N, F), lengths=[k % (T + 1), (k + 2) % (T + 1), T])
    assert len(traces) == 1


def test_lengths_out_of_range_under_jit_count_as_the_nearest() -> None:
    run = jax.jit(lambda lengths: jaxrnn.apply(GRU, PARAMS[GRU], _normal(T, N, F), lengths=lengths))
    jax.tree.map(np.testing.assert_array_equal, run(jnp.array([-3, 2, 99])), run(jnp.array([0, 2, T])))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_lengths_of_any_integer_dtype(dtype: type) -> None:
    x = _normal(300, 1, F)  # more steps than a uint8 counts
    output, _ = jaxrnn.apply(GRU, PARAMS[GRU], x, lengths=np.array([250], dtype))
    assert np.all(np.any(np.asarray(output)[:, 0] != 0, axis=1) == (np.arange(300) < 250))


def test_vmap_over_lengths() -> None:
    x, lengths = _normal(2, T, N, F), jnp.array([[1, 2, 3], [5, 0, 4]])

    def run(x: Any, lengths: Any) -> Any:
        return jaxrnn.apply(LSTM, PARAMS[LSTM], x, lengths=lengths)

    together = jax.vmap(run)(x, lengths)
    for k in range(2):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(run(x[k], lengths[k])), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=0, atol=1e-15)


def _stacked_by_scans(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of what the scans in a jaxpr stack up over their steps."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            shapes += [v.aval.shape for v in equation.outvars[equation.params["num_carry"] :]]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            shapes += _stacked_by_scans(inner)
    return shapes


def test_inference_keeps_no_history_but_the_outputs() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, bidirectional=True)
    params = spec.init(jax.random.key(0), jnp.float64)

    def run(x: Any) -> Any:
        return jaxrnn.apply(spec, params, x, lengths=[1, 2, 3])

    assert _stacked_by_scans(jax.make_jaxpr(run)(_normal(T, N, F)).jaxpr) == [(T, N, H)] * 2
    # What training keeps is seen:
    gradient = jax.grad(lambda x: run(x)[0].sum())
    assert len(_stacked_by_scans(jax.make_jaxpr(gradient)(_normal(T, N, F)).jaxpr)) > 10


# Streaming and resets.


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_any_chunks_equal_the_whole(kind: str, thorough: bool) -> None:
    cell = {"LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL, "RNN": jaxrnn.RNN_TANH}[kind]
    spec = jaxrnn.Spec(cell, F, H, num_layers=2, proj_size=2 if kind == "LSTM" else 0)
    params, x = spec.init(jax.random.key(0), jnp.float64), _normal(12, N, F)
    output, last = jaxrnn.apply(spec, params, x)
    random = np.random.RandomState(0)
    for _ in range(1000 if thorough else 50):
        cuts = np.flatnonzero(random.rand(11) < random.rand()) + 1
        pieces, state = [], None
        for chunk in np.split(x, cuts):
            piece, state = jaxrnn.apply(spec, params, chunk, state)
            pieces.append(piece)
        np.testing.assert_allclose(np.concatenate(pieces), output, rtol=0, atol=1e-12)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


ONE_WAY = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, batch_first=True)
ONE_WAY_PARAMS = ONE_WAY.init(jax.random.key(0), jnp.float64)


def _episodes(x: jax.Array, hx: tuple, reset: np.ndarray, reset_state: tuple) -> tuple:
    """Each row by itself, cut where it is reset."""
    outputs, states = [], []
    for row in range(len(x)):
        state, pieces = tuple(a[:, row] for a in hx), []
        starts = np.flatnonzero(reset[row])
        for start, chunk in zip([None, *starts], np.split(x[row], starts), strict=True):
            state = state if start is None else tuple(a[:, row] for a in reset_state)
            if len(chunk):
                piece, state = jaxrnn.apply(ONE_WAY, ONE_WAY_PARAMS, chunk, state)
                pieces.append(piece)
        outputs.append(jnp.concatenate(pieces))
        states.append(state)
    return jnp.stack(outputs), tuple(jnp.stack(rows, axis=1) for rows in zip(*states, strict=True))


def test_reset_starts_an_episode() -> None:
    reset = np.array([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    x, hx, zeros = _normal(N, T, F), (_normal(2, N, H), _normal(2, N, H + 1)[..., 1:]), (jnp.zeros((2, N, H)),) * 2
    other = jax.tree.map(jnp.cos, hx)
    run = jax.jit(lambda reset, reset_state: jaxrnn.apply(
        ONE_WAY, ONE_WAY_PARAMS, x, hx, reset=reset, reset_state=reset_state
    ))  # fmt: skip
    for ours, state in ((run(reset, None), zeros), (run(reset, other), other)):
        expected = _episodes(x, hx, reset, state)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    unbatched = jaxrnn.apply(ONE_WAY, ONE_WAY_PARAMS, x[1], tuple(a[:, 1] for a in hx), reset=reset[1])
    np.testing.assert_allclose(unbatched[0], run(reset, None)[0][1], rtol=0, atol=1e-15)


def test_a_reset_past_the_end_of_a_row_does_nothing() -> None:
    x, lengths, reset = _normal(N, T, F), [2, 5, 0], np.zeros((N, T), bool)
    plain = jaxrnn.apply(ONE_WAY, ONE_WAY_PARAMS, x, lengths=lengths, reset=reset)
    reset[0, 2:] = reset[2] = True
    jax.tree.map(
        np.testing.assert_array_equal,
        jaxrnn.apply(ONE_WAY, ONE_WAY_PARAMS, x, lengths=lengths, reset=reset),
        plain,
    )


BAD_MARKS = [
    (GRU, {"lengths": [1, 2]}, RuntimeError, r"lengths should have shape \(3,\), one for each row of x, got \(2,\)"),
    (GRU, {"lengths": 3}, RuntimeError, r"lengths should have shape \(3,\)"),
    (GRU, {"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths should be integers, got float64"),
    (GRU, {"lengths": [True, True, True]}, TypeError, "lengths should be integers, got bool"),
    (
        GRU,
        {"lengths": [1, T + 1, 2]},
        ValueError,
        r"lengths should be from 0 to the 5 time steps of x, got \[1, 6, 2\]",
    ),
    (GRU, {"lengths": jnp.array([1, 9, 2])}, ValueError, r"from 0 to the 5 time steps of x, got \[1, 9, 2\]"),
    (GRU, {"lengths": [1, -1, 2]}, ValueError, r"from 0 to the 5 time steps of x, got \[1, -1, 2\]"),
    (LSTM, {"reset": np.zeros((T, N), bool)}, ValueError, "reset is for unidirectional networks"),
    (
        GRU,
        {"reset": np.zeros((N, T), bool)},
        RuntimeError,
        r"reset should have the shape of x .* \(5, 3\), got \(3, 5\)",
    ),
    (GRU, {"reset": np.zeros((T, N))}, TypeError, "reset should be boolean, got float64"),
    (GRU, {"reset_state": np.zeros((1, N, H))}, ValueError, "reset_state needs reset"),
    (
        GRU,
        {"reset": np.zeros((T, N), bool), "reset_state": np.zeros((1, 1, H))},
        RuntimeError,
        r"h_0 of reset_state should have shape \(1, 3, 4\), got \(1, 1, 4\)",
    ),
]


@pytest.mark.parametrize(("spec", "arguments", "error", "message"), BAD_MARKS)
def test_bad_lengths_and_resets(spec: jaxrnn.Spec, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply(spec, PARAMS[spec], _normal(T, N, F), **arguments)


# Half precision: products accumulate, and the state is carried, in float32.

HALF = [
    jaxrnn.Spec(jaxrnn.RNN_TANH, 32, 64, num_layers=2, bidirectional=True),
    jaxrnn.Spec(jaxrnn.LSTM_CELL, 32, 64, num_layers=2, bidirectional=True, proj_size=32),
    jaxrnn.Spec(jaxrnn.GRU_CELL, 32, 64, num_layers=2, bidirectional=True),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", HALF, ids=lambda spec: spec.cell.name)
def test_half_precision_is_one_rounding_from_float64(spec: jaxrnn.Spec, dtype: str) -> None:
    """Results and gradients, each scaled by max(1, its largest), are off by less than eps, 200 steps on."""
    half, eps = jnp.dtype(dtype), float(jnp.finfo(dtype).eps)
    params, x = jax.tree.map(lambda a: a.astype(half), (spec.init(jax.random.key(0)), _normal(200, 4, 32)))

    def run(params: Any, x: Any) -> Any:
        return jax.tree.leaves(jaxrnn.apply(spec, params, x))

    ours, pullback = jax.vjp(run, params, x)
    cotangents = [_normal(*a.shape).astype(half) for a in ours]

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.float64), tree)

    truth, true_pullback = jax.vjp(run, *wide((params, x)))
    pairs = [*zip(ours, truth, strict=True)]
    gradients = pullback(cotangents), true_pullback(wide(cotangents))
    pairs += zip(*(jax.tree.leaves(gradient) for gradient in gradients), strict=True)
    for a, b in pairs:
        assert a.dtype == half
        error = np.max(np.abs(wide(a) - b)) / max(1.0, np.max(np.abs(b)))
        assert error <= eps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_chunk_boundary_costs_one_rounding(dtype: str) -> None:
    """The state inside a call is more precise than what the call returns."""
    spec = HALF[2]
    spec = jaxrnn.Spec(spec.cell, 32, 64)
    params, x = spec.init(jax.random.key(0)), _normal(200, 4, 32).astype(jnp.float32)
    truth = jaxrnn.apply(spec, params, x, dtype=jnp.float64)[1]
    _, whole = jaxrnn.apply(spec, params, x, dtype=dtype)
    _, first = jaxrnn.apply(spec, params, x[:100], dtype=dtype)
    assert first.dtype == whole.dtype == dtype
    _, halves = jaxrnn.apply(spec, params, x[100:], first, dtype=dtype)
    np.testing.assert_allclose(halves.astype(float), whole.astype(float), rtol=0, atol=float(jnp.finfo(dtype).eps))
    state = None
    for t in range(200):
        _, state = jaxrnn.apply(spec, params, x[t : t + 1], state, dtype=dtype)
    error = [np.sqrt(np.mean((np.asarray(a, np.float64) - truth) ** 2)) for a in (whole, state)]
    assert error[0] < error[1]


# Dropout.

DROPOUT = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=3, dropout=0.4, bidirectional=True)
DROPOUT_PARAMS = DROPOUT.init(jax.random.key(0), jnp.float64)


@pytest.mark.torch
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_with_torchs_masks_is_torchs(torch: types.ModuleType, batch_first: bool, p: float) -> None:
    spec = _replace(DROPOUT, batch_first=batch_first, dropout=p)
    module = torch.nn.GRU(F, H, 3, dropout=p, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    module.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in DROPOUT_PARAMS.items()})
    x = _normal(N, T, F) if batch_first else _normal(T, N, F)
    torch.manual_seed(3)
    expected = module(torch.tensor(np.asarray(x)))
    torch.manual_seed(3)
    ones = torch.ones(T, N, 2 * H, dtype=torch.float64)
    masks = [torch.nn.functional.dropout(ones, p).numpy() != 0 for _ in range(2)]
    ours = jaxrnn.apply(spec, DROPOUT_PARAMS, x, dropout_masks=masks)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=1e-12)
    assert not np.allclose(ours[0], jaxrnn.apply(spec, DROPOUT_PARAMS, x)[0])


def test_dropout_from_a_key() -> None:
    x = _normal(T, N, F)
    key = jax.random.key(1)
    plain = jaxrnn.apply(DROPOUT, DROPOUT_PARAMS, x)
    one, again, other = (jaxrnn.apply(DROPOUT, DROPOUT_PARAMS, x, dropout_key=k) for k in (key, key, jax.random.key(2)))
    np.testing.assert_array_equal(one[0], again[0])
    assert not np.allclose(one[0], other[0])
    # The first layer's last states are not dropped.
    np.testing.assert_array_equal(one[1][:2], plain[1][:2])
    assert not np.allclose(one[1][2:], plain[1][2:])


def test_dropout_keeps_the_mean_and_draws_every_step() -> None:
    """A relu layer that copies positive input: what comes out is the mask, scaled."""
    spec = jaxrnn.Spec(jaxrnn.RNN_RELU, 50, 50, num_layers=2, bias=False, dropout=0.25)
    eye, zero = jnp.eye(50), jnp.zeros((50, 50))
    params = {name: eye if "_ih" in name else zero for name in spec.shapes()}
    output, _ = jaxrnn.apply(spec, params, jnp.ones((40, 10, 50)), dropout_key=jax.random.key(0))
    np.testing.assert_allclose(np.unique(output), [0, 4 / 3], rtol=1e-15)
    assert abs(float(output.mean()) - 1) < 5 * np.sqrt(0.25 / 0.75 / output.size)
    assert not np.array_equal(output[0], output[1])


def test_dropout_does_nothing_in_one_layer() -> None:
    with pytest.warns(UserWarning, match="num_layers=1"):
        spec = _replace(GRU, dropout=0.9)
    x = _normal(T, N, F)
    ours = jaxrnn.apply(spec, PARAMS[GRU], x, dropout_key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ours, jaxrnn.apply(GRU, PARAMS[GRU], x))


def test_dropout_masks_of_the_wrong_shape() -> None:
    for masks in ([jnp.ones((T, N, 2 * H))], [jnp.ones((N, T, 2 * H))] * 2):
        with pytest.raises(ValueError, match=r"dropout_masks should be 2 arrays of shape \(5, 3, 8\)"):
            jaxrnn.apply(DROPOUT, DROPOUT_PARAMS, _normal(T, N, F), dropout_masks=masks)


# Bad arguments: torch's exception type where it raises one on purpose, and a message with the name, what was and what
# should be.

BAD_CALLS = [
    (GRU, (jnp.zeros(F),), ValueError, r"x should be 2-D .* or 3-D .*, got shape \(2,\)"),
    (GRU, (jnp.zeros((1, T, N, F)),), ValueError, "x should be 2-D"),
    (GRU, (jnp.zeros((T, N, F + 1)),), RuntimeError, r"input_size=2 features .* got shape \(5, 3, 3\)"),
    (GRU, (jnp.zeros((0, N, F)),), RuntimeError, "at least one time step on axis 0"),
    (_replace(GRU, batch_first=True), (jnp.zeros((N, 0, F)),), RuntimeError, "at least one time step on axis 1"),
    (GRU, (jnp.zeros((T, N, F), jnp.int32),), TypeError, "x should be floating, got int32"),
    (GRU, (jnp.zeros((T, N, F), bool),), TypeError, "x should be floating, got bool"),
    (GRU, (jnp.zeros((T, N, F), jnp.complex64),), TypeError, "x should be floating, got complex64"),
    (GRU, (jnp.zeros((T, N, F)), jnp.zeros((1, N, H + 1))), RuntimeError, r"shape \(1, 3, 4\), got \(1, 3, 5\)"),
    (GRU, (jnp.zeros((T, N, F)), jnp.zeros((1, H))), RuntimeError, r"h_0 of hx should have shape \(1, 3, 4\), got"),
    (GRU, (jnp.zeros((T, F)), jnp.zeros((1, 1, H))), RuntimeError, r"h_0 of hx should have shape \(1, 4\), got"),
    (GRU, (jnp.zeros((T, N, F)), jnp.zeros((1, N, H), int)), TypeError, "h_0 of hx should be floating, got int"),
    (GRU, (jnp.zeros((T, N, F)), (jnp.zeros((1, N, H)),)), TypeError, "hx should be one array h_0, got tuple"),
    (LSTM, (jnp.zeros((T, N, F)), jnp.zeros((4, N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\), got"),
    (LSTM, (jnp.zeros((T, N, F)), (jnp.zeros((4, N, H)),)), TypeError, r"\(h_0, c_0\), got 1 values"),
    (
        LSTM,
        (jnp.zeros((T, N, F)), (jnp.zeros((4, N, H)), jnp.zeros((4, 1, H)))),
        RuntimeError,
        r"c_0 of hx should have shape \(4, 3, 4\), got \(4, 1, 4\)",
    ),
]


@pytest.mark.parametrize(("spec", "arguments", "error", "message"), BAD_CALLS)
def test_bad_calls(spec: jaxrnn.Spec, arguments: tuple, error: type[Exception], message: str) -> None:
    params = spec.init(jax.random.key(0), jnp.float64)
    with pytest.raises(error, match=message):
        jaxrnn.apply(spec, params, *arguments)
    with pytest.raises(error, match=message):  # and no other under jit
        jax.jit(lambda params: jaxrnn.apply(spec, params, *arguments))(params)


@pytest.mark.torch
@pytest.mark.parametrize(("spec", "arguments", "error", "message"), BAD_CALLS)
def test_torch_raises_the_same_for_bad_calls(
    torch: types.ModuleType, spec: jaxrnn.Spec, arguments: tuple, error: type[Exception], message: str
) -> None:
    if error is TypeError:
        return  # dtypes, and the form of hx: torch raises by accident of the value there
    module = getattr(torch.nn, spec.cell.name)(
        F, H, spec.num_layers, batch_first=spec.batch_first, bidirectional=spec.bidirectional, dtype=torch.float64
    )
    with pytest.raises(error):
        module(*jax.tree.map(lambda a: torch.tensor(np.array(a)), arguments))


def test_bad_params() -> None:
    x = _normal(T, N, F)
    params = PARAMS[GRU]
    with pytest.raises(ValueError, match=r"missing \['bias_hh_l0'\], unexpected \['bias'\]"):
        jaxrnn.apply(GRU, {"bias": params["bias_hh_l0"], **{k: v for k, v in params.items() if k != "bias_hh_l0"}}, x)
    with pytest.raises(ValueError, match=r"params\['weight_hh_l0'\] should have shape \(12, 4\), got \(4, 12\)"):
        jaxrnn.apply(GRU, {**params, "weight_hh_l0": params["weight_hh_l0"].T}, x)
    with pytest.raises(TypeError, match=r"params\['bias_ih_l0'\] should be floating, got int32"):
        jaxrnn.apply(GRU, {**params, "bias_ih_l0": jnp.zeros(12, jnp.int32)}, x)


# Cells.

CELL = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, F, H)
CELL_PARAMS = CELL.init(jax.random.key(0), jnp.float64)


def test_a_cell_is_one_step_of_a_layer() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H)
    x, hx = _normal(N, F), (_normal(N, H), _normal(N, H + 1)[:, 1:])
    h, c = jaxrnn.apply_cell(CELL, CELL_PARAMS, x, hx)
    params = {f"{name}_l0": value for name, value in CELL_PARAMS.items()}
    _, (h_n, c_n) = jaxrnn.apply(spec, params, x[None], tuple(a[None] for a in hx))
    np.testing.assert_array_equal(h, h_n[0])
    np.testing.assert_array_equal(c, c_n[0])
    one = jaxrnn.apply_cell(CELL, CELL_PARAMS, x[0], tuple(a[0] for a in hx))
    assert one[0].shape == (H,)
    np.testing.assert_allclose(one[1], c[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.zeros((T, N, F)),), ValueError, "x should be 1-D .* or 2-D"),
        ((jnp.zeros((N, F + 1)),), RuntimeError, "input_size=2"),
        ((jnp.zeros((N, F), jnp.int8),), TypeError, "x should be floating, got int8"),
        ((jnp.zeros((N, F)), jnp.zeros((N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\)"),
        ((jnp.zeros((N, F)), (jnp.zeros((1, H)),) * 2), RuntimeError, r"should have shape \(3, 4\), got \(1, 4\)"),
        ((jnp.zeros(F), (jnp.zeros((1, H)),) * 2), RuntimeError, r"should have shape \(4,\), got \(1, 4\)"),
    ],
)
def test_bad_cell_calls(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply_cell(CELL, CELL_PARAMS, *arguments)


def test_a_cell_of_size_zero() -> None:
    spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 0, 0)
    assert jaxrnn.apply_cell(spec, spec.init(jax.random.key(0)), jnp.zeros((N, 0), jnp.float32)).shape == (N, 0)
