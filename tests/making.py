"""Modules and variables for tests, made without compiling: Flax compiles a program for each shape of parameter."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

Module = TypeVar("Module", bound=nnx.Module)


def filled(make: Callable[[], Module], seed: int = 0) -> Module:
    """The module that `make` would make, but with NumPy's random numbers in it."""
    module = nnx.eval_shape(make)
    nnx.update(module, _numbers(nnx.state(module), seed))
    return module


def filled_variables(module: linen.Module, *arguments: Any, seed: int = 0, **settings: Any) -> Any:
    """The variables that a Linen module's `init` would make, but with NumPy's random numbers in them."""
    return _numbers(jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **settings)), seed)


def _numbers(tree: Any, seed: int) -> Any:
    """Distinct from parameter to parameter, above 0 (some are variances), in place of shapes."""
    random = np.random.RandomState(seed)

    def numbers(array: Any) -> jax.Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(seed), array.shape)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros(array.shape, array.dtype)
        return jnp.asarray(random.uniform(0.05, 0.5, array.shape).astype(array.dtype))

    return jax.tree.map(numbers, tree)
