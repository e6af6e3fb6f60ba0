"""Arrays whose type says how they are sharded: on meshes with Explicit axes, and inside `jax.shard_map`.

There, arrays that are combined must be sharded alike, and a scan's first carry must have the type of its next.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrnn._compat import manual_axes

Tree = TypeVar("Tree")


def aligned(*arrays: tuple[Any, int | None]) -> list[Any]:
    """Shard arrays over the same mesh axes along the batch, and over none along the others.

    Args:
        arrays: pairs of a pytree of arrays and the number of their batch axis, None without one. The first array whose
            batch is sharded decides.

    Returns:
        The pytrees. Only axes of type Explicit count.
    """
    shardings = [(jax.typeof(a).sharding, axis) for tree, axis in arrays for a in jax.tree.leaves(tree)]
    if not any(any(sharding.spec) for sharding, _ in shardings):
        return [tree for tree, _ in arrays]
    batches = [sharding.spec[axis] for sharding, axis in shardings if axis is not None]
    batch = next((names for names in batches if names is not None), None)
    mesh = next(sharding.mesh for sharding, _ in shardings if any(sharding.spec))

    def sharded(a: jax.Array, axis: int | None) -> jax.Array:
        spec = PartitionSpec(*(batch if k == axis else None for k in range(a.ndim)))
        return jax.sharding.reshard(a, NamedSharding(mesh, spec))

    return [jax.tree.map(lambda a, axis=axis: sharded(a, axis), tree) for tree, axis in arrays]


def sharded_like(a: jax.Array, like: jax.Array) -> jax.Array:
    """Shard an array like another of its shape, over Explicit axes."""
    wanted, given = jax.typeof(like).sharding, jax.typeof(a).sharding
    return a if wanted.spec == given.spec else jax.sharding.reshard(a, wanted)


def zeros_like(a: jax.Array) -> jax.Array:
    """Zeros that are sharded like an array over Explicit axes. `jnp.zeros_like` does not do that from JAX 0.12 on."""
    return sharded_like(jnp.zeros_like(a), a)


def varying_with(tree: Tree, others: Any) -> Tree:
    """Inside `jax.shard_map`, let arrays vary over the mesh axes over which any of the others varies."""
    axes = frozenset().union(*map(manual_axes, jax.tree.leaves(others)))

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - manual_axes(a)))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)
