"""A character language model: an LSTM learns to write Python, from the source of the standard library.

Truncated back-propagation through time with the state carried on; AdamW, clipped, with a warm-up and a cosine. Killed
at any moment and started again with the same options, it goes on from its last checkpoint, and its losses are, bit for
bit, those of a run that was left alone. At the end it prints what was reached and a sample, and draws the losses.

    pip install -e ".[examples]"
    python examples/char_lm.py                   # 4 minutes on 4 cores; --quick: 15 seconds
    python examples/char_lm.py --checkpoint DIR  # saves every 100 steps, and goes on when it is started again
    python examples/char_lm.py --torch           # then PyTorch: the same initial weights, batches and schedule
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from library_text import CHARACTERS, ROWS, batch, text
from resumable import plot, run

import jaxrnn

DECAY, CLIP, QUICK_LIMIT = 0.01, 1.0, 3.5  # the limit in bits per character; without context it takes 4.6


def schedule(steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps)


class CharLM(nnx.Module):
    def __init__(self, hidden: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, **settings: Any) -> None:
        unit_normal = nnx.initializers.normal(1.0)  # as in PyTorch; Flax starts with smaller numbers, and learns slower
        self.embed = nnx.Embed(CHARACTERS, hidden, param_dtype=dtype, embedding_init=unit_normal, rngs=rngs)
        self.lstm = jaxrnn.LSTM(hidden, hidden, num_layers=2, param_dtype=dtype, rngs=rngs, **settings)
        self.head = nnx.Linear(hidden, CHARACTERS, param_dtype=dtype, rngs=rngs)

    def __call__(self, characters: jax.Array, state: Any = None) -> tuple[jax.Array, Any]:
        """The logits of each next character, (time, rows, CHARACTERS), and the state to go on from."""
        output, state = self.lstm(self.embed(characters), state)
        return self.head(output), state

    def bits(self, characters: jax.Array, state: Any = None) -> tuple[jax.Array, Any]:
        """The bits per character that a batch costs, and the state to go on from."""
        logits, state = self(characters[:-1], state)
        return optax.softmax_cross_entropy_with_integer_labels(logits, characters[1:]).mean() / np.log(2), state


class Learner(nnx.Module):
    """All that training changes: the model, the optimizer's state, and the LSTM's."""

    def __init__(self, hidden: int, steps: int, rows: int = ROWS, **settings: Any) -> None:
        self.model = CharLM(hidden, **settings, rngs=nnx.Rngs(0))
        adamw = optax.adamw(schedule(steps), weight_decay=DECAY)
        adamw = optax.chain(jaxrnn.checkpoint.clip_grad_norm(CLIP), adamw)
        self.optimizer = nnx.Optimizer(self.model, adamw, wrt=nnx.Param)
        self.h, self.c = (nnx.Variable(jnp.zeros((2, rows, hidden), settings.get("dtype"))) for _ in range(2))

    @nnx.jit
    def train(self, characters: jax.Array) -> jax.Array:
        """Make a step; its gradient ends where the carried state comes in."""
        bits = nnx.value_and_grad(CharLM.bits, has_aux=True)
        (loss, state), gradient = bits(self.model, characters, (self.h[...], self.c[...]))
        self.h[...], self.c[...] = state
        self.optimizer.update(self.model, gradient)
        return loss

    @nnx.jit
    def validate(self, characters: jax.Array) -> jax.Array:
        return self.model.bits(characters)[0]


def sample(model: CharLM, size: int = 400) -> str:
    """What the model writes, one character at a time, on from a start."""
    characters, state, step = list(b"class "), (jnp.zeros((2, model.lstm.hidden_size)),) * 2, nnx.jit(CharLM.__call__)
    for place in range(size):
        logits, state = step(model, np.array(characters[place : place + 1]), state)
        if place + 1 == len(characters):  # the logits are divided to write more tidily than the text is
            characters.append(int(jax.random.categorical(jax.random.key(place), logits[0] / 0.7)))
    return bytes(characters).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description="A character language model of the standard library's source.")
    parser.add_argument("--steps", type=int, default=2400, help="training steps (default: 2400)")
    parser.add_argument("--hidden", type=int, default=256, help="features of a layer (default: 256)")
    parser.add_argument("--quick", action="store_true", help=f"200 steps of 96; fails if not below {QUICK_LIMIT} bits")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save there, and go on from what is there")
    parser.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next (default: 100)")
    parser.add_argument("--torch", action="store_true", help="train in PyTorch too; fails if they end 2 %% apart")
    parser.add_argument("--plot", type=Path, default="char_lm.png", help="where to draw the losses (char_lm.png)")
    arguments = parser.parse_args()
    steps, hidden = (200, 96) if arguments.quick else (arguments.steps, arguments.hidden)
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    held_out = text()[1]
    learner = Learner(hidden, steps)
    weights = jaxrnn.state_dict(learner.model)
    curves = {"jax": run(learner, steps, batch, held_out, arguments.checkpoint, arguments.every)}
    if arguments.torch:
        from char_lm_torch import train_torch

        curves["torch"] = train_torch(weights, hidden, steps, batch, held_out)
    ends = {name: curve[-1][-1] for name, curve in curves.items()}
    for name, end in ends.items():
        print(f"{name}: {end:.4f} bits per held-out character after {steps} steps")
    print(sample(learner.model))
    plot(curves, arguments.plot, "bits per character")
    limit = QUICK_LIMIT if arguments.quick else np.inf
    return 0 if ends["jax"] < limit and max(ends.values()) < 1.02 * min(ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
