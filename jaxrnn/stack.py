"""Layers, directions and dropout, on time-major padded rows."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import meshes, recurrence
from jaxrnn.cells import Arrays
from jaxrnn.layouts import layout
from jaxrnn.options import Options
from jaxrnn.spec import Spec
from jaxrnn.steps import Marks, Settings, Steps


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
        x: the input, (time, batch, input_size); finite in the padding, too.
        state: the initial states, one array (num_layers * directions, batch, size) a state.
        marks: where rows have ended, and where the state is put back.
        reset_state: what the state is put back to, like `state`; zeros if None.
        dropout: a random key, or for each layer but the last what is kept, (time, batch, features); None for none.
        every: whether to return the states and gates of every step.

    Returns:
        The last layer's outputs, (time, batch, directions * output size), the last states, like `state`, and what each
        layer in each direction returns for every step.
    """
    sides = layout(len(spec.cell.gates), None if spec.proj_size else options.hidden_axis)
    keys = None if dropout is None or isinstance(dropout, tuple) else jax.random.split(dropout, spec.num_layers)
    last, runs = [], []
    for index in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            row = index * spec.num_directions + direction
            weights = {role: params[name] for role, name in spec.names(index, direction).items()}
            settings = Settings(spec.cell, options, direction == 1, every)
            first, restart = jax.tree.map(lambda a, row=row: a[row], (state, reset_state))
            steps, states = recurrence.layer(settings, weights, x, first, marks, restart)
            outputs.append(steps.output)
            last.append(states)
            runs.append(steps)
        x = sides.directions(outputs, index == spec.num_layers - 1)
        if index < spec.num_layers - 1 and dropout is not None:
            x = _dropped(spec, x, dropout[index] if keys is None else _kept(spec, keys[index], x))
    return x, tuple(jnp.stack(rows) for rows in zip(*last, strict=True)), runs


def _kept(spec: Spec, key: jax.Array, like: jax.Array) -> jax.Array:
    return meshes.sharded_like(jax.random.bernoulli(key, np.float32(1 - spec.dropout), like.shape), like)


def _dropped(spec: Spec, x: jax.Array, keep: jax.Array) -> jax.Array:
    scale = 1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0  # p = 1 gives zeros, not NaN
    return jnp.where(keep.astype(bool), x * scale, jnp.zeros_like(x))
