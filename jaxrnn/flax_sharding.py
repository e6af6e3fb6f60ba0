"""Where parameters lie on a mesh, as both of Flax's APIs write it down."""

from typing import Any

from flax.core import spmd

from jaxrnn.recurrence import MeshAxis
from jaxrnn.spec import Spec


def mesh_axis(axis: MeshAxis | None) -> MeshAxis | None:
    """The axis of the mesh that stands for a logical one in Flax's rules, if `flax.nnx.logical_axis_rules` has it."""
    return dict(spmd.get_logical_axis_rules()).get(axis, axis) if isinstance(axis, str) else axis


def names(spec: Spec, axis: MeshAxis | None) -> dict[str, tuple[Any, ...]]:
    """Each parameter's axes: `axis` where an axis is one of hidden units, None where it is another."""
    return {name: tuple(axis if hidden else None for hidden in axes) for name, axes in spec.hidden_axes().items()}
