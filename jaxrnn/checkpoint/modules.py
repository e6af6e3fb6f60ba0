"""Tensors by name into and out of NNX modules, and torch's modules into ours."""

import inspect
import itertools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

import jaxrnn.nnx
from jaxrnn import _compat, flax_sharding
from jaxrnn.checkpoint.arrays import dtype_of
from jaxrnn.checkpoint.fit import Contents, Parameter, fit
from jaxrnn.checkpoint.layers import Entry, kind_of
from jaxrnn.spec import CellSpec, Spec

_CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def load_state_dict(
    module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "", strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load tensors into a module's parameters, in place, by name.

    The names and layouts are torch's, as those of `state_dict`: a whole model loads whose attributes are named as in
    torch. Weights in parts are folded (see `jaxrnn.checkpoint.fold`), a `module.` in front of every key is dropped, and
    the weights of one layer serve a cell, and a cell's one layer.

    Each value is cast to its parameter's dtype, as torch does; the `nnx.Param` objects, their metadata and their
    sharding stay. When an error is raised, nothing has changed.

    A module of `nnx.vmap` is refused: load each of its members, which are made without, and put them into it by
    `nnx.update(module, jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(nnx.state, members)))`.

    Args:
        module: any flax.nnx module. Beside the modules of jaxrnn, these layers are known: Linear, Embed, Conv,
            ConvTranspose, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, and BatchNorm with its running statistics.
            An `nnx.Param` anywhere else has its own name and layout.
        tensors: from name to floating array of numpy, jax or torch, of the parameter's shape in torch.
        prefix: only keys that start with it are considered, without it, such as "encoder.lstm.".
        strict: whether a missing or unexpected key is an error.

    Returns:
        `(missing, unexpected)`: the names of parameters that `tensors` has not, and its keys, without the prefix, that
        are no parameter. Both are empty when `strict`.

    Raises:
        CheckpointError: a shape or a kind of dtype that does not fit, or with `strict` a missing or unexpected key;
            the message names every one. Or several modules in one, as for `state_dict`.
        TypeError: `module` is a Linen module, for which there is `jaxrnn.checkpoint.linen.load_state_dict`; or
            `tensors` are no dict.

    Warns:
        UserWarning: a tensor with NaN or infinite numbers, which is loaded all the same; or a setting of a layer that
            is loaded and that is not torch's default, as for `state_dict`.

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
    for name, array in found.arrays.items():
        param = contents.params[name]
        variable = param.place
        axes = variable.get_metadata().get("out_sharding")
        if axes and not isinstance(param.value, jax.Array):  # an abstract module's: nothing lies anywhere yet
            array = flax_sharding.lay(array, axes)
        variable.set_value(array)
    return found.missing, found.unexpected


def state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's parameters by name, as torch's `state_dict()` gives them.

    A name is the path of attributes to an `nnx.Param`, joined by dots, with numbers for what is in lists; as in torch,
    the modules in an `nnx.Sequential` are numbered right under it. The layers that `load_state_dict` knows have torch's
    names and layouts, such as `weight` for the kernel of an `nnx.Linear`, transposed.

    The order is torch's too: a module's own parameters before its submodules', both as they were defined. (A module
    that went through `nnx.jit`, `nnx.merge`, `nnx.clone` or `copy.deepcopy` no longer knows in which order its
    attributes were defined: there they are sorted. The parameters of one layer, or RNN, LSTM, GRU or cell, are in
    torch's order even so.) A parameter that is shared has each of its names.

    Settings such as a norm's epsilon are in no state dict, and have to be written in both models. A warning names each
    whose default differs between Flax and torch, or that torch lacks, and that is not torch's default, with what to
    write. Where torch's model has the same setting, silence it by
    `warnings.filterwarnings("ignore", "Model: encoder.norm.epsilon=1e-12")`, or for all layers by ".*epsilon=1e-12".
    What no setting changes: a BatchNorm's running variance is biased in Flax, and unbiased in torch; and Flax's Embed
    has no `padding_idx`, whose row torch does not train.

    Args:
        module: any flax.nnx module.

    Returns:
        A dict from name to a NumPy copy, of the parameter's dtype, and its shape in torch. A convolution's `mask` is
        multiplied into its kernel.

    Raises:
        CheckpointError: a layer's parameters have more axes than it has use for, because `nnx.vmap` made several
            modules in one; the message says how to take one of them.
        TypeError: `module` is a Linen module, for which there is `jaxrnn.checkpoint.linen.state_dict`.

    Warns:
        UserWarning: a setting is not torch's default: the epsilon of a norm, a BatchNorm's momentum (torch's is 1 minus
            Flax's), a LayerNorm's or RMSNorm's `reduction_axes`, or a padding of a convolution that torch lacks.

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


def from_torch(torch_module: Any, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """Make our module from torch's: the same settings and the same weights.

    Args:
        torch_module: a torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell, on any device.
        rngs: nnx.Rngs for the dropout of the new module; `nnx.Rngs(0)` if None.

    Returns:
        The module of the same name, `deterministic` as torch's is in evaluation. Its parameters have torch's dtype, or
        float32 for float64 unless JAX's x64 mode is on.

    Raises:
        TypeError: `torch_module` is anything else.
        CheckpointError: its parameters are not those of its class, nor fold into them (see `jaxrnn.checkpoint.fold`).

    >>> import jaxrnn, torch
    >>> jaxrnn.from_torch(torch.nn.LSTM(10, 20, num_layers=2, bidirectional=True))
    LSTM(10, 20, num_layers=2, bidirectional=True)
    """
    # Whoever has a torch module has imported torch: no need to import it here.
    torch = sys.modules.get("torch")
    classes = {name: getattr(torch.nn, name) for name in _CLASSES} if torch else {}
    name = next((name for name, cls in classes.items() if isinstance(torch_module, cls)), None)
    if name is None:
        wanted = ", ".join(_CLASSES)
        raise TypeError(f"torch_module should be one of torch.nn's {wanted}, got {type(torch_module).__name__}")
    make = getattr(jaxrnn.nnx, name)
    # Our constructors' positional arguments are torch's, and torch keeps each as an attribute of the same name.
    settings = {
        key: getattr(torch_module, key)
        for key, parameter in inspect.signature(make.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key != "self"
    }
    tensors = torch_module.state_dict()
    dtype = jax.dtypes.canonicalize_dtype(dtype_of(next(iter(tensors.values()))))
    module = make(**settings, param_dtype=dtype, rngs=nnx.Rngs(0) if rngs is None else rngs)
    load_state_dict(module, tensors)
    if not torch_module.training:
        module.eval()
    return module


def contents_of(module: nnx.Module) -> Contents:
    """Every parameter of a module and every module in it, in torch's order.

    Raises:
        TypeError: `module` is a Linen module.
        CheckpointError: it is several modules in one, as `nnx.vmap` makes them.
    """
    owner = type(module).__name__
    if isinstance(module, linen.Module):
        raise TypeError(f"module should be an nnx.Module, got Linen's {owner}: see jaxrnn.checkpoint.linen")
    contents = _under(module)
    contents.refuse_stacked(owner, _TAKE_ONE)
    return contents


_TAKE_ONE = """take one of them, such as the first:
  graph, state = nnx.split(module)
  member = nnx.merge(graph, jax.tree.map(lambda array: array[0], state))"""


def _under(node: object, prefix: str = "", above: tuple[int, ...] = ()) -> Contents:
    params: dict[str, Parameter] = {}
    below: dict[str, Parameter] = {}
    children = dict(_children(node)) if id(node) not in above else {}
    known = {entry.attribute: entry for entry in kind_of(node).entries}
    layers = {prefix: node} if known else {}
    for name in [*(name for name in known if name in children), *(name for name in children if name not in known)]:
        child = children[name]
        if isinstance(child, nnx.Param) or (name in known and isinstance(child, nnx.Variable)):
            if child.get_raw_value() is not None:
                entry = known.get(name, Entry(name, name))
                params[prefix + entry.name] = Parameter(child, child.get_value(), node, entry, _own_shape(node, entry))
        else:
            contents = _under(child, f"{prefix}{name}.", (*above, id(node)))
            below |= contents.params
            layers |= contents.layers
    return Contents(params | below, layers)


def _own_shape(layer: object, entry: Entry) -> tuple[int, ...] | None:
    """The shape of a layer's parameter, by the settings of the layer."""
    if isinstance(spec := getattr(layer, "spec", None), Spec | CellSpec):
        return spec.shapes().get(entry.name)
    try:
        return None if entry.shape is None else entry.shape(layer)
    except AttributeError:  # of a subclass that has another constructor
        return None


def order_in_doubt(node: object, above: tuple[int, ...] = ()) -> list[str]:
    """Attributes that Flax may have sorted, and that would have parameters of the same shapes in another order."""
    children = dict(_children(node)) if id(node) not in above else {}
    for child in children.values():
        if found := order_in_doubt(child, (*above, id(node))):
            return found
    numbered = isinstance(node, nnx.Sequential | nnx.List)
    if numbered or not isinstance(node, nnx.Pytree) or isinstance(children.get("spec"), Spec | CellSpec):
        return []
    known = {entry.attribute for entry in kind_of(node).entries}
    for own in (True, False):  # a module's own parameters come before its submodules'
        parts: dict[str, tuple] = {}
        for name in [name for name in children if name not in known]:
            if isinstance(children[name], nnx.Param) == own:
                shapes = tuple(param.shape for param in _under({name: children[name]}).params.values())
                parts |= {name: shapes} if shapes else {}
        if len(parts) > 1 and _compat.may_be_sorted(list(parts)):
            orders = itertools.islice(itertools.permutations(parts.values()), 1, 5040)
            if len(set(parts.values())) < len(parts) or sum(parts.values(), ()) in (sum(o, ()) for o in orders):
                return list(parts)
    return []


def _children(node: object) -> list[tuple[str, Any]]:
    if isinstance(node, nnx.Pytree):
        attributes = dict(vars(node))  # Flax's own among them hold no parameters
        if isinstance(spec := attributes.get("spec"), Spec | CellSpec):
            attributes = {name: attributes[name] for name in spec.shapes() if name in attributes} | attributes
        if isinstance(node, nnx.Sequential):
            attributes = dict(_children(attributes.pop("layers"))) | attributes
        return list(attributes.items())
    if isinstance(node, Mapping):
        return [(str(name), value) for name, value in node.items()]
    if isinstance(node, list | tuple):
        return [(str(index), value) for index, value in enumerate(node)]
    return []
