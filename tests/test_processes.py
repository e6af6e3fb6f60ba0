"""Two processes that train over one mesh, as the hosts of a pod do: the losses and weights are those of one device."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROCESSES = 2
PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(sys.argv[1], {processes}, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jaxrnn

assert jax.process_count() == {processes} and len(jax.devices()) == 8
X, LENGTHS = np.random.RandomState(0).randn(9, 8, 3), np.array([9, 4, 0, 7, 1, 9, 2, 5])

def train(mesh, axis):
    def put(array, *axes):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(*axes)), array.__getitem__)

    @nnx.jit
    def create():
        model = jaxrnn.LSTM(3, 16, bidirectional=True, hidden_axis=axis, param_dtype=X.dtype, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, lengths, state):
        def loss(model):
            output, last = model(x, state, lengths=lengths)
            return jnp.mean((output - 0.5) ** 2), last

        (value, state), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return value, state

    with jax.set_mesh(mesh):
        model, optimizer = create()
        x, lengths = put(X, None, "batch"), put(LENGTHS, "batch")
        state = tuple(put(np.zeros((2, 8, 16)), None, "batch", "model") for _ in range(2))
        losses = []
        for _ in range(6):
            loss, state = step(model, optimizer, x, lengths, state)
            losses.append(float(loss))
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))

def mesh(devices, shape):
    return jax.make_mesh(shape, ("batch", "model"), (AxisType.Auto,) * 2, devices=devices)

alone, weights = train(mesh(jax.local_devices()[:1], (1, 1)), None)
assert np.ptp(alone) > 0.01, alone
for shape in ((1, 8), (2, 4)):
    losses, sharded = train(mesh(jax.devices(), shape), "model")
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-10)
    for name, array in sharded.items():
        assert not array.is_fully_addressable
        for part in array.addressable_shards:
            np.testing.assert_allclose(part.data, np.asarray(weights[name])[part.index], rtol=0, atol=1e-10)
"""


def test_training_in_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "error", "-c", PROGRAM.format(processes=PROCESSES), address]
    processes = [
        subprocess.Popen(
            [*command, str(index)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    try:
        done = [process.communicate(timeout=900) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("the processes wait for each other")
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
