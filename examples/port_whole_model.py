"""Port a whole PyTorch model (embedding, convolution, BiLSTM, linear head), fine-tune it in JAX, and hand it back.

`train_torch.py` trained it to tell code, comments and strings apart in Python. It is loaded by name, compared with what
PyTorch recorded, trained on with NumPy's C headers, and written as a `.pt`, which `--torch` loads into PyTorch. Exit
status 1 if logits are more than a 1e-5th of the largest apart, or if fewer than 97 % of the characters are right in
headers that were held out.

    pip install -e ".[examples]"
    python examples/port_whole_model.py
"""

import argparse
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn

CHECKPOINT = Path(__file__).with_name("highlighter.safetensors")
KINDS = ["code", "comment", "string"]
C = r'(?P<comment>/\*.*?\*/|//[^\n]*)|(?P<string>"(?:\\.|[^"\\\n])*")'
WINDOW, EVERY, TOLERANCE = 128, 20, 1e-5


def read(paths: list[Path], pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """The characters of some files as ASCII codes, and for each the index in KINDS, by a pattern with their names."""
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    kinds = np.zeros(len(text), np.int32)
    for found in re.finditer(pattern, text, re.DOTALL):
        kinds[found.start() : found.end()] = KINDS.index(str(found.lastgroup))
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32), kinds


def windows(random: np.random.RandomState, data: tuple[np.ndarray, np.ndarray], size: int) -> list[np.ndarray]:
    """Pieces from anywhere in the files, so that one may begin inside of a comment: characters, and their kinds."""
    starts = random.randint(len(data[0]) - WINDOW, size=(size, 1))
    return [array[starts + np.arange(WINDOW)] for array in data]


class Highlighter(nnx.Module):  # named as in `train_torch.py`; with features last, nothing is transposed in between
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(128, 16, rngs=rngs)
        self.convolution = nnx.Conv(16, 32, kernel_size=5, rngs=rngs)
        self.lstm = jaxrnn.LSTM(32, 40, batch_first=True, bidirectional=True, rngs=rngs)
        self.head = nnx.Linear(80, len(KINDS), rngs=rngs)

    @nnx.jit
    def __call__(self, characters: jax.Array) -> jax.Array:
        return self.head(self.lstm(nnx.relu(self.convolution(self.embedding(characters))))[0])


@nnx.jit
def train_step(model: Highlighter, optimizer: nnx.Optimizer, characters: jax.Array, kinds: jax.Array) -> None:
    loss = optax.softmax_cross_entropy_with_integer_labels
    optimizer.update(model, nnx.grad(lambda model: loss(model(characters), kinds).mean())(model))


def train(name: str, model: Highlighter, optimizer: optax.GradientTransformation, steps: int) -> np.ndarray:
    """The share of right characters in every fourth header, which is held out, at first and after every 20 steps."""
    headers = sorted(Path(np.get_include()).rglob("*.h"))
    training = read([header for header in headers if header not in headers[::4]], C)
    characters, kinds = windows(np.random.RandomState(0), read(headers[::4], C), 256)
    trained, random, right = nnx.Optimizer(model, optimizer, wrt=nnx.Param), np.random.RandomState(1), []
    for step in track(range(steps + 1), description=f"{name:<12}"):
        if step > 0:
            train_step(model, trained, *windows(random, training, 32))
        if step % EVERY == 0:
            right.append((model(characters).argmax(axis=-1) == kinds).mean())
    print(f"{name}: {right[0]:.1%} of the characters in C headers right before, {right[-1]:.1%} after {steps} steps")
    return np.array(right)


def same(name: str, ours: jax.Array, torchs: np.ndarray) -> bool:
    difference = np.abs(np.asarray(ours) - torchs).max() / np.abs(torchs).max()
    print(f"{name}: the largest difference from PyTorch is {difference:.1e} of the largest logit")
    return bool(difference <= TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Port a whole PyTorch model, fine-tune it, and hand it back.")
    parser.add_argument("--quick", action="store_true", help="100 steps; 90 %% right suffices")
    parser.add_argument("--torch", action="store_true", help="load what was saved into PyTorch, and compare")
    parser.add_argument("--save", default="port_whole_model.pt", help="for the weights (default: %(default)s)")
    parser.add_argument("--plot", default="port_whole_model.png", help="for the plot (default: %(default)s)")
    arguments = parser.parse_args()
    steps, wanted = (100, 0.9) if arguments.quick else (1000, 0.97)
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    tensors = jaxrnn.checkpoint.load(CHECKPOINT)
    model = Highlighter(rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(model, tensors, prefix="model.")
    characters, logits = (tensors[f"recorded.{name}"] for name in ("characters", "logits"))
    good = same("loaded", model(characters), logits)
    axis = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 3e-3, 50, steps))  # warms up to spare good weights
    for name, start in (("from scratch", Highlighter(rngs=nnx.Rngs(1))), ("ported", model)):
        right = train(name, start, optimizer, steps)
        axis.plot(np.arange(len(right)) * EVERY, 100 * (1 - right), label=name)
    good &= bool(right[-1] >= wanted)  # of the ported one, which came last
    axis.set(xlabel="steps", ylabel="wrong characters (%)", yscale="log", ylim=(0.3, 100), title="Held-out C headers")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    axis.figure.savefig(arguments.plot, dpi=150)
    jaxrnn.checkpoint.save(arguments.save, jaxrnn.state_dict(model))
    if arguments.torch:
        from train_torch import highlighter_logits

        good &= same("saved", model(characters), highlighter_logits(arguments.save, characters))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
