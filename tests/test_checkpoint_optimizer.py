"""Training goes on in optax where torch stopped: torch's next steps and ours are the same."""

import operator
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled_variables
from torch_steps import SHAPES, gradient_of, torchs_step

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam with decay": ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
}
X = np.random.RandomState(0).randn(7, 3, 2)


class Model(nnx.Module):
    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.rnn = jaxrnn.LSTM(2, 4, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, param_dtype=jnp.float64, use_running_average=True, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(4, 1, param_dtype=jnp.float64, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(self.rnn(x)[0]))


def _theirs(torch: types.ModuleType) -> Any:
    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(2, 4)
            self.norm = torch.nn.BatchNorm1d(4)
            self.head = torch.nn.Sequential(torch.nn.Linear(4, 1))

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(self.rnn(x)[0].transpose(1, 2)).transpose(1, 2))

    torch.manual_seed(0)
    return Theirs().double().eval()


@nnx.jit  # compiled once for all optimizers
@nnx.grad
def _gradient(model: Model) -> jax.Array:
    return jnp.mean(model(X) ** 2)


def _step(theirs: Any, optimizer: Any, torch: types.ModuleType) -> None:
    optimizer.zero_grad()
    (theirs(torch.tensor(X)) ** 2).mean().backward()
    optimizer.step()


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("sgd", "adam") else n for n in OPTIMIZERS]
)
def test_the_next_steps_are_torchs(torch: types.ModuleType, name: str, tmp_path: Path) -> None:
    kind, settings = OPTIMIZERS[name]
    theirs = _theirs(torch)
    optimizer = getattr(torch.optim, kind)(theirs.parameters(), **settings)
    for _ in range(3):
        _step(theirs, optimizer, torch)
    torch.save({"model": theirs.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "a.pt")

    ours = Model(1)
    jaxrnn.load_state_dict(ours, checkpoint.load(tmp_path / "a.pt"))
    resumed = checkpoint.optimizer_from_torch(checkpoint.load_tree(tmp_path / "a.pt", "optimizer"), ours)
    assert int(resumed.step[...]) == (0 if kind == "SGD" else 3)

    update = nnx.jit(lambda optimizer, model, gradient: optimizer.update(model, gradient))
    for _ in range(5):
        _step(theirs, optimizer, torch)
        update(resumed, ours, _gradient(ours))
    for key, value in jaxrnn.state_dict(ours).items():
        atol = 1e-7 if "running" in key else 1e-12
        assert_close({key: value}, {key: theirs.state_dict()[key].numpy()}, atol=atol)


CONTINUED: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"amsgrad": True, "betas": (0.9, 0.5)}),
    ("AdamW", {"amsgrad": True, "betas": (0.9, 0.5)}),
    ("Adamax", {}),
    ("RAdam", {}),
    ("RAdam", {"decoupled_weight_decay": True}),
    ("AdamW", {"maximize": True}),
    ("RMSprop", {"maximize": True}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"momentum": 0.9, "alpha": 0.8}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.3, "initial_accumulator_value": 0.2}),
    ("Adadelta", {"rho": 0.8}),
]


@pytest.mark.torch
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "settings"), CONTINUED, ids=lambda value: str(value))
def test_the_next_steps_of_every_optimizer_are_torchs(
    torch: types.ModuleType, kind: str, settings: dict[str, Any], groups: int
) -> None:
    theirs = {k: torch.nn.Parameter(torch.tensor(np.random.RandomState(0).randn(*s))) for k, s in SHAPES.items()}
    w, b, v = theirs.values()
    if groups == 2:
        settings = {"eps": 1e-3, "weight_decay": 0.1, **settings}
        optimizer = getattr(torch.optim, kind)([{"params": [w]}, {"params": [b, v], "lr": 0.03}], lr=0.1, **settings)
    else:
        optimizer = getattr(torch.optim, kind)([w, b, v], lr=0.1, weight_decay=0, **settings)

    for count in (1, 2, 3):
        torchs_step(torch, optimizer, theirs, count)
    params = {name: jnp.array(value.detach().numpy()) for name, value in theirs.items()}
    ours, state = checkpoint.optax_from_torch(optimizer.state_dict(), params)
    for count in (4, 5, 6):  # at the sixth, RAdam has seen enough to use the second moment
        torchs_step(torch, optimizer, theirs, count)
        gradient = {name: jnp.array(gradient_of(value, count)) for name, value in params.items()}
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, {name: value.detach().numpy() for name, value in theirs.items()})
    single = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    ours, state = checkpoint.optax_from_torch(optimizer.state_dict(), single, list(SHAPES))
    updates, after = jax.eval_shape(ours.update, single, state, single)
    kept = {array.dtype for array in jax.tree.leaves((updates, after)) if array.ndim}
    assert kept == {jnp.dtype("float32")}


