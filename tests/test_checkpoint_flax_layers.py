"""Whole models: Flax layers filled from torch's state dict compute what torch's do, and give the state dict back."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")
F = jnp.float64


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(11, 6, param_dtype=F, rngs=rngs)
        self.conv = nnx.Conv(6, 8, (3,), padding="VALID", feature_group_count=2, param_dtype=F, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, momentum=0.9, param_dtype=F, rngs=rngs)
        self.upsample = nnx.ConvTranspose(8, 6, (4,), 2, padding="VALID", param_dtype=F, rngs=rngs)
        self.group = nnx.GroupNorm(6, 3, epsilon=1e-5, use_fast_variance=False, param_dtype=F, rngs=rngs)
        self.encoder = jaxrnn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3, param_dtype=F, rngs=rngs)
        self.layer = nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, param_dtype=F, rngs=rngs)
        self.head = nnx.Sequential(
            nnx.Linear(6, 4, param_dtype=F, rngs=rngs),
            nnx.relu,
            nnx.Linear(4, 2, use_bias=False, param_dtype=F, rngs=rngs),
        )

    def __call__(self, tokens: Any) -> Any:
        x = self.norm(self.conv(self.embedding(tokens)))
        x = self.group(self.upsample(x))
        return self.head(self.layer(self.encoder(x)[0]))


class LinenModel(linen.Module):
    """The same, for Flax's other API."""

    def setup(self) -> None:
        self.embedding = linen.Embed(11, 6, param_dtype=F)
        self.conv = linen.Conv(8, (3,), padding="VALID", feature_group_count=2, param_dtype=F)
        self.norm = linen.BatchNorm(use_running_average=True, momentum=0.9, param_dtype=F)
        self.upsample = linen.ConvTranspose(6, (4,), (2,), padding="VALID", param_dtype=F)
        self.group = linen.GroupNorm(3, epsilon=1e-5, use_fast_variance=False, param_dtype=F)
        self.encoder = jaxrnn.linen.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3, param_dtype=F)
        self.layer = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, param_dtype=F)
        self.head = linen.Sequential(
            [linen.Dense(4, param_dtype=F), linen.relu, linen.Dense(2, use_bias=False, param_dtype=F)]
        )

    def __call__(self, tokens: Any) -> Any:
        x = self.norm(self.conv(self.embedding(tokens)))
        x = self.group(self.upsample(x))
        return self.head(self.layer(self.encoder(x)[0]))


class Linen:
    """A Linen module with its variables, called as an NNX one is."""

    def __init__(self, module: linen.Module, x: Any) -> None:
        self.module, self.x = module, x
        # Running statistics too, which Linen's BatchNorm adds its epsilon to in their own dtype.
        self.variables = jax.tree.map(lambda array: np.asarray(array, F), filled_variables(module, x))

    def __call__(self, x: Any) -> Any:
        return jax.jit(self.module.apply)(self.variables, x)


def _call(ours: Any, x: Any) -> Any:
    if isinstance(ours, Linen):
        return ours(x)
    graph, state = nnx.split(ours)  # nnx.jit would sort the attributes
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def _load(ours: Any, tensors: dict, prefix: str = "") -> tuple[list[str], list[str]]:
    if isinstance(ours, nnx.Module):
        return jaxrnn.load_state_dict(ours, tensors, prefix)
    load = jaxrnn.checkpoint.linen.load_state_dict
    ours.variables, missing, unexpected = load(ours.module, ours.variables, tensors, ours.x, prefix=prefix)
    return missing, unexpected


def _state_dict(ours: Any) -> dict[str, np.ndarray]:
    if isinstance(ours, nnx.Module):
        return jaxrnn.state_dict(ours)
    return jaxrnn.checkpoint.linen.state_dict(ours.module, ours.variables, ours.x)


