"""Convert torch's optimizers, settings and state, to optax, to continue training where torch stopped."""

import warnings
from collections.abc import Container, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import Conversion
from jaxrnn.checkpoint.matching import Contents, ModuleParameter
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.names import as_in_module
from jaxrnn.checkpoint.nnx import contents_of, order_in_doubt
from jaxrnn.checkpoint.torch_optimizers import (
    OTHER_KEY,
    SAVE,
    STATE,
    STEP,
    OptimizerKind,
    groups_and_states,
    kind_of_optimizer,
    number,
    steps_of,
    transformation,
)
from jaxrnn.spec import level_outside

_ModuleT = TypeVar("_ModuleT", bound=nnx.Module)
_Group = Mapping[str, Any]
_COUNT = "count"
_FROZEN = "frozen"
_NAMES = "give names=, the parameters' names in the order of torch's param_groups"
_ONCE = "give each name once"


def optax_from_torch(
    state: Mapping[str, Any],
    params: Mapping[str, Any],
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
) -> tuple[optax.GradientTransformation, optax.OptState]:
    """Make the optax optimizer that continues where torch's stopped, for parameters with torch's names and layouts.

    Knows torch.optim.SGD, Adam, AdamW, Adamax, RAdam, RMSprop, Adagrad and Adadelta, with all their settings but for
    dampening, and parameter groups.

    Args:
        state: torch's `optimizer.state_dict()`, with tensors of torch, numpy or jax.
        params: from name to array, as `spec.init` and `jaxrnn.state_dict` return.
        names: the parameters' names in the order in which torch's optimizer got them, group after group; by default the
            names that it has itself (`param_names`, if it was given `model.named_parameters()`), else those of params,
            in the order of torch's numbers.
            Names that torch's optimizer has itself may be in any order. Other parameters are not trained. Those with
            which torch has made no step, because they are frozen or were never used, may be left out.
        learning_rate: a number, or a schedule of the number of steps, which includes torch's; by default each group's
            last one. As in torch, Adagrad divides it as its `lr_decay` says.
        steps_made: how many steps torch has made. Only a schedule needs it, with SGD, whose state does not hold it;
            if the state holds it, both must agree.

    Returns:
        The transformation and its state for `params`.

    Raises:
        CheckpointError: another optimizer, such as NAdam, which is another one in optax; a setting that optax lacks; a
            state that does not match the parameters; or names and torch's own that contradict each other.

    Warns:
        UserWarning: torch has made no step with a parameter among names, so it is not trained. A moment has NaN or
            infinite numbers, or numbers that become infinite in the parameter's dtype; it is used anyway. The state has
            a setting that torch's own optimizers have not, or one that a schedule changes and optax does not. Or names
            in torch's groups are not those of params, whose order is taken.

    >>> import jax, jaxrnn, numpy as np, optax
    >>> params = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3, bias=False).init(jax.random.key(0))
    >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
    >>> momentum = {index: {"momentum_buffer": np.ones(p.shape)} for index, p in enumerate(params.values())}
    >>> torch_state = {"state": momentum, "param_groups": [group]}
    >>> optimizer, state = jaxrnn.checkpoint.optax_from_torch(torch_state, params)
    >>> updates, state = optimizer.update(jax.tree.map(jax.numpy.zeros_like, params), state, params)
    >>> round(float(updates["weight_ih_l0"][0, 0]), 6)  # - lr * (0 + momentum * 1)
    -0.09
    """
    described = {name: ModuleParameter((name,), value, None, Conversion(name, name)) for name, value in params.items()}
    return resumed(state, described, names, learning_rate, steps_made).for_tree(dict(params))


