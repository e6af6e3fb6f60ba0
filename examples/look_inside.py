"""Look inside a trained LSTM: which gates saturate, what the forget gate keeps, and how far back gradients reach.

The model is the one that `train_torch.py` trained to tell code, comments and strings apart in Python. The program reads
a few lines, and finds the memory cell that best says whether a character is in a comment or a string. It plots that
cell, its forget gate, and the gates of all cells. Exit status 1 if the outputs are not those of the module itself, or
if no cell tells code from the rest for 80 % of the characters.

    pip install -e ".[examples]"
    python examples/look_inside.py
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from port_whole_model import CHECKPOINT, Highlighter

import jaxrnn

TEXT = """def greet(name):  # says hello
    words = "Hello, %s" % name
    print(words)
    return len(words)  # in characters
"""


def cells_that_tell(c: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How many characters each cell gets right, if its value above some threshold, or below it, means inside."""
    right = np.empty(c.shape[1])
    for k, values in enumerate(c.T):
        guesses = (values[None] > values[:, None]) == inside
        right[k] = np.maximum(guesses.mean(1), 1 - guesses.mean(1)).max()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description="Look at the gates and the memory of a trained LSTM.")
    parser.add_argument("--plot", default="look_inside.png", help="for the plot (default: %(default)s)")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    model = Highlighter(rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(model, jaxrnn.checkpoint.load(CHECKPOINT), prefix="model.")
    characters = np.frombuffer(TEXT.encode("ascii"), np.uint8).astype(np.int32)
    x = nnx.relu(model.convolution(model.embedding(characters[None])))
    params = nnx.to_pure_dict(nnx.state(model.lstm, nnx.Param))

    inside = jaxrnn.trajectory(model.lstm.spec, params, x)  # arrays (directions, batch, time, features)
    output, _ = model.lstm(x)
    same = bool(jnp.array_equal(jnp.concatenate([*inside.states["h"]], -1), output))
    print(f"the states over time are the module's outputs: {same}")
    for name, gate in inside.gates.items():
        low, high = (-0.95, 0.95) if name == "g" else (0.05, 0.95)
        print(f"gate {name}: {np.mean(gate < low):.0%} below {low}, {np.mean(gate > high):.0%} above {high}")

    kinds = np.asarray(model(characters[None])).argmax(-1)[0]
    c, f = (np.asarray(a[0, 0]) for a in (inside.states["c"], inside.gates["f"]))  # of the forward direction
    right = cells_that_tell(c, kinds > 0)
    best = int(right.argmax())
    print(f"cell {best} tells code from comments and strings for {right[best]:.0%} of the characters")

    last = len(TEXT) - 1

    def cell_at_the_end(x: jax.Array) -> jax.Array:
        return jaxrnn.trajectory(model.lstm.spec, params, x).states["c"][0, 0, last, best]

    reach = np.asarray(jnp.linalg.norm(jax.grad(cell_at_the_end)(x), axis=-1))[0]
    print(
        f"half of the gradient of its last value comes from the last {np.sum(np.cumsum(reach) > reach.sum() / 2)} steps"
    )

    figure = Figure(figsize=(14, 7), layout="constrained")
    memory, forget, gradient = figure.subplots(3, sharex=True, height_ratios=(2, 3, 1))
    memory.plot(c[:, best], label=f"cell {best}")
    memory.plot(f[:, best], label="its forget gate")
    memory.fill_between(range(len(TEXT)), 0, 1, where=kinds > 0, step="mid", alpha=0.2, label="comment or string")
    memory.legend(loc="upper left")
    image = forget.imshow(f.T, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    forget.set_ylabel("forget gates, by cell")
    figure.colorbar(image, ax=forget)
    gradient.semilogy(np.maximum(reach, 1e-12))
    gradient.set_ylabel("gradient")
    gradient.set_xticks(range(len(TEXT)), [ch if ch.isprintable() else "\\n" for ch in TEXT], fontsize=6)
    figure.savefig(arguments.plot, dpi=120)
    return 0 if same and right[best] >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
