"""Recurrences that are linear in the state, unit by unit: how they are recognised, and run for all steps at once.

The state after step t is `A_t state + b_t`, where neither depends on the state, and `A_t` mixes the states of a cell
but not its units. Two steps make one such step, with `A_2 A_1` and `A_2 b_1 + b_2`. So `jax.lax.associative_scan` finds
all states in some log2(T) rounds of pointwise operations. Blelloch 1990, "Prefix Sums and Their Applications".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._compat import influences, is_plain
from jaxrnn._core import meshes, steps
from jaxrnn._core.steps import Run
from jaxrnn.cells import Arrays

Matrix = list[list[jax.Array | None]]  # of each unit: one row and column a state, None for zeros


def why_not_affine(run: Run) -> str | None:
    """Why a run is not linear in the state, unit by unit, as a clause without a full stop; None if it is."""
    cell, recurrent = run.settings.cell, run.recurrent
    if recurrent.weight_hh is not None:
        return f"it takes cells that are linear in their state, and {cell.name!r} has a recurrent product"
    like = (run.state[0],) * len(cell.gates)  # The gates of a step have its shape.

    def advance(state: Arrays, sums: steps.Sums) -> Arrays:
        return tuple(cell.step(*sums, state, *steps.cell_arguments(cell, recurrent.cell_params), *run.captured))

    with is_plain(True):  # our own derivative rules would hide operations
        found = influences(advance, len(run.state), run.state, steps.arguments(cell, like, like))
    if names := sorted({name for each in found for name in each if isinstance(name, str)}):
        wanted = "it takes cells that are linear in their state, unit by unit"
        return f"{wanted}, which {names} in {cell.name!r} may not be"
    return None


def scan(body: Callable[[Arrays, Any], tuple[Arrays, Any]], carry: Arrays, every: Any, reverse: bool) -> Any:
    """As `jax.lax.scan`, all steps at once, with a body that is linear in its carry, unit by unit."""
    zeros, count = tuple(map(meshes.zeros_like, carry)), len(carry)

    def advance(state: Arrays, step: Any) -> Arrays:
        return body(state, step)[0]

    def column(step: Any, j: int) -> Arrays:
        def of_one(a: jax.Array) -> Arrays:
            return advance((*zeros[:j], a, *zeros[j + 1 :]), step)

        return jax.jvp(of_one, (zeros[j],), (jnp.ones_like(zeros[j]),))[1]

    found = influences(advance, count, zeros, jax.tree.map(lambda a: a[0], every))
    columns = [jax.vmap(lambda step, j=j: column(step, j))(every) for j in range(count)]
    matrix: Matrix = [[columns[j][i] if j in found[i] else None for j in range(count)] for i in range(count)]
    length = len(jax.tree.leaves(every)[0])
    nothing = tuple(jnp.broadcast_to(a, (length, *a.shape)) for a in zeros)
    constant = jax.vmap(advance)(_shifted(nothing, carry, reverse), every)
    states = _solved(matrix, constant, reverse)
    # Once more, for the results of each step.
    after, results = jax.vmap(body)(_shifted(states, carry, reverse), every)
    return tuple(a[0 if reverse else -1] for a in after), results


def _shifted(states: Arrays, first: Arrays, reverse: bool) -> Arrays:
    """The states before each step, from the states after it and the first state."""
    if reverse:
        return tuple(jnp.concatenate([a[1:], b[None]]) for a, b in zip(states, first, strict=True))
    return tuple(jnp.concatenate([b[None], a[:-1]]) for a, b in zip(states, first, strict=True))


def _solved(matrix: Matrix, constant: Arrays, reverse: bool) -> Arrays:
    """The states after each step, from zeros, with a derivative that saves `matrix` alone."""

    def zero(arrays: Arrays) -> Arrays:
        return tuple(jnp.zeros_like(a[0]) for a in arrays)

    def rest(states: Arrays) -> Arrays:
        moved = _product(matrix, _shifted(states, zero(states), reverse))
        return tuple(a if b is None else a - b for a, b in zip(states, moved, strict=True))

    def solve(_: Any, constant: Arrays) -> Arrays:
        return _accumulated(matrix, constant, reverse)

    def transposed(_: Any, cotangents: Arrays) -> Arrays:
        """Backward in time, each step with the transposed matrix of the step after it."""
        turned = [list(row) for row in zip(*matrix, strict=True)]
        after = [[a if a is None else _shifted((a,), zero((a,)), not reverse)[0] for a in row] for row in turned]
        return _accumulated(after, cotangents, not reverse)

    return tuple(lax.custom_linear_solve(rest, constant, solve, transposed))


def _accumulated(matrix: Matrix, constant: Arrays, reverse: bool) -> Arrays:
    def both(first: tuple[Matrix, Arrays], second: tuple[Matrix, Arrays]) -> tuple[Matrix, Arrays]:
        columns = [_product(second[0], column, _times) for column in zip(*first[0], strict=True)]
        moved = _product(second[0], first[1], _times)
        total = tuple(b if a is None else a + b for a, b in zip(moved, second[1], strict=True))
        return [list(row) for row in zip(*columns, strict=True)], total

    return lax.associative_scan(both, (_closed(matrix, constant), constant), reverse=reverse)[1]


def _closed(matrix: Matrix, constant: Arrays) -> Matrix:
    """The same matrix, with zeros in place of None where its products are not zero."""
    shapes, count = [[a is not None for a in row] for row in matrix], range(len(matrix))
    for k in count:  # Warshall's
        shapes = [[shapes[i][j] or (shapes[i][k] and shapes[k][j]) for j in count] for i in count]

    def filled(a: jax.Array | None, wanted: bool) -> jax.Array | None:
        return jnp.zeros_like(constant[0]) if a is None and wanted else a

    return [[filled(matrix[i][j], shapes[i][j]) for j in count] for i in count]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in which 0 times NaN is 0: a reset forgets whatever was there before."""
    return jnp.where(a == 0, jnp.zeros_like(b), a * b)


def _product(
    matrix: Matrix, states: Sequence[jax.Array | None], times: Callable[..., jax.Array] = jnp.multiply
) -> list[jax.Array | None]:
    def row(entries: list[jax.Array | None]) -> jax.Array | None:
        terms = [times(a, b) for a, b in zip(entries, states, strict=True) if a is not None and b is not None]
        return sum(terms[1:], terms[0]) if terms else None

    return [row(entries) for entries in matrix]
