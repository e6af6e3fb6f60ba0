"""The pure functions: their checks, and the conversion of what is given to time-major padded rows, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrnn._compat import is_traced
from jaxrnn._core import docs, meshes, recurrence, stack, steps
from jaxrnn._core.options import CellKeywords, Keywords, Options, spelled_out
from jaxrnn.cells import Arrays, StateT
from jaxrnn.packed import Lengths, PackedSequence, in_jax, layout, pack, pad, stacked
from jaxrnn.spec import CellSpec, Spec

HX = ArrayLike | Sequence[ArrayLike] | None
State = Any  # a jax.Array, or for a cell of several states a tuple
Output = Any  # a jax.Array, or a PackedSequence if x is one


class PackedMarks(TypedDict, total=False):
    """Keywords of every call over a sequence, for type checkers. Modules and functions add their own."""

    reset: ArrayLike | None
    reset_state: HX


class Marks(PackedMarks, total=False):
    """The same for rows that are not packed."""

    lengths: Lengths | None


class _PackedKeywords(PackedMarks, Keywords, total=False):
    dropout_key: jax.Array | None
    dropout_masks: Sequence[ArrayLike] | None


class _Keywords(_PackedKeywords, Marks, total=False):
    pass


@overload
def apply(
    spec: Spec[StateT], params: Mapping[str, ArrayLike], x: ArrayLike, hx: HX = None, **keywords: Unpack[_Keywords]
) -> tuple[jax.Array, StateT]: ...
@overload
def apply(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: PackedSequence,
    hx: HX = None,
    **keywords: Unpack[_PackedKeywords],
) -> tuple[PackedSequence, StateT]: ...
@docs.described
@spelled_out
def apply(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    lengths: Lengths | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    **options: Unpack[Keywords],
) -> tuple[Output, StateT]:
    """Run a recurrent network over a sequence, as torch's RNN, LSTM and GRU modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        dropout_key: a jax random key, for dropout in training; without it or `dropout_masks` there is none.
        dropout_masks: in place of a key: for each layer but the last an array of 0 or 1, 1 where dropout keeps an
            output, (time, batch, directions * output size) even with `batch_first`, without batch for unbatched x, and
            laid out like its data for a PackedSequence.

    Returns:
        `(output, h_n)`, or for a cell of several states `(output, (h_n, c_n))`. output: the last layer's outputs, laid
        out like x, with directions * output size features, 0 past a row's end. h_n and c_n: the states after each row's
        last step, of the full shape of hx. The backward direction starts at each row's last step. A row of length 0
        keeps its hx. For a PackedSequence, output is one, and rows of hx and states are in their original order.

    Raises:
        TypeError: spec is not a Spec; x, hx, reset_state or a parameter is not floating; hx or reset_state is not one
            array, or for a cell of several states not a tuple of as many; lengths are not integers; or reset is not
            boolean.
        ValueError: x is neither 2-D nor 3-D; params does not match `spec.shapes()`; a length is out of range; lengths
            are given with a PackedSequence, or reset with a bidirectional network; remat, unroll or engine has no such
            value; the engine cannot run this; or hidden_axis is not in the mesh, is not of type Auto, or does not
            divide hidden_size.
        RuntimeError: the size of x, hx, lengths, reset or reset_state does not fit, or the sequence is empty.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2)
    >>> params = spec.init(jax.random.key(0))
    >>> output, (h_n, c_n) = jaxrnn.apply(spec, params, jax.numpy.ones((5, 3, 10)))
    >>> output.shape, h_n.shape, c_n.shape
    ((5, 3, 20), (2, 3, 20), (2, 3, 20))
    """
    return call(
        Options.of("apply", options, Keywords),
        spec,
        params,
        x,
        hx,
        lengths=lengths,
        reset=reset,
        reset_state=reset_state,
        dropout_key=dropout_key,
        dropout_masks=dropout_masks,
    )


def call(
    options: Options,
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    dropout_key: jax.Array | None = None,
    **marks: Any,
) -> tuple[Output, State]:
    """As `apply`, with the options as one value."""
    _check_spec(spec, Spec)
    options.check_mesh(spec.hidden_size)
    form, given, restore = _given(spec, params, x, hx, **marks)
    key = dropout_key if spec.dropout and given.masks is None else None
    output, state, _ = _run(spec, options, form, given, key)
    return restore(output), _unwrap(state)


class Trajectory(NamedTuple):
    """What `trajectory` returns.

    Attributes:
        states: each of the cell's states after every step, by its name.
        gates: each gate of every step, by its name.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 10, 20)
    >>> inside = jaxrnn.trajectory(spec, spec.init(jax.random.key(0)), jax.numpy.ones((5, 3, 10)))
    >>> inside.gates["z"].shape, inside.states["h"].shape
    ((1, 5, 3, 20), (1, 5, 3, 20))
    """

    states: dict[str, jax.Array]
    gates: dict[str, jax.Array]


@docs.described
@spelled_out
def trajectory(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    lengths: Lengths | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    **options: Unpack[Keywords],
) -> Trajectory:
    """Look inside: run like `jaxrnn.apply`, and return every state and every gate of every layer at every step.

    Use it to study saturated gates, what a forget gate keeps, or how a cell's state grows. It can be differentiated.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`. Those of an NNX module `m`, whose spec is
            `m.spec`, are `nnx.to_pure_dict(nnx.state(m, nnx.Param))`; those of a Linen module `variables["params"]`.
        dropout_key: a jax random key, for dropout in training; without it or `dropout_masks` there is none.
        dropout_masks: in place of a key, as for `jaxrnn.apply`.

    Returns:
        A `Trajectory`, whose arrays have the axis of h_n in front: (num_layers * directions, time, batch, features),
        or (num_layers * directions, batch, time, features) with `batch_first`, without batch for unbatched x. The rows
        of a PackedSequence are padded, and in their original order. Past a row's end, states are held, and gates are 0.
        Gates are what the cell's `gate_values` says, for torch's cells the values after sigmoid or tanh.

    Raises:
        As `jaxrnn.apply`.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2)
    >>> params = spec.init(jax.random.key(0))
    >>> inside = jaxrnn.trajectory(spec, params, jax.numpy.ones((5, 3, 10)))
    >>> inside.states["c"].shape, list(inside.gates)
    ((2, 5, 3, 20), ['i', 'f', 'g', 'o'])
    >>> bool((inside.gates["f"] < 1).all())
    True
    """
    checked = Options.of("trajectory", options, Keywords)
    _check_spec(spec, Spec)
    checked.check_mesh(spec.hidden_size)
    form, given, _ = _given(
        spec, params, x, hx, lengths=lengths, reset=reset, reset_state=reset_state, dropout_masks=dropout_masks
    )
    key = dropout_key if spec.dropout and given.masks is None else None
    *_, every = _run(spec, checked, form, given, key, every=True)
    states, gates = every
    names = spec.cell.states, spec.cell.gates
    return Trajectory(dict(zip(names[0], states, strict=True)), dict(zip(names[1], gates, strict=True)))


@docs.described
@spelled_out
def apply_cell(
    spec: CellSpec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    **options: Unpack[CellKeywords],
) -> StateT:
    """Make one step, as torch's RNNCell, LSTMCell and GRUCell modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (batch, input_size) or unbatched (input_size,); floating.
        hx: the state, (batch, hidden_size) or for unbatched x (hidden_size,); zeros if None. For a cell of several
            states a tuple or list, (h, c) for an LSTM. All rows share a state (hidden_size,) or (1, hidden_size).
        dtype: the floating dtype to compute in; by default the promoted dtype of x, params and hx. The next state has
            the dtype of hx, if given.

    Returns:
        The next state, one row for each row of x.

    Raises:
        TypeError: spec is not a CellSpec; x, hx or a parameter is not floating; or hx is not one array, or a tuple of
            as many as the states.
        ValueError: x or hx is neither 1-D nor 2-D, or params does not match `spec.shapes()`.
        RuntimeError: the size of x or hx does not fit.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 10, 20)
    >>> jaxrnn.apply_cell(spec, spec.init(jax.random.key(0)), jax.numpy.ones((3, 10))).shape
    (3, 20)
    """
    return call_cell(Options.of("apply_cell", options, CellKeywords), spec, params, x, hx)


def call_cell(options: Options, spec: CellSpec, params: Mapping[str, ArrayLike], x: ArrayLike, hx: HX = None) -> State:
    """As `apply_cell`, with the options as one value."""
    _check_spec(spec, CellSpec)
    x = _floating("x", x)
    if x.ndim not in (1, 2):
        raise ValueError(f"x should be 1-D (unbatched) or 2-D (batched), got shape {x.shape}")
    _check_features("x", spec, x)
    state = _states(spec, "hx", hx, spec.state_shapes(*x.shape[:-1]))
    return _unwrap(_run_cell(spec, options, _Given(_parameters(spec, params), x, state)))


class _Form(NamedTuple):
    """The layout of a call's arrays."""

    batched: bool
    batch_first: bool = False

    def time_major(self, given: _Given) -> _Given:
        """Convert to time-major rows. Unbatched input becomes a batch of one."""
        x, reset, lengths = given.x, given.reset, given.lengths
        if self.batched:
            if self.batch_first:
                x, reset = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, reset))
            return given._replace(x=x, reset=reset)
        x, reset, lengths = jax.tree.map(lambda a: jnp.expand_dims(a, min(a.ndim, 1)), (x, reset, lengths))
        states = given.state, given.reset_state, given.masks
        state, reset_state, masks = jax.tree.map(lambda a: a[:, None], states)
        return _Given(given.params, x, state, reset_state, lengths, reset, masks)

    def restore(self, x: jax.Array, state: Arrays) -> tuple[jax.Array, Arrays]:
        """Convert results back to the caller's layout."""
        if not self.batched:
            return jax.tree.map(lambda a: a[:, 0], (x, state))
        return (x.swapaxes(0, 1) if self.batch_first else x), state

    def restore_every(self, a: jax.Array) -> jax.Array:
        """Like `restore`, for arrays of every step, (layers, time, batch, features)."""
        return a.swapaxes(1, 2) if self.batch_first else a if self.batched else a[:, :, 0]


