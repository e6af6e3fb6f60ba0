"""Packing against a live torch's, on inputs that hypothesis makes; through jit and grad; in every layer; bad input."""

import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import parameters
from comparing import assert_close
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from making import filled

import jaxrnn

LENGTHS = [2, 5, 1, 3]
DTYPES = ["float64", "float32", "float16", "int32", "int64", "uint8", "bool"]


def _data(*shape: int, dtype: str = "float64") -> np.ndarray:
    numbers = np.random.RandomState(sum(shape)).randint(-100, 100, shape) / 4
    return numbers.astype(dtype)


# NumPy's arrays, JAX's, or both in turns: they take different ways.
KINDS: dict[str, list[Callable]] = {"NumPy": [np.asarray], "JAX": [jnp.asarray], "both": [jnp.asarray, np.asarray]}


def _of_kind(kind: str, rows: list[np.ndarray]) -> list[Any]:
    kinds = KINDS[kind]
    return [kinds[index % len(kinds)](row) for index, row in enumerate(rows)]


def _assert_same(found: Any, expected: Any) -> None:
    """The same numbers and dtypes."""
    assert jax.tree.map(lambda a: str(a.dtype), found) == jax.tree.map(lambda a: str(a.dtype), expected)
    assert_close(found, expected, atol=0)


def _assert_same_pack(ours: jaxrnn.PackedSequence, theirs: Any) -> None:
    """Field by field: values, dtype, and None where torch has None."""
    assert ours._fields == theirs._fields
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if b is None:
            assert a is None, name
        else:
            _assert_same({name: a}, {name: b.numpy()})


def _rows(draw: Any, distinct: bool) -> tuple[list[int], tuple[int, ...], str]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6, unique=distinct))
    trailing = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    return lengths, trailing, draw(st.sampled_from(DTYPES))


# With distinct lengths every field is exact; torch's sort is unstable, so that ties are compared after unpacking.


def _pack_and_pad(torch: types.ModuleType, draw: Any, kind: str) -> None:
    enforce_sorted, batch_first, padding_first = (draw(st.booleans()) for _ in range(3))
    lengths, trailing, dtype = _rows(draw, distinct=not enforce_sorted)
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    steps = max(lengths) + draw(st.integers(0, 2))
    x = _data(*((len(lengths), steps) if batch_first else (steps, len(lengths))), *trailing, dtype=dtype)
    rnn = torch.nn.utils.rnn
    theirs = rnn.pack_padded_sequence(torch.tensor(x), torch.tensor(lengths), batch_first, enforce_sorted)
    ours = jaxrnn.pack_padded_sequence(
        *_of_kind(kind, [x]), draw(st.sampled_from([lengths, np.array(lengths)])), batch_first, enforce_sorted
    )
    _assert_same_pack(ours, theirs)

    total = draw(st.sampled_from([None, max(lengths), max(lengths) + 3]))
    value = draw(st.sampled_from([0, 1, 7.0] if dtype != "bool" else [0, 1]))
    for got, expected in zip(
        jaxrnn.pad_packed_sequence(ours, padding_first, value, total),
        rnn.pad_packed_sequence(theirs, padding_first, value, total),
        strict=True,
    ):
        _assert_same(got, expected.numpy())


