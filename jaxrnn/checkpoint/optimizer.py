"""Convert torch's optimizers, settings and state, to optax, to continue training where torch stopped."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_layers import Entry
from jaxrnn.checkpoint.matching import Parameter
from jaxrnn.checkpoint.names import as_in_module
from jaxrnn.checkpoint.nnx import contents_of, order_in_doubt

# The fields of optax's states, by torch's names.
_FIELDS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}
_COUNT = "count"
# What the three optimizers store for a parameter. Other optimizers store other names.
_KNOWN = {"step", *_FIELDS.values()}
_FROZEN = "frozen"
_NONE = "an optimizer that is none of SGD, Adam and AdamW"
_START_ANEW = "start a fresh optax optimizer on the loaded parameters"
_SAVE = "give torch's optimizer.state_dict(), as it is or from jaxrnn.checkpoint.load_tree"


def optax_from_torch(
    state: Mapping[str, Any],
    params: Mapping[str, Any],
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
) -> tuple[optax.GradientTransformation, optax.OptState]:
    """Make the optax optimizer that continues where torch's stopped, for parameters with torch's names and layouts.

    Knows torch.optim.SGD, Adam and AdamW, with momentum, Nesterov momentum, weight decay and parameter groups.

    Args:
        state: torch's `optimizer.state_dict()`, with tensors of torch, numpy or jax.
        params: from name to array, as `spec.init` and `jaxrnn.state_dict` return.
        names: the parameters' names in the order in which torch's optimizer got them, group after group; by default
            those of params. Other parameters are not trained. Those for which torch has no state, because they are
            frozen or were never used, may be left out.
        learning_rate: a number, or a schedule of the number of steps, which includes torch's; by default each group's
            last one.
        steps_made: how many steps torch has made. Only a schedule needs it, with SGD, whose state does not hold it.

    Returns:
        The transformation and its state for `params`.

    Raises:
        CheckpointError: another optimizer, a setting that optax lacks, or a state that does not match the parameters.

    Warns:
        UserWarning: a parameter among names has no state in torch, so it is not trained.

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
    described = {name: Parameter((name,), value, None, Entry(name, name)) for name, value in params.items()}
    resumed = _resumed(state, described, names, learning_rate, steps_made)
    tree = dict(params)
    optimizer = resumed.transformation(tree)
    return optimizer, resumed.fill(optimizer.init(tree))


def optimizer_from_torch(
    state: Mapping[str, Any],
    module: nnx.Module,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    steps_made: int | None = None,
    prefix: str = "",
) -> nnx.Optimizer:
    """As `optax_from_torch`, for an NNX module: make an `nnx.Optimizer` of its `nnx.Param`s.

    Args:
        state: torch's `optimizer.state_dict()`, with tensors of torch, numpy or jax.
        module: the module, as for `jaxrnn.load_state_dict`, with its parameters loaded.
        names: as for `optax_from_torch`, such as the keys of torch's `model.state_dict()`; those of buffers are
            skipped. By default those of `jaxrnn.state_dict(module)`, which are in the order of torch's
            `model.parameters()` if the attributes are.
        learning_rate, steps_made: as for `optax_from_torch`.
        prefix: as for `jaxrnn.load_state_dict`, for names; so a wrapper's `module.` and the like are removed from them.

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
    places = {id(variable): path for path, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)}
    described: dict[str, Parameter] = {}
    seen: set[int] = set()
    contents = contents_of(module)
    for name, param in contents.params.items():
        # As in torch's parameters(), a tied weight counts once, under its first name. Statistics are not trained.
        if id(param.place) in places and id(param.place) not in seen:
            seen.add(id(param.place))
            described[name] = param._replace(place=places[id(param.place)])
    if names is not None:
        buffers = (contents.params.keys() | contents.ignored) - described.keys()
        names = [name for name in as_in_module(names, contents.params, prefix) if name not in buffers]
    elif doubtful := order_in_doubt(module):
        cause = (
            f"the order of {listed(doubtful)} may not be torch's, for Flax sorts attributes in nnx.jit and in copies"
        )
        raise CheckpointError(f"{cause}\ngive names=, such as list(tensors) of the model's state dict")
    resumed = _resumed(state, described, names, learning_rate, steps_made)
    params = nnx.as_pure(nnx.state(module, nnx.Param))
    optimizer = nnx.Optimizer(module, resumed.transformation(params), wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(resumed.fill(nnx.as_pure(optimizer.opt_state))))
    optimizer.step[...] = jnp.asarray(max(resumed.counts.values(), default=0), optimizer.step.dtype)
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


class _Resumed(NamedTuple):
    """The contents of torch's state dict, by parameter.

    Attributes:
        groups: the transformation of each parameter group.
        counts: how many steps each group has made.
        labels: each parameter's group, or `_FROZEN`.
        moments: each parameter's moments, in its layout, by optax's field names.
    """

    groups: dict[str, optax.GradientTransformation]
    counts: dict[str, int]
    labels: dict[tuple, str]
    moments: dict[tuple, dict[str, np.ndarray]]

    def transformation(self, params: Any) -> optax.GradientTransformation:
        if len(set(self.labels.values())) == 1:
            return self.groups[next(iter(self.labels.values()))]
        labels = jax.tree_util.tree_map_with_path(lambda path, _: self.labels[_keys(path)], params)
        return optax.partition(self.groups, labels)

    def fill(self, state: Any) -> Any:
        """Fill the state with torch's moments and counts."""

        def filled(path: tuple, leaf: Any) -> Any:
            last = max(index for index, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey))
            field = path[last].name
            if field == _COUNT:
                group = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), None)
                return jnp.asarray(self.counts[group or next(iter(self.labels.values()))], leaf.dtype)
            moment = self.moments[_keys(path[last + 1 :])].get(field)
            return leaf if moment is None else jnp.asarray(moment, leaf.dtype)

        return jax.tree_util.tree_map_with_path(filled, state)


