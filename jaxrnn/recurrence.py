"""One layer in one direction over time: `lax.scan`, and the one derivative rule that every transform shares.

The rule. The scan is linearised around its own trajectory. A step is pointwise, so its partial derivatives are arrays
like the gates, computed for all steps at once from what the forward scan saved. The tangents then obey a second scan,
linear in the tangents, whose only products are those with the recurrent weights. What a change of the weights adds,
`h dW_hh`, is known for all steps beforehand and is one product outside that scan; JAX transposes it into one product
for the gradient of the weights, where autodiff of the scan would add up a product a step.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxrnn.cells import Arrays, Cell

Weights = dict[str, jax.Array]


class Settings(NamedTuple):
    """What is fixed while a layer runs."""

    cell: Cell
    precision: lax.PrecisionLike = None
    reverse: bool = False


class Marks(NamedTuple):
    """Steps that are not like the others: boolean arrays (time, batch, 1), True where marked; None marks no step."""

    ended: jax.Array | None = None  # past the row's end: the state is held, and the output is 0
    reset: jax.Array | None = None  # the state is put back before the step


UNMARKED = Marks()


class Recurrent(NamedTuple):
    """The weights inside the loop, turned once outside it so that products read them along their rows."""

    weight_hh: jax.Array  # (output size, gates * hidden_size)
    bias_apart: Arrays  # b_hh of each gate in cell.apart, (hidden_size,)
    weight_hr: jax.Array | None  # (hidden_size, proj_size)


def layer(
    settings: Settings,
    weights: Weights,
    x: jax.Array,
    state: Arrays,
    marks: Marks = UNMARKED,
    reset_state: Arrays | None = None,
) -> tuple[jax.Array, Arrays]:
    """Run one layer in one direction.

    Args:
        settings: the cell, the precision of products, and the direction in time.
        weights: torch's parameters of this layer and direction by role: `weight_ih` (gates * hidden_size, features),
            `weight_hh`, and where there are any `bias_ih`, `bias_hh`, `weight_hr`; all in x's dtype.
        x: the input, (time, batch, features); finite past a row's end, too.
        state: the initial state, one array (batch, size) a state.
        marks: where rows have ended, and where the state is put back.
        reset_state: what the state is put back to, like `state`; zeros if None.

    Returns:
        The outputs, (time, batch, output size) in x's dtype, and the state after the last step run.
    """
    gates, recurrent = _project_input(settings, weights, x)
    state = _cast(state, _accumulator(x.dtype))
    if marks.reset is not None:
        reset_state = jax.tree.map(jnp.zeros_like, state) if reset_state is None else _cast(reset_state, state[0].dtype)
    outputs, state = _scan(settings, recurrent, gates, state, marks, reset_state)
    return outputs, _cast(state, x.dtype)


def step(settings: Settings, weights: Weights, x: jax.Array, state: Arrays) -> Arrays:
    """Make one step: as `layer`, on x of shape (batch, features), without a time axis."""
    gates, recurrent = _project_input(settings, weights, x)
    state, *_ = _step(settings, recurrent, gates, _cast(state, _accumulator(x.dtype)))
    return _cast(state, x.dtype)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Products accumulate, and the state is carried, in float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _cast(arrays: Arrays, dtype: jnp.dtype) -> Arrays:
    return tuple(a.astype(dtype) for a in arrays)


def _select(mark: jax.Array | None, marked: Arrays | None, others: Arrays) -> Arrays:
    """`marked` in the rows that have the mark, `others` in those that have not."""
    if mark is None or marked is None:
        return others
    return tuple(jnp.where(mark, a, b) for a, b in zip(marked, others, strict=True))


def _output(marks: Marks, state: Arrays, dtype: jnp.dtype) -> jax.Array:
    output = state[0].astype(dtype)
    return output if marks.ended is None else jnp.where(marks.ended, jnp.zeros_like(output), output)


def _product(settings: Settings, a: jax.Array, weight: jax.Array, contract: int = 0) -> jax.Array:
    return lax.dot_general(
        a.astype(weight.dtype),
        weight,
        (((a.ndim - 1,), (contract,)), ((), ())),
        precision=settings.precision,
        preferred_element_type=_accumulator(weight.dtype),
    )


def _split(cell: Cell, a: jax.Array) -> Arrays:
    """One array a gate. As slices of one array inside the loop, gate kernels would not be vectorised on a CPU."""
    return tuple(jnp.split(a, len(cell.gates), axis=-1))


def _project_input(settings: Settings, weights: Weights, x: jax.Array) -> tuple[Arrays, Recurrent]:
    """The input's part of every gate for all of x at once, and the weights that are left for the loop."""
    cell = settings.cell
    gates = _product(settings, x, weights["weight_ih"].T)
    bias_hh = (jnp.zeros(gates.shape[-1] // len(cell.gates), gates.dtype),) * len(cell.gates)
    if "bias_ih" in weights:
        bias_ih, bias_hh = weights["bias_ih"].astype(gates.dtype), _split(cell, weights["bias_hh"].astype(gates.dtype))
        # b_hh joins b_ih outside the loop, except where the step wants the two halves of a gate. Added before the
        # gates part, so that the gradient of the biases is one sum.
        joined = [jnp.zeros_like(b) if name in cell.apart else b for name, b in zip(cell.gates, bias_hh, strict=True)]
        gates = gates + (bias_ih + jnp.concatenate(joined))
    bias_apart = tuple(b for name, b in zip(cell.gates, bias_hh, strict=True) if name in cell.apart)
    weight_hr = weights["weight_hr"].T if "weight_hr" in weights else None
    return _split(cell, gates), Recurrent(weights["weight_hh"].T, bias_apart, weight_hr)


def _sums(cell: Cell, gates: Arrays, products: Arrays, bias_apart: Arrays) -> Arrays:
    """Add the recurrent products: to their gates, or to the recurrent bias for a gate apart. Linear in all three."""
    bias = dict(zip(cell.apart, bias_apart, strict=True))
    return tuple(a + bias.get(name, gate) for name, gate, a in zip(cell.gates, gates, products, strict=True))


def _arguments(cell: Cell, gates: Sequence, sums: Arrays) -> tuple[Arrays, Arrays]:
    """The step's `gates` and `hidden`, from the input's parts and the sums. Linear in both."""
    whole = tuple(
        gate if name in cell.apart else total for name, gate, total in zip(cell.gates, gates, sums, strict=True)
    )
    return whole, tuple(total for name, total in zip(cell.gates, sums, strict=True) if name in cell.apart)


def _step(
    settings: Settings, recurrent: Recurrent, gates: Arrays, state: Arrays
) -> tuple[Arrays, Arrays, jax.Array | None]:
    """One step: the state after it, and what its derivative needs, the sums and the output before projection."""
    cell = settings.cell
    products = _split(cell, _product(settings, state[0], recurrent.weight_hh))
    sums = _sums(cell, gates, products, recurrent.bias_apart)
    state = tuple(cell.step(*_arguments(cell, gates, sums), state))
    if len(state) != len(cell.states):
        raise ValueError(f"step of Cell {cell.name!r} should return {len(cell.states)} arrays, got {len(state)}")
    if recurrent.weight_hr is None:
        return state, sums, None
    return (_product(settings, state[0], recurrent.weight_hr), *state[1:]), sums, state[0]


def _advance(
    settings: Settings, recurrent: Recurrent, gates: Arrays, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[Arrays, Arrays, jax.Array | None]:
    """A step of a sequence: as `_step`, with the marks."""
    after, sums, unprojected = _step(settings, recurrent, gates, _select(marks.reset, reset_state, state))
    return _select(marks.ended, state, after), sums, unprojected


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scan(
    settings: Settings, recurrent: Recurrent, gates: Arrays, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[jax.Array, Arrays]:
    """Run the recurrence over `gates`, (time, batch, hidden_size) each; return the outputs and the last state."""

    def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, jax.Array]:
        gates, marks = step
        state, *_ = _advance(settings, recurrent, gates, state, marks, reset_state)
        return state, _output(marks, state, recurrent.weight_hh.dtype)

    state, outputs = lax.scan(body, state, (gates, marks), reverse=settings.reverse)
    return outputs, state


@_scan.defjvp
def _scan_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    recurrent, gates, state, marks, reset_state = primals
    d_recurrent, d_gates, d_state, _, d_reset_state = tangents
    cell = settings.cell
    dtype = recurrent.weight_hh.dtype

    def forward(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, tuple]:
        gates, marks = step
        state, sums, unprojected = _advance(settings, recurrent, gates, state, marks, reset_state)
        return state, (state, sums, unprojected)

    last, (states, sums, unprojected) = lax.scan(forward, state, (gates, marks), reverse=settings.reverse)
    before = _select(marks.reset, reset_state, _before(settings, state, states))
    partials = _partials(cell, *_arguments(cell, gates, sums), before)

    # What is known of the tangents before the loop: all but what comes through the state's own tangent.
    d_products = _split(cell, _product(settings, before[0], d_recurrent.weight_hh))
    d_sums = jnp.concatenate(_sums(cell, d_gates, d_products, d_recurrent.bias_apart), axis=-1)
    d_inputs = tuple(d_gate if name in cell.apart else None for name, d_gate in zip(cell.gates, d_gates, strict=True))
    d_projected = None
    if unprojected is not None and d_recurrent.weight_hr is not None:
        d_projected = _product(settings, unprojected, d_recurrent.weight_hr)

    # Turned back, so that the transposed loop reads them along their rows as well.
    weight_hh = recurrent.weight_hh.T
    weight_hr = None if recurrent.weight_hr is None else recurrent.weight_hr.T

    def linear(d_state: Arrays, step: tuple) -> tuple[Arrays, jax.Array]:
        partials, d_sums, d_inputs, d_projected, marks = step
        d_before = _select(marks.reset, d_reset_state, d_state)
        d_sums = _split(cell, d_sums + _product(settings, d_before[0], weight_hh, contract=1))
        d_gates, d_hidden = _arguments(cell, d_inputs, d_sums)
        slots = (*d_gates, *d_hidden, *d_before)
        d_after = tuple(
            functools.reduce(operator.add, [a * slots[slot] for slot, a in row.items()] or [jnp.zeros_like(old)])
            for row, old in zip(partials, d_before, strict=True)
        )
        if weight_hr is not None:
            d_after = (_product(settings, d_after[0], weight_hr, contract=1) + d_projected, *d_after[1:])
        d_state = _select(marks.ended, d_state, d_after)
        return d_state, _output(marks, d_state, dtype)

    known = (partials, d_sums, d_inputs, d_projected, marks)
    d_last, d_outputs = lax.scan(linear, d_state, known, reverse=settings.reverse)
    return (_output(marks, states, dtype), last), (d_outputs, d_last)


def _before(settings: Settings, first: Arrays, after: Arrays) -> Arrays:
    """The states before each step, from the first one and those after each step."""
    if settings.reverse:
        return tuple(jnp.concatenate([a[1:], a_0[None]]) for a_0, a in zip(first, after, strict=True))
    return tuple(jnp.concatenate([a_0[None], a[:-1]]) for a_0, a in zip(first, after, strict=True))


def _partials(cell: Cell, gates: Arrays, hidden: Arrays, state: Arrays) -> tuple[dict[int, jax.Array], ...]:
    """For each state after the step, its partial derivative by each argument that it depends on.

    Arguments count through gates, hidden and state. The step is pointwise: a derivative is as large as its argument.
    """
    arguments = (*gates, *hidden, *state)

    def flat(*arguments: jax.Array) -> Arrays:
        rest = arguments[len(gates) :]
        return tuple(cell.step(arguments[: len(gates)], rest[: len(hidden)], rest[len(hidden) :]))

    rows: tuple[dict[int, jax.Array], ...] = tuple({} for _ in cell.states)
    depends = _dependence(flat, arguments)
    for slot, argument in enumerate(arguments):
        if any(slot in row for row in depends):
            _, columns = jax.jvp(
                lambda a, slot=slot: flat(*arguments[:slot], a, *arguments[slot + 1 :]),
                (argument,),
                (jnp.ones_like(argument),),
            )
            for row, column, slots in zip(rows, columns, depends, strict=True):
                if slot in slots:
                    row[slot] = column
    return rows


def _dependence(function: Callable, arguments: Sequence[jax.Array]) -> list[set[int]]:
    """For each output of the function, the positions of the arguments that it depends on."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    sources: dict = {variable: {i} for i, variable in enumerate(jaxpr.invars)}

    def of(variables: Sequence) -> set[int]:
        return set().union(*(sources.get(v, set()) for v in variables if not isinstance(v, Literal)))

    for equation in jaxpr.eqns:
        inputs = of(equation.invars)
        sources.update(dict.fromkeys(equation.outvars, inputs))
    return [of([variable]) for variable in jaxpr.outvars]
