"""The engine for everything: `jax.lax.scan` over time."""

import functools
from collections.abc import Callable

import jax
from jax import lax

from jaxrnn import steps
from jaxrnn.cells import Arrays
from jaxrnn.steps import Marks, Run, Steps


class Scan:
    """Loops of `jax.lax.scan`, of which JAX transposes the second into the backward pass."""

    def refuses(self, run: Run) -> str | None:
        return None

    def forward(self, run: Run) -> tuple[Steps, Arrays]:
        def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, Steps]:
            gates, marks = step
            state, sums = steps.advance(run, gates, marks, state)
            return state, steps.returned(run, marks, state, sums)

        last, every = _scan(run)(body, run.state, (run.gates, run.marks))
        return every, last

    def states_and_sums(self, run: Run) -> tuple[Arrays, Arrays | None, Arrays]:
        recompute = run.settings.options.remat == "gates"

        def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, tuple]:
            gates, marks = step
            state, sums = steps.advance(run, gates, marks, state)
            return state, (state, None if recompute else sums)

        last, (states, sums) = _scan(run)(body, run.state, (run.gates, run.marks))
        return states, sums, last

    def tangents(self, run: Run, before: Arrays, sums: Arrays, tangent: Run, d_sums: jax.Array) -> tuple[Steps, Arrays]:
        cell, recurrent, lay = run.settings.cell, run.recurrent, run.settings.layout
        product = functools.partial(steps.product, run.settings)

        def step(*a: Arrays) -> tuple[Arrays, Callable]:
            return jax.linearize(cell.step, *a, *steps.own(cell, recurrent.own), *run.captured)

        after, push = jax.vmap(step)(*steps.arguments(cell, run.gates, sums), before)
        d_inputs = tuple(d if name in cell.apart else None for name, d in zip(cell.gates, tangent.gates, strict=True))
        d_projected, weight_hr = None, None
        if recurrent.weight_hr is not None and tangent.recurrent.weight_hr is not None:
            d_projected, weight_hr = product(after[0], tangent.recurrent.weight_hr), recurrent.weight_hr.T
        transposed = None if recurrent.weight_hh is None else lay.transposed(recurrent.weight_hh)
        others = (*steps.own(cell, tangent.recurrent.own), *tangent.captured)

        def body(d_state: Arrays, step: tuple) -> tuple[Arrays, Steps]:
            push, d_sums, d_inputs, d_projected, marks = step
            d_before = steps.select(marks.reset, tangent.reset_state, d_state)
            if transposed is not None:
                d_sums = d_sums + product(d_before[0], *transposed)
            d_sums = lay.split(d_sums)
            d_after = tuple(push(*steps.arguments(cell, d_inputs, d_sums), d_before, *others))
            if weight_hr is not None:
                d_after = (product(d_after[0], weight_hr, contract=1) + d_projected, *d_after[1:])
            d_state = steps.select(marks.ended, d_state, d_after)
            return d_state, steps.returned(run, marks, d_state, d_sums)

        d_last, every = _scan(run)(body, tangent.state, (push, d_sums, d_inputs, d_projected, run.marks))
        return every, d_last


def _scan(run: Run) -> Callable:
    return functools.partial(lax.scan, reverse=run.settings.reverse, unroll=run.settings.options.unroll)
