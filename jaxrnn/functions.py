"""The pure functions, for parameters that no module holds; and the context in which other libraries read programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxrnn._compat import is_plain
from jaxrnn._core.calls import HX, Output, call, call_cell, call_every, call_step
from jaxrnn._core.options import EngineNames, MeshAxis, Options, Remat
from jaxrnn.cells import StateT
from jaxrnn.packed import Lengths, PackedSequence
from jaxrnn.spec import CellSpec, Spec


@overload
def apply(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    lengths: Lengths | None = None,
    mask: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    remat: Remat = "none",
    hidden_axis: MeshAxis | None = None,
    unroll: int | None = None,
    engine: EngineNames = "auto",
) -> tuple[jax.Array, StateT]: ...
@overload
def apply(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: PackedSequence,
    hx: HX = None,
    *,
    mask: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    remat: Remat = "none",
    hidden_axis: MeshAxis | None = None,
    unroll: int | None = None,
    engine: EngineNames = "auto",
) -> tuple[PackedSequence, StateT]: ...
def apply(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    lengths: Lengths | None = None,
    mask: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    remat: Remat = "none",
    hidden_axis: MeshAxis | None = None,
    unroll: int | None = None,
    engine: EngineNames = "auto",
) -> tuple[Output, StateT]:
    """Run a recurrent network over a sequence, as torch's RNN, LSTM and GRU modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched (time,
            input_size); floating. Or a PackedSequence of such steps.
        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the shapes
            that are returned; zeros if None. A state that all rows share, such as a learned one, may have a batch of 1,
            or the last axis alone.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all steps if
            None. Padding in x affects no result and no gradient. Under jit lengths are data, and cannot be checked: a
            length below 0 counts as 0, and one above time as time.
        mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the shape of x, or its
            data, without features. The results are those of the valid steps alone: at a masked step the state is held,
            and the output is 0.
        reset: True at the steps before which the state is reset, such as the first of an episode; boolean, of the shape
            of x, or its data, without features. Ignored at masked steps and past a row's end. Not for a bidirectional
            network.
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_key: a jax random key, for dropout and zoneout in training. Without it there is no dropout but that of
            `dropout_masks`, and zoneout takes its mean.
        dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer but the last an
            array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions * output size) even with
            `batch_first`, or (1, batch, ...) for one mask for all steps; without batch for unbatched x, and laid out
            like its data for a PackedSequence.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of inputs and
            parameters. States have the dtype of hx, if given: a float32 state is returned unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": all it needs, nothing is recomputed. "gates":
            only the states; gates are recomputed. An integer k: the state before every k-th step; the rest is
            recomputed, k steps at a time. Values and gradients are the same, up to rounding.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None leaves sharding to
            XLA. For a module it may be a logical axis of Flax. A module stores it in its parameters' metadata, and
            creates them on the mesh in `jax.set_mesh`, if there is one.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and 1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of such names, of
            which the first that can run it does.

    Returns:
        `(output, h_n)`, or for a cell of several states `(output, (h_n, c_n))`. output: the last layer's outputs, laid
        out like x, with directions * output size features, 0 in padding. h_n and c_n: the states after each row's
        last step, of the full shape of hx. The backward direction starts at each row's last step. A row of length 0
        keeps its hx. For a PackedSequence, output is one, and rows of hx and states are in their original order.

    Raises:
        TypeError: spec is not a Spec; x, hx, reset_state or a parameter is not floating; hx or reset_state is not one
            array, or for a cell of several states not a tuple of as many; lengths are not integers; or mask or
            reset is not boolean.
        ValueError: x is neither 2-D nor 3-D; params does not match `spec.shapes()`; a length is out of range; lengths
            are given with a PackedSequence, or reset with a bidirectional network; dropout_masks have other shapes, or
            dropout is 0; remat, unroll or engine has no such value; the engine cannot run this; or hidden_axis is not
            in the mesh, is not of type Auto, or does not divide hidden_size.
        RuntimeError: the size of x, hx, lengths, mask, reset or reset_state does not fit, or the sequence is empty.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2)
    >>> params = spec.init(jax.random.key(0))
    >>> output, (h_n, c_n) = jaxrnn.apply(spec, params, jax.numpy.ones((5, 3, 10)))
    >>> output.shape, h_n.shape, c_n.shape
    ((5, 3, 20), (2, 3, 20), (2, 3, 20))
    """
    return call(
        Options(dtype, precision, remat, hidden_axis, unroll, engine),
        spec,
        params,
        x,
        hx,
        lengths=lengths,
        mask=mask,
        reset=reset,
        reset_state=reset_state,
        dropout_key=dropout_key,
        dropout_masks=dropout_masks,
    )


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


def trajectory(
    spec: Spec,
    params: Mapping[str, ArrayLike],
    x: ArrayLike | PackedSequence,
    hx: HX = None,
    *,
    lengths: Lengths | None = None,
    mask: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    remat: Remat = "none",
    hidden_axis: MeshAxis | None = None,
    unroll: int | None = None,
    engine: EngineNames = "auto",
) -> Trajectory:
    """Look inside: run like `jaxrnn.apply`, and return every state and every gate of every layer at every step.

    Use it to study saturated gates, what a forget gate keeps, or how a cell's state grows. It can be differentiated.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`. Those of an NNX module `m`, whose spec is
            `m.spec`, are `nnx.to_pure_dict(nnx.state(m, nnx.Param))`; those of a Linen module `variables["params"]`.
        x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched (time,
            input_size); floating. Or a PackedSequence of such steps.
        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the shapes
            that are returned; zeros if None. A state that all rows share, such as a learned one, may have a batch of 1,
            or the last axis alone.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all steps if
            None. Padding in x affects no result and no gradient. Under jit lengths are data, and cannot be checked: a
            length below 0 counts as 0, and one above time as time.
        mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the shape of x, or its
            data, without features. The results are those of the valid steps alone: at a masked step the state is held,
            and the output is 0.
        reset: True at the steps before which the state is reset, such as the first of an episode; boolean, of the shape
            of x, or its data, without features. Ignored at masked steps and past a row's end. Not for a bidirectional
            network.
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_key: a jax random key, for dropout and zoneout in training. Without it there is no dropout but that of
            `dropout_masks`, and zoneout takes its mean.
        dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer but the last an
            array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions * output size) even with
            `batch_first`, or (1, batch, ...) for one mask for all steps; without batch for unbatched x, and laid out
            like its data for a PackedSequence.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of inputs and
            parameters. States have the dtype of hx, if given: a float32 state is returned unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": all it needs, nothing is recomputed. "gates":
            only the states; gates are recomputed. An integer k: the state before every k-th step; the rest is
            recomputed, k steps at a time. Values and gradients are the same, up to rounding.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None leaves sharding to
            XLA. For a module it may be a logical axis of Flax. A module stores it in its parameters' metadata, and
            creates them on the mesh in `jax.set_mesh`, if there is one.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and 1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of such names, of
            which the first that can run it does.

    Returns:
        A `Trajectory`, whose arrays have the axis of h_n in front: (num_layers * directions, time, batch, features),
        or (num_layers * directions, batch, time, features) with `batch_first`, without batch for unbatched x. The rows
        of a PackedSequence are padded, and in their original order. In padding, states are held, and gates are 0.
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
    states, gates = call_every(
        Options(dtype, precision, remat, hidden_axis, unroll, engine),
        spec,
        params,
        x,
        hx,
        lengths=lengths,
        mask=mask,
        reset=reset,
        reset_state=reset_state,
        dropout_key=dropout_key,
        dropout_masks=dropout_masks,
    )
    return Trajectory(states, gates)


