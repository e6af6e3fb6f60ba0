"""The initial weights of a whole model as torch draws them from a seed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import kind_of
from jaxrnn.checkpoint.matching import Contents, ModuleParameter, fit
from jaxrnn.checkpoint.nnx import contents_of, order_lost_in, put
from jaxrnn.spec import CellSpec, Spec
from jaxrnn.torch_random import TorchGenerator

_GIVE_ORDER = (
    "give order, the submodules or parameters as torch's model constructs them, such as list(torch_model.state_dict())"
)


def torch_init(
    module: nnx.Module,
    seed: int | TorchGenerator,
    *,
    order: Sequence[str] | None = None,
    values: Mapping[str, Any] = {},
) -> None:
    """Set a module's parameters, in place, to those that `torch.manual_seed(seed)` and the same model in torch draw.

    Torch is not needed. The parameters are those of torch on a CPU, bit for bit: see `jaxrnn.TorchGenerator` for which
    processors. These layers are drawn: RNN, LSTM, GRU and their cells, Recurrent of torch's cells, and Flax's Linear,
    Embed, Conv and ConvTranspose. Norms get ones and zeros. Layers are drawn in the order in which the module's
    attributes were set, which should be that of the model in torch.

    Torch may do more after a layer is made. What it draws then, such as `torch.nn.init.xavier_uniform_(layer.weight)`,
    give in `values`, or draw with a generator after this call. The row of an embedding's `padding_idx` is 0 in torch;
    Flax has no `padding_idx`, so set it: `model.embed.embedding[0] = 0`.

    Args:
        module: any flax.nnx module of such layers.
        seed: as for `torch.manual_seed`. Or a `jaxrnn.TorchGenerator`, which goes on from where it is: for what torch
            draws before and after the module.
        order: names of submodules or parameters, in the order in which torch constructs them; all of them, such as the
            keys of torch's `state_dict()`. By default the order of the attributes.
        values: by name, arrays for parameters that torch makes otherwise, in torch's layout. A layer's own are drawn
            before they are replaced, as in torch.

    Raises:
        CheckpointError: torch has no such layer, or it is not known what torch draws, as for an nnx.Param of the model;
            two layers share a parameter; the order of the attributes may be lost, because the module went through
            `nnx.jit` or was copied; or `order` or `values` does not fit. The message names every parameter. Nothing has
            changed then, but a generator may have gone on.
        TypeError: `module` is a Linen module: use `jaxrnn.checkpoint.linen.torch_init`.

    Warns:
        UserWarning: a setting is not torch's default, as for `jaxrnn.load_state_dict`.

    >>> import jaxrnn
    >>> from flax import nnx
    >>> class Tagger(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(50, 8, rngs=rngs)                    # torch.nn.Embedding(50, 8)
    ...         self.lstm = jaxrnn.LSTM(8, 16, num_layers=2, rngs=rngs)     # torch.nn.LSTM(8, 16, num_layers=2)
    ...         self.head = nnx.Linear(16, 5, rngs=rngs)                    # torch.nn.Linear(16, 5)
    >>> model = Tagger(nnx.Rngs(0))
    >>> jaxrnn.torch_init(model, 0)
    >>> model.embed.embedding[0, :3]
    Array([-1.1258398 , -1.1523602 , -0.25057858], dtype=float32)
    """
    contents = contents_of(module)
    doubtful = order_lost_in(module) if order is None else []
    tensors = drawn(type(module).__name__, contents, seed, order, values, doubtful, "Flax sorts attributes in nnx.jit")
    found = fit(type(module).__name__, contents, tensors, "", strict=True)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    put(contents, found.arrays)


def drawn(
    owner: str,
    contents: Contents,
    seed: int | TorchGenerator,
    order: Sequence[str] | None,
    values: Mapping[str, Any],
    doubtful: Sequence[str],
    reason: str,
) -> dict[str, Any]:
    """The tensors that torch's model has at first, by name.

    Args:
        owner: the module's name, for messages.
        contents: its parameters.
        seed, order, values: as for `torch_init`.
        doubtful, reason: attributes whose order may not be torch's, and why.

    Raises:
        CheckpointError: as `torch_init`.
    """
    generator = seed if isinstance(seed, TorchGenerator) else TorchGenerator(seed)
    if unknown := [name for name in values if name not in contents.params]:
        _refuse(owner, [f"{name} in values is no parameter" for name in unknown], f"it has {listed(contents.params)}")
    if doubtful:
        _refuse(owner, [f"the order of {listed(doubtful)} may not be torch's, because {reason}"], _GIVE_ORDER)
    layers: dict[str, dict[str, ModuleParameter]] = {}  # by the prefix of their names
    for name, param in contents.params.items():
        layers.setdefault(param.prefix_of(name), {})[name] = param
    _refuse_unknown(owner, layers, values)
    shared = _shared(owner, contents, values)
    tensors: dict[str, Any] = {}
    made: dict[int, str] = {}
    for prefix in layers if order is None else _ordered(owner, contents, layers, order):
        layer = next(iter(layers[prefix].values())).layer
        if (first := made.setdefault(id(layer), prefix)) != prefix:  # a layer under two names
            own = {name: first + name.removeprefix(prefix) for name in layers[prefix]}
            tensors |= {name: tensors[there] for name, there in own.items() if there in tensors}
            continue
        tensors |= _drawn(owner, layer, layers[prefix], prefix, generator)
    return tensors | {name: values[given] for name, given in shared.items()}


def _refuse(owner: str, causes: Sequence[str], remedy: str) -> NoReturn:
    raise CheckpointError("\n  ".join([f"{owner}: {causes[0]}", *causes[1:]]) + f"\n{remedy}")


def _draws(layer: Any, names: Mapping[str, ModuleParameter], prefix: str) -> set[str]:
    """The parameters of a layer that torch's layer draws, or sets to constants."""
    spec = getattr(layer, "spec", None)
    if isinstance(spec, Spec | CellSpec):
        known = set() if any(own.init is not None for own in spec.cell.own.values()) else set(spec.shapes())
    else:
        kind = kind_of(layer)
        known = {conversion.name for conversion in kind.conversions} if kind.draw else set()
    return {name for name in names if name.removeprefix(prefix) in known}


def _refuse_unknown(owner: str, layers: Mapping[str, Mapping[str, ModuleParameter]], values: Mapping[str, Any]) -> None:
    problems = []
    for prefix, params in layers.items():
        layer = next(iter(params.values())).layer
        known = _draws(layer, params, prefix)
        kind = type(layer).__name__ if layer is not None else "module"
        problems += [f"{name} of {kind}" for name in params if name not in known and name not in values]
    if problems:
        cause = f"jaxrnn does not know what torch draws for {listed(problems)}"
        example = f"{problems[0].rpartition(' of ')[0]!r}: array{', ...' * (len(problems) > 1)}"
        _refuse(owner, [cause], f"give what torch has there, in torch's layout: values={{{example}}}")


def _shared(owner: str, contents: Contents, values: Mapping[str, Any]) -> dict[str, str]:
    """For each parameter that is given, also by another of its names, the name in `values`."""
    names: dict[int, list[str]] = {}
    for name, param in contents.params.items():
        names.setdefault(id(param.place), []).append(name)
    found: dict[str, str] = {}
    for same in names.values():
        if given := [name for name in same if name in values]:
            found |= {name: name if name in given else given[0] for name in same}
        elif len({id(contents.params[name].layer) for name in same}) > 1:
            cause = f"{' and '.join(same)} are one parameter, of which each of torch's layers draws its own"
            _refuse(owner, [cause], f"give the one that stays in torch: values={{{same[0]!r}: array}}")
    return found


def _ordered(
    owner: str, contents: Contents, layers: Mapping[str, Mapping[str, ModuleParameter]], order: Sequence[str]
) -> list[str]:
    """The prefixes of layers, in the order of names of modules or parameters."""
    found: dict[str, None] = {}
    unknown = []
    for name in order:
        own = [prefix for prefix in layers if prefix.startswith(f"{name}.") or name in layers[prefix]]
        unknown += [name] if not own and name not in contents.ignored else []
        found |= dict.fromkeys(own)
    if unknown:
        _refuse(owner, [f"{name} in order is no module or parameter" for name in unknown], _GIVE_ORDER)
    if left := [name for prefix in layers if prefix not in found for name in layers[prefix]]:
        _refuse(owner, [f"order lacks {listed(left)}"], _GIVE_ORDER)
    return list(found)


def _drawn(
    owner: str, layer: Any, params: Mapping[str, ModuleParameter], prefix: str, generator: TorchGenerator
) -> dict[str, Any]:
    known = _draws(layer, params, prefix)
    shapes = {name.removeprefix(prefix): param.shape for name, param in params.items() if name in known}
    if not shapes:
        return {}
    dtype = jnp.result_type(next(iter(params.values())).value)
    draw = kind_of(layer).draw
    try:
        arrays = draw(generator, shapes, dtype) if draw else layer.spec.init(generator, dtype)
    except TypeError as error:
        _refuse(owner, [f"{prefix}{error}"], "make that layer with such a param_dtype")
    return {prefix + name: np.asarray(arrays[name]) for name in shapes}
