"""torch's optimizers, setting by setting: each is used, changes no step, or is named with a remedy that works."""

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from flax import nnx
from torch_steps import SHAPES, gradient_of, torchs_step

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.torch_optimizers import KINDS, STATE

pytest_plugins = "shared_fixtures"
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("compiled_once", "standard_promotion")]
_QUICK = ("SGD", "Adam")
ROWS = [
    pytest.param(name, key, marks=[] if name in _QUICK else pytest.mark.slow)
    for kind in KINDS
    if not kind.unequal
    for name in kind.name.split(", ")
    for key in kind.table
]
STATES = [
    pytest.param(name, key, marks=[] if name in _QUICK else pytest.mark.slow)
    for kind in KINDS
    if not kind.unequal
    for name in kind.name.split(", ")[:1]
    for key in (*kind.fields, "step")
]
TABLES = {name: kind.table for kind in KINDS for name in kind.name.split(", ")}


def _tensors(torch: types.ModuleType) -> dict[str, Any]:
    random = np.random.RandomState(0)
    return {name: torch.tensor(random.randn(*shape)) for name, shape in SHAPES.items()}


def _made(torch: types.ModuleType, name: str, groups: Any = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """An optimizer after three steps, and its parameters, in float64."""
    tensors = _tensors(torch)
    optimizer = getattr(torch.optim, name)(groups(tensors) if groups else list(tensors.values()), **settings)
    for count in (1, 2, 3):
        torchs_step(torch, optimizer, tensors, count)
    return optimizer, tensors


def _two_steps(state: Any, tensors: dict[str, Any], **settings: Any) -> dict[str, np.ndarray]:
    """Where two more steps of ours lead."""
    params = {name: jnp.asarray(tensor.numpy()) for name, tensor in tensors.items()}
    optimizer, ours = checkpoint.optax_from_torch(state, params, **settings)
    for count in (4, 5):
        gradient = {name: jnp.asarray(gradient_of(value, count)) for name, value in params.items()}
        updates, ours = optimizer.update(gradient, ours, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(value) for name, value in params.items()}


def _theirs(torch: types.ModuleType, optimizer: Any, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Where two more steps of torch's lead."""
    for count in (4, 5):
        torchs_step(torch, optimizer, tensors, count)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# The tables have all that torch has.


def _classes(torch: types.ModuleType) -> dict[str, type]:
    found = {name: each for name, each in vars(torch.optim).items() if isinstance(each, type)}
    return {
        name: each for name, each in found.items() if issubclass(each, torch.optim.Optimizer) and name != "Optimizer"
    }


def test_every_optimizer_and_every_setting_and_state_of_torch_is_in_a_table(torch: types.ModuleType) -> None:
    classes = _classes(torch)
    assert classes.keys() == TABLES.keys()
    for kind in KINDS:
        for name in kind.name.split(", "):
            everything = dict.fromkeys(("amsgrad", "centered"), True) | {"momentum": 0.9}
            if kind.unequal:
                continue  # refused as it is: see test_checkpoint_optimizer.py
            plain = classes[name]([torch.ones(2)]).defaults
            groups = [("w", torch.ones(2, 3))]
            optimizer = classes[name](groups, **{key: value for key, value in everything.items() if key in plain})
            optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
            optimizer.step()
            state = optimizer.state_dict()
            assert state.keys() == STATE.keys()
            assert set(state["param_groups"][0]) | plain.keys() <= kind.table.keys(), name
            assert set(state["state"][0]) - {"step"} == kind.fields.keys(), name


def test_what_every_schedule_of_torch_puts_into_the_groups_is_in_a_table(torch: types.ModuleType) -> None:
    schedules = torch.optim.lr_scheduler
    settings: dict[str, dict[str, Any]] = {
        "LambdaLR": {"lr_lambda": lambda step: 1.0},
        "MultiplicativeLR": {"lr_lambda": lambda step: 1.0},
        "StepLR": {"step_size": 2},
        "MultiStepLR": {"milestones": [2]},
        "ExponentialLR": {"gamma": 0.9},
        "CosineAnnealingLR": {"T_max": 3},
        "CosineAnnealingWarmRestarts": {"T_0": 3},
        "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
        "OneCycleLR": {"max_lr": 0.2, "total_steps": 5},
        "SequentialLR": {},
        "ChainedScheduler": {},
    }
    made, seen = set(), set()
    for name, each in {**vars(schedules), **vars(torch.optim.swa_utils)}.items():
        if not (isinstance(each, type) and issubclass(each, schedules.LRScheduler)) or name in (
            "LRScheduler",
            "_LRScheduler",
        ):
            continue
        optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1, momentum=0.9)
        first = schedules.ConstantLR(optimizer)
        more: Any = {"SequentialLR": ([first], [])}.get(name, ())
        if name == "ChainedScheduler":
            each([first])
        elif name == "SequentialLR":
            each(optimizer, [first, schedules.ConstantLR(optimizer)], [2])
        elif name == "SWALR":
            each(optimizer, 0.1, *more)
        else:
            each(optimizer, **settings.get(name, {}))
        made.add(name)
        seen |= optimizer.param_groups[0].keys()
    assert {"OneCycleLR", "CyclicLR", "SWALR", "ReduceLROnPlateau"} <= made
    assert {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"} <= seen
    assert seen <= TABLES["SGD"].keys()


# The walk: each setting with another value.


def _other(torch: types.ModuleType, name: str, key: str) -> Any:
    """Another value of a setting."""
    default = getattr(torch.optim, name)([torch.ones(2)], lr=0.05).defaults.get(key)
    match default:
        case bool():
            return not default
        case None:
            return True
        case float() if key == "lr":
            return torch.tensor([0.02], dtype=torch.float64)  # of one axis, as torch allows it
        case tuple():
            return tuple(value * 0.9 for value in default)
        case float() | int():
            return default * 0.9 or 0.3
    raise AssertionError(f"no other value of {name}'s {key}={default!r} is tried")


@pytest.mark.parametrize(("name", "key"), ROWS)
def test_a_setting_with_another_value(torch: types.ModuleType, name: str, key: str) -> None:
    row = TABLES[name][key]
    base = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    if key in ("params", "param_names"):  # the same parameters in another order, by name if there are names

        def groups(tensors: dict[str, Any]) -> list[Any]:
            order = ("v", "w", "b") if key == "param_names" else tuple(SHAPES)
            return [(each, tensors[each]) if key == "param_names" else tensors[each] for each in order]

        optimizer, tensors = _made(torch, name, groups, **base)
        state = copy.deepcopy(optimizer.state_dict())
        assert_close(_two_steps(state, tensors), _theirs(torch, optimizer, tensors))
        return
    value, known = _other(torch, name, key), getattr(torch.optim, name)([torch.ones(2)]).defaults
    if key == "decoupled_weight_decay" and name == "AdamW":
        value = True  # in AdamW it is no choice
    known = {each for each in known if (name, each) != ("AdamW", "decoupled_weight_decay")}
    known -= {"capturable"}  # torch refuses it on a CPU
    optimizer, tensors = _made(torch, name, **base | ({key: value} if key in known else {}))
    state = copy.deepcopy(optimizer.state_dict())
    if key not in known:  # of a schedule, or of another optimizer: torch ignores it
        state["param_groups"][0][key] = value
    if row.use == "warned":
        with pytest.warns(UserWarning, match=f"{key}=.*\nthe momentum stays at its last value"):
            found = _two_steps(state, tensors)
        assert_close(found, _theirs(torch, optimizer, tensors))
        return
    if row.use == "refused":
        with pytest.raises(CheckpointError, match=f"{key}=True\ntorch's has none: remove it from param_groups"):
            _two_steps(state, tensors)
        del state["param_groups"][0][key]
    if key == "dampening":
        with pytest.raises(CheckpointError, match="to train on without it, set it to 0 in param_groups"):
            _two_steps(state, tensors)
        for group in (*state["param_groups"], *optimizer.param_groups):
            group["dampening"] = 0
    found = _two_steps(state, tensors)
    assert_close(found, _theirs(torch, optimizer, tensors), atol=1e-6 if key == "differentiable" else 1e-12)


def test_the_remedy_for_a_schedule_of_the_momentum(torch: types.ModuleType) -> None:
    for cycled in (True, False):
        optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1, momentum=0.9)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=5, cycle_momentum=cycled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.optax_from_torch(optimizer.state_dict(), {"w": np.ones(2)})
        assert len(caught) == 2 * cycled
        assert all("cycle_momentum=False" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("name", "key"), STATES)
def test_a_state_with_another_value(torch: types.ModuleType, name: str, key: str) -> None:
    plain = getattr(torch.optim, name)([torch.ones(2)]).defaults
    everything = {"amsgrad": True, "centered": True, "momentum": 0.5, "lr_decay": 0.1}
    optimizer, tensors = _made(torch, name, lr=0.05, **{k: v for k, v in everything.items() if k in plain})
    before = copy.deepcopy(optimizer.state_dict())
    changed = copy.deepcopy(before)
    for kept in changed["state"].values():
        if key == "step" and key not in kept:
            assert name == "SGD"
            return
        kept[key] = kept[key] + 2 if key == "step" else kept[key] * 1.1
    optimizer.load_state_dict(copy.deepcopy(changed))
    found = _two_steps(changed, tensors)
    # RAdam uses it from its sixth step on; of the others, only Adagrad's lr_decay goes by the step.
    if (name, key) not in (("RMSprop", "step"), ("Adadelta", "step"), ("RAdam", "exp_avg_sq")):
        assert any(np.abs(found[each] - value).max() > 1e-7 for each, value in _two_steps(before, tensors).items())
    assert_close(found, _theirs(torch, optimizer, tensors))


# Each finding.


class Alike(nnx.Module):
    """Biases of one shape, in another order than torch's."""

    def __init__(self) -> None:
        for name in SHAPES:
            setattr(self, name, nnx.Param(jnp.zeros(SHAPES[name])))


def _loaded(tensors: dict[str, Any]) -> Alike:
    ours = Alike()
    jaxrnn.load_state_dict(ours, {name: tensor.numpy() for name, tensor in tensors.items()})
    return ours


def _nnx_steps(state: Any, tensors: dict[str, Any], **settings: Any) -> dict[str, np.ndarray]:
    ours = _loaded(tensors)
    optimizer = checkpoint.optimizer_from_torch(state, ours, **settings)
    for count in (4, 5):
        gradient = nnx.state(_loaded({n: _Numbers(gradient_of(v, count)) for n, v in jaxrnn.state_dict(ours).items()}))
        optimizer.update(ours, gradient)
    return jaxrnn.state_dict(ours)


class _Numbers:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def numpy(self) -> np.ndarray:
        return self.array


def _swapped(tensors: dict[str, Any], prefix: str = "") -> list[Any]:
    return [(prefix + name, tensors[name]) for name in ("v", "b", "w")]


@pytest.mark.parametrize("names", [None, ["w", "b", "v"], ["b", "w", "v"]])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model._orig_mod."])
def test_the_names_of_torchs_groups_are_used(torch: types.ModuleType, prefix: str, names: list | None) -> None:
    optimizer, tensors = _made(torch, "Adam", lambda tensors: _swapped(tensors, prefix), lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    settings: dict[str, Any] = {"prefix": "model."} if prefix.startswith("model.") else {}
    names = [prefix + name for name in names] if names else None
    found = _nnx_steps(state, tensors, names=names, **settings)
    assert_close(found, _theirs(torch, optimizer, tensors))


def test_named_groups_of_plain_sgd(torch: types.ModuleType) -> None:
    def groups(tensors: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [("v", tensors["v"])], "lr": 0.5}, {"params": _swapped(tensors)[1:]}]

    optimizer, tensors = _made(torch, "SGD", groups, lr=0.05)
    state, before = optimizer.state_dict(), copy.deepcopy(tensors)
    expected = _theirs(torch, optimizer, tensors)
    for names in (None, ["w", "b", "v"], ["v", "b", "w"]):
        assert_close(_two_steps(state, before, names=names), expected)


def test_names_that_contradict_torchs(torch: types.ModuleType) -> None:
    optimizer, tensors = _made(torch, "Adam", _swapped, lr=0.05)
    state = optimizer.state_dict()
    params = {"first": tensors["v"].numpy(), "b": tensors["b"].numpy(), "w": tensors["w"].numpy()}
    checkpoint.optax_from_torch(state, params, ["first", "b", "w"])  # another name for one
    with pytest.raises(CheckpointError, match="names and torch's param_names say different places for b\n"):
        checkpoint.optax_from_torch(state, params, ["b", "first", "w"])
    with pytest.raises(CheckpointError, match=r"torch's param_names have v, which the module does not.*\ngive names="):
        checkpoint.optax_from_torch(state, params)
    others = {f"x{count}": array for count, array in enumerate(params.values())}
    with pytest.warns(UserWarning, match=r"names in torch's param_groups are not the module's: v, b, w\. They"):
        checkpoint.optax_from_torch(state, others)
    checkpoint.optax_from_torch(state, others, list(others))  # as the warning says
    with pytest.raises(CheckpointError, match="has 3 parameters, and there are 1 names: w"):
        checkpoint.optax_from_torch(state, params, ["w"])
    twice = copy.deepcopy(state)
    twice["param_groups"][0]["param_names"] = ["b", "b", "w"]
    with pytest.raises(CheckpointError, match="number 0 and number 1 are both read as b\ngive names="):
        checkpoint.optax_from_torch(twice, params)
    checkpoint.optax_from_torch(twice, params, list(params))
    twice["param_groups"][0]["param_names"] = ["b"]
    with pytest.raises(CheckpointError, match="a group has 3 parameters, and 1 param_names\ngive names="):
        checkpoint.optax_from_torch(twice, params)


def test_names_as_keys(torch: types.ModuleType) -> None:
    """As torch.distributed.checkpoint.state_dict and FSDP have them."""
    optimizer, tensors = _made(torch, "Adam", _swapped, lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    [group] = state["param_groups"]
    names = dict(zip(group["params"], group.pop("param_names"), strict=True))
    group["params"] = list(names.values())
    state["state"] = {names[index]: kept for index, kept in state["state"].items()}
    assert_close(_two_steps(state, tensors), _theirs(torch, optimizer, tensors))


def test_a_group_without_momentum_trains(torch: types.ModuleType) -> None:
    def groups(tensors: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [tensors["w"]], "momentum": 0.9}, {"params": [tensors["b"], tensors["v"]], "momentum": 0}]

    optimizer, tensors = _made(torch, "SGD", groups, lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    found = _two_steps(state, tensors)
    before = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    assert_close(found, _theirs(torch, optimizer, tensors))
    assert all(np.abs(found[name] - before[name]).max() > 1e-3 for name in before)
    state["state"] = {}  # before the first step
    assert set(_two_steps(state, tensors)) == set(SHAPES)
    group = state["param_groups"][0]
    group["params"], state["param_groups"][1]["params"] = [0, 1], [2]
    state["state"] = {0: {"momentum_buffer": torch.zeros(2, 3)}}
    with pytest.warns(UserWarning, match="^b are not trained: torch's optimizer has made no step"):
        found = _two_steps(state, tensors)
    assert_close(found["b"], tensors["b"].numpy())


def test_dampening_without_momentum_changes_nothing(torch: types.ModuleType) -> None:
    optimizer, tensors = _made(torch, "SGD", lr=0.05, dampening=0.5)
    state = optimizer.state_dict()
    assert_close(_two_steps(state, tensors), _theirs(torch, optimizer, tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.update(lookahead={"k": 5}),
            r"^the state dict has lookahead=\{'k': 5\}\ntorch.optim's own",
        ),
        (
            lambda state: state["param_groups"][0].update(caution=False),
            "param_groups of torch's SGD have caution=False\n",
        ),
        (lambda state: state["param_groups"][0].update(trust_coefficient=0.1), "SGD have trust_coefficient=0.1\n"),
    ],
)
def test_settings_that_torch_does_not_have_are_named(
    torch: types.ModuleType, change: Callable[[Any], None], words: str
) -> None:
    optimizer, tensors = _made(torch, "SGD", lr=0.05)
    state = optimizer.state_dict()
    change(state)
    with pytest.warns(UserWarning, match=words):
        found = _two_steps(state, tensors)
    assert_close(found, _theirs(torch, optimizer, tensors))


def test_moments_of_no_parameter(torch: types.ModuleType) -> None:
    optimizer, tensors = _made(torch, "Adam", lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    text = {**state, "state": {str(index): kept for index, kept in state["state"].items()}}  # as JSON has it
    with pytest.raises(CheckpointError, match="are text, and those of param_groups numbers\n") as caught:
        _two_steps(text, tensors)
    exec(str(caught.value).partition("give numbers: ")[2], {"state": text})
    assert_close(_two_steps(text, tensors), _two_steps(state, tensors), atol=0)
    state["state"]["global"] = {"step": 3}
    with pytest.raises(CheckpointError, match="state has moments under 'global', which are in no group"):
        _two_steps(state, tensors)
    del state["state"]["global"], state["param_groups"][0]["eps"]
    with pytest.raises(CheckpointError, match="group 0 of torch's Adam, AdamW has no 'eps'\ngive torch's optimizer"):
        _two_steps(state, tensors)


@pytest.mark.parametrize("names", [None, ["w", "v", "b"]])
def test_groups_that_were_rearranged(torch: types.ModuleType, names: list[str] | None) -> None:
    """Parameters go by torch's numbers, or by names in the new order. Two of them have one shape."""
    optimizer, tensors = _made(torch, "Adam", lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] += 2
    optimizer.load_state_dict(copy.deepcopy(state))
    with pytest.raises(CheckpointError, match="separate groups of param_groups, and names=, if you give it, into the"):
        _two_steps(state, tensors)
    [group] = state["param_groups"]
    state["param_groups"] = [{**group, "params": [0, 2]}, {**group, "params": [1]}]
    found = _two_steps(state, tensors, names=names)
    assert_close(found, _theirs(torch, optimizer, tensors))


def test_names_that_repeat(torch: types.ModuleType) -> None:
    optimizer, tensors = _made(torch, "Adam", lr=0.05)
    for read in (_two_steps, _nnx_steps):
        with pytest.raises(CheckpointError, match="are both read as b\ngive each name once"):
            read(optimizer.state_dict(), tensors, names=["w", "b", "b"])


def test_steps_made_and_an_empty_group(torch: types.ModuleType) -> None:
    def groups(tensors: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": []}, {"params": list(tensors.values())}]

    optimizer, tensors = _made(torch, "Adam", groups, lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"steps_made=100, and torch's state says 3 of group 1\nleave out"):
        _two_steps(state, tensors, steps_made=100)
    found = _two_steps(state, tensors, learning_rate=lambda count: 0.05, steps_made=3)
    assert_close(found, _two_steps(state, tensors, learning_rate=lambda count: 0.05))
    assert_close(found, _theirs(torch, optimizer, tensors))


@pytest.mark.parametrize(
    ("number", "words"),
    [(float("nan"), "^NaN or infinite numbers in exp_avg_sq of w\n"), (1e6, "^numbers in exp_avg_sq of w become inf")],
)
def test_numbers_of_moments_that_do_not_fit(torch: types.ModuleType, number: float, words: str) -> None:
    optimizer, tensors = _made(torch, "Adam", lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg_sq"][0, 0] = number
    params = {name: jnp.asarray(tensor.numpy(), jnp.float16) for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match=words) as caught:
        checkpoint.optax_from_torch(state, params)
    assert len(caught) == 1
    if np.isfinite(number):  # as the warning says
        checkpoint.optax_from_torch(state, {name: value.astype(jnp.float32) for name, value in params.items()})


def test_adamax_before_its_firsttorchs_step(torch: types.ModuleType) -> None:
    state = torch.optim.Adamax([torch.ones(2)]).state_dict()
    with pytest.raises(
        CheckpointError, match=r"may be Adamax before its first step.*\nmake a step .* start a new .*optax.adamax"
    ):
        checkpoint.optax_from_torch(state, {"w": np.ones(2)})


ADAM = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "params": [0]}


@pytest.mark.parametrize(
    ("state", "groups", "cause"),
    [
        ({}, 3, "param_groups is of type int"),
        ([], [ADAM], "state is of type list"),
        ({}, ["a"], "group 0 is of type str"),
        ({}, [ADAM | {"params": 3}], "params of group 0 is of type int"),
        ({}, [ADAM | {"params": [[]]}], "a parameter of group 0 is of type list"),
        ({}, [ADAM | {"params": ["w", 1]}], "a parameter of group 0 is of type int"),
        ({}, [ADAM | {"param_names": [1]}], "a name of group 0 is of type int"),
        ({}, [ADAM | {"param_names": 1}], "param_names of group 0 is of type int"),
        ({0: [1]}, [ADAM], "what it keeps of parameter 0 is of type list"),
        ({0: {"step": np.ones(2)}}, [ADAM], "step should be one number: "),
        ({0: {"step": 2**40}}, [ADAM], "step should be a number of steps, got 1099511627776.0"),
        ({0: {"step": float("nan")}}, [ADAM], "step should be a number of steps, got nan"),
        ({}, [ADAM | {"betas": [0.9]}], r"betas should be two numbers, got \[0.9\]"),
        ({}, [ADAM | {"betas": 0.9}], "betas should be two numbers, got 0.9"),
        ({}, [ADAM | {"eps": np.ones(2)}], "a setting should be one number: "),
    ],
)
def test_what_is_no_state_dict(state: Any, groups: Any, cause: str) -> None:
    with pytest.raises(CheckpointError, match=f"^.*{cause}.*\ngive torch's optimizer.state_dict"):
        checkpoint.optax_from_torch({"state": state, "param_groups": groups}, {"w": np.ones(2)})
