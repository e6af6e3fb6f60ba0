"""Training goes to optax and back to torch: what is written is what torch itself would have."""

import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables
from torch_steps import SHAPES, gradient_of

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")
EVERY: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"betas": (0.8, 0.95)}),
    ("Adam", {"amsgrad": True, "betas": (0.9, 0.5)}),
    ("AdamW", {"amsgrad": True, "maximize": True}),
    ("AdamW", {}),
    ("Adamax", {}),
    ("RAdam", {"decoupled_weight_decay": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adagrad", {"initial_accumulator_value": 0.2}),
    ("Adagrad", {"lr_decay": 0.3}),
    ("Adadelta", {"rho": 0.8}),
]
WAYS = ["one group", "two groups", "frozen", "schedule"]


def _of_torch(torch: types.ModuleType, kind: str, settings: dict[str, Any], way: str) -> tuple[dict[str, Any], Any]:
    theirs = {k: torch.nn.Parameter(torch.tensor(np.random.RandomState(0).randn(*s))) for k, s in SHAPES.items()}
    w, b, v = theirs.values()
    settings = {"weight_decay": 0.1, **settings}
    groups = [{"params": [w]}, {"params": [b, v], "lr": 0.03}] if way == "two groups" else [w, b, v]
    return theirs, getattr(torch.optim, kind)(groups, lr=0.1, **settings)


def _their_step(torch: types.ModuleType, optimizer: Any, theirs: dict[str, Any], count: int, way: str) -> None:
    """A step of torch, in which a frozen parameter has no gradient."""
    if way == "schedule":
        optimizer.param_groups[0]["lr"] = 0.1 * 0.9 ** (count - 1)
    for name, tensor in theirs.items():
        tensor.grad = None if way == "frozen" and name == "b" else torch.tensor(gradient_of(tensor.detach(), count))
    optimizer.step()


def _loadable(torch: types.ModuleType, written: Any) -> Any:
    """As the guide does it."""
    return jax.tree.map(lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, written)


def _assert_same(torch: types.ModuleType, one: Any, other: Any, atol: float = 0) -> None:
    """Two state dicts of torch: the same keys, types and numbers."""
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, kept in one["state"].items():
        assert kept.keys() == other["state"][index].keys()
        for name, value in kept.items():
            there = other["state"][index][name]
            assert (value.dtype, value.shape) == (there.dtype, there.shape), name
            torch.testing.assert_close(value, there, rtol=0, atol=atol)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "settings", "way"),
    [
        pytest.param(kind, settings, way, id=f"{kind}-{settings}-{way}")
        for (kind, settings), way in itertools.product(EVERY, WAYS)
        if (kind, settings, way) != ("SGD", {}, "frozen")  # which has no state that tells what is frozen
    ],
)
@pytest.mark.filterwarnings("ignore:b are not trained")
def test_there_and_back_as_in_torch_alone(
    torch: types.ModuleType, kind: str, settings: dict[str, Any], way: str
) -> None:
    alone, alone_optimizer = _of_torch(torch, kind, settings, way)
    for count in (1, 2, 3):
        _their_step(torch, alone_optimizer, alone, count, way)
    start = alone_optimizer.state_dict()
    params = {name: jnp.array(value.detach().numpy()) for name, value in alone.items()}
    rate = (lambda count: 0.1 * 0.9**count) if way == "schedule" else None
    ours, state = checkpoint.optax_from_torch(start, params, learning_rate=rate, steps_made=3 if rate else None)

    # What was read is written, and read again, unchanged.
    def written(steps: int) -> Any:
        return checkpoint.optax_to_torch(state, start, params, names=list(SHAPES), learning_rate=rate, steps_made=steps)

    same = _loadable(torch, written(3))
    if way == "schedule":
        assert same["param_groups"][0].pop("lr") == pytest.approx(0.1 * 0.9**3)  # of the next step
        _assert_same(
            torch, same, start | {"param_groups": [{k: v for k, v in start["param_groups"][0].items() if k != "lr"}]}
        )
    else:
        _assert_same(torch, same, start)
        jax.tree.map(np.testing.assert_array_equal, checkpoint.optax_from_torch(same, params, list(SHAPES))[1], state)

    for count in (4, 5):
        _their_step(torch, alone_optimizer, alone, count, way)
        gradient = {name: jnp.array(gradient_of(value, count)) for name, value in params.items()}
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    theirs, optimizer = _of_torch(torch, kind, settings, way)
    with torch.no_grad():
        for name, value in params.items():
            theirs[name].copy_(torch.tensor(np.asarray(value)))
    optimizer.load_state_dict(_loadable(torch, written(5)))
    for count in (6, 7):
        _their_step(torch, alone_optimizer, alone, count, way)
        _their_step(torch, optimizer, theirs, count, way)
        gradient = {name: jnp.array(gradient_of(value, count)) for name, value in params.items()}
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    expected = {name: value.detach().numpy() for name, value in alone.items()}
    assert_close({name: value.detach().numpy() for name, value in theirs.items()}, expected, atol=1e-12)
    assert_close(params, expected, atol=1e-12)
    end = alone_optimizer.state_dict()
    again = _loadable(torch, written(7))
    if way == "schedule":
        end["param_groups"][0]["lr"] = again["param_groups"][0]["lr"]
    _assert_same(torch, again, end, atol=1e-12)


