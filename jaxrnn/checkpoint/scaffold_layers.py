"""Tell from names and shapes which layer of Flax takes some tensors, and write the code that makes it."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrnn import activations, more_cells
from jaxrnn.cells import Cell
from jaxrnn.checkpoint.find import FoundRNN

Shape = tuple[int, ...]
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# What the names of layers say of their kind, where shapes fit several. Only comments and defaults depend on it.
_EMBEDDING = re.compile(r"emb|lookup|vocab|wte|wpe|shared", re.I)
_TRANSPOSED = re.compile(r"trans|deconv|tconv|convt|up", re.I)
_DEPTHWISE = re.compile(r"depthwise|dw", re.I)
_GROUP_NORM = re.compile(r"group|(^|_)gn\d*$", re.I)
_INSTANCE_NORM = re.compile(r"instance|(^|_)in\d*$", re.I)
_NORM = re.compile(r"norm|rms|(^|_)ln", re.I)
# The order in which models mostly have their layers.
EMBED, CONV, NORM, RNN, LINEAR = range(5)


class Tensor(NamedTuple):
    """A tensor of the file."""

    key: str
    dtype: np.dtype
    shape: Shape


class Layer(NamedTuple):
    """The code of a layer.

    Attributes:
        rank: what kind of layer it is, such as `CONV`.
        nnx: its class, and the first arguments in NNX.
        linen: the same in Linen.
        settings: the arguments that both take.
        sizes: the features of its input, None for integers, and of its output.
        input: the shape of an input, for Linen.
        dtype: the tensors'.
        notes: comments: settings that no weights say, and other layers with the same names and shapes.
        has_state: whether a call returns a pair of the output and a state.
        call: other arguments of a call, in Linen.
    """

    rank: int
    nnx: tuple[str, ...]
    linen: tuple[str, ...]
    settings: tuple[str, ...]
    sizes: tuple[int | None, int]
    input: Shape
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    has_state: bool = False
    call: tuple[str, ...] = ()


_CLASSES = re.compile(rf"\b({'|'.join(name for name, each in vars(activations).items() if isinstance(each, type))})\(")


def code_of(dtype: np.dtype) -> str:
    """A dtype as code."""
    name = "bool_" if dtype == np.bool_ else dtype.name
    return f"jnp.{name}" if hasattr(jnp, name) else f"jnp.dtype({name!r})"


def recurrent(found: FoundRNN) -> Layer:
    """The layer of a recurrent module."""
    arguments: dict[str, Any] = dict(found.arguments)
    first: tuple[str, ...] = ()
    if (cell := arguments.pop("cell", None)) is not None:
        first = (_code_of_cell(cell),)
    first += (str(arguments.pop("input_size")), str(arguments.pop("hidden_size")))
    defaults = {"bias": True, "num_layers": 1, "bidirectional": False}
    given = {name: value for name, value in arguments.items() if name not in defaults or value != defaults[name]}
    settings = tuple(f"{name}={value!r}".replace("'", '"') for name, value in (given | found.assumed).items())
    drops = not found.is_cell and found.num_layers > 1
    width = found.proj_size or found.hidden_size
    return Layer(
        RNN,
        (f"jaxrnn.{found.class_name}", *first),
        (f"jaxrnn.linen.{found.class_name}", *first),
        settings + _param_dtype(found.dtype),
        (found.input_size, width * (1 + found.bidirectional)),
        (1, found.input_size) if found.is_cell else (1, 1, found.input_size),
        found.dtype,
        (
            *([f"The file does not say {_and(*found.assumed)}: assumed"] if found.assumed else []),
            *(f"In training alone, the original has {text}" for text in found.in_training),
        ),
        has_state=not found.is_cell or found.kind == "LSTM",
        call=("deterministic=True",) if drops else (),
    )


def _code_of_cell(cell: Cell) -> str:
    """A cell of jaxrnn's, as code."""
    constant = next((name for name, value in vars(more_cells).items() if value is cell), None)
    if constant is not None:
        return f"jaxrnn.{constant}"
    # With other activations, its name is the call that makes it.
    return "jaxrnn." + _CLASSES.sub(r"jaxrnn.activations.\1(", cell.name).replace("'", '"')


