"""Batches over several devices: the results are those of one device, and what the devices exchange is the gradients."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import jaxrnn
from parity.compile import COLLECTIVE

settings = {settings}
spec = jaxrnn.Spec(jaxrnn.{cell}, 3, 8, num_layers=2, **settings)
params = spec.init(jax.random.key(0), jnp.float64)
x = np.random.RandomState(0).randn(9, 8, 3)
marks = {marks}

def forward(params, x, marks):
    return jaxrnn.apply(spec, params, x, **marks)

def loss(params, x, marks):
    return jnp.sum(jnp.sin(forward(params, x, marks)[0]))

mesh = jax.make_mesh((4,), ("batch",))
everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "batch"))
rows = NamedSharding(mesh, PartitionSpec("batch"))
arguments = (
    jax.device_put(params, everywhere),
    jax.device_put(x, shared),
    {{name: jax.device_put(mark, rows if mark.ndim == 1 else shared) for name, mark in marks.items()}},
)
found = set()
for function, allowed in ((forward, set()), (jax.grad(loss, (0, 1)), {{"all-reduce"}})):
    compiled = jax.jit(function).lower(*arguments).compile()
    exchanged = COLLECTIVE.findall(compiled.as_text())
    assert set(exchanged) == allowed, exchanged
    assert len(exchanged) <= {most}, exchanged
    one = jax.jit(function)(params, x, marks)
    for a, b in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
print("exchanged", exchanged)
"""
# The cell, its settings, what it is called with, and how often a training step may exchange something.
CASES = {
    "LSTM, both directions": ("LSTM_CELL", {"bidirectional": True}, "{}", 1),
    "LSTM, ragged": ("LSTM_CELL", {"bidirectional": True}, '{"lengths": np.arange(8)}', 1),
    "projected LSTM, chunk by chunk": ("LSTM_CELL", {"proj_size": 3}, "{}", 5),  # two layers, two sizes of chunks
    "GRU with resets": ("GRU_CELL", {}, '{"reset": np.arange(72).reshape(9, 8) % 5 == 4}', 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_over_devices(case: str) -> None:
    cell, settings, marks, most = CASES[case]
    program = PROGRAM.format(cell=cell, settings=settings, marks=marks, most=most)
    if "chunk" in case:
        program = program.replace("**marks)", "**marks, remat=4)")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("exchanged ['all-reduce'")