class Alike(nnx.Module):
    """Two children whose parameters only their order tells apart, in an order that is not the alphabet's."""

    def __init__(self, first: str = "lower", second: str = "head") -> None:
        for name in (first, second):
            setattr(self, name, jaxrnn.GRU(3, 3, rngs=nnx.Rngs(0)))
        self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.out(self.lower(x)[0])


def _numbered(model: nnx.Module) -> tuple[list[str], dict[str, Any]]:
    """Names, and a state of SGD whose moments are the parameters' numbers."""
    shapes = {name: value.shape for name, value in jaxrnn.state_dict(model).items()}
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False}
    buffers = {k: {"momentum_buffer": np.full(shape, k, "float32")} for k, shape in enumerate(shapes.values())}
    return list(shapes), {"state": buffers, "param_groups": [group | {"params": list(range(len(shapes)))}]}


@pytest.mark.parametrize("lose", ["jit", "clone", "merge"])
def test_an_order_that_was_lost_is_not_guessed(lose: str) -> None:
    model = Alike()
    names, state = _numbered(model)
    checkpoint.optimizer_from_torch(state, model)
    checkpoint.optimizer_from_torch(state, Alike("head", "lower"))  # by chance that of the alphabet
    if lose == "jit":
        nnx.jit(lambda model, x: model(x))(model, np.ones((5, 3), "float32"))
    else:
        model = nnx.clone(model) if lose == "clone" else nnx.merge(*nnx.split(model))
    assert list(vars(model)) == sorted(vars(model))
    with pytest.raises(CheckpointError, match=r"the order of head, lower, out may not be torch's.*\ngive names="):
        checkpoint.optimizer_from_torch(state, model)
    optimizer = checkpoint.optimizer_from_torch(state, model, [*names, "out.bias"][:-1])
    leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(optimizer.opt_state))
    found = {jax.tree_util.keystr(path[-2:], simple=True, separator="."): leaf for path, leaf in leaves if leaf.ndim}
    for number, name in enumerate(["lower.weight_ih_l0", "lower.weight_hh_l0"]):
        assert np.all(found[name] == number)
    assert np.all(found["head.weight_ih_l0"] == 4)


def test_an_order_that_shapes_tell_is_no_matter_of_doubt() -> None:
    class Different(nnx.Module):
        def __init__(self) -> None:
            self.cell = jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))

    _, state = _numbered(nnx.Dict(cell=Different().cell, head=Different().head))
    weights = jaxrnn.state_dict(Different())
    assert "norm.running_mean" in weights
    trained = nnx.state(Different(), nnx.Param)
    count = len(jax.tree.leaves(trained))
    state["param_groups"][0]["params"] = list(range(count))
    checkpoint.optimizer_from_torch({**state, "state": {}}, Different())
    checkpoint.optimizer_from_torch({**state, "state": {}}, Different(), list(weights))  # with the buffers' names
    numbered = nnx.clone(nnx.List([jaxrnn.GRU(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)]))
    checkpoint.optimizer_from_torch(_numbered(numbered)[1], numbered)


@pytest.mark.torch
def test_groups_and_frozen_parameters_of_a_dict(torch: types.ModuleType) -> None:
    """A dict of parameters, without a module: two groups with settings of their own, and a parameter in none."""
    theirs = torch.nn.GRU(2, 3).double()
    names = ["weight_hh_l0", "weight_ih_l0", "bias_ih_l0"]
    weights, bias = [getattr(theirs, name) for name in names[:2]], [theirs.bias_ih_l0]
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.1}, {"params": bias, "weight_decay": 0}], lr=0.01)

    def their_step() -> None:
        optimizer.zero_grad()
        theirs(torch.tensor(X))[0].square().sum().backward()
        optimizer.step()

    their_step()
    optimizer.param_groups[1]["lr"] = 0.02  # as a schedule would
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3)
    params = {name: jnp.array(value.detach().numpy()) for name, value in theirs.named_parameters()}
    ours, state = checkpoint.optax_from_torch(optimizer.state_dict(), params, names)
    gradient_of = jax.jit(jax.grad(lambda params: jnp.sum(jaxrnn.apply(spec, params, X)[0] ** 2)))
    update = jax.jit(ours.update)
    for _ in range(3):
        their_step()
        gradient = gradient_of(params)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, {name: value.detach().numpy() for name, value in theirs.named_parameters()})
    schedule, state = checkpoint.optax_from_torch(optimizer.state_dict(), params, names, lambda count: 0.5**count)
    updates, _ = jax.jit(schedule.update)(gradient, state, params)
    at_rest, _ = checkpoint.optax_from_torch(optimizer.state_dict(), params, names, 1.0)
    expected, _ = jax.jit(at_rest.update)(gradient, state, params)
    a_sixteenth = np.asarray(expected["bias_ih_l0"]) / 16  # after four steps
    assert_close(updates["bias_ih_l0"], a_sixteenth, atol=0, rtol=1e-12)