def apply_step(
    spec: Spec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    hidden_axis: MeshAxis | None = None,
    engine: EngineNames = "auto",
) -> tuple[jax.Array, StateT]:
    """Make one step through all layers: as `jaxrnn.apply` on a sequence of one step, without the axis of time.

    Args:
        spec: the settings, of one direction.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (batch, input_size) or unbatched (input_size,); floating.
        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the shapes
            that are returned; zeros if None. A state that all rows share, such as a learned one, may have a batch of 1,
            or the last axis alone.
        reset: True for the rows whose state is reset before the step; boolean, (batch,), or for unbatched x ().
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_key: a jax random key, for dropout and zoneout in training. The same key at each step gives the same
            masks.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of inputs and
            parameters. States have the dtype of hx, if given: a float32 state is returned unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None leaves sharding to
            XLA. For a module it may be a logical axis of Flax. A module stores it in its parameters' metadata, and
            creates them on the mesh in `jax.set_mesh`, if there is one.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of such names, of
            which the first that can run it does.

    Returns:
        `(output, h_n)`, or for a cell of several states `(output, (h_n, c_n))`. output: the last layer's output,
        (batch, output size), without batch for unbatched x. h_n and c_n: the next state, of the full shape of hx.

    Raises:
        As `jaxrnn.apply`; and ValueError for a bidirectional network.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 10, 20, num_layers=2)
    >>> params, x = spec.init(jax.random.key(0)), jax.numpy.ones((3, 10))
    >>> output, state = jaxrnn.apply_step(spec, params, x)
    >>> output, state = jaxrnn.apply_step(spec, params, x, state, reset=jax.numpy.array([True, False, False]))
    >>> output.shape, state.shape
    ((3, 20), (2, 3, 20))
    """
    return call_step(
        Options(dtype, precision, hidden_axis=hidden_axis, engine=engine),
        spec,
        params,
        x,
        hx,
        reset=reset,
        reset_state=reset_state,
        dropout_key=dropout_key,
    )