class _Given(NamedTuple):
    """The arrays of a call, after their checks."""

    params: dict[str, jax.Array]
    x: jax.Array
    state: Arrays | None
    reset_state: Arrays | None = None
    lengths: jax.Array | None = None
    reset: jax.Array | None = None
    masks: Arrays | None = None

    def promote(self, dtype: Any) -> _Given:
        """Cast params and x. States keep their dtype: `recurrence` carries them in float32 at least."""
        if dtype is None:
            dtype = jnp.result_type(*jax.tree.leaves((self.params, self.x, self.state, self.reset_state)))
        params, x = jax.tree.map(lambda a: a.astype(dtype), (self.params, self.x))
        return self._replace(params=params, x=x)


_BATCH_AXES = (None, 1, 1, 1, 0, 1, 1)  # of each field of `_Given`, once time-major


def _given(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX,
    *,
    lengths: Lengths | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
) -> tuple[_Form, _Given, Callable[[jax.Array], Output]]:
    """Check the arguments, and pad a PackedSequence. The function that is returned packs the output again."""
    packed = x if isinstance(x, PackedSequence) else None
    if packed is not None and lengths is not None:
        raise ValueError("lengths should be None for a PackedSequence, which has lengths of its own")
    array, form, (steps, *batch) = _input(spec, x) if packed is None else _packed_input(spec, packed)
    shapes = spec.state_shapes(*batch)
    state = _states(spec, "hx", hx, shapes)
    if reset is None and reset_state is not None:
        raise ValueError("reset should be given with reset_state: a boolean array, True at the steps to reset before")
    marks = _reset(spec, reset, array.shape[:-1])
    restart = _states(spec, "reset_state", reset_state, shapes)
    masks = None
    if spec.dropout and dropout_masks is not None:
        rows = (steps, *batch) if packed is None else array.shape[:1]
        masks = _masks(dropout_masks, spec.num_layers - 1, (*rows, spec.num_directions * spec.output_size))
    if packed is None:
        ends = _lengths(lengths, tuple(batch), steps)
        given = _Given(_parameters(spec, params), array, state, restart, ends, marks, masks)
        return form, given, lambda output: output
    where = layout(packed)
    array, marks, masks = jax.tree.map(lambda a: pad(a, where.places), (array, marks, masks))
    # Without lengths if all rows are as long as the longest: one trace for all such rows.
    ends = None if where.lengths.min() == where.lengths.max() else in_jax(where.lengths)
    given = _Given(_parameters(spec, params), array, state, restart, ends, marks, masks)
    return form, given, lambda output: packed._replace(data=in_jax(pack(output, where.rows)))


