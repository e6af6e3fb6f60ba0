"""Train a recurrent policy in plain JAX: episodes that end inside the scanned window, and `reset=` between them.

In each of 128 mazes an agent sees a cue, left or right, at the first step of an episode only. At the end of a corridor
of unknown length it has to turn to where the cue was, and only that is rewarded. GRU and mazes take turns, a step each,
in one `lax.scan`; then the learner (advantage actor-critic) runs the GRU over the whole window at once, where `reset=`
empties its state before a new episode. The GRU begins with Flax's initial weights, which suit reinforcement learning,
and once more with PyTorch's. Exit status 1 if their logits are more than a 1e-5th of the largest apart, if fewer than
95 % of the last turns are right, if PyTorch's weights get there as soon as Flax's, or if a policy without memory, which
has to guess, has above 60 %.

    pip install -e ".[examples]"
    python examples/recurrent_policy.py
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn
from jaxrnn.initializers import FLAX

MAZES, WINDOW = 128, 32  # side by side; steps between two updates
LEFT, RIGHT, FORWARD = range(3)  # the actions; a cue is LEFT or RIGHT
DISCOUNT, ENTROPY_BONUS, TOLERANCE = 0.95, 0.01, 1e-5
GRU = jaxrnn.Spec(jaxrnn.GRU_CELL, input_size=3, hidden_size=32)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1), optax.adam(optax.exponential_decay(3e-3, 1000, 0.5)))
Agents = tuple[jax.Array, jax.Array, jax.Array]  # the mazes, the GRU's states in them, and which of those to empty


def new_mazes(key: jax.Array, longest: int) -> jax.Array:
    """In each maze the cue, the length of the corridor, and where the agent stands in it: (3, mazes) of integers."""
    return jax.random.randint(key, (3, MAZES), jnp.array([[LEFT], [5], [0]]), jnp.array([[RIGHT], [longest], [0]]) + 1)


def policy(params: dict, seen: jax.Array, state: jax.Array, reset: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """For (time, mazes, 3) the logits of the actions and the value, at each step, and the state to go on from."""
    output, state = jaxrnn.apply(GRU, params["gru"], seen, state, reset=reset)
    output = output @ params["head"]
    return output[..., :3], output[..., 3], state


@jax.jit
def play_and_learn(params: dict, optimizer: tuple, agents: Agents, longest: int, memory: bool, key: jax.Array) -> tuple:
    """Play a window of steps and learn from it; also the right turns, all turns, and how far the logits differ."""

    def step(agents: Agents, key: jax.Array) -> tuple[Agents, dict[str, jax.Array]]:
        (cue, length, position), state, reset = agents
        start = position == 0
        seen = jnp.stack([start & (cue == LEFT), start & (cue == RIGHT), position == length], axis=-1).astype(float)
        logits, value, state = policy(params, seen[None], jnp.where(reset[:, None], 0, state))  # a sequence of one step
        action_key, maze_key = jax.random.split(key)
        action = jax.random.categorical(action_key, logits[0])
        done = (position == length) & (action != FORWARD)
        onward = (position < length) & ((action == FORWARD) | start)  # nobody stays to see the cue again
        mazes = jnp.where(done, new_mazes(maze_key, longest), jnp.stack([cue, length, position + onward]))
        made = {"seen": seen, "reset": reset, "logits": logits[0], "value": value[0], "action": action, "done": done}
        return (mazes, state, done | ~memory), made | {"reward": (done & (action == cue)).astype(float)}

    def discounted(following: jax.Array, made: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        following = made["reward"] + DISCOUNT * jnp.where(made["done"], 0, following)
        return following, following

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        logits, value, _ = policy(params, window["seen"], agents[1], reset=window["reset"])
        log_probability = -optax.softmax_cross_entropy_with_integer_labels(logits, window["action"])
        entropy = optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))
        advantage = returns - value
        gain = log_probability * jax.lax.stop_gradient(advantage) + ENTROPY_BONUS * entropy
        return (0.5 * jnp.square(advantage) - gain).mean(), logits

    after, window = jax.lax.scan(step, agents, jax.random.split(key, WINDOW))
    value_after = step(after, key)[1]["value"]  # stands for the rewards that follow the window
    returns = jax.lax.scan(discounted, value_after, window, reverse=True)[1]
    gradient, logits = jax.grad(loss, has_aux=True)(params)
    updates, optimizer = OPTIMIZER.update(gradient, optimizer)
    off = jnp.abs(logits - window["logits"]).max() / jnp.abs(logits).max()
    return optax.apply_updates(params, updates), optimizer, after, (window["reward"].sum(), window["done"].sum(), off)


def train(name: str, initializers: Mapping[str, Any], memory: bool, updates: int, longest: int) -> np.ndarray:
    """For each update the right turns, all turns, and how far the logits differ: (3, updates)."""
    gru_key, head_key, maze_key, key = jax.random.split(jax.random.key(0), 4)
    params = {"gru": GRU.init(gru_key, **initializers), "head": 0.1 * jax.random.normal(head_key, (32, 4))}
    agents = new_mazes(maze_key, longest), jnp.zeros((1, MAZES, 32)), jnp.ones(MAZES, bool)
    optimizer, results = OPTIMIZER.init(params), []
    for update in track(range(updates), description=f"{name:<22}"):
        key = jax.random.fold_in(key, update)
        params, optimizer, agents, result = play_and_learn(params, optimizer, agents, longest, memory, key)
        results.append(result)
    return np.array(results).T


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a recurrent policy on a task that needs a memory.")
    parser.add_argument("--quick", action="store_true", help="corridors of up to 12 steps; 80 %% right suffices")
    parser.add_argument("--plot", default="recurrent_policy.png", help="the file of the plot (default: %(default)s)")
    arguments = parser.parse_args()
    updates, longest, wanted = (350, 12, 0.8) if arguments.quick else (3000, 60, 0.95)
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU or TPU the default is coarser
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis, good, reached = figure.subplots(), True, []
    runs = {"Flax's initial weights": (FLAX, True), "PyTorch's": ({}, True), "without memory": (FLAX, False)}
    for name, (initializers, memory) in runs.items():
        right, turns, off = train(name, initializers, memory, updates, longest)
        every_10 = [count.reshape(-1, 10).sum(axis=1) for count in (right, turns)]
        shares = every_10[0] / every_10[1]
        axis.plot(np.arange(10, updates + 1, 10), 100 * shares, label=name)
        share = right[-50:].sum() / turns[-50:].sum()
        print(f"{name}: {share:.1%} of the last {turns[-50:].sum():,.0f} turns are right; logits {off.max():.1e} apart")
        good &= bool(off.max() <= TOLERANCE and (share >= wanted if memory else share < 0.6))
        reached.append(10 * int(np.argmax(shares >= wanted) + 1))
    print(f"{wanted:.0%} of turns are right after {reached[0]} updates, with PyTorch's weights after {reached[1]:,}")
    good &= reached[0] < reached[1]
    axis.set(xlabel="updates", ylabel="right turns (%)", ylim=(0, 102), title=f"A corridor of 5 to {longest} steps")
    axis.legend(loc="lower right")
    figure.savefig(arguments.plot, dpi=150)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
