"""Convert optax's states back to those of torch's optimizers, to continue training in torch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import Conversion
from jaxrnn.checkpoint.matching import ModuleParameter, interchangeable
from jaxrnn.checkpoint.optimizer import (
    Resumed,
    are_named,
    has_moments,
    of_module,
    order_lost,
    resumed,
    slot_of,
)
from jaxrnn.checkpoint.torch_optimizers import STEP, number, steps_of

_STEPS = "give the number of steps that torch and optax have made together: steps_made=1000"
_SAME = "give the parameters, or the module, that the optimizer trains"
_EQUAL = (
    "give settings of the torch optimizer that equals the one in optax: torch.optim.Adam(...).state_dict() and such"
)


def optax_to_torch(
    state: optax.OptState,
    settings: Mapping[str, Any],
    params: Mapping[str, Any],
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
) -> dict[str, Any]:
    """Make the state dict of torch's optimizer that continues where optax's stopped: the inverse of `optax_from_torch`.

    Args:
        state: of the optimizer from `optax_from_torch`; or of one of optax that keeps the same numbers, such as
            `optax.adam`.
        settings: torch's `optimizer.state_dict()`, from which `optax_from_torch` made the optimizer; or that of a new
            one in torch, with the settings of the one in optax, which does not tell them. Its param_groups are taken.
        params: from name to array, as for `optax_from_torch`.
        names: as for `optax_from_torch`.
        learning_rate: the number, or schedule, with which the optimizer was made; torch's lr becomes its value after
            the steps made. By default lr is that of settings.
        steps_made: how many steps torch and optax have made together. Only where optax's state does not hold it, and
            torch's does: RMSprop, Adagrad without `lr_decay` and Adadelta, without a schedule.

    Returns:
        A dict for torch's `optimizer.load_state_dict`, with NumPy arrays for tensors, which `save_tree` writes as
        tensors. Parameters that are not trained keep what settings have of them.

    Raises:
        CheckpointError: as `optax_from_torch`, of settings; the state is not that of an optimizer with these settings;
            the number of steps is needed, or contradicts the state's; or the state has a schedule's count, and there is
            no `learning_rate`.

    >>> import jax, jaxrnn, numpy as np, optax
    >>> params = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3, bias=False).init(jax.random.key(0))
    >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
    >>> state = optax.sgd(0.1, momentum=0.9).init(params)
    >>> written = jaxrnn.checkpoint.optax_to_torch(state, {"state": {}, "param_groups": [group]}, params)
    >>> written["state"][0]["momentum_buffer"].shape, written["param_groups"][0]["lr"]
    ((9, 2), 0.1)
    """
    described = {name: ModuleParameter((name,), value, None, Conversion(name, name)) for name, value in params.items()}
    shapes = {name: (param.shape,) for name, param in described.items()}
    known = names is not None or are_named(settings, described, "")
    if not known and list(params) == sorted(params) and interchangeable(shapes, has_moments(settings)):
        raise order_lost(list(params), "JAX sorts the keys of dicts")
    return written(state, settings, described, dict(params), names, learning_rate, steps_made)


def optimizer_to_torch(
    optimizer: nnx.Optimizer[Any] | optax.OptState,
    settings: Mapping[str, Any],
    module: nnx.Module,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """As `optax_to_torch`, for an `nnx.Optimizer` of an NNX module: the inverse of `optimizer_from_torch`.

    Args:
        optimizer: from `optimizer_from_torch`, or an `nnx.Optimizer` of one of optax, as for `optax_to_torch`; or a
            part of its `opt_state`.
        settings: as for `optax_to_torch`.
        module: the module that it trains.
        names, prefix: as for `optimizer_from_torch`.
        learning_rate: as for `optax_to_torch`.
        steps_made: as for `optax_to_torch`; by default the optimizer's own `step`.

    Returns:
        As `optax_to_torch`, with torch's layouts.

    Raises:
        CheckpointError: as `optax_to_torch`, and as `optimizer_from_torch`, of names.

    >>> import jaxrnn, optax
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(2, 3, bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(gru, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    >>> _ = optimizer.update(gru, nnx.grad(lambda gru: gru(np.ones((5, 2), "float32"))[0].sum())(gru))
    >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
    >>> written = jaxrnn.checkpoint.optimizer_to_torch(optimizer, {"state": {}, "param_groups": [group]}, gru)
    >>> written["state"][1]["momentum_buffer"].shape
    (9, 3)
    """
    described, names = of_module(settings, module, names, prefix, has_moments(settings))
    params = nnx.as_pure(nnx.state(module, nnx.Param))
    whole = isinstance(optimizer, nnx.Optimizer)
    state = nnx.as_pure(optimizer.opt_state if whole else optimizer)
    step = int(optimizer.step[...]) if whole else None
    return written(state, settings, described, params, names, learning_rate, steps_made, step, prefix)


def written(
    state: Any,
    settings: Mapping[str, Any],
    described: Mapping[str, ModuleParameter],
    params: Any,
    names: Sequence[str] | None,
    learning_rate: optax.ScalarOrSchedule | None,
    steps_made: int | None,
    step: int | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Write torch's state dict.

    Args:
        state, settings, names, learning_rate, steps_made: as for `optax_to_torch`.
        described: the parameters by name; a `place` is the path in the tree of parameters.
        params: that tree.
        step: the number of steps by another count than optax's, which may have begun later.
        prefix: as for `optimizer_to_torch`.
    """
    read = resumed(settings, described, names, None, None, prefix)
    expected = _Kept.of(jax.eval_shape(read.transformation(params).init, params), read)
    found = _Kept.of(state, read)
    found.check(expected, read)
    if learning_rate is None and found.nodes > expected.nodes:
        cause = "optax's state counts the steps of a schedule, and torch's state dict has the learning rate alone"
        raise CheckpointError(f"{cause}\ngive the schedule, or the rate of the next step: learning_rate=")
    counts = set().union(*found.counts.values())
    if steps_made is not None and counts and max(counts) != steps_made:
        cause = f"steps_made={steps_made}, and optax's state says {max(counts)}"
        raise CheckpointError(f"{cause}\nleave out steps_made=: the state's own is used")
    theirs: Mapping[Any, Mapping[str, Any]] = settings["state"]
    made = _steps_made(found, read, theirs, step if steps_made is None else steps_made)
    kept: dict[Any, dict[str, Any]] = {}
    for index, member in read.members.items():
        place = member.param.place
        keeps = place in found.moments if place in expected.moments else member.kind.counts
        if member.trained and keeps and made[index] != 0:
            count = {STEP: _as_torchs(made[index], theirs)} if member.kind.counts else {}
            kept[index] = count | {
                name: member.param.to_torch(f"{name} of {member.name}", found.moments[place][field].array)
                for name, field in member.kind.fields.items()
                if field in found.moments.get(place, {})
            }
        elif index in theirs:  # torch's Adagrad has a state before the first step, too
            kept[index] = {name: _copied(name, value) for name, value in theirs[index].items()}
    groups = [{name: _copied(name, value) for name, value in group.items()} for group in settings["param_groups"]]
    for group in groups if learning_rate is not None else ():
        if trained := [index for index in group["params"] if index in read.members and read.members[index].trained]:
            group["lr"] = _rate(learning_rate, made[trained[0]])
    return {"state": kept, "param_groups": groups}


class _Moment(NamedTuple):
    array: Any
    above: tuple[Any, ...]


class _Kept(NamedTuple):
    """What a state of optax keeps.

    Attributes:
        moments: by parameter and optax's field.
        counts: the numbers of steps, by the keys of dicts above them: the group, in a state for several.
        nodes: how many counts there are.
    """

    moments: dict[Any, dict[str, _Moment]]
    counts: dict[tuple[Any, ...], set[Any]]
    nodes: int

    @classmethod
    def of(cls, state: Any, read: Resumed) -> "_Kept":
        kept = cls({}, {}, 0)
        nodes = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            slot = slot_of(path, read.moments)
            if slot is None:
                cause = f"optax's state has {jax.tree_util.keystr(path)}, for which torch's has no place"
                remedy = "give the state of an optimizer of these parameters alone, such as its inner_state"
                raise CheckpointError(f"{cause}\n{remedy}")
            if slot.place is None:
                nodes += 1
                kept.counts.setdefault(slot.above, set()).add(
                    leaf if isinstance(leaf, jax.ShapeDtypeStruct) else int(leaf)
                )
            else:
                kept.moments.setdefault(slot.place, {})[slot.field] = _Moment(leaf, slot.above)
        return kept._replace(nodes=nodes)

    def check(self, expected: "_Kept", read: Resumed) -> None:
        """Refuse a state with other moments than those of the transformation that equals torch's."""
        wanting: dict[str, list[str]] = {}
        for member in read.members.values():
            place = member.param.place
            wanted, here = expected.moments.get(place, {}), self.moments.get(place, {})
            if here and not member.trained:
                cause = f"optax's state trains {member.name}, with which torch's optimizer has made no step"
                raise CheckpointError(f"{cause}\n{_EQUAL}")
            wanting.setdefault(member.label, [])
            if wanted and not here:
                wanting[member.label].append(member.name)
            elif wanted.keys() != here.keys():
                cause = f"optax's state has {listed(here) or 'nothing'} of {member.name}"
                cause += f", and should have {listed(wanted) or 'nothing'} for torch's {member.kind.name}"
                raise CheckpointError(f"{cause} with these settings\n{_EQUAL}")
            for field, moment in here.items():
                if np.shape(moment.array) != np.shape(member.param.value):
                    cause = f"{field} of {member.name} is {np.shape(moment.array)}"
                    raise CheckpointError(f"{cause}, should be {np.shape(member.param.value)}\n{_SAME}")
        for label, names in wanting.items():
            members = [member for member in read.members.values() if member.label == label and member.trained]
            if names and len(names) == len(members):  # some may be masked
                fields = listed(expected.moments[members[0].param.place])
                cause = f"optax's state has no {fields} of {listed(names)}, which torch's {members[0].kind.name} has"
                raise CheckpointError(f"{cause}\n{_EQUAL}")


def _steps_made(
    found: _Kept, read: Resumed, theirs: Mapping[Any, Mapping[str, Any]], steps_made: int | None
) -> dict[Any, int | None]:
    """How many steps each parameter has made; None where neither optax nor torch needs to know."""
    everywhere = set().union(*found.counts.values())
    before = {index: steps_of(theirs.get(index, {})) for index in read.members}
    made: dict[Any, int | None] = {}
    for index, member in read.members.items():
        above = {moment.above for moment in found.moments.get(member.param.place, {}).values()}
        counts = set().union(*(found.counts.get(each, ()) for each in above)) or everywhere
        if len(counts) > 1:
            cause = f"optax's state says different numbers of steps for {member.name}, {listed(sorted(counts))}"
            raise CheckpointError(f"{cause}\ngive the state of its optimizer alone, such as its inner_state")
        if not counts and steps_made is None and member.kind.counts and member.trained:
            cause = f"optax's state does not say how many steps {member.kind.name} has made, which torch's does"
            raise CheckpointError(f"{cause}\n{_STEPS}")
        if not counts and steps_made is not None and steps_made < max(before.values()):
            cause = f"steps_made={steps_made}, and torch had made {max(before.values())} before"
            raise CheckpointError(f"{cause}\n{_STEPS}")
        since = None if steps_made is None else steps_made - max(before.values())
        made[index] = next(iter(counts), None if since is None else before[index] + since)
    return made


def _rate(learning_rate: optax.ScalarOrSchedule, steps: int | None) -> float:
    """torch's lr for the next step."""
    if not callable(learning_rate):
        return number(learning_rate)
    if steps is None:
        raise CheckpointError(
            f"optax's state does not say how many steps were made, which the schedule needs\n{_STEPS}"
        )
    return number(learning_rate(steps))


def _as_torchs(steps: int | None, theirs: Mapping[Any, Mapping[str, Any]]) -> Any:
    """A number of steps in the type that torch's state has: a tensor, or in older files a number."""
    one = next((kept[STEP] for kept in theirs.values() if STEP in kept), np.float32(0))
    return steps if isinstance(one, int | float) else np.array(steps, to_numpy(STEP, one).dtype)


def _copied(name: str, value: Any) -> Any:
    if hasattr(value, "dtype"):
        return np.array(to_numpy(name, value))
    return list(value) if isinstance(value, list) else value
