"""One table of the layers of flax.nnx and flax.linen: their layout in torch, and the settings that differ."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx


class Entry(NamedTuple):
    """A variable of a Flax layer, and its counterpart in torch.

    Attributes:
        attribute: its name in Flax.
        name: its name in torch.
        shape: its shape in Flax, from the settings of an NNX layer; None if they do not imply it.
        to_torch: convert Flax's array, given the layer, to torch's.
        to_flax: the inverse.
    """

    attribute: str
    name: str
    shape: Callable[[Any], tuple[int, ...]] | None = None
    to_torch: Callable[[np.ndarray, Any], np.ndarray] = lambda array, layer: array
    to_flax: Callable[[np.ndarray, Any], np.ndarray] = lambda array, layer: array


def _transpose(array: np.ndarray, layer: nnx.Linear | linen.Dense) -> np.ndarray:
    return array.T


_Conv = nnx.Conv | linen.Conv
_ConvTranspose = nnx.ConvTranspose | linen.ConvTranspose


# A convolution's kernel has its spatial axes first in Flax, and last in torch. torch's first two axes are:
def _axes(layer: _Conv | _ConvTranspose) -> tuple[int, int]:
    if isinstance(layer, _Conv) or layer.transpose_kernel:
        return -1, -2  # output features, input features of a group
    return -2, -1  # input features, output features


def _to_channels_first(kernel: np.ndarray, layer: _Conv | _ConvTranspose) -> np.ndarray:
    if layer.mask is not None:  # torch has none, and the layer's result depends on it
        kernel = kernel * np.asarray(layer.mask, kernel.dtype)
    return _flip(np.moveaxis(kernel, _axes(layer), (0, 1)), range(2, kernel.ndim), layer)


def _to_channels_last(weight: np.ndarray, layer: _Conv | _ConvTranspose) -> np.ndarray:
    return np.moveaxis(_flip(weight, range(2, weight.ndim), layer), (0, 1), _axes(layer))


def _flip(array: np.ndarray, axes: range, layer: _Conv | _ConvTranspose) -> np.ndarray:
    # torch's transposed convolution is the gradient of a convolution, so its kernel is flipped.
    backward = isinstance(layer, _ConvTranspose) and not layer.transpose_kernel
    return np.flip(array, tuple(axes)) if backward else array


class Setting(NamedTuple):
    """A setting of a layer that is not in a state dict.

    Attributes:
        attribute: its name in Flax.
        name: its name in torch.
        default: torch's; None for the machine epsilon of torch's dtype.
        convert: Flax's value to torch's; it is its own inverse.
    """

    attribute: str
    name: str
    default: float | None
    convert: Callable[[float], float] = lambda value: value


def _compared(*settings: Setting) -> Callable[[Any], Iterator[str]]:
    """Warnings about a layer's settings that are not torch's defaults."""

    def differences(layer: Any) -> Iterator[str]:
        for attribute, name, default, convert in settings:
            ours, theirs = getattr(layer, attribute), default
            if theirs is None:
                theirs = float(jnp.finfo(jnp.promote_types(layer.param_dtype, jnp.float32)).eps)
            wanted = convert(theirs)
            if not math.isclose(ours, wanted, rel_tol=5e-3):  # three digits of 1.19209e-07 are enough
                equal = "" if wanted == default else f", which is {wanted:.3g} in Flax"
                yield (
                    f"{attribute}={ours:.6g}, where torch's default is {name}={default}{equal}\n"
                    f"write {attribute}={wanted:.3g} in Flax, or {name}={convert(ours):.6g} in torch"
                )
        if isinstance(layer, nnx.LayerNorm | nnx.RMSNorm | linen.LayerNorm | linen.RMSNorm):
            reduced, weighted = layer.reduction_axes, layer.feature_axes
            if set(np.ravel(reduced)) != set(np.ravel(weighted)):
                yield (
                    f"reduction_axes={reduced}, where torch reduces over the axes of its weight\n"
                    f"write reduction_axes={weighted} in Flax"
                )

    return differences


def _padding(layer: _Conv) -> Iterator[str]:
    """Warnings about a padding that torch lacks, though another gives an output of the same size."""
    sizes, strides = _sizes_and_strides(layer)
    strided = max(strides) > 1
    where, mode = "torch pads both sides alike", ""
    pads: list[tuple[int, int]] = []
    if layer.padding in ("CIRCULAR", "REFLECT"):
        where, mode = "torch's default is padding_mode='zeros'", f", mode={layer.padding.lower()!r}"
        pads = [((size - 1) // 2, size // 2) for size in sizes]
    elif layer.padding == "CAUSAL":
        pads = [(sizes[0] - 1, 0)]
    elif str(layer.padding).upper() == ("SAME" if strided else "SAME_LOWER"):  # torch has the other one
        for size, stride in zip(sizes, strides, strict=True):
            total = max(size - stride, 0)
            low = total // 2 if strided else (total + 1) // 2
            pads.append((low, total - low))
    if any(low != high for low, high in pads) or (mode and any(map(any, pads))):
        here = tuple((size - 1) // 2 for size in sizes) if strided else "SAME"
        when = " if strides divide the size" if str(layer.padding).upper() == "SAME" else ""
        yield (
            f"padding={layer.padding!r} pads {pads}{when}, where {where}\n"
            f"write padding={here!r} in Flax, or in torch padding=0 after {_pad('x', pads)[:-1]}{mode})"
        )


def _transposed_padding(layer: _ConvTranspose) -> Iterator[str]:
    """As `_padding`, for a transposed convolution."""
    sizes, strides = _sizes_and_strides(layer)
    if layer.padding == "CIRCULAR":
        yield "padding='CIRCULAR', where torch only has padding_mode='zeros'\nwrite padding='SAME' in Flax"
    elif layer.padding == "SAME":
        # For an odd total, Flax pads one more on the left, and torch's output_padding one more on the right.
        pads = []
        for size, stride in zip(sizes, strides, strict=True):
            low = size - 1 if stride > size - 1 else (size + stride - 1) // 2
            pads.append((low, size + stride - 2 - low))
        if any(low > high for low, high in pads):
            cut = [(low - size + 1, high - size + 1) for size, (low, high) in zip(sizes, pads, strict=True)]
            yield (
                f"padding='SAME' pads {pads}, where torch's output_padding is on the right\n"
                f"write padding={tuple(map(tuple, map(sorted, pads)))} in Flax, "
                f"or in torch padding=0 before {_pad('y', cut)}"
            )


def _sizes_and_strides(layer: _Conv | _ConvTranspose) -> list[tuple[int, ...]]:
    """The size of the dilated kernel and the stride, for each spatial axis."""
    count = np.size(layer.kernel_size)
    settings = (layer.kernel_size, layer.kernel_dilation or 1, layer.strides or 1)
    kernel, dilation, strides = (tuple(np.broadcast_to(setting, count).tolist()) for setting in settings)
    return [tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)), strides]


def _pad(name: str, pads: list[tuple[int, int]]) -> str:
    """The padding in torch's order: the last axis first."""
    return f"torch.nn.functional.pad({name}, {sum(reversed(pads), ())})"