@pytest.mark.torch
def test_clipping_is_torchs(torch: types.ModuleType) -> None:
    gradient = {"a": np.random.RandomState(0).randn(5), "b": np.random.RandomState(1).randn(2, 3)}
    for max_norm in (0.1, 1.0, 100.0):
        params = [torch.nn.Parameter(torch.zeros(value.shape, dtype=torch.float64)) for value in gradient.values()]
        for param, value in zip(params, gradient.values(), strict=True):
            param.grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        clip = checkpoint.clip_grad_norm(max_norm)
        clipped, _ = clip.update(jax.tree.map(jnp.asarray, gradient), clip.init(gradient))
        assert_close(clipped, dict(zip(gradient, (param.grad.numpy() for param in params), strict=True)), atol=1e-15)


def _state(**changes: Any) -> dict[str, Any]:
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}
    group |= {"amsgrad": False}
    group |= {"params": [0, 1], **changes}
    moments = {name: np.ones((12, 2)) for name in ("exp_avg", "exp_avg_sq")}
    return {"state": {0: {"step": np.array(2.0), **moments}, 1: {"step": 2}}, "param_groups": [group]}


def _sgd(**settings: Any) -> dict[str, Any]:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0, 1]}
    return {"state": {}, "param_groups": [group | settings]}


def _undecided() -> dict[str, Any]:
    """As torch wrote it before it said which of the two it is."""
    state = _state()
    del state["param_groups"][0]["decoupled_weight_decay"]
    return state


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({}, "state should be the state dict of a torch optimizer, but has no 'param_groups'"),
        (_state(params=[0]), "torch's optimizer has 1 parameters, and there are 2 names: weight_ih_l0, weight_hh_l0"),
        (_state(params=[1, 0]), r"exp_avg of weight_hh_l0 is \(12, 2\), should be \(12, 3\)"),
        (_state() | {"state": {0: {"step": 1}, 1: {"step": 2}}}, "have made different numbers of steps, "),
        (
            {"state": {}, "param_groups": [{"lr": 0.1, "alpha": 0.9, "params": [0, 1]}]},
            "the optimizer is not one of SGD, Adam, AdamW, .*: its settings are lr, alpha\nstart a new optax",
        ),
        (_sgd(dampening=0.5), "optax has no dampening, and torch's SGD has dampening=0.5\nto train on without it"),
        (
            _undecided(),
            "the optimizer may be Adam or AdamW, and its weight_decay=0.1 differs",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(state: dict, cause: str) -> None:
    params = {name: np.ones(shape) for name, shape in jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3, bias=False).shapes().items()}
    with pytest.raises(CheckpointError, match=cause):
        checkpoint.optax_from_torch(state, params)


def test_unknown_names() -> None:
    params = {name: np.ones(shape) for name, shape in jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3, bias=False).shapes().items()}
    with pytest.raises(
        CheckpointError, match="names has nobody, which the module does not have\nits parameters: weight"
    ):
        checkpoint.optax_from_torch(_state(), params, ["weight_ih_l0", "nobody"])


REFUSED = {
    "NAdam": "its momentum grows, by momentum_decay",
    "SparseAdam": "it skips the rows that a sparse gradient lacks",
    "ASGD": "it decays parameters and rate by lambd, alpha and t0",
    "Rprop": "optax.rprop makes each step one gradient later",
    "LBFGS": "it computes the loss several times a step",
    "Adafactor": "it caps the learning rate at 1 / sqrt(step)",
    "Muon": "it makes matrices orthogonal in bfloat16",
}


