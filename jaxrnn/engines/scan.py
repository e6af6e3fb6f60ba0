"""The engine for everything: `jax.lax.scan` over time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import steps
from jaxrnn._compat import Kernel, by_platform, time_major
from jaxrnn.cells import Arrays
from jaxrnn.steps import Marks, Run, Steps


class Form(NamedTuple):
    """How loops are written for a platform.

    Attributes:
        unroll: steps made at a time, unless the options say it.
        joined: whether the sums of all gates are stacked as one array: one update a step.
        packed: whether the arrays of a step that a loop reads are side by side in one.
    """

    unroll: int = 1
    joined: bool = False
    packed: bool = False


_CPU = Form()
# On a GPU, every update of an array is a launch, and a launch takes longer than most steps.
_GPU = Form(unroll=4, joined=True)
# A TPU's tiles are 128 numbers wide. XLA lays narrower arrays out with the time inside the tiles, to fill them, and
# then gathers every step.
_NARROW = Form(packed=True)
_LANES = 128


class Linear(NamedTuple):
    """What the tangents of a run are linear in: the tangents of what they are computed from."""

    sums: jax.Array
    inputs: Arrays  # the input's part of the gates that are apart
    state: Arrays
    reset_state: Arrays | None
    weight_hr: jax.Array | None
    others: tuple[Any, ...]  # of the cell's own parameters, and of what its step closes over


class Scan:
    """Loops of `jax.lax.scan`, of which JAX transposes the second into the backward pass."""

    def refuses(self, run: Run) -> str | None:
        return None

    def forward(self, run: Run) -> tuple[Steps, Arrays]:
        return _by_platform(_forward, run)

    def states_and_sums(self, run: Run) -> tuple[Arrays, Arrays | None, Arrays]:
        return _by_platform(_states_and_sums, run)

    def tangents(self, run: Run, before: Arrays, sums: Arrays, tangent: Run, d_sums: jax.Array) -> tuple[Steps, Arrays]:
        cell = run.settings.cell
        inputs = tuple(d for name, d in zip(cell.gates, tangent.gates, strict=True) if name in cell.apart)
        others = (*steps.own(cell, tangent.recurrent.own), *tangent.captured)
        linear = Linear(d_sums, inputs, tangent.state, tangent.reset_state, tangent.recurrent.weight_hr, others)
        # Of the gates, only those that are apart are read: this way, the others are not kept for the backward pass.
        whole, _ = steps.arguments(cell, run.gates, sums)
        return self.pushed(run._replace(gates=whole), before, sums, linear)

    def pushed(self, run: Run, before: Arrays, sums: Arrays, linear: Linear) -> tuple[Steps, Arrays]:
        """As `tangents`, a function of what it is linear in."""
        return _by_platform(_pushed, run, (before, sums), linear)


def _by_platform(function: Callable, run: Run, others: tuple = (), linear: Any = ()) -> Any:
    """Call a function of a form, a run and more, with the form for the platform that the program is lowered for."""
    settings, dtype, *arrays = run

    def of(form: Form) -> Callable[[Any, Any], Any]:
        def call(constants: Any, linear: Any) -> Any:
            arrays, others = constants
            return function(form, Run(settings, dtype, *arrays), *others, *(linear and [linear]))

        return call

    kernels = {platform: Kernel(of(form), of_jax=True) for platform, form in _forms(run).items() if form != _CPU}
    return by_platform(of(_CPU), kernels, (arrays, others), linear)


def _forms(run: Run) -> dict[str | None, Form]:
    if run.settings.options.hidden_axis is not None:  # what is exchanged at each step takes far longer than launches
        return {}
    return {"cuda": _GPU, "rocm": _GPU, "tpu": _NARROW if run.gates[0].shape[-1] < _LANES else _CPU}


def _forward(form: Form, run: Run) -> tuple[Steps, Arrays]:
    def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, Steps]:
        gates, marks = step
        state, sums = steps.advance(run, gates, marks, state)
        return state, steps.returned(run, marks, state, sums)

    last, every = _scan(form, run)(body, run.state, (run.gates, run.marks))
    return every, last


def _states_and_sums(form: Form, run: Run) -> tuple[Arrays, Arrays | None, Arrays]:
    recompute, lay = run.settings.options.remat == "gates", run.settings.layout

    def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, tuple]:
        gates, marks = step
        state, sums = steps.advance(run, gates, marks, state)
        saved: Any = lay.join(sums) if form.joined else sums
        return state, (state, None if recompute else saved)

    last, (states, saved) = _scan(form, run)(body, run.state, (run.gates, run.marks))
    return states, lay.split(saved) if form.joined and not recompute else saved, last


def _pushed(form: Form, run: Run, before: Arrays, sums: Arrays, linear: Linear) -> tuple[Steps, Arrays]:
    cell, recurrent, lay = run.settings.cell, run.recurrent, run.settings.layout
    product = functools.partial(steps.product, run.settings)

    def step(*a: Arrays) -> tuple[Arrays, Callable]:
        return jax.linearize(cell.step, *a, *steps.own(cell, recurrent.own), *run.captured)

    after, push = jax.vmap(step)(*steps.arguments(cell, run.gates, sums), before)
    d_projected, weight_hr = None, None
    if recurrent.weight_hr is not None and linear.weight_hr is not None:
        d_projected, weight_hr = product(after[0], linear.weight_hr), recurrent.weight_hr.T
    transposed = None if recurrent.weight_hh is None else lay.transposed(recurrent.weight_hh)

    def body(d_state: Arrays, step: tuple) -> tuple[Arrays, Steps]:
        push, d_sums, d_inputs, d_projected, marks = step
        d_before = steps.select(marks.reset, linear.reset_state, d_state)
        if transposed is not None:
            d_sums = d_sums + product(d_before[0], *transposed)
        d_sums = lay.split(d_sums)
        inputs = iter(d_inputs)
        d_gates = tuple(next(inputs) if name in cell.apart else None for name in cell.gates)
        d_after = tuple(push(*steps.arguments(cell, d_gates, d_sums), d_before, *linear.others))
        if weight_hr is not None:
            d_after = (product(d_after[0], weight_hr, contract=1) + d_projected, *d_after[1:])
        d_state = steps.select(marks.ended, d_state, d_after)
        return d_state, steps.returned(run, marks, d_state, d_sums)

    xs = push, linear.sums, linear.inputs, d_projected, run.marks
    d_last, every = _scan(form, run)(body, linear.state, xs)
    return every, d_last


def _scan(form: Form, run: Run) -> Callable:
    known = isinstance(run.gates[0].shape[0], int)  # a symbolic time axis, in an export, cannot be split
    unroll = run.settings.options.unroll or (form.unroll if known else 1)
    scan = functools.partial(lax.scan, reverse=run.settings.reverse, unroll=unroll)
    return functools.partial(_packed, scan) if form.packed else scan


def _packed(scan: Callable, body: Callable, state: Any, every: tuple) -> tuple[Any, Any]:
    """Scan over arrays of all steps that are side by side in one: those of each argument."""
    # Each by itself, for what is linear in the tangents must not be mixed with what is not.
    places, packed = zip(*map(_side_by_side, every), strict=True)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or JAX takes what is known apart before the loop
    def of_packed(state: Any, step: Any) -> tuple[Any, Any]:
        return body(state, tuple(each.apart(part) for each, part in zip(places, step, strict=True)))

    return scan(of_packed, state, jax.tree.map(time_major, packed))


class _Places(NamedTuple):
    """Where the arrays of a tree are, some of them side by side along the last axis of one."""

    tree: Any
    widths: list[int]  # of each leaf; 0 for one that is by itself

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