def layer_of(name: str, group: Mapping[str, Tensor]) -> Layer | None:
    """The layer whose tensors these are, without a rest; None if Flax has none that is known.

    Args:
        name: the name of the layer, for what shapes leave open.
        group: its tensors, by their names in it.
    """
    names = frozenset(group) - {"num_batches_tracked"}
    dtypes = {group[each].dtype for each in names}
    if not all(dtype.name in _FLOATS for dtype in dtypes):
        return None
    shapes = {each: group[each].shape for each in names}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))
    dtype = dtype if len(dtypes) < 2 or dtype.itemsize > 2 else np.dtype(np.float32)
    if names in (_STATISTICS, _STATISTICS | _AFFINE, _FLAX_STATISTICS | {"scale", "bias"}):
        return _batch_norm(shapes, dtype)
    if len(names) < len(group):
        return None
    bias = shapes.get("bias")
    if names - {"bias"} == {"weight"}:
        return _of_weight(name, shapes["weight"], bias, dtype)
    if names - {"bias"} == {"kernel"}:
        return _of_kernel(shapes["kernel"], bias, dtype)
    if names == {"embedding"} and len(shapes["embedding"]) == 2:
        return _embed(*shapes["embedding"], dtype)
    if names - {"bias"} == {"scale"} and len(shapes["scale"]) == 1 and bias in (None, shapes["scale"]):
        kind = "RMSNorm" if bias is None else "LayerNorm"
        return _norm(
            kind, shapes["scale"][0], dtype, "1e-6", ("The file does not say epsilon: this is Flax's default",)
        )
    return None


_STATISTICS = frozenset({"running_mean", "running_var"})
_FLAX_STATISTICS = frozenset({"mean", "var"})
_AFFINE = frozenset({"weight", "bias"})


def _defaults(*names: str) -> str:
    """The comment about settings."""
    default = "these are torch's defaults" if len(names) > 1 else "this is torch's default"
    return f"The file does not say {_and(*names)}: {default}"


def _and(*names: str) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _param_dtype(dtype: np.dtype) -> tuple[str, ...]:
    return () if dtype == np.float32 else (f"param_dtype={code_of(dtype)}",)


def _of_weight(name: str, weight: Shape, bias: Shape | None, dtype: np.dtype) -> Layer | None:
    """A layer with torch's names and layout."""
    if 0 in weight:
        return None
    if len(weight) == 1 and bias in (None, weight):
        return _norm_of_weight(name, weight[0], bias is not None, dtype)
    if len(weight) == 2 and bias in (None, weight[:1]):
        linear = _linear(weight[1], weight[0], bias is not None, dtype)
        if bias is not None:
            return linear
        if _EMBEDDING.search(name):
            return _embed(*weight, dtype)._replace(notes=("This may be a Linear without bias",))
        return linear._replace(notes=("This may be an Embed",))
    if 3 <= len(weight) <= 5:
        out, other, *kernel = weight
        may_be, may_be_transposed = bias in (None, (out,)), bias in (None, (other,))
        transposed = may_be_transposed and (not may_be or bool(_TRANSPOSED.search(name)))
        if transposed:
            layer = _conv_transpose(out, other, kernel, bias is not None, dtype)
            return layer._replace(notes=(*layer.notes, *["This may be a Conv"] * may_be))
        if may_be:
            depthwise = other == 1 and bool(_DEPTHWISE.search(name))
            layer = _conv(out if depthwise else other, out, kernel, bias is not None, dtype, depthwise)
            return layer._replace(notes=(*layer.notes, *["This may be a ConvTranspose"] * may_be_transposed))
    return None


def _of_kernel(kernel: Shape, bias: Shape | None, dtype: np.dtype) -> Layer | None:
    """A layer with the names and the layout of Flax and Keras."""
    if 0 in kernel or not 2 <= len(kernel) <= 5 or bias not in (None, kernel[-1:]):
        return None
    *spatial, inputs, outputs = kernel
    if not spatial:
        return _linear(inputs, outputs, bias is not None, dtype)
    layer = _conv(inputs, outputs, spatial, bias is not None, dtype)
    settings = tuple('padding="SAME"' if each == "padding=0" else each for each in layer.settings)
    names = _and("strides", "padding", "kernel_dilation", "feature_group_count")
    note = f'The file does not say {names}: these are Flax\'s defaults, and Keras has padding="VALID"'
    return layer._replace(settings=settings, notes=(note,))


