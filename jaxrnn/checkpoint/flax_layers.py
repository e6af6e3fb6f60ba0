"""One table of the layers of flax.nnx and flax.linen: their layout in torch, and the settings that differ."""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxrnn.checkpoint.tables import USED, Row, Table, neutral, warned
from jaxrnn.spec import level_outside
from jaxrnn.torch_random import TorchGenerator


class Conversion(NamedTuple):
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
    kernel = np.moveaxis(_flip(weight, range(2, weight.ndim), layer), (0, 1), _axes(layer))
    if layer.mask is not None and np.any(lost := kernel * (np.asarray(layer.mask) == 0)):
        cause = f"mask of a {type(layer).__name__} hides numbers of torch's weight, up to {np.max(np.abs(lost)):.3g}"
        warnings.warn(f"{cause}\nto compute what torch does, write mask=None in Flax", stacklevel=level_outside())
    return kernel


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


_Shapes = Mapping[str, tuple[int, ...]]
_Draw = Callable[[TorchGenerator, _Shapes, np.dtype], dict[str, np.ndarray]]


def _constants(generator: TorchGenerator, shapes: _Shapes, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Of norms: ones and zeros."""
    return {name: np.full(shape, name in ("weight", "running_var"), dtype) for name, shape in shapes.items()}


def _normal(generator: TorchGenerator, shapes: _Shapes, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Of torch.nn.Embedding."""
    return {name: generator.normal(shape, dtype) for name, shape in shapes.items()}


def _within_fan_in(generator: TorchGenerator, shapes: _Shapes, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Of torch.nn.Linear and convolutions: kaiming_uniform_(weight, a=sqrt(5)), then the bias.

    The bound of both is 1/sqrt(fan_in), up to rounding.
    """
    fan_in = math.prod(shapes["weight"][1:])
    bound = 1 / math.sqrt(fan_in) if fan_in else 0  # an integer, of which the negative is no -0.0
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    first = math.sqrt(3.0) * (gain / math.sqrt(fan_in)) if fan_in else 0
    bounds = {"weight": first, "bias": bound}
    return {
        name: generator.uniform(shapes[name], -bounds[name], bounds[name], dtype) for name in bounds if name in shapes
    }


class LayerKind(NamedTuple):
    """A row of the table: a kind of layer.

    Attributes:
        conversions: its variables, in torch's order.
        differences: warnings about a layer's settings that are not torch's, with the remedy.
        ignored: what torch stores and Flax does not have.
        draw: the first parameters in torch, from a generator, the shapes by torch's names, and the dtype.
    """

    conversions: tuple[Conversion, ...] = ()
    differences: Callable[[Any], Iterator[str]] = lambda layer: iter(())
    ignored: tuple[str, ...] = ()
    draw: _Draw | None = None


def _features(layer: Any) -> tuple[int, ...]:
    return (layer.num_groups * layer.group_size if isinstance(layer, nnx.GroupNorm) else layer.num_features,)


_BIAS = Conversion("bias", "bias", lambda layer: (layer.out_features,))
_KERNEL = Conversion("kernel", "weight", lambda layer: layer.kernel_shape, _to_channels_first, _to_channels_last)
_MATRIX = Conversion("kernel", "weight", lambda layer: (layer.in_features, layer.out_features), _transpose, _transpose)
_LINEAR = LayerKind((_MATRIX, _BIAS), draw=_within_fan_in)
_TABLE = Conversion("embedding", "weight", lambda layer: (layer.num_embeddings, layer.features))
_EMBED = LayerKind((_TABLE,), draw=_normal)
_SCALE = Conversion("scale", "weight", _features)
_AFFINE = (_SCALE, Conversion("bias", "bias", _features))
_STATISTICS = (Conversion("mean", "running_mean", _features), Conversion("var", "running_var", _features))
_EPSILON = Setting("epsilon", "eps", 1e-5)
_MOMENTUM = Setting("momentum", "momentum", 0.1, lambda value: 1 - value)
_NORM = LayerKind(_AFFINE, _compared(_EPSILON), draw=_constants)
_BATCH_NORM = LayerKind((*_AFFINE, *_STATISTICS), _compared(_EPSILON, _MOMENTUM), ("num_batches_tracked",), _constants)
_KINDS: dict[str, LayerKind] = {
    "Linear": _LINEAR,
    "Dense": _LINEAR,
    "Embed": _EMBED,
    "Conv": LayerKind((_KERNEL, _BIAS), _padding, draw=_within_fan_in),
    "ConvTranspose": LayerKind((_KERNEL, _BIAS), _transposed_padding, draw=_within_fan_in),
    **dict.fromkeys(("LayerNorm", "GroupNorm", "InstanceNorm"), _NORM),
    "RMSNorm": LayerKind((_SCALE,), _compared(Setting("epsilon", "eps", None)), draw=_constants),
    "BatchNorm": _BATCH_NORM,
}


def _lacking(setting: str, default: str, *plain: Any) -> Row:
    """The row of a setting that torch's layer lacks, with Flax's default as code."""
    return warned(
        *plain, remedy=f"torch's layer lacks it: for the same results, write Flax's default, {setting}={default}"
    )


def default_of(kind: Any, name: str) -> Any:
    """The default of a setting of a class of Flax."""
    return inspect.signature(kind.__init__).parameters[name].default


_CHOSEN = neutral("how precisely to compute: one chooses it here, whatever torch's is")
_TORCHS = neutral("torch has it, too, and its state dict does not say it")
_BOOKKEEPING = neutral("where the module, or its weights, are")
_DILATED = "write input_dilation=1 in Flax, or in torch put input_dilation - 1 zeros between the inputs"
# What a setting of one name is in every class that has it; below, those of each class.
_ROWS: dict[str, Row] = {
    **dict.fromkeys(("kernel", "bias", "scale", "embedding", "mean", "var", "mask", "kernel_shape"), USED),
    **dict.fromkeys(("padding", "strides", "kernel_size", "kernel_dilation", "transpose_kernel"), USED),
    **dict.fromkeys(("epsilon", "momentum", "reduction_axes", "feature_axes", "param_dtype"), USED),
    **dict.fromkeys(
        ("features", "in_features", "out_features", "num_embeddings", "num_features", "use_bias", "use_scale"),
        neutral("the weights and their shapes say it"),
    ),
    **dict.fromkeys(("dtype", "precision", "preferred_element_type"), _CHOSEN),
    **dict.fromkeys(("use_fast_variance", "force_float32_reductions"), neutral("it changes the rounding alone")),
    **dict.fromkeys(("kernel_init", "bias_init", "scale_init", "embedding_init"), neutral("makes the first weights")),
    **dict.fromkeys(("kernel_metadata", "bias_metadata", "scale_metadata", "embedding_metadata"), _BOOKKEEPING),
    **dict.fromkeys(("parent", "name", "rngs"), _BOOKKEEPING),
    **dict.fromkeys(("feature_group_count", "num_groups", "group_size", "use_running_average"), _TORCHS),
    **dict.fromkeys(("axis", "feature_axis"), neutral("where torch has axis 1")),
    "input_dilation": warned(None, 1, (1,), (1, 1), (1, 1, 1), remedy=_DILATED),
    "dot_general": _lacking("dot_general", "jax.lax.dot_general", jax.lax.dot_general, None),
    "conv_general_dilated": _lacking(
        "conv_general_dilated", "jax.lax.conv_general_dilated", jax.lax.conv_general_dilated, None
    ),
    **{
        name: _lacking(name, "None", None)
        for name in ("dot_general_cls", "conv_general_dilated_cls", "axis_name", "axis_index_groups")
    },
}
_OTHERS: dict[str, dict[str, Row]] = {
    "GroupNorm": {"reduction_axes": _lacking("reduction_axes", "None", None)},
    "InstanceNorm": {"feature_axes": neutral("where torch has axis 1")},
    "BatchNorm": dict.fromkeys(("axis_name", "axis_index_groups"), neutral("in torch, SyncBatchNorm")),
}
_WEIGHTED = "kernel_init bias_init use_bias dtype param_dtype precision promote_dtype"
_DENSE = f"{_WEIGHTED} dot_general"
_CONVOLVED = f"{_WEIGHTED} kernel_size strides padding kernel_dilation mask"
_CONV = f"{_CONVOLVED} input_dilation feature_group_count conv_general_dilated"
_TRANSPOSED = f"{_CONVOLVED} transpose_kernel preferred_element_type"
_EMBEDDED = "num_embeddings features dtype param_dtype embedding_init promote_dtype"
_SCALED = "epsilon dtype param_dtype use_scale scale_init axis_name axis_index_groups use_fast_variance"
_NORMED = f"{_SCALED} use_bias bias_init"
_NNX_SIZES = "in_features out_features kernel_metadata bias_metadata preferred_element_type"
_NNX_NORM = "num_features promote_dtype scale_metadata"
_SETTINGS: dict[Any, dict[str, str]] = {
    linen: {
        "Dense": f"{_DENSE} features dot_general_cls",
        "Embed": _EMBEDDED,
        "Conv": f"{_CONV} features conv_general_dilated_cls",
        "ConvTranspose": f"{_TRANSPOSED} features",
        "LayerNorm": f"{_NORMED} force_float32_reductions reduction_axes feature_axes",
        "GroupNorm": f"{_NORMED} force_float32_reductions num_groups group_size reduction_axes",
        "InstanceNorm": f"{_NORMED} force_float32_reductions feature_axes",
        "RMSNorm": f"{_SCALED} force_float32_reductions reduction_axes feature_axes",
        "BatchNorm": f"{_NORMED} force_float32_reductions use_running_average axis momentum",
    },
    nnx: {
        "Linear": f"{_DENSE} {_NNX_SIZES}",
        "Embed": f"{_EMBEDDED} embedding_metadata",
        "Conv": f"{_CONV} {_NNX_SIZES} kernel_shape",
        "ConvTranspose": f"{_TRANSPOSED} {_NNX_SIZES} kernel_shape",
        "LayerNorm": f"{_NORMED} {_NNX_NORM} bias_metadata reduction_axes feature_axes",
        "GroupNorm": f"{_NORMED} {_NNX_NORM} bias_metadata num_groups group_size reduction_axes feature_axis",
        "InstanceNorm": f"{_NORMED} {_NNX_NORM} bias_metadata feature_axes",
        "RMSNorm": f"{_SCALED} {_NNX_NORM} reduction_axes feature_axes",
        "BatchNorm": f"{_NORMED} {_NNX_NORM} bias_metadata use_running_average axis momentum",
    },
}


def _table(library: Any, name: str, settings: str) -> Table:
    promote = default_of(nnx.Linear if library is nnx else linen.Dense, "promote_dtype")
    module = f"{promote.__module__}.{promote.__name__}"
    rows = _ROWS | _OTHERS.get(name, {}) | {"promote_dtype": _lacking("promote_dtype", module, promote)}
    variables = [conversion.attribute for conversion in _KINDS[name].conversions]  # which NNX has as attributes
    names = [*settings.split(), *(["parent", "name"] if library is linen else ["rngs", *variables])]
    return Table(f"{library.__name__}.{name}", {each: rows[each] for each in names})


TABLES: dict[type, Table] = {
    getattr(library, name): _table(library, name, settings)
    for library, classes in _SETTINGS.items()
    for name, settings in classes.items()
}


def kind_of(layer: object) -> LayerKind:
    """The table's row for a layer; an empty one for other modules."""
    known = next((kind for kind in type(layer).__mro__ if kind in TABLES), None)
    if known is None:
        return LayerKind()
    kind = _KINDS[known.__name__]
    return kind._replace(differences=lambda layer: itertools.chain(kind.differences(layer), _unlike(known, layer)))


def _unlike(known: type, layer: Any) -> Iterator[str]:
    """Warnings about settings that torch's layer lacks, or that are unknown; a subclass may have others of its own."""
    # Flax's metaclass hides the signature of the class.
    names = inspect.signature(known.__init__).parameters  # type: ignore[misc]
    for finding in TABLES[known].findings({name: getattr(layer, name) for name in names if hasattr(layer, name)}):
        yield f"{finding}\n{finding.row.words}"
