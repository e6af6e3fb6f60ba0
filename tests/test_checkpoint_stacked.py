"""Several modules in one, as Flax's vmap and scan make them: whatever reads names refuses, with a remedy that works."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, optimizer_from_torch

# Makers of each layer that has a row in the table, and of our own; what each of their parameters is called in Flax.
LAYERS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], list[str]]] = {
    "Linear": (lambda rngs: nnx.Linear(3, 4, rngs=rngs), ["kernel is (5, 3, 4), should be (3, 4)"]),
    "Embed": (lambda rngs: nnx.Embed(7, 3, rngs=rngs), ["embedding is (5, 7, 3), should be (7, 3)"]),
    "Conv": (
        lambda rngs: nnx.Conv(4, 6, (2, 3), feature_group_count=2, rngs=rngs),
        ["kernel is (5, 2, 3, 2, 6), should be (2, 3, 2, 6)", "bias is (5, 6), should be (6,)"],
    ),
    "ConvTranspose": (
        lambda rngs: nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, rngs=rngs),
        ["kernel is (5, 3, 6, 4), should be (3, 6, 4)"],
    ),
    "LayerNorm": (lambda rngs: nnx.LayerNorm(3, epsilon=1e-5, rngs=rngs), ["scale is (5, 3), should be (3,)"]),
    "GroupNorm": (lambda rngs: nnx.GroupNorm(6, 3, epsilon=1e-5, rngs=rngs), ["bias is (5, 6), should be (6,)"]),
    "InstanceNorm": (lambda rngs: nnx.InstanceNorm(6, epsilon=1e-5, rngs=rngs), ["bias is (5, 6), should be (6,)"]),
    "RMSNorm": (lambda rngs: nnx.RMSNorm(3, epsilon=1.19e-7, rngs=rngs), ["scale is (5, 3), should be (3,)"]),
    "BatchNorm": (
        lambda rngs: nnx.BatchNorm(3, momentum=0.9, rngs=rngs),
        ["bias is (5, 3), should be (3,)", "mean is (5, 3), should be (3,)", "var is (5, 3), should be (3,)"],
    ),
    "LSTM": (
        lambda rngs: jaxrnn.LSTM(3, 4, 2, dropout=0.5, proj_size=2, rngs=rngs),
        ["weight_hr_l1 is (5, 2, 4), should be (2, 4)", "bias_ih_l0 is (5, 16), should be (16,)"],
    ),
    "GRU": (lambda rngs: jaxrnn.GRU(3, 4, rngs=rngs), ["weight_ih_l0 is (5, 12, 3), should be (12, 3)"]),
    "RNN": (lambda rngs: jaxrnn.RNN(3, 4, rngs=rngs), ["weight_ih_l0 is (5, 4, 3), should be (4, 3)"]),
    "LSTMCell": (lambda rngs: jaxrnn.LSTMCell(3, 4, rngs=rngs), ["weight_ih is (5, 16, 3), should be (16, 3)"]),
    "GRUCell": (lambda rngs: jaxrnn.GRUCell(3, 4, rngs=rngs), ["bias_hh is (5, 12), should be (12,)"]),
    "RNNCell": (lambda rngs: jaxrnn.RNNCell(3, 4, rngs=rngs), ["bias_hh is (5, 4), should be (4,)"]),
}


def _several(make: Callable[[nnx.Rngs], nnx.Module], count: int, axis: int = 0) -> Callable[[nnx.Rngs], nnx.Module]:
    return nnx.split_rngs(splits=count)(nnx.vmap(make, out_axes=axis))


def _stacked(make: Callable[[nnx.Rngs], nnx.Module], axis: int = 0) -> Any:
    """Five of them in one, with numbers that differ."""
    return filled(lambda: _several(make, 5, axis)(nnx.Rngs(0)))


def _refusal(function: Callable[..., Any], *arguments: Any) -> tuple[str, list[str], str]:
    """The lines of what is raised: the first, the parameters, and the remedy's code."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    first, *lines = str(caught.value).split("\n")
    problems = [line.removeprefix("  ") for line in lines if ", should be " in line]
    return first, problems, "\n".join(line.removeprefix("  ") for line in lines[len(problems) + 1 :])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    make, wanted = LAYERS[name]
    module = _stacked(make)
    first, problems, remedy = _refusal(jaxrnn.state_dict, module)
    assert first == f"{name}: it is a stack of several modules, for which torch has no names:"
    assert set(wanted) <= set(problems)
    assert len(problems) == len(jaxrnn.state_dict(filled(lambda: make(nnx.Rngs(0)))))
    assert _refusal(jaxrnn.load_state_dict, module, {}) == (first, problems, remedy)
    assert _refusal(optimizer_from_torch, {}, module) == (first, problems, remedy)
    place: dict[str, Any] = {"module": module, "nnx": nnx, "jax": jax}
    exec(remedy, place)
    for variable, stacked in zip(*map(jax.tree.leaves, (place["state"], nnx.state(module))), strict=True):
        assert variable is stacked
    for one, stacked in zip(*map(jax.tree.leaves, (nnx.state(place["member"]), place["state"])), strict=True):
        assert one.shape == stacked.shape[1:]
    assert jaxrnn.load_state_dict(place["member"], jaxrnn.state_dict(place["member"])) == ([], [])


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cells = nnx.List([jaxrnn.GRUCell(3, 4, rngs=rngs), jaxrnn.GRUCell(4, 4, rngs=rngs)])
        self.head = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(3, jnp.float32))  # whose shape is known to nobody

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * self.head(self.cells[1](self.cells[0](x)))