def _keys(path: tuple) -> tuple:
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def _resumed(
    state: Mapping[str, Any],
    params: Mapping[str, Parameter],
    names: Sequence[str] | None,
    learning_rate: optax.ScalarOrSchedule | None,
    steps_made: int | None,
) -> _Resumed:
    names = list(params if names is None else names)
    try:
        groups, states = list(state["param_groups"]), state["state"]
        count = sum(len(group["params"]) for group in groups)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"state is no state dict of an optimizer: it has no {error}\n{_SAVE}") from error
    if unknown := [name for name in names if name not in params]:
        raise CheckpointError(f"no parameters are named {listed(unknown)}\nthe parameters: {listed(params)}")
    indices = [index for group in groups for index in group["params"]]
    used = [index for index in indices if any(value is not None for value in (states.get(index) or {}).values())]
    unused = {index for index in indices if index not in used} if used else set()
    if len(names) == count - len(unused):
        named = dict(zip([index for index in indices if index not in unused], names, strict=True))
    elif len(names) == count:
        named = dict(zip(indices, names, strict=True))
        if unused:
            cause = "torch's optimizer has no state for them, as for frozen or never used parameters"
            words = f"{listed(named[index] for index in indices if index in unused)} are not trained: {cause}"
            warnings.warn(f"{words}. To train them, start a fresh optax optimizer", stacklevel=3)
    else:
        cause = f"torch's optimizer has {count} parameters, and {len(names)} are named"
        raise CheckpointError(f"{cause}: {listed(names)}\ngive names=, in the order of torch's groups")
    labels = {param.place: _FROZEN for param in params.values()}
    moments: dict[tuple, dict[str, np.ndarray]] = {param.place: {} for param in params.values()}
    transformations = {_FROZEN: optax.set_to_zero()}
    counts = {}
    for number, group in enumerate(groups):
        label, steps = f"group {number}", set()
        transformations[label] = _transformation(group, learning_rate)
        for index in group["params"]:
            if index in unused:
                continue
            param = params[name := named[index]]
            labels[param.place] = label
            kept = states.get(index, {})
            if others := kept.keys() - _KNOWN:
                raise CheckpointError(f"{_NONE}: it has {listed(others)}\n{_START_ANEW}")
            step = kept.get("step", 0)
            if "step" in kept or ("betas" in group and states):
                steps.add(int(step if isinstance(step, int | float) else to_numpy("step", step)))
            for field, theirs in _FIELDS.items():
                if kept.get(theirs) is not None:
                    moments[param.place][field] = _moment(f"{theirs} of {name}", kept[theirs], param)
        if len(steps) > 1:
            cause = f"the parameters of {label} have made different numbers of steps, {sorted(steps)}"
            raise CheckpointError(f"{cause}\noptax counts for all of them: put them into groups of their own")
        counts[label] = max(steps, default=steps_made or 0)
        if callable(learning_rate) and not steps and steps_made is None:
            cause = f"{label} does not say how many steps it has made, where the schedule is to go on"
            raise CheckpointError(f"{cause}\ngive steps_made=")
    return _Resumed(transformations, counts, labels, moments)


def _moment(name: str, value: Any, param: Parameter) -> np.ndarray:
    array = to_numpy(name, value)
    if array.shape != param.shape:
        raise CheckpointError(f"{name} is {array.shape}, should be {param.shape}\ngive names= in torch's order")
    return param.entry.to_flax(array, param.layer)


def _transformation(
    group: Mapping[str, Any], learning_rate: optax.ScalarOrSchedule | None
) -> optax.GradientTransformation:
    """The optimizer of a parameter group."""
    for setting in ("maximize", "amsgrad", "dampening"):
        if group.get(setting):
            cause = f"optax has nothing that equals torch's {setting}={group[setting]}"
            raise CheckpointError(f"{cause}\ntrain on without it, and say so in param_groups")
    decay = float(group.get("weight_decay", 0))
    decays = [optax.add_decayed_weights(decay)] if decay else []
    rate = optax.scale_by_learning_rate(float(group["lr"]) if learning_rate is None else learning_rate)
    if "betas" in group and "amsgrad" in group and "momentum_decay" not in group:
        adam = optax.scale_by_adam(*map(float, group["betas"]), eps=float(group["eps"]))
        if decay and "decoupled_weight_decay" not in group:
            remedy = 'say which: set "decoupled_weight_decay" in its param_groups to False for Adam, to True for AdamW'
            raise CheckpointError(f"an optimizer with weight_decay={decay} that may be Adam or AdamW\n{remedy}")
        if group.get("decoupled_weight_decay"):
            return optax.chain(adam, *decays, rate)
        return optax.chain(*decays, adam, rate)
    if "nesterov" in group and "dampening" in group:
        momentum = float(group["momentum"])
        trace = [optax.trace(momentum, nesterov=bool(group["nesterov"]))] if momentum else []
        return optax.chain(*decays, *trace, rate)
    settings = listed(name for name in group if name != "params")
    raise CheckpointError(f"{_NONE}: its settings are {settings}\n{_START_ANEW}")
