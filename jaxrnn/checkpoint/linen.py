"""Load tensors by name into the variables of a Linen module, and back."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

import jaxrnn.linen
from jaxrnn import _compat
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import Conversion, kind_of
from jaxrnn.checkpoint.matching import Contents, ModuleParameter, fit, interchangeable
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.optimizer import are_named, has_moments, order_lost, resumed, trained
from jaxrnn.checkpoint.to_torch_optimizer import written
from jaxrnn.checkpoint.torch_init import drawn, is_other
from jaxrnn.spec import CellSpec, Spec
from jaxrnn.torch_random import TorchGenerator

TreePath = tuple[str, ...]


class Loaded(NamedTuple):
    """The result of `load_state_dict`.

    Attributes:
        variables: the new variables, a tree like the one given.
        missing: the names of parameters that are not in `tensors`.
        unexpected: keys of `tensors`, without the prefix, that are not parameters.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> cell, x = jaxrnn.linen.GRUCell(3, 4, bias=False), jnp.ones((2, 3))
    >>> variables = cell.init(jax.random.key(0), x)
    >>> tensors = {"weight_ih": jnp.zeros((12, 3)), "bias_ih": jnp.zeros(12)}
    >>> loaded = jaxrnn.checkpoint.linen.load_state_dict(cell, variables, tensors, x, strict=False)
    >>> loaded.missing, loaded.unexpected
    (['weight_hh'], ['bias_ih'])
    """

    variables: Any
    missing: list[str]
    unexpected: list[str]


def load_state_dict(
    module: linen.Module,
    variables: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *args: Any,
    prefix: str = "",
    strict: bool = True,
    **kwargs: Any,
) -> Loaded:
    """Load tensors by torch's names into a Linen module's variables: `jaxrnn.load_state_dict` for Flax's other API.

    Args:
        module: any flax.linen module whose submodules have their names in torch: attributes set in `setup`, also in
            lists and dicts, or `name=` in a compact call.
        variables: its variables, as from `module.init`: "params" and, for BatchNorm, "batch_stats".
        tensors, prefix, strict: as for `jaxrnn.load_state_dict`.
        args, kwargs: the other arguments of `module.apply`. A call that only computes shapes tells the kind of each
            submodule, such as a Conv or a ConvTranspose.

    Returns:
        New variables, and the missing and the unexpected names, as `Loaded`.

    Raises:
        CheckpointError: as `jaxrnn.load_state_dict`.

    Warns:
        UserWarning: as `jaxrnn.load_state_dict`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> from flax import linen
    >>> model = linen.Sequential([linen.Dense(4), jaxrnn.linen.GRU(4, 5, batch_first=True)])
    >>> x = jnp.ones((2, 7, 3))
    >>> tensors = jaxrnn.checkpoint.linen.state_dict(model, model.init(jax.random.key(0), x), x)
    >>> list(tensors)
    ['0.weight', '0.bias', '1.weight_ih_l0', '1.weight_hh_l0', '1.bias_ih_l0', '1.bias_hh_l0']
    >>> tensors["0.weight"].shape
    (4, 3)
    >>> variables = model.init(jax.random.key(1), x)
    >>> variables = jaxrnn.checkpoint.linen.load_state_dict(model, variables, tensors, x).variables
    """
    contents = _contents(module, variables, args, kwargs)
    found = fit(type(module).__name__, contents, tensors, prefix, strict)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    return Loaded(_replaced(variables, contents, found.arrays), found.missing, found.unexpected)


def _replaced(variables: Mapping[str, Any], contents: Contents, arrays: Mapping[str, jax.Array]) -> Any:
    """Variables with other arrays for some parameters, by their names in torch."""
    flat = _flat(variables)
    for name, array in arrays.items():
        place = contents.params[name].place
        box = jax.tree.structure(flat[place])  # an array, or one with metadata such as `linen.Partitioned`
        flat[place] = jax.tree.unflatten(box, [array])
    tree = unflatten_dict(flat)
    return linen.FrozenDict(tree) if isinstance(variables, linen.FrozenDict) else tree


def torch_init(
    module: linen.Module,
    variables: Mapping[str, Any],
    seed: int | TorchGenerator,
    *args: Any,
    order: Sequence[str] | None = None,
    values: Mapping[str, Any] = {},
    **kwargs: Any,
) -> Any:
    """The variables of a Linen module with the parameters that torch draws: `jaxrnn.torch_init` for Flax's other API.

    Layers are drawn in the order in which they are called. If `setup` defines them in another one, give `order`; also
    if torch's model does.

    Args:
        module, variables, args, kwargs: as for `load_state_dict`.
        seed, order, values: as for `jaxrnn.torch_init`.

    Returns:
        New variables.

    Raises:
        CheckpointError: as `jaxrnn.torch_init`; or `setup` defines submodules in another order than that of the calls.

    Warns:
        UserWarning: as `load_state_dict`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> from flax import linen
    >>> model, x = linen.Sequential([jaxrnn.linen.GRUCell(3, 4), linen.Dense(5)]), jnp.ones((2, 3))
    >>> variables = jaxrnn.checkpoint.linen.torch_init(model, model.init(jax.random.key(0), x), 0, x)
    >>> variables["params"]["layers_0"]["bias_hh"][:3]
    Array([ 0.24965751,  0.10465068, -0.390042  ], dtype=float32)
    """
    layers = _reached(module, variables, args, kwargs)
    contents, owner = _contents_of(module, variables, layers), type(module).__name__
    doubtful = _defined_otherwise(layers, _flat(variables))
    others = {
        id(below.module): type(layer.module).__name__
        for path, layer in layers.items()
        if is_other(layer.module)
        for under, below in layers.items()
        if under[: len(path)] == path
    }
    reason = "they are called in another order than setup's"
    tensors = drawn(owner, contents, others, seed, order, values, doubtful, reason)
    found = fit(owner, contents, tensors, "", strict=True)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    return _replaced(variables, contents, found.arrays)


def _defined_otherwise(layers: Mapping[TreePath, "_LinenLayer"], places: Iterable[TreePath]) -> list[list[str]]:
    """Submodules with parameters that `setup` defines in another order than that of their first calls, by module."""
    found = []
    with_parameters = {place[1 : end + 1] for place in places for end in range(1, len(place) - 1)}
    for path, layer in layers.items():
        below = dict.fromkeys(called[: len(path) + 1] for called in layers if called[: len(path)] == path != called)
        called = [child[-1] for child in below if child in with_parameters]
        defined = [name for name in layer.defined if name in called]
        if defined != [name for name in called if name in defined]:
            found.append([".".join((*path, name)) for name in defined])
    return found


def state_dict(
    module: linen.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, NDArray[Any]]:
    """A Linen module's parameters by torch's names and in torch's layouts: `jaxrnn.state_dict` for Flax's other API.

    Submodules are in the order in which they are called.

    Args:
        module, variables, args, kwargs: as for `load_state_dict`.

    Returns:
        A dict from name to a NumPy copy, of the parameter's dtype, and its shape in torch.

    Raises:
        CheckpointError: the module is a stack of several, as `linen.vmap` and `linen.scan` make.

    Warns:
        UserWarning: as `jaxrnn.state_dict`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> from flax import linen
    >>> model, x = linen.Sequential([jaxrnn.linen.GRUCell(3, 4), linen.Dense(5)]), jnp.ones((2, 3))
    >>> tensors = jaxrnn.checkpoint.linen.state_dict(model, model.init(jax.random.key(0), x), x)
    >>> {name: array.shape for name, array in tensors.items() if name.startswith("1.")}
    {'1.weight': (5, 4), '1.bias': (5,)}
    """
    contents = _contents(module, variables, args, kwargs)
    for text in contents.differences(type(module).__name__, contents.params):
        warnings.warn(text, stacklevel=2)
    return {name: param.to_torch(name) for name, param in contents.params.items()}


def optax_from_torch(
    state: Mapping[str, Any],
    module: linen.Module,
    variables: Mapping[str, Any],
    *args: Any,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
    prefix: str = "",
    **kwargs: Any,
) -> tuple[optax.GradientTransformation, optax.OptState]:
    """As `jaxrnn.checkpoint.optax_from_torch`, for a Linen module: make the optax optimizer of its "params".

    Args:
        state: torch's `optimizer.state_dict()`, with tensors of torch, numpy or jax.
        module, variables, args, kwargs: as for `load_state_dict`.
        names: the parameters' names in the order in which torch's optimizer got them, such as the keys of torch's
            `model.state_dict()`; those of buffers are skipped. By default those of `state_dict`, which are in the order
            of the calls.
        learning_rate, steps_made: as for `jaxrnn.checkpoint.optax_from_torch`.
        prefix: as for `load_state_dict`, for names.

    Returns:
        The transformation and its state for `variables["params"]`, whose layout the state has.

    Raises:
        CheckpointError: as `jaxrnn.checkpoint.optax_from_torch`; the module is a stack of several, as for `state_dict`;
            or names are needed, because submodules may be called in another order than torch defines them, and shapes
            would not reveal it.

    Warns:
        UserWarning: as `jaxrnn.checkpoint.optax_from_torch`.

    >>> import jax, jax.numpy as jnp, jaxrnn, numpy as np
    >>> from flax import linen
    >>> model, x = linen.Sequential([jaxrnn.linen.GRUCell(3, 4, bias=False), linen.Dense(5)]), jnp.ones((2, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> shapes = [(12, 3), (12, 4), (5, 4), (5,)]
    >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False}
    >>> momentum = {index: {"momentum_buffer": np.ones(shape)} for index, shape in enumerate(shapes)}
    >>> torch_state = {"state": momentum, "param_groups": [{**group, "params": [0, 1, 2, 3]}]}
    >>> optimizer, state = jaxrnn.checkpoint.linen.optax_from_torch(torch_state, model, variables, x)
    >>> params = variables["params"]
    >>> updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    >>> updates["layers_1"]["kernel"].shape  # in torch (5, 4)
    (4, 5)
    """
    described, names = _trained(state, _contents(module, variables, args, kwargs), names, prefix)
    return resumed(state, described, names, learning_rate, steps_made, prefix).for_tree(variables["params"])


def optax_to_torch(
    state: optax.OptState,
    settings: Mapping[str, Any],
    module: linen.Module,
    variables: Mapping[str, Any],
    *args: Any,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
    prefix: str = "",
    **kwargs: Any,
) -> dict[str, Any]:
    """As `jaxrnn.checkpoint.optax_to_torch`, for a Linen module: the inverse of `optax_from_torch`.

    Args:
        state, settings, learning_rate, steps_made: as for `jaxrnn.checkpoint.optax_to_torch`.
        module, variables, args, kwargs: as for `load_state_dict`.
        names, prefix: as for `optax_from_torch`.

    Returns:
        As `jaxrnn.checkpoint.optax_to_torch`, with torch's layouts.

    Raises:
        CheckpointError: as `jaxrnn.checkpoint.optax_to_torch`, and as `optax_from_torch`, of names.

    >>> import jax, jax.numpy as jnp, jaxrnn, optax
    >>> from flax import linen
    >>> model, x = linen.Sequential([jaxrnn.linen.GRUCell(3, 4, bias=False), linen.Dense(5)]), jnp.ones((2, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False}
    >>> settings = {"state": {}, "param_groups": [{**group, "params": [0, 1, 2, 3]}]}  # of a new optimizer in torch
    >>> state = optax.sgd(0.1, momentum=0.9).init(variables["params"])
    >>> written = jaxrnn.checkpoint.linen.optax_to_torch(state, settings, model, variables, x)
    >>> written["state"][2]["momentum_buffer"].shape  # in Flax (4, 5)
    (5, 4)
    """
    contents, seen = _contents(module, variables, args, kwargs), has_moments(settings)
    described, names = _trained(settings, contents, names, prefix, seen)
    params = variables["params"]
    return written(state, settings, described, params, names, learning_rate, steps_made, prefix=prefix)


def _trained(
    state: Mapping[str, Any], contents: Contents, names: Sequence[str] | None, prefix: str, seen: bool = True
) -> tuple[dict[str, ModuleParameter], Sequence[str] | None]:
    """The parameters in "params", with their places there, and names as the module has them."""
    described = {
        name: param._replace(place=param.place[1:])
        for name, param in contents.params.items()
        if param.place[0] == "params"
    }
    if names is not None:
        return described, trained(names, described, contents, prefix)
    if not are_named(state, described, prefix) and (
        doubtful := _order_in_doubt([(tuple(name.split(".")), param) for name, param in described.items()], seen)
    ):
        raise order_lost(doubtful, "Linen has that of the calls")
    return described, None


def _order_in_doubt(params: list[tuple[TreePath, ModuleParameter]], seen: bool) -> list[str]:
    """Attributes that torch may have defined in another order, where the shapes cannot reveal it.

    Args:
        params: with the parts of their names.
        seen: whether there are shapes of torch.
    """
    below = itertools.groupby((item for item in params if len(item[0]) > 1), lambda item: item[0][0])
    runs = [(name, [(path[1:], param) for path, param in items]) for name, items in below]
    children = dict(runs)
    submodules = {name: tuple(param.shape for _, param in items) for name, items in children.items()}
    own = {
        path[0]: (param.shape,)
        for path, param in params
        if len(path) == 1 and (param.layer is None or param.conversion.attribute not in _order(param.layer))
    }
    numbers = [int(name) for name in children if name.isdigit()]
    ordered = len(numbers) == len(children) and numbers == sorted(numbers)  # of a list
    if len(children) < len(runs) or (not ordered and interchangeable(submodules, seen)):
        return list(submodules)
    if interchangeable(own, seen):
        return list(own)
    return next(filter(None, (_order_in_doubt(child, seen) for child in children.values())), [])


def _flat(variables: Mapping[str, Any]) -> dict[TreePath, Any]:
    tree = variables.unfreeze() if isinstance(variables, linen.FrozenDict) else dict(variables)
    return flatten_dict(tree, keep_empty_nodes=True)


_TAKE_ONE = """give the module that linen.vmap or linen.scan was given, and one of its variables, such as the first:
  jax.tree.map(lambda array: array[0], variables)"""


def _contents(module: linen.Module, variables: Mapping[str, Any], args: tuple, kwargs: dict) -> Contents:
    """Every parameter and every layer by torch name.

    Raises:
        CheckpointError: the module is a stack of several, as `linen.vmap` makes, or variables has no "params".
    """
    return _contents_of(module, variables, _reached(module, variables, args, kwargs))


def _reached(
    module: linen.Module, variables: Mapping[str, Any], args: tuple, kwargs: dict
) -> dict[TreePath, "_LinenLayer"]:
    """Every submodule that a call reaches, as `_layers`; having checked variables."""
    _check_collections(module, variables, {name for name in variables if not isinstance(variables[name], Mapping)})
    layers = _layers(module, variables, args, kwargs)
    if "params" not in variables:
        _check_collections(module, variables, {path[0] for path in layers if path} & variables.keys())
    return layers


def _contents_of(
    module: linen.Module, variables: Mapping[str, Any], layers: Mapping[TreePath, "_LinenLayer"]
) -> Contents:
    prefixes = {path: "".join(f"{name}." for name in _renamed(path, layers)) for path in layers}
    found: dict[TreePath, dict[str, ModuleParameter]] = {path: {} for path in layers}
    for place, value in _flat(variables).items():
        collection, path, attribute = place[0], place[1:-1], place[-1]
        layer, shapes = (layers[path].module, layers[path].shapes) if path in layers else (None, {})
        conversion = next(
            (conversion for conversion in kind_of(layer).conversions if conversion.attribute == attribute), None
        )
        if collection == "params" or conversion:
            conversion = conversion or Conversion(attribute, attribute)
            own_shape = shapes.get((collection, attribute))
            found.setdefault(path, {})[attribute] = ModuleParameter(
                place, linen.unbox(value), layer, conversion, own_shape
            )
    params = Names[ModuleParameter]("rename one of them in Flax: torch has one name for both")
    for path, group in found.items():
        prefix = prefixes[path] if path in prefixes else "".join(f"{name}." for name in path)
        first = _order(layers[path].module) if path in layers else ()
        for attribute in [*(name for name in first if name in group), *(name for name in group if name not in first)]:
            param = group[attribute]
            params.put(prefix + param.conversion.name, param, "/".join(param.place))
    contents = Contents(params, {prefixes[path]: layer.module for path, layer in layers.items()})
    contents.refuse_stacked(type(module).__name__, _TAKE_ONE)
    return contents


def _check_collections(module: linen.Module, variables: Mapping[str, Any], parameters: Set[str]) -> None:
    """Refuse variables with parameters, or submodules with parameters, where the collections should be."""
    if parameters:
        cause = f"variables should be a dict with 'params' in it, but it has {listed(variables)}"
        raise CheckpointError(f"{type(module).__name__}: {cause}\ngive {{'params': variables}}")


def _order(layer: linen.Module) -> list[str]:
    """The attributes of a known layer, in torch's order."""
    spec = getattr(layer, "spec", None)
    own = list(spec.shapes()) if isinstance(spec, Spec | CellSpec) else []
    return own + [conversion.attribute for conversion in kind_of(layer).conversions]


class _LinenLayer(NamedTuple):
    """A submodule.

    Attributes:
        module: the submodule.
        names: from the child names that Linen generates to torch's.
        defined: the names of submodules that are attributes, in the order in which these were set.
        shapes: the shapes of its variables inside it, by collection and name.
    """

    module: linen.Module
    names: dict[str, str]
    defined: dict[str, None]
    shapes: dict[TreePath, tuple[int, ...]]


def _layers(
    module: linen.Module, variables: Mapping[str, Any], args: tuple, kwargs: dict
) -> dict[TreePath, _LinenLayer]:
    """Every submodule that a call reaches, by path, in the order of the calls."""
    layers: dict[TreePath, _LinenLayer] = {}

    def note(call: Any, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        layer = _compat.called_module(context)
        noted = layers.setdefault(layer.path, _LinenLayer(layer, {}, {}, {}))  # before its submodules
        for collection, below in layer.variables.items():
            for name, value in below.items():
                if not isinstance(value, Mapping) and (leaves := jax.tree.leaves(value)):
                    noted.shapes[collection, name] = jnp.shape(leaves[0])  # inside linen.vmap, of one module
        result = call(*call_args, **call_kwargs)
        # Now, because the attributes that `setup` sets are gone after the call.
        for name, value in vars(layer).items():
            layers[layer.path].names.update(_numbered(name, value))
            layers[layer.path].defined.update(dict.fromkeys([name, *dict(_numbered(name, value))]))
        if isinstance(layer, linen.Sequential):  # which numbers its layers as torch does
            for name, number in layers[layer.path].names.items():
                layers[layer.path].names[name] = number.removeprefix("layers.")
        return result

    with linen.intercept_methods(note):
        # A module that needs another stream of random numbers gets that of params.
        arguments = {"rngs": {"params": jax.random.key(0)}, **kwargs, "mutable": True}
        try:
            jax.eval_shape(lambda: module.apply(variables, *args, **arguments))
        except TypeError as error:
            if args or kwargs:
                raise
            raise TypeError(f"{error}: give the arguments of the module's call, too, as to module.apply") from error
    return layers


def _numbered(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Linen's and torch's names for submodules in lists and dicts."""
    if isinstance(value, list | tuple):
        items: Any = enumerate(value)
    elif isinstance(value, Mapping):
        items = value.items()
    else:
        return
    for key, item in items:
        yield f"{name}_{key}", f"{name}.{key}"
        for below, theirs in _numbered("", item):
            yield f"{name}_{key}{below}", f"{name}.{key}{theirs}"


def _renamed(path: TreePath, layers: Mapping[TreePath, _LinenLayer]) -> TreePath:
    """A path with torch's names. A layer in `OutputOnly` has the name of that."""
    above = [layers.get(path[:depth]) for depth in range(len(path))]
    return tuple(
        layer.names.get(name, name) if layer else name
        for layer, name in zip(above, path, strict=True)
        if not (layer and isinstance(layer.module, jaxrnn.linen.OutputOnly) and name == "layer")
    )