def _theirs(torch: types.ModuleType) -> Any:
    nn = torch.nn

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.conv = nn.Conv1d(6, 8, 3, groups=2)
            self.norm = nn.BatchNorm1d(8)
            self.upsample = nn.ConvTranspose1d(8, 6, 4, stride=2)
            self.group = nn.GroupNorm(3, 6)
            self.encoder = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3)
            self.layer = nn.LayerNorm(6)
            self.head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))

        def forward(self, tokens: Any) -> Any:
            x = self.norm(self.conv(self.embedding(tokens).transpose(1, 2)))
            x = self.group(self.upsample(x)).transpose(1, 2)
            return self.head(self.layer(self.encoder(x)[0]))

    model = Theirs().double()
    random = np.random.RandomState(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():  # norms start at 0 and 1, which would hide a mistake
                numbers = random.uniform(0.2, 1, tuple(value.shape)) * (1 if "var" in name else random.choice([-1, 1]))
                value.copy_(torch.tensor(numbers.astype(np.float32)))  # Flax keeps running statistics in float32
    return model.eval()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_whole_model_both_ways(torch: types.ModuleType, api: str) -> None:
    tokens = np.random.RandomState(0).randint(0, 11, (3, 9))
    theirs = _theirs(torch)
    ours = Model(nnx.Rngs(0)) if api == "nnx" else Linen(LinenModel(), tokens)
    tensors = theirs.state_dict()
    assert _load(ours, {f"module.{name}": t for name, t in tensors.items()}, "module.") == ([], [])
    assert_close(_call(ours, tokens), theirs(torch.tensor(tokens)).detach().numpy())

    back = _state_dict(ours)
    assert list(back) == [name for name in tensors if "num_batches_tracked" not in name]
    assert_close(back, {name: tensors[name].numpy() for name in back}, atol=0)
    assert all(value.flags.c_contiguous for value in back.values())
    fresh = _theirs(torch)
    with torch.no_grad():
        for value in fresh.state_dict().values():
            value.zero_()
    fresh.load_state_dict({name: torch.tensor(value) for name, value in back.items()})  # strict
    assert torch.equal(fresh(torch.tensor(tokens)), theirs(torch.tensor(tokens)))


# torch's, NNX's and Linen's.
LAYERS = {
    "Conv2d": (
        lambda nn: nn.Conv2d(4, 6, (2, 3), stride=(1, 2), groups=2),
        lambda rngs: nnx.Conv(4, 6, (2, 3), (1, 2), padding="VALID", feature_group_count=2, param_dtype=F, rngs=rngs),
        linen.Conv(6, (2, 3), (1, 2), padding="VALID", feature_group_count=2, param_dtype=F),
    ),
    "ConvTranspose2d": (
        lambda nn: nn.ConvTranspose2d(4, 4, (2, 3), stride=(1, 2)),
        lambda rngs: nnx.ConvTranspose(4, 4, (2, 3), (1, 2), padding="VALID", param_dtype=F, rngs=rngs),
        linen.ConvTranspose(4, (2, 3), (1, 2), padding="VALID", param_dtype=F),
    ),
    "ConvTranspose2d, transpose_kernel": (
        lambda nn: nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2)),
        lambda rngs: nnx.ConvTranspose(
            4, 6, (2, 3), (1, 2), padding="VALID", transpose_kernel=True, param_dtype=F, rngs=rngs
        ),
        linen.ConvTranspose(6, (2, 3), (1, 2), padding="VALID", transpose_kernel=True, param_dtype=F),
    ),
    "InstanceNorm2d": (
        lambda nn: nn.InstanceNorm2d(4, affine=True),
        lambda rngs: nnx.InstanceNorm(4, epsilon=1e-5, use_fast_variance=False, param_dtype=F, rngs=rngs),
        linen.InstanceNorm(epsilon=1e-5, use_fast_variance=False, param_dtype=F),
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_images(torch: types.ModuleType, name: str, api: str) -> None:
    x = np.random.RandomState(0).randn(2, 7, 8, 4)
    make_theirs, make_nnx, linen_module = LAYERS[name]
    theirs = make_theirs(torch.nn).double()
    ours = filled(lambda: make_nnx(nnx.Rngs(0))) if api == "nnx" else Linen(linen_module, x)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    _load(ours, theirs.state_dict())
    expected = theirs(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    assert_close(_call(ours, x), expected)
    back = _state_dict(ours)
    assert {value.dtype for value in back.values()} == {np.dtype(F)}
    assert_close(back, {key: theirs.state_dict()[key].numpy() for key in back}, atol=0)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:RMSNorm. epsilon=1e-06")  # torch's has it, too
def test_rms_norm(torch: types.ModuleType) -> None:
    x = np.random.RandomState(0).randn(3, 5)
    theirs = torch.nn.RMSNorm(5, eps=1e-6).double()
    theirs.load_state_dict({"weight": torch.arange(5.0)})
    in_nnx = filled(lambda: nnx.RMSNorm(5, param_dtype=F, rngs=nnx.Rngs(0)))
    for ours in (in_nnx, Linen(linen.RMSNorm(param_dtype=F), x)):
        _load(ours, {"weight": np.arange(5.0)})
        assert_close(_call(ours, x), theirs(torch.tensor(x)).detach().numpy())


def test_misfits_are_said_in_torchs_layout() -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0)))
    tensors = jaxrnn.state_dict(model)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert list(tensors) == names
    with pytest.raises(CheckpointError, match=r"0\.weight is float32 \(3, 4\), should be float32 \(4, 3\)"):
        jaxrnn.load_state_dict(model, {**tensors, "0.weight": tensors["0.weight"].T})
    with pytest.raises(CheckpointError, match=r"1\.running_var is missing"):
        jaxrnn.load_state_dict(model, {name: tensors[name] for name in names[:-1]})
    assert jaxrnn.load_state_dict(model, {**tensors, "1.num_batches_tracked": np.array(3)}) == ([], [])
    with pytest.raises(CheckpointError, match=r"0\.num_batches_tracked is unexpected"):
        jaxrnn.load_state_dict(model, {**tensors, "0.num_batches_tracked": np.array(3)})


def test_a_layer_of_ones_own_is_laid_out_as_its_parent() -> None:
    class Scaled(nnx.Linear):
        def __init__(self, *arguments: Any, rngs: nnx.Rngs) -> None:
            super().__init__(*arguments, rngs=rngs)
            self.gain = nnx.Param(jnp.ones(2))

    layer = Scaled(3, 4, rngs=nnx.Rngs(0))
    assert {name: value.shape for name, value in jaxrnn.state_dict(layer).items()} == {
        "weight": (4, 3),
        "bias": (4,),
        "gain": (2,),
    }
