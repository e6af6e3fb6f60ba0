"""One step of a layer: the recurrent product, the cell, the projection, and the marks. Engines run it over time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn._compat import time_major
from jaxrnn._core.layouts import Layout, layout
from jaxrnn._core.options import Options
from jaxrnn._core.platforms import Kernel, by_platform
from jaxrnn.cells import Arrays, Cell

_FEW = range(2, 33)  # rows for which a product with a weight takes less time than the weight's transposition
_SMALL = 2**16  # the largest size of a weight that takes next to no time to transpose


class Settings(NamedTuple):
    """What is fixed while a layer runs."""

    cell: Cell
    options: Options = Options()
    reverse: bool = False
    every: bool = False  # whether the states and sums of every step are returned, beside the outputs
    stored: bool = False  # whether weight_hh is left as it is stored: transposing it does not pay for one step or row

    @property
    def contract(self) -> int:
        """The axis of weight_hh over which products sum."""
        return self.layout.contract if self.stored else 0

    @property
    def layout(self) -> Layout:
        return layout(len(self.cell.gates), self.options.hidden_axis)


class Marks(NamedTuple):
    """Steps that are not like the others: boolean arrays (time, batch, 1), True where marked; None marks no step."""

    ended: jax.Array | None = None  # past the row's end: the state is held, and the output is 0
    reset: jax.Array | None = None  # the state is put back before the step


class RecurrentWeights(NamedTuple):
    """The weights inside the loop. Every cell has one; `weight_hh` is None if the cell is not recurrent.

    Unless `Settings.stored`, it is transposed outside the loop, so that products read it along its rows.
    """

    weight_hh: jax.Array | None  # (output size, gates * hidden_size), or as the layout or `Settings.stored` has it
    bias: jax.Array  # what joins the recurrent product: b_hh, and b_ih but for the gates in cell.apart
    weight_hr: jax.Array | None  # (hidden_size, proj_size)
    cell_params: dict[str, jax.Array]  # the cell's own parameters, which broadcast against the gates


class Run(NamedTuple):
    """A block of steps of one layer in one direction, often all of them: all that its loop needs.

    Not a tree of arrays alone: `settings` and `dtype` are none.
    """

    settings: Settings
    dtype: jnp.dtype  # of the outputs
    recurrent: RecurrentWeights
    gates: Arrays  # the input's part of every gate, (time, batch, hidden_size); a block of one step may lack time
    state: Arrays  # the first, (batch, size)
    marks: Marks
    reset_state: Arrays | None
    captured: Arrays = ()  # what the cell's step closes over, its last arguments


class Layer(NamedTuple):
    """One layer in all its directions, before the products with the input: what an engine of whole layers needs."""

    cell: Cell
    options: Options
    weights: tuple[dict[str, jax.Array], ...]  # of each direction, by role, as torch has them; in x's dtype
    x: jax.Array  # the input, (time, batch, features); finite in the padding
    state: Arrays  # the first, (directions, batch, size)
    marks: Marks
    reset_state: Arrays | None  # like `state`
    every: bool  # whether the states and gates of every step are returned


class Sums(NamedTuple):
    """The first two arguments of a cell's step."""

    gates: tuple[Any, ...]  # the whole sum of each gate, or the input's part alone if it is apart
    hidden: tuple[Any, ...]  # the recurrent part of each gate that is apart


class Steps(NamedTuple):
    """What a run returns for each step, or for all steps with time in front."""

    output: jax.Array
    state: Arrays | None = None  # after the step
    sums: Any = None  # `Sums` of all steps
    gates: Arrays | None = None  # after their nonlinearities


class Kept(NamedTuple):
    """What the derivative of a run needs: the linear map of each step, or what it is made from; with time in front."""

    before: Arrays  # the states before each step; with `push`, only the first of them, h
    sums: Sums | None = None
    push: Any = None  # the linear map of each step, as `jax.linearize` gives it
    hidden: jax.Array | None = None  # the first state after each step, before its projection


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Products accumulate, and the state is carried, in float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def product(settings: Settings, a: jax.Array, weight: jax.Array, contract: int = 0) -> jax.Array:
    """Multiply, and sum over the last axis of `a` and the axis `contract` of the weight."""
    multiplied = lax.dot_general(
        a.astype(weight.dtype),
        weight,
        (((a.ndim - 1,), (contract,)), ((), ())),
        precision=settings.options.precision,
        preferred_element_type=accumulator(weight.dtype),
    )
    # Of all steps: on a TPU, XLA lays some such products out with the units or the batch outermost, and the loop then
    # gathers a row of every tile at each step.
    is_of_steps = a.ndim > 2 and settings.options.hidden_axis is None
    return time_major(multiplied) if is_of_steps else multiplied


