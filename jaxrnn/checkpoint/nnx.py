"""Load tensors by name into NNX modules, and back; and convert torch's modules to ours."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
from flax import linen, nnx
from numpy.typing import NDArray

import jaxrnn.nnx
from jaxrnn import _compat
from jaxrnn._core import flax_sharding
from jaxrnn.checkpoint.arrays import dtype_of
from jaxrnn.checkpoint.flax_layers import Conversion, kind_of
from jaxrnn.checkpoint.matching import Contents, ModuleParameter, fit, interchangeable
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.names import fold
from jaxrnn.checkpoint.torch_modules import CLASSES, check, tensors_of
from jaxrnn.spec import CellSpec, Spec

if TYPE_CHECKING:
    import torch


def load_state_dict(
    module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "", strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load tensors into a module's parameters, in place, by name.

    Names and layouts are torch's, as for `state_dict`, so a whole model loads if its attributes have torch's names.
    Weights in parts are folded (see `jaxrnn.checkpoint.fold`), and a `module.` before every key is dropped. A cell
    takes the weights of one layer, and one layer those of a cell.

    Values are cast to their parameters' dtypes, as in torch. The `nnx.Param` objects, their metadata and their sharding
    stay. If an error is raised, nothing has changed.

    A module that `nnx.vmap` made is refused. Load each of its members, made without vmap, then stack them:
    `nnx.update(module, jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(nnx.state, members)))`.

    Args:
        module: any flax.nnx module. These layers of Flax are known: Linear, Embed, Conv, ConvTranspose, LayerNorm,
            GroupNorm, InstanceNorm, RMSNorm, and BatchNorm with its running statistics. Any other `nnx.Param` keeps its
            own name and layout.
        tensors: from name to floating array of numpy, jax or torch, of the parameter's shape in torch.
        prefix: load only the keys that start with it, such as "encoder.lstm.", and remove it from them.
        strict: whether a missing or unexpected key is an error.

    Returns:
        `(missing, unexpected)`: the names of parameters that are not in `tensors`, and the keys, without the prefix,
        that are not parameters. Both are empty with `strict`.

    Raises:
        CheckpointError: a shape or a kind of dtype does not match, or with `strict` a key is missing or unexpected; the
            message names every one. Or two tensors would have the same name; or the module is a stack of several, as
            for `state_dict`.
        TypeError: `module` is a Linen module: use `jaxrnn.checkpoint.linen.load_state_dict`. Or `tensors` is not a
            dict.

    Warns:
        UserWarning: a tensor has NaN or infinite numbers, or numbers that become infinite in the parameter's dtype; it
            is loaded anyway. A setting of a loaded layer is not torch's default, as for `state_dict`; or a recurrent
            layer's setting is not what the file says that `jaxrnn.checkpoint.load` read.

    >>> import jaxrnn
    >>> from flax import nnx
    >>> lstm = jaxrnn.LSTM(10, 20, rngs=nnx.Rngs(0))
    >>> tensors = {f"encoder.{name}": value for name, value in jaxrnn.state_dict(lstm).items()}
    >>> jaxrnn.load_state_dict(jaxrnn.LSTM(10, 20, rngs=nnx.Rngs(1)), tensors, prefix="encoder.")
    ([], [])
    >>> jaxrnn.load_state_dict(jaxrnn.LSTM(10, 20, bias=False, rngs=nnx.Rngs(1)), tensors, "encoder.", strict=False)
    ([], ['bias_ih_l0', 'bias_hh_l0'])
    """
    contents = contents_of(module)
    found = fit(type(module).__name__, contents, tensors, prefix, strict)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    put(contents, found.arrays)
    return found.missing, found.unexpected


def put(contents: Contents, arrays: Mapping[str, jax.Array]) -> None:
    """Set parameters, by their names in torch, to arrays in Flax's layout."""
    for name, array in arrays.items():
        param = contents.params[name]
        variable = param.place
        axes = variable.get_metadata().get("out_sharding")
        if axes and not isinstance(param.value, jax.Array):  # of an abstract module: not on any device yet
            array = flax_sharding.shard(array, axes)
        variable.set_value(array)


