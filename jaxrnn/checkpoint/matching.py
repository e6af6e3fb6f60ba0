"""Match tensors to the parameters of a Flax module of either API: names, layouts and dtypes."""

import itertools
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.cells import RNN_RELU, RNN_TANH, Cell
from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import Conversion, kind_of
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.named import said_of
from jaxrnn.checkpoint.names import as_named, fold, identity, misfits, under, unwrapped
from jaxrnn.spec import CellSpec, Spec

# Kinds of dtype: values are cast within a kind, as in torch; an integer or complex weight is a mistake.
_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
_RECURRENT = re.compile(r"weight_hh(_l0)?$")
# Names in Flax's cells, and those that Linen gives to submodules.
_FLAXS = re.compile(r"(.*\.)?(i[ifgornz]|if_|h[ifgornz]|dense_[ih])\.(weight|kernel|bias)")
_AUTOMATIC = re.compile(r"(.*\.)?[A-Z]\w*_\d+\.[^.]+")


class ModuleParameter(NamedTuple):
    """A parameter of a Flax module.

    Attributes:
        place: where the API has it: an nnx.Variable, or the path in Linen's variables.
        value: its current array.
        layer: its module.
        conversion: its name and layout in torch.
        own_shape: the shape in Flax that the layer's settings imply; None if unknown.
    """

    place: Any
    value: Any
    layer: Any
    conversion: Conversion
    own_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch."""
        there = np.broadcast_to(np.zeros(()), jnp.shape(self.value))
        return self.conversion.to_torch(there, self.layer).shape

    def prefix_of(self, name: str) -> str:
        """The prefix of its layer, from its name in torch."""
        return name.removesuffix(self.conversion.name)

    def to_torch(self, name: str, value: Any = None) -> np.ndarray:
        """A copy in torch's layout: of its array, or of another in Flax's layout."""
        value = self.value if value is None else value
        return np.array(self.conversion.to_torch(to_numpy(name, value), self.layer), order="C")


class Contents(NamedTuple):
    """The parameters and layers of a module of either API.

    Attributes:
        params: by torch name.
        layers: the known layers, by the prefix of their names.
    """

    params: dict[str, ModuleParameter]
    layers: dict[str, Any]

    @property
    def ignored(self) -> set[str]:
        """Names that torch has and Flax does not need."""
        return {prefix + name for prefix, layer in self.layers.items() for name in kind_of(layer).ignored}

    def refuse_stacked(self, owner: str, remedy: str) -> None:
        """Raise a CheckpointError if parameters have more axes than their layers expect, as under `vmap`.

        Args:
            owner: the module's name, for the message.
            remedy: what to do instead, with "[0]" for the first index of the new axis.
        """
        shapes = {
            name.removesuffix(param.conversion.name) + param.conversion.attribute: (
                jnp.shape(param.value),
                param.own_shape,
            )
            for name, param in self.params.items()
            if param.own_shape is not None and len(param.own_shape) < jnp.ndim(param.value)
        }
        if not shapes:
            return
        if any(shape[1:] != own for shape, own in shapes.values()):  # stacked along another axis than the first
            if all(shape[:1] + shape[2:] == own for shape, own in shapes.values()):
                remedy = remedy.replace("[0]", "[:, 0]")
            elif all(shape[:-1] == own for shape, own in shapes.values()):
                remedy = remedy.replace("[0]", "[..., 0]")
        problems = [f"{name} is {shape}, should be {own}" for name, (shape, own) in shapes.items()]
        cause = f"{owner}: it is a stack of several modules, for which torch has no names:"
        raise CheckpointError("\n  ".join([cause, *problems]) + f"\n{remedy}")

    def differences(self, owner: str, names: Container[str]) -> Iterator[str]:
        """Warnings about settings that differ from torch's, for the layers with parameters in `names`."""
        for prefix, layer in self.layers.items():
            own = [
                prefix + conversion.name
                for conversion in kind_of(layer).conversions
                if prefix + conversion.name in self.params
            ]
            if not own or any(name in names for name in own):
                for text in kind_of(layer).differences(layer):
                    yield f"{owner}: {prefix}{text}"


def interchangeable(parts: Mapping[str, tuple[Any, ...]], seen: bool = True) -> bool:
    """Whether another order of the parts would have the same sequence of shapes.

    Args:
        parts: by name the shapes of the parameters of each.
        seen: whether the shapes in torch are known, with which theirs are compared.
    """
    if not seen:
        return len(parts) > 1
    orders = itertools.islice(itertools.permutations(parts.values()), 1, 5040)
    return len(set(parts.values())) < len(parts) or sum(parts.values(), ()) in (sum(o, ()) for o in orders)