def optimizer_from_torch(
    state: Mapping[str, Any],
    module: _ModuleT,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
    prefix: str = "",
) -> nnx.Optimizer[_ModuleT]:
    """As `optax_from_torch`, for an NNX module: make an `nnx.Optimizer` of its `nnx.Param`s.

    Args:
        state: torch's `optimizer.state_dict()`, with tensors of torch, numpy or jax.
        module: the module, as for `jaxrnn.load_state_dict`, with its parameters loaded.
        names: as for `optax_from_torch`, such as the keys of torch's `model.state_dict()`; those of buffers are
            skipped. By default those that torch's optimizer has itself, else those of `jaxrnn.state_dict(module)`,
            which are in the order of torch's `model.parameters()` if the attributes are.
        learning_rate, steps_made: as for `optax_from_torch`.
        prefix: as for `jaxrnn.load_state_dict`, for names and for those in state; so a wrapper's `module.` and the like
            are removed from them.

    Returns:
        The optimizer, whose state has the layout of the module's parameters.

    Raises:
        CheckpointError: as `optax_from_torch`; the module is a stack of several, as for `jaxrnn.state_dict`; or names
            are needed, because Flax sorts attributes in `nnx.jit`, `nnx.clone` and so on, and shapes would not reveal
            it.

    Warns:
        UserWarning: as `optax_from_torch`.

    >>> import jaxrnn, numpy as np
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(2, 3, bias=False, rngs=nnx.Rngs(0))
    >>> group = {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
    >>> optimizer = jaxrnn.checkpoint.optimizer_from_torch({"state": {}, "param_groups": [group]}, gru)
    >>> updates = optimizer.update(gru, nnx.grad(lambda gru: gru(np.ones((5, 2), "float32"))[0].sum())(gru))
    """
    described, names = of_module(state, module, names, prefix)
    found = resumed(state, described, names, learning_rate, steps_made, prefix)
    found.warn()
    params = nnx.as_pure(nnx.state(module, nnx.Param))
    optimizer = nnx.Optimizer(module, found.transformation(params), wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(found.fill(nnx.as_pure(optimizer.opt_state))))
    steps = max((max(counts) for counts in found.counts.values()), default=0)
    optimizer.step[...] = jnp.asarray(steps, optimizer.step.dtype)
    return optimizer


def clip_grad_norm(max_norm: float) -> optax.GradientTransformation:
    """Clip gradients by their global norm as torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm.

    Args:
        max_norm: the largest norm that is not scaled.

    Returns:
        A transformation to chain before an optimizer.

    >>> import jax.numpy as jnp, jaxrnn
    >>> clip = jaxrnn.checkpoint.clip_grad_norm(1.0)
    >>> updates, _ = clip.update({"a": jnp.array([3.0, 4.0])}, clip.init(None))
    >>> updates["a"].round(3).tolist()
    [0.6000000238418579, 0.800000011920929]
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates)
        factor = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
        return jax.tree.map(lambda array: array * factor.astype(array.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def has_moments(state: Mapping[str, Any]) -> bool:
    """Whether torch's state dict has moments, whose shapes may tell the order of parameters."""
    return bool(state.get("state"))


def of_module(
    state: Mapping[str, Any], module: nnx.Module, names: Sequence[str] | None, prefix: str, seen: bool = True
) -> tuple[dict[str, ModuleParameter], list[str] | None]:
    """The parameters of a module that are trained, with their places in its state, and names as it has them."""
    places = {id(variable): path for path, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)}
    described: dict[str, ModuleParameter] = {}
    counted: set[int] = set()
    contents = contents_of(module)
    for name, param in contents.params.items():
        # As in torch's parameters(), a tied weight counts once, under its first name. Statistics are not trained.
        if id(param.place) in places and id(param.place) not in counted:
            counted.add(id(param.place))
            described[name] = param._replace(place=places[id(param.place)])
    if names is not None:
        return described, trained(names, described, contents, prefix)
    if not are_named(state, described, prefix) and (doubtful := order_in_doubt(module, seen)):
        raise order_lost(doubtful, "Flax sorts attributes in nnx.jit and in copies")
    return described, None


def trained(
    names: Sequence[str], described: Mapping[str, ModuleParameter], contents: Contents, prefix: str
) -> list[str]:
    """Names in a checkpoint as a module has them, without those of buffers."""
    buffers = (contents.params.keys() | contents.ignored) - described.keys()
    repeated = Names[str](_ONCE)
    for name in names:
        repeated.put(name, name, name)
    return [name for name in as_in_module(repeated, contents.params, prefix) if name not in buffers]


def order_lost(doubtful: Sequence[str], reason: str) -> CheckpointError:
    """The refusal of parameters whose order may not be that in torch's optimizer."""
    cause = f"the order of {listed(doubtful)} may not be torch's, because {reason}"
    return CheckpointError(f"{cause}\ngive names=list(tensors), with the state dict of torch's model as tensors")


class Member(NamedTuple):
    """A parameter of a group of torch's optimizer.

    Attributes:
        name: in torch.
        param: where it is in Flax.
        kind: the optimizer's.
        label: the group's.
        trained: whether torch has made steps with it, or with none.
    """

    name: str
    param: ModuleParameter
    kind: OptimizerKind
    label: str
    trained: bool