def _sequences(torch: types.ModuleType, draw: Any, kind: str) -> None:
    lengths, trailing, dtype = _rows(draw, distinct=False)
    rows = _of_kind(kind, [_data(length, *trailing, dtype=dtype) for length in lengths])
    tensors, rnn = [torch.tensor(np.asarray(row)) for row in rows], torch.nn.utils.rnn
    batch_first, side = draw(st.booleans()), draw(st.sampled_from(["left", "right"]))
    padded = jaxrnn.pad_sequence(rows, batch_first, 3, side)
    _assert_same(padded, rnn.pad_sequence(tensors, batch_first, 3, side).numpy())

    (padded,) = _of_kind(kind, [jaxrnn.pad_sequence(rows, batch_first)])
    for got, row in zip(jaxrnn.unpad_sequence(padded, lengths, batch_first), rows, strict=True):
        _assert_same(got, row)

    packed = jaxrnn.pack_sequence(rows, enforce_sorted=False)
    theirs = rnn.pack_sequence(tensors, enforce_sorted=False)
    _assert_same(packed.batch_sizes, theirs.batch_sizes.numpy())
    for got, expected, row in zip(jaxrnn.unpack_sequence(packed), rnn.unpack_sequence(theirs), rows, strict=True):
        _assert_same(got, expected.numpy())
        _assert_same(got, row)
    if lengths == sorted(lengths, reverse=True):
        _assert_same_pack(jaxrnn.pack_sequence(rows), rnn.pack_sequence(tensors))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "percent"),
    [  # each new shape of JAX's compiles
        ("NumPy", 6),
        ("JAX", 2),
        ("both", 2),
        pytest.param("NumPy", 20, marks=pytest.mark.slow),
        pytest.param("JAX", 5, marks=pytest.mark.slow),
        pytest.param("both", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("check", [_pack_and_pad, _sequences])
def test_packing_is_torchs(torch: types.ModuleType, check: Callable, kind: str, percent: int) -> None:
    @settings(max_examples=settings.default.max_examples * percent // 100)
    @given(st.data())
    def on_random_rows(data: Any) -> None:
        check(torch, data.draw, kind)

    on_random_rows()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_nothing_is_compiled_for_numpys_rows(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    lengths = [3, 8, 5]
    rows, padded = [kind(_data(length, 7)) for length in lengths], kind(_data(9, 3, 7))
    for function in (
        lambda: jaxrnn.pad_sequence(rows),
        lambda: jaxrnn.pack_sequence(rows, enforce_sorted=False),
        lambda: jaxrnn.pack_padded_sequence(padded, lengths, enforce_sorted=False),
        lambda: jaxrnn.unpad_sequence(padded, lengths),
    ):
        caplog.clear()
        with jax.log_compiles():
            function()
        compiled = [record.message for record in caplog.records if record.message.startswith("Compiling")]
        assert bool(compiled) == (kind is jnp.asarray), compiled


def test_rows_of_several_dtypes_promote_as_in_jax() -> None:
    rows = [_data(2, dtype="float16"), _data(3, dtype="int32")]  # NumPy would make them float64
    with jax.numpy_dtype_promotion("standard"):
        padded = jaxrnn.pad_sequence(rows)
    assert padded.dtype == jnp.float16
    assert_close(padded[:, 1], rows[1], atol=0)


def test_a_packed_sequence_is_a_tuple_as_torchs() -> None:
    packed = jaxrnn.pack_padded_sequence(_data(5, 4, 2), LENGTHS, enforce_sorted=False)
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    assert data is packed.data is packed[0]
    again = jaxrnn.PackedSequence(data, batch_sizes, sorted_indices)
    assert_close(again.unsorted_indices, unsorted_indices, atol=0)
    doubled = packed._replace(data=2 * packed.data)
    assert isinstance(doubled, jaxrnn.PackedSequence)
    assert_close(doubled.data, 2 * np.asarray(data), atol=0)
    assert jaxrnn.pack_padded_sequence(_data(5, 2), [4, 2]).sorted_indices is None
    for field in packed[1:]:
        with pytest.raises(ValueError, match="read-only"):
            field[0] = 9


def test_a_pytree_with_one_leaf() -> None:
    packed = jaxrnn.pack_padded_sequence(_data(5, 4, 2), LENGTHS, enforce_sorted=False)
    (leaf,) = jax.tree.leaves(packed)
    assert leaf is packed.data
    ((path, _),) = jax.tree_util.tree_leaves_with_path(packed)
    assert jax.tree_util.keystr(path) == ".data"
    halved = jax.tree.map(lambda a: a / 2, packed)
    assert isinstance(halved, jaxrnn.PackedSequence)
    _assert_same(halved.batch_sizes, packed.batch_sizes)
    assert jax.tree.structure(packed) == jax.tree.structure(halved)
    assert hash(jax.tree.structure(packed)) == hash(jax.tree.structure(halved))
    other = jaxrnn.pack_padded_sequence(_data(5, 4, 2), LENGTHS[::-1], enforce_sorted=False)
    assert jax.tree.structure(packed) != jax.tree.structure(other)
    assert jax.eval_shape(lambda p: p, packed).data.shape == (11, 2)


def test_in_and_out_of_jit_with_a_trace_for_each_pattern() -> None:
    traces = []

    @jax.jit
    def double(packed: jaxrnn.PackedSequence) -> jaxrnn.PackedSequence:
        traces.append(packed.batch_sizes.tolist())
        return jax.tree.map(lambda a: 2 * a, packed)

    for lengths in (LENGTHS, LENGTHS, [5, 2, 3, 1], [5, 2, 3, 1]):
        packed = jaxrnn.pack_padded_sequence(_data(5, 4, 2), lengths, enforce_sorted=False)
        doubled = double(packed)
        assert_close(doubled.data, 2 * np.asarray(packed.data), atol=0)
        assert_close(doubled.sorted_indices, packed.sorted_indices, atol=0)
    assert len(traces) == 2


def test_padding_does_not_come_through_values_or_gradients() -> None:
    ended = np.arange(5)[:, None] >= LENGTHS
    x = np.where(ended[..., None], np.nan, _data(5, 4, 2))

    @jax.jit
    @jax.value_and_grad
    def loss(x: jax.Array) -> jax.Array:
        packed = jaxrnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        padded, _ = jaxrnn.pad_packed_sequence(packed, total_length=7, padding_value=np.nan)
        return jnp.nansum(padded**2) + (packed.data**2).sum()

    value, gradient = loss(x)
    assert_close(value, 2 * np.nansum(x**2), atol=0, rtol=1e-15)
    assert_close(gradient, np.where(ended[..., None], 0, 4 * x), atol=0)


def test_works_with_32_bits_only() -> None:
    with jax.enable_x64(False):
        packed = jaxrnn.pack_sequence([_data(2, 3), _data(4, 3)], enforce_sorted=False)
        padded, lengths = jaxrnn.pad_packed_sequence(packed)
        assert (packed.data.dtype, padded.dtype) == ("float32", "float32")
        assert packed.batch_sizes.dtype == lengths.dtype == np.int64


# In the layers. That they give what torch gives is in the parity table.


@pytest.mark.parametrize(
    ("batch_first", "enforce_sorted"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_a_layer_takes_one_and_returns_one(batch_first: bool, enforce_sorted: bool) -> None:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    settings = {"num_layers": 2, "batch_first": batch_first, "bidirectional": True, "proj_size": 3}
    lstm = filled(lambda: jaxrnn.LSTM(2, 4, **settings, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = _data(5, 4, 2)
    hx = (_data(4, 4, 3), _data(4, 4, 4))
    packed, states = lstm(jaxrnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
    assert isinstance(packed, jaxrnn.PackedSequence)
    assert (packed.sorted_indices is None) == enforce_sorted
    output, found = jaxrnn.pad_packed_sequence(packed, batch_first)
    assert_close(found, np.array(lengths), atol=0)
    x = x.swapaxes(0, 1) if batch_first else x
    expected, expected_states = lstm(x, hx, lengths=lengths)
    assert_close(output, expected, atol=0)
    assert_close(states, expected_states, atol=0)


def test_no_more_steps_than_the_longest_row_and_one_trace_for_its_patterns(caplog: pytest.LogCaptureFixture) -> None:
    gru = filled(lambda: jaxrnn.GRU(2, 11, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))  # a size met nowhere else
    packs = [
        jaxrnn.pack_padded_sequence(_data(9, 4, 2), lengths, enforce_sorted=False)
        for lengths in ([2, 5, 1, 3], [5, 4, 3, 2], [1, 5, 1, 1])
    ]
    assert set(re.findall(r"length=(\d+)", str(jax.make_jaxpr(gru)(packs[0])))) == {"5"}
    caplog.clear()
    with jax.log_compiles():
        for packed in packs:
            gru(packed)
    compiled = [record.message for record in caplog.records if record.message.startswith("Compiling")]
    assert sum(message.startswith("Compiling jit(_run_layers)") for message in compiled) == 1, compiled


def test_dropout_masks_and_resets_are_laid_out_as_the_data() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 4, num_layers=2, dropout=0.5, batch_first=True)
    random = np.random.RandomState(0)
    params = parameters(spec)
    mask, reset = random.rand(4, 5, 4) > 0.5, random.rand(4, 5) > 0.5

    def pack(a: np.ndarray) -> jaxrnn.PackedSequence:
        return jaxrnn.pack_padded_sequence(a, LENGTHS, True, enforce_sorted=False)

    packed, h_n = jaxrnn.apply(
        spec, params, pack(_data(4, 5, 2)), dropout_masks=[pack(mask).data], reset=pack(reset).data
    )
    expected, expected_h_n = jaxrnn.apply(
        spec, params, _data(4, 5, 2), lengths=LENGTHS, dropout_masks=[mask.swapaxes(0, 1)], reset=reset
    )
    assert_close(packed.data, pack(expected).data, atol=0)
    assert_close(h_n, expected_h_n, atol=0)


def test_through_nnx_jit_and_grad() -> None:
    gru = filled(lambda: jaxrnn.GRU(2, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    packed = jaxrnn.pack_padded_sequence(_data(5, 4, 2), LENGTHS, enforce_sorted=False)
    output, _ = nnx.jit(lambda gru, packed: gru(packed))(gru, packed)
    assert_close(output.data, gru(packed)[0].data, atol=1e-15)
    gradient = jax.grad(lambda packed: (gru(packed)[0].data ** 2).sum())(packed)
    assert isinstance(gradient, jaxrnn.PackedSequence)
    assert np.all(np.any(np.asarray(gradient.data) != 0, axis=1))


# Bad input.

X = _data(5, 3, 2)
BAD = [
    (lambda r, x: r.pack_padded_sequence(x, [2, 0, 1], enforce_sorted=False), RuntimeError, r"1 or more, got \[2, 0"),
    (lambda r, x: r.pack_padded_sequence(x, [2, 1, -1]), RuntimeError, "lengths should be 1 or more"),
    (lambda r, x: r.pack_padded_sequence(x, [2, 1]), RuntimeError, "lengths should be 3, one for each row, got 2"),
    (lambda r, x: r.pack_padded_sequence(x, [[2, 1, 1]]), RuntimeError, r"one axis, got shape \(1, 3\)"),
    (lambda r, x: r.pack_padded_sequence(x, [1, 2, 3]), RuntimeError, r"got \[1, 2, 3\].*enforce_sorted=False"),
    (lambda r, x: r.pack_padded_sequence(x[:, :0], []), RuntimeError, "at least one row and one step"),
    (lambda r, x: r.pack_padded_sequence(x[:0], [1, 1, 1]), RuntimeError, "at least one row and one step"),
    (lambda r, x: r.pack_sequence([]), RuntimeError, "sequences should have at least one row, got none"),
    (lambda r, x: r.pad_sequence([]), RuntimeError, "sequences should have at least one row, got none"),
    (lambda r, x: r.pad_sequence(3), RuntimeError, "sequences should be a list of rows, got int"),
    (lambda r, x: r.pad_sequence([x, x[:, :2]]), RuntimeError, "equal shapes except for the first axis"),
    (lambda r, x: r.pad_sequence([x], padding_side="up"), RuntimeError, "'right' or 'left', got 'up'"),
    (lambda r, x: r.pack_sequence([x[:2], x]), RuntimeError, "enforce_sorted=False"),
    (
        lambda r, x: r.pad_packed_sequence(r.pack_padded_sequence(x, [4, 2, 1]), total_length=3),
        ValueError,
        "total_length should be at least 4, .* got 3",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(jaxrnn, jnp.asarray(X))


@pytest.mark.torch
@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_torch_raises_the_same_type(torch: types.ModuleType, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error):
        call(torch.nn.utils.rnn, torch.tensor(X))


PACKED = jaxrnn.pack_padded_sequence(X, [4, 2, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # torch builds a broken pack, takes what is no integer, or fails by accident.
        (lambda: jaxrnn.pack_padded_sequence(X, [6, 2, 1]), ValueError, r"the 5 time steps .*, got \[6, 2, 1\]"),
        (lambda: jaxrnn.pack_padded_sequence(X, [2.5, 2, 1]), TypeError, "lengths should be integers, got float64"),
        (lambda: jaxrnn.pack_padded_sequence(X, [True] * 3), TypeError, "lengths should be integers, got bool"),
        (lambda: jaxrnn.pack_padded_sequence(X[0, 0], [1]), RuntimeError, r"input should have two axes.*\(2,\)"),
        (lambda: jaxrnn.unpad_sequence(X[0, 0], [1]), RuntimeError, "padded_sequences should have two axes"),
        (lambda: jaxrnn.unpad_sequence(X, [1, 2]), ValueError, "lengths should be 3, one for each row, got 2"),
        (lambda: jaxrnn.unpad_sequence(X, [1, 2, -1]), ValueError, "lengths should not be negative"),
        (lambda: jaxrnn.unpad_sequence(X, [1, 2, 6]), ValueError, "at most the 5 time steps"),
        (lambda: jaxrnn.pad_packed_sequence(X), TypeError, "sequence should be a jaxrnn.PackedSequence, got ndarray"),
        (lambda: jaxrnn.unpack_sequence([X]), TypeError, "packed_sequences should be .*, got list"),
        (lambda: jaxrnn.PackedSequence(X, [3, 3]), ValueError, "data should have 6 rows"),
        (lambda: jaxrnn.PackedSequence(X, [2, 3]), ValueError, "batch_sizes should not increase"),
        (lambda: jaxrnn.PackedSequence(X, []), ValueError, "batch_sizes should not increase"),
        (lambda: jaxrnn.PackedSequence(X, [3.0, 2.0]), TypeError, "batch_sizes should be integers"),
        (lambda: jaxrnn.PackedSequence(X, [3, 2], [0, 0, 1]), ValueError, "should be a permutation of 3"),
        (lambda: jaxrnn.PackedSequence(X, [3, 2], [1, 2, 0], [1, 2, 0]), ValueError, "inverse of sorted_indices"),
        (lambda: jaxrnn.PackedSequence(X, [3, 2], None, [1, 2, 0]), ValueError, "inverse of sorted_indices"),
        (lambda: jax.jit(jaxrnn.pack_padded_sequence)(X, jnp.array([4, 2, 1])), TypeError, "lengths=.* layer"),
        (lambda: jax.jit(jaxrnn.PackedSequence)(X, jnp.array([3, 2])), TypeError, "batch_sizes should not be traced"),
        (lambda: jax.jit(jaxrnn.pack_padded_sequence)(X, [4, 2, 1]), TypeError, "lengths should not be traced"),
        (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))(PACKED), TypeError, r"packed\._replace\(data=linear\(packed\.data"),
        (lambda: linen.Dense(3).init(jax.random.key(0), PACKED), TypeError, "PackedSequence is not one array"),
        (lambda: np.tanh(PACKED), TypeError, "PackedSequence is not one array"),
    ],
)  # fmt: skip
def test_bad_input_that_torch_lets_pass(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("packed", "arguments", "error", "message"),
    [
        (PACKED._replace(data=PACKED.data[:, :1]), {}, RuntimeError, r"input_size=2 features .* got shape \(7, 1\)"),
        (PACKED._replace(data=PACKED.data[:, 0]), {}, RuntimeError, r"input_size=2\), got \(7,\)"),
        (PACKED._replace(data=PACKED.data.astype(int)), {}, TypeError, "x.data should be floating, got int"),
        (
            PACKED,
            {"hx": jnp.zeros((1, 2, 4))},
            RuntimeError,
            r"h_0 of hx should have shape \(1, 3, 4\), got \(1, 2, 4\)",
        ),
        (types.SimpleNamespace(batch_sizes=[1]), {}, TypeError, "array or a jaxrnn.PackedSequence, got .* of types"),
        (PACKED, {"lengths": [4, 2, 1]}, ValueError, "lengths should be None for a PackedSequence"),
        (PACKED, {"reset": np.zeros((4, 3), bool)}, RuntimeError, r"without its features, \(7,\), got \(4, 3\)"),
    ],
)
def test_bad_packed_input_of_a_layer(
    torch: types.ModuleType, packed: Any, arguments: dict, error: type[Exception], message: str
) -> None:
    gru = filled(lambda: jaxrnn.GRU(2, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    with pytest.raises(error, match=message):
        gru(packed, **arguments)
    if error is RuntimeError and "reset" not in arguments:
        theirs = torch.nn.utils.rnn.PackedSequence(torch.tensor(np.asarray(packed.data)), torch.tensor([3, 2, 1, 1]))
        with pytest.raises(error):
            torch.nn.GRU(2, 4, dtype=torch.float64)(theirs, *(torch.tensor(np.asarray(a)) for a in arguments.values()))
