"""The whole call: layout, order, dropout, dtypes, what compiles when, and what bad arguments get."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import recurrence

T, N, I, H = 5, 3, 2, 4  # noqa: E741 - the field's names for time, batch, input and hidden size
LSTM = jaxrnn.Spec(jaxrnn.LSTM_CELL, I, H, num_layers=2, bidirectional=True)
GRU = jaxrnn.Spec(jaxrnn.GRU_CELL, I, H)
PARAMS = {spec: spec.init(jax.random.key(0), jnp.float64) for spec in (LSTM, GRU)}


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(sum(shape)).randn(*shape))


def _replace(spec: jaxrnn.Spec, **changes: Any) -> jaxrnn.Spec:
    return jaxrnn.Spec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes})


def test_the_order_of_states_and_features() -> None:
    output, (h_n, c_n) = jaxrnn.apply(LSTM, PARAMS[LSTM], _normal(T, N, I))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, N, 2 * H), (4, N, H), (4, N, H))
    np.testing.assert_array_equal(h_n[-2], output[-1, :, :H])
    np.testing.assert_array_equal(h_n[-1], output[0, :, H:])


def test_batch_first_turns_input_and_output_only() -> None:
    x, hx = _normal(T, N, I), (_normal(4, N, H), _normal(4, N, H))
    output, states = jaxrnn.apply(LSTM, PARAMS[LSTM], x, hx)
    turned, turned_states = jaxrnn.apply(_replace(LSTM, batch_first=True), PARAMS[LSTM], x.swapaxes(0, 1), hx)
    np.testing.assert_array_equal(turned.swapaxes(0, 1), output)
    for a, b in zip(states, turned_states, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_is_a_batch_of_one(batch_first: bool) -> None:
    spec = _replace(LSTM, batch_first=batch_first)
    x, hx = _normal(T, I), (_normal(4, H), _normal(4, H))
    output, (h_n, c_n) = jaxrnn.apply(spec, PARAMS[LSTM], x, hx)
    assert (output.shape, h_n.shape, c_n.shape) == ((T, 2 * H), (4, H), (4, H))
    batched, _ = jaxrnn.apply(LSTM, PARAMS[LSTM], x[:, None], tuple(a[:, None] for a in hx))
    np.testing.assert_allclose(output, batched[:, 0], rtol=0, atol=1e-15)


def test_no_hx_is_zeros_and_a_list_is_a_tuple() -> None:
    x, zeros = _normal(T, N, I), jnp.zeros((4, N, H))
    for hx in ((zeros, zeros), [zeros, zeros]):
        ours = jaxrnn.apply(LSTM, PARAMS[LSTM], x, hx)
        jax.tree.map(np.testing.assert_array_equal, jaxrnn.apply(LSTM, PARAMS[LSTM], x), ours)


def test_batch_size_zero() -> None:
    def loss(params: dict) -> jax.Array:
        output, (h_n, _) = jaxrnn.apply(LSTM, params, jnp.zeros((T, 0, I)))
        assert (output.shape, h_n.shape) == ((T, 0, 2 * H), (4, 0, H))
        return output.sum()

    assert all(np.all(np.asarray(g) == 0) for g in jax.grad(loss)(PARAMS[LSTM]).values())


def test_plain_dicts_of_numpy_arrays_do() -> None:
    params = {name: np.asarray(value) for name, value in PARAMS[GRU].items()}
    x = np.random.RandomState(0).randn(T, N, I)
    jax.tree.map(
        np.testing.assert_array_equal, jaxrnn.apply(GRU, params, x), jaxrnn.apply(GRU, PARAMS[GRU], jnp.asarray(x))
    )


def test_dtype_promotes_or_is_asked_for() -> None:
    x32, params32 = _normal(T, N, I).astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), PARAMS[GRU])
    with jax.numpy_dtype_promotion("standard"):
        assert jaxrnn.apply(GRU, params32, x32)[0].dtype == jnp.float32
        assert jaxrnn.apply(GRU, PARAMS[GRU], x32)[0].dtype == jnp.float64
        assert jaxrnn.apply(GRU, params32, x32.astype(jnp.bfloat16))[0].dtype == jnp.float32
    truth, _ = jaxrnn.apply(GRU, PARAMS[GRU], _normal(T, N, I))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        output, h_n = jaxrnn.apply(GRU, PARAMS[GRU], x32, dtype=dtype)
        assert output.dtype == h_n.dtype == dtype
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(output, np.float64), truth, rtol=0, atol=tolerance)
    with pytest.raises(TypeError, match="dtype should be floating, got int32"):
        jaxrnn.apply(GRU, PARAMS[GRU], x32, dtype=jnp.int32)


def test_precision_reaches_every_product() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, I, H, proj_size=2)

    def loss(params: dict) -> jax.Array:
        return jaxrnn.apply(spec, params, _normal(T, N, I), precision="highest")[0].sum()

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
        jaxrnn.apply(jaxrnn.Spec(jaxrnn.GRU_CELL, I, 7), params, _normal(T, N, I))
    assert len(traces) == 1
    jaxrnn.apply(spec, params, _normal(T + 1, N, I))
    assert len(traces) == 2


# Dropout.

DROPOUT = jaxrnn.Spec(jaxrnn.GRU_CELL, I, H, num_layers=3, dropout=0.4, bidirectional=True)
DROPOUT_PARAMS = DROPOUT.init(jax.random.key(0), jnp.float64)


@pytest.mark.torch
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_with_torchs_masks_is_torchs(torch: types.ModuleType, batch_first: bool, p: float) -> None:
    spec = _replace(DROPOUT, batch_first=batch_first, dropout=p)
    module = torch.nn.GRU(I, H, 3, dropout=p, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    module.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in DROPOUT_PARAMS.items()})
    x = _normal(N, T, I) if batch_first else _normal(T, N, I)
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
    x = _normal(T, N, I)
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
    x = _normal(T, N, I)
    ours = jaxrnn.apply(spec, PARAMS[GRU], x, dropout_key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ours, jaxrnn.apply(GRU, PARAMS[GRU], x))


def test_dropout_masks_of_the_wrong_shape() -> None:
    for masks in ([jnp.ones((T, N, 2 * H))], [jnp.ones((N, T, 2 * H))] * 2):
        with pytest.raises(ValueError, match=r"dropout_masks should be 2 arrays of shape \(5, 3, 8\)"):
            jaxrnn.apply(DROPOUT, DROPOUT_PARAMS, _normal(T, N, I), dropout_masks=masks)


# Bad arguments: torch's exception type where it raises one on purpose, and a message with the name, what was and what
# should be.

BAD_CALLS = [
    (GRU, (jnp.zeros(I),), ValueError, r"x should be 2-D .* or 3-D .*, got shape \(2,\)"),
    (GRU, (jnp.zeros((1, T, N, I)),), ValueError, "x should be 2-D"),
    (GRU, (jnp.zeros((T, N, I + 1)),), RuntimeError, r"input_size=2 features .* got shape \(5, 3, 3\)"),
    (GRU, (jnp.zeros((0, N, I)),), RuntimeError, "at least one time step on axis 0"),
    (_replace(GRU, batch_first=True), (jnp.zeros((N, 0, I)),), RuntimeError, "at least one time step on axis 1"),
    (GRU, (jnp.zeros((T, N, I), jnp.int32),), TypeError, "x should be floating, got int32"),
    (GRU, (jnp.zeros((T, N, I), bool),), TypeError, "x should be floating, got bool"),
    (GRU, (jnp.zeros((T, N, I), jnp.complex64),), TypeError, "x should be floating, got complex64"),
    (GRU, (jnp.zeros((T, N, I)), jnp.zeros((1, N, H + 1))), RuntimeError, r"shape \(1, 3, 4\), got \(1, 3, 5\)"),
    (GRU, (jnp.zeros((T, N, I)), jnp.zeros((1, H))), RuntimeError, r"h_0 of hx should have shape \(1, 3, 4\), got"),
    (GRU, (jnp.zeros((T, I)), jnp.zeros((1, 1, H))), RuntimeError, r"h_0 of hx should have shape \(1, 4\), got"),
    (GRU, (jnp.zeros((T, N, I)), jnp.zeros((1, N, H), int)), TypeError, "h_0 of hx should be floating, got int"),
    (GRU, (jnp.zeros((T, N, I)), (jnp.zeros((1, N, H)),)), TypeError, "hx should be one array h_0, got tuple"),
    (LSTM, (jnp.zeros((T, N, I)), jnp.zeros((4, N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\), got"),
    (LSTM, (jnp.zeros((T, N, I)), (jnp.zeros((4, N, H)),)), TypeError, r"\(h_0, c_0\), got 1 values"),
    (
        LSTM,
        (jnp.zeros((T, N, I)), (jnp.zeros((4, N, H)), jnp.zeros((4, 1, H)))),
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
        I, H, spec.num_layers, batch_first=spec.batch_first, bidirectional=spec.bidirectional, dtype=torch.float64
    )
    with pytest.raises(error):
        module(*jax.tree.map(lambda a: torch.tensor(np.array(a)), arguments))


def test_bad_params() -> None:
    x = _normal(T, N, I)
    params = PARAMS[GRU]
    with pytest.raises(ValueError, match=r"missing \['bias_hh_l0'\], unexpected \['bias'\]"):
        jaxrnn.apply(GRU, {"bias": params["bias_hh_l0"], **{k: v for k, v in params.items() if k != "bias_hh_l0"}}, x)
    with pytest.raises(ValueError, match=r"params\['weight_hh_l0'\] should have shape \(12, 4\), got \(4, 12\)"):
        jaxrnn.apply(GRU, {**params, "weight_hh_l0": params["weight_hh_l0"].T}, x)
    with pytest.raises(TypeError, match=r"params\['bias_ih_l0'\] should be floating, got int32"):
        jaxrnn.apply(GRU, {**params, "bias_ih_l0": jnp.zeros(12, jnp.int32)}, x)


# Cells.

CELL = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, I, H)
CELL_PARAMS = CELL.init(jax.random.key(0), jnp.float64)


def test_a_cell_is_one_step_of_a_layer() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, I, H)
    x, hx = _normal(N, I), (_normal(N, H), _normal(N, H + 1)[:, 1:])
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
        ((jnp.zeros((T, N, I)),), ValueError, "x should be 1-D .* or 2-D"),
        ((jnp.zeros((N, I + 1)),), RuntimeError, "input_size=2"),
        ((jnp.zeros((N, I), jnp.int8),), TypeError, "x should be floating, got int8"),
        ((jnp.zeros((N, I)), jnp.zeros((N, H))), TypeError, r"hx should be a tuple \(h_0, c_0\)"),
        ((jnp.zeros((N, I)), (jnp.zeros((1, H)),) * 2), RuntimeError, r"should have shape \(3, 4\), got \(1, 4\)"),
        ((jnp.zeros(I), (jnp.zeros((1, H)),) * 2), RuntimeError, r"should have shape \(4,\), got \(1, 4\)"),
    ],
)
def test_bad_cell_calls(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply_cell(CELL, CELL_PARAMS, *arguments)


def test_a_cell_of_size_zero() -> None:
    spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 0, 0)
    assert jaxrnn.apply_cell(spec, spec.init(jax.random.key(0)), jnp.zeros((N, 0), jnp.float32)).shape == (N, 0)
