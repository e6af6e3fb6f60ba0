"""Hidden units sharded over a mesh: one device's results, and no more exchanged between devices than has to be.

That is, in a forward pass, the recurrent weights once, from columns of torch's rows to each device's units of every
gate, and h at every step; in a training step also its cotangent at every step, and the gradients.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrnn
from parity.compile import COLLECTIVE

pytestmark = pytest.mark.usefixtures("optimized")

T, N, F, H = 9, 8, 3, 16  # time, batch, input features, hidden size


class Case(NamedTuple):
    cell: jaxrnn.Cell
    settings: dict[str, Any]
    arguments: dict[str, Any]  # of the call
    forward: list[str]  # what is exchanged at every step
    training: list[str]
    once_forward: list[str]  # and outside of the loop, over 8 devices
    once_training: list[str] | None = None  # None where it is not looked at
    batch_training: Sequence[str] = ()  # at every step, where the batch is sharded, too


GATHER, SUM, SWAP, SEND = "all-gather", "all-reduce", "all-to-all", "collective-permute"
CASES = {
    # The recurrent weights are transposed between devices, and in training their gradient is. For it h of all steps is
    # gathered, and so are the gradients of the input's weights and of two biases; that of x is a sum.
    "LSTM": Case(jaxrnn.LSTM_CELL, {}, {}, [GATHER], [GATHER, SUM], [SWAP], [GATHER] * 4 + [SUM] + [SWAP] * 2),
    "GRU of 2 layers with resets": Case(
        jaxrnn.GRU_CELL,
        {"num_layers": 2},
        {"reset": np.arange(T * N).reshape(T, N) % 5 == 4},
        [GATHER] * 2,
        [GATHER] * 2 + [SUM] * 2,
        [GATHER] + [SWAP] * 3,
    ),
    # Between the layers h of both directions is gathered at once; their outputs move to their own devices.
    "LSTM of 2 layers, both directions": Case(
        jaxrnn.LSTM_CELL,
        {"num_layers": 2, "bidirectional": True},
        {},
        [GATHER] * 4,
        [GATHER] * 4 + [SUM] * 4,
        [GATHER] + [SWAP] * 7 + [SEND],
        [GATHER] * (5 + 10) + [SUM] * 2 + [SWAP] * 14 + [SEND] * 2,
    ),
    "RNN, both directions, ragged": Case(
        jaxrnn.RNN_TANH,
        {"bidirectional": True},
        {"lengths": np.arange(N)},
        [GATHER] * 2,
        [GATHER] * 2 + [SUM] * 2,
        [SWAP] * 3 + [SEND],
    ),
    "LSTM with a mask, zoneout and recurrent dropout": Case(
        jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.2, c=0.5),
        {"recurrent_dropout": 0.5},
        {"mask": np.arange(T * N).reshape(T, N) % 3 > 0, "dropout_key": jax.random.key(0)},
        [GATHER],
        [GATHER, SUM],
        [SWAP],
    ),
    # Every device needs the whole projection, which is a sum over the devices.
    "projected LSTM": Case(jaxrnn.LSTM_CELL, {"proj_size": 5}, {}, [SUM], [SUM] * 2, []),
    "LSTM, gates recomputed": Case(jaxrnn.LSTM_CELL, {}, {"remat": "gates"}, [GATHER], [GATHER, SUM], [SWAP]),
    # The weights are not exchanged in chunks: h is, once more, and h of all steps of a chunk; the gradients add up.
    "LSTM, chunks recomputed": Case(
        jaxrnn.LSTM_CELL, {}, {"remat": 3}, [GATHER], [GATHER] * 3 + [SUM] * 2, [SWAP], None, [SUM]
    ),
}


MESHES = [(8, 1), (1, 8), (2, 4)]
QUICK = ("LSTM", "RNN, both directions, ragged", "projected LSTM", "LSTM, chunks recomputed")


def _shardings(spec: jaxrnn.Spec, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    return {
        name: NamedSharding(mesh, PartitionSpec(*("model" if hidden else None for hidden in axes)))
        for name, axes in spec.hidden_axes().items()
    }


def _exchanged(text: str) -> tuple[list[str], list[str]]:
    """The collectives of a compiled program, outside of loops and inside."""
    loops, inside, found = set(re.findall(r"body=%([\w.\-]+)", text)), False, ([], [])
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line):
            inside = header[1] in loops
        found[inside].extend(COLLECTIVE.findall(line))
    return sorted(found[0]), sorted(found[1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_results_and_collectives(name: str) -> None:
    case = CASES[name]
    spec = jaxrnn.Spec(case.cell, F, H, **case.settings)
    params, x = parameters(spec), normal(T, N, F)

    def forward(params: Any, x: Any, axis: str | None = "model") -> Any:
        return jaxrnn.apply(spec, params, x, hidden_axis=axis, **case.arguments)

    def loss(params: Any, x: Any, axis: str | None = "model") -> Any:
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(forward(params, x, axis)))

    functions = {"forward": forward, "training": jax.value_and_grad(loss, (0, 1))}
    one = jax.jit(lambda: {what: function(params, x, None) for what, function in functions.items()})()
    for batch, model in MESHES if case.batch_training or "ragged" in name else [(1, 8)]:
        mesh = jax.make_mesh((batch, model), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
        with jax.set_mesh(mesh):
            shardings = _shardings(spec, mesh), NamedSharding(mesh, PartitionSpec(None, "batch"))
            arguments = jax.device_put((params, x), shardings)
            found = {}
            for what, results in (("forward", None), ("training", (None, shardings))):
                compiled = jax.jit(functions[what], out_shardings=results).lower(*arguments).compile()
                assert_close(compiled(*arguments), one[what])
                found[what] = _exchanged(compiled.as_text())
        if model == 1:
            # The gradients, in one sum.
            assert found == {"forward": ([], []), "training": ([SUM], [*case.batch_training])}
            continue
        training = [*case.training, *(case.batch_training if batch > 1 else ())]
        assert {what: inside for what, (_, inside) in found.items()} == {
            "forward": sorted(case.forward),
            "training": sorted(training),
        }
        if batch == 1:
            assert found["forward"][0] == sorted(case.once_forward)
            if case.once_training is not None:
                assert found["training"][0] == sorted(case.once_training)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)


X = normal(T, N, F)


def _train(hidden_axis: str | None, x: Any) -> tuple[list[float], jaxrnn.LSTM]:
    model = jaxrnn.LSTM(F, H, 2, hidden_axis=hidden_axis, param_dtype=x.dtype, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x)[0] - 1) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    return [float(step(model, optimizer, x)) for _ in range(5)], model


def _axes(array: Any) -> PartitionSpec:
    return array.sharding.spec


def test_nnx_modules_train_sharded(mesh: jax.sharding.Mesh) -> None:
    columns = PartitionSpec(None, "model")
    alone, _ = _train(None, X)
    named = jaxrnn.LSTM(F, H, 2, hidden_axis="units", param_dtype=X.dtype, rngs=nnx.Rngs(0))  # a name for later
    assert named.weight_hh_l0.out_sharding == (None, "units")
    with nnx.logical_axis_rules([("units", "model")]):
        assert nnx.get_partition_spec(nnx.state(named))["weight_ih_l1"].get_raw_value() == columns
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(None, "batch")))
        losses, model = _train("model", x)
        assert_close({"losses": np.array(losses)}, {"losses": np.array(alone)}, atol=1e-10)
        assert [_axes(model.weight_hh_l0[...]), _axes(model.weight_ih_l1[...])] == [columns] * 2  # after the steps, too
        with nnx.logical_axis_rules([("units", "model")]):
            by_rule, model = _train("units", x)
        assert _axes(model.weight_hh_l0[...]) == columns
        assert by_rule == losses
        assert nnx.graphdef(model) == nnx.graphdef(named)
        jax.tree.map(lambda a, b: None, nnx.state(model), nnx.state(named))  # one structure, with a mesh and without
        abstract = nnx.eval_shape(lambda: jaxrnn.LSTM(F, H, 2, hidden_axis="model", rngs=nnx.Rngs(0)))
        jaxrnn.load_state_dict(abstract, jaxrnn.state_dict(model))
        assert _axes(abstract.weight_hh_l0[...]) == columns


def test_nnx_modules_are_created_as_flax_is_told(mesh: jax.sharding.Mesh) -> None:
    with jax.set_mesh(mesh):
        for eager in (True, False):
            with nnx.use_eager_sharding(eager):
                weight = jaxrnn.LSTM(F, H, hidden_axis="model", rngs=nnx.Rngs(0)).weight_hh_l0
            assert weight.out_sharding == (None, "model")
            assert weight[...].sharding.is_fully_replicated != eager


def test_linen_modules_are_created_sharded(mesh: jax.sharding.Mesh) -> None:
    layer = jaxrnn.linen.LSTM(F, H, 2, hidden_axis="model", param_dtype=X.dtype)
    assert layer.init(jax.random.key(0), X)["params"]["weight_hh_l1"].names == (None, "model")
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(None, "batch")))
        like = jax.eval_shape(layer.init, jax.random.key(0), x)
        shardings = jax.tree.map(lambda axes: NamedSharding(mesh, axes), linen.get_partition_spec(like))
        variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
        weight = variables["params"]["weight_hh_l1"]
        assert isinstance(weight, linen.Partitioned)
        assert weight.names == (None, "model")
        assert _axes(weight.value) == PartitionSpec(None, "model")
        output = jax.jit(lambda variables, x: layer.apply(variables, x)[0])(variables, x)
        assert_close(output, jaxrnn.apply(layer.spec, linen.unbox(variables)["params"], X)[0])


def test_an_axis_that_cannot_be() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 4)
    params, x = parameters(spec), np.ones((3, 1, 2))

    def run(mesh: jax.sharding.Mesh, axis: Any) -> None:
        with jax.set_mesh(mesh):
            jaxrnn.apply(spec, params, x, hidden_axis=axis)

    with pytest.raises(
        ValueError, match=r"hidden_axis should be an axis of the mesh in jax.set_mesh, which has \(\), or .*got 'm'"
    ):
        jaxrnn.apply(spec, params, x, hidden_axis="m")
    with pytest.raises(ValueError, match=r"which has \('m',\), or a logical axis .*got 'n'"):
        run(jax.make_mesh((1,), ("m",)), "n")
    with pytest.raises(ValueError, match="got 3"):
        run(jax.make_mesh((1,), ("m",)), 3)
    with jax.set_mesh(jax.make_mesh((1,), ("m",))), pytest.raises(ValueError, match="got 'n'"):
        jaxrnn.linen.GRU(2, 4, hidden_axis="n")
    with jax.set_mesh(jax.make_mesh((1,), ("m",))), pytest.raises(ValueError, match="got 'n'"):
        jaxrnn.GRU(2, 4, hidden_axis="n", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of type jax.sharding.AxisType.Auto, got 'm'"):
        run(jax.make_mesh((1,), ("m",)), "m")
