"""What is drawn at random in training: dropout between layers, recurrent dropout, and zoneout.

Shapes are in the letters of `jaxrnn._core`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._core import meshes
from jaxrnn.cells import Arrays, Cell
from jaxrnn.spec import Spec

Zoned = tuple[jax.Array | None, ...]  # for each state an array of bool; None for a state without zoneout


def between_layers(spec: Spec, x: jax.Array, key: jax.Array | None, masks: Arrays | None, layer: int) -> jax.Array:
    """The outputs of a layer but the last, (T, B, D * P), some of them dropped.

    Args:
        key: a random key for all layers; None for no dropout.
        masks: in place of it, for each layer but the last the outputs that are kept, (T, B, D * P) or (1, B, D * P).
    """
    if masks is not None:
        keep = masks[layer].astype(bool)
    elif key is None or not spec.dropout:
        return x
    else:
        like = x[:1] if spec.variational_dropout else x
        keep = _bernoulli(jax.random.split(key, spec.num_layers)[layer], 1 - spec.dropout, like.shape, like)
    return jnp.where(keep, x * _scale(spec.dropout), jnp.zeros_like(x))


def h_scale(spec: Spec, key: jax.Array | None, h: jax.Array, dtype: jnp.dtype, layer: int) -> jax.Array | None:
    """What a layer's h, (D, B, P), is multiplied by before the recurrent product; None for ones."""
    if key is None or not spec.recurrent_dropout:
        return None
    keep = _bernoulli(_key_of_layer(spec, key, 0, layer), 1 - spec.recurrent_dropout, h.shape, h)
    return keep.astype(dtype) * _scale(spec.recurrent_dropout)


def zoned(spec: Spec, key: jax.Array | None, state: Arrays, time: int, layer: int) -> Zoned | None:
    """The units of each state that zoneout holds: (D, T, B, P), then (D, T, B, H), each None if it holds none.

    None in place of all without a key, or for a cell without zoneout.
    """
    if key is None or not any(spec.cell.zoneout):
        return None
    likes = tuple(a[:, None] for a in state)
    shapes = [(len(a), time, *a.shape[1:]) for a in state]
    return _zoned(spec.cell, _key_of_layer(spec, key, 1, layer), likes, shapes)


def zoned_step(cell: Cell, key: jax.Array | None, x: jax.Array, state: Arrays) -> Zoned | None:
    """As `zoned`, for one step of a cell: (B, H) each, with rows sharded like those of x."""
    if key is None or not any(cell.zoneout):
        return None
    return _zoned(cell, key, (x,) * len(state), [a.shape for a in state])


def _zoned(cell: Cell, key: jax.Array, likes: Arrays, shapes: list[tuple[int, ...]]) -> Zoned:
    every = zip(jax.random.split(key, len(shapes)), cell.zoneout, shapes, likes, strict=True)
    return tuple(_bernoulli(key, p, shape, like) if p else None for key, p, shape, like in every)


def _key_of_layer(spec: Spec, key: jax.Array, kind: int, layer: int) -> jax.Array:
    """A key for each layer and kind; others than those that dropout between layers splits off."""
    return jax.random.fold_in(jax.random.fold_in(key, spec.num_layers + kind), layer)


def _bernoulli(key: jax.Array, p: float, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    return meshes.sharded_like(jax.random.bernoulli(key, np.float32(p), shape), like)


def _scale(rate: float) -> float:
    return 1 / (1 - rate) if rate < 1 else 0.0  # rate = 1 gives zeros, not NaN
