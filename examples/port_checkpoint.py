"""Port a PyTorch checkpoint to Flax without PyTorch: find its recurrent modules, load, compare, and train on.

`denoiser.safetensors` is a small model that `train_torch.py` trained in PyTorch to remove noise and gaps from waves.
This program lists what is recurrent in it, builds the same model with jaxrnn, loads the weights by name, compares
every module with what PyTorch computed (exit status 1 if anything differs by more than 1e-5), and continues training.

    pip install -e ".[examples]"
    python examples/port_checkpoint.py
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn
from jaxrnn.__main__ import main as jaxrnn_command

STEM = Path(__file__).with_name("denoiser")
BATCH = 32
TOLERANCE = 1e-5


def make_waves(random: np.random.RandomState, size: int, steps: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Sums of two sine waves, (size, steps, 1): first with noise and gaps, then clean."""
    frequency, phase, amplitude = (
        random.uniform(low, high, (size, 2, 1)) for low, high in ((0.02, 0.15), (0, 2 * np.pi), (0.3, 1))
    )
    clean = (amplitude * np.sin(2 * np.pi * frequency * np.arange(steps) + phase)).sum(axis=1)[..., None]
    kept = random.uniform(size=clean.shape) > 0.15
    noisy = (clean + 0.4 * random.standard_normal(clean.shape)) * kept
    return noisy.astype(np.float32), clean.astype(np.float32)


class Denoiser(nnx.Module):
    """The model of `train_torch.py`: the same names and arguments, and `rngs`."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        # A checkpoint does not say batch_first: it has to be what it was in PyTorch.
        self.encoder = jaxrnn.LSTM(1, 24, num_layers=2, batch_first=True, bidirectional=True, rngs=rngs)
        self.decoder = jaxrnn.GRU(48, 24, batch_first=True, rngs=rngs)
        self.head = nnx.Linear(24, 1, rngs=rngs)

    def __call__(self, noisy: ArrayLike) -> jax.Array:
        return self.head(self.decoder(self.encoder(noisy)[0])[0])


def port(tensors: dict[str, np.ndarray]) -> Denoiser:
    model = Denoiser(rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(model, tensors)
    return model


def mean_squared_error(model: Denoiser, noisy: ArrayLike, clean: ArrayLike) -> jax.Array:
    return jnp.square(model(noisy) - clean).mean()


def compare(model: Denoiser, modules: list[str], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference from PyTorch in the model's output and loss, and in each module's output and states."""
    output = model(expected["input"])
    ours = {"output": output, "loss": jnp.square(output - expected["target"]).mean()}
    for module in modules:
        names = [f"{module}.{name}" for name in ("output", "h_n", "c_n") if f"{module}.{name}" in expected]
        results = jax.tree.leaves(getattr(model, module)(expected[f"{module}.input"]))
        ours |= dict(zip(names, results, strict=True))
    for name, value in ours.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{name} should have shape {expected[name].shape}, got {value.shape}")
    return {name: float(jnp.abs(value - expected[name]).max()) for name, value in ours.items()}


@nnx.jit
def train_step(model: Denoiser, optimizer: nnx.Optimizer, noisy: ArrayLike, clean: ArrayLike) -> None:
    optimizer.update(model, nnx.grad(mean_squared_error)(model, noisy, clean))


def plot(path: str, model: Denoiser, expected: dict[str, np.ndarray]) -> None:
    """One wave: its noisy input, the clean target, and what PyTorch and JAX make of it."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(expected["input"][0, :, 0], ".", color="tab:gray", label="noisy, with gaps")
    axis.plot(expected["target"][0, :, 0], color="black", linewidth=1, label="clean")
    axis.plot(expected["output"][0, :, 0], color="tab:orange", linewidth=4, alpha=0.5, label="PyTorch's")
    axis.plot(model(expected["input"])[0, :, 0], "--", color="tab:blue", label="JAX's")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Port a PyTorch checkpoint to Flax and train on from it.")
    parser.add_argument("--steps", type=int, default=200, help="training steps after the port (default: 200)")
    parser.add_argument("--plot", help="draw a wave to this file")
    arguments = parser.parse_args()
    steps = arguments.steps
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    checkpoint = STEM.with_suffix(".safetensors")
    jaxrnn_command(["inspect", str(checkpoint)])  # python -m jaxrnn inspect examples/denoiser.safetensors
    tensors = jaxrnn.checkpoint.load(checkpoint)
    modules = [found.prefix.removesuffix(".") for found in jaxrnn.checkpoint.find_rnns(tensors)]
    model = port(tensors)
    with np.load(f"{STEM}_expected.npz") as recorded:
        expected = dict(recorded)
    noisy, clean = expected["input"], expected["target"]
    if arguments.plot:
        plot(arguments.plot, model, expected)
    print("\nlargest difference from PyTorch")
    differences = compare(model, modules, expected)
    for name, difference in differences.items():
        print(f"  {name:<16}{difference:.1e}")
    if not all(difference <= TOLERANCE for difference in differences.values()):  # so that NaN fails too
        print(f"More than {TOLERANCE:g}: this is not the model that PyTorch trained.")
        return 1

    print(f"\nheld-out loss {expected['loss']:.4f} in PyTorch, {mean_squared_error(model, noisy, clean):.4f} ported")
    # A warm-up, because Adam's first steps are as large for weights that are right already as for any.
    optimizer = nnx.Optimizer(model, optax.adam(optax.linear_schedule(0, 2e-3, 50)), wrt=nnx.Param)
    random = np.random.RandomState(2)
    for _ in track(range(steps), description="training"):
        train_step(model, optimizer, *make_waves(random, BATCH))
    print(f"held-out loss {mean_squared_error(model, noisy, clean):.4f} after {steps} more steps in JAX")
    return 0


if __name__ == "__main__":
    sys.exit(main())
