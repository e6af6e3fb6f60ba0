"""How the layers of flax.nnx and flax.linen are laid out in torch: one table, which works both ways."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import linen, nnx


class Entry(NamedTuple):
    """A variable of a Flax layer, and torch's.

    Attributes:
        attribute: its name in Flax.
        name: its name in torch.
        to_torch: from Flax's array and the layer to torch's array.
        to_flax: the inverse.
    """

    attribute: str
    name: str
    to_torch: Callable[[np.ndarray, Any], np.ndarray] = lambda array, layer: array
    to_flax: Callable[[np.ndarray, Any], np.ndarray] = lambda array, layer: array


def _transpose(array: np.ndarray, layer: nnx.Linear | linen.Dense) -> np.ndarray:
    return array.T


_Conv = nnx.Conv | linen.Conv
_ConvTranspose = nnx.ConvTranspose | linen.ConvTranspose


# A convolution's kernel has its spatial axes first in Flax and last in torch, whose first two axes are these:
def _axes(layer: _Conv | _ConvTranspose) -> tuple[int, int]:
    if isinstance(layer, _Conv) or layer.transpose_kernel:
        return -1, -2  # output features, input features of a group
    return -2, -1  # input features, output features


def _to_channels_first(kernel: np.ndarray, layer: _Conv | _ConvTranspose) -> np.ndarray:
    return _flip(np.moveaxis(kernel, _axes(layer), (0, 1)), range(2, kernel.ndim), layer)


def _to_channels_last(weight: np.ndarray, layer: _Conv | _ConvTranspose) -> np.ndarray:
    return np.moveaxis(_flip(weight, range(2, weight.ndim), layer), (0, 1), _axes(layer))


def _flip(array: np.ndarray, axes: range, layer: _Conv | _ConvTranspose) -> np.ndarray:
    # torch's transposed convolution is the derivative of one, whose kernel runs backward.
    backward = isinstance(layer, _ConvTranspose) and not layer.transpose_kernel
    return np.flip(array, tuple(axes)) if backward else array


_BIAS = Entry("bias", "bias")
_SCALE = Entry("scale", "weight")
_CONVOLUTION = (Entry("kernel", "weight", _to_channels_first, _to_channels_last), _BIAS)
_LINEAR = (Entry("kernel", "weight", _transpose, _transpose), _BIAS)
_BATCH_NORM = (_SCALE, _BIAS, Entry("mean", "running_mean"), Entry("var", "running_var"))
# In torch's order.
_TABLE: dict[type, tuple[Entry, ...]] = {
    nnx.Linear: _LINEAR,
    linen.Dense: _LINEAR,
    **dict.fromkeys((nnx.Embed, linen.Embed), (Entry("embedding", "weight"),)),
    **dict.fromkeys((nnx.Conv, nnx.ConvTranspose, linen.Conv, linen.ConvTranspose), _CONVOLUTION),
    **dict.fromkeys((nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm), (_SCALE, _BIAS)),
    **dict.fromkeys((linen.LayerNorm, linen.GroupNorm, linen.InstanceNorm), (_SCALE, _BIAS)),
    **dict.fromkeys((nnx.RMSNorm, linen.RMSNorm), (_SCALE,)),
    **dict.fromkeys((nnx.BatchNorm, linen.BatchNorm), _BATCH_NORM),
}
# What torch stores beside a layer's variables and Flax has not.
_IGNORED: dict[type, tuple[str, ...]] = dict.fromkeys((nnx.BatchNorm, linen.BatchNorm), ("num_batches_tracked",))


def entries(layer: object) -> tuple[Entry, ...]:
    """The table's row for a layer; empty for what is not in the table."""
    return next((_TABLE[kind] for kind in type(layer).__mro__ if kind in _TABLE), ())


def ignored(layer: object) -> tuple[str, ...]:
    """Torch's names under a layer that mean nothing here."""
    return next((_IGNORED[kind] for kind in type(layer).__mro__ if kind in _IGNORED), ())