def _input(spec: Spec, x: Any) -> tuple[jax.Array, _Form, tuple[int, ...]]:
    """The input array, its form, and its sizes: (time, batch), or (time,) if it is unbatched."""
    if hasattr(x, "batch_sizes"):
        raise TypeError(
            f"x should be an array or a jaxrnn.PackedSequence, got a PackedSequence of {type(x).__module__}: "
            "pack the rows with jaxrnn.pack_padded_sequence"
        )
    x = _floating("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x should be 2-D (unbatched) or 3-D (batched), got shape {x.shape}")
    _check_features("x", spec, x)
    form = _Form(x.ndim == 3, x.ndim == 3 and spec.batch_first)
    sizes = x.shape[1::-1] if form.batch_first else x.shape[:-1]
    if sizes[0] == 0:
        raise RuntimeError(f"x should have at least one time step on axis {int(form.batch_first)}, got shape {x.shape}")
    return x, form, sizes


def _packed_input(spec: Spec, x: PackedSequence) -> tuple[jax.Array, _Form, tuple[int, ...]]:
    data = _floating("x.data", x.data)
    if data.ndim != 2:
        raise RuntimeError(f"x.data should have shape (rows, input_size={spec.input_size}), got {data.shape}")
    _check_features("x.data", spec, data)
    return data, _Form(batched=True), (len(x.batch_sizes), int(x.batch_sizes[0]))


