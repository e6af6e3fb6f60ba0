"""Run a recurrent model on a microphone: one frame of sound at a time, the state carried on from call to call.

A two-layer GRU learns to say, frame by frame, whether a tone sounds through noise; it is trained on whole
recordings. Then it listens: a simulated microphone hands over buffers of whatever size it likes, and each full frame
goes through one compiled step, whose cost does not grow with the time that has passed. What the model said live is
compared with what it says of the whole recording at once (exit status 1 if they differ by more than a 1e-5th).

    pip install -e ".[examples]"
    python examples/streaming.py
"""

import argparse
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn

RATE, FRAME = 8000, 80  # samples a second, and in a frame: 10 ms
TOLERANCE = 1e-5


def make_recording(random: np.random.RandomState, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with tones that come and go: frames of samples, (frames, FRAME), and whether a tone sounds in each."""
    sounds = np.zeros(frames, bool)
    while sounds.mean() < 0.4:
        start = random.randint(frames)
        sounds[start : start + random.randint(10, 40)] = True
    frequency = np.repeat(random.uniform(200, 3000, frames // 50 + 1), 50 * FRAME)[: frames * FRAME]
    tone = 0.3 * np.sin(2 * np.pi * np.cumsum(frequency) / RATE).reshape(frames, FRAME)
    samples = tone * sounds[:, None] + 0.2 * random.standard_normal((frames, FRAME))
    return samples.astype(np.float32), sounds


def microphone(samples: np.ndarray, random: np.random.RandomState) -> Iterator[np.ndarray]:
    """Hand over what was recorded in buffers of up to 300 samples, as they come."""
    while len(samples):
        size = random.randint(1, 300)
        yield samples[:size]
        samples = samples[size:]


class Detector(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.gru = jaxrnn.GRU(FRAME // 2 + 1, 64, num_layers=2, rngs=rngs)
        self.head = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, frames: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The logit of a tone in each frame, (time,) or (time, batch), and the state to go on from."""
        spectrum = jnp.abs(jnp.fft.rfft(frames))
        output, state = self.gru(jnp.log1p(spectrum), state)
        return self.head(output)[..., 0], state


@nnx.jit
def train_step(model: Detector, optimizer: nnx.Optimizer, frames: jax.Array, sounds: jax.Array) -> jax.Array:
    def loss(model: Detector) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model(frames)[0], sounds).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def listen(model: Detector, buffers: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The logit of each frame as soon as it is full, and the seconds that each took."""
    graph, params = nnx.split(model)

    @jax.jit
    def step(params: nnx.State, frame: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, state = nnx.merge(graph, params)(frame[None], state)
        return logits[0], state

    state = jnp.zeros((model.gru.num_layers, model.gru.hidden_size))
    step(params, jnp.zeros(FRAME), state)  # compiles, before anything sounds
    logits, seconds, waiting = [], [], np.empty(0, np.float32)
    for buffer in buffers:
        waiting = np.concatenate([waiting, buffer])
        while len(waiting) >= FRAME:
            start = time.perf_counter()
            logit, state = step(params, waiting[:FRAME], state)
            logits.append(float(logit))
            seconds.append(time.perf_counter() - start)
            waiting = waiting[FRAME:]
    return np.array(logits), np.array(seconds)


def plot(path: str, logits: np.ndarray, sounds: np.ndarray) -> None:
    """How sure the model was of a tone in each frame, as it heard it."""
    figure = Figure(figsize=(7, 2.5), layout="constrained")
    axis = figure.subplots()
    seconds = np.arange(len(logits)) * FRAME / RATE
    axis.fill_between(seconds, 0, 1, where=sounds, step="mid", alpha=0.25, label="a tone sounds")
    axis.plot(seconds, 1 / (1 + np.exp(-logits)), linewidth=1, label="heard, frame by frame")
    axis.set(xlabel="seconds", ylabel="probability")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a recurrent model one step at a time, as on a microphone.")
    parser.add_argument("--quick", action="store_true", help="train for 100 steps, and listen for 2 seconds")
    parser.add_argument("--plot", help="draw what was heard in the first 3 seconds to this file")
    arguments = parser.parse_args()
    quick = arguments.quick
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    model = Detector(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    random = np.random.RandomState(0)
    for _ in track(range(100 if quick else 300), description="training"):
        recordings = [make_recording(random, 100) for _ in range(16)]
        frames, sounds = (np.stack(arrays, axis=1) for arrays in zip(*recordings, strict=True))
        train_step(model, optimizer, frames, sounds.astype(np.float32))

    frames, sounds = make_recording(random, 200 if quick else 3000)
    logits, seconds = listen(model, microphone(frames.ravel(), random))
    for name, flags in (("sounds", sounds), ("heard", logits > 0)):
        print(f"{name:<7}", "".join("#" if flag else "." for flag in flags[:70]))
    right = np.mean((logits > 0) == sounds)
    print(f"{len(logits)} frames of 10 ms: {right:.1%} right; a frame took {1e3 * np.median(seconds):.2f} ms,", end=" ")
    print(f"the slowest in a hundred {1e3 * np.quantile(seconds, 0.99):.2f} ms")
    if arguments.plot:
        plot(arguments.plot, logits[:300], sounds[:300])
    whole = np.asarray(model(frames)[0])
    difference = np.abs(whole - logits).max() / np.abs(whole).max()
    print(
        f"the whole recording at once gives the same: the largest difference is {difference:.1e} of the largest logit"
    )
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