class Resumed(NamedTuple):
    """The contents of torch's state dict, by parameter.

    Attributes:
        groups: the transformation of each parameter group.
        counts: how many steps the parameters of each group have made.
        labels: each parameter's group, or `_FROZEN`.
        moments: each parameter's moments, in its layout, by optax's field names.
        members: the parameters by torch's numbers.
        words: what to warn of.
    """

    groups: dict[str, optax.GradientTransformation]
    counts: dict[str, set[int]]
    labels: dict[tuple[Any, ...], str]
    moments: dict[tuple[Any, ...], dict[str, NDArray[Any]]]
    members: dict[Any, Member]
    words: list[str]

    def warn(self) -> None:
        for text in self.words:
            warnings.warn(text, stacklevel=level_outside())

    def for_tree(self, params: Any) -> tuple[optax.GradientTransformation, optax.OptState]:
        """The transformation and its filled state for a tree of parameters."""
        self.warn()
        optimizer = self.transformation(params)
        return optimizer, self.fill(optimizer.init(params))

    def transformation(self, params: Any) -> optax.GradientTransformation:
        if len(set(self.labels.values())) == 1:
            return self.groups[next(iter(self.labels.values()))]
        labels = jax.tree_util.tree_map_with_path(lambda path, _: self.labels[_keys(path)], params)
        return optax.partition(self.groups, labels)

    def fill(self, state: Any) -> Any:
        """Fill the state with torch's moments and counts."""

        def filled(path: tuple[Any, ...], leaf: Any) -> Any:
            slot = slot_of(path, self.moments)
            if slot is not None and slot.place is None:
                group = slot.above[0] if slot.above else next(iter(self.labels.values()))
                return jnp.asarray(self._count(group), leaf.dtype)
            moment = None if slot is None else self.moments[slot.place].get(slot.field)
            with np.errstate(over="ignore"):  # `resumed` has warned of it
                return leaf if moment is None else jnp.asarray(moment, leaf.dtype)

        return jax.tree_util.tree_map_with_path(filled, state)

    def _count(self, group: str) -> int:
        if len(self.counts[group]) > 1:
            cause = f"the parameters of {group} have made different numbers of steps, {sorted(self.counts[group])}"
            raise CheckpointError(
                f"{cause}\noptax has one count for a group: put them into separate groups of param_groups, "
                "and names=, if you give it, into the new order"
            )
        return max(self.counts[group])


class Slot(NamedTuple):
    """What a leaf of optax's state is.

    Attributes:
        field: the name of the field, such as "mu".
        place: the parameter whose moment it is; None if it is a count of steps.
        above: the keys of dicts around the field: the group, in a state for several.
    """

    field: str
    place: Any
    above: tuple[Any, ...]