# Jitted on the frozen settings, so that a module called eagerly in a loop compiles once.
@functools.partial(jax.jit, static_argnames=("spec", "options", "form", "every"))
def _run(
    spec: Spec, options: Options, form: _Form, given: _Given, key: jax.Array | None, every: bool = False
) -> tuple[jax.Array, Arrays, tuple[Arrays, ...]]:
    """The output, the states, and with `every` the states and gates of every step."""
    given = form.time_major(given.promote(options.dtype))
    dtypes = [given.x.dtype for _ in spec.cell.states] if given.state is None else [a.dtype for a in given.state]
    given = _Given(*meshes.aligned(*zip(given, _BATCH_AXES, strict=True)))
    params, x, state, reset_state, lengths, reset, masks = given
    if state is None:
        state = tuple(jnp.broadcast_to(_zeros(x), shape) for shape in spec.state_shapes(x.shape[1]))
    x, state = meshes.varying_with((x, state), (given._replace(state=state), key))
    marks, empty, first = steps.Marks(reset=None if reset is None else reset[..., None]), None, state
    if lengths is not None:
        times = jnp.arange(x.shape[0], dtype=jnp.int32)
        ended = (times[:, None] >= lengths.astype(jnp.int32)[None])[..., None]
        # NaN where no step is made would reach the gradients through products.
        x = jnp.where(ended, jnp.zeros_like(x), x)
        marks = steps.Marks(ended, None if marks.reset is None else marks.reset & ~ended)
        if given.state is not None:
            empty = ended[0]
            state = steps.select(empty, tuple(map(jnp.zeros_like, state)), state)
    dropout = key if masks is None else masks
    x, state, runs = stack.run(spec, options, params, x, state, marks, reset_state, dropout, every)
    x, state = form.restore(x, steps.select(empty, first, _cast(state, dtypes)))
    if not every:
        return x, state, ()
    states, gates = jax.tree.map(lambda *a: jnp.stack(a), *((run.state, run.gates) for run in runs))
    states = _cast(states, dtypes)
    if empty is not None:
        states = steps.select(empty, tuple(a[:, None] for a in first), states)
    states, gates = jax.tree.map(form.restore_every, (states, gates))
    return x, state, (states, gates)


def _cast(arrays: Arrays, dtypes: Sequence[jnp.dtype]) -> Arrays:
    return tuple(a.astype(dtype) for a, dtype in zip(arrays, dtypes, strict=True))


def _zeros(x: jax.Array) -> jax.Array:
    """A zero for each row of x, (batch, 1), sharded like x.

    XLA may replicate a constant zero state, and then gather the batch at every step. This zero depends on x. XLA would
    simplify `where(c, 0, 0)` to a constant, but not 0 times a float, which might be NaN.
    """
    first = jax.lax.stop_gradient(x[0, :, :1])
    return 0 * jnp.abs(jnp.where(jnp.isfinite(first), first, jnp.zeros((), x.dtype)))


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _run_cell(spec: CellSpec, options: Options, given: _Given) -> Arrays:
    params, x, state, *_ = given.promote(options.dtype)
    batch = 0 if x.ndim == 2 else None
    params, x, state = meshes.aligned((params, None), (x, batch), (state, batch))
    if state is None:
        state = tuple(jnp.zeros(shape, x.dtype) for shape in spec.state_shapes(*x.shape[:-1]))
    after = recurrence.step(steps.Settings(spec.cell, options), params, x, state)
    return tuple(a.astype(first.dtype) for a, first in zip(after, state, strict=True))