def state_dict(module: nnx.Module) -> dict[str, NDArray[Any]]:
    """A module's parameters by name, as torch's `state_dict()` gives them.

    A name is the path of attributes to an `nnx.Param`, joined by dots, with numbers for items of lists. As in torch,
    the modules of an `nnx.Sequential` are numbered directly under it. A layer in `jaxrnn.OutputOnly` has the names that
    it has without that. Layers that `load_state_dict` knows have torch's names and layouts, such as `weight`, which is
    the transposed kernel of an `nnx.Linear`.

    The order is torch's, too: a module's own parameters before its submodules', both in order of definition. (A module
    that went through `nnx.jit`, `nnx.merge`, `nnx.clone` or `copy.deepcopy` has lost that order, and its attributes are
    sorted. The parameters of one layer, or RNN, LSTM, GRU or cell, are in torch's order even then.) A shared parameter
    appears under each of its names.

    A state dict does not hold settings such as a norm's epsilon: set them in both models. If a setting's default
    differs between Flax and torch, or torch lacks it, and its value is not torch's default, a warning says what to
    write. If torch's model has the same value, silence it by
    `warnings.filterwarnings("ignore", "Model: encoder.norm.epsilon=1e-12")`, or for all layers by ".*epsilon=1e-12".
    Two differences cannot be set: a BatchNorm's running variance is biased in Flax, and unbiased in torch; and Flax's
    Embed has no `padding_idx`, whose row torch does not train.

    Gradients have torch's names in a model that holds them:
    `graph, _, others = nnx.split(model, nnx.Param, ...)`, then `state_dict(nnx.merge(graph, gradient, others))`.

    Args:
        module: any flax.nnx module.

    Returns:
        A dict from name to a NumPy copy, with the parameter's dtype and its shape in torch. A convolution's kernel is
        multiplied by its `mask`.

    Raises:
        CheckpointError: a layer's parameters have more axes than it expects, because `nnx.vmap` stacked several
            modules; the message says how to take one of them. Or two parameters would have the same name.
        TypeError: `module` is a Linen module: use `jaxrnn.checkpoint.linen.state_dict`. Or it is an nnx.State.

    Warns:
        UserWarning: a setting is not torch's default: the epsilon of a norm, a BatchNorm's momentum (torch's is 1 minus
            Flax's), a LayerNorm's or RMSNorm's `reduction_axes`, or a padding of a convolution that torch lacks. Or
            torch has nothing like a setting, such as `dot_general` or `input_dilation`, or jaxrnn does not know it.

    >>> import jaxrnn
    >>> from flax import nnx
    >>> model = nnx.Sequential(jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    >>> list(jaxrnn.state_dict(model))
    ['0.weight_ih', '0.weight_hh', '0.bias_ih', '0.bias_hh', '1.weight', '1.bias']
    """
    contents = contents_of(module)
    for text in contents.differences(type(module).__name__, contents.params):
        warnings.warn(text, stacklevel=2)
    return {name: param.to_torch(name) for name, param in contents.params.items()}


