"""Hidden units over the devices of a mesh: one device's results, and what the devices exchange is what one would write.

That is, in a forward pass, the recurrent weights once, from columns of torch's rows to each device's units of every
gate, and h at every step; in a training step also its cotangent at every step, and the gradients.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxrnn

PROGRAM = """
import json
import re
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import jaxrnn
from parity.compile import COLLECTIVE

spec = jaxrnn.Spec(jaxrnn.{cell}, 3, 16, **{settings})
params = spec.init(jax.random.key(0), jnp.float64)
x = np.random.RandomState(0).randn(9, 8, 3)

def forward(params, x, axis="model"):
    return jaxrnn.apply(spec, params, x, hidden_axis=axis, {marks})

def loss(params, x, axis="model"):
    output, states = forward(params, x, axis)
    return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves((output, states)))

def exchanged(text):
    # What is exchanged outside of loops, and at every step of one.
    loops, inside, found = set(re.findall(r"body=%([\\w.\\-]+)", text)), False, ([], [])
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\\w.\\-]+) \\(", line):
            inside = header[1] in loops
        found[inside].extend(COLLECTIVE.findall(line))
    return tuple(sorted(names) for names in found)

functions = forward, jax.value_and_grad(loss, (0, 1))
one = [jax.jit(lambda *arguments, f=f: f(*arguments))(params, x) for f in (
    lambda params, x: forward(params, x, None), jax.value_and_grad(lambda params, x: loss(params, x, None), (0, 1)),
)]
for shape in ((8, 1), (1, 8), (2, 4)):
    mesh = jax.make_mesh(shape, ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        lies = {{name: PartitionSpec(*("model" if hidden else None for hidden in axes))
                for name, axes in spec.hidden_axes().items()}}
        lies = jax.tree.map(lambda axes: NamedSharding(mesh, axes), (lies, PartitionSpec(None, "batch")))
        arguments = jax.device_put((params, x), lies)
        for function, expected, results in zip(functions, one, (None, (None, lies)), strict=True):
            compiled = jax.jit(function, out_shardings=results).lower(*arguments).compile()
            for a, b in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
            print(json.dumps([shape[1], "training" if results else "forward", *exchanged(compiled.as_text())]))
"""


class Case(NamedTuple):
    cell: str
    settings: dict[str, Any]
    marks: str  # what it is called with
    forward: list[str]  # what is exchanged at every step
    training: list[str]
    once_forward: list[str]  # and outside of the loop, over 8 devices
    once_training: list[str] | None = None  # None where it is not looked at
    batch_training: Sequence[str] = ()  # at every step, where the batch is shared out, too


GATHER, SUM, TURN, SEND = "all-gather", "all-reduce", "all-to-all", "collective-permute"
CASES = {
    # Turned are the recurrent weights, and in training their gradient. Whole again for it are h of all steps, and the
    # gradients of the input's weights and of two biases; x's is a sum.
    "LSTM": Case("LSTM_CELL", {}, "", [GATHER], [GATHER, SUM], [TURN], [GATHER] * 4 + [SUM] + [TURN] * 2),
    "GRU of 2 layers with resets": Case(
        "GRU_CELL",
        {"num_layers": 2},
        "reset=np.arange(72).reshape(9, 8) % 5 == 4",
        [GATHER] * 2,
        [GATHER] * 2 + [SUM] * 2,
        [GATHER] + [TURN] * 3,
    ),
    # Between the layers h of both directions is gathered at once; their outputs move to where they are to lie.
    "LSTM of 2 layers, both directions": Case(
        "LSTM_CELL",
        {"num_layers": 2, "bidirectional": True},
        "",
        [GATHER] * 4,
        [GATHER] * 4 + [SUM] * 4,
        [GATHER] + [TURN] * 7 + [SEND],
        [GATHER] * (5 + 10) + [SUM] * 2 + [TURN] * 14 + [SEND] * 2,
    ),
    "RNN, both directions, ragged": Case(
        "RNN_TANH",
        {"bidirectional": True},
        "lengths=np.arange(8)",
        [GATHER] * 2,
        [GATHER] * 2 + [SUM] * 2,
        [TURN] * 3 + [SEND],
    ),
    # A projection, of which every device needs all, adds up the devices' parts.
    "projected LSTM": Case("LSTM_CELL", {"proj_size": 5}, "", [SUM], [SUM] * 2, []),
    "LSTM, gates computed again": Case("LSTM_CELL", {}, "remat='gates'", [GATHER], [GATHER, SUM], [TURN]),
    # In every chunk, too, but never the weights: h once more, and then that of all its steps; the gradients add up.
    "LSTM, chunks computed again": Case(
        "LSTM_CELL", {}, "remat=3", [GATHER], [GATHER] * 3 + [SUM] * 2, [TURN], None, [SUM]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hidden_units_over_devices(name: str) -> None:
    case = CASES[name]
    program = PROGRAM.format(cell=case.cell, settings=case.settings, marks=case.marks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        devices, what, outside, inside = json.loads(line)
        found[devices, what] = outside, inside
    assert found[1, "forward"] == ([], [])
    assert found[1, "training"] == ([SUM], [*case.batch_training])  # the gradients, in one
    for devices in (4, 8):
        assert found[devices, "forward"][1] == sorted(case.forward)
        assert found[devices, "training"][1] == sorted([*case.training, *(case.batch_training if devices == 4 else ())])
    assert found[8, "forward"][0] == sorted(case.once_forward)
    if case.once_training is not None:
        assert found[8, "training"][0] == sorted(case.once_training)


MODULES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec
import jaxrnn

def steps(hidden_axis, x):
    model = jaxrnn.LSTM(3, 16, 2, hidden_axis=hidden_axis, param_dtype=x.dtype, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x)[0] - 1) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    return [float(step(model, optimizer, x)) for _ in range(5)], model

with jax.enable_x64(True):
    x = jnp.asarray(np.random.RandomState(0).randn(9, 8, 3))
    alone, _ = steps(None, x)
    named = jaxrnn.LSTM(3, 16, 2, hidden_axis="units", param_dtype=x.dtype, rngs=nnx.Rngs(0))  # a name for later
    assert named.weight_hh_l0.out_sharding == (None, "units")
    with nnx.logical_axis_rules([("units", "model")]):
        assert nnx.get_partition_spec(nnx.state(named))["weight_ih_l1"].get_raw_value() == PartitionSpec(None, "model")
    layer = jaxrnn.linen.LSTM(3, 16, 2, hidden_axis="model", param_dtype=x.dtype)
    without = layer.init(jax.random.key(0), x)["params"]["weight_hh_l1"]
    assert without.names == (None, "model"), without.names

    mesh = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        shared = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(None, "batch")))
        losses, model = steps("model", shared)
        np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-10)
        for lies in (model.weight_hh_l0[...].sharding, model.weight_ih_l1[...].sharding):
            assert lies.spec == PartitionSpec(None, "model"), lies  # also after the steps
        with nnx.logical_axis_rules([("units", "model")]):
            by_rule, model = steps("units", shared)
            assert model.weight_hh_l0[...].sharding.spec == PartitionSpec(None, "model")
        assert by_rule == losses
        assert nnx.graphdef(model) == nnx.graphdef(named)
        jax.tree.map(lambda a, b: None, nnx.state(model), nnx.state(named))  # one structure, mesh or none

        tensors = jaxrnn.state_dict(model)
        abstract = nnx.eval_shape(lambda: jaxrnn.LSTM(3, 16, 2, hidden_axis="model", rngs=nnx.Rngs(0)))
        jaxrnn.load_state_dict(abstract, tensors)
        assert abstract.weight_hh_l0[...].sharding.spec == PartitionSpec(None, "model")

        like = jax.eval_shape(layer.init, jax.random.key(0), shared)
        lies = jax.tree.map(lambda axes: jax.NamedSharding(mesh, axes), linen.get_partition_spec(like))
        variables = jax.jit(layer.init, out_shardings=lies)(jax.random.key(0), shared)
        weight = variables["params"]["weight_hh_l1"]
        assert isinstance(weight, linen.Partitioned) and weight.names == (None, "model"), weight
        assert weight.value.sharding.spec == PartitionSpec(None, "model"), weight.value.sharding
        output = jax.jit(lambda variables, x: layer.apply(variables, x)[0])(variables, shared)
        whole = jaxrnn.apply(layer.spec, linen.unbox(variables)["params"], x)[0]
        np.testing.assert_allclose(output, whole, rtol=0, atol=1e-12)
"""


def test_modules_have_it_in_their_metadata() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MODULES], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_axis_that_cannot_be() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 4)
    params, x = spec.init(jax.random.key(0), jnp.float64), jnp.ones((3, 1, 2))

    def run(mesh: jax.sharding.Mesh, axis: Any) -> None:
        with jax.set_mesh(mesh):
            jaxrnn.apply(spec, params, x, hidden_axis=axis)

    with pytest.raises(
        ValueError, match=r"hidden_axis should be of the mesh in jax.set_mesh, which has \(\), or .*got 'm'"
    ):
        jaxrnn.apply(spec, params, x, hidden_axis="m")
    with pytest.raises(ValueError, match=r"which has \('m',\), or be a logical name .*got 'n'"):
        run(jax.make_mesh((1,), ("m",)), "n")
    with pytest.raises(ValueError, match="got 3"):
        run(jax.make_mesh((1,), ("m",)), 3)
    with jax.set_mesh(jax.make_mesh((1,), ("m",))), pytest.raises(ValueError, match="got 'n'"):
        jaxrnn.linen.GRU(2, 4, hidden_axis="n")
    with jax.set_mesh(jax.make_mesh((1,), ("m",))), pytest.raises(ValueError, match="got 'n'"):
        jaxrnn.GRU(2, 4, hidden_axis="n", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of type jax.sharding.AxisType.Auto, got 'm'"):
        run(jax.make_mesh((1,), ("m",)), "m")
