"""One call of the pure functions: layout, order, dtypes, what traces when, and what bad arguments get."""

import dataclasses
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from flax import nnx

import jaxrnn

T, N, F, H = 5, 3, 2, 4  # time, batch, input features, hidden size
LSTM = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, num_layers=2, bidirectional=True)
GRU = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
PARAMS = {spec: parameters(spec) for spec in (LSTM, GRU)}
BATCH_FIRST = dataclasses.replace(LSTM, batch_first=True)


def test_the_order_of_states_and_features() -> None:
    output, (h_n, c_n) = jaxrnn.apply(LSTM, PARAMS[LSTM], normal(T, N, F))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, N, 2 * H), (4, N, H), (4, N, H))
    forward, backward = output[-1, :, :H], output[0, :, H:]
    assert_close({"h_n of the last layer": [*h_n[-2:]]}, {"h_n of the last layer": [forward, backward]}, atol=0)


def test_batch_first_is_of_input_and_output_only() -> None:
    x, hx = normal(T, N, F), (normal(4, N, H), normal(4, N, H))
    output, states = jaxrnn.apply(LSTM, PARAMS[LSTM], x, hx)
    other, other_states = jaxrnn.apply(BATCH_FIRST, PARAMS[LSTM], x.swapaxes(0, 1), hx)
    assert_close(named(LSTM, (other.swapaxes(0, 1), other_states)), named(LSTM, (output, states)), atol=0)


@pytest.mark.parametrize("spec", [LSTM, BATCH_FIRST], ids=["time first", "batch first"])
def test_unbatched_is_a_batch_of_one(spec: jaxrnn.Spec) -> None:
    x, hx = normal(T, F), (normal(4, H), normal(4, H))
    found = jaxrnn.apply(spec, PARAMS[LSTM], x, hx)
    output, states = jaxrnn.apply(LSTM, PARAMS[LSTM], x[:, None], tuple(a[:, None] for a in hx))
    assert_close(named(LSTM, found), named(LSTM, (output[:, 0], [a[:, 0] for a in states])), atol=1e-15)


def test_no_hx_is_zeros_and_a_list_is_a_tuple() -> None:
    x, zeros = normal(T, N, F), np.zeros((4, N, H))
    expected = jaxrnn.apply(LSTM, PARAMS[LSTM], x, (zeros, zeros))
    assert_close(jaxrnn.apply(LSTM, PARAMS[LSTM], x, [zeros, zeros]), expected, atol=0)
    assert_close(jaxrnn.apply(LSTM, PARAMS[LSTM], x), expected, atol=0)


def test_batch_size_zero() -> None:
    def loss(params: dict) -> jax.Array:
        output, (h_n, _) = jaxrnn.apply(LSTM, params, jnp.zeros((T, 0, F)))
        assert (output.shape, h_n.shape) == ((T, 0, 2 * H), (4, 0, H))
        return output.sum()

    assert_close(jax.grad(loss)(PARAMS[LSTM]), {name: np.zeros_like(a) for name, a in PARAMS[LSTM].items()}, atol=0)


def test_numpy_and_jax_arrays_give_the_same() -> None:
    x = normal(T, N, F)
    found = jaxrnn.apply(GRU, PARAMS[GRU], x)
    assert_close(found, jaxrnn.apply(GRU, jax.tree.map(jnp.asarray, PARAMS[GRU]), jnp.asarray(x)), atol=0)


def test_dtype_promotes_or_is_asked_for() -> None:
    x, params = normal(T, N, F), PARAMS[GRU]
    x32, params32 = x.astype(np.float32), parameters(GRU, np.float32)
    with jax.numpy_dtype_promotion("standard"):
        assert jaxrnn.apply(GRU, params32, x32)[0].dtype == jnp.float32
        assert jaxrnn.apply(GRU, params, x32)[0].dtype == jnp.float64
        assert jaxrnn.apply(GRU, params32, x32.astype(jnp.bfloat16))[0].dtype == jnp.float32
    truth = jaxrnn.apply(GRU, params, x)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        output, h_n = jaxrnn.apply(GRU, params, x, dtype=dtype)
        assert (output.dtype, h_n.dtype) == (dtype, dtype)
        assert_close((output, h_n), truth, atol=4 * float(jnp.finfo(dtype).eps))
    with pytest.raises(TypeError, match="dtype should be floating, got int32"):
        jaxrnn.apply(GRU, params, x32, dtype=jnp.int32)