@pytest.mark.torch
@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_without_an_equal_are_refused(torch: types.ModuleType, name: str) -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = getattr(torch.optim, name)(weights, lr=0.1)
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}
    for stepped in (False, True):
        if stepped:
            for weight in weights:
                weight.grad = torch.ones(2, 3).to_sparse() if name == "SparseAdam" else torch.ones(2, 3)
            optimizer.step(lambda: sum(weight.detach().sum() for weight in weights))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.optax_from_torch(optimizer.state_dict(), params)
        cause, remedy = str(caught.value).split("\n")
        assert cause == f"optax has no optimizer equal to torch's {name}: {REFUSED[name]}"
    start, _, nearest = remedy.partition(", such as optax.")
    assert start == "start a new optax optimizer on the loaded parameters"
    fresh = operator.attrgetter(nearest)(optax)(0.1)
    state = fresh.init(params)
    if name != "LBFGS":  # which wants the loss, too
        for _ in range(2):  # because of Rprop's delay
            updates, state = fresh.update(params, state, params)
        assert np.all(updates["a"] < 0)


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ({"betas": (0.9, 0.999), "amsgrad": False}, "exp_avg_var"),  # AdaBelief
        ({"alpha": 0.9, "centered": False, "momentum": 0.9, "lr_in_momentum": True}, "square_avg"),  # timm's RMSpropTF
        ({"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}, "exp_avg_sq"),  # LAMB, and RAdam before torch 2.1
    ],
)
def test_what_only_resembles_an_optimizer_of_torch_is_refused(group: dict, kept: str) -> None:
    state = {"state": {0: {"step": 1, kept: np.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0], **group}]}
    with pytest.raises(CheckpointError, match=r"the optimizer is not one of .*\nstart a new optax optimizer"):
        checkpoint.optax_from_torch(state, {"w": np.ones(2)})


def test_a_schedule_has_to_know_where_it_is() -> None:
    group = {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0]}
    state, params = {"state": {}, "param_groups": [group]}, {"w": np.ones(2)}
    with pytest.raises(CheckpointError, match=r"does not say how many steps torch has made.*\ngive it: steps_made="):
        checkpoint.optax_from_torch(state, params, learning_rate=lambda count: 0.5**count)
    optimizer, resumed = checkpoint.optax_from_torch(state, params, None, lambda count: 0.5**count, steps_made=3)
    updates, _ = optimizer.update({"w": jnp.ones(2)}, resumed, params)
    assert_close(updates["w"], np.full(2, -(0.5**3)))


