"""`flip_sequences`: as Flax's and as a loop over rows of torch's; and with it a layer that only runs backward."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import nnx
from flax.nnx.nn.recurrent import flip_sequences
from making import filled

import jaxrnn

T, N, F, H = 5, 4, 3, 4
LENGTHS = [T, 0, 2, 1]


def _data(*shape: int, dtype: str = "float64") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def _valid(output: Any, lengths: list[int], batch_first: bool) -> np.ndarray:
    """The output, with zeros past a row's end."""
    inside = np.arange(T)[:, None] < np.array(lengths)
    return np.asarray(output) * (inside.T if batch_first else inside)[..., None]


@pytest.mark.parametrize("lengths", [None, LENGTHS, np.array(LENGTHS, np.uint8), jnp.array(LENGTHS)], ids=type)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("features", "dtype"), [((), "int32"), ((F,), "bfloat16"), ((2, N), "float64"), ((T,), "uint8")], ids=str
)
def test_the_numbers_are_flaxs(lengths: Any, batch_first: bool, features: tuple[int, ...], dtype: str) -> None:
    """Also in the padding. Twice is no flip."""
    x = _data(*((N, T) if batch_first else (T, N)), *features, dtype=dtype)
    found = jaxrnn.flip_sequences(x, lengths, batch_first=batch_first)
    theirs = flip_sequences(jnp.asarray(x), None if lengths is None else jnp.array(LENGTHS), 1, not batch_first)
    assert found.dtype == dtype
    assert_close(found, theirs, atol=0)
    assert_close(jaxrnn.flip_sequences(found, lengths, batch_first=batch_first), x, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_as_a_loop_over_torchs_rows(torch: types.ModuleType, batch_first: bool) -> None:
    x = normal(N, T, F)
    rows = [torch.tensor(row[:length]).flip(0) for row, length in zip(x, LENGTHS, strict=True)]
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first).numpy()
    found = jaxrnn.flip_sequences(x if batch_first else x.swapaxes(0, 1), LENGTHS, batch_first=batch_first)
    assert_close(_valid(found, LENGTHS, batch_first), expected, atol=0)


def test_one_row() -> None:
    """Its lengths have shape (), and its time is the first axis; without lengths `batch_first` tells."""
    x = _data(T, F)
    for lengths in (3, np.int32(3), jnp.array(3)):
        for batch_first in (False, True):
            found = jaxrnn.flip_sequences(x, lengths, batch_first=batch_first)
            assert_close(found, x[[2, 1, 0, 4, 3]], atol=0)
    assert_close(jaxrnn.flip_sequences(x[:, 0], 3), x[[2, 1, 0, 4, 3], 0], atol=0)
    assert_close(jaxrnn.flip_sequences(x), x[::-1], atol=0)
    assert_close(jaxrnn.flip_sequences(x, batch_first=True), x[:, ::-1], atol=0)
    assert_close(jaxrnn.flip_sequences(x, [2, 1, 0, 1, 2], batch_first=True)[0], x[0, [1, 0, 2]], atol=0)


def test_no_steps_and_no_rows() -> None:
    assert jaxrnn.flip_sequences(np.zeros((0, 3)), [0, 0, 0]).shape == (0, 3)
    assert jaxrnn.flip_sequences(np.zeros((4, 0, 3)), []).shape == (4, 0, 3)


def test_under_jit_lengths_are_data_and_clamped() -> None:
    x, traces = normal(T, N, F), []

    @jax.jit
    def flipped(x: jax.Array, lengths: Any) -> jax.Array:
        traces.append(lengths)
        return jaxrnn.flip_sequences(x, lengths)

    for lengths in (LENGTHS, [1, 2, 3, 4]):
        assert_close(flipped(x, jnp.array(lengths)), jaxrnn.flip_sequences(x, lengths), atol=0)
    assert_close(flipped(x, jnp.array([9, -7, T, 0])), jaxrnn.flip_sequences(x, [T, 0, T, 0]), atol=0)
    assert len(traces) == 1
    each = [jnp.array(length) for length in LENGTHS]  # numbers in a list, of which some are traced
    assert_close(jax.jit(jaxrnn.flip_sequences)(x, each), jaxrnn.flip_sequences(x, LENGTHS), atol=0)


def test_under_vmap_and_grad() -> None:
    """Mapped over rows, it is as without; the gradient is the cotangent, flipped."""
    x, weights = normal(T, N, F), normal(T, N, F, seed=1)
    rows = jax.vmap(jaxrnn.flip_sequences, (1, 0), 1)(x, jnp.array(LENGTHS))
    assert_close(rows, jaxrnn.flip_sequences(x, LENGTHS), atol=0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jaxrnn.flip_sequences(x, LENGTHS) * weights)))(x)
    assert_close(gradient, jaxrnn.flip_sequences(weights, LENGTHS), atol=0)


