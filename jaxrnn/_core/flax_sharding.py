"""How parameters are sharded over a mesh, as both Flax APIs record it."""

import dataclasses
from typing import Any

import jax
from flax import linen

from jaxrnn._core.options import MeshAxis, Options
from jaxrnn.spec import Spec


def mesh_axis(axis: MeshAxis | None) -> MeshAxis | None:
    """Translate a logical axis name to a mesh axis by Flax's rules; other names pass through."""
    return dict(linen.get_logical_axis_rules()).get(axis, axis) if isinstance(axis, str) else axis


def on_the_mesh(options: Options) -> Options:
    """The options with a mesh axis in place of a logical one."""
    if options.hidden_axis is None:
        return options
    return dataclasses.replace(options, hidden_axis=mesh_axis(options.hidden_axis))


def names(spec: Spec, axis: MeshAxis | None) -> dict[str, tuple[Any, ...]]:
    """For each parameter, the mesh axis of each of its axes: `axis` for hidden units, None for others."""
    return {name: tuple(axis if hidden else None for hidden in axes) for name, axes in spec.hidden_axes().items()}


def on_mesh() -> bool:
    """Whether a mesh is set. Without one, axis names are only recorded."""
    return bool(jax.sharding.get_abstract_mesh().axis_names)


def check(spec: Spec, axis: MeshAxis | None) -> None:
    """Raise ValueError if a mesh is set and hidden units cannot be sharded over this axis of it."""
    if on_mesh():
        Options(hidden_axis=mesh_axis(axis)).check_mesh(spec.hidden_size)


def shard(value: jax.Array, axes: tuple[MeshAxis | None, ...]) -> jax.Array:
    """Shard a parameter over the mesh, if one is set."""
    if not on_mesh():
        return value
    return jax.lax.with_sharding_constraint(value, jax.sharding.PartitionSpec(*map(mesh_axis, axes)))
