"""A call of layers or of a cell: its checks, and the conversion of its arrays to time-major padded rows, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrnn._core import dropout, meshes, recurrence, stack, steps
from jaxrnn._core.options import Options
from jaxrnn.cells import Arrays
from jaxrnn.packed import Lengths, PackedSequence, checked_lengths, in_jax, pack, pad, padding_of, stacked
from jaxrnn.spec import CellSpec, Spec

HX = ArrayLike | Sequence[ArrayLike] | None
State = Any  # a jax.Array, or for a cell of several states a tuple
Output = Any  # a jax.Array, or a PackedSequence if x is one


def call(
    options: Options,
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    **arguments: Any,
) -> tuple[Output, State]:
    """As `jaxrnn.apply`, with the options as one value."""
    restore, (output, state, _) = _call(options, spec, params, x, hx, every=False, **arguments)
    return restore(output), _unwrap(state)


def call_every(
    options: Options,
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    **arguments: Any,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The states and the gates of every step, by name: see `jaxrnn.trajectory`."""
    _, (*_, (states, gates)) = _call(options, spec, params, x, hx, every=True, **arguments)
    return dict(zip(spec.cell.states, states, strict=True)), dict(zip(spec.cell.gates, gates, strict=True))


def _call(
    options: Options,
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX,
    *,
    every: bool,
    dropout_key: jax.Array | None = None,
    **arguments: Any,
) -> tuple[Callable[[jax.Array], Output], tuple[jax.Array, Arrays, tuple[Arrays, ...]]]:
    _check_spec(spec, Spec)
    options.check_mesh(spec.hidden_size)
    axes, given, restore = _checked(spec, params, x, hx, **arguments)
    key = dropout_key if spec.is_random() else None
    return restore, _run_layers(spec, options, axes, given, key, every)