@overload
def from_torch(torch_module: torch.nn.RNN, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.RNN: ...
@overload
def from_torch(torch_module: torch.nn.LSTM, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.LSTM: ...
@overload
def from_torch(torch_module: torch.nn.GRU, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.GRU: ...
@overload
def from_torch(torch_module: torch.nn.RNNCell, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.RNNCell: ...
@overload
def from_torch(torch_module: torch.nn.LSTMCell, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.LSTMCell: ...
@overload
def from_torch(torch_module: torch.nn.GRUCell, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.GRUCell: ...
@overload
def from_torch(torch_module: object, rngs: nnx.Rngs | None = None) -> Any: ...
def from_torch(torch_module: Any, rngs: nnx.Rngs | None = None) -> Any:
    """Convert a torch module: the same settings and the same weights.

    Args:
        torch_module: a torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell, on any device; or a subclass that
            computes the same. Weights in parts are folded (see `jaxrnn.checkpoint.fold`).
        rngs: nnx.Rngs for the dropout of the new module; `nnx.Rngs(0)` if None.

    Returns:
        The module of the same name, `deterministic` if torch's is in evaluation mode. Its parameters have torch's
        dtype, but float64 becomes float32 unless JAX's x64 mode is on.

    Raises:
        TypeError: `torch_module` is something else.
        CheckpointError: it does not compute what its class in torch.nn does: a subclass or the instance has its own
            `forward` or another method that computes; there are hooks on its call, also those of all modules, or
            parametrizations that `fold` does not know; torch's own class or a utility of its was changed; or its
            parameters are not those of its class.

    Warns:
        UserWarning: it is trained otherwise than its class, because of hooks of gradients or because some of its
            parameters are frozen or tied. Or as `load_state_dict`.

    >>> import jaxrnn, torch
    >>> jaxrnn.from_torch(torch.nn.LSTM(10, 20, num_layers=2, bidirectional=True))
    LSTM(10, 20, num_layers=2, bidirectional=True)
    """
    # Whoever has a torch module has imported torch: no need to import it here.
    torch = sys.modules.get("torch")
    classes = {name: getattr(torch.nn, name) for name in CLASSES} if torch else {}
    name = next((name for name, cls in classes.items() if isinstance(torch_module, cls)), None)
    if name is None:
        raise TypeError(
            f"torch_module should be one of torch.nn's {', '.join(CLASSES)}, got {type(torch_module).__name__}: "
            + (_instead(torch_module, tuple(classes.values())))
        )
    make = getattr(jaxrnn.nnx, name)
    # Our constructors' positional arguments are torch's, which has an attribute of the same name for each.
    settings = {
        key: getattr(torch_module, key)
        for key, parameter in inspect.signature(make.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key != "self"
    }
    if "nonlinearity" in settings and hasattr(torch_module, "mode"):  # by which torch's layers go
        settings["nonlinearity"] = torch_module.mode.removeprefix("RNN_").lower()
    if "bias_ih" in (parameters := vars(torch_module)["_parameters"]):  # by which torch's cells go
        settings["bias"] = parameters["bias_ih"] is not None
    tensors = tensors_of(torch_module)
    dtype = next((dtype_of(tensor) for key, tensor in tensors.items() if "weight" in key), jnp.dtype("float32"))
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    module = make(**settings, param_dtype=dtype, rngs=nnx.Rngs(0) if rngs is None else rngs)
    call = f"jaxrnn.{repr(module)[:-1]}, param_dtype={str(dtype)!r}, rngs=nnx.Rngs(0))"
    check(torch_module, classes[name], module.spec.shapes(), call)
    load_state_dict(module, fold(tensors))
    if not torch_module.training:
        module.eval()
    return module


def _instead(torch_module: Any, classes: tuple[type, ...]) -> str:
    """What to do with something else than a recurrent module of torch's."""
    for inner in ("module", "_orig_mod"):  # DataParallel and torch.compile
        if isinstance(getattr(torch_module, inner, None), classes):
            return f"give the module in it, torch_module.{inner}"
    if type(torch_module).__module__.startswith(("torch.ao.", "torch.nn.quant")):
        return "give the module that was quantized, or save its state_dict() and read it with dequantize=True"
    return "for a whole model, write it in Flax, and call jaxrnn.load_state_dict(model, torch_model.state_dict())"


def contents_of(module: nnx.Module) -> Contents:
    """Every parameter and every layer of a module, in torch's order.

    Raises:
        TypeError: `module` is a Linen module, the state of a module, or no module at all.
        CheckpointError: the module is a stack of several, as `nnx.vmap` makes.
    """
    owner = type(module).__name__
    if isinstance(module, linen.Module):
        raise TypeError(f"module should be an nnx.Module, got Linen's {owner}: use jaxrnn.checkpoint.linen instead")
    if isinstance(module, nnx.State):  # without its modules, layouts are unknown: kernels would not be transposed
        raise TypeError(
            "module should be an nnx.Module, got an nnx.State. Make a module of it: "
            "graph, _, others = nnx.split(model, nnx.Param, ...); nnx.merge(graph, state, others)"
        )
    contents = _under(module)
    is_one = isinstance(module, nnx.Pytree) and not isinstance(module, nnx.Variable)
    if not is_one and not contents.params:  # dicts and lists of modules have some
        raise TypeError(f"module should be an nnx.Module, got {owner}: give the module that has the parameters")
    contents.refuse_stacked(owner, _TAKE_ONE)
    return contents


_RENAME = "rename one of them in Flax: torch has one name for both"
_TAKE_ONE = """take one of them, such as the first:
  graph, state = nnx.split(module)
  member = nnx.merge(graph, jax.tree.map(lambda array: array[0], state))"""


def _under(node: object, path: tuple[str, ...] = (), above: tuple[int, ...] = ()) -> Contents:
    params, below = Names[ModuleParameter](_RENAME), dict[str, Contents]()
    children = _children(node) if id(node) not in above else {}
    known = {conversion.attribute: conversion for conversion in kind_of(node).conversions}
    layers = {_prefix(path): node} if known else {}
    for name in [*(name for name in known if name in children), *(name for name in children if name not in known)]:
        child, place = children[name], "/".join((*path, name))
        if isinstance(child, nnx.Param) or (name in known and isinstance(child, nnx.Variable)):
            if child.get_raw_value() is not None:
                conversion = known.get(name, Conversion(name, name))
                param = ModuleParameter(child, child.get_value(), node, conversion, _own_shape(node, conversion))
                params.put(_prefix(path) + conversion.name, param, place)
        else:
            unnamed = isinstance(node, jaxrnn.nnx.OutputOnly) and name == "layer"
            below[place] = _under(child, path if unnamed else (*path, name), (*above, id(node)))
    for place, contents in below.items():  # a module's own parameters come before its submodules'
        for name, param in contents.params.items():
            params.put(name, param, place)
        layers |= contents.layers
    return Contents(params, layers)


def _prefix(path: tuple[str, ...]) -> str:
    return "".join(f"{name}." for name in path)


def _own_shape(layer: object, conversion: Conversion) -> tuple[int, ...] | None:
    """The shape of a layer's parameter that the layer's settings imply."""
    if isinstance(spec := getattr(layer, "spec", None), Spec | CellSpec):
        return spec.shapes().get(conversion.name)
    try:
        return None if conversion.shape is None else conversion.shape(layer)
    except AttributeError:  # a subclass with another constructor
        return None


def order_in_doubt(node: object, seen: bool = True, above: tuple[int, ...] = ()) -> list[str]:
    """Attributes whose original order may be lost to sorting, where shapes, if torch's are seen, cannot reveal it."""
    children = _children(node) if id(node) not in above else {}
    for child in children.values():
        if found := order_in_doubt(child, seen, (*above, id(node))):
            return found
    numbered = isinstance(node, nnx.Sequential | nnx.List)
    if numbered or not isinstance(node, nnx.Pytree) or isinstance(children.get("spec"), Spec | CellSpec):
        return []
    known = {conversion.attribute for conversion in kind_of(node).conversions}
    for own in (True, False):  # a module's own parameters come before its submodules'
        parts: dict[str, tuple[Any, ...]] = {}
        for name in [name for name in children if name not in known]:
            if isinstance(children[name], nnx.Param) == own:
                shapes = tuple(param.shape for param in _under({name: children[name]}).params.values())
                parts |= {name: shapes} if shapes else {}
        if len(parts) > 1 and _compat.is_rebuilt(node) and interchangeable(parts, seen):
            return list(parts)
    return []


def orders_lost_in(
    node: object, path: tuple[str, ...] = (), above: tuple[int, ...] = (), rebuilt: bool = False
) -> list[list[str]]:
    """Submodules whose order of definition is lost, because Flax has made their module anew: a list for each module."""
    children = _children(node) if id(node) not in above else {}
    rebuilt = _compat.is_rebuilt(node) if isinstance(node, nnx.Pytree) else rebuilt
    numbered = isinstance(node, nnx.Sequential | nnx.List | list | tuple)
    below = {name: child for name, child in children.items() if not isinstance(child, nnx.Variable)}
    found = [
        lost
        for name, child in below.items()
        for lost in orders_lost_in(child, (*path, name), (*above, id(node)), rebuilt)
    ]
    drawn = [_prefix((*path, name))[:-1] for name, child in below.items() if _under(child).params]
    return [*found, drawn] if rebuilt and not numbered and len(drawn) > 1 else found


def _children(node: object) -> dict[str, Any]:
    children = Names[Any](_RENAME)
    if isinstance(node, nnx.Pytree):
        attributes = dict(vars(node))  # Flax's own attributes hold no parameters
        if isinstance(spec := attributes.get("spec"), Spec | CellSpec):
            attributes = {name: attributes[name] for name in spec.shapes() if name in attributes} | attributes
        if isinstance(node, nnx.Sequential):
            layers = _children(attributes.pop("layers"))
            for name in filter(str.isdigit, layers):
                children.put(name, layers[name], f"layers[{name}]")
        for name, value in attributes.items():
            children.put(name, value, f"the attribute {name}")
    elif isinstance(node, Mapping):
        for key, value in node.items():
            children.put(str(key), value, f"the key {key!r}")
    elif isinstance(node, list | tuple):
        children.update((str(index), value) for index, value in enumerate(node))
    return children