class Kind(NamedTuple):
    """A row of the table: a kind of layer.

    Attributes:
        entries: its variables, in torch's order.
        differences: warnings about a layer's settings that are not torch's, with the remedy.
        ignored: what torch stores and Flax does not have.
    """

    entries: tuple[Entry, ...] = ()
    differences: Callable[[Any], Iterator[str]] = lambda layer: iter(())
    ignored: tuple[str, ...] = ()


def _features(layer: Any) -> tuple[int, ...]:
    return (layer.num_groups * layer.group_size if isinstance(layer, nnx.GroupNorm) else layer.num_features,)


_BIAS = Entry("bias", "bias", lambda layer: (layer.out_features,))
_KERNEL = Entry("kernel", "weight", lambda layer: layer.kernel_shape, _to_channels_first, _to_channels_last)
_MATRIX = Entry("kernel", "weight", lambda layer: (layer.in_features, layer.out_features), _transpose, _transpose)
_LINEAR = Kind((_MATRIX, _BIAS))
_EMBED = Kind((Entry("embedding", "weight", lambda layer: (layer.num_embeddings, layer.features)),))
_SCALE = Entry("scale", "weight", _features)
_AFFINE = (_SCALE, Entry("bias", "bias", _features))
_STATISTICS = (Entry("mean", "running_mean", _features), Entry("var", "running_var", _features))
_EPSILON = Setting("epsilon", "eps", 1e-5)
_MOMENTUM = Setting("momentum", "momentum", 0.1, lambda value: 1 - value)
_NORM = Kind(_AFFINE, _compared(_EPSILON))
_BATCH_NORM = Kind((*_AFFINE, *_STATISTICS), _compared(_EPSILON, _MOMENTUM), ("num_batches_tracked",))
_TABLE: dict[type, Kind] = {
    **dict.fromkeys((nnx.Linear, linen.Dense), _LINEAR),
    **dict.fromkeys((nnx.Embed, linen.Embed), _EMBED),
    **dict.fromkeys((nnx.Conv, linen.Conv), Kind((_KERNEL, _BIAS), _padding)),
    **dict.fromkeys((nnx.ConvTranspose, linen.ConvTranspose), Kind((_KERNEL, _BIAS), _transposed_padding)),
    **dict.fromkeys((nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm), _NORM),
    **dict.fromkeys((linen.LayerNorm, linen.GroupNorm, linen.InstanceNorm), _NORM),
    **dict.fromkeys((nnx.RMSNorm, linen.RMSNorm), Kind((_SCALE,), _compared(Setting("epsilon", "eps", None)))),
    **dict.fromkeys((nnx.BatchNorm, linen.BatchNorm), _BATCH_NORM),
}


def kind_of(layer: object) -> Kind:
    """The table's row for a layer; an empty one for other modules."""
    return next((_TABLE[kind] for kind in type(layer).__mro__ if kind in _TABLE), Kind())
