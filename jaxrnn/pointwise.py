"""What a cell's step does with its arguments, read from its jaxpr: whether it is pointwise, and what needs what."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from jaxrnn._compat import ClosedJaxpr, Jaxpr, Literal, is_traced, jaxpr_as_fun
from jaxrnn.cells import Cell

# The primitives that compute each number of the result from the numbers at its place. What is not listed may do more.
_POINTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or polygamma pow
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor
    zeta
"""
# Those that apply a jaxpr to their arguments as they are.
_CALLS = frozenset({"closed_call", "custom_jvp_call", "jit", "pjit"})


def is_pointwise(cell: Cell, gate: tuple[int, ...], states: tuple[tuple[int, ...], ...], dtype: jnp.dtype) -> bool:
    """Whether each number that a step returns is known to depend on the arguments' numbers at its own place alone.

    A step that uses traced arrays from outside, such as parameters of its own, is not: the rule would not see them.

    Args:
        cell: the cell.
        gate: the shape of a gate at one step.
        states: that of each state.
        dtype: that of all of them.
    """
    like = jax.ShapeDtypeStruct(gate, dtype)
    before = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in states)
    arguments = (like,) * len(cell.gates), (like,) * len(cell.apart), before
    # With its tangents, for a function with a derivative rule may be pointwise while its rule is not.
    closed = jax.make_jaxpr(lambda a, d_a: jax.jvp(cell.step, a, d_a))(arguments, arguments)
    jaxpr = closed.jaxpr
    return not any(map(is_traced, closed.consts)) and _all_listed(jaxpr, [True] * len(jaxpr.invars))


def _all_listed(jaxpr: Jaxpr, given: list[bool]) -> bool:
    # What is not derived from the arguments is the same for all of them, and may be computed in any way.
    derived = {v for v, is_given in zip(jaxpr.invars, given, strict=True) if is_given}
    for equation in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and v in derived for v in equation.invars]
        if not any(flags):
            continue
        derived.update(equation.outvars)
        if equation.primitive.name in _CALLS:
            if not all(_all_listed(inner, flags) for inner in _parts(equation.params.values())):
                return False
        elif equation.primitive.name not in _POINTWISE.split():
            return False
    return True


def _parts(params: Iterable) -> Iterator[Jaxpr]:
    for param in params:
        if isinstance(param, Jaxpr | ClosedJaxpr):
            yield param.jaxpr if isinstance(param, ClosedJaxpr) else param


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
