"""PackedSequence, torch's functions that pack, pad and unpack rows of different lengths, and `flip_sequences`.

NumPy computes where each row of packed data is in a padded array, from the static integer fields; then one gather
moves the data. NumPy data are moved by NumPy, so that a data loader does not compile a gather for each new set of
lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxrnn._compat import is_traced

Rows = Sequence[ArrayLike] | jax.Array | NDArray[Any]
Lengths = ArrayLike | Sequence[int]
PaddingSide = Literal["right", "left"]
Array = jax.Array | NDArray[Any]


def in_jax(value: Any, dtype: Any = None) -> jax.Array:
    """As `jnp.asarray`, but the transfer is explicit: whoever passes a list or a NumPy array wants one."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray) and dtype is None:  # jnp.asarray would compile a copy for each shape
        return jax.device_put(value)
    with jax.transfer_guard_host_to_device("allow"):
        return jnp.asarray(value, dtype)


def stacked(value: Any) -> Any:
    """A list of traced numbers as one array, such as a batch's lengths under jit; anything else as it is."""
    return jnp.asarray(value) if isinstance(value, Sequence) and _any_traced(value) else value


def _any_traced(value: Any) -> bool:
    return any(map(is_traced, jax.tree.leaves(value)))


def _array(value: Any) -> Array:
    return value if isinstance(value, np.ndarray) else in_jax(value)


def _one_array(name: str, value: Any) -> Array:
    if isinstance(value, Sequence):  # nobody could tell its axes from those of an array
        raise TypeError(f"{name} should be one array, got {type(value).__name__}: give rows to pack_sequence")
    return _array(value)


class _Fields(NamedTuple):
    data: jax.Array
    batch_sizes: NDArray[np.int64]
    sorted_indices: NDArray[np.int64] | None
    unsorted_indices: NDArray[np.int64] | None


