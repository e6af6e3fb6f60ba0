"""The whole call as a pure function: layers, directions, dropout, batch_first and unbatched input, and its checks."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import meshes, recurrence
from jaxrnn._compat import is_traced
from jaxrnn.cells import Arrays
from jaxrnn.packed import PackedSequence, in_jax, layout, pack, pad
from jaxrnn.recurrence import MeshAxis, Remat
from jaxrnn.spec import CellSpec, Spec

HX = ArrayLike | Sequence[ArrayLike] | None
State = Any  # a jax.Array, or for a cell of several states a tuple of them
Pair = tuple[jax.Array, jax.Array]  # an LSTM's
StateT = TypeVar("StateT", jax.Array, Pair)  # of a module
Output = Any  # a jax.Array, or a PackedSequence for one


def apply(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    remat: Remat = "none",
    hidden_axis: MeshAxis | None = None,
) -> tuple[Output, State]:
    """Run a recurrent network over a sequence, as torch's RNN, LSTM and GRU modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched
            (time, input_size); floating. Or a PackedSequence of such steps.
        hx: the initial state h_0, (num_layers * directions, batch, output size), or (num_layers * directions, output
            size) for unbatched x; zeros if None. For a cell of several states a tuple or list: (h_0, c_0) for an LSTM,
            where c_0 has hidden_size features and h_0 has proj_size, if that is set. Unlike in torch, the batch may be
            1 or missing, and so may all axes but the last: such a state is for all rows, as a learned one is.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all of them if
            None. What x holds past a row's end reaches nothing. Data under jit, where their values cannot be checked:
            there a length below 0 counts as 0, and one above time as time.
        reset: True before which steps the state is put back, as between the episodes of an environment; boolean, in
            the layout of x, or its data, without the features. Past a row's end nothing is put back. Not for a
            bidirectional network.
        reset_state: what `reset` puts the state back to, like hx; zeros if None.
        dropout_key: a jax random key, for dropout in training; without it or `dropout_masks` there is none.
        dropout_masks: instead of a key, what dropout keeps: for each layer but the last an array of 0 or 1,
            (time, batch, directions * output size) also with `batch_first`, without batch for unbatched x, and in
            the layout of its data for a PackedSequence.
        dtype: the floating dtype to compute in; by default that to which x, params and hx promote. The output has it;
            states have that of hx, if given: with a float32 hx a state is carried on unrounded, whatever the dtype.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what a derivative in reverse finds kept: all that it needs, "none" of it computed again; the states, from
            which the "gates" are computed again; or, for an integer k, the states before every k-th step, from where
            the steps are made again. Values and gradients are the same, up to rounding.
        hidden_axis: the axis, or axes, of the mesh in `jax.set_mesh`, of type Auto, over which the hidden units, and
            with them the gates and states, are shared out; None leaves that to XLA.

    Returns:
        `(output, h_n)`, or for a cell of several states `(output, (h_n, c_n))`: the last layer's outputs, laid out
        as x with directions * output size features, 0 past a row's end; and the states after each row's last step,
        of the full shape of hx. The backward direction starts at each row's own last step. A row of length 0 keeps its
        hx. For a PackedSequence the output is one, and the rows of hx and of the states are in their original order.

    Raises:
        TypeError: x, hx, reset_state or a parameter is not floating, hx or reset_state has not the form that the
            cell's states need, lengths are not integers, or reset is not boolean.
        ValueError: x is neither 2-D nor 3-D, params has not the names and shapes of `spec.shapes()`, a length is
            out of range, lengths come with a PackedSequence, reset with a bidirectional network, remat is neither
            "none" nor "gates" nor an integer above 0, or hidden_axis is not of the mesh, not of type Auto, or has
            devices in a number that does not divide hidden_size.
        RuntimeError: the size of x, hx, lengths, reset or reset_state does not fit, or the sequence is empty.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2)
    >>> params = spec.init(jax.random.key(0))
    >>> output, (h_n, c_n) = jaxrnn.apply(spec, params, jax.numpy.ones((5, 3, 10)))
    >>> output.shape, h_n.shape, c_n.shape
    ((5, 3, 20), (2, 3, 20), (2, 3, 20))
    """
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths should be None for a PackedSequence, which has its own")
        rest: dict[str, Any] = {"reset_state": reset_state, "dropout_key": dropout_key, "dtype": dtype}
        rest |= {"precision": precision, "remat": remat, "hidden_axis": hidden_axis}
        return _apply_packed(spec, params, x, hx, reset, dropout_masks, **rest)
    check_remat(remat)
    check_hidden_axis(spec, hidden_axis)
    if hasattr(x, "batch_sizes"):
        raise TypeError(
            f"x should be an array or a jaxrnn.PackedSequence, got a PackedSequence of {type(x).__module__}"
        )
    x = _floating("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x should be 2-D (unbatched) or 3-D (batched), got shape {x.shape}")
    if x.shape[-1] != spec.input_size:
        raise RuntimeError(f"x should have input_size={spec.input_size} features on its last axis, got shape {x.shape}")
    time_axis = 1 if x.ndim == 3 and spec.batch_first else 0
    if x.shape[time_axis] == 0:
        raise RuntimeError(f"x should have at least one time step on axis {time_axis}, got shape {x.shape}")
    batch = x.shape[1 - time_axis : 2 - time_axis] if x.ndim == 3 else ()
    shapes = spec.state_shapes(*batch)
    state = _states(spec, "hx", hx, shapes)
    lengths = _lengths(lengths, batch, x.shape[time_axis])
    if reset is None and reset_state is not None:
        raise ValueError("reset_state needs reset, which says before which steps the state is put back to it")
    reset, reset_state = _reset(spec, reset, x.shape[:-1]), _states(spec, "reset_state", reset_state, shapes)
    masks = None
    if spec.dropout and dropout_masks is not None:
        features = spec.num_directions * spec.output_size
        masks = _masks(dropout_masks, spec.num_layers - 1, (x.shape[time_axis], *batch, features))
    key = dropout_key if spec.dropout and masks is None else None
    arrays = _Arrays(_parameters(spec, params), x, state, reset_state)
    output, state = _apply(spec, arrays, lengths, reset, key, masks, _dtype(dtype), precision, remat, hidden_axis)
    return output, _unwrap(state)


def _apply_packed(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: PackedSequence,
    hx: HX,
    reset: ArrayLike | None,
    dropout_masks: Sequence[ArrayLike] | None,
    **rest: Any,
) -> tuple[PackedSequence, State]:
    """As padded rows with their lengths: as many steps as the longest row has, and one trace for all such rows."""
    data = _floating("x.data", x.data)
    if data.shape != (len(data), spec.input_size):
        raise RuntimeError(f"x.data should have shape (rows, input_size={spec.input_size}), got {data.shape}")
    where = layout(x, spec.batch_first)
    reset = _reset(spec, reset, data.shape[:1])
    if spec.dropout and dropout_masks is not None:
        masks = _masks(dropout_masks, spec.num_layers - 1, (len(data), spec.num_directions * spec.output_size))
        dropout_masks = [pad(mask, layout(x).places) for mask in masks]
    output, state = apply(
        spec,
        params,
        pad(data, where.places),
        hx,
        lengths=None if where.lengths.min() == where.lengths.max() else where.lengths,
        reset=None if reset is None else pad(reset, where.places),
        dropout_masks=dropout_masks,
        **rest,
    )
    return x._replace(data=in_jax(pack(output, where.rows))), state


def apply_cell(
    spec: CellSpec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> State:
    """Make one step, as torch's RNNCell, LSTMCell and GRUCell modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (batch, input_size) or unbatched (input_size,); floating.
        hx: the state, (batch, hidden_size) or for unbatched x (hidden_size,); zeros if None. For a cell of several
            states a tuple or list, (h, c) for an LSTM. A state (hidden_size,) or (1, hidden_size) is for all rows.
        dtype: the floating dtype to compute in; by default that to which x, params and hx promote. The next state has
            that of hx, if given.
        precision: the precision of the products, as for `jax.lax.dot_general`.

    Returns:
        The next state, one row for each row of x.

    Raises:
        TypeError: x, hx or a parameter is not floating, or hx has not the form that the cell's states need.
        ValueError: x or hx is neither 1-D nor 2-D, or params has not the names and shapes of `spec.shapes()`.
        RuntimeError: the size of x or hx does not fit.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 10, 20)
    >>> jaxrnn.apply_cell(spec, spec.init(jax.random.key(0)), jax.numpy.ones((3, 10))).shape
    (3, 20)
    """
    x = _floating("x", x)
    if x.ndim not in (1, 2):
        raise ValueError(f"x should be 1-D (unbatched) or 2-D (batched), got shape {x.shape}")
    if x.shape[-1] != spec.input_size:
        raise RuntimeError(f"x should have input_size={spec.input_size} features on its last axis, got shape {x.shape}")
    state = _states(spec, "hx", hx, spec.state_shapes(*x.shape[:-1]))
    return _unwrap(_apply_cell(spec, _Arrays(_parameters(spec, params), x, state), _dtype(dtype), precision))


def check_remat(remat: Any) -> None:
    """Raise ValueError unless `remat` is one that `apply` knows."""
    known = remat in ("none", "gates") if isinstance(remat, str) else isinstance(remat, int) and remat > 0
    if not known or isinstance(remat, bool):
        raise ValueError(f"remat should be 'none', 'gates' or an integer above 0, got {remat!r}")


def check_hidden_axis(spec: Spec, axis: Any) -> None:
    """Raise ValueError unless hidden units can be shared out over this axis of the mesh in effect."""
    if axis is None:
        return
    mesh = jax.sharding.get_abstract_mesh()
    wanted = (axis,) if isinstance(axis, str) else axis
    if not isinstance(wanted, tuple) or not set(wanted) <= set(mesh.axis_names) or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"hidden_axis should be of the mesh in jax.set_mesh, which has {mesh.axis_names}, or be a logical name for "
            f"one in Flax's rules, got {axis!r}"
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds[name] != AxisType.Auto for name in wanted):
        raise ValueError(f"hidden_axis should be of type jax.sharding.AxisType.Auto, got {axis!r} of {mesh}")
    count = math.prod(mesh.shape[name] for name in wanted)
    if spec.hidden_size % count:
        raise ValueError(f"hidden_size={spec.hidden_size} cannot be shared out over {count} devices of axis {axis!r}")


def _floating(name: str, value: Any) -> jax.Array:
    if isinstance(value, Sequence):  # which jnp.asarray would stack, along an axis that may be another's
        raise TypeError(f"{name} should be one array, got {type(value).__name__} of length {len(value)}")
    array = in_jax(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} should be floating, got {array.dtype}")
    return array


def _dtype(dtype: DTypeLike | None) -> jnp.dtype | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype should be floating, got {jnp.dtype(dtype)}")
    return None if dtype is None else jnp.dtype(dtype)


def _parameters(spec: Spec | CellSpec, params: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    shapes = spec.shapes()
    if params.keys() != shapes.keys():
        missing, unexpected = [n for n in shapes if n not in params], [n for n in params if n not in shapes]
        raise ValueError(f"params should have the names of spec.shapes(): missing {missing}, unexpected {unexpected}")
    arrays = {name: _floating(f"params[{name!r}]", params[name]) for name in shapes}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"params[{name!r}] should have shape {shape}, got {arrays[name].shape}")
    return arrays


def _states(spec: Spec | CellSpec, argument: str, hx: Any, shapes: tuple[tuple[int, ...], ...]) -> Arrays | None:
    """Check hx against one shape a state; None stays None, for zeros are made where the dtype is known."""
    if hx is None:
        return None
    names = [f"{name}_0" for name in spec.cell.states]
    several = len(names) > 1
    wanted = f"a tuple ({', '.join(names)})" if several else f"one array {names[0]}"
    if several != isinstance(hx, Sequence):
        raise TypeError(f"{argument} should be {wanted}, got {type(hx).__name__}")
    values = tuple(hx) if several else (hx,)
    if any(isinstance(value, Sequence) for value in values):
        raise TypeError(
            f"{argument} should be {wanted} of shapes {', '.join(map(str, shapes))}, got {type(hx).__name__} of "
            f"{type(values[0]).__name__}: of a pair (h, c) for each layer and direction make "
            f"`h, c = map(jnp.stack, zip(*pairs))`, and of Flax's pairs (c, h) likewise `c, h`"
        )
    if len(values) != len(names):
        raise TypeError(f"{argument} should be {wanted}, got {len(values)} values")
    state = tuple(_floating(f"{name} of {argument}", value) for name, value in zip(names, values, strict=True))
    one_step = isinstance(spec, CellSpec)
    batched = len(shapes[0]) == (2 if one_step else 3)
    return tuple(
        _for_all_rows(f"{name} of {argument}", array, shape, batched, one_step)
        for name, array, shape in zip(names, state, shapes, strict=True)
    )


def _for_all_rows(name: str, array: jax.Array, shape: tuple[int, ...], batched: bool, one_step: bool) -> jax.Array:
    """The array if it has this shape, or repeated for all rows if it has no batch, or a batch of one."""
    if array.shape == shape:
        return array
    *layers, _, size = shape if batched else (None, *shape)
    if batched and array.shape == (*layers, size):
        array = array[..., None, :]
    if array.shape == (size,) or (batched and array.shape == (*layers, 1, size)):
        return jnp.broadcast_to(array, shape)
    # As in torch, whose cells tell axes from sizes.
    error = ValueError if one_step and array.ndim not in (1, 2) else RuntimeError
    raise error(f"{name} should have shape {shape}, got {array.shape}")


def _lengths(lengths: Any, shape: tuple[int, ...], steps: int) -> jax.Array | None:
    if lengths is None:
        return None
    array = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths, None if np.size(lengths) else np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths should be integers, got {array.dtype}")
    if array.shape != shape:
        raise RuntimeError(f"lengths should have shape {shape}, one for each row of x, got {array.shape}")
    # The values are not to be seen while a function is traced, nor on the devices of other processes.
    if not is_traced(array) and getattr(array, "is_fully_addressable", True):
        values = jax.device_get(array)
        if np.any((values < 0) | (values > steps)):
            raise ValueError(f"lengths should be from 0 to the {steps} time steps of x, got {values.tolist()}")
    return in_jax(array)


def _reset(spec: Spec, reset: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if reset is None:
        return None
    if spec.bidirectional:
        raise ValueError("reset is for unidirectional networks: a backward direction would start an episode at its end")
    array = in_jax(reset, None if np.size(reset) else bool)
    if array.dtype != bool:
        raise TypeError(f"reset should be boolean, got {array.dtype}")
    if array.shape != shape:
        raise RuntimeError(f"reset should have the shape of x without its features, {shape}, got {array.shape}")
    return array


def _masks(masks: Sequence[ArrayLike], count: int, shape: tuple[int, ...]) -> Arrays:
    arrays = tuple(map(in_jax, masks))
    if [a.shape for a in arrays] != [shape] * count:
        raise ValueError(f"dropout_masks should be {count} arrays of shape {shape}, got {[a.shape for a in arrays]}")
    return arrays


def _unwrap(state: Arrays) -> State:
    return state if len(state) > 1 else state[0]


class _Arrays(NamedTuple):
    """What is computed with, all of it floating."""

    params: dict[str, jax.Array]
    x: jax.Array
    state: Arrays | None
    reset_state: Arrays | None = None

    def promote(self, dtype: jnp.dtype | None) -> "_Arrays":
        """All but the states, which `recurrence` carries in float32 at least, and which are returned as they came."""
        dtype = jnp.result_type(*jax.tree.leaves(self)) if dtype is None else dtype
        params, x = jax.tree.map(lambda a: a.astype(dtype), (self.params, self.x))
        return self._replace(params=params, x=x)


# Jitted on the frozen settings, so that a module called eagerly in a loop compiles once.
@functools.partial(jax.jit, static_argnames=("spec", "dtype", "precision", "remat", "hidden_axis"))
def _apply(
    spec: Spec,
    arrays: _Arrays,
    lengths: jax.Array | None,
    reset: jax.Array | None,
    key: jax.Array | None,
    masks: Arrays | None,
    dtype: jnp.dtype | None,
    precision: jax.lax.PrecisionLike,
    remat: Remat,
    hidden_axis: MeshAxis | None,
) -> tuple[jax.Array, Arrays]:
    params, x, state, reset_state = arrays.promote(dtype)
    dtypes = [x.dtype for _ in spec.cell.states] if state is None else [a.dtype for a in state]
    batched = x.ndim == 3
    if not batched:  # unbatched is a batch of one
        x, reset, lengths = jax.tree.map(lambda a: jnp.expand_dims(a, min(a.ndim, 1)), (x, reset, lengths))
        state, reset_state, masks = jax.tree.map(lambda a: a[:, None], (state, reset_state, masks))
    elif spec.batch_first:
        x, reset = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, reset))
    params, x, state, reset_state, lengths, reset, masks = meshes.aligned(
        (params, None), (x, 1), (state, 1), (reset_state, 1), (lengths, 0), (reset, 1), (masks, 1)
    )
    if state is None:
        state = tuple(jnp.broadcast_to(_zeros(x), shape) for shape in spec.state_shapes(x.shape[1]))
    x, state = meshes.varying_with((x, state), (params, x, state, reset_state, lengths, reset, masks))
    marks = recurrence.Marks(reset=None if reset is None else reset[..., None])
    if lengths is not None:
        steps = jnp.arange(x.shape[0], dtype=jnp.int32)
        ended = (steps[:, None] >= lengths.astype(jnp.int32)[None])[..., None]
        x = jnp.where(ended, jnp.zeros_like(x), x)  # NaN there would reach the gradients through the products
        marks = marks._replace(ended=ended)
    keys = None if key is None else jax.random.split(key, spec.num_layers)

    last = []
    for index in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            row = index * spec.num_directions + direction
            weights = {role: params[name] for role, name in spec.names(index, direction).items()}
            settings = recurrence.Settings(spec.cell, precision, direction == 1, remat, hidden_axis)
            first, restart = jax.tree.map(lambda a, row=row: a[row], (state, reset_state))
            output, states = recurrence.layer(settings, weights, x, first, marks, restart)
            outputs.append(output)
            last.append(states)
        x = _side_by_side(outputs, None if spec.proj_size else hidden_axis, index == spec.num_layers - 1)
        if index < spec.num_layers - 1:
            if masks is not None:
                x = _dropout(spec, x, masks[index])
            elif keys is not None:
                keep = jax.random.bernoulli(keys[index], np.float32(1 - spec.dropout), x.shape)
                x = _dropout(spec, x, meshes.sharded_like(keep, x))
    h_n = tuple(jnp.stack(rows).astype(dtype) for rows, dtype in zip(zip(*last, strict=True), dtypes, strict=True))
    if not batched:
        x, h_n = jax.tree.map(lambda a: a[:, 0], (x, h_n))
    elif spec.batch_first:
        x = x.swapaxes(0, 1)
    return x, h_n


def _side_by_side(outputs: list[jax.Array], hidden_axis: MeshAxis | None, last: bool) -> jax.Array:
    """Put the features of both directions into one axis, for the next layer or as what is returned.

    Where hidden units are shared out, a device has some of each direction's. The next layer's products need all of
    them. What is returned is shared out again, which takes an axis for the directions until they have been moved.
    """
    if len(outputs) == 1:
        return outputs[0]
    if hidden_axis is None:
        return jnp.concatenate(outputs, axis=-1)
    x = recurrence.shared_out(hidden_axis, jnp.stack(outputs, axis=-2))
    x = x.reshape(*x.shape[:-2], -1)
    return recurrence.shared_out(hidden_axis, x) if last else x


def _zeros(x: jax.Array) -> jax.Array:
    """A zero for each row of x, (batch, 1), sharded like x.

    XLA may replicate a constant, and then gather the batch at every step. It simplifies `where(c, 0, 0)` to a constant,
    but not 0 times a float, which might be NaN.
    """
    first = jax.lax.stop_gradient(x[0, :, :1])
    return 0 * jnp.abs(jnp.where(jnp.isfinite(first), first, jnp.zeros((), x.dtype)))


def _dropout(spec: Spec, x: jax.Array, keep: jax.Array) -> jax.Array:
    scale = 1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0  # p = 1 gives zeros, not NaN
    return jnp.where(keep.astype(bool), x * scale, jnp.zeros_like(x))


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "precision"))
def _apply_cell(spec: CellSpec, arrays: _Arrays, dtype: jnp.dtype | None, precision: jax.lax.PrecisionLike) -> Arrays:
    params, x, state, _ = arrays.promote(dtype)
    params, x, state = meshes.aligned(
        (params, None), (x, 0 if x.ndim == 2 else None), (state, 0 if x.ndim == 2 else None)
    )
    if state is None:
        state = tuple(jnp.zeros(shape, x.dtype) for shape in spec.state_shapes(*x.shape[:-1]))
    after = recurrence.step(recurrence.Settings(spec.cell, precision), params, x, state)
    return tuple(a.astype(first.dtype) for a, first in zip(after, state, strict=True))