PLAIN: dict[str, tuple[str, dict[str, Any], Callable[[], optax.GradientTransformation]]] = {
    "sgd": ("SGD", {}, lambda: optax.sgd(0.1)),
    "momentum": ("SGD", {"momentum": 0.9}, lambda: optax.sgd(0.1, momentum=0.9)),
    "adam": ("Adam", {}, lambda: optax.adam(0.1)),
    "adamw": ("AdamW", {"weight_decay": 0.1}, lambda: optax.adamw(0.1, weight_decay=0.1)),
    "clipped": ("Adam", {}, lambda: optax.chain(checkpoint.clip_grad_norm(1e9), optax.adam(0.1))),
    "rmsprop": ("RMSprop", {}, lambda: optax.rmsprop(0.1, decay=0.99, eps_in_sqrt=False)),
    "named": ("Adam", {}, lambda: optax.named_chain(("moments", optax.scale_by_adam()), ("rate", optax.scale(-0.1)))),
}


class Model(nnx.Module):
    """Parameters in torch's order, a layer with another layout than torch's, and statistics."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.rnn = jaxrnn.LSTM(2, 4, param_dtype=jnp.float64, rngs=rngs)
        self.head = nnx.Linear(4, 1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.rnn(x)[0])


def _theirs(torch: types.ModuleType) -> Any:
    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(2, 4)
            self.head = torch.nn.Linear(4, 1)

        def forward(self, x: Any) -> Any:
            return self.head(self.rnn(x)[0])

    return Theirs().double()


X = np.random.RandomState(0).randn(5, 3, 2)


@nnx.jit
@nnx.grad
def _gradient(model: Model) -> jax.Array:
    return jnp.mean(model(X) ** 2)


@pytest.mark.torch
@pytest.mark.parametrize("name", PLAIN)
def test_optimizers_of_optax_go_on_in_torch(torch: types.ModuleType, name: str, tmp_path: Path) -> None:
    """Begun in JAX, with an optimizer that our reader did not make."""
    kind, settings, make = PLAIN[name]
    ours, theirs = filled(Model), _theirs(torch)
    optimizer = nnx.Optimizer(ours, make(), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(ours, _gradient(ours))
    fresh = getattr(torch.optim, kind)(theirs.parameters(), lr=0.1, **settings)
    names = list(theirs.state_dict())
    with pytest.raises(CheckpointError, match="the order of head, rnn may not be torch's"):  # Flax has sorted them
        checkpoint.optimizer_to_torch(optimizer, fresh.state_dict(), ours)
    written = checkpoint.optimizer_to_torch(optimizer, fresh.state_dict(), ours, names)
    checkpoint.save_tree(tmp_path / "run.pt", {"model": jaxrnn.state_dict(ours), "optimizer": written, "epoch": 3})
    run = torch.load(tmp_path / "run.pt")
    assert run["epoch"] == 3
    theirs.load_state_dict(run["model"])
    fresh.load_state_dict(run["optimizer"])
    _assert_same(torch, fresh.state_dict(), run["optimizer"])
    for _ in range(2):
        fresh.zero_grad()
        (theirs(torch.tensor(X)) ** 2).mean().backward()
        fresh.step()
        optimizer.update(ours, _gradient(ours))
    expected = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    assert_close(jaxrnn.state_dict(ours), expected, atol=1e-12)
    end = checkpoint.optimizer_to_torch(optimizer, fresh.state_dict(), ours, names)
    _assert_same(torch, _loadable(torch, end), fresh.state_dict(), atol=1e-12)
    new = nnx.Optimizer(ours, make(), wrt=nnx.Param)
    assert not checkpoint.optimizer_to_torch(new, written | {"state": {}}, ours, names)["state"]


GROUP = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "decoupled_weight_decay": False}
ADAM = {"state": {}, "param_groups": [GROUP | {"amsgrad": False, "maximize": False, "params": [0, 1]}]}
RMSPROP = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False, "params": [0, 1]}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
NAMES = ["a", "b"]
PARAMS = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(3)}


def _of(*groups: dict[str, Any], **state: Any) -> dict[str, Any]:
    return {"state": state, "param_groups": [*groups]}


def _counts(*counts: int) -> Any:
    adam, rate = optax.adam(optax.constant_schedule(0.1)).init(PARAMS)
    return tuple(each._replace(count=jnp.array(count)) for each, count in zip((adam, rate), counts, strict=True))


AMSGRAD = _of(ADAM["param_groups"][0] | {"amsgrad": True})
RATE = {"learning_rate": lambda count: 0.1}
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "another optimizer": (optax.sgd(0.1, 0.9), ADAM, {}, "has trace of a, and should have mu, nu for torch's Adam, Ad"),
    "no moments": (optax.sgd(0.1), ADAM, {}, "has no mu, nu of a, b, which torch's Adam, AdamW has"),
    "too many": (optax.adam(0.1), _of(SGD | {"momentum": 0}), {}, "has mu, nu of a, and should have nothing for torch"),
    "optax's amsgrad": (optax.amsgrad(0.1), AMSGRAD, {}, "has mu, nu, nu_max of a, and should have mu, nu, max_nu for"),
    "another amsgrad": (
        optax.amsgrad(0.1),
        ADAM,
        {},
        "has mu, nu, nu_max of a, and should have mu, nu for torch's Adam",
    ),
    "a schedule": (optax.adam(lambda count: 0.1), ADAM, {}, r"counts the steps of a schedule.*\ngive the schedule"),
    "no count": (optax.rmsprop(0.1), _of(RMSPROP), {}, r"does not say how many steps RMSprop has made.*\ngive the num"),
    "no count for a rate": (optax.sgd(0.1, 0.9), _of(SGD), RATE, "which the schedule needs"),
    "fewer steps": (optax.rmsprop(0.1), _of(RMSPROP), {"steps_made": -1}, "steps_made=-1, and torch had made 0"),
    "wrapped": (optax.apply_if_finite(optax.adam(0.1), 3), ADAM, {}, r"has \.notfinite_count.*\n.*its inner_state"),
    "injected": (optax.inject_hyperparams(optax.adam)(0.1), ADAM, {}, r"has \.hyperparams.*\n.*its inner_state"),
    "no order": (optax.adam(0.1), ADAM, {"names": None}, r"the order of a, b may not be torch's.*\ngive names="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_has_no_place_for(name: str) -> None:
    optimizer, settings, more, words = REFUSED[name]
    with pytest.raises(CheckpointError, match=rf"(?s)^.*{words}"):
        checkpoint.optax_to_torch(optimizer.init(PARAMS), settings, PARAMS, **{"names": ["a", "b"], **more})


def test_states_that_contradict_themselves_or_the_parameters() -> None:
    with pytest.raises(CheckpointError, match="different numbers of steps for a, 3, 4\n"):
        checkpoint.optax_to_torch(_counts(3, 4), ADAM, PARAMS, NAMES, learning_rate=0.1)
    written = checkpoint.optax_to_torch(_counts(3, 3), ADAM, PARAMS, NAMES, learning_rate=lambda count: 0.5**count)
    assert written["param_groups"][0]["lr"] == 0.125
    assert written["state"][0]["step"] == 3
    other = optax.adam(0.1).init({"a": jnp.zeros((3, 2)), "b": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match=r"mu of a is \(3, 2\), should be \(2, 3\)\ngive the parameters"):
        checkpoint.optax_to_torch(other, ADAM, PARAMS, NAMES)
    with pytest.raises(CheckpointError, match=r"has \[0\]\.mu\['c'\], for which torch's has no place"):
        checkpoint.optax_to_torch(optax.adam(0.1).init({"c": jnp.zeros(3)}), ADAM, PARAMS, NAMES)
    with pytest.raises(CheckpointError, match="steps_made=5, and optax's state says 3\n"):
        checkpoint.optax_to_torch(_counts(3, 3), ADAM, PARAMS, NAMES, learning_rate=0.1, steps_made=5)


def test_the_remedies_work() -> None:
    state = optax.inject_hyperparams(optax.adam)(0.1).init(PARAMS)
    assert checkpoint.optax_to_torch(state.inner_state, ADAM, PARAMS, NAMES)["state"] == {}
    written = checkpoint.optax_to_torch(optax.rmsprop(0.1).init(PARAMS), _of(RMSPROP), PARAMS, NAMES, steps_made=7)
    assert [kept["step"] for kept in written["state"].values()] == [7, 7]
    model = filled(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.apply_if_finite(optax.adam(0.1), 3), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2)).sum())(model))
    with pytest.raises(CheckpointError, match="its inner_state"):
        checkpoint.optimizer_to_torch(optimizer, ADAM, model)
    written = checkpoint.optimizer_to_torch(optimizer.opt_state.inner_state, ADAM, model)
    assert written["state"][0]["exp_avg"].shape == (3, 2)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["Adam", "RMSprop"])  # optax counts the steps of the first alone
def test_groups_with_steps_of_their_own(torch: types.ModuleType, kind: str) -> None:
    theirs = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
    optimizer = getattr(torch.optim, kind)([{"params": [each]} for each in theirs])
    for step in range(5):
        for each in theirs[: 2 if step < 2 else 1]:  # the second gets gradients for two steps alone
            each.grad = torch.ones(each.shape)
        optimizer.step()
        optimizer.zero_grad()
    model = nnx.Dict(a=nnx.Param(PARAMS["a"]), b=nnx.Param(PARAMS["b"]))
    ours = checkpoint.optimizer_from_torch(optimizer.state_dict(), model)
    ours.update(model, nnx.state(model))
    written = checkpoint.optimizer_to_torch(ours, optimizer.state_dict(), model, NAMES)
    assert [kept["step"] for kept in written["state"].values()] == [6, 3]


def test_masked_parameters_keep_what_torch_had() -> None:
    frozen = {"step": np.float32(2), "exp_avg": np.ones(3, "f4"), "exp_avg_sq": np.ones(3, "f4")}
    settings = {**ADAM, "state": {1: frozen}}
    state = optax.masked(optax.adam(0.1), {"a": True, "b": False}).init(PARAMS)
    state = jax.tree.map(lambda leaf: leaf + 4 if leaf.ndim == 0 else leaf, state)
    with pytest.raises(CheckpointError, match="trains a, with which torch's optimizer has made no step"):
        checkpoint.optax_to_torch(state, settings, PARAMS)
    settings["state"][0] = frozen | {"exp_avg": np.ones((2, 3), "f4"), "exp_avg_sq": np.ones((2, 3), "f4")}
    written = checkpoint.optax_to_torch(state, settings, PARAMS)
    assert written["state"][0]["step"] == 4
    assert not written["state"][0]["exp_avg"].any()
    jax.tree.map(np.testing.assert_array_equal, written["state"][1], frozen)


def test_linen_and_older_files() -> None:
    class Ours(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4, name="head")(x)

    x = jnp.ones((2, 3))
    variables = filled_variables(Ours(), x)
    optimizer = optax.adam(0.1)
    _, state = optimizer.update(variables["params"], optimizer.init(variables["params"]), variables["params"])
    written = checkpoint.linen.optax_to_torch(state, ADAM, Ours(), variables, x, names=["head.weight", "head.bias"])
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    assert_close(written["state"][0]["exp_avg"], 0.1 * kernel.T, atol=1e-7)
    assert written["state"][0]["step"].dtype == np.float32
    older = {**ADAM, "state": {n: {**kept, "step": 1} for n, kept in written["state"].items()}}  # as before torch 1.12
    assert checkpoint.linen.optax_to_torch(state, older, Ours(), variables, x)["state"][0]["step"] == 1
    new = checkpoint.linen.optax_from_torch(older, Ours(), variables, x)[1]
    assert type(checkpoint.linen.optax_to_torch(new, older, Ours(), variables, x)["state"][0]["step"]) is int
