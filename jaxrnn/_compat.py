"""Every use of what JAX, Flax and orbax do not promise, one function each, with the reason.

What these libraries promise is what their API references document. Of JAX, nothing in `jax.core`, `jax.extend`,
`jax.interpreters` and `jax.experimental` is. When a release breaks something here, this is the file to mend.
"""

import os
from typing import Any

import jax
from flax import linen, nnx


def is_traced(value: object) -> bool:
    """Whether a value is not known yet, because JAX is tracing the function that computes it.

    JAX has no public way to ask, only errors from those who try to read the value.
    """
    return isinstance(value, jax.core.Tracer)


def manual_axes(value: jax.Array) -> frozenset[Any]:
    """The mesh axes over which a value varies inside `jax.shard_map`.

    `jax.typeof` is public, but the attribute of its result has been renamed once, and is in no API reference.
    """
    return jax.typeof(value).manual_axis_type.varying


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU that need not be there, such as "v5e:2x2", to compile for. Needs libtpu.

    Only `jax.experimental` describes devices that are not there.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, "tpu").devices


def sharded_at_creation() -> bool:
    """Whether `nnx.Param` shards a new parameter by itself, which users can turn off.

    `nnx.use_eager_sharding` and the function that reads it are in no API reference yet.
    """
    return nnx.using_eager_sharding()


def annotated_param(value: jax.Array, axes: tuple[Any, ...]) -> nnx.Param:
    """A parameter with the names of its axes as metadata, otherwise left as it is.

    By itself Flax would shard it, and raise an error where no mesh is set: the names are for later there. The argument
    that says otherwise is in no API reference yet.
    """
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def may_be_sorted(names: list[str]) -> bool:
    """Whether the order of a node's attributes may be Flax's instead of that in which they were defined.

    In `vars` they are in the order of definition, which is torch's, until Flax makes the node again, as `nnx.merge` and
    `nnx.jit` do: it sorts them, which it does not document, and nothing tells afterwards.
    """
    return names == sorted(names)


def called_module(context: Any) -> linen.Module:
    """The module of which a method is called, from what `linen.intercept_methods` hands to an interceptor.

    Of that context, whose class is not public, Linen documents `orig_method` alone.
    """
    return context.module


def is_orbax_tree(path: str) -> bool:
    """Whether a directory is an orbax checkpoint of one tree.

    orbax does not tell by itself: it raises an error for anything else, of any kind. This file describes the tree.
    """
    return os.path.isfile(os.path.join(path, "_METADATA"))
