"""Training in step with torch: the same weights, batches, dropout masks and optimizer; losses and weights compared.

In one run each side draws its first weights from a seed.

A record of a run is a dict of arrays:

    losses  torch's loss at each step, float64
    masks   what torch's dropout kept, packed bits
    <name>  each parameter after the last step, float64
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrnn.checkpoint import clip_grad_norm, optax_from_torch, state_dict, torch_init
from jaxrnn.functions import apply
from jaxrnn.nnx import Recurrent
from jaxrnn.spec import Spec

from .cases import LAYERS, NamedArrays

STEPS, TIME, BATCH, INPUT, HIDDEN, LAYER_COUNT = 200, 12, 8, 4, 8, 2
# Rounding, which 200 steps carry on: a wrong setting of an optimizer is off by more than 1e-6.
LARGEST = 1e-9
_SGD = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
_ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: a key of `parity.cases.LAYERS`.
        optimizer: a class of torch.optim.
        settings: the optimizer's settings, as in torch's state dict.
        clip: the norm that gradients are clipped to, if they are.
        bidirectional: whether the network is.
        variational: whether one dropout mask is for all time steps.
        seed: what the first parameters are drawn from, on each side by itself; None if both are given the same.
    """

    kind: str
    optimizer: str
    settings: Mapping[str, Any]
    label: str
    clip: float | None = None
    bidirectional: bool = False
    dropout: float = 0.25
    variational: bool = False
    seed: int | None = None

    @property
    def name(self) -> str:
        return f"training-{self.kind}-{self.label}"

    @property
    def spec(self) -> Spec:
        kind = LAYERS[self.kind]
        proj_size = HIDDEN // 2 if kind.projects else 0
        return Spec(
            kind.cell, INPUT, HIDDEN, LAYER_COUNT, dropout=self.dropout, bidirectional=self.bidirectional,
            proj_size=proj_size,
        )  # fmt: skip

    @property
    def features(self) -> int:
        return self.spec.output_size * self.spec.num_directions

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (1 if self.variational else TIME, BATCH, self.features)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters: of the network, and of a linear layer on its outputs."""
        network = {f"rnn.{name}": shape for name, shape in self.spec.shapes().items()}
        return network | {"head.weight": (1, self.features), "head.bias": (1,)}

    def numbers(self) -> tuple[NamedArrays, np.ndarray, np.ndarray]:
        """The first parameters, and the inputs and targets of every step: to recall earlier inputs and a product."""
        random = np.random.RandomState(zlib.crc32(self.name.encode()))
        bound = 1 / math.sqrt(HIDDEN)
        params = {name: random.uniform(-bound, bound, shape) for name, shape in self.shapes().items()}
        x = random.standard_normal((STEPS, TIME, BATCH, INPUT))
        y = np.zeros((STEPS, TIME, BATCH, 1))
        y[:, 2:] = x[:, 1:-1, :, :1] * (1 + 0.5 * x[:, :-2, :, 1:2])
        return params if self.seed is None else self._drawn(self.seed), x, y

    def _drawn(self, seed: int) -> NamedArrays:
        """What torch draws first, without torch."""
        arguments = {name: getattr(self.spec, name) for name in ("num_layers", "bidirectional", "proj_size", "dropout")}
        settings: Any = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        network = Recurrent(self.spec.cell, INPUT, HIDDEN, **arguments, **settings)
        model = nnx.Dict(rnn=network, head=nnx.Linear(self.features, 1, **settings))
        torch_init(model, seed)
        return state_dict(model)


RUNS = {
    run.name: run
    for run in (
        Run("RNN_TANH", "SGD", _SGD | {"lr": 0.5}, "sgd"),
        Run("RNN_TANH", "SGD", _SGD, "variational", bidirectional=True, variational=True),
        Run("RNN_RELU", "SGD", _SGD | {"lr": 0.02, "momentum": 0.9, "nesterov": True}, "nesterov", clip=1.0),
        Run("LSTM", "SGD", _SGD | {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4}, "momentum", bidirectional=True),
        Run("LSTM", "Adam", _ADAM, "adam", clip=0.5),
        Run("LSTM_PROJ", "AdamW", _ADAM | {"weight_decay": 0.1}, "adamw"),
        Run("GRU", "AdamW", _ADAM | {"weight_decay": 0.1}, "adamw", clip=0.5, bidirectional=True),
        Run("GRU", "Adam", _ADAM | {"betas": (0.8, 0.99), "weight_decay": 1e-3}, "adam"),
        Run("LSTM", "AdamW", _ADAM | {"weight_decay": 0.1}, "seed", bidirectional=True, seed=2026),
    )
}


def run_torch(run: Run) -> NamedArrays:
    """The record of a run, from torch here."""
    import torch

    torch.set_num_threads(1)
    kind, spec = LAYERS[run.kind], run.spec
    layers = functools.partial(
        getattr(torch.nn, kind.module), hidden_size=HIDDEN, bidirectional=run.bidirectional, dtype=torch.float64,
        **kind.arguments, **({"proj_size": spec.proj_size} if spec.proj_size else {}),
    )  # fmt: skip
    torch.manual_seed(run.seed or 0)
    network = layers(INPUT, num_layers=LAYER_COUNT, dropout=run.dropout)

    def outputs(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not run.variational:
            return network(x)[0]
        # torch's dropout has a mask for each step, so its layers run one by one.
        for index in range(LAYER_COUNT):
            x = x * mask / (1 - run.dropout) if index else x
            layer = layers(x.shape[-1])
            own = {name: getattr(network, name.replace("_l0", f"_l{index}")) for name, _ in layer.named_parameters()}
            x, _ = torch.func.functional_call(layer, own, x)
        return x

    model = torch.nn.ModuleDict({"rnn": network, "head": torch.nn.Linear(run.features, 1, dtype=torch.float64)})
    params, x, y = run.numbers()
    if run.seed is None:  # else it has drawn its own
        model.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), **run.settings)
    losses, masks = [], []
    for step in range(STEPS):
        # torch draws in the call what it draws here from the same state.
        torch.manual_seed(step)
        masks.append(torch.nn.functional.dropout(torch.ones(run.mask_shape), run.dropout) != 0)
        torch.manual_seed(step)
        optimizer.zero_grad()
        output = model["head"](outputs(torch.tensor(x[step]), masks[-1]))
        loss = torch.mean((output - torch.tensor(y[step])) ** 2)
        loss.backward()
        if run.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        losses.append(loss.item())
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    return weights | {"losses": np.array(losses), "masks": np.packbits(torch.stack(masks).numpy())}


def run_jaxrnn(run: Run, record: NamedArrays) -> NamedArrays:
    """The run in JAX, with the masks of a record: its losses, and the parameters after the last step."""
    params, x, y = run.numbers()
    shape = STEPS, *run.mask_shape
    masks = np.unpackbits(record["masks"], count=math.prod(shape)).reshape(shape).astype(bool)
    group = {**run.settings, "decoupled_weight_decay": run.optimizer == "AdamW", "params": range(len(params))}
    optimizer, state = optax_from_torch({"state": {}, "param_groups": [group]}, params)
    if run.clip:
        optimizer = optax.chain(clip_grad_norm(run.clip), optimizer)
        state = optimizer.init(params)

    def loss(params: Any, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
        network = {name.removeprefix("rnn."): value for name, value in params.items() if name.startswith("rnn.")}
        output, _ = apply(run.spec, network, x, dropout_masks=[mask])
        output = jnp.dot(output, params["head.weight"].T, precision="highest") + params["head.bias"]
        return jnp.mean((output - y) ** 2)

    def step(carry: tuple, batch: tuple) -> tuple[tuple, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    train = jax.jit(functools.partial(jax.lax.scan, step))
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        (weights, _), losses = train((jax.tree.map(jnp.asarray, params), state), (x, y, masks))
    return {name: np.asarray(value) for name, value in weights.items()} | {"losses": np.asarray(losses)}


@dataclasses.dataclass(frozen=True)
class Trained:
    """The losses and errors of a run.

    Attributes:
        name: the name of the run.
        first, torch, ours: the mean loss of the first ten steps, and of the last ten, torch's and ours.
        losses: the largest difference of the losses, relative to max(1, largest).
        weights: the largest difference of the last weights, relative to max(1, largest).
        curves: the loss at each step, torch's and ours.
        problem: the exception that kept the run from being measured, if any.
    """

    name: str
    first: float = math.nan
    torch: float = math.nan
    ours: float = math.nan
    losses: float = math.nan
    weights: float = math.nan
    curves: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    problem: str = ""

    def failure(self) -> str:
        """The failure of the run; empty if there is none."""
        if self.problem:
            return self.problem
        for what, error in (("losses", self.losses), ("weights", self.weights)):
            if not error <= LARGEST:
                return f"the {what} are off by {error:.2g} after {STEPS} steps, more than {LARGEST:.0e}"
        return ""


def compare(run: Run, record: NamedArrays) -> Trained:
    """Train in JAX, and compare with the record."""
    try:
        ours = run_jaxrnn(run, record)
    except Exception as problem:  # a run that breaks is a run that fails; the others go on
        return Trained(run.name, problem=f"{type(problem).__name__}: {problem}".splitlines()[0])
    apart = {
        name: float(np.max(np.abs(value - record[name])) / max(1.0, np.max(np.abs(record[name]))))
        for name, value in ours.items()
    }
    losses = apart.pop("losses")
    return Trained(
        run.name,
        float(np.mean(record["losses"][:10])),
        float(np.mean(record["losses"][-10:])),
        float(np.mean(ours["losses"][-10:])),
        losses,
        float(np.max(list(apart.values()))),  # NaN counts as the largest
        (tuple(record["losses"].tolist()), tuple(ours["losses"].tolist())),
    )
