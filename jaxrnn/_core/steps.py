"""One step of a layer: the recurrent product, the cell, the projection, and the marks. Engines run it over time.

Shapes are in the letters of `jaxrnn._core`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn._compat import time_major
from jaxrnn._core.dropout import Zoned
from jaxrnn._core.layouts import Layout, layout
from jaxrnn._core.options import Options
from jaxrnn._core.platforms import Kernel, by_platform
from jaxrnn.cells import Arrays, Cell

_FEW = range(2, 33)  # rows for which a product with a weight takes less time than the weight's transposition
_SMALL = 2**16  # the largest size of a weight that takes next to no time to transpose


class Settings(NamedTuple):
    """The settings of a layer in one direction, fixed while it runs."""

    cell: Cell
    options: Options = Options()
    reverse: bool = False
    every: bool = False  # whether the states and sums of every step are returned, beside the outputs
    stored: bool = False  # whether weight_hh is not transposed: for one step or row that costs more than it saves

    @property
    def contract(self) -> int:
        """The axis of weight_hh over which products sum."""
        return self.layout.contract if self.stored else 0

    @property
    def layout(self) -> Layout:
        return layout(len(self.cell.gates), self.options.hidden_axis)


class Marks(NamedTuple):
    """Steps that are not like the others: boolean arrays (T, B, 1), True at these steps; None if there are none.

    Of `ended` and `skipped` one is None. They do the same, but a kernel that takes lengths can run `ended` alone.
    """

    ended: jax.Array | None = None  # past the row's end: the state is held, and the output is 0
    skipped: jax.Array | None = None  # the same at any steps
    reset: jax.Array | None = None  # the state is reset before the step
    zoned: Zoned | None = None  # the units of each state that zoneout holds: (T, B, P), then (T, B, H)

    @property
    def held(self) -> jax.Array | None:
        """Where the state is held, and the output is 0."""
        return self.ended if self.skipped is None else self.skipped


class RecurrentWeights(NamedTuple):
    """The weights that the loop over time needs. `weight_hh` is None for a cell without a recurrent product.

    Unless `Settings.stored`, `weight_hh` is transposed outside the loop, so that products read it along its rows.
    """

    weight_hh: jax.Array | None  # (P, G * H), or as the layout or `Settings.stored` has it
    bias: jax.Array  # (G * H,), added to the recurrent product: b_hh, and b_ih except for the gates in cell.apart
    weight_hr: jax.Array | None  # (H, P)
    cell_params: dict[str, jax.Array]  # the cell's own parameters, (..., H), which broadcast against the gates


class Run(NamedTuple):
    """A block of steps of one layer in one direction, often all steps: everything that the loop over them needs.

    `settings` and `dtype` are no arrays, so a Run is no argument of a JAX transformation.
    """

    settings: Settings
    dtype: jnp.dtype  # of the outputs
    recurrent: RecurrentWeights
    gates: Arrays  # the input's part of every gate, G arrays (T, B, H); without T in a block that is one step
    state: Arrays  # before the first step: (B, P), then (B, H)
    marks: Marks
    reset_state: Arrays | None  # what the state is reset to, like `state`
    captured: Arrays = ()  # what the cell's step closes over, its last arguments
    h_scale: jax.Array | None = None  # what h is multiplied by before the recurrent product, (B, P); None for ones


class Layer(NamedTuple):
    """One layer in all its directions, before the products with the input: the input of an engine of whole layers."""

    cell: Cell
    options: Options
    weights: tuple[dict[str, jax.Array], ...]  # D of them: by role, as torch has them; in x's dtype
    x: jax.Array  # the input, (T, B, I); finite in the padding
    state: Arrays  # before the first step: (D, B, P), then (D, B, H)
    marks: Marks
    reset_state: Arrays | None  # like `state`
    every: bool  # whether the states and gates of every step are returned
    h_scale: jax.Array | None = None  # what h is multiplied by before the recurrent product, (D, B, P); None for ones
    zoned: Zoned | None = None  # as in `Marks`, with an axis of directions in front


class Sums(NamedTuple):
    """The first two arguments of a cell's step."""

    gates: tuple[Any, ...]  # the whole sum of each gate, or the input's part alone for one in cell.apart; (..., B, H)
    hidden: tuple[Any, ...]  # the recurrent part of each gate in cell.apart; (..., B, H)


class Steps(NamedTuple):
    """The results of a run for every step."""

    output: jax.Array  # (T, B, P)
    state: Arrays | None = None  # after the step: (T, B, P), then (T, B, H)
    sums: Any = None  # `Sums`, of arrays (T, B, H)
    gates: Arrays | None = None  # after their nonlinearities, G arrays (T, B, H)


class Kept(NamedTuple):
    """Saved for the derivative of a run: the linear map of each step, or the sums to make it from."""

    before: Arrays  # the states before each step: (T, B, P), then (T, B, H); with `push` h alone, scaled, (T, B, P)
    sums: Sums | None = None
    push: Any = None  # the linear map of each step, as `jax.linearize` returns it, of arrays (T, ...)
    hidden: jax.Array | None = None  # h after each step, before its projection, (T, B, H)


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
    # On a TPU, XLA lays some products of all steps out with the units or the batch outermost, and the loop then
    # gathers a row of every tile at each step.
    is_of_steps = a.ndim > 2 and settings.options.hidden_axis is None
    return time_major(multiplied) if is_of_steps else multiplied