X = normal(T, N, F)
PACKED = jaxrnn.pack_padded_sequence(X, [5, 4, 2, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxrnn.flip_sequences(X, [6, 1, 1, 1]), ValueError, r"from 0 to 5, the time steps of x, got \[6, 1"),
        (lambda: jaxrnn.flip_sequences(X, [5, 1, 1, -1]), ValueError, "lengths should be from 0 to 5"),
        (lambda: jaxrnn.flip_sequences(X, [5] * 5, batch_first=True), ValueError, "lengths should be from 0 to 4"),
        (lambda: jaxrnn.flip_sequences(X, 6), ValueError, "lengths should be from 0 to 5, the .* got 6"),
        (lambda: jaxrnn.flip_sequences(X, [5.0] * 4), TypeError, "lengths should be integers, got float64"),
        (lambda: jaxrnn.flip_sequences(X, [True] * 4), TypeError, "lengths should be integers, got bool"),
        (lambda: jaxrnn.flip_sequences(X, [5] * 3), RuntimeError, r"shape \(4,\), one for each row of x, got \(3,\)"),
        (lambda: jaxrnn.flip_sequences(X, [[5] * 4]), RuntimeError, r"lengths should have shape \(4,\)"),
        (lambda: jaxrnn.flip_sequences(X[:, 0, 0], [5]), RuntimeError, r"x should have two axes .*, got shape \(5,\)"),
        (lambda: jaxrnn.flip_sequences(X[0, 0], batch_first=True), RuntimeError, "x should have two axes at least"),
        (lambda: jaxrnn.flip_sequences(X[0, 0, 0]), RuntimeError, r"x should have an axis for time, got shape \(\)"),
        (lambda: jaxrnn.flip_sequences([X, X]), TypeError, "got list: give padded rows, as jaxrnn.pad_sequence"),
        (lambda: jaxrnn.flip_sequences(PACKED), TypeError, "got PackedSequence: .* jaxrnn.pad_packed_sequence"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# A layer that only runs backward: its input is flipped, and its output flipped back.


def _backward(layer: Any, x: Any, lengths: Any) -> Any:
    """The two lines of the guide."""
    flipped, state = layer(jaxrnn.flip_sequences(x, lengths, batch_first=layer.batch_first), lengths=lengths)
    return jaxrnn.flip_sequences(flipped, lengths, batch_first=layer.batch_first), state


@pytest.mark.parametrize("batch_first", [False, True])
def test_backward_alone_is_the_backward_half_of_torchs(torch: types.ModuleType, batch_first: bool) -> None:
    theirs = torch.nn.LSTM(F, H, batch_first=batch_first, bidirectional=True, dtype=torch.float64)
    lstm = jaxrnn.LSTM(F, H, batch_first=batch_first, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    weights = {name: value for name, value in theirs.state_dict().items() if name.endswith("_reverse")}
    jaxrnn.load_state_dict(lstm, {name.removesuffix("_reverse"): value for name, value in weights.items()})
    lengths = [T, 3, 2, 1]
    x = normal(*((N, T) if batch_first else (T, N)), F)
    rnn = torch.nn.utils.rnn
    packed = rnn.pack_padded_sequence(torch.tensor(x), lengths, batch_first)
    output, (h_n, c_n) = theirs(packed)
    output, _ = rnn.pad_packed_sequence(output, batch_first)
    expected = [a.detach().numpy() for a in (output[..., H:], h_n[1:], c_n[1:])]
    found, (h_n, c_n) = _backward(lstm, x, lengths)
    assert_close([found, h_n, c_n], expected)


@pytest.mark.parametrize("lengths", [None, [T, 3, 2, 1]], ids=["whole", "ragged"])
def test_backward_alone_is_flaxs_with_reverse_and_keep_order(lengths: Any) -> None:
    cell = filled(lambda: nnx.LSTMCell(F, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = normal(N, T, F)
    given = None if lengths is None else jnp.array(lengths)
    (c_n, h_n), expected = nnx.RNN(cell, reverse=True, keep_order=True, return_carry=True)(x, seq_lengths=given)
    output, state = _backward(jaxrnn.from_flax(nnx.RNN(cell)), x, lengths)
    assert_close(*(_valid(each, lengths or [T] * N, True) for each in (output, expected)))
    assert_close([a[0] for a in state], [h_n, c_n])