class Fit(NamedTuple):
    """The result of `fit`.

    Attributes:
        arrays: by parameter name, in the parameter's layout.
        missing: names of parameters without a tensor.
        unexpected: names of tensors without a parameter.
        warnings: what to warn about.
    """

    arrays: dict[str, jax.Array]
    missing: list[str]
    unexpected: list[str]
    warnings: list[str]


def fit(owner: str, contents: Contents, tensors: Mapping[str, Any], prefix: str, strict: bool) -> Fit:
    """Find and convert a tensor for each parameter.

    Args:
        owner: the module's name, for messages.
        contents: the parameters to fill.
        tensors, prefix, strict: as for `jaxrnn.load_state_dict`.

    Raises:
        CheckpointError: as `jaxrnn.load_state_dict`.
    """
    params, ignored = contents.params, contents.ignored
    if not isinstance(tensors, Mapping):
        got = f"{type(tensors).__name__}\nread a file with jaxrnn.checkpoint.load(path)"
        raise TypeError(f"tensors should be a dict from name to array, got {got}")
    folded = with_torchs_names(fold(tensors), keep={prefix + name for name in params})
    chosen = under(folded, prefix)
    named = as_named(params, chosen)
    flaxs = _flaxs_names(params, named)
    values = {flaxs.get(key, key): _in_torchs_layout(key, value, params, flaxs) for key, value in named.items()}
    given = [name for name in params if name in values]
    # Some formats keep one name of a tied weight.
    first: dict[int, str] = {}
    for name in given:
        first.setdefault(id(params[name].place), name)
    missing = [name for name in params if name not in values and id(params[name].place) not in first]
    unexpected = [name for name in values if name not in params and name not in ignored]
    if missing and (dicts := [str(name) for name, value in values.items() if isinstance(value, Mapping)]):
        remedy = f"give one of them, such as tensors[{dicts[0]!r}]"
        raise CheckpointError(
            f"{owner}: tensors should be a dict of arrays, but it has dicts under {listed(dicts)}\n{remedy}"
        )
    problems = [f"{name} is missing" for name in missing if strict]
    problems += [text for target, text in misfits(folded).items() if target.removeprefix(prefix) in missing]
    if strict and unexpected:
        # torch saves a tied weight under each of its names; a Flax model may have it once.
        known = {identity(values[name]): name for name in reversed(given)}
        copies = [known.get(identity(values[name])) for name in unexpected]
        problems += [
            f"{name} is unexpected" + (f": it equals {copy}" if copy else "")
            for name, copy in zip(unexpected, copies, strict=True)
        ]
    arrays, odd = {}, []
    large: dict[str, float] = {}
    for name in given:
        if (other := first[id(params[name].place)]) != name and identity(values[name]) != identity(values[other]):
            problems.append(f"{other} and {name} are one shared parameter in the module, but two different tensors")
        try:
            arrays[name], finite, largest = _fitted(name, values[name], params[name])
            odd += [] if finite else [name]
            large |= {name: largest} if largest else {}
        except CheckpointError as error:
            problems.append(str(error).partition("\n")[0])
    if problems:
        where = f" under the prefix {prefix!r}" if prefix else ""
        places = {key[: match.start()]: None for key in folded if (match := _RECURRENT.search(str(key)))}
        remedy = "jaxrnn.checkpoint.find_rnns(tensors) lists prefixes and sizes"
        remedy += f": {listed(map(repr, places))}" if missing and places else ""
        if missing and len(better := _prefixes_of_all(params, folded)) == 1:
            remedy = f"give prefix={better[0]!r}: all parameters are under it"
        if missing and any(_FLAXS.fullmatch(str(name)) for name in unexpected):
            remedy = "they are weights of Flax's own RNN: convert it with model.rnn = jaxrnn.from_flax(theirs.rnn)"
        elif unexpected and (automatic := [name for name in missing if _AUTOMATIC.fullmatch(name)]):
            made = automatic[0].split(".")[-2]
            remedy = f"Linen named {made} itself: give each submodule its name in torch, such as name='lstm'"
        if missing or unexpected:
            remedy += "; strict=False allows missing and unexpected keys"
        raise CheckpointError("\n  ".join([f"{owner}: the tensors{where} do not fit:", *problems]) + f"\n{remedy}")
    warnings = [f"{owner}: NaN or infinite numbers in {listed(odd)}"] if odd else []
    if large:
        warnings.append(f"{owner}: {_too_large(large, values, arrays)}")
    of_flax = {params[name].prefix_of(name) for name in flaxs.values()}  # whose settings are Flax's, too
    warnings += contents.differences(owner, [name for name in arrays if params[name].prefix_of(name) not in of_flax])
    return Fit(arrays, missing, unexpected, [*warnings, *_contradicted(owner, params, said_of(chosen))])


