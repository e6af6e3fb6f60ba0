"""Variables of a Linen module: every way to name submodules, and what stays. Layouts: test_checkpoint_flax_layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import linen
from making import filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.linen import load_state_dict, state_dict

X = jnp.ones((2, 5, 3), jnp.float32)


class Block(linen.Module):
    features: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", linen.initializers.ones, (self.features,), jnp.float32)
        return scale * linen.Dense(self.features, name="proj")(x)


class Model(linen.Module):
    """Submodules in every place that Linen has for them."""

    blocks: list[linen.Module]

    def setup(self) -> None:
        self.layers_1 = linen.Dense(4)  # by its own name, not the second of a list
        self.rnns = [jaxrnn.linen.GRU(4, 4), [jaxrnn.linen.LSTM(4, 4)]]
        self.heads = {"up": Block(4), "up_down": [linen.Dense(2)]}
        self.net = linen.Sequential([Block(4), linen.tanh, linen.Sequential([linen.Dense(4)])])
        self.temperature = self.param("temperature", linen.initializers.ones, (), jnp.float32)

    def __call__(self, x: jax.Array, twice: bool = False) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        x = self.layers_1(x)
        x = self.rnns[1][0](self.rnns[0](x)[0])[0]
        x = self.net(x)
        x = self.heads["up_down"][0](self.heads["up"](x))
        return x / self.temperature * (2 if twice else 1)


NAMES = [
    "temperature",
    *(f"blocks.{k}.{name}" for k in (0, 1) for name in ("scale", "proj.weight", "proj.bias")),
    "layers_1.weight",
    "layers_1.bias",
    *(f"rnns.0.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    *(f"rnns.1.0.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    *(f"net.0.{name}" for name in ("scale", "proj.weight", "proj.bias")),
    "net.2.0.weight",
    "net.2.0.bias",
    *(f"heads.up.{name}" for name in ("scale", "proj.weight", "proj.bias")),
    "heads.up_down.0.weight",
    "heads.up_down.0.bias",
]


def _model() -> tuple[Model, Any]:
    model = Model([Block(4), Block(4)])
    return model, filled_variables(model, X)


def test_names_are_those_of_torchs_attributes_lists_and_dicts() -> None:
    model, variables = _model()
    tensors = state_dict(model, variables, X, twice=True)
    assert list(tensors) == NAMES
    kernel = variables["params"]["net"]["layers_2"]["layers_0"]["kernel"]
    assert_close({"net.2.0.weight": tensors["net.2.0.weight"]}, {"net.2.0.weight": kernel.T}, atol=0)
    other = filled_variables(model, X, seed=1)
    loaded = load_state_dict(model, other, {f"m.{name}": v for name, v in tensors.items()}, X, prefix="m.", twice=True)
    assert (loaded.missing, loaded.unexpected) == ([], [])
    assert_close(loaded.variables, variables, atol=0)
    run = jax.jit(model.apply)
    assert_close(run(loaded.variables, X), run(variables, X), atol=0)


def test_what_was_given_stays() -> None:
    model, variables = _model()
    before = jax.tree.map(np.array, variables)
    tensors = {name: value + 1 for name, value in state_dict(model, variables, X).items()}
    loaded = load_state_dict(model, linen.FrozenDict(variables), tensors, X)
    assert isinstance(loaded.variables, linen.FrozenDict)
    assert_close(variables, before, atol=0)
    assert_close(loaded.variables.unfreeze(), jax.tree.map(lambda a: a + 1, before), atol=0)


def test_metadata_stays() -> None:
    init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
    model = linen.Sequential([linen.Dense(4, kernel_init=init), jaxrnn.linen.GRUCell(4, 5)])
    variables = filled_variables(model, X[0])
    tensors = state_dict(model, variables, X[0])
    tensors["0.weight"] = np.arange(12, dtype=np.float64).reshape(4, 3)
    kernel = load_state_dict(model, variables, tensors, X[0]).variables["params"]["layers_0"]["kernel"]
    assert isinstance(kernel, linen.Partitioned)
    assert kernel.names == ("in", "out")
    assert kernel.value.dtype == jnp.float32
    assert_close(kernel.value, tensors["0.weight"].T, atol=0)


def test_misfits() -> None:
    model, variables = _model()
    tensors = state_dict(model, variables, X)
    wrong = {**tensors, "layers_1.weight": np.ones((3, 4)), "new": np.ones(1)}
    del wrong["rnns.0.bias_hh_l0"]
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(model, variables, wrong, X)
    for part in (
        "Model: the tensors do not fit",
        "rnns.0.bias_hh_l0 is missing",
        "new is unexpected",
        "layers_1.weight is float64 (3, 4), should be float32 (4, 4)",
    ):
        assert part in str(caught.value)
    wrong["layers_1.weight"] = tensors["layers_1.weight"] * np.nan
    with pytest.warns(UserWarning, match=r"^Model: NaN or infinite numbers in layers_1\.weight$"):
        loaded = load_state_dict(model, variables, wrong, X, strict=False)
    assert (loaded.missing, loaded.unexpected) == (["rnns.0.bias_hh_l0"], ["new"])
    before = variables["params"]["rnns_0"]["bias_hh_l0"]
    assert_close(loaded.variables["params"]["rnns_0"]["bias_hh_l0"], before, atol=0)


def test_a_module_that_draws_random_numbers() -> None:
    model = linen.Sequential([linen.Dropout(0.5, deterministic=False), linen.Dense(4)])
    variables = filled_variables(model, X)
    assert list(state_dict(model, variables, X)) == ["1.weight", "1.bias"]
    arguments = {"rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}  # as people call apply
    assert list(state_dict(model, variables, X, **arguments)) == ["1.weight", "1.bias"]


class _Dotted(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, depth: int = 0) -> jax.Array:
        if depth:
            return linen.Dense(4, name="b")(x)
        return _Dotted(name="a")(linen.Dense(4, name="a.b")(x), depth=1)


class _Weighted(linen.Dense):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) * self.param("weight", linen.initializers.ones, (1,), x.dtype)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_Dotted(), "params/a.b/kernel and params/a/b/kernel are both read as a.b.weight"),
        (_Weighted(4), "params/kernel and params/weight are both read as weight"),
    ],
    ids=["dots", "a layer's own"],
)
def test_two_parameters_under_one_name_of_torchs(model: linen.Module, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        state_dict(model, filled_variables(model, X), X)