def _check_features(name: str, spec: Spec | CellSpec, x: jax.Array) -> None:
    if x.shape[-1] != spec.input_size:
        raise RuntimeError(
            f"{name} should have input_size={spec.input_size} features on its last axis, got shape {x.shape}"
        )


def _check_spec(spec: object, kind: type) -> None:
    if not isinstance(spec, kind):
        remedy = f"make one of a cell: jaxrnn.{kind.__name__}(jaxrnn.LSTM_CELL, input_size, hidden_size)"
        if isinstance(getattr(spec, "spec", None), kind):
            remedy = "give the module's own: module.spec"
        raise TypeError(f"spec should be a jaxrnn.{kind.__name__}, got {type(spec).__name__}: {remedy}")


def _floating(name: str, value: Any) -> jax.Array:
    if isinstance(value, Sequence):  # jnp.asarray would stack it, maybe along the wrong axis
        remedy = (
            ": of the (output, state) that a module returns, give output" if name == "x" and len(value) == 2 else ""
        )
        raise TypeError(f"{name} should be one array, got {type(value).__name__} of length {len(value)}{remedy}")
    array = in_jax(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} should be floating, got {array.dtype}")
    return array


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
    """Check hx against the shape of each state. None stays None: zeros are made later, where the dtype is known."""
    if hx is None:
        return None
    names = [f"{name}_0" for name in spec.cell.states]
    several = len(names) > 1
    wanted = f"a tuple ({', '.join(names)})" if several else f"one array {names[0]}"
    if several != isinstance(hx, Sequence):
        raise TypeError(f"{argument} should be {wanted}, got {_described(hx)}")
    values = tuple(hx) if several else (hx,)
    if any(isinstance(value, Sequence) for value in values):
        raise TypeError(
            f"{argument} should be {wanted} of shapes {', '.join(map(str, shapes))}, got {_described(hx)}, the first "
            f"{_described(values[0])}. To make it from a pair (h, c) for each layer and direction: "
            f"`h, c = map(jnp.stack, zip(*pairs))`; Flax's pairs are (c, h): `c, h = map(jnp.stack, zip(*pairs))`"
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


def _described(value: Any) -> str:
    """What was given in place of a state. The class of an array is private to JAX."""
    if isinstance(value, Sequence):
        return f"a {type(value).__name__} of {len(value)}"
    return f"one array of shape {jnp.shape(value)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _for_all_rows(name: str, array: jax.Array, shape: tuple[int, ...], batched: bool, one_step: bool) -> jax.Array:
    """Broadcast a state of the last axis alone, or with a batch of one, to all rows."""
    if array.shape == shape:
        return array
    *layers, _, size = shape if batched else (None, *shape)
    if array.shape == (size,) or (batched and array.shape == (*layers, 1, size)):
        return jnp.broadcast_to(array, shape)
    # As in torch, whose cells tell axes from sizes. (layers, size) is refused, too: it might be (batch, size).
    error = ValueError if one_step and array.ndim not in (1, 2) else RuntimeError
    remedy = f": for one state for all rows, {(*layers, 1, size)}" if batched and not one_step else ""
    raise error(f"{name} should have shape {shape}, got {array.shape}{remedy}")


def _lengths(lengths: Any, shape: tuple[int, ...], steps: int) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = stacked(lengths)
    array = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths, None if np.size(lengths) else np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths should be integers, got {array.dtype}")
    if array.shape != shape:
        raise RuntimeError(f"lengths should have shape {shape}, one for each row of x, got {array.shape}")
    # Traced values cannot be read, nor those on the devices of other processes.
    if not is_traced(array) and getattr(array, "is_fully_addressable", True):
        values = jax.device_get(array)
        if np.any((values < 0) | (values > steps)):
            raise ValueError(f"lengths should be from 0 to {steps}, the time steps of x, got {values.tolist()}")
    return in_jax(array)


def _reset(spec: Spec, reset: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if reset is None:
        return None
    if spec.bidirectional:
        raise ValueError("reset should be None for a bidirectional network, whose backward direction starts at the end")
    reset = stacked(reset)
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