def _flaxs_names(params: Mapping[str, ModuleParameter], values: Mapping[str, Any]) -> dict[str, str]:
    """From Flax's own names to torch's, for values that Flax's layers have under their own names and layouts."""
    found = {}
    for name, param in params.items():
        own = param.prefix_of(name) + param.conversion.attribute
        fits = name not in values and own in values and own not in params
        if fits and jnp.ndim(param.value) == np.ndim(values[own]):
            found[own] = name
    return found


def _in_torchs_layout(key: str, value: Any, params: Mapping[str, ModuleParameter], flaxs: Mapping[str, str]) -> Any:
    return params[flaxs[key]].to_torch(key, value) if key in flaxs else value


def _too_large(large: Mapping[str, float], values: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> str:
    """A warning about numbers that become infinite."""
    name = max(large, key=lambda name: large[name])
    cause = f"numbers in {listed(large)} become infinite in {arrays[name].dtype}: the largest is {large[name]:.3g}"
    wanted = dtype_of(values[name])
    remedy = f"make the module with param_dtype={str(wanted)!r}"
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        remedy = f'turn on 64 bits first, by jax.config.update("jax_enable_x64", True), and {remedy}'
    return f"{cause} of {name}\n{remedy}"


def _contradicted(
    owner: str, params: Mapping[str, ModuleParameter], said: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Warnings about recurrent modules whose settings differ from those that the file says."""
    layers = {param.prefix_of(name): param.layer for name, param in params.items()}
    for path, settings in said.items():
        place = path if path in layers else unwrapped(path)
        spec = getattr(layers.get(place), "spec", None)
        if not isinstance(spec, Spec | CellSpec):
            continue
        own = {"nonlinearity": {RNN_TANH: "tanh", RNN_RELU: "relu"}.get(spec.cell, spec.cell.name)}
        own |= {name: getattr(spec, name) for name in settings if hasattr(spec, name)}
        for name, value in settings.items():
            if name in own and own[name] != value:
                ours, theirs = _shown(own[name]), _shown(value)
                cause = f"{place}{name}={ours}, where the file says {name}={theirs}"
                remedy = f"make that module with {name}={theirs}"
                if isinstance(value, Cell):
                    remedy = "make that module as jaxrnn.Recurrent(cell, ...), with the cell that find_rnns gives"
                yield f"{owner}: {cause}\n{remedy}"


def _shown(value: Any) -> str:
    return value.name if isinstance(value, Cell) else repr(value)


def _prefixes_of_all(params: Mapping[str, ModuleParameter], tensors: Mapping[str, Any]) -> list[str]:
    """The prefixes under which there is a tensor for every parameter."""
    first = next(iter(params))
    prefixes = [key.removesuffix(first) for key in tensors if isinstance(key, str) and key.endswith(f".{first}")]
    return [prefix for prefix in prefixes if all(prefix + name in tensors for name in params)]


def _fitted(name: str, value: Any, param: ModuleParameter) -> tuple[jax.Array, bool, float | None]:
    """`value` with the parameter's layout, dtype and devices; whether it is finite; and its largest number if not now.

    Numbers out of the dtype's range become infinite, as in torch's copy_.
    """
    dtype, wanted = dtype_of(value), jnp.result_type(param.value)
    if dtype == NO_NUMBERS:
        to_numpy(name, value)  # whose message says what it is
    if tuple(value.shape) != param.shape or not any(
        jnp.issubdtype(dtype, kind) and jnp.issubdtype(wanted, kind) for kind in _KINDS
    ):
        raise CheckpointError(f"{name} is {dtype} {tuple(value.shape)}, should be {wanted} {param.shape}")
    array = to_numpy(name, value)
    infinite = _infinite(array)
    with np.errstate(over="ignore"):
        fitted = param.conversion.to_flax(array, param.layer).astype(wanted)
    largest = None
    if dtype != wanted and _infinite(fitted) > infinite:
        largest = float(np.max(np.abs(array[np.isfinite(array)])))
    if isinstance(param.value, jax.Array) and param.value.committed:
        return jax.device_put(fitted, param.value.sharding), not infinite, largest
    return jnp.asarray(fitted), not infinite, largest


def _infinite(array: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    return array.size - int(np.count_nonzero(np.isfinite(array))) if jnp.issubdtype(array.dtype, jnp.inexact) else 0
