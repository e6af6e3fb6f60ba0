"""The character language model on many devices: the batch sharded, the hidden units, or both.

It trains the model of `char_lm.py` in float64 over a mesh of devices, and on one of them alone, and shows that the
losses are the same. Nothing in the model knows of devices but the name of one axis of the mesh, `hidden_axis`.

    pip install -e ".[examples]"
    python examples/data_parallel.py --devices 8                # the batch over 8 devices of this CPU
    python examples/data_parallel.py --devices 8 --model 4      # over 2, and over 4 the hidden units of each layer
    python examples/data_parallel.py --devices 8 --processes 2  # in two processes, 4 devices each
    python examples/data_parallel.py --pod                      # on every host of a pod, or a GPU cluster
"""

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from char_lm import Learner
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from library_text import batch
from rich.progress import track

ROWS, HIDDEN = 32, 64
TOLERANCE = 1e-10


def make_mesh(devices: list[jax.Device], model: int) -> Mesh:
    return jax.make_mesh((len(devices) // model, model), ("batch", "model"), (AxisType.Auto,) * 2, devices=devices)


def train(mesh: Mesh, steps: int, name: str) -> list[float]:
    """Train over the devices of a mesh; return the losses."""

    @nnx.jit  # the parameters come into being where they are to lie
    def create() -> Learner:
        learner = Learner(HIDDEN, steps, ROWS, hidden_axis="model", dtype=jnp.float64)
        lies = PartitionSpec(None, "batch", "model")  # (layers, rows, hidden units)
        learner.h[...], learner.c[...] = jax.lax.with_sharding_constraint((learner.h[...], learner.c[...]), lies)
        return learner

    rows = NamedSharding(mesh, PartitionSpec(None, "batch"))
    losses = []
    with jax.set_mesh(mesh):
        learner = create()
        for step in track(range(steps), description=name, disable=jax.process_index() > 0):
            characters = batch(step, ROWS)
            # Every process reads the same text, and hands its own devices their rows of it.
            shared = jax.make_array_from_callback(characters.shape, rows, characters.__getitem__)
            losses.append(float(learner.train(shared)))
    return losses


def plot(alone: list[float], together: list[float], label: str, path: Path) -> None:
    from matplotlib.figure import Figure  # here, since it takes a while

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    above.plot(alone, color="#1f5fbf", linewidth=3, alpha=0.4, label="one device")
    above.plot(together, color="#d9730d", linewidth=1, label=label)
    above.set_ylabel("bits per character")
    above.legend(frameon=False)
    below.semilogy(np.maximum(np.abs(np.subtract(alone, together)), 1e-17), color="#555555")
    below.axhline(TOLERANCE, color="#a3293d", linestyle="--", linewidth=0.8)
    below.set(xlabel="step", ylabel="difference")
    figure.savefig(path, dpi=150)


def start_processes(count: int) -> int:
    """Run this program once more for each process, all on this machine; return the worst exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *(f"-W{warning}" for warning in sys.warnoptions), *sys.argv, "--coordinator", address]
    processes = [subprocess.Popen([*command, "--process", str(index)]) for index in range(count)]
    return max(abs(process.wait()) for process in processes)


def main() -> int:
    parser = argparse.ArgumentParser(description="The character language model over a mesh of devices.")
    parser.add_argument("--devices", type=int, default=8, help="CPU devices in all (default: 8)")
    parser.add_argument("--model", type=int, default=1, help="how many of them to shard hidden units over (1)")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--pod", action="store_true", help="all devices of all hosts, each of which runs this program")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--quick", action="store_true", help="10 steps")
    parser.add_argument("--plot", type=Path, default="data_parallel.png", help="the losses (data_parallel.png)")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes > 1 and arguments.process is None:
        return start_processes(arguments.processes)

    jax.config.update("jax_enable_x64", True)
    if arguments.pod:
        jax.distributed.initialize()
    else:
        jax.config.update("jax_num_cpu_devices", arguments.devices // arguments.processes)
        if arguments.coordinator:
            jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    steps = 10 if arguments.quick else arguments.steps
    mesh = make_mesh(jax.devices(), arguments.model)
    label = f"{mesh.shape['batch']} x {mesh.shape['model']} devices in {jax.process_count()} processes"
    together = train(mesh, steps, label)
    alone = train(make_mesh(jax.local_devices()[:1], 1), steps, "one device")
    difference = float(np.abs(np.subtract(alone, together)).max())
    if jax.process_index() == 0:
        print(f"{label}: {together[0]:.4f} bits per character at first, {together[-1]:.4f} after {steps} steps")
        print(f"no loss is more than {difference:.1e} from that of one device")
        plot(alone, together, label, arguments.plot)
    return 0 if difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