class PackedSequence(_Fields):
    """Rows of different lengths, ordered by step: torch's `PackedSequence`, with its fields.

    `pack_padded_sequence` and `pack_sequence` make one; the layers take one and return one. It is a pytree whose only
    leaf is `data`. The integer fields are static, so jit traces again for each pattern of lengths. To trace once for
    all, give `lengths=` to the layers instead.

    Args:
        data: the steps of all rows, (sum of lengths, ...), of any dtype: the first step of every row, then the second
            step of every row that has one, and so on; the longest row comes first.
        batch_sizes: how many rows have each step, integers (longest length,); not traced.
        sorted_indices: for each row, longest first, its index in the original batch, integers (batch,); None if the
            batch was sorted.
        unsorted_indices: the inverse permutation; computed if None.

    As in torch, the fields are attributes, and the tuple unpacks into them. The integer fields are NumPy int64.

    Raises:
        TypeError: an integer field is traced, or not of integers.
        ValueError: batch_sizes increase, are less than 1, or do not add up to the length of data, or the indices are
            not a permutation of the batch.

    >>> import jax.numpy as jnp, jaxrnn
    >>> packed = jaxrnn.pack_sequence([jnp.array([1, 2, 3]), jnp.array([4, 5])])
    >>> packed.data.tolist(), packed.batch_sizes.tolist()
    ([1, 4, 2, 5, 3], [2, 2, 1])
    """

    def __new__(
        cls,
        data: ArrayLike,
        batch_sizes: ArrayLike,
        sorted_indices: ArrayLike | None = None,
        unsorted_indices: ArrayLike | None = None,
    ) -> PackedSequence:
        data, sizes = in_jax(data), _static("batch_sizes", batch_sizes)
        if not len(sizes) or sizes[-1] < 1 or np.any(np.diff(sizes) > 0):
            raise ValueError(f"batch_sizes should not increase, and be at least 1, got {sizes.tolist()}")
        if data.shape[:1] != (sizes.sum(),):
            raise ValueError(f"data should have {sizes.sum()} rows, the sum of batch_sizes, got shape {data.shape}")
        order = inverse = None
        if sorted_indices is not None:
            order = _static("sorted_indices", sorted_indices)
            if not np.array_equal(np.sort(order), np.arange(sizes[0])):
                raise ValueError(f"sorted_indices should be a permutation of {sizes[0]} rows, got {order.tolist()}")
            inverse = np.argsort(order)
        if unsorted_indices is not None:
            given = _static("unsorted_indices", unsorted_indices)
            if inverse is None or not np.array_equal(given, inverse):
                raise ValueError(f"unsorted_indices should be the inverse of sorted_indices, got {given.tolist()}")
        return tuple.__new__(cls, (data, *map(_frozen, (sizes, order, inverse))))

    def __jax_array__(self) -> jax.Array:
        # jnp.asarray would try to stack the fields: its words would not say what to write.
        raise TypeError(
            "a PackedSequence is not one array: give its data, such as packed._replace(data=linear(packed.data))"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NDArray[Any]:
        return np.asarray(self.__jax_array__())  # which raises


def _frozen(integers: NDArray[Any] | None) -> NDArray[np.int64] | None:
    if integers is not None:
        integers = integers.astype(np.int64)
        integers.flags.writeable = False
    return integers


def _flatten(packed: PackedSequence) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    static = tuple(None if field is None else tuple(field.tolist()) for field in packed[1:])
    return ((jax.tree_util.GetAttrKey("data"), packed.data),), static


def _unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> PackedSequence:
    # JAX may put a placeholder in the place of data: do not check it.
    fields = (None if field is None else _frozen(np.array(field)) for field in static)
    return tuple.__new__(PackedSequence, (*children, *fields))


jax.tree_util.register_pytree_with_keys(PackedSequence, _flatten, _unflatten)


class Padding(NamedTuple):
    """Where the steps of a PackedSequence are in a padded array of its rows in their original order."""

    places: NDArray[np.int32]  # (time, batch): which row of data is there, or len(data) for padding
    rows: NDArray[np.int32]  # for each row of data, its index in the padded array with its first two axes flattened
    lengths: NDArray[np.int64]  # of the rows in the original order, int64


def padding_of(packed: PackedSequence, batch_first: bool = False, total_length: int | None = None) -> Padding:
    """The layout for a padded array (time, batch, ...), as long as the longest row, or `total_length`.

    With `batch_first` the array, and `places`, are (batch, time, ...).
    """
    sizes = packed.batch_sizes
    steps, batch = total_length or len(sizes), int(sizes[0])
    order, inverse = (np.arange(batch) if index is None else index for index in packed[2:])
    running = np.arange(batch) < np.pad(sizes, (0, steps - len(sizes)))[:, None]
    places = np.full((steps, batch), sizes.sum(), np.int32)
    places[running] = np.arange(sizes.sum())
    time, column = np.nonzero(running)
    rows = order[column] * steps + time if batch_first else time * batch + order[column]
    places, lengths = places[:, inverse], running.sum(axis=0)[inverse]
    return Padding(places.T if batch_first else places, rows.astype(np.int32), lengths)


def pad(data: Array, places: NDArray[Any], padding_value: Any = 0) -> Array:
    """Put rows of data in their `places`, and padding where there is none."""
    fill = np.asarray(padding_value).astype(data.dtype)
    if isinstance(data, np.ndarray):
        return np.concatenate([data, np.full((1, *data.shape[1:]), fill)])[places]
    return _gather(data, places, mode="fill", fill_value=fill.item())


def pack(padded: Array, rows: NDArray[Any]) -> Array:
    """Gather `rows` of data from a padded array."""
    flat = padded.reshape(-1, *padded.shape[2:])
    if isinstance(flat, np.ndarray):
        return flat[rows]
    return _gather(flat, rows, mode="promise_in_bounds", unique_indices=True)


def _gather(a: jax.Array, places: NDArray[Any], **settings: Any) -> jax.Array:
    # JAX raises an error, too, but its advice is for us, not for users.
    if any(spec := jax.typeof(a).sharding.spec):
        raise ValueError(
            f"rows to pack or pad should not be sharded over mesh axes of type Explicit, got {spec}: give padded rows "
            "and lengths= to the layer, which can be sharded along the batch"
        )
    with jax.transfer_guard_host_to_device("allow"):  # of the indices, which the host computed
        return a.at[places].get(**settings)


def _static(name: str, value: Any) -> NDArray[np.int64]:
    """A 1-D array of integers that are not traced."""
    if _any_traced(value):
        raise TypeError(
            f"{name} should not be traced, as under jit: pack outside jit and pass the PackedSequence in, or give "
            "padded rows and lengths= to the layer"
        )
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise TypeError(f"{name} should be integers, got {array.dtype}")
    if array.ndim != 1:
        raise RuntimeError(f"{name} should have one axis, got shape {array.shape}")
    return array.astype(np.int64)


def checked_lengths(lengths: Any, shape: tuple[int, ...], steps: int) -> jax.Array:
    """Lengths of padded rows of x, which may be traced.

    Args:
        lengths: what the user gave.
        shape: their shape: (batch,), or () for unbatched x.
        steps: how many steps x has.

    Raises:
        TypeError, RuntimeError, ValueError: as `flip_sequences`.
    """
    lengths = stacked(lengths)
    array = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths, None if np.size(lengths) else np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths should be integers, got {array.dtype}")
    if array.shape != shape:
        raise RuntimeError(f"lengths should have shape {shape}, one for each row of x, got {array.shape}")
    # Traced values cannot be read, nor values on the devices of other processes.
    if not is_traced(array) and getattr(array, "is_fully_addressable", True):
        values = jax.device_get(array)
        if np.any((values < 0) | (values > steps)):
            raise ValueError(f"lengths should be from 0 to {steps}, the time steps of x, got {values.tolist()}")
    return in_jax(array)


def _check_within(lengths: NDArray[np.int64], steps: int) -> None:
    if np.any(lengths > steps):
        raise ValueError(f"lengths should be at most the {steps} time steps there are, got {lengths.tolist()}")


def _packed(name: str, value: Any) -> PackedSequence:
    if not isinstance(value, PackedSequence):
        raise TypeError(f"{name} should be a jaxrnn.PackedSequence, got {type(value).__name__}")
    return value


def pack_padded_sequence(
    input: ArrayLike, lengths: Lengths, batch_first: bool = False, enforce_sorted: bool = True
) -> PackedSequence:
    """Pack padded rows of different lengths, as torch does.

    Args:
        input: the padded rows, (time, batch, ...), or (batch, time, ...) with `batch_first`; of any dtype.
        lengths: how many steps each row has, integers from 1 to time, (batch,); not traced.
        batch_first: which of the first two axes is the batch.
        enforce_sorted: whether to raise an error unless the longest row comes first; if False, rows are sorted.

    Returns:
        The PackedSequence, without the padding. With `enforce_sorted` its `sorted_indices` and `unsorted_indices` are
        None.

    Raises:
        TypeError: lengths are traced, or not integers. If they are traced, give `lengths=` to the layer instead.
        RuntimeError: input has fewer than two axes, no row or no step; there is not one length for each row; a length
            is less than 1; or lengths increase although `enforce_sorted`.
        ValueError: a length is greater than time.

    >>> import jax.numpy as jnp, jaxrnn
    >>> packed = jaxrnn.pack_padded_sequence(jnp.array([[1, 4], [2, 5], [0, 6]]), [2, 3], enforce_sorted=False)
    >>> packed.data.tolist(), packed.batch_sizes.tolist(), packed.sorted_indices.tolist()
    ([4, 1, 5, 2, 6], [2, 2, 1], [1, 0])
    """
    padded = _one_array("input", input)
    if padded.ndim < 2:
        raise RuntimeError(f"input should have two axes at least, time and batch, got shape {padded.shape}")
    batch, steps = padded.shape[:2] if batch_first else padded.shape[1::-1]
    if not (batch and steps):
        raise RuntimeError(f"input should have at least one row and one step, got shape {padded.shape}")
    known = _static("lengths", lengths)
    if len(known) != batch:
        raise RuntimeError(f"lengths should be {batch}, one for each row, got {len(known)}")
    if np.any(known < 1):
        raise RuntimeError(f"lengths should be 1 or more, got {known.tolist()}: leave empty rows out")
    _check_within(known, steps)
    order = None if enforce_sorted else np.argsort(-known, kind="stable")
    if enforce_sorted and np.any(np.diff(known) > 0):
        raise RuntimeError(
            f"lengths should not increase, got {known.tolist()}: sort the rows, or give enforce_sorted=False"
        )
    sizes = np.sum(known > np.arange(known.max())[:, None], axis=1)
    # First without data: the indices depend on the integers alone.
    empty = PackedSequence(np.zeros((known.sum(), 0)), sizes, order)
    return empty._replace(data=in_jax(pack(padded, padding_of(empty, batch_first, steps).rows)))


def pad_packed_sequence(
    sequence: PackedSequence, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[jax.Array, NDArray[np.int64]]:
    """Pad packed rows to one length, as torch does: the inverse of `pack_padded_sequence`.

    Args:
        sequence: a PackedSequence.
        batch_first: whether the rows come as (batch, time, ...) instead of (time, batch, ...).
        padding_value: the value past a row's end.
        total_length: how many steps to pad to; by default as many as the longest row has.

    Returns:
        `(padded, lengths)`: the rows in their original order, and their lengths, NumPy int64 (batch,).

    Raises:
        TypeError: sequence is not a PackedSequence.
        ValueError: total_length is less than the longest row's length.

    >>> import jax.numpy as jnp, jaxrnn
    >>> packed = jaxrnn.pack_sequence([jnp.array([1, 2, 3]), jnp.array([4, 5])])
    >>> padded, lengths = jaxrnn.pad_packed_sequence(packed, batch_first=True, padding_value=-1)
    >>> padded.tolist(), lengths.tolist()
    ([[1, 2, 3], [4, 5, -1]], [3, 2])
    """
    longest = len(_packed("sequence", sequence).batch_sizes)
    if total_length is not None and total_length < longest:
        raise ValueError(f"total_length should be at least {longest}, the longest row's length, got {total_length}")
    where = padding_of(sequence, batch_first, total_length)
    return in_jax(pad(sequence.data, where.places, padding_value)), where.lengths


def pad_sequence(
    sequences: Rows,
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: PaddingSide = "right",
) -> jax.Array:
    """Stack rows of different lengths, padded to the longest, as torch does.

    Args:
        sequences: the rows, (length, ...) each, of the same shape but for their lengths; of any dtype.
        batch_first: whether the rows come as (batch, time, ...) instead of (time, batch, ...).
        padding_value: the value that fills shorter rows.
        padding_side: "right", past their ends, or "left", before their starts.

    Returns:
        The padded rows.

    Raises:
        RuntimeError: there are no rows, their shapes or dtypes differ, one has no axis, or padding_side is unknown.

    >>> import jax.numpy as jnp, jaxrnn
    >>> jaxrnn.pad_sequence([jnp.array([1, 2, 3]), jnp.array([4])], batch_first=True, padding_side="left").tolist()
    [[1, 2, 3], [0, 0, 4]]
    """
    return in_jax(_padded(sequences, batch_first, padding_value, padding_side))


def _padded(sequences: Rows, batch_first: bool, padding_value: float, padding_side: PaddingSide) -> Array:
    if padding_side not in ("right", "left"):
        raise RuntimeError(f"padding_side should be 'right' or 'left', got {padding_side!r}")
    if not isinstance(sequences, Iterable):
        raise RuntimeError(f"sequences should be a list of rows, got {type(sequences).__name__}")
    rows = [_array(row) for row in sequences]
    if not rows:
        raise RuntimeError("sequences should have at least one row, got none")
    if any(row.ndim == 0 or row.shape[1:] != rows[0].shape[1:] for row in rows):
        shapes = ", ".join(sorted({str(row.shape) for row in rows}))
        raise RuntimeError(f"sequences should have equal shapes except for the first axis, got {shapes}")
    lengths = np.array([len(row) for row in rows])
    step = np.arange(lengths.max()) - (lengths.max() - lengths if padding_side == "left" else 0 * lengths)[:, None]
    inside = (step >= 0) & (step < lengths[:, None])
    places = np.where(inside, step + (np.cumsum(lengths) - lengths)[:, None], lengths.sum()).astype(np.int32)
    in_numpy = all(isinstance(row, np.ndarray) and row.dtype == rows[0].dtype for row in rows)  # JAX promotes others
    data = np.concatenate(rows) if in_numpy else jnp.concatenate(rows)
    return pad(data, places if batch_first else places.T, padding_value)


def pack_sequence(sequences: Rows, enforce_sorted: bool = True) -> PackedSequence:
    """Pack a list of rows of different lengths, as torch does.

    Args:
        sequences: the rows, (length, ...) each, of the same shape but for their lengths; of any dtype.
        enforce_sorted: whether to raise an error unless the longest row comes first; if False, rows are sorted.

    Returns:
        The PackedSequence.

    Raises:
        RuntimeError: there are no rows, their shapes or dtypes differ, one is empty, or their lengths increase although
            `enforce_sorted`.

    >>> import jax.numpy as jnp, jaxrnn
    >>> jaxrnn.pack_sequence([jnp.ones((2, 8)), jnp.ones((5, 8))], enforce_sorted=False).data.shape
    (7, 8)
    """
    padded = _padded(sequences, False, 0, "right")
    return pack_padded_sequence(padded, [np.shape(row)[0] for row in sequences], enforce_sorted=enforce_sorted)


def unpad_sequence(padded_sequences: ArrayLike, lengths: Lengths, batch_first: bool = False) -> list[jax.Array]:
    """Take the rows out of a padded array, as torch does: the inverse of `pad_sequence`.

    Args:
        padded_sequences: the padded rows, (time, batch, ...), or (batch, time, ...) with `batch_first`.
        lengths: how many steps each row has, integers from 0 to time, (batch,); not traced.
        batch_first: which of the first two axes is the batch.

    Returns:
        The rows, (length, ...) each.

    Raises:
        TypeError: lengths are traced, or not integers.
        RuntimeError: there are fewer than two axes.
        ValueError: there is not one length for each row, or one is not from 0 to time.

    >>> import jax.numpy as jnp, jaxrnn
    >>> [row.tolist() for row in jaxrnn.unpad_sequence(jnp.array([[1, 4], [2, 5], [3, 0]]), [3, 2])]
    [[1, 2, 3], [4, 5]]
    """
    padded = _one_array("padded_sequences", padded_sequences)
    if padded.ndim < 2:
        raise RuntimeError(f"padded_sequences should have two axes at least, time and batch, got shape {padded.shape}")
    if not batch_first:
        padded = padded.swapaxes(0, 1)
    known = _static("lengths", lengths)
    if len(known) != len(padded):
        raise ValueError(f"lengths should be {len(padded)}, one for each row, got {len(known)}")
    if np.any(known < 0):
        raise ValueError(f"lengths should not be negative, got {known.tolist()}")
    _check_within(known, padded.shape[1])
    return [in_jax(padded[row, :length]) for row, length in enumerate(known)]


def unpack_sequence(packed_sequences: PackedSequence) -> list[jax.Array]:
    """Take the rows out of a PackedSequence, as torch does: the inverse of `pack_sequence`.

    Args:
        packed_sequences: a PackedSequence.

    Returns:
        The rows in their original order, (length, ...) each.

    Raises:
        TypeError: packed_sequences is not a PackedSequence.

    >>> import jax.numpy as jnp, jaxrnn
    >>> rows = [jnp.array([1, 2]), jnp.array([3, 4, 5])]
    >>> [row.tolist() for row in jaxrnn.unpack_sequence(jaxrnn.pack_sequence(rows, enforce_sorted=False))]
    [[1, 2], [3, 4, 5]]
    """
    return unpad_sequence(*pad_packed_sequence(_packed("packed_sequences", packed_sequences)))


def flip_sequences(x: ArrayLike, lengths: Lengths | None = None, *, batch_first: bool = False) -> jax.Array:
    """Reverse the steps of each row. Padding stays at the end.

    Two flips restore x, because padding is reversed, too. The numbers are those of Flax's `flip_sequences`. A layer
    runs backward if its input is flipped, and its output is flipped back.

    Args:
        x: padded rows, (time, batch, ...), or (batch, time, ...) with `batch_first`, or one row, (time, ...); of any
            dtype.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or () for one row; all steps if None.
            Under jit a length below 0 counts as 0, and one above time as time.
        batch_first: which axis is time: 1 if True, else 0. For one row, with lengths of shape (), it is always 0.

    Returns:
        The flipped rows, laid out like x.

    Raises:
        TypeError: lengths are not integers, or x is a PackedSequence or a list.
        RuntimeError: lengths have another shape, or x has too few axes.
        ValueError: a length is not from 0 to time.

    >>> import jax.numpy as jnp, jaxrnn
    >>> x = jnp.array([[1, 2, 3, 0], [4, 5, 0, 0]])
    >>> jaxrnn.flip_sequences(x, [3, 2], batch_first=True).tolist()
    [[3, 2, 1, 0], [5, 4, 0, 0]]
    >>> jaxrnn.flip_sequences(x[0], 3).tolist()
    [3, 2, 1, 0]
    """
    if isinstance(x, Sequence):  # such as a PackedSequence
        rows = "jaxrnn.pad_sequence and jaxrnn.pad_packed_sequence make them"
        raise TypeError(f"x should be one array, got {type(x).__name__}: give padded rows, as {rows}")
    array, lengths = in_jax(x), stacked(lengths)
    axes = 1 if lengths is None and batch_first else np.ndim(lengths)  # of rows in x; of None 0
    time = int(batch_first and axes > 0)
    if array.ndim < 1 + min(axes, 1):
        wanted = "two axes at least, time and batch" if axes else "an axis for time"
        raise RuntimeError(f"x should have {wanted}, got shape {array.shape}")
    if lengths is None:
        return jnp.flip(array, time)
    batch = (array.shape[1 - time],) if axes else ()
    return _flipped(array, checked_lengths(lengths, batch, array.shape[time]), time)


@functools.partial(jax.jit, static_argnames="time")  # called eagerly, it compiles once
def _flipped(x: jax.Array, lengths: jax.Array, time: int) -> jax.Array:
    steps = x.shape[time]
    ends = jnp.clip(lengths.astype(jnp.int32), 0, steps)
    step = jax.lax.iota(jnp.int32, steps)  # jax2onnx knows no arange of a symbolic size
    if ends.ndim:
        ends, step = jnp.expand_dims(ends, time), jnp.expand_dims(step, 1 - time)
    places = (ends - 1 - step) % steps  # in padding from the last step down
    places = jnp.expand_dims(places, range(places.ndim, x.ndim))
    return jnp.take_along_axis(x, places, time, mode="promise_in_bounds")
