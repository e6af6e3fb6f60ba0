"""Functions with derivative rules of their own that are safe under `jax.vmap`."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable)


def with_rule(
    rule: Callable, *, nondiff_argnums: tuple[int, ...] = (), symbolic_zeros: bool = False
) -> Callable[[Function], Function]:
    """Give a function a derivative rule, as `jax.custom_jvp` does.

    Under vmap, JAX finds out separately where the function and its rule have the batch axis of each output, but a jit
    around them remembers the function's answer alone: where the two differ, axes are silently confused. So both have it
    in one place.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            return _batch_axis_first(function(*arguments))

        def derive(*arguments: Any) -> Any:
            return _batch_axis_first(rule(*arguments))

        ruled: Any = jax.custom_jvp(run, nondiff_argnums=nondiff_argnums)
        ruled.defjvp(derive, symbolic_zeros=symbolic_zeros)
        return ruled

    return decorate


def _batch_axis_first(tree: Tree) -> Tree:
    """The same arrays. Under `jax.vmap`, reshapes move the batch axis to the front; compiled, they cost nothing."""
    return jax.tree.map(lambda a: lax.squeeze(lax.expand_dims(a, (0,)), (0,)), tree)


def pointwise(function: Function) -> Function:
    """Save one array for each argument for the derivative, not those of every operation.

    The function must compute each number of its one result from the numbers at the same place in its arguments.
    """

    def rule(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        terms = []
        for k, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):

            def of_one(a: jax.Array, k: int = k) -> jax.Array:
                return function(*primals[:k], a, *primals[k + 1 :])

            _, partial = jax.jvp(of_one, (primal,), (jnp.ones_like(primal),))
            terms.append(partial * tangent)
        return function(*primals), functools.reduce(jnp.add, terms)

    return with_rule(rule)(function)
