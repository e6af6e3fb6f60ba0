"""Layers, directions and dropout, on time-major padded rows."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._core import meshes, recurrence
from jaxrnn._core.layouts import layout
from jaxrnn._core.options import Options
from jaxrnn._core.steps import Layer, Marks, Settings, Steps
from jaxrnn.cells import Arrays
from jaxrnn.engines import layer_engine_for
from jaxrnn.spec import Spec


def run(
    spec: Spec,
    options: Options,
    params: dict[str, jax.Array],
    x: jax.Array,
    state: Arrays,
    marks: Marks,
    reset_state: Arrays | None,
    dropout: jax.Array | Arrays | None,
    every: bool = False,
) -> tuple[jax.Array, Arrays, list[Steps]]:
    """Run all layers.

    Args:
        spec: the settings.
        options: how to run.
        params: the parameters by name, in x's dtype.
        x: the input, (T, B, I); finite in the padding, too.
        state: the initial states: (L * D, B, P), then (L * D, B, H).
        marks: where rows have ended, and where the state is reset.
        reset_state: what the state is reset to, like `state`; zeros if None.
        dropout: a random key, or for each layer but the last the outputs that are kept, (T, B, D * P); None for no
            dropout.
        every: whether to return the states and gates of every step.

    Returns:
        The last layer's outputs, (T, B, D * P); the last states, like `state`; and the `Steps` of each layer in each
        direction.
    """
    sides = layout(len(spec.cell.gates), None if spec.proj_size else options.hidden_axis)
    keys = None if dropout is None or isinstance(dropout, tuple) else jax.random.split(dropout, spec.num_layers)
    last: list[Arrays] = []
    runs: list[Steps] = []
    for index in range(spec.num_layers):
        rows = slice(index * spec.num_directions, (index + 1) * spec.num_directions)
        first, restart = jax.tree.map(lambda a, rows=rows: a[rows], (state, reset_state))
        weights = tuple(
            {role: params[name] for role, name in spec.names(index, direction).items()}
            for direction in range(spec.num_directions)
        )
        layer = Layer(spec.cell, options, weights, x, first, marks, restart, every)
        if engine := layer_engine_for(layer):
            x, states = engine.run_layer(layer)
            last += zip(*states, strict=True)
        else:
            found = _by_loops(layer)
            runs += [steps for steps, _ in found]
            last += [states for _, states in found]
            x = sides.directions([steps.output for steps, _ in found], index == spec.num_layers - 1)
        if index < spec.num_layers - 1 and dropout is not None:
            x = _dropped(spec, x, dropout[index] if keys is None else _kept(spec, keys[index], x))
    return x, tuple(jnp.stack(rows) for rows in zip(*last, strict=True)), runs


def _by_loops(layer: Layer) -> list[tuple[Steps, Arrays]]:
    """Run a layer direction after direction."""
    found = []
    for direction, weights in enumerate(layer.weights):
        settings = Settings(layer.cell, layer.options, direction == 1, layer.every)
        first, restart = jax.tree.map(lambda a, row=direction: a[row], (layer.state, layer.reset_state))
        found.append(recurrence.layer(settings, weights, layer.x, first, layer.marks, restart))
    return found


def _kept(spec: Spec, key: jax.Array, like: jax.Array) -> jax.Array:
    return meshes.sharded_like(jax.random.bernoulli(key, np.float32(1 - spec.dropout), like.shape), like)


def _dropped(spec: Spec, x: jax.Array, keep: jax.Array) -> jax.Array:
    scale = 1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0  # p = 1 gives zeros, not NaN
    return jnp.where(keep.astype(bool), x * scale, jnp.zeros_like(x))
