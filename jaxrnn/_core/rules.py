"""Functions with derivative rules of their own that are safe under `jax.vmap`."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._compat import is_plain

Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable)


def with_rule(
    rule: Callable, *, nondiff_argnums: tuple[int, ...] = (), symbolic_zeros: bool = False
) -> Callable[[Function], Function]:
    """Give a function a derivative rule, as `jax.custom_jvp` does.

    Under vmap, JAX decides separately where the function and its rule put the batch axis of each output, but a jit
    around them remembers only the function's decision. If the two differ, axes are silently mixed up. So this puts the
    batch axis first in both.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            return _batch_axis_first(function(*arguments))

        def derive(*arguments: Any) -> Any:
            return _batch_axis_first(rule(*arguments))

        ruled: Any = jax.custom_jvp(run, nondiff_argnums=nondiff_argnums)
        ruled.defjvp(derive, symbolic_zeros=symbolic_zeros)

        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            return function(*arguments) if is_plain.value else ruled(*arguments)

        return cast(Function, called)

    return decorate


def _batch_axis_first(tree: Tree) -> Tree:
    """Return the same arrays, under `jax.vmap` with the batch axis first. The reshapes compile to nothing."""
    return jax.tree.map(lambda a: lax.squeeze(lax.expand_dims(a, (0,)), (0,)), tree)


def pointwise(function: Function) -> Function:
    """Save one array per argument for the derivative, rather than one per operation.

    Only memory and time depend on it, not results. Use it for chains of nonlinear operations; a linear one saves
    nothing anyway. Each element of the result must depend only on the same element of the arguments.
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
