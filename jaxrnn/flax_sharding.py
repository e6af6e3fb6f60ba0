"""Where parameters lie on a mesh, as both of Flax's APIs write it down."""

import dataclasses
from typing import Any

import jax
from flax import linen

from jaxrnn.options import MeshAxis, Options
from jaxrnn.spec import Spec


def mesh_axis(axis: MeshAxis | None) -> MeshAxis | None:
    """The axis of the mesh that stands for a logical one in Flax's rules, which both APIs share; else itself."""
    return dict(linen.get_logical_axis_rules()).get(axis, axis) if isinstance(axis, str) else axis


def on_the_mesh(options: Options) -> Options:
    """The options with the axis of the mesh for a logical one."""
    if options.hidden_axis is None:
        return options
    return dataclasses.replace(options, hidden_axis=mesh_axis(options.hidden_axis))


def names(spec: Spec, axis: MeshAxis | None) -> dict[str, tuple[Any, ...]]:
    """Each parameter's axes: `axis` where an axis is one of hidden units, None where it is another."""
    return {name: tuple(axis if hidden else None for hidden in axes) for name, axes in spec.hidden_axes().items()}


def on_mesh() -> bool:
    """Whether there is a mesh in effect. Without one, names are for later."""
    return bool(jax.sharding.get_abstract_mesh().axis_names)


def check(spec: Spec, axis: MeshAxis | None) -> None:
    """Raise ValueError if a mesh is in effect, and hidden units cannot be sharded over this axis of it."""
    if on_mesh():
        Options(hidden_axis=mesh_axis(axis)).check_mesh(spec.hidden_size)


def lay(value: jax.Array, axes: tuple[MeshAxis | None, ...]) -> jax.Array:
    """Lay a parameter on the mesh in effect, if there is one."""
    if not on_mesh():
        return value
    return jax.lax.with_sharding_constraint(value, jax.sharding.PartitionSpec(*map(mesh_axis, axes)))
