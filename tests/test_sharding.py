"""Batches over several devices: the results are those of one device, and what the devices exchange is the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from jax.sharding import NamedSharding, PartitionSpec

import jaxrnn
from parity.compile import COLLECTIVE

pytestmark = pytest.mark.usefixtures("optimized")

T, N, F, H = 9, 8, 3, 8  # time, batch, input features, hidden size
# The cell, its settings, what it is called with, and how many collectives a training step may have.
CASES: dict[str, tuple[jaxrnn.Cell, dict, dict, int]] = {
    "LSTM, both directions": (jaxrnn.LSTM_CELL, {"bidirectional": True}, {}, 1),
    "LSTM, ragged": (jaxrnn.LSTM_CELL, {"bidirectional": True}, {"lengths": np.arange(N)}, 1),
    "projected LSTM, chunk by chunk": (jaxrnn.LSTM_CELL, {"proj_size": 3}, {"remat": 4}, 5),  # 2 layers x 2 chunk sizes
    "GRU with resets": (jaxrnn.GRU_CELL, {}, {"reset": np.arange(T * N).reshape(T, N) % 5 == 4}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_over_devices(name: str) -> None:
    cell, settings, arguments, most = CASES[name]
    spec = jaxrnn.Spec(cell, F, H, num_layers=2, **settings)
    remat = arguments.get("remat", "none")
    marks = {key: value for key, value in arguments.items() if key != "remat"}

    def forward(params: Any, x: Any, marks: dict) -> Any:
        return jaxrnn.apply(spec, params, x, remat=remat, **marks)

    def loss(params: Any, x: Any, marks: dict) -> jax.Array:
        return jnp.sum(jnp.sin(forward(params, x, marks)[0]))

    mesh = jax.make_mesh((4,), ("batch",), devices=jax.devices()[:4])
    everywhere, columns, rows = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "batch"), ("batch",))
    )
    params, x = parameters(spec), normal(T, N, F)
    sharded = (
        jax.device_put(params, everywhere),
        jax.device_put(x, columns),
        {key: jax.device_put(mark, rows if mark.ndim == 1 else columns) for key, mark in marks.items()},
    )
    for function, allowed in ((forward, set()), (jax.grad(loss, (0, 1)), {"all-reduce"})):
        compiled = jax.jit(function).lower(*sharded).compile()
        exchanged = COLLECTIVE.findall(compiled.as_text())
        assert set(exchanged) == allowed, exchanged
        assert len(exchanged) <= most, exchanged
        assert_close(compiled(*sharded), jax.jit(function)(params, x, marks))
