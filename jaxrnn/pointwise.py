"""What a cell's step does with its arguments, read from its jaxpr: whether it is pointwise, and what needs what."""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from jaxrnn._compat import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jaxrnn.cells import Cell

# Whatever changes a shape is not pointwise. Neither are these, which may keep it; nor what begins with one of the rest.
_MOVING = {"rev", "sort", "transpose", "gather", "dot_general", "conv_general_dilated", "fft", "dynamic_update_slice"}
_MOVING_FAMILIES = ("cum", "scatter", "argm", "reduce_", "triangular", "custom_call", "ffi", "pure_callback", "top_k")
_KEEPING = {"reduce_precision"}
# Within these special functions count, and ask whether all numbers have converged.
_CONTROL = {"while", "scan", "cond"}
_ASKING = {"reduce_or", "reduce_and"}


@functools.cache
def is_pointwise(cell: Cell, gate: tuple[int, ...], states: tuple[tuple[int, ...], ...], dtype: jnp.dtype) -> bool:
    """Whether each number that a step returns depends on the arguments' numbers at its own place alone.

    Args:
        cell: the cell.
        gate: the shape of a gate at one step.
        states: that of each state.
        dtype: that of all of them.
    """
    like = jax.ShapeDtypeStruct(gate, dtype)
    before = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in states)
    closed = jax.make_jaxpr(cell.step)((like,) * len(cell.gates), (like,) * len(cell.apart), before)
    return _keeps_places(closed.jaxpr, [True] * len(closed.jaxpr.invars), {gate, *states}, _KEEPING)


def _keeps_places(jaxpr: Jaxpr, given: list[bool], shapes: set[tuple[int, ...]], keeping: set[str]) -> bool:
    # What derives from the arguments. The rest is the same for all of them, and may do as it likes.
    derived = {v for v, is_given in zip(jaxpr.invars, given, strict=True) if is_given}
    for equation in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and v in derived for v in equation.invars]
        if not any(flags):
            continue
        derived.update(equation.outvars)
        name = equation.primitive.name
        if name in _MOVING or (name.startswith(_MOVING_FAMILIES) and name not in keeping):
            return False
        control = name in _CONTROL
        within = (shapes | {()}, keeping | _ASKING) if control else (shapes, keeping)  # where scalars count
        if any(getattr(v.aval, "shape", None) not in within[0] for v in equation.outvars):
            return False
        for inner in _parts(equation.params.values()):
            passed_on = flags if len(inner.invars) == len(flags) and not control else [True] * len(inner.invars)
            if not _keeps_places(inner, passed_on, *within):
                return False
    return True


def _parts(params: Iterable) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters, and those in tuples there."""
    for param in params:
        if isinstance(param, Jaxpr | ClosedJaxpr):
            yield param.jaxpr if isinstance(param, ClosedJaxpr) else param
        elif isinstance(param, tuple):
            yield from _parts(param)


def stages(closed: ClosedJaxpr) -> tuple[list[int], dict[int, tuple[Callable, list[int]]]]:
    """Part a function into one for each output, which takes all outputs as further arguments.

    Returns:
        The numbers of the outputs, each after those that it is computed from; and for each the function, and the
        numbers of the arguments that it reads.
    """
    jaxpr = closed.jaxpr
    producers = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    # An argument that comes out as it came in counts as the argument; what comes out twice counts once.
    fresh = [v for v in dict.fromkeys(jaxpr.outvars) if not isinstance(v, Literal) and v in producers]
    number = {v: len(jaxpr.invars) + jaxpr.outvars.index(v) for v in fresh} | {v: i for i, v in enumerate(jaxpr.invars)}
    order: list[int] = []
    each: dict[int, tuple[Callable, list[int]]] = {}

    def visit(index: int) -> None:
        output, needed, read = jaxpr.outvars[index], set(), set()
        pending = [output]
        while pending:
            variable = pending.pop()
            if isinstance(variable, Literal):
                continue
            if variable in number and not (variable is output and variable in producers):
                read.add(number[variable])
            elif variable in producers and id(producers[variable]) not in needed:
                needed.add(id(producers[variable]))
                pending += producers[variable].invars
        extra = [v for v in fresh if v is not output and number[v] in read]
        part = jaxpr.replace(
            invars=[*jaxpr.invars, *extra],
            outvars=[output],
            eqns=[equation for equation in jaxpr.eqns if id(equation) in needed],
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        slots = [*range(len(jaxpr.invars)), *(number[v] for v in extra)]
        call = jaxpr_as_fun(ClosedJaxpr(part, closed.consts))
        each[index] = (lambda *values: call(*(values[slot] for slot in slots)), sorted(read))
        for other in (slot - len(jaxpr.invars) for slot in read if slot >= len(jaxpr.invars)):
            if other not in each:
                visit(other)
        order.append(index)

    for index in range(len(jaxpr.outvars)):
        if index not in each:
            visit(index)
    return order, each