def apply_cell(
    spec: CellSpec[StateT],
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    hx: HX = None,
    *,
    reset: ArrayLike | None = None,
    reset_state: HX = None,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> StateT:
    """Make one step, as torch's RNNCell, LSTMCell and GRUCell modules do.

    Args:
        spec: the settings.
        params: the parameters by name, of the shapes in `spec.shapes()`.
        x: the input, (batch, input_size) or unbatched (input_size,); floating.
        hx: the state, (batch, hidden_size) or for unbatched x (hidden_size,); zeros if None. For a cell of several
            states a tuple or list, (h, c) for an LSTM. All rows share a state (hidden_size,) or (1, hidden_size).
        reset: True for the rows whose state is reset before the step; boolean, (batch,), or for unbatched x ().
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_key: a jax random key, for zoneout in training.
        dtype: the floating dtype to compute in; by default the promoted dtype of x, params and hx. The next state has
            the dtype of hx, if given.
        precision: the precision of the products, as for `jax.lax.dot_general`.

    Returns:
        The next state, one row for each row of x.

    Raises:
        TypeError: spec is not a CellSpec; x, hx or a parameter is not floating; hx is not one array, or a tuple of as
            many as the states; or reset is not boolean.
        ValueError: x or hx is neither 1-D nor 2-D; params does not match `spec.shapes()`; or reset_state is given
            without reset.
        RuntimeError: the size of x, hx, reset or reset_state does not fit.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 10, 20)
    >>> jaxrnn.apply_cell(spec, spec.init(jax.random.key(0)), jax.numpy.ones((3, 10))).shape
    (3, 20)
    """
    return call_cell(
        Options(dtype, precision), spec, params, x, hx, reset=reset, reset_state=reset_state, dropout_key=dropout_key
    )


@contextlib.contextmanager
def plain_jaxprs() -> Iterator[None]:
    """In this context jaxrnn traces programs of JAX's own primitives alone, for libraries that read a jaxpr.

    jaxrnn has two primitives of its own. They choose the loop for a platform when the program is compiled, which is
    after an exporter such as jax2onnx reads it. In this context there are none of them, no custom derivatives, and no
    `jax.lax.scan` with `reverse=True`: the program is the one for a CPU, with plain loops forward in time. Results are
    the same, up to rounding.

    It holds for what is traced in it, of modules and functions alike. JAX traces a jitted function anew for it. As a
    decorator, `jaxrnn.plain_jaxprs()(function)`, it serves libraries that trace the function later. Leave it out for
    training: JAX's own derivatives take more memory, and `remat` has no effect on them.

    >>> import jax, jaxrnn
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(10, 20, rngs=nnx.Rngs(0))
    >>> with jaxrnn.plain_jaxprs():
    ...     program = jax.make_jaxpr(gru)(jax.numpy.ones((5, 3, 10)))
    >>> "by_platform" in str(program), "scan" in str(program)
    (False, True)
    """
    with is_plain(True):
        yield
