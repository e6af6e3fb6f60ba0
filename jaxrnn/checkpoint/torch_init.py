"""The initial weights of a whole model as torch draws them from a seed."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import TABLES, kind_of
from jaxrnn.checkpoint.matching import Contents, ModuleParameter, fit
from jaxrnn.checkpoint.nnx import contents_of, orders_lost_in, put
from jaxrnn.spec import CellSpec, Spec
from jaxrnn.torch_random import TorchGenerator

_GIVE_ORDER = (
    "give order, the submodules or parameters as torch's model constructs them, such as list(torch_model.state_dict())"
)

_UNREACHED = "a module that the call does not reach"  # of Linen

# Flax's classes that hold or call modules, and do no more. In torch the layers in others, such as Flax's cells, are
# parts of one module that draws otherwise, or there is no such module.
_HOLDERS = (
    *(nnx.Module, nnx.Pytree, nnx.Sequential, nnx.List, nnx.Dict, nnx.RNN, nnx.Bidirectional, nnx.RNNCellBase),
    *(linen.Module, linen.Sequential, linen.RNN, linen.Bidirectional, linen.RNNCellBase),
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
    processors. Layers are drawn in the order in which the module's attributes were set, which should be that of the
    model in torch. These are known: RNN, LSTM, GRU and their cells, Recurrent if its cell has no `init` of its own, and
    Flax's Linear, Embed, Conv and ConvTranspose. Norms get ones and zeros.

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
    >>> from flax import linen, nnx
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
    contents, owner = contents_of(module), type(module).__name__
    others = {
        id(below): type(each).__name__
        for _, each in nnx.iter_modules(module)
        if is_other(each)
        for _, below in nnx.iter_modules(each)
    }
    doubtful, reason = orders_lost_in(module), "Flax sorts attributes in nnx.jit and in copies"
    tensors = drawn(owner, contents, others, seed, order, values, doubtful, reason)
    found = fit(owner, contents, tensors, "", strict=True)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    put(contents, found.arrays)


def is_other(module: object) -> bool:
    """Whether it is a module of Flax's that is neither a known layer nor only holds modules; or a subclass."""
    flaxs = next((kind for kind in type(module).__mro__ if kind.__module__.startswith("flax.")), nnx.Module)
    return flaxs not in _HOLDERS and flaxs not in TABLES


class _Layer(NamedTuple):
    """A module with parameters of its own.

    Attributes:
        prefix: of their names.
        module: the module; in Linen None if no call reaches it.
        kind: its class, or that of a module of Flax's around it that torch lacks.
        params: by name.
        known: the names of those that torch's layer draws, or sets to constants.
    """

    prefix: str
    module: Any
    kind: str
    params: dict[str, ModuleParameter]
    known: set[str]

    def drawn(self, owner: str, generator: TorchGenerator) -> dict[str, Any]:
        shapes = {
            name.removeprefix(self.prefix): param.shape for name, param in self.params.items() if name in self.known
        }
        if not shapes:
            return {}
        dtype = jnp.result_type(next(iter(self.params.values())).value)
        draw = kind_of(self.module).draw
        try:
            arrays = draw(generator, shapes, dtype) if draw else self.module.spec.init(generator, dtype)
        except TypeError as error:
            _refuse(owner, f"{self.prefix}{error}", "make that layer with such a param_dtype")
        return {self.prefix + name: np.asarray(arrays[name]) for name in shapes}


def _layers(contents: Contents, others: Mapping[int, str]) -> dict[str, _Layer]:
    """Every module with parameters of its own, by the prefix of their names."""
    found: dict[str, _Layer] = {}
    for name, param in contents.params.items():
        layer, prefix = param.layer, param.prefix_of(name)
        spec, kind = getattr(layer, "spec", None), kind_of(layer)
        if id(layer) in others:
            known = False
        elif isinstance(spec, Spec | CellSpec):
            known = all(own.init is None for own in spec.cell.own.values()) and param.conversion.name in spec.shapes()
        else:
            known = kind.draw is not None and param.conversion in kind.conversions
        title = others.get(id(layer), _UNREACHED if layer is None else type(layer).__name__)
        each = found.setdefault(prefix, _Layer(prefix, layer, title, {}, set()))
        each.params[name] = param
        each.known.update([name] * known)
    return found


