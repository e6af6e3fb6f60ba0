"""How long jaxrnn takes beside flax.nnx's own cells: `python -m parity.speed`, on a machine with nothing else to do.

Both sides are jitted, on one device, and take turns, so that what disturbs the machine disturbs both; figures are
medians. A training step is the value and the gradient, by parameters and input, of the outputs' sum of squares.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxrnn


class Workload(NamedTuple):
    """One layer in one direction: the kind, and the sizes of the batch, time, input and hidden state."""

    kind: str
    batch: int
    time: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.kind:4} {self.batch:3} {self.time:3} {self.input_size:3} {self.hidden_size:3}"


WORKLOADS = [Workload(kind, *sizes) for sizes in ((32, 100, 32, 128), (16, 64, 256, 256)) for kind in ("LSTM", "GRU")]
# OptimizedLSTMCell is flax's other form of the same cell; which one is faster depends on the sizes.
FLAX_CELLS = {"LSTM": (nnx.LSTMCell, nnx.OptimizedLSTMCell), "GRU": (nnx.GRUCell,)}


def _run_jaxrnn(module: Any, x: jax.Array) -> jax.Array:
    return module(x)[0]


def _run_flax(cell: Any, x: jax.Array) -> jax.Array:
    zeros = jnp.zeros((x.shape[1], cell.hidden_features), x.dtype)
    carry = zeros if isinstance(cell, nnx.GRUCell) else (zeros, zeros)
    return jax.lax.scan(cell, carry, x)[1]


def _sides(workload: Workload) -> Iterator[tuple[str, nnx.Module, Callable[[Any, jax.Array], jax.Array]]]:
    sizes = workload.input_size, workload.hidden_size
    yield "jaxrnn", getattr(jaxrnn, workload.kind)(*sizes, rngs=nnx.Rngs(0)), _run_jaxrnn
    for cell in FLAX_CELLS[workload.kind]:
        yield f"nnx.{cell.__name__}", cell(*sizes, rngs=nnx.Rngs(0)), _run_flax


def measure(workload: Workload, repeats: int) -> dict[tuple[str, str], float]:
    """The median times in milliseconds, by side and by what is run: "inference" or "training step"."""
    x = jnp.asarray(np.random.RandomState(0).randn(workload.time, workload.batch, workload.input_size), jnp.float32)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for side, module, run in _sides(workload):
        graph, params = nnx.split(module)

        def inference(params: Any, x: jax.Array, graph: Any = graph, run: Callable = run) -> jax.Array:
            return run(nnx.merge(graph, params), x)

        def loss(params: Any, x: jax.Array, inference: Callable = inference) -> jax.Array:
            return jnp.sum(inference(params, x) ** 2)

        for name, function in (("inference", inference), ("training step", jax.value_and_grad(loss, (0, 1)))):
            calls[side, name] = functools.partial(jax.jit(function), params, x)
    for call in calls.values():
        for _ in range(3):
            jax.block_until_ready(call())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure every workload and print a table. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m parity.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40, help="runs of each side (default: 40)")
    options = parser.parse_args(arguments)
    title = f"medians of {options.repeats} runs in ms, on one device of kind {jax.devices()[0].device_kind}"
    table = Table(title=title, caption="flax.nnx: the faster of the forms that flax has")
    for heading in ("cell   B   T   I   H", "what", "jaxrnn", "flax.nnx", "ratio"):
        table.add_column(heading, justify="right" if heading in ("jaxrnn", "flax.nnx", "ratio") else "left")
    for workload in track(WORKLOADS, description="timing", console=Console(stderr=True), transient=True):
        times = measure(workload, options.repeats)
        for what in ("inference", "training step"):
            ours = times.pop(("jaxrnn", what))
            theirs = min(value for (_, name), value in times.items() if name == what)
            table.add_row(str(workload), what, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
