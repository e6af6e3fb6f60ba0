"""The engine that runs everything, by `jax.lax.scan` over time; and the forms of loops for each platform."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._compat import time_major
from jaxrnn._core import affine, steps
from jaxrnn._core.steps import Kept, Marks, Run, Settings, Steps
from jaxrnn.cells import Arrays


class Form(NamedTuple):
    """How loops are written for a platform.

    Attributes:
        inference: how many bytes the input's part of the gates may take in a block of steps, without a derivative.
            None for one block of all steps. A sequence of less than three such blocks is not split.
        training: the same, with a derivative.
        rows: with fewer rows, all steps are one block.
        many: with a derivative, each step is a block of its own from so many rows on; None: never.
        apart: whether the cotangents of the gates are computed before they are joined, because XLA's fusion of both is
            slow.
        unroll: how many steps an iteration of the loop has, unless the options say.
        joined: whether the loop stacks the sums of all gates as one array, which is one update a step.
        packed: whether the arrays that a loop reads at each step lie side by side in one.
        parallel: for a recurrence that is linear in the state: up to how many bytes the input's part of the gates may
            take in a step, for all steps of a block to run at once, by an associative scan.
        widened: whether loops stack bfloat16 as float32. On a CPU XLA cannot update bfloat16 arrays: at each step it
            would convert the whole stack to float32 and back.
    """

    inference: int | None = None
    training: int | None = None
    rows: int = 1
    many: int | None = None
    apart: bool = False
    unroll: int = 1
    joined: bool = False
    packed: bool = False
    parallel: int = 0
    widened: bool = False

    def scan(self, settings: Settings, body: Callable[..., Any], carry: Any, every: Any) -> tuple[Any, Any]:
        """As `jax.lax.scan` of `body(carry, step)`, in the direction of the settings."""
        length = jax.tree.leaves(every)[0].shape[0]
        if isinstance(length, int) and length == 1:
            carry, results = body(carry, jax.tree.map(lambda a: a[0], every))
            return carry, jax.tree.map(lambda a: a[None], results)
        if self.parallel and isinstance(length, int):
            return affine.scan(body, carry, every, settings.reverse)
        # A symbolic time axis, in an export, cannot be split.
        unroll = settings.options.unroll or (self.unroll if isinstance(length, int) else 1)
        scan = functools.partial(self.stacking(lax.scan), reverse=settings.reverse, unroll=unroll)
        return (functools.partial(_packed, scan) if self.packed else scan)(body, carry, every)

    def stacking(self, scan: Callable[..., Any]) -> Callable[..., Any]:
        """A scan whose results are stacked as the platform needs."""
        return functools.partial(_widened, scan) if self.widened else scan


# Found by a sweep over rows and sizes: `jaxrnn speed --sweep`.
_MIB = 2**20
_CPU = Form(inference=3 * _MIB, training=512 * _MIB, many=65, apart=True, widened=True)
# On a GPU, every update of an array is a launch, and a launch takes longer than most steps. XLA makes a CUDA graph of a
# loop, but not of a loop of loops, and that is worth more than memory unless there are many rows.
_GPU = Form(inference=64 * _MIB, training=64 * _MIB, rows=2048, many=2048, unroll=4, joined=True)
# A TPU's tiles are 128 numbers wide. XLA lays narrower arrays out with the time inside the tiles, to fill them, and
# then gathers every step.
_TPU = Form(inference=64 * _MIB, training=64 * _MIB, rows=512, many=1024)
_NARROW = _TPU._replace(packed=True)
_LANES = 128


def _linearized(run: Run, kept: Kept, single: bool, keep_sums: bool | None = False) -> Kept:
    """Replace the sums that are kept by the linear map of every step.

    Args:
        single: whether the block is one step, without an axis of time.
        keep_sums: whether the sums are kept instead. If None, they are if the linear map is much larger.
    """
    cell, recurrent = run.settings.cell, run.recurrent

    def step(*a: Any) -> tuple[Arrays, Callable]:
        return jax.linearize(cell.step, *a, *steps.cell_arguments(cell, recurrent.cell_params), *run.captured)

    if keep_sums:
        return kept
    assert kept.sums is not None
    after, push = (step if single else jax.vmap(step))(*kept.sums, kept.before)
    if keep_sums is None and _size(push) > _LARGER * _size((kept.sums, kept.before[1:])):
        return kept
    # Nothing but the recurrent product needs h any more.
    return Kept(
        (steps.scaled(kept.before[0], run.h_scale),), None, push, None if recurrent.weight_hr is None else after[0]
    )


def _size(tree: Any) -> int:
    """How many numbers a pytree has, symbolic axes counted as 1."""
    known = ([n for n in a.shape if isinstance(n, int)] for a in jax.tree.leaves(tree))
    return sum(map(math.prod, known))


def _once(body: Callable, carry: Any, step: Any) -> tuple[Any, Any]:
    """A step in place of a loop."""
    return body(carry, step)


class Linear(NamedTuple):
    """The tangents of the arrays that a run is computed from."""

    sums: jax.Array  # (T, B, G * H), or as the layout joins them
    inputs: Arrays  # of the input's part of each gate in cell.apart, (T, B, H)
    state: Arrays  # (B, P), then (B, H)
    reset_state: Arrays | None  # like `state`
    weight_hr: jax.Array | None  # (H, P)
    others: tuple[Any, ...]  # of the cell's own parameters, and of the arrays that its step closes over


_LARGER = 1.5  # how much larger than the sums a linear map may be, to be kept in their place


class Scan:
    """Two loops of `jax.lax.scan`: forward, and for the tangents, which JAX transposes into the backward pass."""

    keeps_sums: bool | None = None  # True: keep sums. False: keep linear maps. None: sums only if maps are much larger

    def refuses(self, run: Run) -> str | None:
        return None

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        # Devices exchange arrays at each step, which takes far longer than launches.
        if run.settings.options.hidden_axis is not None:
            return {None: Form()}
        narrow = run.gates[0].shape[-1] < _LANES
        return {None: _CPU, "cuda": _GPU, "rocm": _GPU, "tpu": _NARROW if narrow else _TPU}

    def run(self, form: Form, run: Run, keep: bool) -> tuple[Steps, Arrays, Kept | None]:
        cell, lay, marks = run.settings.cell, run.settings.layout, run.marks
        single = run.gates[0].ndim == run.state[0].ndim
        joined = form.joined and not single and not form.parallel
        again = run.settings.options.remat == "gates"

        def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, Any]:
            gates, marks = step
            state, sums = steps.advance(run, gates, marks, state)
            if not keep:
                return state, steps.returned(run, marks, state, sums)
            return state, (state, lay.join(sums) if joined else sums)

        scan = _once if single else functools.partial(form.scan, run.settings)
        last, found = scan(body, run.state, (run.gates, marks))
        if not keep:
            sums = None if found.sums is None else steps.arguments(cell, run.gates, found.sums)
            return found._replace(sums=sums), last, None
        states, sums = found
        both = steps.arguments(cell, run.gates, lay.split(sums) if joined else sums)
        before = run.state if single else steps.before(run.settings, run.state, states)
        kept = Kept(steps.select(marks.reset, run.reset_state, before), None if again else both)
        every = steps.returned(run, marks, states, both)
        return every, last, kept if again else _linearized(run, kept, single, self.keeps_sums)

    def tangents(self, form: Form, run: Run, kept: Kept, linear: Linear) -> tuple[Steps, Arrays]:
        cell, recurrent, lay = run.settings.cell, run.recurrent, run.settings.layout
        product = functools.partial(steps.product, run.settings)

        single = kept.before[0].ndim == linear.state[0].ndim
        if kept.push is None:
            kept = _linearized(run, kept, single)
        d_projected = weight_hr = None
        if recurrent.weight_hr is not None and kept.hidden is not None:
            weight_hr = recurrent.weight_hr.T
            d_projected = None if linear.weight_hr is None else product(kept.hidden, linear.weight_hr)
        transposed = None
        if recurrent.weight_hh is not None:
            stored = run.settings.stored
            transposed = (recurrent.weight_hh, lay.contract) if stored else lay.transposed(recurrent.weight_hh)
        apart = dict(zip(cell.apart, linear.inputs, strict=True))
        inputs = tuple(apart.get(name) for name in cell.gates)

        def body(d_state: Arrays, step: tuple) -> tuple[Arrays, Steps]:
            push, d_sums, d_inputs, d_projected, marks = step
            d_before = steps.select(marks.reset, linear.reset_state, d_state)
            if transposed is not None:
                d_sums = d_sums + product(steps.scaled(d_before[0], run.h_scale), *transposed)
            d_sums = lay.split(d_sums)
            if form.apart:
                # In one barrier, known arrays and arrays that are linear in the tangents would mix.
                d_sums, d_inputs = lax.optimization_barrier(d_sums), lax.optimization_barrier(d_inputs)
            d_after = tuple(push(*steps.arguments(cell, d_inputs, d_sums), d_before, *linear.others))
            if weight_hr is not None:
                d_output = product(d_after[0], weight_hr, contract=1)
                d_after = (d_output if d_projected is None else d_output + d_projected, *d_after[1:])
            d_state = steps.select(marks.held, d_state, steps.with_zoneout(cell, marks, d_before, d_after))
            return d_state, steps.returned(run, marks, d_state, d_sums)

        xs = kept.push, linear.sums, inputs, d_projected, run.marks
        scan = _once if single else functools.partial(form.scan, run.settings)
        d_last, every = scan(body, linear.state, xs)
        if every.sums is not None:
            every = every._replace(sums=steps.arguments(cell, inputs, every.sums))
        return every, d_last


def _widened(scan: Callable, body: Callable, carry: Any, every: Any, **options: Any) -> tuple[Any, Any]:
    """Scan, with results of bfloat16 in float32 until the loop has ended."""
    narrow: list[bool] = []

    def in_float32(carry: Any, step: Any) -> tuple[Any, Any]:
        carry, results = body(carry, step)
        leaves, tree = jax.tree.flatten(results)
        narrow[:] = [a.dtype == jnp.bfloat16 for a in leaves]
        wide = [a.astype(jnp.float32) if n else a for a, n in zip(leaves, narrow, strict=True)]
        return carry, jax.tree.unflatten(tree, wide)

    carry, results = scan(in_float32, carry, every, **options)
    leaves, tree = jax.tree.flatten(results)
    found = [a.astype(jnp.bfloat16) if n else a for a, n in zip(leaves, narrow, strict=True)]
    return carry, jax.tree.unflatten(tree, found)


def _packed(scan: Callable, body: Callable, state: Any, every: tuple) -> tuple[Any, Any]:
    """Scan over the arrays of each argument side by side in one array."""
    # Each argument by itself: arrays that are linear in the tangents must not be mixed with others.
    places, packed = zip(*map(_side_by_side, every), strict=True)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or JAX would split the known arrays before the loop
    def of_packed(state: Any, step: Any) -> tuple[Any, Any]:
        return body(state, tuple(each.apart(part) for each, part in zip(places, step, strict=True)))

    return scan(of_packed, state, jax.tree.map(time_major, packed))


class _Places(NamedTuple):
    """Where the arrays of a pytree are: some side by side along the last axis of one array, others by themselves."""

    tree: Any
    widths: list[int]  # of each leaf; 0 for a leaf by itself

    def apart(self, packed: tuple[jax.Array | None, list]) -> Any:
        whole, others = packed[0], iter(packed[1])
        leaves, begin = [], 0
        for width in self.widths:
            leaves.append(whole[..., begin : begin + width] if width and whole is not None else next(others))
            begin += width
        return jax.tree.unflatten(self.tree, leaves)


def _side_by_side(tree: Any) -> tuple[_Places, tuple[jax.Array | None, list]]:
    """The floating arrays with the most axes side by side, if shapes but for the last axis agree; others apart."""
    leaves, structure = jax.tree.flatten(tree)
    floating = [a for a in leaves if a.ndim > 1 and jnp.issubdtype(a.dtype, jnp.floating)]
    like = max(floating, key=lambda a: a.ndim, default=None)
    fits = [like is not None and (a.dtype, a.shape[:-1]) == (like.dtype, like.shape[:-1]) for a in leaves]
    widths = [a.shape[-1] if fit else 0 for a, fit in zip(leaves, fits, strict=True)]
    side = [a for a, fit in zip(leaves, fits, strict=True) if fit]
    whole = jnp.concatenate(side, axis=-1) if side else None
    return _Places(structure, widths), (whole, [a for a, fit in zip(leaves, fits, strict=True) if not fit])
