"""One table of torch's optimizers: what tells them, what equals them in optax, and where that keeps torch's state."""

import numbers
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.tables import USED, Table, neutral, refused, warned

STEP = "step"
_Group = Mapping[str, Any]
_Steps = list[optax.GradientTransformation]


class OptimizerKind(NamedTuple):
    """A row of the table: a kind of optimizer.

    Attributes:
        name: its class in torch.
        told_by: its settings, or names in its state, that tell it.
        lacks: those that tell others.
        settings: its own settings that are used, beside those in `_SETTINGS`.
        fields: from the names in torch's state to the fields of optax's, for reading and writing. Any other name is
            refused.
        counts: whether torch's state has the number of steps.
        keeps: whether it keeps a state for each parameter, with a group's settings.
        step: what makes a step of learning rate 1 of a gradient, from a group's settings.
        unequal: where optax has nothing that equals it: what differs.
        nearest: and what of optax is most like it.
    """

    name: str
    told_by: Set[str]
    lacks: Set[str] = frozenset()
    settings: tuple[str, ...] = ()
    fields: Mapping[str, str] = {}
    counts: bool = True
    keeps: Callable[[_Group], bool] = lambda group: True
    step: Callable[[_Group], _Steps] = lambda group: []
    unequal: str = ""
    nearest: str = ""

    @property
    def table(self) -> Table:
        """What becomes of the settings of a group."""
        return Table(f"param_groups of torch.optim's {self.name}", {**_SETTINGS, **dict.fromkeys(self.settings, USED)})


_SCHEDULES = neutral("of a schedule, which sets lr: its last one is used")
_MOMENTUM = warned(remedy="the momentum stays at its last value: give the schedule in torch cycle_momentum=False")
_SETTINGS = {
    **dict.fromkeys(("params", "param_names", "lr", "weight_decay", "maximize"), USED),
    **dict.fromkeys(("foreach", "fused"), neutral("the same sums in another order")),
    # With either, torch computes the correction of the bias in float32.
    "capturable": neutral("for CUDA graphs: the same formulas, to 1e-6"),
    "differentiable": neutral("whether autograd goes through the steps: the same formulas, to 1e-6"),
    **dict.fromkeys(("initial_lr", "max_lr", "min_lr", "swa_lr"), _SCHEDULES),
    **dict.fromkeys(("base_momentum", "max_momentum"), _MOMENTUM),
    "name": neutral("a label of one's own"),
    "decoupled_weight_decay": refused(False, remedy="torch's has none: remove it from param_groups"),
}
# The keys of an optimizer's state dict.
STATE = Table("torch's optimizer.state_dict()", {"state": USED, "param_groups": USED})
OTHER_KEY = "torch.optim's own optimizers have none: if it is of another class, compare its next steps with those here"


SAVE = "give torch's optimizer.state_dict(), or what jaxrnn.checkpoint.load_tree(path, key) reads of it"


def groups_and_states(state: Mapping[str, Any]) -> tuple[list[_Group], Mapping[Any, Mapping[str, Any]]]:
    """The two parts of an optimizer's state dict: groups with lists of parameters, and what is kept of these.

    Raises:
        CheckpointError: they are not there, or not built so.
    """

    def check(good: bool, place: str, value: Any) -> None:
        if not good:
            cause = (
                f"state should be the state dict of a torch optimizer, but {place} is of type {type(value).__name__}"
            )
            raise CheckpointError(f"{cause}\n{SAVE}")

    try:
        groups, states = state["param_groups"], state["state"]
        check(isinstance(groups, list | tuple), "param_groups", groups)
        check(isinstance(states, Mapping), "state", states)
        for place, group in enumerate(groups):
            check(isinstance(group, Mapping), f"group {place}", group)
            check(isinstance(group["params"], list | tuple | range), f"params of group {place}", group["params"])
            names = group.get("param_names")
            check(names is None or isinstance(names, list | tuple), f"param_names of group {place}", names)
            named = any(isinstance(key, str) for key in group["params"])
            for key in group["params"]:
                check(isinstance(key, str if named else numbers.Integral), f"a parameter of group {place}", key)
            for name in names or ():
                check(isinstance(name, str), f"a name of group {place}", name)
    except (KeyError, TypeError) as error:
        cause = f"state should be the state dict of a torch optimizer, but has no {error}"
        raise CheckpointError(f"{cause}\n{SAVE}") from error
    for index, kept in states.items():
        check(kept is None or isinstance(kept, Mapping), f"what it keeps of parameter {index}", kept)
    return list(groups), states


def number(value: Any, name: str = "a setting") -> float:
    """A setting that is a number, or an array of one: torch's lr may be a tensor."""
    try:
        return float(value) if isinstance(value, int | float) else float(to_numpy(name, value).item())
    except (ValueError, OverflowError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name} should be one number: {error}\n{SAVE}") from error