def weighed(settings: Settings, a: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a weight as `Settings.stored` describes it; not for tangents."""
    if settings.contract == 0 or a.ndim != 2 or not isinstance(a.shape[0], int) or a.shape[0] not in _FEW:
        return product(settings, a, weight, settings.contract)

    def plain(_: Any, operands: tuple[jax.Array, jax.Array], linear: Any) -> jax.Array:
        a, weight = operands
        return product(settings, a, weight, contract=1)

    on_a_cpu: dict[str | None, Kernel] = {"cpu": Kernel(lambda _, operands, linear: _of_few_rows(settings, *operands))}
    return by_platform(plain, on_a_cpu, (a, weight))


def _of_few_rows(settings: Settings, a: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of a few rows, (B, I), with a weight as it is stored, (G * H, I), on a CPU, in half of XLA's time.

    A small weight is transposed, behind a barrier: then XLA moves that out of a loop around the call. A large weight is
    left as it is, and is the first operand. Without the barriers, XLA would swap the operands back. XLA crashes where
    such a product is mapped, so `by_platform` maps and differentiates the plain one.
    """
    if weight.size <= _SMALL:
        return product(settings, a, lax.optimization_barrier(weight.T))
    rows = lax.optimization_barrier(a.astype(weight.dtype).T)
    return lax.optimization_barrier(product(settings, weight, rows)).T


def plus(a: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias. With `jax_numpy_rank_promotion="raise"`, ranks must be equal."""
    return a + jnp.expand_dims(bias, tuple(range(a.ndim - bias.ndim)))


def select(mark: jax.Array | None, marked: Arrays | None, others: Arrays) -> Arrays:
    """`marked` in the rows where `mark` is True, `others` in the other rows."""
    if mark is None or marked is None:
        return others
    return tuple(jnp.where(mark, a, b) for a, b in zip(marked, others, strict=True))


def recurrent_sums(settings: Settings, recurrent: RecurrentWeights, gates: Arrays, h: jax.Array) -> Arrays:
    """The recurrent product, with the bias, added to the input's part of each gate except those in cell.apart."""
    hidden = recurrent.bias
    if recurrent.weight_hh is not None:
        hidden = plus(weighed(settings, h, recurrent.weight_hh), hidden)
    return added(settings.cell, gates, settings.layout.split(hidden))


def added(cell: Cell, gates: Arrays, recurrent: Arrays) -> Arrays:
    """Both parts of each gate added, or the recurrent part alone for a gate in cell.apart."""
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


def scaled(h: jax.Array, scale: jax.Array | None) -> jax.Array:
    """h as the recurrent product sees it."""
    return h if scale is None else h * scale


def with_zoneout(cell: Cell, marks: Marks, before: Arrays, after: Arrays) -> Arrays:
    """The state after a step with the cell's zoneout: its units by chance or, without `marks.zoned`, their mean."""
    if not any(cell.zoneout):
        return after
    if marks.zoned is None:
        return tuple(p * a + (1 - p) * b if p else b for p, a, b in zip(cell.zoneout, before, after, strict=True))
    every = zip(marks.zoned, before, after, strict=True)
    return tuple(b if kept is None else jnp.where(kept, a, b) for kept, a, b in every)


def _one_step(run: Run, gates: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
    cell, recurrent = run.settings.cell, run.recurrent
    sums = recurrent_sums(run.settings, recurrent, gates, scaled(state[0], run.h_scale))
    parameters = cell_arguments(cell, recurrent.cell_params)
    after = _checked(cell, cell.step(*arguments(cell, gates, sums), state, *parameters, *run.captured), sums[0])
    if recurrent.weight_hr is not None:
        after = (product(run.settings, after[0], recurrent.weight_hr), *after[1:])
    return after, sums


def _checked(cell: Cell, state: object, like: jax.Array) -> Arrays:
    """The state that a cell's step returned, if its arrays have the right number, shapes and dtypes."""
    if not isinstance(state, tuple | list) or len(state) != len(cell.states):
        got = f"{len(state)}" if isinstance(state, tuple | list) else f"no tuple but {type(state).__name__}"
        raise ValueError(f"step of Cell {cell.name!r} should return a tuple of {len(cell.states)} arrays, got {got}")
    for name, a in zip(cell.states, state, strict=True):
        if (np.shape(a), jnp.result_type(a)) != (like.shape, like.dtype):
            wanted, got = f"{like.dtype} of shape {like.shape}", f"{jnp.result_type(a)} of shape {np.shape(a)}"
            raise ValueError(f"step of Cell {cell.name!r} should return {name} as {wanted}, got {got}")
    return tuple(state)


def advance(run: Run, gates: Arrays, marks: Marks, state: Arrays) -> tuple[Arrays, Arrays]:
    """Make one step of a run, with its marks. Returns the state after it, and the sums, for the derivative."""
    before = select(marks.reset, run.reset_state, state)
    after, sums = _one_step(run, gates, before)
    return select(marks.held, state, with_zoneout(run.settings.cell, marks, before, after)), sums


def returned(run: Run, marks: Marks, state: Arrays, sums: Any) -> Steps:
    """The `Steps` of one step or of all steps, from the states after them and the sums of `one_step`."""
    (output,) = zero_if_held(marks, (state[0].astype(run.dtype),))
    return Steps(output, state, sums) if run.settings.every else Steps(output)


def zero_if_held(marks: Marks, arrays: Arrays) -> Arrays:
    """Zeros where the state is held."""
    return select(marks.held, tuple(jnp.zeros_like(a) for a in arrays), arrays)


def before(settings: Settings, first: Arrays, after: Arrays) -> Arrays:
    """The states before each step, from the first state and the states after each step."""
    if settings.reverse:
        return tuple(jnp.concatenate([a[1:], a_0[None]]) for a_0, a in zip(first, after, strict=True))
    return tuple(jnp.concatenate([a_0[None], a[:-1]]) for a_0, a in zip(first, after, strict=True))