def weighed(settings: Settings, a: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a weight that is as `Settings.stored` says; not of tangents."""
    if settings.contract == 0 or a.ndim != 2 or not isinstance(a.shape[0], int) or a.shape[0] not in _FEW:
        return product(settings, a, weight, settings.contract)

    def plain(_: Any, operands: tuple[jax.Array, jax.Array], linear: Any) -> jax.Array:
        a, weight = operands
        return product(settings, a, weight, contract=1)

    on_a_cpu: dict[str | None, Kernel] = {"cpu": Kernel(lambda _, operands, linear: _of_few_rows(settings, *operands))}
    return by_platform(plain, on_a_cpu, (a, weight))


def _of_few_rows(settings: Settings, a: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of a few rows with a weight as it is stored, (columns, features), on a CPU, in half of XLA's time.

    A small weight is transposed, behind a barrier: then XLA moves that out of a loop around the call. A large weight is
    left as it is, and is the first operand. Without the barriers, XLA would swap the operands back. XLA crashes where
    such a product is mapped, so `by_platform` maps and differentiates the plain one.
    """
    if weight.size <= _SMALL:
        return product(settings, a, lax.optimization_barrier(weight.T))
    rows = lax.optimization_barrier(a.astype(weight.dtype).T)
    return lax.optimization_barrier(product(settings, weight, rows)).T


def plus(a: jax.Array, bias: jax.Array) -> jax.Array:
    """Ranks may have to be equal: see `jax.numpy_rank_promotion`."""
    return a + jnp.expand_dims(bias, tuple(range(a.ndim - bias.ndim)))


def select(mark: jax.Array | None, marked: Arrays | None, others: Arrays) -> Arrays:
    """`marked` in the rows that have the mark, `others` in those that have not."""
    if mark is None or marked is None:
        return others
    return tuple(jnp.where(mark, a, b) for a, b in zip(marked, others, strict=True))


def recurrent_sums(settings: Settings, recurrent: RecurrentWeights, gates: Arrays, h: jax.Array) -> Arrays:
    """The recurrent product, with the bias, added to the input's part of each gate that is not apart."""
    hidden = recurrent.bias
    if recurrent.weight_hh is not None:
        hidden = plus(weighed(settings, h, recurrent.weight_hh), hidden)
    return added(settings.cell, gates, settings.layout.split(hidden))


def added(cell: Cell, gates: Arrays, recurrent: Arrays) -> Arrays:
    """Both parts of each gate added, or the recurrent part alone if it is apart."""
    return tuple(
        a if name in cell.apart else plus(gate, a) for name, gate, a in zip(cell.gates, gates, recurrent, strict=True)
    )


def arguments(cell: Cell, gates: Sequence[Any], sums: Arrays) -> Sums:
    """The step's `gates` and `hidden`, from the input's parts and the sums. Linear in both."""
    whole = tuple(
        gate if name in cell.apart else total for name, gate, total in zip(cell.gates, gates, sums, strict=True)
    )
    return Sums(whole, tuple(total for name, total in zip(cell.gates, sums, strict=True) if name in cell.apart))


def cell_arguments(cell: Cell, params: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], ...]:
    """The step's last argument, if the cell has parameters of its own."""
    return (params,) if cell.params else ()


def one_step(
    settings: Settings, recurrent: RecurrentWeights, gates: Arrays, state: Arrays, captured: Arrays = ()
) -> tuple[Arrays, Arrays]:
    """One step: the state after it, and the sums, from which the derivative finds what else it needs."""
    cell, sums = settings.cell, recurrent_sums(settings, recurrent, gates, state[0])
    after = cell.step(*arguments(cell, gates, sums), state, *cell_arguments(cell, recurrent.cell_params), *captured)
    after = _checked(cell, after, sums[0])
    if recurrent.weight_hr is not None:
        after = (product(settings, after[0], recurrent.weight_hr), *after[1:])
    return after, sums


def _checked(cell: Cell, state: object, like: jax.Array) -> Arrays:
    """What a step returned, if it is as it should be."""
    if not isinstance(state, tuple | list) or len(state) != len(cell.states):
        got = f"{len(state)}" if isinstance(state, tuple | list) else f"no tuple but {type(state).__name__}"
        raise ValueError(f"step of Cell {cell.name!r} should return a tuple of {len(cell.states)} arrays, got {got}")
    for name, a in zip(cell.states, state, strict=True):
        if (np.shape(a), jnp.result_type(a)) != (like.shape, like.dtype):
            wanted, got = f"{like.dtype} of shape {like.shape}", f"{jnp.result_type(a)} of shape {np.shape(a)}"
            raise ValueError(f"step of Cell {cell.name!r} should return {name} as {wanted}, got {got}")
    return tuple(state)


def advance(run: Run, gates: Arrays, marks: Marks, state: Arrays) -> tuple[Arrays, Arrays]:
    """A step of a run, with its marks: the state after it, and the sums."""
    before = select(marks.reset, run.reset_state, state)
    after, sums = one_step(run.settings, run.recurrent, gates, before, run.captured)
    return select(marks.ended, state, after), sums


def returned(run: Run, marks: Marks, state: Arrays, sums: Any) -> Steps:
    """What a run returns of a step, whose sums are as `one_step` has them, or of all steps."""
    (output,) = without_padding(marks, (state[0].astype(run.dtype),))
    return Steps(output, state, sums) if run.settings.every else Steps(output)


def without_padding(marks: Marks, arrays: Arrays) -> Arrays:
    """Zeros past the rows' ends."""
    return select(marks.ended, tuple(jnp.zeros_like(a) for a in arrays), arrays)


def before(settings: Settings, first: Arrays, after: Arrays) -> Arrays:
    """The states before each step, from the first one and those after each step."""
    if settings.reverse:
        return tuple(jnp.concatenate([a[1:], a_0[None]]) for a_0, a in zip(first, after, strict=True))
    return tuple(jnp.concatenate([a_0[None], a[:-1]]) for a_0, a in zip(first, after, strict=True))