def slot_of(path: tuple[Any, ...], places: Container[Any]) -> Slot | None:
    """The slot of a leaf, by its path; None if it is neither a count nor a moment of one of the parameters."""
    fields = [index for index, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    # The last field may be that of a box around the array, such as `linen.Partitioned`.
    for index in fields[-2:]:
        field, place = path[index].name, _keys(path[index:])
        above = tuple(key.key for key in path[:index] if isinstance(key, jax.tree_util.DictKey))
        if field == _COUNT and not place:
            return Slot(field, None, above)
        if place in places:
            return Slot(field, place, above)
    return None


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place of a parameter in a path."""
    keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in keys)


def resumed(
    state: Mapping[str, Any],
    params: Mapping[str, ModuleParameter],
    names: Sequence[str] | None,
    learning_rate: optax.ScalarOrSchedule | None,
    steps_made: int | None,
    prefix: str = "",
) -> Resumed:
    """Read torch's state dict.

    Args:
        state, names, learning_rate, steps_made: as for `optax_from_torch`.
        params: by name; a `place` is the path in the tree of parameters.
        prefix: as for `optimizer_from_torch`, for the names in state.

    Raises:
        CheckpointError: as `optax_from_torch`.
    """
    groups, states = groups_and_states(state)
    indices = [index for group in groups for index in group["params"]]
    if any(isinstance(index, int) and str(index) in states for index in indices):  # as JSON makes of numbers
        remedy = 'give numbers: state["state"] = {int(key): kept for key, kept in state["state"].items()}'
        raise CheckpointError(f"the keys of state's moments are text, and those of param_groups numbers\n{remedy}")
    kinds = [
        kind_of_optimizer(group, {name for index in group["params"] for name in states.get(index) or {}})
        for group in groups
    ]
    _check_keys(state, groups, kinds)
    stateful = [
        index for group, kind in zip(groups, kinds, strict=True) if kind.keeps(group) for index in group["params"]
    ]
    used = {index for index in stateful if _used(states.get(index) or {})}
    unused = {index for index in stateful if index not in used} if used else set()
    named = _named(groups, indices, unused, params, names, prefix)
    _check_moments(states, indices)
    words = []
    if frozen := [named[index] for index in indices if index in unused and index in named]:
        cause = "torch's optimizer has made no step with them, as with frozen or never used parameters"
        words.append(f"{listed(frozen)} are not trained: {cause}. To train them, start a fresh optax optimizer")
    labels = {param.place: _FROZEN for param in params.values()}
    moments: dict[tuple[Any, ...], dict[str, NDArray[Any]]] = {param.place: {} for param in params.values()}
    transformations = {_FROZEN: optax.set_to_zero()}
    counts = {}
    members: dict[Any, Member] = {}
    odd: list[str] = []
    large: list[str] = []
    for count, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
        label, steps = f"group {count}", set()
        try:
            rate = number(group["lr"]) if learning_rate is None else learning_rate
            transformations[label] = transformation(kind, group, rate)
        except KeyError as error:
            raise CheckpointError(f"{label} of torch's {kind.name} has no {error}\n{SAVE}") from error
        for index in group["params"]:
            if index in named:
                members[index] = Member(named[index], params[named[index]], kind, label, index not in unused)
            if index in unused:
                continue
            param = params[name := named[index]]
            labels[param.place] = label
            kept = states.get(index, {})
            if STEP in kept or ("betas" in group and states):
                steps.add(steps_of(kept))
            for theirs, field in kind.fields.items():
                if kept.get(theirs) is not None:
                    moment = moments[param.place][field] = _moment(f"{theirs} of {name}", kept[theirs], param)
                    if not np.isfinite(moment).all():
                        odd.append(f"{theirs} of {name}")
                    elif not _fits(moment, param):
                        large.append(f"{theirs} of {name}")
        if steps and steps_made is not None and steps != {steps_made}:
            cause = f"steps_made={steps_made}, and torch's state says {listed(map(str, sorted(steps)))} of {label}"
            raise CheckpointError(f"{cause}\nleave out steps_made=: the state's own is used")
        counts[label] = steps or {steps_made or 0}
        trains = label in labels.values()
        if callable(learning_rate) and trains and not steps and steps_made is None:
            cause = f"{label} does not say how many steps torch has made, which the schedule starts from"
            raise CheckpointError(f"{cause}\ngive it: steps_made=1000")
    return Resumed(transformations, counts, labels, moments, members, [*words, *_words_on_numbers(odd, large)])


def are_named(state: Mapping[str, Any], params: Mapping[str, ModuleParameter], prefix: str) -> bool:
    """Whether torch's state dict has names of these parameters, so that their order does not matter."""
    try:
        return not params.keys().isdisjoint(_said(state["param_groups"], params, prefix))
    except (KeyError, TypeError, CheckpointError):  # `resumed` says what is wrong
        return False


def _names(group: _Group) -> Sequence[str] | None:
    """The names of a group's parameters: param_names of torch, or keys in place of numbers, as of FSDP."""
    keys = group.get("params", ())
    return group.get("param_names") or (keys if any(isinstance(key, str) for key in keys) else None)


def _named(
    groups: Sequence[_Group],
    indices: Sequence[Any],
    unused: Set[Any],
    params: Mapping[str, ModuleParameter],
    names: Sequence[str] | None,
    prefix: str,
) -> dict[Any, str]:
    """The parameters' names by torch's numbers: by the names in torch's groups if there are any, else by order."""
    repeated = Names[int](_ONCE)
    for place, name in enumerate(names or ()):
        repeated.put(name, place, f"item {place} of names")
    if names is not None and (unknown := [name for name in names if name not in params]):
        raise CheckpointError(
            f"names has {listed(unknown)}, which the module does not have\nits parameters: {listed(params)}"
        )
    try:
        said = _said(groups, params, prefix)
    except CheckpointError as error:
        if names is None:
            raise CheckpointError(f"{str(error).partition(chr(10))[0]}\n{_NAMES}") from error
        said = {}
    if names is None and said.keys() & params.keys():
        if unknown := [name for name in said if name not in params]:
            cause = f"torch's param_names have {listed(unknown)}, which the module does not have"
            raise CheckpointError(f"{cause}: its parameters are {listed(params)}\n{_NAMES}")
        names = list(said)
    elif names is None and said:
        cause = f"the names in torch's param_groups are not the module's: {listed(said)}"
        warnings.warn(f"{cause}. They are taken to be in the same order\n{_NAMES}", stacklevel=level_outside())
    if names is None:
        names = list(params)
        numbers = [index for index in indices if isinstance(index, int)]
        if len(numbers) == len(indices) and all(list(group["params"]) == sorted(group["params"]) for group in groups):
            indices = sorted(numbers)  # torch's order, also if the groups were rearranged later
    named = {said[name]: name for name in names if name in said}
    by_name = len(named) == len(names)
    stepped = [index for index in indices if index not in unused]
    found = indices if len(names) == len(indices) else stepped
    if named.keys() < set(stepped) if by_name else len(names) != len(found):
        cause = f"torch's optimizer has {len(indices)} parameters, and there are {len(names)} names"
        raise CheckpointError(f"{cause}: {listed(names)}\n{_NAMES}")
    if by_name:
        return named
    if wrong := [name for index, name in zip(found, names, strict=True) if said.get(name, index) != index]:
        cause = f"names and torch's param_names say different places for {listed(wrong)}"
        raise CheckpointError(f"{cause}\nleave out names=, or give torch's own names in it")
    return dict(zip(found, names, strict=True))


def _said(groups: Sequence[_Group], params: Mapping[str, ModuleParameter], prefix: str) -> dict[str, Any]:
    """The names in torch's groups, as the module has them, and torch's numbers; nothing if not all have names."""
    named = Names[Any](_NAMES)
    for group in groups:
        own = _names(group)
        if own is None:
            return {}
        if len(own) != len(group["params"]):
            cause = f"a group has {len(group['params'])} parameters, and {len(own)} param_names"
            raise CheckpointError(f"{cause}\n{_NAMES}")
        for name, index in zip(own, group["params"], strict=True):
            named.put(name, index, f"number {index}")
    return as_in_module(named, params, prefix)


def _check_moments(states: Mapping[Any, Any], indices: Sequence[Any]) -> None:
    """Refuse moments that belong to no parameter."""
    if strange := [key for key in states if key not in indices]:
        cause = f"state has moments under {listed(map(repr, strange))}, which are in no group of param_groups"
        raise CheckpointError(f"{cause}\n{SAVE}")


def _check_keys(state: Mapping[str, Any], groups: Sequence[_Group], kinds: Sequence[OptimizerKind]) -> None:
    """Refuse or warn of settings that are not used and may change the steps."""
    found = [("", finding) for finding in STATE.findings(state)]
    for group, kind in zip(groups, kinds, strict=True):
        found += [(f"param_groups of torch's {kind.name} have ", finding) for finding in kind.table.findings(group)]
    said: set[str] = set()
    for place, finding in found:
        remedy = OTHER_KEY if finding.row.use == "unknown" else finding.row.words
        text = f"{place or 'the state dict has '}{finding}\n{remedy}"
        if finding.refused:
            raise CheckpointError(text)
        if text not in said:  # each group may have it
            said.add(text)
            warnings.warn(text, stacklevel=level_outside())


def _used(kept: Mapping[str, Any]) -> bool:
    """Whether a parameter's state comes from a step: Adagrad stores one for each parameter before the first."""
    return any(value is not None for value in kept.values()) and (STEP not in kept or steps_of(kept) > 0)


def _moment(name: str, value: Any, param: ModuleParameter) -> NDArray[Any]:
    array = to_numpy(name, value)
    if array.shape != param.shape:
        raise CheckpointError(f"{name} is {array.shape}, should be {param.shape}\n{_NAMES}")
    return param.conversion.to_flax(array, param.layer)


def _fits(moment: NDArray[Any], param: ModuleParameter) -> bool:
    """Whether a moment's numbers stay finite in the parameter's dtype."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(moment.astype(jnp.result_type(param.value))).all())


def _words_on_numbers(odd: Sequence[str], large: Sequence[str]) -> list[str]:
    """Warnings of moments that are NaN or infinite, and of those that are too large for their parameters' dtypes."""
    words = []
    if odd:
        words.append(f"NaN or infinite numbers in {listed(odd)}\nif torch's steps are finite, save its state anew")
    if large:
        cause = f"numbers in {listed(large)} become infinite in their parameters' dtype"
        words.append(f"{cause}\ngive the parameters in float32")
    return words