@pytest.mark.parametrize(("axis", "index"), [(0, "array[0]"), (1, "array[:, 0]"), (-1, "array[..., 0]")])
def test_members_taken_loaded_and_stacked(axis: int, index: str) -> None:
    """Each of five models is torch's: taken out by the remedy, or loaded one by one and stacked."""
    module = _stacked(Model, axis)
    first, problems, remedy = _refusal(jaxrnn.state_dict, module)
    assert first == "Model: it is a stack of several modules, for which torch has no names:"
    assert [problem.split(" ")[0] for problem in problems] == [
        *(f"cells.{k}.{name}" for k in (0, 1) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        "head.kernel",
    ]
    assert index in remedy
    graph, state = nnx.split(module)
    members = []
    for k in range(5):
        place: dict[str, Any] = {"module": module, "nnx": nnx, "jax": jax}
        exec(remedy.replace("0]", f"{k}]"), place)
        members.append(place["member"])
    loaded = [filled(lambda: Model(nnx.Rngs(0))) for _ in members]
    for one, other in zip(loaded, members, strict=True):
        assert jaxrnn.load_state_dict(one, jaxrnn.state_dict(other)) == ([], [])
    x = jnp.ones((2, 3), jnp.float32)
    expected = nnx.vmap(lambda model, x: model(x), in_axes=(axis, None))(module, x)
    assert_close(np.stack([model(x) for model in loaded]), expected, atol=1e-6)
    again = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    nnx.update(again, jax.tree.map(lambda *arrays: jnp.stack(arrays, axis), *map(nnx.state, loaded)))
    assert_close(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(state), atol=0)


def test_a_stack_inside_a_model() -> None:
    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.blocks = _several(Model, 5)(nnx.Rngs(0))
            self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    _, problems, _ = _refusal(jaxrnn.state_dict, nnx.eval_shape(Deep))
    assert "blocks.head.kernel is (5, 4, 3), should be (4, 3)" in problems
    assert all(problem.startswith("blocks.") for problem in problems)


def test_twice_stacked() -> None:
    once = _several(lambda rngs: jaxrnn.GRUCell(3, 4, rngs=rngs), 5)
    twice = filled(lambda: _several(once, 2)(nnx.Rngs(0)))
    _, problems, remedy = _refusal(jaxrnn.state_dict, twice)
    assert "weight_ih is (2, 5, 12, 3), should be (12, 3)" in problems
    place: dict[str, Any] = {"module": twice, "nnx": nnx, "jax": jax}
    exec(remedy, place)
    _, problems, _ = _refusal(jaxrnn.state_dict, place["member"])
    assert "weight_ih is (5, 12, 3), should be (12, 3)" in problems


def test_another_size_is_no_stack() -> None:
    """As people give a layer another head, whose sizes Flax does not look at again."""
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer.kernel, layer.bias = nnx.Param(jnp.ones((3, 9))), nnx.Param(jnp.ones(9))
    assert {name: value.shape for name, value in jaxrnn.state_dict(layer).items()} == {"weight": (9, 3), "bias": (9,)}


X = jnp.ones((2, 5, 3), jnp.float32)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", linen.initializers.ones, (3,), jnp.float32)
        init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
        x = linen.BatchNorm(momentum=0.9, use_running_average=True)(scale * linen.Dense(3, kernel_init=init)(x))
        return jaxrnn.linen.GRU(3, 3)(x)[0]


def _lifted(axis: int = 0) -> dict[str, Any]:
    axes = {"params": axis, "batch_stats": axis}
    return {"variable_axes": axes, "split_rngs": {"params": True}, "metadata_params": {linen.PARTITION_NAME: None}}


def _vmapped(module: Any, axis: int = 0) -> Any:
    return linen.vmap(module, in_axes=None, axis_size=5, **_lifted(axis))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = linen.scan(lambda block, x, _: (block(x), None), length=6, **_lifted())
        x, _ = scan(Block(name="layers"), x, None)
        return linen.Dense(2, name="head")(_vmapped(Block)(name="ensemble")(x).mean(0))


SHAPES = {
    "scale": "(3,)",
    "Dense_0.kernel": "(3, 3)",
    "Dense_0.bias": "(3,)",
    **dict.fromkeys((f"BatchNorm_0.{name}" for name in ("scale", "bias", "mean", "var")), "(3,)"),
    **dict.fromkeys(("GRU_0.weight_ih_l0", "GRU_0.weight_hh_l0"), "(9, 3)"),
    **dict.fromkeys(("GRU_0.bias_ih_l0", "GRU_0.bias_hh_l0"), "(9,)"),
}


def test_linens_scan_and_vmap() -> None:
    model, tools = LinenModel(), jaxrnn.checkpoint.linen
    variables = filled_variables(model, X)
    first, problems, remedy = _refusal(tools.state_dict, model, variables, X)
    assert first == "LinenModel: it is a stack of several modules, for which torch has no names:"
    assert sorted(problems) == sorted(
        f"{where}.{name} is ({count}, {shape[1:].replace(',)', ')')}, should be {shape}"
        for where, count in (("layers", 6), ("ensemble", 5))
        for name, shape in SHAPES.items()
    )
    assert _refusal(tools.load_state_dict, model, variables, {}, X) == (first, problems, remedy)
    own = {name: tree["layers"] for name, tree in variables.items()}
    member = eval(remedy, {"jax": jax, "variables": own})
    tensors = tools.state_dict(Block(), member, X)
    assert {name.rpartition(".")[0] for name in tensors} == {"", "Dense_0", "BatchNorm_0", "GRU_0"}
    assert_close(tensors["Dense_0.weight"], own["params"]["Dense_0"]["kernel"].value[0].T, atol=0)


class Scaled(linen.Dense):
    """With a parameter that has no axis of its own."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) * self.param("factor", linen.initializers.ones, (), jnp.float32)


@pytest.mark.parametrize("axis", [0, -1])
def test_a_scalar(axis: int) -> None:
    model, tools = _vmapped(Scaled, axis)(4), jaxrnn.checkpoint.linen
    variables = filled_variables(model, X)
    _, problems, remedy = _refusal(tools.state_dict, model, variables, X)
    assert "factor is (5,), should be ()" in problems
    member = eval(remedy, {"jax": jax, "variables": variables})
    assert tools.state_dict(Scaled(4), member, X)["factor"] == variables["params"]["factor"][0]


@pytest.mark.parametrize(("axis", "index"), [(0, "array[0]"), (1, "array[:, 0]"), (-1, "array[..., 0]")])
def test_linens_layer_itself(axis: int, index: str) -> None:
    model, tools = _vmapped(linen.Dense, axis)(4), jaxrnn.checkpoint.linen
    variables = filled_variables(model, X)
    _, problems, remedy = _refusal(tools.state_dict, model, variables, X)
    assert [problem.partition("should be ")[2] for problem in problems] == ["(3, 4)", "(4,)"]
    assert index in remedy
    member = eval(remedy, {"jax": jax, "variables": variables})
    kernel = variables["params"]["kernel"]
    assert_close(tools.state_dict(linen.Dense(4), member, X)["weight"], np.take(np.asarray(kernel), 0, axis).T, atol=0)


def test_what_linen_lifts_without_an_axis() -> None:
    """One set of weights for all members and steps, and a kernel that is transposed on its way in."""

    def transposed(variables: Any) -> Any:
        return jax.tree.map(lambda array: array.T, variables)

    class Shared(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            vmap = linen.vmap(linen.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=0)
            x = linen.RNN(linen.SimpleCell(3), name="rnn")(linen.remat(vmap)(3, name="dense")(x))
            mapped = linen.map_variables(
                linen.Dense, "params", transposed, transposed, init=self.is_initializing(), mutable=True
            )
            return mapped(4, use_bias=False, name="mapped")(x)

    variables = filled_variables(Shared(), X)
    shapes = {k: v.shape for k, v in jaxrnn.checkpoint.linen.state_dict(Shared(), variables, X).items()}
    assert shapes["dense.weight"] == (3, 3)
    assert shapes["mapped.weight"] == (3, 4)  # as it is stored
