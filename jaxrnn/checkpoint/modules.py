"""Tensors by name into and out of Flax modules, and torch's modules into ours."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxrnn.nnx
from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.spec import CellSpec, Spec

_CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
# Kinds of dtype: within one a value is cast, as torch does; an integer or complex weight is a mistake.
_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)


def load_state_dict(
    module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "", strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load tensors into a module's parameters, in place, by name.

    The names are those of `state_dict`. Each value is cast to its parameter's dtype, as torch does; the `nnx.Param`
    objects, their metadata and their sharding stay. When an error is raised, nothing has changed.

    Args:
        module: any flax.nnx module.
        tensors: from name to floating array of numpy, jax or torch, of the parameter's shape.
        prefix: only keys that start with it are considered, without it, such as "encoder.lstm.".
        strict: whether a missing or unexpected key is an error.

    Returns:
        `(missing, unexpected)`: the names of parameters that `tensors` has not, and its keys, without the prefix, that
        are no parameter. Both are empty when `strict`.

    Raises:
        CheckpointError: a shape or a kind of dtype that does not fit, or with `strict` a missing or unexpected key;
            the message names every one.

    >>> import jaxrnn
    >>> from flax import nnx
    >>> lstm = jaxrnn.LSTM(10, 20, rngs=nnx.Rngs(0))
    >>> tensors = {f"encoder.{name}": value for name, value in jaxrnn.state_dict(lstm).items()}
    >>> jaxrnn.load_state_dict(jaxrnn.LSTM(10, 20, rngs=nnx.Rngs(1)), tensors, prefix="encoder.")
    ([], [])
    >>> jaxrnn.load_state_dict(jaxrnn.LSTM(10, 20, bias=False, rngs=nnx.Rngs(1)), tensors, "encoder.", strict=False)
    ([], ['bias_ih_l0', 'bias_hh_l0'])
    """
    params = _params(module)
    values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    missing = [name for name in params if name not in values]
    unexpected = [name for name in values if name not in params]
    problems = [f"{name} is missing" for name in missing if strict]
    problems += [f"{name} is unexpected" for name in unexpected if strict]
    loaded = {}
    for name in [name for name in params if name in values]:
        try:
            loaded[name] = _fitted(name, values[name], params[name].get_value())
        except CheckpointError as error:
            problems.append(str(error).partition("\n")[0])
    if problems:
        under = f" under the prefix {prefix!r}" if prefix else ""
        remedy = "jaxrnn.checkpoint.find_rnns(tensors) lists prefixes and sizes"
        if missing or unexpected:
            remedy += "; strict=False allows missing and unexpected keys"
        lines = [f"{type(module).__name__}: the tensors{under} do not fit:", *problems]
        raise CheckpointError("\n  ".join(lines) + f"\n{remedy}")
    for name, value in loaded.items():
        params[name].set_value(value)
    return missing, unexpected


def state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's parameters by name, as torch's `state_dict()` gives them.

    A name is the path of attributes to an `nnx.Param`, joined by dots, with numbers for what is in lists; as in torch,
    the modules in an `nnx.Sequential` are numbered right under it. The order is torch's too: a module's own parameters
    before its submodules', both as they were defined. (A module that went through `nnx.merge` no longer knows in which
    order its attributes were defined: there they are sorted. The parameters of one RNN, LSTM, GRU or cell are in
    torch's order even so.) A parameter that is shared has each of its names.

    Args:
        module: any flax.nnx module.

    Returns:
        A dict from name to a NumPy copy, of the parameter's shape and dtype.

    >>> import jaxrnn
    >>> from flax import nnx
    >>> model = nnx.Sequential(jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    >>> list(jaxrnn.state_dict(model))
    ['0.weight_ih', '0.weight_hh', '0.bias_ih', '0.bias_hh', '1.kernel', '1.bias']
    """
    return {name: to_numpy(name, param.get_value()) for name, param in _params(module).items()}


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
        CheckpointError: its parameters are not those of its class, as under weight normalisation.

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


def _params(node: object, prefix: str = "", above: tuple[int, ...] = ()) -> dict[str, nnx.Param]:
    """Every nnx.Param under a node by its dotted name, in torch's order."""
    params: dict[str, nnx.Param] = {}
    children = _children(node) if id(node) not in above else []
    for name, child in sorted(children, key=lambda item: not isinstance(item[1], nnx.Param)):
        if not isinstance(child, nnx.Param):
            params |= _params(child, f"{prefix}{name}.", (*above, id(node)))
        elif child.get_raw_value() is not None:
            params[prefix + name] = child
    return params


def _children(node: object) -> list[tuple[str, Any]]:
    if isinstance(node, nnx.Pytree):
        attributes = {name: value for name, value in vars(node).items() if not name.startswith("_pytree__")}
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


def _fitted(name: str, value: Any, param: Any) -> jax.Array:
    """`value` in the dtype, and on the devices, of the parameter's present value."""
    dtype, wanted = dtype_of(value), jnp.result_type(param)
    if dtype == NO_NUMBERS:
        return jnp.asarray(to_numpy(name, value))  # which says what it is instead
    if tuple(value.shape) != jnp.shape(param) or not any(
        jnp.issubdtype(dtype, kind) and jnp.issubdtype(wanted, kind) for kind in _KINDS
    ):
        raise CheckpointError(f"{name} is {dtype} {tuple(value.shape)}, should be {wanted} {jnp.shape(param)}")
    # Out of range becomes infinite without a warning, as in torch's copy_.
    with np.errstate(over="ignore"):
        array = to_numpy(name, value).astype(wanted)
    if isinstance(param, jax.Array) and param.committed:
        return jax.device_put(array, param.sharding)
    return jnp.asarray(array)