def drawn(
    owner: str,
    contents: Contents,
    others: Mapping[int, str],
    seed: int | TorchGenerator,
    order: Sequence[str] | None,
    values: Mapping[str, Any],
    doubtful: Sequence[Sequence[str]],
    reason: str,
) -> dict[str, Any]:
    """The tensors that torch's model has at first, by name.

    Args:
        owner: the module's name, for messages.
        contents: its parameters.
        others: by the id of a module, the class around it for which `is_other` is true.
        seed, order, values: as for `torch_init`.
        doubtful, reason: lists of submodules whose order may not be torch's, and why.

    Raises:
        CheckpointError: as `torch_init`.
    """
    generator = seed if isinstance(seed, TorchGenerator) else TorchGenerator(seed)
    if unknown := [name for name in values if name not in contents.params]:
        _refuse(owner, f"values has {listed(unknown)}, which are no parameters", f"it has {listed(contents.params)}")
    shapes = {name: (np.shape(value), contents.params[name].shape) for name, value in values.items()}
    if odd := [f"{name} of shape {got}, should be {shape}" for name, (got, shape) in shapes.items() if got != shape]:
        _refuse(owner, f"values has {listed(odd)}", "give arrays in torch's layout")
    if lost := next((each for each in doubtful if order is None or _is_lost(each, order)), None):
        _refuse(owner, f"the order of {listed(lost)} may not be torch's, because {reason}", _GIVE_ORDER)
    layers = _layers(contents, others)
    _refuse_unknown(owner, layers.values(), values)
    shared = _shared(owner, contents, values)
    tensors: dict[str, Any] = {}
    made: dict[int, str] = {}
    for prefix in layers if order is None else _ordered(owner, contents, layers, order):
        layer = layers[prefix]
        if (first := made.setdefault(id(layer.module), prefix)) != prefix:  # a layer under two names
            own = {name: first + name.removeprefix(prefix) for name in layer.params}
            tensors |= {name: tensors[there] for name, there in own.items() if there in tensors}
        else:
            tensors |= layer.drawn(owner, generator)
    return tensors | {name: values[given] for name, given in shared.items()}


def _refuse(owner: str, cause: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{owner}: {cause}\n{remedy}")


def _refuse_unknown(owner: str, layers: Iterable[_Layer], values: Mapping[str, Any]) -> None:
    unknown = {
        name: layer.kind for layer in layers for name in layer.params if name not in layer.known and name not in values
    }
    if unknown:
        names = listed(f"{name} of {kind}" for name, kind in unknown.items())
        first = "convert Flax's cells by jaxrnn.from_flax first, or " if "Cell" in "".join(unknown.values()) else ""
        first = "pass arguments with which the call reaches it, or " if _UNREACHED in unknown.values() else first
        example = f"values={{{next(iter(unknown))!r}: array{', ...' * (len(unknown) > 1)}}}"
        cause = f"jaxrnn does not know what torch draws for {names}"
        _refuse(owner, cause, f"{first}give what torch has there, in torch's layout: {example}")


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
            _refuse(owner, cause, f"give the one that stays in torch: values={{{same[0]!r}: array}}")
    return found


def _is_lost(submodules: Sequence[str], order: Sequence[str]) -> bool:
    """Whether an order leaves that of these submodules open, because it has the name of a module around them first."""
    firsts = [
        name
        for each in submodules
        for name in [first for first in order if _is_within(each, first) or _is_within(first, each)][:1]
    ]
    return len(set(firsts)) < len(firsts)


def _is_within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _ordered(owner: str, contents: Contents, layers: Mapping[str, _Layer], order: Sequence[str]) -> list[str]:
    """The prefixes of layers, in the order of names of modules or parameters."""
    found: dict[str, None] = {}
    unknown = []
    for name in order:
        own = [prefix for prefix in layers if prefix.startswith(f"{name}.") or name in layers[prefix].params]
        unknown += [name] if not own and name not in contents.ignored else []
        found |= dict.fromkeys(own)
    if unknown:
        cause = f"order has {listed(unknown)}, which are no modules or parameters"
        _refuse(owner, cause, f"{_GIVE_ORDER}; here there are {listed(prefix[:-1] for prefix in layers if prefix)}")
    if left := [name for prefix in layers if prefix not in found for name in layers[prefix].params]:
        _refuse(owner, f"order lacks {listed(left)}", _GIVE_ORDER)
    return list(found)