def steps_of(kept: Mapping[str, Any]) -> int:
    """The number of steps in what torch keeps of a parameter."""
    steps = number(kept.get(STEP, 0), STEP)
    if not 0 <= steps < 1 << 31:
        raise CheckpointError(f"{STEP} should be a number of steps, got {steps}\n{SAVE}")
    return int(steps)


def _sgd(group: _Group) -> _Steps:
    momentum = number(group["momentum"])
    if momentum and group.get("dampening"):
        cause = f"optax has no dampening, and torch's SGD has dampening={group['dampening']}"
        raise CheckpointError(f"{cause}\nto train on without it, set it to 0 in param_groups")
    return [optax.trace(momentum, nesterov=bool(group["nesterov"]))] if momentum else []


class AmsgradState(NamedTuple):
    """Of torch's amsgrad, which corrects the maximum of second moments. That of optax is the maximum of corrected ones,
    and has another name."""

    count: Any
    mu: Any
    nu: Any
    max_nu: Any


def _adam(group: _Group) -> _Steps:
    if (decay := group.get("weight_decay")) and "decoupled_weight_decay" not in group:
        remedy = 'say which: set "decoupled_weight_decay" in its param_groups to False for Adam, to True for AdamW'
        raise CheckpointError(
            f"the optimizer may be Adam or AdamW, and its weight_decay={decay} differs between them\n{remedy}"
        )
    b1, b2, eps = _betas_and_eps(group)
    if not group["amsgrad"]:
        return [optax.scale_by_adam(b1, b2, eps)]
    moments = optax.scale_by_adam(b1, b2)

    def init(params: Any) -> AmsgradState:
        count, mu, nu = moments.init(params)
        return AmsgradState(count, mu, nu, optax.tree.zeros_like(params))

    def update(updates: Any, state: AmsgradState, params: Any = None) -> tuple[Any, AmsgradState]:
        _, (count, mu, nu) = moments.update(updates, optax.ScaleByAdamState(state.count, state.mu, state.nu))
        new = AmsgradState(count, mu, nu, jax.tree.map(jnp.maximum, state.max_nu, nu))
        mu = optax.tree.bias_correction(mu, b1, count)
        nu = optax.tree.bias_correction(new.max_nu, b2, count)
        return jax.tree.map(lambda mu, nu: mu / (jnp.sqrt(nu) + eps), mu, nu), new

    return [optax.GradientTransformation(init, update)]


def _adamax(group: _Group) -> _Steps:
    return [optax.scale_by_adamax(*_betas_and_eps(group))]


def _radam(group: _Group) -> _Steps:
    b1, b2, eps = _betas_and_eps(group)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # torch adds eps before it corrects the second moment, optax after. 1.0 keeps eps weakly typed, as a float is.
        corrected = eps / jnp.sqrt(1 - b2 ** (state.count + 1.0))
        return optax.scale_by_radam(b1, b2, corrected).update(updates, state)

    return [optax.GradientTransformation(optax.scale_by_radam(b1, b2).init, update)]


def _rmsprop(group: _Group) -> _Steps:
    scale = optax.scale_by_stddev if group["centered"] else optax.scale_by_rms
    momentum = number(group["momentum"])
    trace = [optax.trace(momentum)] if momentum else []
    return [scale(number(group["alpha"]), number(group["eps"]), eps_in_sqrt=False), *trace]


def _adagrad(group: _Group) -> _Steps:
    eps, decay = number(group["eps"]), number(group["lr_decay"])
    sums = optax.scale_by_rss(number(group["initial_accumulator_value"]))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, new = sums.update(updates, state)
        # optax adds eps inside the root.
        return jax.tree.map(lambda g, squares: g / (jnp.sqrt(squares) + eps), updates, new.sum_of_squares), new

    slower = [optax.scale_by_schedule(lambda count: 1 / (1 + count * decay))] if decay else []
    return [optax.GradientTransformation(sums.init, update), *slower]


def _adadelta(group: _Group) -> _Steps:
    return [optax.scale_by_adadelta(number(group["rho"]), number(group["eps"]))]


def _betas_and_eps(group: _Group) -> tuple[float, float, float]:
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise CheckpointError(f"betas should be two numbers, got {betas!r:.80}\n{SAVE}")
    return number(betas[0]), number(betas[1]), number(group["eps"])