def test_precision_reaches_every_product() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=2)

    def loss(params: dict) -> jax.Array:
        return jaxrnn.apply(spec, params, normal(T, N, F), precision="highest")[0].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(parameters(spec)))
    assert jaxpr.count("dot_general") > 6
    assert jaxpr.count("dot_general") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_an_equal_spec_traces_once() -> None:
    """The step of a cell of one's own is called when it is traced, and only then."""
    traces = []

    def step(gates: tuple, hidden: tuple, state: tuple) -> tuple:
        traces.append(gates[0].shape)
        return (jnp.tanh(gates[0]),)

    cell = jaxrnn.Cell("counted", ("h",), ("h",), step)
    for _ in range(3):
        spec = jaxrnn.Spec(cell, F, H)
        jaxrnn.apply(spec, parameters(spec), normal(T, N, F))
    once = len(traces)
    assert once
    jaxrnn.apply(spec, parameters(spec), normal(T, N, F))
    assert len(traces) == once
    jaxrnn.apply(spec, parameters(spec), normal(T, N + 1, F))
    assert len(traces) > once


@pytest.mark.parametrize("unroll", [2, 99])
def test_unrolled_steps_are_the_same_steps(unroll: int) -> None:
    def run(unroll: int) -> Any:
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(jaxrnn.apply(GRU, p, normal(T, N, F), unroll=unroll)[0])))(
            PARAMS[GRU]
        )

    assert_close(run(unroll), run(1), atol=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unroll": 0}, ValueError, "unroll should be an integer above 0, or None, got 0"),
        ({"remat": "all"}, ValueError, "remat should be 'none', 'gates' or an integer above 0, got 'all'"),
        ({"remat": True}, ValueError, "remat should be .* got True"),
        ({"dtype": int}, TypeError, "dtype should be floating, got int64"),
        ({"rematerialise": 2}, TypeError, r"apply\(\) got an unexpected keyword argument 'rematerialise'"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply(GRU, PARAMS[GRU], ONES, **options)


# Bad arguments: torch's exception type where it raises one on purpose, and a message that names the argument, what it
# was and what it should be.

ONES = np.ones((T, N, F))
TWO = dataclasses.replace(GRU, num_layers=2)
BAD_CALLS = [
    (GRU, (np.zeros(F),), ValueError, r"x should be 2-D .* or 3-D .*, got shape \(2,\)"),
    (GRU, (np.zeros((1, T, N, F)),), ValueError, "x should be 2-D"),
    (GRU, (np.zeros((T, N, F + 1)),), RuntimeError, r"input_size=2 features .* got shape \(5, 3, 3\)"),
    (GRU, (np.zeros((0, N, F)),), RuntimeError, "at least one time step on axis 0"),
    (
        dataclasses.replace(GRU, batch_first=True),
        (np.zeros((N, 0, F)),),
        RuntimeError,
        "at least one time step on axis 1",
    ),
    (GRU, ((ONES, np.zeros((1, N, H))),), TypeError, r"x should be one array, got tuple of length 2: .* give output"),
    (GRU, (ONES.astype(np.int32),), TypeError, "x should be floating, got int32"),
    (GRU, (ONES.astype(bool),), TypeError, "x should be floating, got bool"),
    (GRU, (ONES.astype(np.complex64),), TypeError, "x should be floating, got complex64"),
    (GRU, (ONES, np.zeros((1, N, H + 1))), RuntimeError, r"shape \(1, 3, 4\), got \(1, 3, 5\)"),
    (GRU, (ONES, np.zeros((2, H))), RuntimeError, r"h_0 of hx should have shape \(1, 3, 4\), got"),
    # (batch, hidden_size) would pass for (num_layers, hidden_size) where the numbers agree.
    (TWO, (ONES[:, :2], np.zeros((2, H))), RuntimeError, r"got \(2, 4\): for one state for all rows, \(2, 1, 4\)"),
    (GRU, (np.ones((T, F)), np.zeros((1, 1, H))), RuntimeError, r"h_0 of hx should have shape \(1, 4\), got"),
    (GRU, (ONES, np.zeros((1, N, H), int)), TypeError, "h_0 of hx should be floating, got int"),
    (GRU, (ONES, (np.zeros((1, N, H)),)), TypeError, "hx should be one array h_0, got a tuple"),
    (LSTM, (ONES, np.zeros((4, N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\), got"),
    (
        LSTM,
        (ONES, [(np.zeros((N, H)),) * 2] * 2),
        TypeError,
        r"got a list of 2, the first a tuple of 2\. .* `h, c = map\(jnp.stack, zip",
    ),
    (
        LSTM,
        (ONES, ([np.zeros((N, H))] * 4,) * 2),
        TypeError,
        r"\(4, 3, 4\), \(4, 3, 4\), got a tuple of 2, the first a list of 4",
    ),
    (LSTM, ([np.ones((N, F))] * T,), TypeError, "x should be one array, got list of length 5"),
    (LSTM, (ONES, (np.zeros((4, N, H)),)), TypeError, r"\(h_0, c_0\), got 1 values"),
    (
        LSTM,
        (ONES, (np.zeros((4, N, H)), np.zeros((4, 2, H)))),
        RuntimeError,
        r"c_0 of hx should have shape \(4, 3, 4\), got \(4, 2, 4\)",
    ),
]


@pytest.mark.parametrize(("spec", "arguments", "error", "message"), BAD_CALLS)
def test_bad_calls(spec: jaxrnn.Spec, arguments: tuple, error: type[Exception], message: str) -> None:
    params = parameters(spec)
    with pytest.raises(error, match=message):
        jaxrnn.apply(spec, params, *arguments)
    with pytest.raises(error, match=message):  # and the same under jit
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
        module(*jax.tree.map(torch.tensor, arguments))


def test_how_to_come_from_states_in_pairs() -> None:
    """What the message says."""
    pairs = [(normal(N, H, seed=k), normal(N, H, seed=k + 9)) for k in range(4)]
    with pytest.raises(TypeError, match="from a pair") as caught:
        jaxrnn.apply(LSTM, PARAMS[LSTM], normal(T, N, F), pairs)
    ours, flaxs = re.findall("`(.+?)`", str(caught.value))
    for advice, given in ((ours, pairs), (flaxs, [(c, h) for h, c in pairs])):
        names = {"pairs": given, "jnp": jnp}
        exec(advice, names)
        _, state = jaxrnn.apply(LSTM, PARAMS[LSTM], normal(T, N, F), (names["h"], names["c"]), lengths=[0] * N)
        assert_close(state, [np.stack([pair[k] for pair in pairs]) for k in range(2)], atol=0)


@pytest.mark.parametrize("shape", [(2, 1, H), (H,)], ids=str)
@pytest.mark.parametrize("argument", ["hx", "reset_state"])
def test_one_state_for_all_rows(argument: str, shape: tuple[int, ...]) -> None:
    """As for a learned first state, whose gradient adds up over the rows."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=2)
    params, x, reset = parameters(spec), normal(T, N, F), normal(T, N) > 0
    marks = {"reset": reset} if argument == "reset_state" else {}

    def outputs(state: Any) -> Any:
        return jaxrnn.apply(spec, params, x, **marks, **{argument: state})

    def loss(state: Any) -> jax.Array:
        return jnp.sum(jnp.sin(outputs(state)[0]))

    one = normal(*shape)
    whole = np.broadcast_to(one, (2, N, H))
    found, expected = jax.jit(lambda: [(outputs(a), jax.grad(loss)(a)) for a in (one, whole)])()
    total = np.asarray(expected[1]).sum(1, keepdims=True)
    total = total if len(shape) > 1 else total.sum((0, 1))
    assert_close(found, (expected[0], total))


def test_one_state_for_all_rows_of_a_cell() -> None:
    params, x, one = parameters(CELL), normal(N, F), (normal(H), normal(1, H))
    whole = tuple(np.broadcast_to(a, (N, H)) for a in one)
    assert_close(jaxrnn.apply_cell(CELL, params, x, one), jaxrnn.apply_cell(CELL, params, x, whole), atol=0)
    with pytest.raises(RuntimeError, match=r"should have shape \(4,\), got \(1, 4\)"):  # no rows, no batch of one
        jaxrnn.apply_cell(CELL, params, x[0], (one[0], one[1]))


@pytest.mark.parametrize("kind", [tuple, list, nnx.List], ids=lambda kind: kind.__name__)
def test_a_state_of_several_arrays_is_any_sequence(kind: Any) -> None:
    state = [jnp.asarray(normal(4, N, H, seed=k)) for k in range(2)]
    found = jaxrnn.apply(LSTM, PARAMS[LSTM], normal(T, N, F), kind(state))
    assert_close(found, jaxrnn.apply(LSTM, PARAMS[LSTM], normal(T, N, F), tuple(state)), atol=0)


def test_no_rows() -> None:
    """An empty list has no dtype: it is as good as integers, or as booleans."""
    reset: list = [[] for _ in range(T)]
    output, h_n = jaxrnn.apply(GRU, PARAMS[GRU], np.zeros((T, 0, F)), lengths=[], reset=reset)
    assert output.shape == (T, 0, H)
    assert h_n.shape == (1, 0, H)


def test_bad_params() -> None:
    x, params = normal(T, N, F), PARAMS[GRU]
    with pytest.raises(ValueError, match=r"missing \['bias_hh_l0'\], unexpected \['bias'\]"):
        jaxrnn.apply(GRU, {"bias": params["bias_hh_l0"], **{k: v for k, v in params.items() if k != "bias_hh_l0"}}, x)
    with pytest.raises(ValueError, match=r"params\['weight_hh_l0'\] should have shape \(12, 4\), got \(4, 12\)"):
        jaxrnn.apply(GRU, {**params, "weight_hh_l0": params["weight_hh_l0"].T}, x)
    with pytest.raises(TypeError, match=r"params\['bias_hh_l0'\] should be one array, got list of length 12"):
        jaxrnn.apply(GRU, {**params, "bias_hh_l0": [0.0] * 12}, x)
    with pytest.raises(TypeError, match=r"params\['bias_ih_l0'\] should be floating, got int32"):
        jaxrnn.apply(GRU, {**params, "bias_ih_l0": np.zeros(12, np.int32)}, x)


# One step.

CELL = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, F, H)


def test_a_cell_is_one_step_of_a_layer() -> None:
    spec, params = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H), parameters(CELL)
    x, hx = normal(N, F), (normal(N, H), normal(N, H, seed=1))
    found = jaxrnn.apply_cell(CELL, params, x, hx)
    _, states = jaxrnn.apply(
        spec, {f"{name}_l0": value for name, value in params.items()}, x[None], tuple(a[None] for a in hx)
    )
    assert_close(found, [a[0] for a in states], atol=0)
    alone = jaxrnn.apply_cell(CELL, params, x[0], tuple(a[0] for a in hx))
    assert_close(alone, [a[0] for a in found], atol=1e-15)


def test_a_cell_is_reset_before_its_step() -> None:
    params, x, reset = parameters(CELL), normal(N, F), np.array([True, False, True])
    hx, other = ((normal(N, H, seed=k), normal(N, H, seed=k + 1)) for k in (0, 2))
    for reset_state, state in ((None, (np.zeros((N, H)),) * 2), (other, other)):
        found = jaxrnn.apply_cell(CELL, params, x, hx, reset=reset, reset_state=reset_state)
        before = tuple(np.where(reset[:, None], a, b) for a, b in zip(state, hx, strict=True))
        assert_close(found, jaxrnn.apply_cell(CELL, params, x, before), atol=0)
        row = [a[0] for a in state], [a[0] for a in hx]
        alone = jaxrnn.apply_cell(CELL, params, x[0], row[1], reset=True, reset_state=reset_state and row[0])
        assert_close(alone, [a[0] for a in found], atol=1e-15)
    module = jaxrnn.LSTMCell(F, H, param_dtype=np.float64, rngs=nnx.Rngs(0))
    own = nnx.to_pure_dict(nnx.state(module))
    expected = jaxrnn.apply_cell(CELL, own, x, hx, reset=reset, reset_state=other)
    assert_close(module(x, hx, reset=reset, reset_state=other), expected, atol=0)
    linen = jaxrnn.linen.LSTMCell(F, H)
    assert_close(linen.apply({"params": own}, x, hx, reset=reset, reset_state=other), expected, atol=0)


def test_a_cell_with_zoneout() -> None:
    """Its mean, or with a key a unit of before or of after."""
    spec = jaxrnn.CellSpec(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.25, c=0.75), F, H)
    params, x, hx = parameters(CELL), normal(N, F), (normal(N, H), normal(N, H, seed=1))
    after = jaxrnn.apply_cell(CELL, params, x, hx)
    mean = [p * a + (1 - p) * b for p, a, b in zip((0.25, 0.75), hx, after, strict=True)]
    assert_close(jaxrnn.apply_cell(spec, params, x, hx), mean, atol=1e-15)
    one = jaxrnn.apply_cell(spec, params, x, hx, dropout_key=jax.random.key(0))
    for a, b, found in zip(hx, after, one, strict=True):
        kept = np.asarray(found) == a
        assert np.all(kept | np.isclose(found, b, rtol=0, atol=1e-15))  # another program rounds otherwise
        assert 0 < kept.mean() < 1
    assert_close(jaxrnn.apply_cell(spec, params, x[0], [a[0] for a in hx]), [a[0] for a in mean], atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((T, N, F)),), ValueError, "x should be 1-D .* or 2-D"),
        ((np.zeros((N, F + 1)),), RuntimeError, "input_size=2"),
        ((np.zeros((N, F), np.int8),), TypeError, "x should be floating, got int8"),
        ((np.zeros((N, F)), np.zeros((N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\)"),
        ((np.zeros((N, F)), (np.zeros((2, H)),) * 2), RuntimeError, r"should have shape \(3, 4\), got \(2, 4\)"),
        ((np.zeros((N, F)), (np.zeros((1, N, H)),) * 2), ValueError, r"should have shape \(3, 4\), got \(1, 3, 4\)"),
        ((np.zeros(F), (np.zeros((1, H)),) * 2), RuntimeError, r"should have shape \(4,\), got \(1, 4\)"),
    ],
)
def test_bad_cell_calls(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply_cell(CELL, parameters(CELL), *arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reset": np.zeros(N)}, TypeError, "reset should be boolean, True at the steps to reset before, got float64"),
        ({"reset": True}, RuntimeError, r"reset should have the shape of x without its features, \(3,\), got \(\)"),
        ({"reset_state": (np.zeros((N, H)),) * 2}, ValueError, "reset should be given with reset_state"),
        (
            {"reset": np.zeros(N, bool), "reset_state": (np.zeros((2, H)),) * 2},
            RuntimeError,
            r"h_0 of reset_state should have shape \(3, 4\), got \(2, 4\)",
        ),
    ],
)
def test_bad_resets_of_a_cell(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply_cell(CELL, parameters(CELL), np.zeros((N, F)), **arguments)
    layer = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H)
    with pytest.raises(error, match=message.partition("should have shape")[0]):
        jaxrnn.apply_step(layer, parameters(layer), np.zeros((N, F)), **arguments)


def test_a_cell_of_size_zero() -> None:
    spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 0, 0)
    assert jaxrnn.apply_cell(spec, parameters(spec), np.zeros((N, 0))).shape == (N, 0)