def _norm_of_weight(name: str, features: int, bias: bool, dtype: np.dtype) -> Layer | None:
    if bias:
        if _GROUP_NORM.search(name):
            groups = math.gcd(features, 32)
            comment = "The file does not say num_groups, which is a guess, and epsilon, which is torch's default"
            return _norm("GroupNorm", features, dtype, "1e-5", (comment,), f"num_groups={groups}")
        if _INSTANCE_NORM.search(name):
            return _norm("InstanceNorm", features, dtype, "1e-5", (_defaults("epsilon"),))
        other = "This may be another norm without running statistics, such as a GroupNorm"
        return _norm("LayerNorm", features, dtype, "1e-5", (_defaults("epsilon"), other))
    if features == 1 or not _NORM.search(name):  # such as torch.nn.PReLU's
        return None
    epsilon = jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps
    notes = (f"{_defaults('epsilon')}, and many models have 1e-5 or 1e-6", "This may be a LayerNorm without bias")
    return _norm("RMSNorm", features, dtype, f"{epsilon:.3g}", notes)


def _norm(kind: str, features: int, dtype: np.dtype, epsilon: str, notes: tuple[str, ...], *settings: str) -> Layer:
    axes = (1, 1, features) if kind == "InstanceNorm" else (1, features)
    settings = (*settings, f"epsilon={epsilon}", *_param_dtype(dtype))
    nnx, linen = (f"nnx.{kind}", str(features)), (f"linen.{kind}",)
    return Layer(NORM, nnx, linen, settings, (features, features), axes, dtype, notes)


def _batch_norm(shapes: Mapping[str, Shape], dtype: np.dtype) -> Layer | None:
    shape = next(iter(shapes.values()))
    if len(shape) != 1 or 0 in shape or any(other != shape for other in shapes.values()):
        return None
    plain = () if "bias" in shapes else ("use_scale=False", "use_bias=False")
    epsilon, momentum, whose = ("1e-5", "0.9", "torch") if "running_mean" in shapes else ("1e-5", "0.99", "Flax")
    note = f"The file does not say epsilon and momentum: these are {whose}'s defaults"
    layer = _norm("BatchNorm", shape[0], dtype, epsilon, (note,), *plain, f"momentum={momentum}")
    return layer._replace(linen=("linen.BatchNorm", "use_running_average=True"))


def _linear(inputs: int, outputs: int, bias: bool, dtype: np.dtype) -> Layer:
    nnx, linen = ("nnx.Linear", str(inputs), str(outputs)), ("linen.Dense", str(outputs))
    return Layer(LINEAR, nnx, linen, _use_bias(bias) + _param_dtype(dtype), (inputs, outputs), (1, inputs), dtype)


def _use_bias(bias: bool) -> tuple[str, ...]:
    return () if bias else ("use_bias=False",)


def _embed(count: int, features: int, dtype: np.dtype) -> Layer:
    sizes = (str(count), str(features))
    settings = _param_dtype(dtype)
    return Layer(EMBED, ("nnx.Embed", *sizes), ("linen.Embed", *sizes), settings, (None, features), (1,), dtype)


def _conv(inputs: int, outputs: int, kernel: list[int], bias: bool, dtype: np.dtype, depthwise: bool = False) -> Layer:
    grouped = (f"feature_group_count={inputs}",) if depthwise else ()
    return Layer(
        CONV,
        ("nnx.Conv", str(inputs), str(outputs)),
        ("linen.Conv", str(outputs)),
        (f"kernel_size={tuple(kernel)}", "strides=1", "padding=0", *grouped, *_use_bias(bias), *_param_dtype(dtype)),
        (inputs, outputs),
        (1, *kernel, inputs),
        dtype,
        (_defaults("strides", "padding", "kernel_dilation", *["feature_group_count"] * (not depthwise)),),
    )


def _conv_transpose(inputs: int, outputs: int, kernel: list[int], bias: bool, dtype: np.dtype) -> Layer:
    return Layer(
        CONV,
        ("nnx.ConvTranspose", str(inputs), str(outputs)),
        ("linen.ConvTranspose", str(outputs)),
        (f"kernel_size={tuple(kernel)}", "strides=1", 'padding="VALID"', *_use_bias(bias), *_param_dtype(dtype)),
        (inputs, outputs),
        (1, *kernel, inputs),
        dtype,
        (_defaults("strides", "padding"), "A padding=p of torch is kernel_size - 1 - p on both sides in Flax"),
    )