def call_step(
    options: Options,
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """As `jaxrnn.apply_step`, with the options as one value."""
    _check_spec(spec, Spec)
    if spec.bidirectional:
        raise ValueError("bidirectional should be False to make a step: the backward direction starts at the end")
    options.check_mesh(spec.hidden_size)
    given = _checked_step(spec, params, x, hx, reset, reset_state)
    axes, key = _Axes(given.x.ndim == 2, step=True), dropout_key if spec.is_random() else None
    output, state, _ = _run_layers(spec, options, axes, given, key)
    return output, _unwrap(state)


def call_cell(
    options: Options,
    spec: CellSpec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
) -> State:
    """As `jaxrnn.apply_cell`, with the options as one value."""
    _check_spec(spec, CellSpec)
    given = _checked_step(spec, params, x, hx, reset, reset_state)
    return _unwrap(_run_cell(spec, options, given, dropout_key if any(spec.cell.zoneout) else None))


def _checked_step(
    spec: Spec | CellSpec, params: Mapping[str, ArrayLike], x: Any, hx: HX, reset: ArrayLike | None, reset_state: HX
) -> _CallArrays:
    """The arrays of a step, of layers or a cell, without an axis of time."""
    x = _floating("x", x)
    if x.ndim not in (1, 2):
        raise ValueError(f"x should be 1-D (unbatched) or 2-D (batched), got shape {x.shape}")
    _check_features("x", spec, x)
    shapes = spec.state_shapes(*x.shape[:-1])
    _check_reset(reset, reset_state)
    state, restart = _states(spec, "hx", hx, shapes), _states(spec, "reset_state", reset_state, shapes)
    marks = _boolean("reset", reset, x.shape[:-1])
    return _CallArrays(_parameters(spec, params), x, state, restart, reset=marks)


class _Axes(NamedTuple):
    """The layout of a call's arrays."""

    batched: bool
    batch_first: bool = False
    step: bool = False  # one step, without an axis of time

    def time_major(self, given: _CallArrays) -> _CallArrays:
        """Convert to time-major rows. Unbatched input becomes a batch of one."""
        of_steps = given.x, given.reset, given.valid
        if self.step:
            of_steps = jax.tree.map(lambda a: a[None], of_steps)
        if self.batched:
            if self.batch_first:
                of_steps = jax.tree.map(lambda a: a.swapaxes(0, 1), of_steps)
            x, reset, valid = of_steps
            return given._replace(x=x, reset=reset, valid=valid)
        expanded = jax.tree.map(lambda a: jnp.expand_dims(a, min(a.ndim, 1)), (*of_steps, given.lengths))
        x, reset, valid, lengths = expanded
        states = given.state, given.reset_state, given.masks
        state, reset_state, masks = jax.tree.map(lambda a: a[:, None], states)
        return _CallArrays(given.params, x, state, reset_state, lengths, reset, masks, valid)

    def restore(self, x: jax.Array, state: Arrays) -> tuple[jax.Array, Arrays]:
        """Convert results back to the caller's layout."""
        if not self.batched:
            x, state = jax.tree.map(lambda a: a[:, 0], (x, state))
        x = x.swapaxes(0, 1) if self.batch_first else x
        return (x[0] if self.step else x), state

    def restore_every(self, a: jax.Array) -> jax.Array:
        """Like `restore`, for arrays of every step, (layers, time, batch, features)."""
        return a.swapaxes(1, 2) if self.batch_first else a if self.batched else a[:, :, 0]


class _CallArrays(NamedTuple):
    """The arrays of a call, after their checks."""

    params: dict[str, jax.Array]
    x: jax.Array
    state: Arrays | None
    reset_state: Arrays | None = None
    lengths: jax.Array | None = None
    reset: jax.Array | None = None
    masks: Arrays | None = None
    valid: jax.Array | None = None

    def promote(self, dtype: Any) -> _CallArrays:
        """Cast params and x. States keep their dtype: `recurrence` carries them in float32 at least."""
        if dtype is None:
            dtype = jnp.result_type(*jax.tree.leaves((self.params, self.x, self.state, self.reset_state)))
        params, x = jax.tree.map(lambda a: a.astype(dtype), (self.params, self.x))
        return self._replace(params=params, x=x)


_BATCH_AXES = (None, 1, 1, 1, 0, 1, 1, 1)  # of each field of `_CallArrays`, after `time_major`
_TRUE = {"reset": "True at the steps to reset before", "mask": "True at valid steps"}


def _checked(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX,
    *,
    lengths: Lengths | None = None,
    mask: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
) -> tuple[_Axes, _CallArrays, Callable[[jax.Array], Output]]:
    """Check the arguments, and pad a PackedSequence. The function that is returned packs the output again."""
    packed = x if isinstance(x, PackedSequence) else None
    if packed is not None and lengths is not None:
        raise ValueError("lengths should be None for a PackedSequence, which has lengths of its own")
    array, axes, (steps, *batch) = _input(spec, x) if packed is None else _packed_input(spec, packed)
    shapes = spec.state_shapes(*batch)
    state = _states(spec, "hx", hx, shapes)
    _check_reset(reset, reset_state)
    if reset is not None and spec.bidirectional:
        raise ValueError("reset should be None for a bidirectional network, whose backward direction starts at the end")
    marks, valid = _boolean("reset", reset, array.shape[:-1]), _boolean("mask", mask, array.shape[:-1])
    restart = _states(spec, "reset_state", reset_state, shapes)
    rows = (steps, *batch) if packed is None else array.shape[:1]
    masks = None if dropout_masks is None else _masks(dropout_masks, spec, rows, tuple(batch))
    if packed is None:
        ends = None if lengths is None else checked_lengths(lengths, tuple(batch), steps)
        given = _CallArrays(_parameters(spec, params), array, state, restart, ends, marks, masks, valid)
        return axes, given, lambda output: output
    where = padding_of(packed)
    array, marks, valid = jax.tree.map(lambda a: pad(a, where.places), (array, marks, valid))
    masks = jax.tree.map(lambda a: pad(a, where.places) if a.ndim == 2 else a, masks)
    # Without lengths if all rows are as long as the longest: one trace for all such rows.
    ends = None if where.lengths.min() == where.lengths.max() else in_jax(where.lengths)
    given = _CallArrays(_parameters(spec, params), array, state, restart, ends, marks, masks, valid)
    return axes, given, lambda output: packed._replace(data=in_jax(pack(output, where.rows)))


def _input(spec: Spec, x: Any) -> tuple[jax.Array, _Axes, tuple[int, ...]]:
    """The input array, its axes, and its sizes: (time, batch), or (time,) if it is unbatched."""
    if hasattr(x, "batch_sizes"):
        raise TypeError(
            f"x should be an array or a jaxrnn.PackedSequence, got a PackedSequence of {type(x).__module__}: "
            "pack the rows with jaxrnn.pack_padded_sequence"
        )
    x = _floating("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x should be 2-D (unbatched) or 3-D (batched), got shape {x.shape}")
    _check_features("x", spec, x)
    axes = _Axes(x.ndim == 3, x.ndim == 3 and spec.batch_first)
    sizes = x.shape[1::-1] if axes.batch_first else x.shape[:-1]
    if sizes[0] == 0:
        raise RuntimeError(f"x should have at least one time step on axis {int(axes.batch_first)}, got shape {x.shape}")
    return x, axes, sizes


def _packed_input(spec: Spec, x: PackedSequence) -> tuple[jax.Array, _Axes, tuple[int, ...]]:
    data = _floating("x.data", x.data)
    if data.ndim != 2:
        raise RuntimeError(f"x.data should have shape (rows, input_size={spec.input_size}), got {data.shape}")
    _check_features("x.data", spec, data)
    return data, _Axes(batched=True), (len(x.batch_sizes), int(x.batch_sizes[0]))


# Jitted on the frozen settings, so that a module called eagerly in a loop compiles once.
@functools.partial(jax.jit, static_argnames=("spec", "options", "axes", "every"))
def _run_layers(
    spec: Spec, options: Options, axes: _Axes, given: _CallArrays, key: jax.Array | None, every: bool = False
) -> tuple[jax.Array, Arrays, tuple[Arrays, ...]]:
    """The output, the states, and with `every` the states and gates of every step."""
    given = axes.time_major(given.promote(options.dtype))
    dtypes = [given.x.dtype for _ in spec.cell.states] if given.state is None else [a.dtype for a in given.state]
    given = _CallArrays(*meshes.aligned(*zip(given, _BATCH_AXES, strict=True)))
    params, x, state, reset_state, lengths, reset, masks, valid = given
    if state is None:
        state = tuple(jnp.broadcast_to(_zeros(x), shape) for shape in spec.state_shapes(x.shape[1]))
    x, state = meshes.varying_with((x, state), (given._replace(state=state), key))
    marks, empty, first = _marks(x.shape[0], lengths, valid, reset), None, state
    if marks.held is not None:
        # A NaN in the padding would reach gradients through products, as NaN * 0.
        x = jnp.where(marks.held, jnp.zeros_like(x), x)
        if given.state is not None:
            empty = marks.held[0] if marks.skipped is None else marks.skipped.all(axis=0)
            state = steps.select(empty, tuple(map(jnp.zeros_like, state)), state)
    x, state, runs = stack.run(spec, options, params, x, state, marks, reset_state, key, masks, every)
    x, state = axes.restore(x, steps.select(empty, first, _cast(state, dtypes)))
    if not every:
        return x, state, ()
    states, gates = jax.tree.map(lambda *a: jnp.stack(a), *((run.state, run.gates) for run in runs))
    states = _cast(states, dtypes)
    if empty is not None:
        states = steps.select(empty, tuple(a[:, None] for a in first), states)
    states, gates = jax.tree.map(axes.restore_every, (states, gates))
    return x, state, (states, gates)


def _marks(time: Any, lengths: jax.Array | None, valid: jax.Array | None, reset: jax.Array | None) -> steps.Marks:
    """Where the state is held, and where it is reset, from a call's lengths, mask and reset."""
    ended = skipped = None
    if lengths is not None:
        times = jax.lax.iota(jnp.int32, time)  # jax2onnx knows no arange of a symbolic size
        ended = (times[:, None] >= lengths.astype(jnp.int32)[None])[..., None]
    if valid is not None:
        skipped = ~valid[..., None] if ended is None else ~valid[..., None] | ended
        ended = None
    marks = steps.Marks(ended, skipped, None if reset is None else reset[..., None])
    if marks.held is None or marks.reset is None:
        return marks
    return marks._replace(reset=marks.reset & ~marks.held)


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
def _run_cell(spec: CellSpec, options: Options, given: _CallArrays, key: jax.Array | None) -> Arrays:
    params, x, state, reset_state, _, reset, *_ = given.promote(options.dtype)
    rows = x, state, reset_state, reset
    x, state, reset_state, reset = rows if x.ndim == 2 else jax.tree.map(lambda a: a[None], rows)
    params, x, state, reset_state, reset = meshes.aligned(
        (params, None), *((a, 0) for a in (x, state, reset_state, reset))
    )
    if state is None:
        state = tuple(jnp.zeros(shape, x.dtype) for shape in spec.state_shapes(x.shape[0]))
    marks = steps.Marks(
        reset=None if reset is None else reset[:, None], zoned=dropout.zoned_step(spec.cell, key, x, state)
    )
    after = recurrence.step(steps.Settings(spec.cell, options), params, x, state, marks, reset_state)
    after = tuple(a.astype(first.dtype) for a, first in zip(after, state, strict=True))
    return after if given.x.ndim == 2 else tuple(a[0] for a in after)


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
    """The kind of a value that is no state, in words. (The class of an array is private to JAX.)"""
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


def _check_reset(reset: ArrayLike | None, reset_state: HX) -> None:
    if reset is None and reset_state is not None:
        raise ValueError(f"reset should be given with reset_state: a boolean array, {_TRUE['reset']}")


def _boolean(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Check an argument that marks steps."""
    if value is None:
        return None
    value = stacked(value)
    array = in_jax(value, None if np.size(value) else bool)
    if array.dtype != bool:
        raise TypeError(f"{name} should be boolean, {_TRUE[name]}, got {array.dtype}")
    if array.shape != shape:
        raise RuntimeError(f"{name} should have the shape of x without its features, {shape}, got {array.shape}")
    return array


def _masks(masks: Sequence[ArrayLike], spec: Spec, rows: tuple[int, ...], batch: tuple[int, ...]) -> Arrays:
    count, features = spec.num_layers - 1, spec.num_directions * spec.output_size
    every, constant, shapes = (*rows, features), (1, *batch, features), [np.shape(mask) for mask in masks]
    if len(shapes) != count or any(shape not in (every, constant) for shape in shapes):
        wanted = f"{count} arrays of shape {every}, or for one mask for all steps {constant}"
        remedy = ": batch_first does not change them" if spec.batch_first else ""
        raise ValueError(f"dropout_masks should be {wanted}, got {shapes}{remedy}")
    if shapes and not spec.dropout:
        raise ValueError("dropout_masks should be None with dropout=0: give the layers the dropout of the masks")
    return tuple(map(in_jax, masks))


def _unwrap(state: Arrays) -> State:
    return state if len(state) > 1 else state[0]