def _counted(lr_decay: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and parameters of Adagrad, one of which was used in the last step only."""
    group = {"lr": 0.1, "lr_decay": lr_decay, "eps": 0, "weight_decay": 0, "initial_accumulator_value": 0}
    kept = {index: {"step": np.float32(step), "sum": np.full(2, 3.0)} for index, step in enumerate((7, 1))}
    return {"state": kept, "param_groups": [group | {"params": [0, 1]}]}, {"a": np.ones(2), "b": np.ones(2)}


def test_numbers_of_steps_are_one_where_optax_counts() -> None:
    state, params = _counted(0.0)
    optimizer, resumed = checkpoint.optax_from_torch(state, params)
    updates, _ = optimizer.update(params, resumed, params)
    assert_close(updates, {name: np.full(2, -0.1 / 2) for name in params})
    state, params = _counted(0.5)
    with pytest.raises(CheckpointError, match=r"made different numbers of steps, \[1, 7\]\noptax has one count"):
        checkpoint.optax_from_torch(state, params)
    group = state["param_groups"][0]
    state["param_groups"] = [group | {"params": [0]}, group | {"params": [1]}]  # as the message says
    optimizer, resumed = checkpoint.optax_from_torch(state, params, None, lambda count: 2.0**-count)
    updates, _ = optimizer.update(params, resumed, params)
    assert_close(updates, {"a": np.full(2, -(2.0**-7) / 4.5 / 2), "b": np.full(2, -(2.0**-1) / 1.5 / 2)})


class LinenModel(linen.Module):
    boxed: bool = False

    def setup(self) -> None:
        init = linen.initializers.lecun_normal()
        init = linen.with_partitioning(init, ("in", "out")) if self.boxed else init
        self.rnn = jaxrnn.linen.LSTM(2, 4, param_dtype=jnp.float64)
        self.norm = linen.BatchNorm(momentum=0.9, param_dtype=jnp.float64, use_running_average=True)
        self.head = linen.Sequential([linen.Dense(1, param_dtype=jnp.float64, kernel_init=init)])

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(self.rnn(x)[0]))


@pytest.mark.torch
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(("kind", "grouped"), [("RMSprop", False), ("AdamW", True)])
def test_the_next_steps_of_a_linen_module_are_torchs(
    torch: types.ModuleType, kind: str, grouped: bool, boxed: bool
) -> None:
    theirs = _theirs(torch)
    named = dict(theirs.named_parameters())
    names: list[str] | None = list(theirs.state_dict()) if boxed else None  # with the statistics, which are not trained
    groups: list[dict[str, Any]] = [{"params": list(named.values())}]
    if grouped:  # in another order than the module's, and the head is frozen
        names = ["norm.weight", "norm.bias", *(name for name in named if name.startswith("rnn"))]
        groups = [{"params": [named[name] for name in names[:2]], "weight_decay": 0.0}]
        groups += [{"params": [named[name] for name in names[2:]], "lr": 0.03}]
        names = [f"model.{name}" for name in names]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.1, weight_decay=0.1)

    for count in (1, 2, 3):
        torchs_step(torch, optimizer, named, count)
    model, load = LinenModel(boxed), checkpoint.linen.load_state_dict
    variables = load(model, filled_variables(model, X), theirs.state_dict(), X).variables
    variables = linen.FrozenDict(variables) if boxed else variables
    ours, state = checkpoint.linen.optax_from_torch(
        optimizer.state_dict(), model, variables, X, names=names, prefix="model." if grouped else ""
    )
    assert isinstance(variables["params"]["head"]["layers_0"]["kernel"], linen.Partitioned) == boxed
    for count in (4, 5, 6):
        torchs_step(torch, optimizer, named, count)
        tensors = checkpoint.linen.state_dict(model, variables, X)
        tensors = {name: gradient_of(value, count) for name, value in tensors.items()}
        gradient = load(model, variables, tensors, X).variables["params"]  # which only has their layouts changed
        updates, state = ours.update(gradient, state, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
        variables = linen.FrozenDict(variables) if boxed else variables
    found = checkpoint.linen.state_dict(model, variables, X)
    assert_close({name: found[name] for name in named}, {name: value.detach().numpy() for name, value in named.items()})


class LinenAlike(linen.Module):
    """Two submodules that only their order tells apart, and layers in a list: those with these names are called."""

    calls: tuple[str | int, ...]

    def setup(self) -> None:
        self.lower, self.head = linen.Dense(3), linen.Dense(3)
        self.layers = [linen.Dense(4) for _ in range(3)]

    def __call__(self, x: Any) -> Any:
        for name in self.calls:
            x = self.layers[name](x) if isinstance(name, int) else getattr(self, name)(x)
        return x


class LinenOwn(linen.Module):
    """Two parameters that only their order tells apart."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x * self.param("scale", linen.initializers.ones, 3) + self.param("shift", linen.initializers.zeros, 3)


@pytest.mark.parametrize(
    ("model", "doubtful"),
    [
        (LinenAlike((0, 1, 2)), None),
        (LinenAlike(("lower", 0, 1)), None),
        (LinenAlike(("lower", "head")), "lower, head"),
        (LinenAlike((1, 0, 2)), "1, 0, 2"),
        (LinenAlike((0, "lower", 1)), "layers, lower"),
        (LinenOwn(), "scale, shift"),
    ],
)
def test_the_order_of_calls_is_not_taken_for_that_of_definition(model: linen.Module, doubtful: str | None) -> None:
    x = np.ones((2, 3), np.float32)
    variables = filled_variables(model, x)
    tensors = checkpoint.linen.state_dict(model, variables, x)
    torchs = tensors  # in torch's order: here that of names, with weights before biases, where the calls have another
    if doubtful:
        torchs = dict(sorted(tensors.items(), key=lambda item: item[0].removesuffix("weight")))
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": list(range(len(torchs)))}
    kept = {k: {"momentum_buffer": np.full_like(value, k)} for k, value in enumerate(torchs.values())}
    state = {"state": kept, "param_groups": [group]}
    names = None
    if doubtful:
        with pytest.raises(CheckpointError, match=f"the order of {doubtful} may not be torch's.*calls\ngive names="):
            checkpoint.linen.optax_from_torch(state, model, variables, x)
        names = list(torchs)  # as the message says
    _, resumed = checkpoint.linen.optax_from_torch(state, model, variables, x, names=names)
    found = checkpoint.linen.state_dict(model, {"params": resumed[0].trace}, x)
    assert {name: int(array.flat[0]) for name, array in found.items()} == {name: k for k, name in enumerate(torchs)}