_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}
KINDS = (
    OptimizerKind(
        "SGD",
        {"momentum", "dampening", "nesterov"},
        settings=("momentum", "dampening", "nesterov"),
        fields={"momentum_buffer": "trace"},
        counts=False,
        keeps=lambda group: bool(number(group["momentum"])),
        step=_sgd,
    ),
    OptimizerKind(
        "Adam, AdamW",
        {"betas", "amsgrad"},
        lacks={"momentum_decay"},
        settings=("betas", "eps", "amsgrad", "decoupled_weight_decay"),
        fields=_MOMENTS | {"max_exp_avg_sq": "max_nu"},
        step=_adam,
    ),
    OptimizerKind(
        "Adamax",
        {"betas", "eps", "exp_inf"},
        settings=("betas", "eps"),
        fields={"exp_avg": "mu", "exp_inf": "nu"},
        step=_adamax,
    ),
    OptimizerKind(
        "RAdam",
        {"betas", "decoupled_weight_decay"},
        lacks={"amsgrad", "momentum_decay"},
        settings=("betas", "eps", "decoupled_weight_decay"),
        fields=_MOMENTS,
        step=_radam,
    ),
    OptimizerKind(
        "RMSprop",
        {"alpha", "centered", "momentum"},
        lacks={"lr_in_momentum"},  # of timm's, which adds eps inside the root
        settings=("alpha", "eps", "centered", "momentum"),
        fields={"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"},
        step=_rmsprop,
    ),
    OptimizerKind(
        "Adagrad",
        {"lr_decay", "initial_accumulator_value"},
        settings=("eps", "lr_decay", "initial_accumulator_value"),
        fields={"sum": "sum_of_squares"},
        step=_adagrad,
    ),
    OptimizerKind(
        "Adadelta",
        {"rho", "eps"},
        settings=("rho", "eps"),
        fields={"square_avg": "e_g", "acc_delta": "e_x"},
        step=_adadelta,
    ),
    OptimizerKind("NAdam", {"momentum_decay"}, unequal="its momentum grows, by momentum_decay", nearest="nadam"),
    OptimizerKind(
        "SparseAdam",
        {"betas", "eps"},
        lacks={"weight_decay", "amsgrad"},
        unequal="it skips the rows that a sparse gradient lacks",
        nearest="adam",
    ),
    OptimizerKind(
        "ASGD", {"lambd", "t0"}, unequal="it decays parameters and rate by lambd, alpha and t0", nearest="sgd"
    ),
    OptimizerKind(
        "Rprop",
        {"etas", "step_sizes"},
        unequal="optax.rprop makes each step one gradient later",
        nearest="rprop",
    ),
    OptimizerKind("LBFGS", {"history_size"}, unequal="it computes the loss several times a step", nearest="lbfgs"),
    OptimizerKind(
        "Adafactor", {"beta2_decay"}, unequal="it caps the learning rate at 1 / sqrt(step)", nearest="adafactor"
    ),
    OptimizerKind("Muon", {"ns_steps"}, unequal="it makes matrices orthogonal in bfloat16", nearest="contrib.muon"),
)
_KNOWN = listed(kind.name for kind in KINDS if not kind.unequal)
_START_ANEW = "start a new optax optimizer on the loaded parameters"


def kind_of_optimizer(group: _Group, state: Set[str]) -> OptimizerKind:
    """The table's row for a group of parameters.

    Args:
        group: its settings.
        state: the names under which the state of its parameters is stored.

    Raises:
        CheckpointError: optax has nothing that equals it, or it is not known.
    """
    present = group.keys() | state
    kind = next((kind for kind in KINDS if kind.told_by <= present and not kind.lacks & present), None)
    if kind is None and {"betas", "eps"} <= group.keys() and not state:
        cause = "the optimizer may be Adamax before its first step, when only its state would tell"
        raise CheckpointError(f"{cause}\nmake a step in torch before, or {_START_ANEW}, such as optax.adamax")
    if kind is None:
        settings = listed(name for name in group if name != "params")
        raise CheckpointError(f"the optimizer is not one of {_KNOWN}: its settings are {settings}\n{_START_ANEW}")
    if kind.unequal:
        cause = f"optax has no optimizer equal to torch's {kind.name}: {kind.unequal}"
        raise CheckpointError(f"{cause}\n{_START_ANEW}, such as optax.{kind.nearest}")
    if others := state - kind.fields.keys() - {STEP}:
        raise CheckpointError(f"the optimizer is not one of {_KNOWN}: its state has {listed(others)}\n{_START_ANEW}")
    return kind


def transformation(
    kind: OptimizerKind, group: _Group, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """The optax transformation that equals torch's, for a group's settings.

    Raises:
        CheckpointError: optax has nothing that equals a setting, or it is not known whether weight decay is decoupled.
    """
    decay = number(group.get("weight_decay", 0))
    decays = [optax.add_decayed_weights(decay)] if decay else []
    sign = [optax.scale(-1.0)] if group.get("maximize") else []
    step, rate = kind.step(group), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(*sign, *([*step, *decays] if group.get("decoupled_weight_decay") else [*decays, *step]), rate)
